"""Files in the safetensors format: tensors by name, and no code.

The format's own library reads them. It can write only tensors that are all in memory. `write` takes tensors in pieces
instead, so an export needs no memory for the whole model. A file is the length of its header
(8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets; strings by name under
`__metadata__`), and the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabase.models.config import ConfigError

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
"""The dtypes that a file of weights may have, with their names in the format."""


def write(
    path: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    read: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a new file, piece by piece, and flush it to disk.

    Args:
        path: must not exist.
        shapes: the shapes of all tensors, by name, in the order of the file.
        dtype: the dtype of all tensors in the file.
        read: called with one name after the other; returns the tensor's elements in order, as flat pieces of any size.
        metadata: strings by name, for the header.

    Raises:
        OSError: the file cannot be written.
        ValueError: `read` returned more or fewer elements than the shape has.
    """
    with path.open("xb") as file:
        file.write(_header(shapes, dtype, metadata))
        for name, shape in shapes.items():
            count = 0
            for piece in read(name):
                count += piece.numel()
                file.write(piece.to(dtype).contiguous().view(torch.uint8).numpy().data)
            if count != shape.numel():
                raise ValueError(f"{name} has {count} elements, not the {shape.numel()} of its shape")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file into memory.

    Returns:
        Tensors by name, on the CPU. They are copies: the file may change or go away afterwards.

    Raises:
        ConfigError: the file is damaged, is not in the format, or has tensors of other dtypes than DTYPES.
        OSError: the file cannot be read.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES.values():
                    known = ", ".join(DTYPES.values())
                    raise ConfigError(f"{path} has {name} in {dtype}, not in one of {known}: export it again")
                tensors[name] = file.get_tensor(name).clone()
    except SafetensorError as error:
        raise ConfigError(f"{path} is damaged or not a safetensors file ({error}): export it again") from None
    return tensors


def _header(shapes: Mapping[str, torch.Size], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
