"""`megabase finetune`: its settings, its errors in one line, and a run directory that belongs to one call."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megabase.datamodules.files import publish_json
from megabase.models import ReformerConfig
from megabase.models.config import ConfigError
from megabase.pipeline import cli
from megabase.pipeline.errors import UserError
from megabase.pipeline.finetune import extras, run
from megabase.pipeline.finetune.model import FULL, PROBE, Method
from megabase.pipeline.finetune.run import FinetuneOptions
from megabase.pipeline.finetune.task import Finetuning
from megabase.pipeline.ranks.stop import StopRequest
from tests.pipeline.finetune.conftest import CONFIG, write_export


@pytest.fixture
def options(exported: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneOptions:
    """A call that works; training itself is left out."""

    def checked(config: object, arguments: object, stop: object, task: Finetuning) -> int:
        task.check(1)
        tasks.append(task)
        return 75

    monkeypatch.setattr(run, "train", checked)
    tasks.clear()
    return FinetuneOptions(exported, table, tmp_path / "run", ("tracking.enabled=false",))


tasks: list[Finetuning] = []


def call(options: FinetuneOptions) -> Finetuning:
    assert run.run(options, [], StopRequest()) == 75
    return tasks[-1]


def test_settings_follow_from_model_data_and_mode(options: FinetuneOptions) -> None:
    config = call(options).config
    assert config.model == CONFIG
    assert config.data.length == 60 and config.data.objective == "causal"
    # 60 rows: 48 for training, two steps of 32 an epoch.
    assert (config.trainer.max_steps, config.trainer.eval_every_steps, config.checkpoint.keep_best) == (
        20,
        2,
        1,
    )
    assert (config.data.global_batch, config.data.micro_batch, config.optim.lr) == (32, 32, 1e-2)
    assert config.directory == options.output and config.run.init_from == str(options.model)
    settings = (
        *options.settings,
        "trainer.max_steps=5",
        "trainer.devices=2",
        "data.global_batch=4",
        "optim.lr=0.5",
    )
    config = call(replace(options, settings=settings, method=Method(FULL))).config
    assert (config.checkpoint.keep, config.checkpoint.keep_best) == (1, 1)
    assert (config.trainer.max_steps, config.data.micro_batch, config.optim.lr) == (5, 2, 0.5)


def test_evaluations_between_checkpoints_need_no_settings_of_their_own(options: FinetuneOptions) -> None:
    settings = (
        *options.settings,
        "checkpoint.every_steps=3",
        "trainer.eval_every_steps=2",
        "checkpoint.keep=4",
    )
    checkpoint = call(replace(options, settings=settings)).config.checkpoint
    assert (checkpoint.keep, checkpoint.keep_best) == (4, 0)


def test_a_task_names_the_examples_of_a_step(options: FinetuneOptions) -> None:
    task = call(options)
    windows = task.windows_of(3)
    assert [each["sample"] for each in windows] == task.data.training().of_step(2)[0].tolist()
    first = windows[0]
    letters = task.work.examples.sequences[first["sample"]]
    assert first["places"] == [{"record": f"row {first['sample'] + 1}", "start": 0, "end": len(letters)}]


def test_a_run_directory_belongs_to_one_call(options: FinetuneOptions) -> None:
    task = call(options)
    task.config.directory.mkdir()
    task.describe_data()
    assert json.loads((options.output / "finetune.json").read_text())["method"]["mode"] == PROBE
    lines = (options.output / "splits.tsv").read_text().splitlines()
    assert lines[0] == "example\tsplit" and len(lines) == 61
    call(options)  # the same call goes on
    with pytest.raises(UserError, match=r"of another call, which differs in method .*probe.* -> .*full"):
        call(replace(options, method=Method(FULL)))
    options.table.write_text(options.table.read_text() + "ACGT,at\n")
    with pytest.raises(UserError, match="which differs in the examples or their splits"):
        call(options)
    (options.output / "finetune.json").unlink()
    (options.output / "config.yaml").touch()
    with pytest.raises(UserError, match="is the run of another command: choose another RUN with -o"):
        call(options)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.stride=5", "data.stride has no effect on a fine-tuning"),
        ("data.mixture.a=5", "data.mixture.a has no effect"),
        ("run.name=x", "run.name has no effect"),
        ("optim.rate=5", "unknown key 'optim.rate'"),
        ("data.global_batch=0", "data.global_batch=0: must be above zero"),
    ],
)
def test_settings_that_do_nothing_are_refused(options: FinetuneOptions, setting: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(replace(options, settings=(*options.settings, setting)))


def test_a_setting_that_changes_a_weight_is_refused(options: FinetuneOptions) -> None:
    call(replace(options, settings=(*options.settings, "model.dropout=0.1")))
    with pytest.raises(ConfigError, match="changes the weight"):
        call(replace(options, settings=(*options.settings, "model.dim=32")))


def test_data_that_cannot_be_learned_is_refused(options: FinetuneOptions) -> None:
    for content, task, message in (
        ("sequence,label,split\nA,a,train\nC,a,train\nG,b,test\n", "auto", "training split is 'a'"),
        (
            "sequence,label\n" + "".join(f"{'A' * n},1.5\n" for n in range(1, 30)),
            "auto",
            "is 1.5: nothing can be",
        ),
        ("sequence,label\nA,a\nC,b\n", "regression", "row 1: the label 'a' is not a number"),
    ):
        options.table.write_text(content)
        with pytest.raises(UserError, match=message):
            call(replace(options, task=task))


def test_a_sequence_longer_than_the_model_can_read_is_refused(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    learned = ReformerConfig(vocab_size=9, dim=16, depth=2, heads=2, max_length=32, positions="learned")
    write_export(tmp_path / "learned", learned)
    with pytest.raises(UserError, match=r"row \d+: \d+ letters, but .*learned reads 31 at most"):
        call(replace(options, model=tmp_path / "learned"))


def test_a_model_that_sees_both_sides_works(options: FinetuneOptions, tmp_path: Path) -> None:
    write_export(tmp_path / "both", replace(CONFIG, causal=False))
    config = call(replace(options, model=tmp_path / "both")).config
    assert (config.data.objective, config.data.length) == ("masked", 59)  # no token before the letters


def test_what_is_no_model_is_refused(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model"):
        call(replace(options, model=tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"--step best: .* is an export, of one checkpoint: leave it out"):
        call(replace(options, step="best"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"--step 5: .* has no such checkpoint: `megabase checkpoints"):
        call(replace(options, model=tmp_path, step=5))
    publish_json(tmp_path / "finetune.json", {})
    with pytest.raises(UserError, match="is the run of a fine-tuning: give the pretrained model"):
        call(replace(options, model=tmp_path))
    with pytest.raises(UserError, match="is not the run of a fine-tuning"):
        run.predict(replace(options, predict=True, settings=()))


def test_a_missing_extra_is_named(options: FinetuneOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(
        UserError, match=r"needs sklearn, which is not installed: pip install 'megabase\[finetune\]'"
    ):
        call(options)


def test_bad_input_is_one_line_and_exit_code_2(
    options: FinetuneOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(options.model), str(options.table), "-o", str(options.output), "--label", "clas"]
    assert cli.main(words) == 2
    error = capsys.readouterr().err.strip()
    assert "has no column 'clas'" in error and len(error.splitlines()) == 1
    assert not options.output.exists()
