"""A dictionary that records which of its keys are read."""

import copy

from megabase.pipeline.zero.recording import RecordingDict


def test_every_way_to_read_a_key_is_recorded() -> None:
    recorded = RecordingDict({"a": 1, "b": 2, "c": 3, "d": {"e": 4, "f": 5}, "g": 6})
    assert recorded.get("a") == 1 and recorded["b"] == 2 and "missing" not in recorded
    assert "c" in recorded.keys()  # noqa: SIM118
    assert recorded["d"]["e"] == 4
    assert recorded.read == {"a", "b", "c", "d", "missing"}
    assert recorded.unread() == ["g"] and recorded["d"].unread() == ["f"]


def test_unpacking_reads_every_key_and_a_copy_is_the_same_dictionary() -> None:
    recorded = RecordingDict({"a": 1, "b": 2})
    assert (lambda **settings: settings)(**recorded) == {"a": 1, "b": 2}
    assert recorded.unread() == []
    again = RecordingDict({"a": 1})
    assert copy.copy(again)["a"] == 1 and again.read == {"a"}
