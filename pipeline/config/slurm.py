"""What a job requests from SLURM: the section `slurm` of a run's settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

APPTAINER, PYXIS = RUNTIMES = ("apptainer", "pyxis")


@dataclass
class SlurmConfig:
    """What a job requests from SLURM. Nodes and ranks are `trainer.nodes` and `trainer.devices`.

    Attributes:
        partition: Partition. null: the cluster's default.
        account: Account. null: the cluster's default.
        qos: Quality of service. null: the cluster's default.
        constraint: Required features of a node. null: none.
        time: Time limit of one start: "HH:MM:SS", "D-HH:MM:SS", or a bare number of seconds. null: the partition's
            limit. The job is requeued at the limit, so this need not cover the whole training.
        signal_seconds: Seconds before the time limit at which SLURM signals the job to write a checkpoint and stop.
            SLURM may signal a minute early. Allow twice the time of a step and a checkpoint.
        cpus_per_task: CPUs of each rank, shared with its data workers. null: the cluster's default.
        mem: Memory of each node, such as "64G". null: the cluster's default.
        gpus: Type of GPU, such as "h100". "any": any type. null: no GPUs, the run trains on CPUs. Each node gets
            `trainer.devices` of them.
        extra: Further sbatch options, such as ["--exclusive", "--mail-type=FAIL"].
        max_stalls: The job ends when this many starts in a row, and one more, have published no newer checkpoint.
            What SLURM starts again by itself, after a preemption or a lost node, does not count.
        interface: Network interface of NCCL and gloo, such as "ib0". null: they choose.
        setup: Lines of shell that the job runs before training, such as ["module load cuda/12.4"].
        container: Image in which training runs, such as "image.sif", with `megabase` on its PATH. null: none.
        container_runtime: What starts the container: `apptainer`, or `pyxis` (srun's own options).
        container_mounts: Further directories for the container. It sees run.root, data.shards and the directory in
            which the job was submitted.
        copy_code: Copy the code of megabase into the run directory, and train with the copy. Otherwise a job that
            waits or is started again runs the code that is installed then.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    signal_seconds: int = 120
    cpus_per_task: int | None = None
    mem: str | None = None
    gpus: str | None = "any"
    extra: list[str] = field(default_factory=list)
    max_stalls: int = 3
    interface: str | None = None
    setup: list[str] = field(default_factory=list)
    container: str | None = None
    container_runtime: str = APPTAINER
    container_mounts: list[str] = field(default_factory=list)
    copy_code: bool = False


def seconds_of_limit(time: str | None) -> int | None:
    """`slurm.time` in seconds; None if it is not set or cannot be read, which `submit` refuses.

    YAML reads an unquoted 24:00:00 as 86400, so a bare number is one of seconds.
    """
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):([0-5]\d):)?(\d+)", time or "")
    if not match or (match[2] and int(match[4]) > 59):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
