"""A real SLURM cluster of two nodes on one machine, for tests and experiments.

As a program:
    python slurm/testcluster/cluster.py start DIR     prints the line that points sbatch and srun at it
    python slurm/testcluster/cluster.py stop DIR
As a context manager:
    with TestCluster(directory) as cluster:
        job = cluster.submit("--nodes=2", "script.sh")
        cluster.wait(job, {"COMPLETED"}, timeout_s=60)

What is special: one slurmctld and two slurmd, nodes n1 and n2, which report CPUS each, whatever the machine has. All
their files are in the directory, they listen on free ports, and job ids begin in a range of their own, so several
clusters can run side by side. It needs no munge, cgroups, accounting or root (without root, jobs run as this user). A
requeued job starts again after REQUEUE_DELAY_S instead of two minutes. A node that is set down (`scontrol update
NodeName=n2 State=DOWN Reason=test`) loses its jobs and comes back by itself. A job in partition `urgent` preempts the
others. Tested with SLURM 22.05.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType

NODES = ("n1", "n2")
CPUS = 2
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
# slurmctld lets a requeued job wait for as long as a credential lives, and takes no less than 5 s. Do not cut
# the wait short with `scontrol update StartTime=now`: a node that still knows the old credential refuses the
# job, and slurmctld then fails it ("Job credential revoked").
REQUEUE_DELAY_S = 5
FINAL_STATES = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}

# The daemons are in sbin, which may not be on PATH.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin"])
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")

_CONFIG = """\
ClusterName=testcluster
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
# A job id of its own range: MASTER_PORT is made from it.
FirstJobId={port}

AuthType=auth/none
AuthInfo=cred_expire={requeue_delay}
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
# Look for work at once, not every few seconds.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=86400

StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log

{nodes}
# A job in `urgent` preempts those in `main`: SIGTERM to their tasks, at most 30 s, back into the queue.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class ClusterError(RuntimeError):
    """The test cluster, a command or a job on it failed; the message says how."""


def unavailable() -> str | None:
    """Why no test cluster can be started on this machine, in one line; None if one can."""
    missing = [program for program in _PROGRAMS if not shutil.which(program, path=_SEARCH_PATH)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian, Ubuntu: apt-get install slurm-wlm)"
    return None


