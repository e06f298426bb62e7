"""Bad numbers: which numbers are bad, what a run does then, and that no weight, moment or checkpoint gets them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.rundir.journal import Row, read
from megabase.pipeline.training.guard import LEAST_LOSSES, History, step_loss
from tests.pipeline.training import guard_worker
from tests.pipeline.training.guard_worker import BAD, CASES, SAVED, STEPS
from tests.processes import run_ranks

GUESS = math.log(9)


def settings(*more: str, root: Path = Path("/nowhere")) -> RunConfig:
    run = load(
        [], ["run.name=x", f"run.root={root}", "data.shards=s", "data.length=8", "data.global_batch=8", *more]
    )
    run.model.vocab_size = 9
    return run


def rows(losses: Sequence[float]) -> list[Row]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("guard.on_bad=panic", "guard.on_bad='panic': choose one of skip, stop"),
        ("guard.spike=1", "guard.spike=1.0: must be above 1"),
        ("guard.spike=-3", "guard.spike=-3.0: must be above 1"),
        ("guard.window=0", "guard.window=0: must be above zero"),
        ("guard.max_skips=0", "guard.max_skips=0: must be above zero"),
        ("guard.max_skips=200", "guard.max_skips=200: must be at most guard.window=100"),
    ],
)
def test_bad_settings_are_named(setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        settings(setting)


def test_what_is_bad_about_a_loss() -> None:
    history = History(settings("guard.spike=3"), rows([2.0] * LEAST_LOSSES))
    assert not history.bad_loss(6.0)
    assert history.bad_loss(6.01) == (
        f"is 6.01, more than guard.spike=3 times the median 2 of the {LEAST_LOSSES} before it"
    )
    assert history.bad_loss(math.nan) == "is nan" and history.bad_loss(-math.inf) == "is -inf"
    # Not bad: too few losses are known; the loss rises, but stays below that of guessing; the check is switched off.
    assert not History(settings(), rows([2.0] * (LEAST_LOSSES - 1))).bad_loss(1e9)
    learnt = History(settings(), rows([1e-4] * LEAST_LOSSES))
    assert not learnt.bad_loss(GUESS) and learnt.bad_loss(GUESS * 1.01)
    assert not History(settings("guard.spike=0"), rows([2.0] * 50)).bad_loss(1e9)


def test_one_outlier_and_skipped_losses_do_not_move_the_median() -> None:
    history = History(settings("guard.window=10"), rows([2.0] * LEAST_LOSSES + [5.9]))
    skipped = {"step": 99, "loss": "inf", "skipped_update": True}
    history.add(skipped)
    assert history.skipped == 1 and not history.bad_loss(5.9) and history.bad_loss(6.1)


@pytest.mark.slow
@given(
    losses=st.lists(st.floats(0.5, 50) | st.sampled_from([math.nan, math.inf]), max_size=60),
    window=st.integers(10, 30),
    at=st.integers(0, 60),
)
def test_a_resumed_run_judges_as_the_uninterrupted_one(losses: list[float], window: int, at: int) -> None:
    """After `at` steps, the resumed run knows only what the journal's lines say."""
    run = settings(f"guard.window={window}", "guard.on_bad=skip", "guard.max_skips=10")
    whole, journal = History(run), []
    resumed: History | None = None
    for step, loss in enumerate(losses, 1):
        if step == at + 1:
            resumed = History(run, [json.loads(line) for line in journal])
        row, again = {"step": step, "loss": loss}, {"step": step, "loss": loss}
        applied = not whole.bad_loss(loss)
        trouble = whole.judge(row, 1.0, applied)
        if resumed:
            assert resumed.judge(again, 1.0, applied) == trouble and repr(again) == repr(row)
            assert resumed.skipped == whole.skipped
        journal.append(json.dumps(row | {"loss": loss if math.isfinite(loss) else repr(loss)}))


