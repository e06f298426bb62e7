"""`megabase bench`: who runs when, what is left out and why, and that both commands do what they say."""

from __future__ import annotations

import json
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline import cli
from megabase.pipeline.bench import attention_task, contest, draw, lab, model_task, peers
from megabase.pipeline.bench.contest import Budget, Entry, LeftOut, Point, Probe, Reason
from megabase.pipeline.bench.files import Files
from megabase.pipeline.bench.options import depths_of, lengths_of
from megabase.pipeline.bench.result import Result
from megabase.pipeline.errors import UserError

MIB = 2**20


class FakeLab:
    """Contestants whose time and memory are formulas. Raises what `stops` says."""

    def __init__(
        self, seconds: dict[str, Any], *, free: int | None = None, stops: dict | None = None
    ) -> None:
        self.seconds, self.free, self.stops = seconds, free, stops or {}
        self.calls: list[tuple[str, str, int, int]] = []

    def free_bytes(self) -> int | None:
        return self.free

    def probe(self, name: str, size: int, limit_s: float) -> Probe:
        self.calls.append(("probe", name, size, 0))
        if (name, size) in self.stops:
            raise LeftOut(self.stops[name, size])
        return Probe(self.seconds[name](size), size * MIB)

    def clock(self, name: str, size: int, seed: int) -> float:
        self.calls.append(("clock", name, size, seed))
        return self.seconds[name](size) * (1 + 0.01 * seed)


def linear(size: int) -> float:
    return size / 1000


def square(size: int) -> float:
    return size * size / 1000


A, B = Entry("a", "A"), Entry("b", "B", growth=2.0)


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(0, 6)))
def test_schedule_gives_everybody_its_turns_and_one_to_warm_up(repeats):
    turns = list(contest.schedule(repeats))
    for name, count in repeats.items():
        rounds = [turn for turn, who in turns if who == name]
        assert rounds == (list(range(count + 1)) if count else [])
    assert [turn for turn, _ in turns] == sorted(turn for turn, _ in turns)


def test_each_round_begins_with_another_one():
    turns = list(contest.schedule({"a": 2, "b": 2, "c": 2}))
    assert [name for _, name in turns] == [*"abc", *"bca", *"cab"]


def test_contestants_take_turns_and_the_warm_up_is_not_counted():
    fake = FakeLab({"a": linear, "b": linear})
    points = contest.hold([A, B], [8], fake, Budget(seconds=10.0, repeats=3))
    clocked = [(name, seed) for kind, name, _, seed in fake.calls if kind == "clock"]
    assert clocked == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 3), ("a", 3)]
    assert [len(point.samples) for point in points] == [3, 3]
    assert points[0].seconds == pytest.approx(0.008 * 1.02)  # the median: round 2


def test_time_that_does_not_fit_is_foreseen_by_growth():
    fake = FakeLab({"a": linear, "b": square})
    points = contest.hold([A, B], [64, 16, 32, 128], fake, Budget(seconds=3.0, repeats=1))
    left_out = {(p.contestant, p.size): p.left_out.text for p in points if p.left_out}
    assert left_out == {("b", 64): "too slow (~4.1 s)", ("b", 128): "too slow (~17 s)"}
    assert not [call for call in fake.calls if call[1] == "b" and call[2] > 32]


def test_memory_that_is_not_there_is_foreseen():
    points = contest.hold([A], [1024, 2048], FakeLab({"a": linear}, free=1500 * MIB), Budget(99.0, repeats=1))
    assert [p.left_out and p.left_out.text for p in points] == [None, "out of memory (~2 GiB)"]


def test_what_ran_out_of_memory_is_not_tried_again():
    fake = FakeLab({"a": linear}, stops={("a", 2): contest.out_of_memory()})
    points = contest.hold([A], [1, 2, 4], fake, Budget(99.0, repeats=1))
    assert [p.left_out and p.left_out.text for p in points] == [None, "out of memory", "out of memory"]
    assert ("probe", "a", 4, 0) not in fake.calls


def test_what_is_no_matter_of_size_is_tried_again():
    fake = FakeLab({"a": linear}, stops={("a", 2): Reason("takes lengths that are multiples of 4")})
    points = contest.hold([A], [2, 4], fake, Budget(99.0, repeats=1))
    assert [bool(p.samples) for p in points] == [False, True]


