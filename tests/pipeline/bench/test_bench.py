"""`megabase bench`: the commands print tables, write files and refuse bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline import cli
from megabase.pipeline.bench import attention_task, contest, model_task


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


def installed(names: list[str], outcome: dict[str, Any]) -> list[str]:
    """The contestants whose package is installed."""
    return [name for name in names if outcome["versions"].get(name) != "not installed"]


def read(path: Path) -> dict[str, Any]:
    """The JSON of a benchmark, after checks of what every one must have."""
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
