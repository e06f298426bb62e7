"""Ranks: how the processes of one run come to be, find each other and end together.

`megabase train` is started in one of three ways, and each ends in the same environment (torchrun's variables):
- by hand: this process becomes a supervisor and starts one process per device (`supervise`);
- by `srun`, one task per device: the variables are derived from SLURM's;
- by torchrun or anything else that sets RANK and WORLD_SIZE: nothing to do.

The process group is made before Lightning's Trainer, so that ranks can agree on a checkpoint before anything is
built. Ranks talk about decisions over gloo, on the host, never through the device.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import megabase
from megabase.datamodules.errors import DataError
from megabase.models.config import ConfigError
from megabase.pipeline.errors import GOES_ON, RunError, UserError, first_line, rank_zero
from megabase.pipeline.ranks.stop import INTERRUPTED, STOP_SIGNALS, StopRequest
from megabase.pipeline.ranks.watchdog import START_MINUTES

# After one rank has failed, the others get this long to leave by themselves, in seconds.
GRACE_S = 10.0
# A rank that fails waits so long for rank 0 to say why, in seconds; well below GRACE_S.
HEARING_S = 2.0
# A process that was killed is waited for so long: one that waits for a dead disk does not even die.
BURIAL_S = 30.0
# Ranks start together, but may need minutes to import their libraries from a busy file system.
MEETING_TIMEOUT = timedelta(minutes=10)
# How much longer a collective waits than the watchdog does: who finds a hang first should be the one who can say
# where it is.
MARGIN_MINUTES = 10.0
STARTING_TIMEOUT = timedelta(minutes=START_MINUTES + MARGIN_MINUTES)
# How gloo and NCCL say that a peer has left.
_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|remote process exited|socket.*closed", re.IGNORECASE
)
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: a child of a process with threads must not load libraries.
_LIBC = ctypes.CDLL(None)


def local_devices(requested: int | None) -> int:
    """Ranks on this node: what was asked for, else every GPU, else 1.

    Raises:
        UserError: more GPUs are asked for than the node has.
    """
    gpus = torch.cuda.device_count()
    if requested is None:
        return gpus or 1
    if gpus and requested > gpus:
        raise UserError(f"trainer.devices={requested}: this node has {gpus} GPUs")
    return requested


def launched() -> bool:
    """Whether this process is one rank already: torchrun's variables, or a task of a SLURM step."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    # A shell of salloc or sbatch has SLURM_PROCID too, but no step of its own (or one of a single task).
    return _tasks() > 1 or ("SLURM_STEP_ID" in os.environ and "MASTER_ADDR" in os.environ)


def adopt(nodes: int, devices: int) -> None:
    """In a launched rank: derive torchrun's variables from SLURM's where they are missing, and check them.

    Raises:
        UserError: the number of ranks is not nodes x devices, or nothing says where they meet.
    """
    if "RANK" not in os.environ:
        os.environ["RANK"] = os.environ["SLURM_PROCID"]
        os.environ["WORLD_SIZE"] = str(_tasks())
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        os.environ["GROUP_RANK"] = os.environ["SLURM_NODEID"]
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not set: the ranks do not know where to meet;"
            " use `megabase submit`, or set them before srun as slurm/train.sbatch does"
        )
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks != nodes * devices:
        raise UserError(
            f"{ranks} ranks were started, but trainer.nodes={nodes} x trainer.devices={devices} makes"
            f" {nodes * devices}: change the settings, or what the launcher was asked for"
        )


def _tasks() -> int:
    """Tasks of the SLURM step that this process is one of; 1 outside."""
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_ID" not in os.environ:
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ["SLURM_NTASKS"])


def megabase_command(*arguments: str) -> list[str]:
    """The command line that runs `megabase ARGUMENTS...` with this interpreter and the same packages.

    `-P` keeps the user's working directory off the module path, as the `megabase` script does. Where this process
    itself found megabase in the working directory (`python -m` in a source tree), so must the new one.
    """
    root = Path(megabase.__file__).resolve().parents[1]
    from_here = not sys.flags.safe_path and Path(sys.path[0] or ".").resolve() == root == Path.cwd().resolve()
    return [sys.executable, *([] if from_here else ["-P"]), "-m", "megabase.pipeline.cli", *arguments]


def supervise(command: Sequence[str], ranks: int, stop: StopRequest) -> int:
    """Start `ranks` processes of `command` on this machine and wait; return the exit code of the run.

    The run's code is rank 0's. A rank that fails ends the others within GRACE_S seconds. A signal that sets
    `stop` is passed to rank 0, from where the ranks agree on the step to stop at. When this process dies, the
    kernel ends the ranks.
    """
    environment = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "GROUP_RANK": "0",
    }
    threads = max(1, (len(os.sched_getaffinity(0))) // ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=partial(_before_exec, os.getpid()),
        )
        for rank in range(ranks)
    ]

    told = False
    try:
        while processes[0].poll() is None and all(p.poll() in (None, 0) for p in processes[1:]):
            if stop and not told:
                # Not SIGINT: a terminal has sent that to the ranks as well, and the second interrupts.
                terminated = stop.reason == signal.SIGTERM.name
                processes[0].send_signal(signal.SIGTERM if terminated else signal.SIGUSR1)
                told = True
            time.sleep(0.1)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    return _end(processes)


_started = False
_store: dist.Store | None = None
# In the store, once rank 0 has said why it fails.
_SAID = "rank 0 has said why"


def started() -> bool:
    """Whether this process has called `start`: it must end with `leave`."""
    return _started