def test_a_probe_far_over_the_budget_is_the_last():
    points = contest.hold([A], [5000, 6000], FakeLab({"a": linear}), Budget(1.0, repeats=3))
    assert [p.left_out.text for p in points if p.left_out] == ["too slow (~5.0 s)", "too slow (~6.0 s)"]


@pytest.mark.parametrize(("seconds", "repeats"), [(0.1, 9), (2.0, 5), (9.0, 3), (20.0, 3)])
def test_repeats_fit_the_budget_but_are_never_fewer_than_three(seconds, repeats):
    assert contest.repeats_of(Budget(10.0, 9), seconds) == repeats


def test_no_repeats_means_the_probe_alone():
    fake = FakeLab({"a": linear})
    points = contest.hold([A], [2, 4], fake, Budget(10.0, repeats=0))
    assert {kind for kind, *_ in fake.calls} == {"probe"}
    assert [p.seconds for p in points] == [0.002, 0.004]


def test_climbing_ends_where_it_no_longer_fits():
    said: list[int] = []
    fake = FakeLab({"a": linear}, stops={("a", 32): contest.out_of_memory()})
    points = contest.climb(A, 4, fake, Budget(10.0, 0), lambda points: said.append(points[0].size))
    assert [p.size for p in points] == said == [4, 8, 16, 32]
    assert [p.left_out is None for p in points] == [True, True, True, False]


def test_ratio_is_of_medians_at_the_same_size():
    points = [Point("ours", 8, [1.0, 2.0, 9.0]), Point("b", 8, [6.0, 5.0, 7.0]), Point("b", 16, [1.0])]
    assert contest.ratio(points, points[1], "ours") == 3.0
    assert contest.ratio(points, points[2], "ours") is None
    points[0].left_out = Reason("failed")
    assert contest.ratio(points, points[1], "ours") is None


def test_a_reason_survives_the_way_from_another_process():
    assert pickle.loads(pickle.dumps(Reason("x", for_good=True))) == Reason("x", for_good=True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), contest.out_of_memory()),
        (RuntimeError("[enforce] DefaultCPUAllocator: not enough memory: you"), contest.out_of_memory()),
        (ValueError("so\nmuch"), Reason("failed: ValueError: so", failed=True)),
        (LeftOut("such"), Reason("such")),
    ],
)
def test_whatever_goes_wrong_has_a_reason(error, reason):
    with pytest.raises(LeftOut) as caught, lab.reasons():
        raise error
    assert caught.value.reason == reason


def test_one_of_ours_that_fails_is_a_failure():
    result = Result("attention", {}, {})
    result.add("length", [Point("transformers", 8, left_out=Reason("failed: x", failed=True))])
    assert result.exit_code() == 0
    result.add("length", [Point("ours", 8, left_out=Reason("failed: x", failed=True))])
    assert result.exit_code() == 1


def test_lengths_and_depths():
    assert lengths_of("--lengths", "1M, 4k,512,4096") == [512, 4096, 1 << 20]
    assert depths_of("--depths", "12,2") == [2, 12]
    assert depths_of("--depths", "0") == []


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.1)), min_size=1, max_size=8))
def test_labels_do_not_lie_over_each_other(labels):
    wanted, heights = [w for w, _ in labels], [h for _, h in labels]
    places = draw.spread(wanted, heights)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for below, above in pairwise(order):
        assert places[above] - places[below] >= (heights[below] + heights[above]) / 2 - 1e-9


