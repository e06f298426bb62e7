"""The paths of the files in a run directory: one property for each, which all other modules use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# The journal. A checkpoint holds a copy of it, up to its step, under this name.
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


# The name of a published checkpoint, with its step.
PUBLISHED = re.compile(r"step-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class RunPaths:
    """Paths in the run directory `<run.root>/<run.name>/`. None of these files needs to exist.

    Attributes:
        directory: the run directory.
    """

    directory: Path

    @property
    def config(self) -> Path:
        """Every setting of the run, as YAML."""
        return self.directory / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, commit and hardware of the last start."""
        return self.directory / "environment.json"

    @property
    def packages(self) -> Path:
        """All installed packages at the last start, as pip writes them."""
        return self.directory / "packages.txt"

    @property
    def metrics(self) -> Path:
        """The journal: losses, learning rates and evaluations, a function of the run alone."""
        return self.directory / METRICS

    @property
    def performance(self) -> Path:
        """Speed, memory and checkpoints of the run, with the time of each row."""
        return self.directory / "performance.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of checkpoints, `step-N`."""
        return self.directory / CHECKPOINTS

    @property
    def logs(self) -> Path:
        """Directory of logs, heartbeats and stacks."""
        return self.directory / "logs"

    @property
    def mlflow(self) -> Path:
        """Names the MLflow run that the journal is sent to."""
        return self.directory / "mlflow.json"

    @property
    def tracking_lock(self) -> Path:
        """Locked by the process that sends the journal to MLflow at this moment."""
        return self.directory / ".mlflow.lock"

    @property
    def dataset(self) -> Path:
        """The shards of the run: their checksum, and the bases of each split."""
        return self.directory / "dataset.json"

    @property
    def submit_script(self) -> Path:
        """The job script of the last `megabase submit`, with the sbatch call."""
        return self.directory / "submit.sbatch"

    @property
    def submit_config(self) -> Path:
        """The settings with which the last submitted job trains, whatever becomes of the files they came from."""
        return self.directory / "submit.yaml"

    @property
    def code(self) -> Path:
        """The copy of the code with which a job trains, with `slurm.copy_code`."""
        return self.directory / "code"

    @property
    def job(self) -> Path:
        """The ids of the last submitted jobs."""
        return self.directory / "job.json"

    @property
    def status(self) -> Path:
        """State and step of the run."""
        return self.directory / "status.json"

    @property
    def stop(self) -> Path:
        """A file that a user creates to stop the run. While it exists, the run does not start again."""
        return self.directory / "STOP"

    @property
    def baselines(self) -> Path:
        """Bits per base of Markov models on the validation split."""
        return self.directory / "baselines.json"

    @property
    def init_from(self) -> Path:
        """Where the weights at step 0 come from, if `run.init_from` is set, and which of them fitted."""
        return self.directory / "init_from.json"

    @property
    def finetune(self) -> Path:
        """What a fine-tuning started from, and what it predicts. No other run has this file."""
        return self.directory / "finetune.json"

    @property
    def result(self) -> Path:
        """What a fine-tuning reached on its test split, beside its baseline."""
        return self.directory / "result.json"

    @property
    def loss_curve(self) -> Path:
        """The loss curve, drawn."""
        return self.directory / "loss.png"

    @property
    def report(self) -> Path:
        """The run as a page for people, written by `megabase report` and at the end of a run."""
        return self.directory / "report.html"

    @property
    def pictures(self) -> Path:
        """Directory of the pictures of `report`."""
        return self.directory / "pictures"

    @property
    def model(self) -> Path:
        """The trained model as MLflow takes it, with `tracking.log_model`."""
        return self.directory / "model"

    @property
    def model_lock(self) -> Path:
        """Locked by the process that makes `model`."""
        return self.directory / ".model.lock"

    @property
    def lock(self) -> Path:
        """Locked by the job that trains in this directory."""
        return self.directory / ".lock"

    def heartbeat(self, rank: int) -> Path:
        """The last sign of life of a rank."""
        return self.logs / f"rank-{rank}.heartbeat"

    def stacks(self, rank: int) -> Path:
        """The Python stacks of a rank that hung."""
        return self.logs / f"rank-{rank}.stacks.txt"

    def system(self, node: str) -> Path:
        """CPUs, memory, network and GPUs of a node while it trained."""
        return self.logs / f"system-{node}.jsonl"

    def bad_step(self, step: int) -> Path:
        """The windows of a step whose loss or gradient norm was bad."""
        return self.logs / f"bad-step-{step}.json"

    def slurm_log(self, job: int | str) -> Path:
        """The log of all starts of a SLURM job; `%j` stands for the job's id in sbatch's options."""
        return self.logs / f"slurm-{job}.out"


def newest_step(checkpoints: Path) -> int | None:
    """The step of the newest published checkpoint in a directory, by its name; None if there is none."""
    found = (PUBLISHED.fullmatch(path.name) for path in checkpoints.glob("step-*"))
    return max((int(match[1]) for match in found if match), default=None)
