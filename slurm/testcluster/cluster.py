"""A real SLURM cluster on one machine, for tests and experiments.

As a program:
    python slurm/testcluster/cluster.py start DIR [--nodes 4] [--munge]    prints the line that points sbatch at it
    python slurm/testcluster/cluster.py kill-node DIR n2                   as if n2 lost power
    python slurm/testcluster/cluster.py stop DIR
As a context manager:
    with TestCluster(directory, nodes=4) as cluster:
        job = cluster.submit("--nodes=2", "script.sh")
        cluster.wait(job, {"COMPLETED"}, timeout_s=60)

What is special: one slurmctld, and a slurmd for each node n1, n2, ..., which report CPUS each, whatever the machine
has. A job gets the first nodes that are free. All their files are in the directory, they listen on free ports, and job
ids begin in a range of their own, so several clusters can run side by side. It needs no cgroups, accounting or root
(without root, jobs run as this user), and munge only with `munge=True`: then a munged of its own, with its own key and
socket, signs all messages.

A requeued job starts again after REQUEUE_DELAY_S instead of two minutes. A node that is set down (`scontrol update
NodeName=n2 State=DOWN Reason=test`) loses its jobs and comes back by itself; one that no longer answers (`kill_node`)
loses them after NODE_TIMEOUT_S instead of five minutes. A job in partition `urgent` preempts the others: those in
`main` go back into the queue, those in `spot` are cancelled. Tested with SLURM 22.05.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from megabase.slurm.testcluster.configuration import configuration
from megabase.slurm.testcluster.processes import is_on, processes

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
FINAL_STATES = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}

# The daemons are in sbin, which may not be on PATH.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", "/usr/local/sbin"])
_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")


class ClusterError(RuntimeError):
    """The test cluster, a command or a job on it failed; the message says how."""


def unavailable(munge: bool = False) -> str | None:
    """Why no test cluster, or none with munge, can be started on this machine, in one line; None if one can."""
    programs = (*_PROGRAMS, "munged", "mungekey") if munge else _PROGRAMS
    missing = [program for program in programs if not shutil.which(program, path=_SEARCH_PATH)]
    if missing:
        package = "munge" if missing[-1].startswith("munge") else "slurm-wlm"
        return f"not installed: {', '.join(missing)} (Debian, Ubuntu: apt-get install {package})"
    return None


class TestCluster:
    """SLURM nodes that live in `directory` (made if missing) from `start` to `stop`, or in a `with`.

    Args:
        directory: of all their files.
        nodes: how many `start` starts.
        munge: authenticate with munge.

    Raises:
        ClusterError: from the constructor: the directory's path is too long or has characters that slurm.conf
            cannot hold; from the methods: see there.
    """

    __test__ = False  # pytest would collect a class of this name

    def __init__(self, directory: Path, nodes: int = 2, munge: bool = False) -> None:
        self.directory = directory.absolute()
        self.nodes = tuple(f"n{number + 1}" for number in range(nodes))
        self.munge = munge
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
        """Start the daemons and return when all nodes are idle.

        Raises:
            ClusterError: SLURM is not installed, a cluster runs here already, or the nodes are not idle after
                START_TIMEOUT_S (what had started is stopped again; the message has the ends of the logs).
        """
        if reason := unavailable(self.munge):
            raise ClusterError(reason)
        if running := list(self.daemons()):
            raise ClusterError(f"a cluster runs in {self.directory} already (pids {running}): stop it first")
        (self.directory / "state").mkdir(parents=True, exist_ok=True)
        for node in self.nodes:
            (self.directory / f"spool-{node}").mkdir(exist_ok=True)
        self.config.write_text(configuration(self.directory, self.nodes, self.munge))
        try:
            if self.munge:
                self._start_munge()
            self._daemon("slurmctld", "-c")
            for node in self.nodes:
                self._daemon("slurmd", "-N", node)
            if not until(self._idle, START_TIMEOUT_S):
                raise ClusterError(f"nodes are not idle after {START_TIMEOUT_S:.0f} s")
        except ClusterError as error:
            self.stop()
            raise ClusterError(f"{error}\n{self._logs()}") from None

    def stop(self) -> None:
        """End the daemons of this directory and the processes of their jobs, and no others. There may be none."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            for pid in self.daemons():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            if until(lambda: not any(self.daemons()), STOP_TIMEOUT_S):
                break
        # Jobs outlive slurmd. Started by another call, the cluster may have other nodes than `self.nodes`.
        logs = self.directory.glob("slurmd-*.log")
        for node in {*self.nodes, *(log.stem.removeprefix("slurmd-") for log in logs)}:
            self.kill_node(node)

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

    def kill_node(self, node: str) -> None:
        """End everything on a node with SIGKILL, as if it lost power: its slurmd, and the processes of its jobs."""

        def kill() -> bool:
            """Whether none is left."""
            found = list(processes(is_on(node, self.config)))
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not found

        until(kill, STOP_TIMEOUT_S)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node again. Raises ClusterError."""
        self._daemon("slurmd", "-N", node)

    def stop_controller(self) -> None:
        """End slurmctld. Jobs go on; commands find no controller."""
        for pid in processes(self._is_daemon("slurmctld")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        until(lambda: not any(processes(self._is_daemon("slurmctld"))), STOP_TIMEOUT_S)

    def start_controller(self) -> None:
        """Start slurmctld again, with the jobs that it knew, and return when it answers. Raises ClusterError."""
        self._daemon("slurmctld")
        if not until(lambda: "is UP" in self._try("scontrol", "ping"), START_TIMEOUT_S):
            raise ClusterError(f"slurmctld does not answer after {START_TIMEOUT_S:.0f} s\n{self._logs()}")

    def restart_controller(self) -> None:
        """End slurmctld and start it again. Raises ClusterError."""
        self.stop_controller()
        self.start_controller()

    def daemons(self) -> Iterator[int]:
        """Process ids of the daemons of this directory that run. They have its config on their command line.

        So they are found, and no other process, even if pid files are old or missing.
        """
        return processes(self._is_daemon())

    def _is_daemon(self, program: str = "") -> Callable[[Path], bool]:
        """Whether a process, given as its directory in /proc, is a daemon of this cluster, or `program` of it."""

        def check(process: Path) -> bool:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ours = {str(self.config).encode(), f"--socket={self._munge_socket}".encode()}
            return bool(ours.intersection(words)) and words[0].endswith(program.encode())

        return check

    @property
    def _munge_socket(self) -> Path:
        return self.directory / "munge" / "socket"

    def _start_munge(self) -> None:
        """Make a key, and start a munged that only this cluster uses. Raises ClusterError."""
        folder = self._munge_socket.parent
        folder.mkdir(exist_ok=True)
        folder.chmod(0o711)  # munged refuses others
        (folder / "key").unlink(missing_ok=True)
        self.run(_path_of("mungekey"), "--create", f"--keyfile={folder / 'key'}")
        files = {"key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        # --force: it would refuse a directory below one that others can write, such as /tmp.
        self.run(_path_of("munged"), "--force", f"--socket={self._munge_socket}", *options)

    def _daemon(self, program: str, *arguments: str) -> None:
        # `daemons` finds it by the path of the config on its command line.
        self.run(_path_of(program), "-f", str(self.config), *arguments)

    def _idle(self) -> bool:
        states = self._try("sinfo", "--noheader", "--Node", "--format=%N:%t").split()
        return set(states) == {f"{node}:idle" for node in self.nodes}

    def _try(self, *command: str) -> str:
        """As `run`, but returns "" if the command fails: the controller may not run yet, or no longer."""
        try:
            return self.run(*command)
        except ClusterError:
            return ""

    def _logs(self) -> str:
        return "\n".join(f"{log.name}:\n{_tail(log)}" for log in sorted(self.directory.glob("*.log")))


def _path_of(program: str) -> str:
    """The path of a program; `start` has checked that there is one."""
    path = shutil.which(program, path=_SEARCH_PATH)
    assert path is not None
    return path


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
    """`start DIR`, `stop DIR` or `kill-node DIR NODE`; returns the exit code."""
    parser = argparse.ArgumentParser(description="A SLURM cluster on this machine.")
    parser.add_argument("action", choices=["start", "stop", "kill-node"])
    parser.add_argument("directory", type=Path, metavar="DIR", help="everything of the cluster lies here")
    parser.add_argument("node", nargs="?", default="n2", help="for kill-node (default: n2)")
    parser.add_argument("--nodes", type=int, default=2, help="how many to start (default: 2)")
    parser.add_argument("--munge", action="store_true", help="authenticate with munge")
    options = parser.parse_args()
    try:
        cluster = TestCluster(options.directory, options.nodes, options.munge)
        if options.action == "stop":
            cluster.stop()
        elif options.action == "kill-node":
            cluster.kill_node(options.node)
        else:
            cluster.start()
            print(f"export SLURM_CONF={cluster.config}")
    except ClusterError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
