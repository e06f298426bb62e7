"""An evaluation made by hand."""

from megabase.pipeline.inference.evaluation.compressors import Compressed
from megabase.pipeline.inference.evaluation.result import (
    Context,
    Copy,
    Evaluation,
    Named,
    Position,
    Recall,
)
from megabase.pipeline.inference.evaluation.tally import Interval
from megabase.pipeline.inference.model import Source


def bits(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.01, 5000)


def made(**changes: object) -> Evaluation:
    """Every part is there; `changes` replace some."""
    recall = Recall(
        128, 24, 0.03, bits(1.91), [Copy("exact", 64, bits(0.4), bits(1.51)), Copy("exact", 128, None, None)]
    )
    whole = {
        "model": Source("runs/a", 1200, "runs/a/checkpoints/step-1200"),
        "shards": "shards",
        "split": "valid",
        "alphabet": "dna",
        "objective": "causal",
        "length": 64,
        "windows": 3000,
        "bits_per_base": bits(1.9),
        "markov": {0: 1.99, 1: 1.97},
        "compressors": [Compressed("xz", 2.1, 4850)],
        "positions": [Position(0, 16, bits(1.95)), Position(16, 64, bits(1.88))],
        "contexts": [Context(32, bits(1.92)), Context(64, bits(1.9))],
        "cases": [Named("lower case", bits(1.7)), Named("upper case", bits(1.91))],
        "classes": [Named("gene", bits(1.85)), Named("(none)", None)],
        "recall": recall,
    }
    return Evaluation(**(whole | changes))  # type: ignore[arg-type]
