"""The tasks of benchmarks.learning are what they say, and its tables are written model by model."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.learning import duplication, homology, recall, sequence
from benchmarks.learning.__main__ import main
from benchmarks.learning.models import MODELS, Size, build
from benchmarks.learning.training import bits
from megabase.datamodules.alphabet import FIRST_LETTER
from megabase.models import Reformer, Seeds
from megabase.models.attention.lsh import LSHAttention

RECALL = [
    "recall",
    "--length=512",
    "--steps=2",
    "--every=1",
    "--dim=8",
    "--depth=2",
    "--heads=1",
    "--tokens=1024",
]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_can_be_built(name: str) -> None:
    config = build(name, Size(), 512)
    tokens = torch.randint(FIRST_LETTER, 9, (1, 512))
    assert Reformer(config)(tokens).isfinite().all()


def test_training_windows_hold_their_copy_twice() -> None:
    task = recall.Task(512, copy=100)
    for window in task.windows(3, seed=1):
        words = np.lib.stride_tricks.sliding_window_view(window, 100)
        assert len(np.unique(words, axis=0)) < len(words)
    assert np.array_equal(task.windows(3, seed=1), task.windows(3, seed=1))
    assert not np.array_equal(task.windows(3, seed=1), task.windows(4, seed=1))


def test_homologous_stretches_are_found_and_held_out_apart() -> None:
    drawn = np.random.default_rng(0)
    genome = drawn.integers(FIRST_LETTER, FIRST_LETTER + 4, 30_000).astype(np.uint8)
    changes = drawn.random(30_000) < 0.02
    relative = np.where(changes, (genome - FIRST_LETTER + 1) % 4 + FIRST_LETTER, genome).astype(np.uint8)
    moved = np.roll(relative, 5_000)
    task = homology.Task(genome, moved, length=2048, copy=512, windows=2)
    trained, scored = task.pairs
    assert len(trained.a) > 20 and len(scored.a) >= 2
    for pairs in task.pairs:
        assert np.array_equal((pairs.a + 5_000) % 30_000, pairs.b)
    assert trained.a.max() + 512 <= task.border <= scored.a.min()
    assert np.abs(trained.b[:, None] - scored.b).min() >= 512
    # h(0.02) + 0.02 log2 3
    assert task.least() == pytest.approx(0.173, abs=0.03)
    tokens, labels = task.make(np.arange(3), 7, held_out=True)
    without, same = task.make(np.arange(3), 7, held_out=True, source=False)
    assert torch.equal(labels, same)
    # The bases that are scored are those of the copy; only the source differs.
    assert torch.equal(tokens[:, -512:], without[:, -512:])
    assert not torch.equal(tokens, without)


@pytest.mark.slow
def test_full_attention_of_the_duplication_task_is_dense() -> None:
    task = duplication.Task(word=31, batch=2)
    config = duplication.settings("ours", Size(dim=32, heads=2, chunk=8), task)
    model = Reformer(config).eval()
    layer = next(module for module in model.modules() if isinstance(module, LSHAttention))
    qk, v = (torch.randn(2, 2, task.length, 16, dtype=torch.float64) for _ in range(2))
    with duplication.attending(model, "full"):
        found = layer.attend(qk, v, None, None)  # type: ignore[arg-type]
    scores = qk @ torch.nn.functional.normalize(qk, dim=-1).mT
    seen = torch.ones(task.length, task.length, dtype=torch.bool).tril(-1)
    expected = scores.masked_fill(~seen, -1e9).softmax(-1) @ v
    torch.testing.assert_close(found[:, :, 1:], expected[:, :, 1:], atol=1e-5, rtol=1e-5)
    assert "attend" not in vars(layer)
    tokens, _ = task.make(1, 0, 2)
    before = model(tokens, seeds=Seeds(1))
    with duplication.attending(model, 1):
        assert not torch.equal(model(tokens, seeds=Seeds(1)), before)
    assert torch.equal(model(tokens, seeds=Seeds(1)), before)


def test_only_the_second_word_has_labels() -> None:
    task = duplication.Task(word=5)
    tokens, labels = task.make(1, 0, 4)
    assert tokens.shape == (4, 12)
    assert (labels[:, :6] == -100).all() and (labels[:, -1] == -100).all()
    assert torch.equal(labels[:, 6:-1], tokens[:, 1:6])


@pytest.mark.slow
def test_a_table_goes_on_where_it_was_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    main([*RECALL, "--models", "ours", "--json", str(path)])
    first = json.loads(path.read_text())
    assert [row["model"] for row in first["rows"]] == ["ours"]
    assert first["rows"][0]["trained_steps"] == 2
    assert list(first["rows"][0]["by_distance"]) == ["64", "128"]
    main([*RECALL, "--models", "ours,local-plain", "--json", str(path)])
    second = json.loads(path.read_text())
    assert second["rows"][0] == first["rows"][0]
    assert [row["model"] for row in second["rows"]] == ["ours", "local-plain"]
    assert "3 % changed" in capsys.readouterr().out


def test_the_held_out_windows_are_of_the_last_tenth() -> None:
    path = Path(__file__).parents[1] / "data" / "lambda_phage.fna.gz"
    task = sequence.Task(path, "dna", length=256, windows=3)
    tokens, labels = task.probe()
    assert tokens.shape == (48, 256)
    border = int(0.9 * len(task.letters))
    held_out = bytes(task.letters[border:].astype(np.uint8))
    assert all(bytes(row.numpy().astype(np.uint8)) in held_out for row in labels)
    trained = bytes(task.letters[:border].astype(np.uint8))
    assert all(bytes(row.numpy().astype(np.uint8)) in trained for row in task.batch(1, 0)[1])


def test_the_same_letters_are_scored_after_every_context() -> None:
    length = 2 * sequence.LEAST_CONTEXT
    model = Reformer(build("ours", Size(dim=8, depth=2, heads=1), length)).eval()
    tokens = torch.randint(FIRST_LETTER, 9, (3, length))
    labels = tokens.roll(-1, 1)
    with torch.no_grad():
        found = sequence.by_context(model, tokens, labels)
        whole = bits(model, tokens, labels)[:, -sequence.LAST :]
        half = bits(model, tokens[:, length // 2 :], labels[:, length // 2 :])[:, -sequence.LAST :]
    assert found == {length // 2: round(float(half.mean()), 4), length: round(float(whole.mean()), 4)}
    assert found[length // 2] != found[length]
