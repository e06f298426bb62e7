"""A new run that starts from the weights of a run or an export."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megabase.models import Reformer, ReformerConfig
from megabase.models.pretrained import from_pretrained
from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.export import export
from megabase.pipeline.inference.model import load_model
from megabase.pipeline.training.check import check
from megabase.pipeline.training.initial import check_initial, fit_weights, open_initial
from tests.conftest import train_settings
from tests.pipeline.inference.test_export import CONFIG, TIED, damage, write_checkpoint


def settings(root: Path, source: Path, model: ReformerConfig, *more: str) -> RunConfig:
    """A run from `source`."""
    config = load(
        [],
        [
            "run.name=new",
            f"run.root={root}",
            "data.shards=s",
            f"run.init_from={source}",
            "data.length=32",
            *more,
        ],
    )
    config.model = model
    return config


def started(config: RunConfig) -> Reformer:
    """The model of a run at step 0."""
    torch.manual_seed(99)
    model = Reformer(config.model)
    open_initial(config, "dna")(model)
    return model


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_a_run_starts_with_the_weights_of_its_source(tmp_path: Path, stage: int, kind: str) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, CONFIG, 2)
    trained = write_checkpoint(run, CONFIG, 3, stage=stage)
    source = {"run": run, "checkpoint": run / "checkpoints" / "step-3", "export": tmp_path / "out"}[kind]
    export(run, tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    longer = dataclasses.replace(CONFIG, max_length=4096)
    model = started(settings(tmp_path, source, longer))
    expected = trained.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    record = json.loads((tmp_path / "new" / "init_from.json").read_text())
    assert record["checkpoint"] == str(
        tmp_path / "out" if kind == "export" else run / "checkpoints" / "step-3"
    )
    assert (record["step"], record["copied"], record["fresh"]) == (3, len(expected), {})
    assert record["changed"] == {"model.max_length": [64, 4096]}


@pytest.mark.parametrize("kind", ["run", "export"])
def test_tied_weights_stay_tied(tmp_path: Path, kind: str) -> None:
    trained = write_checkpoint(tmp_path / "run", TIED, 3)
    export(tmp_path / "run", tmp_path / "export", form="safetensors", step=None, dtype="fp32")
    model = started(settings(tmp_path, tmp_path / kind, TIED))
    assert torch.equal(model.head.weight, trained.head.weight)
    assert model.head.weight is model.body.embedding.tokens.weight


def test_position_tables_are_repeated_or_cut(tmp_path: Path) -> None:
    learned = dataclasses.replace(CONFIG, positions="learned")
    table = write_checkpoint(tmp_path / "learned", learned, 3).body.embedding.positions.table
    for length in (150, 40):
        longer = dataclasses.replace(learned, max_length=length)
        model = started(settings(tmp_path, tmp_path / "learned", longer, f"run.name=of-{length}"))
        expected = torch.cat([table, table, table])[:length]
        assert torch.equal(model.body.embedding.positions.table, expected)
    axial = dataclasses.replace(CONFIG, positions="axial", axial_shape=[8, 8])
    positions = write_checkpoint(tmp_path / "axial", axial, 3).body.embedding.positions
    longer = dataclasses.replace(axial, axial_shape=[20, 8], max_length=160)
    model = started(settings(tmp_path, tmp_path / "axial", longer))
    assert torch.equal(model.body.embedding.positions(64), positions(64))
    assert torch.equal(model.body.embedding.positions(64, 64), positions(64))
    assert json.loads((tmp_path / "new" / "init_from.json").read_text())["repeated"] == {
        "body.embedding.positions.rows": [8, 20]
    }


def test_what_does_not_fit_is_named_and_starts_from_random_values_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path / "run", dataclasses.replace(CONFIG, positions="axial", axial_shape=[8, 8]), 3)
    other = dataclasses.replace(
        CONFIG, positions="axial", axial_shape=[8, 16], max_length=128, head_bias=False, depth=4
    )
    config = settings(tmp_path, tmp_path / "run", other)
    with pytest.raises(UserError) as caught:
        check_initial(config, "dna")
    message = str(caught.value)
    assert "body.embedding.positions.columns ((16, 6), in the source (8, 6))" in message
    assert "body.embedding.positions.rows (its columns do not fit)" in message
    assert "body.stack.blocks.3.f.norm.weight (not in the source)" in message and "and 9 more" in message
    assert "model.depth is 4 here and 3 there" in message
    assert "set model.axial_shape=[16,8]" in message and "run.init_partial=true" in message
    config.run.init_partial = True
    caplog.set_level("INFO", logger="megabase")
    model = started(config)
    torch.manual_seed(99)
    fresh, trained = Reformer(other).state_dict(), load_model(tmp_path / "run").model.state_dict()
    for name, weight in model.state_dict().items():
        random = ".blocks.3." in name or ".positions." in name
        assert torch.equal(weight, (fresh if random else trained)[name]), name
    assert "not used: head.bias" in caplog.text and "model.depth: there 3, here 4" in caplog.text


def test_a_masked_model_starts_from_a_causal_one(tmp_path: Path) -> None:
    trained = write_checkpoint(tmp_path / "run", CONFIG, 3).state_dict()
    model = started(settings(tmp_path, tmp_path / "run", dataclasses.replace(CONFIG, causal=False)))
    assert all(torch.equal(weight, trained[name]) for name, weight in model.state_dict().items())
    unused = json.loads((tmp_path / "new" / "init_from.json").read_text())["unused"]
    assert unused and all(name.endswith("ahead.weight") for name in unused)


def test_bad_sources_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, CONFIG, 3)
    write_checkpoint(run, CONFIG, 5)
    for source, problem in (
        (tmp_path / "nothing", "not a run directory, nor one of its checkpoints"),
        (run / "checkpoints" / "step-4", "not a run directory, nor one of its checkpoints"),
        (run / "checkpoints", "not a run directory, nor one of its checkpoints"),
    ):
        with pytest.raises(UserError, match=problem):
            check_initial(settings(tmp_path, source, CONFIG), "dna")
    with pytest.raises(
        UserError, match=r"of the alphabet dna, those of s of protein: prepare .* --alphabet dna"
    ):
        check_initial(settings(tmp_path, run, CONFIG), "protein")
    damage(run, 5)
    record = tmp_path / "new" / "init_from.json"
    assert open_initial(settings(tmp_path, run, CONFIG), "dna")
    assert json.loads(record.read_text())["step"] == 3 and "step-5 is broken" in caplog.text
    with pytest.raises(UserError, match="step-5 is broken"):
        open_initial(settings(tmp_path, run / "checkpoints" / "step-5", CONFIG), "dna")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint yet"):
        check_initial(settings(tmp_path, tmp_path / "empty", CONFIG), "dna")


def test_a_second_start_at_step_0_takes_the_same_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, CONFIG, 3)
    config = settings(tmp_path, run, CONFIG)
    first = open_initial(config, "dna")
    write_checkpoint(run, CONFIG, 5)
    assert open_initial(config, "dna").checkpoint == first.checkpoint
    first.checkpoint.rename(run / "gone")
    again = open_initial(config, "dna")
    assert (
        again.checkpoint.name == "step-5"
        and "step-3, which this run took its weights from, is gone" in caplog.text
    )


def test_shapes_alone_decide_what_fits() -> None:
    size = torch.Size
    fit = fit_weights({"a": size([2]), "b": size([3]), "c": size([1])}, {"a": size([2]), "b": size([4])})
    assert fit.copied == ("a",) and fit.unused == ("c",)
    assert fit.fresh == {"b": "(4,), in the source (3,)"}


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_of_another_stage_start_with_the_weights_and_do_not_read_them_again(
    undisturbed: Path, lambda_shards: Path, tmp_path: Path, start_job
) -> None:
    more = [
        "zero.stage=3",
        f"run.init_from={undisturbed}",
        "trainer.max_steps=1",
        "optim.lr=1e-30",
        "data.length=256",
    ]
    arguments = train_settings(lambda_shards, tmp_path, "new", *more, "tracking.enabled=false")
    code, output = start_job("train", *arguments).wait()
    assert code == 0, output
    assert "run.init_from:" in output and "step 40" in output
    export(tmp_path / "new", tmp_path / "out", form="safetensors", step=None, dtype="fp32")
    trained, started = (
        load_model(undisturbed).model.state_dict(),
        from_pretrained(tmp_path / "out").state_dict(),
    )
    assert all(torch.equal(weight, trained[name]) for name, weight in started.items())
    # A start that resumes does not read the source, and says so if another one is asked for.
    with pytest.raises(UserError, match=r"run.init_from: checkpoint /.*, config /elsewhere"):
        check(load([], [*arguments, "run.init_from=/elsewhere"]), 2)
