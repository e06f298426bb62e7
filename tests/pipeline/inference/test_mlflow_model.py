"""The MLflow model of a run: what it says of itself, and what it predicts where neither DeepSpeed nor Lightning is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megabase.datamodules.files import FileLock, LockHeldError
from megabase.pipeline.errors import UserError
from megabase.pipeline.inference.mlflow_model import REQUIREMENTS, write_model
from megabase.pipeline.rundir.paths import RunPaths
from tests.pipeline.inference.test_export import CONFIG, write_checkpoint
from tests.pipeline.inference.test_score import expected

pytestmark = pytest.mark.slow

SEQUENCES = ["GATTACAGATTACAGATTACA", "", "acgtNNNN", "NNN", "C" * 63]
# A process whose only megabase is the one in the model, and which has no other package than those that the model names.
LOAD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(name + " is not installed here")

sys.meta_path.insert(0, Blocker())
import json, mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import megabase
assert megabase.__file__.startswith(sys.argv[1]), megabase.__file__
table = model.predict(pandas.DataFrame({{"sequence": json.loads(sys.argv[2])}}))
example = model.predict(model.input_example)
assert len(example) == 2 and (example["bits_per_base"] > 0).all()
print(table.to_json(orient="records"))
"""
BLOCKED = {
    "deepspeed",
    "pytorch_lightning",
    "lightning_fabric",
    "webdataset",
    "pysam",
    "dnaio",
    "transformers",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with its model."""
    directory = tmp_path_factory.mktemp("run") / "run"
    write_checkpoint(directory, CONFIG, 5)
    write_checkpoint(directory, CONFIG, 3)
    assert write_model(directory) == directory / "model"
    return directory


def test_it_scores_sequences_without_deepspeed_lightning_and_an_installed_megabase(run: Path) -> None:
    command = [sys.executable, "-c", LOAD.format(blocked=BLOCKED), str(run / "model"), json.dumps(SEQUENCES)]
    # Isolated from the repository: this environment has megabase installed, but the model's own copy comes first.
    answer = subprocess.run(command, cwd=run, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert answer.returncode == 0, answer.stderr[-2000:]
    table = json.loads(answer.stdout)
    for sequence, row in zip(SEQUENCES, table, strict=True):
        nats, bases = expected(run, sequence.encode(), reverse=False) if sequence else (0.0, 0)
        assert row["bases"] == bases and row["bases"] + row["other"] == len(sequence)
        assert row["nats"] == pytest.approx(nats, rel=1e-5)
        assert (row["bits_per_base"] is None) == (bases == 0)


def test_it_names_what_it_needs_and_what_it_takes(run: Path) -> None:
    from mlflow.models import Model

    described = Model.load(str(run / "model" / "MLmodel"))
    assert described.signature.inputs.input_names() == ["sequence"]
    assert described.signature.outputs.input_names() == ["nats", "bases", "other", "bits_per_base"]
    assert described.metadata["step"] == 5 and described.metadata["alphabet"] == "dna"
    lines = (run / "model" / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} == set(REQUIREMENTS)


def test_it_is_made_again_only_of_another_checkpoint(run: Path) -> None:
    before = (run / "model" / "MLmodel").stat().st_mtime_ns
    write_model(run)
    assert (run / "model" / "MLmodel").stat().st_mtime_ns == before
    assert not list(run.glob(".model.partial"))


def test_two_processes_do_not_make_it_at_once(run: Path) -> None:
    with FileLock.take(RunPaths(run).model_lock), pytest.raises(LockHeldError):
        write_model(run)


def test_a_run_without_checkpoints_has_no_model(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"no intact checkpoint|no checkpoint"):
        write_model(tmp_path)
    assert not list(tmp_path.glob("*model")) and not list(tmp_path.glob("*partial"))