@pytest.mark.parametrize(
    ("precision", "on_bad", "loss", "norm", "applied", "noted", "trouble"),
    [
        ("32", "stop", 2.0, 0.5, True, {"grad_norm": 0.5}, None),
        ("32", "stop", 2.0, None, True, {}, None),
        ("32", "stop", 2.0, math.inf, False, {"grad_norm": math.inf}, "the gradient norm of step 9 is inf"),
        ("32", "stop", 2.0, math.nan, True, {"grad_norm": math.nan}, "the gradient norm of step 9 is nan"),
        ("32", "stop", math.nan, math.inf, False, {"grad_norm": math.inf}, "the loss of step 9 is nan"),
        ("32", "skip", math.nan, math.inf, False, {"skipped_update": True}, None),
        ("32", "skip", 2.0, math.inf, False, {"skipped_update": True}, None),
        ("32", "skip", 99.0, 1.0, True, {"grad_norm": 1.0}, "the loss of step 9 is 99, more than"),
        ("16", "stop", 2.0, math.inf, False, {"loss_scale_skip": True}, None),
        ("16", "skip", 2.0, math.inf, False, {"loss_scale_skip": True}, None),
        ("16", "stop", math.nan, math.inf, False, {"grad_norm": math.inf}, "the loss of step 9 is nan"),
        ("16", "skip", math.nan, math.inf, False, {"skipped_update": True}, None),
    ],
)
def test_what_a_step_becomes(
    precision: str, on_bad: str, loss: float, norm: Any, applied: bool, noted: Row, trouble: str | None
) -> None:
    run = settings(f"trainer.precision={precision}", f"guard.on_bad={on_bad}")
    row: Row = {"step": 9, "loss": loss}
    found = History(run, rows([2.0] * LEAST_LOSSES)).judge(row, norm, applied)
    assert repr(row) == repr({"step": 9, "loss": loss} | noted)
    assert (found is None) if trouble is None else (found is not None and found.text.startswith(trouble))
    if found:
        assert ("guard.on_bad=skip" in found.way_out) == (on_bad == "stop")


def test_too_many_skipped_updates_end_the_run_and_a_few_do_not() -> None:
    run = settings("guard.on_bad=skip", "guard.window=10", "guard.max_skips=2")
    history = History(run)
    for step in range(1, 100):
        assert history.judge({"step": step, "loss": 2.0}, 1.0, applied=bool(step % 10)) is None
    found = history.judge({"step": 100, "loss": math.nan}, math.inf, applied=False)
    assert found is None
    found = history.judge({"step": 101, "loss": math.nan}, math.inf, applied=False)
    assert found is not None and found.step == 101
    assert found.text == "step 101: 2 of the last 10 updates were skipped (guard.max_skips=2)"


@pytest.mark.parametrize("on_bad", ["stop", "skip"])
def test_gradients_that_overflow_at_every_loss_scale_end_an_fp16_run(on_bad: str) -> None:
    history = History(settings("trainer.precision=16", f"guard.on_bad={on_bad}"))
    lost = [history.judge({"step": step, "loss": 2.0}, math.inf, applied=False) for step in range(1, 40)]
    assert lost == [None] * 39
    assert (
        history.judge({"step": 40, "loss": 2.0}, 1.0, applied=True) is None
    )  # a good update starts the count anew
    found = [history.judge({"step": step, "loss": 2.0}, math.inf, applied=False) for step in range(41, 81)]
    assert found[:-1] == [None] * 39 and found[-1] is not None
    assert (
        found[-1].text
        == "step 80: the gradients of 40 steps in a row were not finite, whatever the loss scale"
    )
    resumed = History(
        settings("trainer.precision=16"), [{"step": 1, "loss": 2.0, "loss_scale_skip": True}] * 39
    )
    assert resumed.judge({"step": 40, "loss": 2.0}, math.inf, applied=False) is not None


def test_the_loss_of_a_step_is_per_scored_base() -> None:
    assert step_loss(torch.tensor(6.0), None, 4) == (1.5, 0)
    assert step_loss(torch.tensor(6.0), torch.tensor([0.75, 2.0]), 4) == (8.0, 2)
    assert step_loss(torch.tensor(0.0), torch.zeros(2), 4) == (0.0, 0)
    loss, unread = step_loss(torch.tensor(0.0), torch.tensor([0.0, 3.0]), 4)
    assert math.isnan(loss) and unread == 3


