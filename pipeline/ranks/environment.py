"""The environment variables of a rank: torchrun's, or SLURM's.

Ranks of `megabase train` start in one of three ways. In each, torchrun's variables are set in the end:

- from a shell: the process starts one rank per device (`supervisor.py`);
- by `srun`, one task per device: `complete_environment` derives the variables from SLURM's;
- by torchrun, or anything else that sets RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
import platform

from megabase.pipeline.errors import UserError
from megabase.pipeline.readable import counted

# In this environment variable, 1 allows more ranks than CPUs, as the tests need.
OVERSUBSCRIBE = "MEGABASE_OVERSUBSCRIBE"
# In this environment variable the job script passes the path of the file in which rank 0 says where the ranks meet.
MEETING_FILE = "MEGABASE_MEETING_FILE"


def node_name() -> str:
    """The name of this machine: SLURM's for the node, if this process runs in a job."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def local_devices(requested: int | None) -> int:
    """The number of ranks on this node: `requested`, or else one for each GPU, or else 1.

    Raises:
        UserError: more GPUs are requested than the node has.
    """
    gpus = visible_gpus()
    if requested is None:
        return gpus or 1
    if gpus == 1 and _step_tasks() > 1:
        return requested  # SLURM shows each task a GPU of its own (--gpus-per-task, --gpu-bind)
    if gpus and requested > gpus:
        raise UserError(
            f"trainer.devices={requested}: this node has {gpus} GPUs: take {gpus}, or null for all"
        )
    return requested


def visible_gpus() -> int:
    """The number of GPUs that this process sees."""
    import torch  # not at the top: `is_rank` is asked before torch is loaded

    return torch.cuda.device_count()


def device_of(local_rank: int, gpus: int) -> int:
    """The number of the device of a rank, among the GPUs that it sees. Without GPUs, the rank's number on its node."""
    return local_rank % gpus if gpus else local_rank


def refuse_oversubscription(devices: int, cpus: int, way_out: str) -> None:
    """Raise UserError if more ranks are to start on a machine without GPUs than it has CPUs.

    Args:
        devices: ranks to start.
        cpus: of this machine.
        way_out: the settings or the command that fit; the end of the message.
    """
    if devices > cpus and os.environ.get(OVERSUBSCRIBE) != "1":
        raise UserError(
            f"trainer.devices={devices}: this machine has no GPU that torch can use, and {counted(cpus, 'CPU')},"
            f" one for each rank at most: {way_out}"
        )


def is_rank() -> bool:
    """Whether a launcher started this process as one rank: torchrun's variables are set, or it is a SLURM task."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    # A shell of salloc or sbatch has SLURM_PROCID too, but it is in no step, or in a step of a single task. A step of a
    # single task is a rank only if MASTER_ADDR is set, which slurm/train.sbatch does.
    return _step_tasks() > 1 or ("SLURM_STEP_ID" in os.environ and "MASTER_ADDR" in os.environ)


def complete_environment(nodes: int, devices: int) -> None:
    """In a launched rank, set torchrun's variables from SLURM's where they are missing, and check them.

    Args:
        nodes: `trainer.nodes`.
        devices: ranks on each node.

    Raises:
        UserError: the number of ranks is not nodes x devices, or it is not known where they meet (rendezvous.py).
    """
    if "RANK" not in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = str(_step_tasks())
        os.environ["LOCAL_RANK"] = str(device_of(int(os.environ["SLURM_LOCALID"]), visible_gpus()))
        os.environ["GROUP_RANK"] = os.environ["SLURM_NODEID"]
    place = "MASTER_PORT" if MEETING_FILE not in os.environ else MEETING_FILE
    missing = [name for name in ("MASTER_ADDR", place) if name not in os.environ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set: the ranks do not know where to meet;"
            " use `megabase submit`, or set them before srun as slurm/train.sbatch does"
        )
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks != nodes * devices:
        raise UserError(
            f"{ranks} ranks were started, but trainer.nodes={nodes} x trainer.devices={devices} makes"
            f" {nodes * devices}: change the settings, or the number of ranks that the launcher starts"
        )


def rank_name() -> str | None:
    """This process's rank as text; None if it is not a rank."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID"))


def is_rank_zero() -> bool:
    """Whether this process prints messages and writes files: rank 0, task 0 of a SLURM step, or not a rank."""
    return int(rank_name() or 0) == 0


def _step_tasks() -> int:
    """The number of tasks in this process's SLURM step; 1 outside of a step."""
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"])
