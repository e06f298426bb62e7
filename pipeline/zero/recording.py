"""A dictionary that records which of its keys are read: this shows which keys DeepSpeed knows.

DeepSpeed ignores a key that it does not know, and publishes no list of its keys. So megabase gives it a configuration
of this type: DeepSpeed does not know a key that it has not read. megabase needs no list that could become outdated.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView
from typing import Any


class RecordingDict(dict[str, Any]):
    """A dictionary that records every key that is read, present or not. Nested dictionaries record their own keys.

    Attributes:
        read: the keys that were read so far.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({k: RecordingDict(v) if isinstance(v, dict) else v for k, v in content.items()})
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    # Without these two, `**` and `in keys()` would bypass the methods above.
    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)

    def __copy__(self) -> RecordingDict:
        return self

    def unread(self) -> list[str]:
        """The keys of this dictionary that were never read, sorted."""
        return sorted(set(dict.keys(self)) - self.read)
