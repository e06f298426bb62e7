"""The checks before a job is queued: of everything that would end it, or let it wait for ever, and can be known now."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

from megabase.datamodules.order.windows import WindowPlan
from megabase.pipeline.checkpoint.space import check_space
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.hardware import precision_of
from megabase.pipeline.plan.batches import batches_of
from megabase.pipeline.plan.parameters import count_parameters
from megabase.pipeline.plan.profiles import hardware_of_job
from megabase.pipeline.plan.run import plan
from megabase.pipeline.plan.table import in_short
from megabase.pipeline.plan.warnings import does_not_fit, warnings_of
from megabase.pipeline.rundir.paths import RunPaths
from megabase.pipeline.slurm.partition import check_partition, partitions
from megabase.pipeline.tracking.server import Server
from megabase.pipeline.training.check import check

MLFLOW_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Finding:
    """The result of a check that passed.

    Attributes:
        what: was checked.
        text: what was found.
        warning: it may be wrong, but does not keep the job from training.
        fatal: the job will end of it, by the plan of its memory: `submit` needs --force.
    """

    what: str
    text: str
    warning: bool = False
    fatal: bool = False


def check_submission(config: RunConfig, call: Sequence[str], ranks: int) -> list[Finding]:
    """Check a run and its sbatch call before the job is queued; sets `model.vocab_size`.

    Args:
        config: of the run, as it is where the job runs.
        call: of `call_for`.
        ranks: that the job starts.

    Raises:
        UserError, DataError, ConfigError: of `training.check`; or the checkpoints that the run keeps do not fit on the
            disk, or the partition does not exist or will never start the job.
    """
    windows = check(config, ranks, here=False)
    batches = batches_of(config, ranks, windows.plan)
    found = [
        Finding(
            "shards",
            f"{config.data.shards}: {batches.windows:,} training windows of {batches.length:,} bases",
        ),
        Finding(
            "batch",
            f"{batches.global_batch} windows = {batches.product}",
        ),
        Finding("run directory", f"{config.directory} can be written"),
        Finding("disk", _disk(config)),
        Finding("partition", check_partition(call, partitions())),
    ]
    if batches.warning:
        found.append(Finding("batch", batches.warning, warning=True))
    found += _plan(config, windows.plan)
    if config.tracking.enabled:
        found.append(_mlflow(Server.of(config).uri))
    return found


def _plan(config: RunConfig, windows: WindowPlan) -> list[Finding]:
    """What the plan says of the job. Whether it fits is certain if the settings name the GPU, or the memory of CPUs."""
    hardware = hardware_of_job(config.slurm)
    if hardware is None:
        text = f"slurm.gpus={config.slurm.gpus} has no profile in configs/hardware: not checked whether the run fits"
        return [Finding("plan", text, warning=True)]
    planned = plan(config, windows, precision_of(config.trainer.precision), hardware.profile)
    if (problem := does_not_fit(planned)) is not None:
        if hardware.certain:
            found = [
                Finding(
                    "plan", f"the run {problem}. --force submits it all the same", warning=True, fatal=True
                )
            ]
        else:
            found = [Finding("plan", f"the run {problem}", warning=True)]
    else:
        found = [Finding("plan", in_short(planned))]
    warnings = [each for each in warnings_of(planned) if each not in (problem, planned.batches.warning)]
    return found + [Finding("plan", warning, warning=True) for warning in warnings]


def _disk(config: RunConfig) -> str:
    parameters = sum(count_parameters(config.model).values())
    precision = precision_of(config.trainer.precision)
    directory = RunPaths(config.directory).checkpoints
    kept, steps = config.checkpoint, config.trainer.max_steps
    return check_space(directory, kept, steps, parameters, config.zero.stage, precision)


def _mlflow(uri: str) -> Finding:
    """Whether a tracking server answers. If not, that is a warning only: the nodes of the job may reach it."""
    if not uri.startswith(("http://", "https://")):
        return Finding("MLflow", uri)
    problem = unreachable(uri)
    if problem is None:
        return Finding("MLflow", f"{uri} answers")
    text = (
        f"{uri} does not answer from here ({problem}): check tracking.uri. Training does not wait for it, and sends"
        " what is missing later"
    )
    return Finding("MLflow", text, warning=True)


def unreachable(uri: str, timeout_s: float = MLFLOW_TIMEOUT_S) -> str | None:
    """Why a server does not answer within `timeout_s` seconds; None if it answers, if only with an error."""
    result: list[str | None] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s):
                result.append(None)
        except urllib.error.HTTPError:
            result.append(None)
        except (OSError, ValueError) as error:
            result.append(str(getattr(error, "reason", error)))

    # A thread, because the look-up of the host's name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return result[0] if result else f"no answer in {timeout_s:g} s"
