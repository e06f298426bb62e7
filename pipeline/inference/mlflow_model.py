"""The trained model of a run as an MLflow model, in the run directory.

It is made without a server, so that a compute node that reaches none can make it: `tracking` sends it. It holds an
export (`megabase export`), a signature, an example and a copy of this package, because installing megabase would
install DeepSpeed and Lightning.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import megabase
from megabase.datamodules.files import FileLock, sync
from megabase.models import pretrained
from megabase.pipeline.checkpoint.damage import checksum
from megabase.pipeline.checkpoint.manifest import MANIFEST, list_checkpoints
from megabase.pipeline.errors import RunError
from megabase.pipeline.files import read_object
from megabase.pipeline.inference import pyfunc
from megabase.pipeline.inference.export import SAFETENSORS, export
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.tracking.model import EXPORT
from megabase.pipeline.tracking.server import quiet_mlflow

REQUIREMENTS = ("mlflow", "torch", "numpy", "pandas", "omegaconf", "pyyaml", "safetensors")
"""The packages that the model needs, at the versions with which it was made."""
EXAMPLES = {"protein": "MKTAYIAKQRQISFVKSHFSRQ", "bytes": "To be, or not to be: that is the question."}
"""Sequences that the alphabets of `prepare` read; of DNA, DNA_EXAMPLE."""
DNA_EXAMPLE = "ATGGCTAGCAAAGGAGAAGAACTTTTCACTGGAGTTGTCCCAATTCTTGTTGAATTAGATGGTGATGTTAATGGG"


def write_model(run: Path) -> Path:
    """Write the model of a run's newest intact checkpoint to `model/`, unless that holds it already.

    Args:
        run: the run directory.

    Returns:
        The directory.

    Raises:
        UserError: the run has no intact checkpoint.
        RunError: the checkpoint cannot be read, or the disk is full.
        ConfigError: the model cannot read a sequence from left to right.
        LockHeldError: another process is making it.
    """
    with FileLock.take(RunPaths(run).model_lock):
        if not _is_of_newest(RunPaths(run).model, run):
            _make(run, RunPaths(run).model)
    return RunPaths(run).model


def _make(run: Path, directory: Path) -> None:
    """Write the model of a run, and rename it to `directory`. Raises as `write_model`."""
    making = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(making, ignore_errors=True)
    try:
        making.mkdir()
        export(run, making / EXPORT.name, form=SAFETENSORS, step=None, dtype="fp32")
        pyfunc.SequenceModel(pyfunc.load_model(making / EXPORT.name))
        _save(making / EXPORT.name, making / "model")
        for path in (making / "model").rglob("*"):
            sync(path)
        shutil.rmtree(directory, ignore_errors=True)
        (making / "model").rename(directory)
        sync(run)
    except OSError as error:
        raise RunError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _is_of_newest(directory: Path, run: Path) -> bool:
    """Whether a model is of the newest checkpoint of a run."""
    about = read_object(directory / EXPORT / pretrained.CONFIG)
    with suppress(OSError):  # a checkpoint is deleted in the meantime
        for newest in list_checkpoints(RunPaths(run).checkpoints)[:1]:
            return checksum(newest / MANIFEST) == about.get("manifest_sha256")
    return False


def _save(exported: Path, path: Path) -> None:
    """Write MLflow's files, and copies of the export and of this package."""
    quiet_mlflow()
    import pandas as pd
    from mlflow import pyfunc as mlflow_pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    about = json.loads((exported / pretrained.CONFIG).read_text())
    example = EXAMPLES.get(about["alphabet"], DNA_EXAMPLE)
    columns = (("double", "nats"), ("long", "bases"), ("long", "other"), ("double", "bits_per_base"))
    mlflow_pyfunc.save_model(
        str(path),
        loader_module=pyfunc.__name__,
        data_path=str(exported),
        code_paths=[str(Path(megabase.__file__).parent)],
        signature=ModelSignature(
            Schema([ColSpec("string", pyfunc.SEQUENCE)]), Schema([ColSpec(*column) for column in columns])
        ),
        input_example=pd.DataFrame({pyfunc.SEQUENCE: [example, example[::-1]]}),
        pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
        metadata={key: about[key] for key in ("step", "alphabet", "checkpoint", "manifest_sha256")},
    )