class TestCluster:
    """Two SLURM nodes that live in `directory` (made if missing) from `start` to `stop`, or in a `with`.

    Raises:
        ClusterError: from the constructor: the directory's path is too long or has characters that slurm.conf
            cannot hold; from the methods: see there.
    """

    __test__ = False  # pytest would collect a class of this name

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        # slurmstepd's sockets are in it, and the path of a socket has at most 107 bytes.
        if not re.fullmatch(r"[\w./+@~-]{1,75}", str(self.directory), re.ASCII):
            raise ClusterError(
                f"{self.directory}: choose a directory whose path has at most 75 characters,"
                " all of them letters, digits or one of . _ / + @ ~ -"
            )

    @property
    def config(self) -> Path:
        """The slurm.conf of this cluster."""
        return self.directory / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """The variables of this process, with this cluster's SLURM_CONF, without those of a job it may run in."""
        foreign = ("SLURM_", "SRUN_", "SBATCH_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return kept | {"SLURM_CONF": str(self.config)}

    def start(self) -> None:
        """Start the daemons and return when both nodes are idle.

        Raises:
            ClusterError: SLURM is not installed, a cluster runs here already, or the nodes are not idle after
                START_TIMEOUT_S (what had started is stopped again; the message has the ends of the logs).
        """
        if reason := unavailable():
            raise ClusterError(reason)
        if running := list(self.daemons()):
            raise ClusterError(f"a cluster runs in {self.directory} already (pids {running}): stop it first")
        (self.directory / "state").mkdir(parents=True, exist_ok=True)
        for node in NODES:
            (self.directory / f"spool-{node}").mkdir(exist_ok=True)
        self.config.write_text(_configuration(self.directory))
        try:
            self._daemon("slurmctld", "-c")
            for node in NODES:
                self._daemon("slurmd", "-N", node)
            if not until(self._idle, START_TIMEOUT_S):
                raise ClusterError(f"nodes are not idle after {START_TIMEOUT_S:.0f} s")
        except ClusterError as error:
            self.stop()
            raise ClusterError(f"{error}\n{self._logs()}") from None

    def stop(self) -> None:
        """Cancel every job, then end the daemons of this directory and no others. There may be none."""
        if self.config.exists() and any(self.daemons()) and "is UP" in self._try("scontrol", "ping"):
            self.clear()
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.daemons():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            if until(lambda: not any(self.daemons()), STOP_TIMEOUT_S):
                return

    def __enter__(self) -> TestCluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run a SLURM client here; `env` is added to `environment`. Returns its stdout.

        Raises:
            ClusterError: its exit code is not 0; the message has its stderr.
        """
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | dict(env or {}), capture_output=True, text=True
        )
        if done.returncode:
            raise ClusterError(
                f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}"
            )
        return done.stdout

    def submit(self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
        """`sbatch --parsable ARGUMENTS`; returns the job's id."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env))

    def show(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`: {"JobState": "RUNNING", "Restarts": "0", "ExitCode": "0:0", ...}."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", str(job))))

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, ..."""
        return self.show(job)["JobState"]

    def wait(self, job: int, states: Collection[str], timeout_s: float) -> str:
        """Wait until the job is in one of `states`; returns it.

        Raises:
            ClusterError: the job ended in another state, or is still in another after `timeout_s` seconds;
                the message has the end of its log.
        """
        shown: dict[str, str] = {}

        def arrived() -> bool:
            shown.update(self.show(job))
            return shown["JobState"] in {*states, *FINAL_STATES}

        until(arrived, timeout_s)
        if (state := shown["JobState"]) not in states:
            log = Path(shown.get("StdOut", ""))
            raise ClusterError(
                f"job {job} is {state} (exit code {shown['ExitCode']}, restarts {shown['Restarts']}), not"
                f" {' or '.join(sorted(states))}, after at most {timeout_s:.0f} s\n{_tail(log)}"
            )
        return state

    def signal(self, job: int, name: str) -> None:
        """Send signal `name` ("USR1") to the tasks of the job, as `sbatch --signal=NAME@SECONDS` does."""
        self.run("scancel", f"--signal={name}", str(job))

    def clear(self) -> None:
        """Cancel every job and wait until none is left, STOP_TIMEOUT_S at most."""
        self._try("scancel", f"--user={os.geteuid()}")
        until(lambda: not self._try("squeue", "--noheader"), STOP_TIMEOUT_S)

    def daemons(self) -> Iterator[int]:
        """Process ids of the daemons of this directory that run. They have its config on their command line.

        So they are found, and no other process, even if pid files are old or missing.
        """
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.config).encode() in file.read_bytes().split(b"\0"):
                    yield int(file.parent.name)

    def _daemon(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=_SEARCH_PATH)
        assert path is not None  # checked by `start`
        # `daemons` finds it by the path of the config on its command line.
        self.run(path, "-f", str(self.config), *arguments)

    def _idle(self) -> bool:
        states = self._try("sinfo", "--noheader", "--Node", "--format=%N:%t").split()
        return set(states) == {f"{node}:idle" for node in NODES}

    def _try(self, *command: str) -> str:
        """As `run`, but returns "" if the command fails: the controller may not run yet, or no longer."""
        try:
            return self.run(*command)
        except ClusterError:
            return ""

    def _logs(self) -> str:
        return "\n".join(f"{log.name}:\n{_tail(log)}" for log in sorted(self.directory.glob("*.log")))


def _configuration(directory: Path) -> str:
    host = socket.gethostname().split(".")[0]
    port, *node_ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={CPUS}"
        for name, node_port in zip(NODES, node_ports, strict=True)
    )
    return _CONFIG.format(
        host=host,
        port=port,
        user=os.geteuid(),
        directory=directory,
        nodes=nodes,
        requeue_delay=REQUEUE_DELAY_S,
    )


def _free_ports(number: int) -> list[int]:
    """Different TCP ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Check every 0.1 s until `condition` holds; returns whether it did within `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _tail(file: Path, lines: int = 15) -> str:
    try:
        return "\n".join(file.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return f"({error})"


def main() -> int:
    """`start DIR` or `stop DIR`; returns the exit code."""
    parser = argparse.ArgumentParser(description="A SLURM cluster of two nodes on this machine.")
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("directory", type=Path, metavar="DIR", help="everything of the cluster lies here")
    options = parser.parse_args()
    try:
        cluster = TestCluster(options.directory)
        if options.action == "stop":
            cluster.stop()
        else:
            cluster.start()
            print(f"export SLURM_CONF={cluster.config}")
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
