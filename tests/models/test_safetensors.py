"""The format's library reads the files of `write` as they were written; damaged files are refused in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from megabase.models import ConfigError
from megabase.models.safetensors import DTYPES, read, write


def in_pieces(tensors: dict[str, Tensor], size: int) -> Any:
    """The `read` argument of `write`: tensors in pieces of `size` elements."""

    def pieces(name: str) -> Iterator[Tensor]:
        flat = tensors[name].reshape(-1)
        return (flat[i : i + size] for i in range(0, len(flat), size))

    return pieces


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtype=st.sampled_from(list(DTYPES)),
    size=st.integers(1, 7),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, size: int
) -> None:
    path = tmp_path_factory.mktemp("format") / "x.safetensors"
    tensors = {f"t{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    write(path, {n: t.shape for n, t in tensors.items()}, dtype, in_pieces(tensors, size), {"format": "pt"})
    for found in (read(path), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[n], t) and found[n].dtype == dtype for n, t in tensors.items())


def test_files_of_the_formats_library_are_read(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(3, 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = read(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_weights_are_copies_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.arange(100.0)}, path)
    found = read(path)["t"]
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(found, torch.arange(100.0))


@pytest.mark.parametrize("size", [3, 5])
def test_pieces_that_do_not_make_the_shape_are_refused(tmp_path: Path, size: int) -> None:
    pieces = in_pieces({"t": torch.zeros(size)}, 2)
    with pytest.raises(ValueError, match=f"t has {size} elements, not the 4"):
        write(tmp_path / "x.safetensors", {"t": torch.Size([4])}, torch.float32, pieces, {})


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"t": torch.zeros(300)}, path)
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:5],
        content[:900],
        content[:-4],
        content + b"\0",
        b"\xff" * 64,
        content[:8] + b"[" + content[9:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"damaged or not a safetensors file.*export it again") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [[-2, -2], [4.0], [True, 4], "4", None, [5], [2**62, 2**62]])
def test_a_header_with_an_impossible_shape_is_refused(tmp_path: Path, shape: Any) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ConfigError, match="damaged or not a safetensors file"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "F8_E4M3", "F4"])
def test_weights_that_are_not_floating_point_are_refused(tmp_path: Path, dtype: str) -> None:
    sizes = {"I64": 8, "BOOL": 1, "F8_E4M3": 1, "F4": 0.5}
    end = int(4 * sizes[dtype])
    header = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, end]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(end))
    with pytest.raises(ConfigError, match=f"w in {dtype}, not in one of F32, BF16"):
        read(tmp_path / "x.safetensors")


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        read(tmp_path / "x.safetensors")