@pytest.fixture(scope="module")
def poisoned(
    tmp_path_factory: pytest.TempPathFactory, lambda_shards: Path
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The run root and the results of all cases of the worker, trained by two processes."""
    root = tmp_path_factory.mktemp("guard")
    output = root / "results.json"
    code, printed = run_ranks(2, guard_worker.main, str(lambda_shards), str(root), str(output))
    assert code == 0, printed
    results: dict[str, dict[str, Any]] = json.loads(output.read_text())
    return root, results


SKIPPING = [name for name in CASES if name[0].isdigit() and not name.endswith("undone")]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", SKIPPING)
def test_a_skipped_update_leaves_every_state_as_if_it_had_been_taken_back(
    poisoned: tuple[Path, dict[str, dict[str, Any]]], name: str
) -> None:
    root, results = poisoned
    reference = f"{name.rpartition('-')[0]}-undone"
    found, expected = results[name], results[reference]
    assert found["ended"] == expected["ended"] == "finished"
    for rank, other in zip(found["ranks"], expected["ranks"], strict=True):
        assert rank["unchanged"] == [BAD] and rank["finite"]
        assert rank["digest"] == other["digest"]
    rows, others = (list(read(root / run / "metrics.jsonl")) for run in (name, reference))
    assert rows[BAD - 1].pop("skipped_update") is True and "grad_norm" not in rows[BAD - 1]
    assert [row for row in rows if row["step"] != BAD] == [row for row in others if row["step"] != BAD]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_journal_has_the_gradient_norm_in_every_stage(
    poisoned: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    norms = [
        [row["grad_norm"] for row in read(poisoned[0] / f"{stage}-undone" / "metrics.jsonl") if "loss" in row]
        for stage in range(4)
    ]
    assert all(norm > 0 for norm in norms[0])
    for others in norms[1:]:
        assert others == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_resumed_before_a_skipped_step_skips_it_again(
    poisoned: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    root, results = poisoned
    # The loss exploded, which can only be judged by the losses before it: these were read from the journal.
    assert SAVED < LEAST_LOSSES
    assert (root / "resumed/metrics.jsonl").read_bytes() == (root / "2-spike/metrics.jsonl").read_bytes()
    assert results["resumed"]["ranks"] == results["2-spike"]["ranks"]


@pytest.mark.slow
@pytest.mark.distributed
def test_bad_numbers_end_a_run_before_a_checkpoint_of_them(
    poisoned: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    root, results = poisoned
    at_once, soon, often = (results[name] for name in ("stopped-at-a-checkpoint", "stopped-soon", "too-many"))
    # Stage 0 has applied the bad update: a checkpoint of this step would have bad numbers in it.
    assert at_once["ended"].startswith(
        f"the gradient norm of step {2 * SAVED} is nan: stopped before a checkpoint"
    )
    assert at_once["step"] == 2 * SAVED and not any(rank["finite"] for rank in at_once["ranks"])
    saved = [path.name for path in (root / "stopped-at-a-checkpoint" / "checkpoints").iterdir()]
    assert saved == [f"step-{SAVED}"]

    assert soon["ended"].startswith(f"the loss of step {BAD} is nan")
    assert "guard.on_bad=skip leaves such updates out" in soon["ended"]
    assert BAD < soon["step"] <= BAD + 3
    report = json.loads((root / "stopped-soon" / "logs" / f"bad-step-{BAD}.json").read_text())
    culprits = {(w["rank"], w["micro_batch"]) for w in report["windows"] if w["stands_out"]}
    assert culprits == {(1, 0)} and len(report["windows"]) == 8

    assert f"2 of the last {BAD + 1} updates were skipped (guard.max_skips=2)" in often["ended"]
    assert all(rank["unchanged"][:2] == [BAD, BAD + 1] for rank in often["ranks"])
    assert STEPS > BAD + 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("undone")])
def test_a_nan_in_the_states_of_one_rank_is_found_before_they_are_written(
    poisoned: tuple[Path, dict[str, dict[str, Any]]], name: str
) -> None:
    refused = [rank["refused"] for rank in poisoned[1][name]["ranks"]]
    clean, spoiled = ["", "", ""], ["", *["weights or optimizer states are not finite"] * 2]
    assert refused == ([spoiled, clean] if name.startswith("0") else [clean, spoiled])
