"""The tar writer, against tarfile and webdataset's own writer."""

import tarfile

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.prepare.tar_writer import TarWriter, _header, size_in_tar


@given(name=st.from_regex(r"[0-9a-z.-]{1,90}", fullmatch=True), size=st.integers(0, (8 << 30) - 1))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    assert _header(name, size) == info.tobuf(tarfile.GNU_FORMAT)


def test_headers_of_huge_members_are_those_of_tarfile() -> None:
    assert tarfile.TarInfo.frombuf(_header("a.seq", 9 << 30), "ascii", "strict").size == 9 << 30


@given(contents=st.lists(st.binary(max_size=2000), max_size=5))
def test_bytes_are_those_of_webdataset_but_for_the_padding_at_the_end(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("tars")
    ours = TarWriter(folder / "ours.tar")
    offsets = [ours.add(f"{number:05d}.seq", content) for number, content in enumerate(contents)]
    ours.finish()
    with webdataset.TarWriter(
        str(folder / "theirs.tar"), user="", group="", mode=0o644, mtime=0, encoder=False
    ) as theirs:
        theirs.tarstream.format = tarfile.GNU_FORMAT  # its argument `format` is ignored (webdataset 1.0.2)
        for number, content in enumerate(contents):
            theirs.write({"__key__": f"{number:05d}", "seq": content})
    written, expected = ((folder / name).read_bytes() for name in ("ours.tar", "theirs.tar"))
    assert written == expected[: len(written)] and not any(expected[len(written) :])
    assert len(written) == ours.size == 1024 + sum(size_in_tar(len(content)) for content in contents)
    assert [
        written[at : at + len(content)] for at, content in zip(offsets, contents, strict=True)
    ] == contents
