"""Writes a tar with constant headers, so that the same content gives the same bytes.

`webdataset.TarWriter`, set to the same owner, mode, time and format, writes the same bytes (a test compares them) and
pads the end to 10,240 bytes. It is not used because `prepare` would be slower: `benchmarks/prepare.py` measures both.
"""

import os
import tarfile
from pathlib import Path

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_LARGEST = 8 << 30
"""From this size on, a member's size is no longer written in octal digits."""

_TEMPLATE = tarfile.TarInfo().tobuf(tarfile.GNU_FORMAT)
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[124:135]) - sum(_TEMPLATE[148:156]) + 8 * ord(" ")


class TarWriter:
    """A tar file that is being written. Closed without `finish`, its end is missing.

    Attributes:
        size: bytes of the file once it is finished.
    """

    def __init__(self, path: Path) -> None:
        self.size = len(_END)
        self._file = path.open("wb")

    def add(self, name: str, content: bytes) -> int:
        """Append a member with a short ASCII name; returns the byte of the file at which its content begins."""
        offset = self.size - len(_END) + _BLOCK
        self._file.writelines((_header(name, len(content)), content, _END[: -len(content) % _BLOCK]))
        self.size += size_in_tar(len(content))
        return offset

    def finish(self) -> None:
        """Write the end, wait until the file is on disk, and close it."""
        self._file.write(_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


def size_in_tar(size: int) -> int:
    """Bytes that a member of `size` bytes takes in a tar: header and padded content."""
    return _BLOCK * (1 + -(-size // _BLOCK))


def _header(name: str, size: int) -> bytes:
    """The header of a member with a short ASCII name, as `tarfile` makes it, but ten times as fast.

    Only name, size and checksum differ from one member to the next (POSIX ustar: bytes 0 to 99, 124 to 135
    and 148 to 155; the checksum is the sum of all bytes, with its own counted as spaces).
    """
    if size >= _LARGEST:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    label, digits = name.encode("ascii"), b"%011o" % size
    total = _TEMPLATE_SUM + sum(label) + sum(digits)
    return b"".join(
        (
            label.ljust(100, b"\0"),
            _TEMPLATE[100:124],
            digits,
            _TEMPLATE[135:148],
            b"%06o" % total,
            _TEMPLATE[154:],
        )
    )
