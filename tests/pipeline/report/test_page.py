"""The page of a run: what it says and draws, from a run directory that is written here."""

import base64
import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megabase.pipeline import cli
from megabase.pipeline.config.load import load, save
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.scoring import bits
from megabase.pipeline.report.page import write_report
from megabase.pipeline.report.pictures import pictures
from megabase.pipeline.report.record import read_run, with_hours

NAMES = ["loss", "positions", "recall", "speed", "memory", "hashing", "nodes"]


def written(root: Path, *, everything: bool = True) -> Path:
    """A run directory of 40 steps in two starts, an hour apart."""
    settings = [
        "run.name=first",
        f"run.root={root}",
        "data.shards=<b>shards",
        "data.length=64",
        "data.global_batch=4",
    ]
    config = load([], [*settings, "trainer.max_steps=40", "model.dim=32", "model.depth=2"])
    config.model.vocab_size = 9
    run = config.directory
    (run / "logs").mkdir(parents=True)
    save(config, run / "config.yaml")
    (run / "status.json").write_text('{"state": "finished", "step": 40}')
    (run / "environment.json").write_text('{"processor": "a CPU", "gpus": []}')
    metrics: list[dict[str, Any]] = [
        {"step": step, "loss": 1.4 - step / 1000, "bits_per_base": bits(1.4 - step / 1000)}
        for step in range(1, 41)
    ]
    performance: list[dict[str, Any]] = []
    for start, began in ((0, 0.0), (20, 3600.0)):
        performance.append({"step": start, "time": began, "started": True})
        for step in range(start + 1, start + 21):
            row = {"tokens_per_second": 100.0 + step, "data_wait": 0.01, "peak_memory_bytes": 1 << 30}
            performance.append({"step": step, "time": began + 9 * (step - start), **row})
    for step, nats in ((20, 1.39), (40, 1.37)):
        row = {"step": step, "valid_loss": nats, "valid_bits_per_base": bits(nats), "valid_bases": 256}
        if everything:
            row |= {
                "valid_from_0_bits_per_base": 2.0,
                "valid_from_16_bits_per_base": 1.9,
                "valid_recall_bits": 0.5,
            }
            row |= {"markov_0_bits_per_base": 2.0, "markov_1_bits_per_base": 1.99}
            measured = {"rank_memory_bytes_most": 3 << 30, "rank_memory_bytes_least": 1 << 30}
            lsh = {"lsh_1_balance": 0.5, "lsh_1_unmatched": 0.01, "lsh_1_truncated": 0.2}
            performance.insert(step, {"step": step, "time": performance[step - 1]["time"], **measured, **lsh})
        metrics.append(row)
    for name, rows in (("metrics", metrics), ("performance", performance)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if everything:
        for node in ("n1", "n2"):
            rows = [
                {"sample": i, "time": 30.0 * i, "cpu_percent": 90, "memory_percent": 20, "gpu_0_percent": 99}
                for i in range(5)
            ]
            (run / "logs" / f"system-{node}.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    return run


class Page(HTMLParser):
    """Collects text, images and every address that a page would load."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.text, self.images, self.loads = "", [], []  # type: ignore[var-annotated]
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href"):
                (self.images if str(value).startswith("data:") else self.loads).append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_the_page_says_what_was_trained_and_holds_every_picture(tmp_path: Path) -> None:
    run = written(tmp_path)
    path = write_report(run)
    page = Page(path.read_text())
    assert path == run / "report.html" and not page.loads
    words = " ".join(page.text.split())
    assert "first finished, step 40" in words
    assert "a Reformer of dim 32 and depth 2" in words and "on <b>shards, in windows of 64 bases" in words
    assert "read 10,240 tokens in 40 optimizer steps of at most 40" in words and "2 starts" in words
    assert f"{bits(1.37):.4f} bits per base, at step 40; a Markov model of order 1 has 1.9900" in words
    assert "6.0 minutes of training" in words  # not the hour between both starts
    assert "data.global_batch4" in words and "model.depth2" in words and "optim.lr" not in words
    assert [picture.stem for picture in sorted((run / "pictures").glob("*.png"))] == sorted(NAMES)
    assert len(page.images) == len(NAMES)
    for image in page.images:
        png = base64.b64decode(image.partition(",")[2])
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width > 800 and height > 200


def test_pictures_without_data_are_left_out(tmp_path: Path) -> None:
    drawn = list(pictures(read_run(written(tmp_path, everything=False))))
    assert [picture.name for picture in drawn] == ["loss", "speed", "memory"]


@pytest.mark.slow
def test_a_journal_with_numbers_that_are_not_finite_is_drawn(tmp_path: Path) -> None:
    run = written(tmp_path)
    metrics = run / "metrics.jsonl"
    text = re.sub(r'"bits_per_base": [\d.]+', '"bits_per_base": "nan"', metrics.read_text(), count=3)
    metrics.write_text(text.replace('"valid_recall_bits": 0.5', '"valid_recall_bits": "inf"', 1))
    assert write_report(run).exists()


def test_the_time_between_starts_does_not_count_and_steps_trained_twice_do() -> None:
    rows = with_hours(
        [
            {"step": 0, "time": 0.0, "started": True},
            {"step": 10, "time": 3600.0},
            {"step": 5, "time": 99_999.0, "started": True},
            {"step": 10, "time": 101_799.0},
            {"step": 20, "time": 105_399.0},
        ]
    )
    assert [row["hours"] for row in rows] == [0.0, 1.0, 1.0, 1.5, 2.5]


def test_hours_of_steps_between_measurements_are_interpolated(tmp_path: Path) -> None:
    record = read_run(written(tmp_path, everything=False))
    assert record.hours == pytest.approx(0.1)
    assert record.hours_at(0) == 0 and record.hours_at(40) == pytest.approx(0.1) == record.hours_at(99)
    assert record.hours_at(10) == pytest.approx(0.025)


@pytest.mark.parametrize(("make", "message"), [(False, "no such directory"), (True, "not a run directory")])
def test_what_is_no_run_is_refused(tmp_path: Path, make: bool, message: str) -> None:
    if make:
        (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=message):
        write_report(tmp_path / "x")


def test_a_run_that_has_not_started_has_nothing_to_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "submit.sbatch").write_text("")
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    assert "has not started yet, so there is nothing to report" in capsys.readouterr().err
