"""The safetensors format, written and read piece by piece: tensors by name, and nothing that could run.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, data_offsets; under
`__metadata__` strings by name), and the tensors' bytes without gaps. The format's own library wants all tensors at
once and need not be installed; what is written here it reads, and the other way round.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.models.config import ConfigError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
# What the format's own library takes.
_MOST_HEADER_BYTES = 100_000_000


def write(
    path: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    read: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a new file, which is on disk when this returns.

    Args:
        shapes: of all tensors, by name, in the order of the file.
        read: gives a tensor's elements in order, flat, in as many pieces as it likes; asked for one after the other.

    Raises:
        OSError: it cannot be written. ValueError: `read` gave more or fewer elements than the shape has.
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
    """All tensors of a file, in memory of their own.

    Raises:
        ConfigError: it is no such file, torn, or holds other numbers than DTYPES. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        entries, begin = _entries(path, file.read(_LENGTH.size), file.read, size)
        tensors = {}
        for name, (dtype, shape, start) in entries.items():
            tensor = torch.empty(math.prod(shape), dtype=dtype)
            file.seek(begin + start)
            file.readinto(tensor.view(torch.uint8).numpy().data)
            tensors[name] = tensor.view(shape)
        return tensors


def _header(shapes: Mapping[str, torch.Size], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def _entries(
    path: Path, length: bytes, more: Callable[[int], bytes], size: int
) -> tuple[dict[str, tuple[torch.dtype, list[int], int]], int]:
    """{name: (dtype, shape, first byte)} and where in the file the bytes begin."""
    (count,) = _LENGTH.unpack(length) if len(length) == _LENGTH.size else (size,)
    begin = _LENGTH.size + count
    if count > _MOST_HEADER_BYTES or begin > size:
        raise ConfigError(f"{path} is not a safetensors file, or torn: export it again")
    entries = {}
    position = 0
    try:
        header = json.loads(more(count))
        header.pop(_METADATA, None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not all(type(length) is int and length >= 0 for length in shape):
                raise ValueError(f"{name} has the shape {shape}")
            if start != position or end - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} does not have the bytes of its shape")
            entries[name] = (dtype, shape, start)
            position = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} has a header that cannot be used ({error}): export it again") from None
    if begin + position != size:
        raise ConfigError(f"{path} has {size} bytes instead of {begin + position}: export it again")
    return entries, begin
