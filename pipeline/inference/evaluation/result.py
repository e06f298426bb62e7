"""What an evaluation found, as dataclasses: written as JSON, printed as tables, drawn as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megabase.pipeline.inference.evaluation.compressors import Compressed
from megabase.pipeline.inference.evaluation.tally import Interval
from megabase.pipeline.inference.model import Source


@dataclass(frozen=True)
class Named:
    """A class of bases, by its name; None: no base of it was scored."""

    name: str
    bits: Interval | None


@dataclass(frozen=True)
class Position:
    """Bases at positions [start, end) of their window."""

    start: int
    end: int
    bits: Interval | None


@dataclass(frozen=True)
class Context:
    """The bases that all lengths score, in contexts of `length`."""

    length: int
    bits: Interval | None


@dataclass(frozen=True)
class Copy:
    """Copies of one kind at one distance from their sources.

    Attributes:
        kind: exact, mutated or inverted.
        distance: bases from the end of the source to the start of the copy.
        bits: of the copies, with their sources.
        gain: how many bits per base the same bases have more without the sources.
    """

    kind: str
    distance: int
    bits: Interval | None
    gain: Interval | None


@dataclass(frozen=True)
class Recall:
    """Copies of all kinds.

    Attributes:
        copy: bases of a copy.
        unscored: of these, bases at the start that are not scored.
        changed: share of the changed bases of a mutated source.
        without: bits per base of the same bases without a source.
        copies: one for each kind and distance.
    """

    copy: int
    unscored: int
    changed: float
    without: Interval | None
    copies: list[Copy]


@dataclass(frozen=True)
class Evaluation:
    """The whole result. All numbers are bits per base.

    Attributes:
        model: where the model comes from.
        shards: directory or URL.
        split: its name.
        alphabet: name of the alphabet.
        objective: causal or masked.
        length: bases of a window.
        windows: number of windows scored.
        bits_per_base: of all scored bases.
        markov: of Markov models on the same split, by order; empty if they cannot be fitted.
        compressors: of installed programs on the same split.
        positions: by position in the window.
        contexts: by length of context; empty for a single length.
        cases: by letter case; empty if no scored letter is in lower case, which marks repeats.
        classes: of the annotation.
        recall: None if it was not measured.
    """

    model: Source
    shards: str
    split: str
    alphabet: str
    objective: str
    length: int
    windows: int
    bits_per_base: Interval
    markov: dict[int, float]
    compressors: list[Compressed]
    positions: list[Position]
    contexts: list[Context]
    cases: list[Named]
    classes: list[Named]
    recall: Recall | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
