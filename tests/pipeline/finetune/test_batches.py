"""The order of training examples is a function of (seed, step); padding has no label."""

import numpy as np
import torch

from megabase.datamodules.alphabet import BOS, PAD, Alphabet
from megabase.datamodules.batches.collate import IGNORE
from megabase.datamodules.batches.numbered import Place
from megabase.models import ReformerConfig
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.finetune.batches import Encoder, EvalExamples, TrainExamples
from megabase.pipeline.finetune.examples import Examples, Problem
from megabase.pipeline.finetune.layout import layout_of

DNA = Alphabet.named("dna")


def encoder(problem: Problem, labels: list[object], *, causal: bool = True) -> Encoder:
    sequences = [b"ACGT"[: 1 + number % 4] * (1 + number) for number in range(len(labels))]
    splits = ["test" if number % 5 == 4 else "train" for number in range(len(labels))]
    examples = Examples(problem, [str(each) for each in range(len(labels))], sequences, labels, splits)
    config = ReformerConfig(vocab_size=9, causal=causal, max_length=4096)
    return Encoder(examples, DNA, layout_of(config, max(map(len, sequences))))


def config_of(seed: int = 3, reverse: float = 0.0) -> RunConfig:
    config = RunConfig()
    config.run.seed, config.data.global_batch, config.data.reverse_complement = seed, 8, reverse
    return config


def test_ranks_micro_batches_and_restarts_do_not_change_a_step() -> None:
    made = encoder(Problem(("a", "b")), [number % 2 for number in range(50)])

    def step(number: int, ranks: int, micro: int) -> list[tuple[int, ...]]:
        of_ranks = [TrainExamples(made, Place(rank, ranks, micro), config_of()) for rank in range(ranks)]
        turns = of_ranks[0].accumulation
        batches = [each.batch(number * turns + turn) for turn in range(turns) for each in of_ranks]
        assert {batch.targets for batch in batches} == {8.0}
        return [
            (sample, label, length, *codes)
            for batch in batches
            for sample, label, length, codes in zip(
                batch.samples.tolist(),
                batch.labels.tolist(),
                batch.lengths.tolist(),
                batch.codes.tolist(),
                strict=True,
            )
        ]

    for number in (0, 7):
        assert step(number, 1, 8) == step(number, 2, 2) == step(number, 4, 1)
    assert step(0, 1, 8) != step(1, 1, 8)
    epoch = [sample[0] for number in range(5) for sample in step(number, 1, 8)]
    assert sorted(epoch) == [each for each in range(50) if each % 5 != 4]
    late = TrainExamples(made, Place(0, 1, 8), config_of(), first_step=5)
    assert next(iter(late)).samples.tolist() == [sample[0] for sample in step(5, 1, 8)]


def test_a_row_is_bos_letters_and_padding() -> None:
    made = encoder(Problem(("a", "b")), [0, 1, 0])
    (batch,) = EvalExamples(made, Place(0, 1, 4), np.array([0, 2]))
    assert batch.codes.shape == (4, 10) and batch.targets == 2
    assert batch.codes[0].tolist() == [BOS, 5] + [PAD] * 8
    assert batch.codes[1].tolist() == [BOS, 5, 6, 7] + [5, 6, 7] * 2
    assert batch.lengths.tolist() == [2, 10, 0, 0] and batch.samples.tolist() == [0, 2, -1, -1]
    assert batch.labels.tolist() == [0, 0, IGNORE, IGNORE]
    both_sides = encoder(Problem(("a", "b")), [0, 1, 0], causal=False)
    (batch,) = EvalExamples(both_sides, Place(0, 1, 1), np.array([0]))
    assert batch.codes.tolist() == [[5] + [PAD] * 8]  # every batch has the length of the longest example


def test_numbers_are_scaled_and_survive_as_bits() -> None:
    made = encoder(Problem((), mean=2.0, scale=4.0), [10.0, 2.0])
    (batch,) = EvalExamples(made, Place(0, 1, 3), np.array([0, 1]))
    values = batch.labels.view(torch.float32)
    assert values[:2].tolist() == [2.0, 0.0] and values[2].isnan()


def test_the_other_strand_turns_the_labels_of_bases_too() -> None:
    labels = [np.array([1.0, 0.0, np.nan, 1.0])] * 10
    examples = Examples(
        Problem(("a", "b"), per_base=True), list("0123456789"), [b"AACG"] * 10, labels, ["train"] * 10
    )
    made = Encoder(examples, DNA, layout_of(ReformerConfig(vocab_size=9, max_length=64), 4))
    batch = TrainExamples(made, Place(0, 1, 8), config_of(reverse=1.0)).batch(0)
    assert batch.targets == 24
    assert batch.codes[0].tolist() == [BOS, *DNA.encode(np.frombuffer(b"CGTT", np.uint8)).tolist()]
    assert batch.labels[0].tolist() == [1, IGNORE, 0, 1]
    some = TrainExamples(made, Place(0, 1, 8), config_of(reverse=0.5)).of_step(0)[1]
    assert 0 < some.sum() < 8