@pytest.mark.parametrize("module", peers.MODULES)
def test_a_peer_that_is_missing_says_how_to_install_it(module, monkeypatch):
    def missing(package: str) -> str:
        raise peers.PackageNotFoundError(package)

    monkeypatch.setattr(peers, "version", missing)
    with pytest.raises(LeftOut, match=r"not installed \(pip install [a-z-]+\)"):
        peers.load(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--contestants", "ours,flash"], "unknown contestant 'flash'"),
        (["attention", "--contestants", "transformer"], "did you mean 'transformers'?"),
        (["attention", "--lengths", "4q"], "'4q' is not a length"),
        (["attention", "--lengths", "0"], "'0' is not a length"),
        (["attention", "--heads", "0"], "--heads 0: must be above zero"),
        (["attention", "--seconds", "-1"], "--seconds -1.0: must be above zero"),
        (["attention", "--json", "no/such/place.json"], "--json no/such/place.json: cannot be written"),
        (["attention", "--picture", "x.jpg"], "must end in .png"),
        (["attention", "--json", "x.png"], "give the JSON another name"),
        (["model", "--device", "cuda"], "torch sees no GPU here"),
        (["model", "--depths", "2,x"], "'x' is not a depth"),
        (["model", "--dim", "250"], "--dim 250 is not a multiple of --heads 4"),
        (["model", "--dim", "12"], "heads are 3 wide"),
        (["model", "--repeat", "0"], "--repeat 0: must be above zero"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(contest, "hold", lambda *_: pytest.fail("worked on bad input"))
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path):
    there = tmp_path / "there.json"
    there.write_text("before")
    Files.of(there, tmp_path / "new.png")
    assert there.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    with pytest.raises(UserError, match="cannot be written"):
        Files.of(tmp_path, None)


def installed(names: list[str], outcome: dict[str, Any]) -> list[str]:
    """The contestants whose package is there."""
    return [name for name in names if outcome["versions"].get(name) != "not installed"]


def read(path: Path) -> dict[str, Any]:
    """The JSON of a benchmark, after what every one of them must have."""
    outcome = json.loads(path.read_text())
    assert outcome["machine"]["memory_bytes"] > 0
    assert outcome["machine"]["threads"] >= 1
    assert outcome["versions"]["torch"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
    for point in outcome["points"]:
        if point["left_out"] is None and point["samples"]:
            assert point["least"] <= point["seconds"] <= point["most"]
            assert math.isfinite(point["seconds"])
    return outcome


@pytest.mark.slow
def test_bench_attention(tmp_path, capsys):
    path = tmp_path / "attention.json"
    kinds = [f"ours-{kind}" for kind in ("chunked", "local", "performer", "linformer")]
    names = [*attention_task.default_contestants("cpu"), *kinds]
    options = ["--lengths", "256,512", "--repeat", "2", "--device", "cpu", "--heads", "2", "--head-dim", "16"]
    arguments = ["bench", "attention", *options, "--contestants", ",".join(names), "--json", str(path)]
    assert cli.main(arguments) == 0
    outcome = read(path)
    for name in installed(names, outcome):
        points = [p for p in outcome["points"] if p["contestant"] == name]
        assert [(p["size"], len(p["samples"]), p["left_out"]) for p in points] == [
            (256, 2, None),
            (512, 2, None),
        ]
        assert all(p["peak_bytes"] > 0 and p["against_ours"] > 0 for p in points)
    printed = capsys.readouterr().out
    assert all(label in printed for label in outcome["contestants"].values())


@pytest.mark.slow
def test_bench_model(tmp_path, capsys):
    path = tmp_path / "model.json"
    options = ["--lengths", "256,512", "--depths", "2,8", "--repeat", "1", "--device", "cpu", "--dim", "32"]
    assert cli.main(["bench", "model", *options, "--depth", "2", "--json", str(path)]) == 0
    outcome = read(path)
    assert outcome["parameters"]["ours"] == outcome["parameters"]["ours-ordinary"]
    for name in installed(list(model_task.CONTESTANTS), outcome):
        points = [p for p in outcome["points"] if p["contestant"] == name]
        assert [(p["along"], p["size"], len(p["samples"])) for p in points] == [
            ("length", 256, 1),
            ("length", 512, 1),
            ("depth", 2, 0),
            ("depth", 8, 0),
        ]
        assert all(p["left_out"] is None and p["peak_bytes"] > 0 for p in points)
    deep = {
        p["contestant"]: p["peak_bytes"] for p in outcome["points"] if (p["along"], p["size"]) == ("depth", 8)
    }
    assert deep["ours"] < deep["ours-ordinary"]
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_process_that_needs_too_much_memory_hears_it_from_the_allocator(monkeypatch):
    monkeypatch.setattr(lab.CpuLab, "free_bytes", lambda self: 50 * MIB)
    task = attention_task.AttentionTask(heads=4, head_dim=64, chunk=64, rounds=4, dtype="fp32", device="cpu")
    with pytest.raises(LeftOut) as caught:
        lab.CpuLab(task).probe("reformer-pytorch", 4096, 60.0)
    assert caught.value.reason == contest.out_of_memory()


def test_training_steps_of_all_have_the_same_work():
    task = model_task.ModelTask(
        dim=256, depth=6, heads=4, chunk=64, rounds=4, length=4096, dtype="fp32", device="cpu"
    )
    counts = model_task.count_parameters(task, list(model_task.CONTESTANTS))
    assert counts["ours"] == pytest.approx(4.6e6, rel=0.03)
    assert max(counts.values()) / min(counts.values()) < 1.1
