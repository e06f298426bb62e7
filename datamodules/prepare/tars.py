"""Walks the members of a tar, and notices one that is cut off or damaged."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO


def headers(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an uncompressed tar, in order; each says where the member's content lies.

    Args:
        file: a seekable file; it may be moved between two headers.

    Raises:
        tarfile.TarError: the tar is cut off or damaged, or the file is not a tar.
        OSError: the file cannot be read.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (header := tar.next()) is not None:
            yield header
            tar.members = []  # type: ignore[attr-defined] # else it keeps them all
        end = tar.offset
    file.seek(end)
    if any(file.read(tarfile.BLOCKSIZE)):  # tarfile reads a damaged header as the end of the tar
        raise tarfile.ReadError(f"no header at byte {end}")