def start() -> None:
    """Make the process group from torchrun's variables: NCCL for tensors on GPUs, else gloo.

    Raises:
        RunError: ranks did not come within MEETING_TIMEOUT; the message says which, and where they were expected.
    """
    global _started, _store
    _started = True
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _store = _meet(rank, size)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=_store,
        rank=rank,
        world_size=size,
        timeout=STARTING_TIMEOUT,
    )


def leave(code: int) -> NoReturn:
    """End a rank, past the interpreter's teardown: threads of the libraries now and then abort that (SIGABRT).

    A run that is finished, or failed for a reason it gave, must not look like one that crashed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def complain(error: BaseException) -> None:
    """Say on stderr why this process fails: in one line, or as a traceback where no user could know. Once for an error.

    Ranks often find the same thing wrong, and then rank 0 says so. Another one waits a moment for that; if it does not
    come, something is wrong here only, and it says so under its own name. When a rank has died, all others find their
    connections broken: a line each.
    """
    if getattr(error, "said", False) or isinstance(error, KeyboardInterrupt):
        return
    error.said = True  # type: ignore[attr-defined]
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    name = f"rank {rank} on {platform.node()}: "
    line = ""
    if isinstance(error, UserError | RunError | DataError | ConfigError):
        if not rank_zero() and _rank_zero_speaks():
            return
        line = ("" if rank_zero() else name) + " ".join(str(error).split())
    elif isinstance(error, RuntimeError) and _LOST.search(str(error)):
        line = f"{name}another rank is gone ({first_line(error)}): why is in its own lines, or its node's log"
    else:
        traceback.print_exception(error)
    if line:
        print(f"megabase: {line}", file=sys.stderr, flush=True)
    if _store is not None and rank_zero():
        with suppress(dist.DistError):
            _store.set(_SAID, "")
        time.sleep(HEARING_S / 2)  # the store goes with this process


def _rank_zero_speaks() -> bool:
    """Whether rank 0 says within HEARING_S seconds why it fails."""
    if _store is None:  # the ranks have not met: if rank 0 fails as well, its launcher ends this one now
        time.sleep(HEARING_S)
        return False
    try:
        _store.wait([_SAID], timedelta(seconds=HEARING_S))
    except dist.DistStoreError:
        return False
    except dist.DistError:  # the store is gone with rank 0
        return True
    return True


def wait_longer_than(hang_minutes: float) -> None:
    """Let the collectives of every group there is wait longer than the watchdog (`trainer.hang_minutes`) does.

    DeepSpeed makes its groups with torch's default, which for NCCL is 10 minutes. Without a watchdog: for a day.
    """
    minutes = max(hang_minutes, START_MINUTES) + MARGIN_MINUTES if hang_minutes else 24 * 60
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)


def _meet(rank: int, size: int) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT, once every rank has come to it."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    minutes = f"{MEETING_TIMEOUT.total_seconds() / 60:g} minutes"
    # torchrun keeps the store itself, and the same one for all its restarts.
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store: dist.Store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not hosted,
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        said = str(error).splitlines()[0]
        problem = (
            f"rank {rank} on {platform.node()} cannot {'open' if rank == 0 else 'reach'} the meeting place {place}"
            f" within {minutes} ({said}). Is the address that of rank 0's node, the port free there and open between"
            " nodes, and did rank 0 start?"
        )
        if rank:  # this one knows what rank 0, which speaks for all, does not
            print(f"megabase: {problem}", file=sys.stderr)
        raise RunError(problem) from None
    store = dist.PrefixStore(f"megabase/{attempt}", store)
    arrivals = [f"rank {each}" for each in range(size)]
    store.set(arrivals[rank], platform.node())
    try:
        store.wait(arrivals, MEETING_TIMEOUT)
    except dist.DistError:
        missing = [each for each in arrivals if not store.check([each])]
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise RunError(
            f"{named} of {size} did not come to {place} within {minutes}: look in the log for why they ended, and"
            f" whether their nodes reach {place}"
        ) from None
    return store


class Ranks:
    """Agreement between ranks over a gloo group of its own: small objects and counters, on the host."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.group = dist.new_group(backend="gloo", timeout=STARTING_TIMEOUT)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, on every rank, in the order of ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_async(self, counters: torch.Tensor) -> dist.Work:
        """Start summing `counters` (int64, on the host) over ranks in place; wait on what is returned."""
        return dist.all_reduce(counters, group=self.group, async_op=True)

    def check(self, error: str | None, *, passing: bool = False) -> None:
        """Raise RunError, `passing` or not, on every rank if any rank passes an `error`."""
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(self.gather(error)) if text]
        if errors:
            raise RunError("; ".join(errors), passing=passing)


def _end(processes: list[subprocess.Popen[bytes]]) -> int:
    """Let ranks leave for GRACE_S seconds, kill those that stay; returns the code of the first that failed, or 0."""
    failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    deadline = time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(BURIAL_S)
    for rank in failed:
        code = processes[rank].returncode
        if code == INTERRUPTED:
            print(f"megabase: rank {rank} was interrupted; {GOES_ON}", file=sys.stderr)
        if code < 0:
            print(
                f"megabase: rank {rank} was ended by {signal.Signals(-code).name}; {GOES_ON}",
                file=sys.stderr,
            )
    code = processes[failed[0] if failed else 0].returncode
    return 1 if code < 0 else code


def _before_exec(supervisor: int) -> None:
    """In a child: hold back stop signals until it listens, and have the kernel kill it when its parent ends."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:  # it has ended already
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
