"""A `megabase` without torch for tests of the job script: it behaves as a training does, in seconds.

    megabase train HOME [KEY=VALUE...]
    STUB_HOME=HOME STUB_STEPS=N megabase train FILE      as `megabase submit` calls it

Each rank counts steps of STEP_S and waits for the others in each of them. Rank 0 publishes `checkpoints/step-N` of the
run directory HOME/run, and a start continues from the newest. SIGUSR1 and SIGTERM stop all ranks at the same step,
with a checkpoint and code 75. A rank that waits HANG_S for another one ends with code 1, as by its watchdog. Settings:

    steps=40        of the whole run
    bad_node=n1     on which a rank is killed by SIGKILL after its first checkpoint, as by the kernel without memory
    crash=1         the first start ends as on a full disk, after a checkpoint
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP_S, HANG_S, EVERY = 0.1, 3.0, 5


class Stub:
    """One rank of one start."""

    def __init__(self, home: Path, settings: dict[str, str]) -> None:
        self.rank, self.ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        self.status = Path(os.environ["MEGABASE_STATUS_FILE"])
        self.settings, self.run = settings, home / "run"
        self.checkpoints = self.run / "checkpoints"
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.run / "logs").mkdir(exist_ok=True)
        self.first = max((int(path.name[5:]) for path in self.checkpoints.iterdir()), default=0)
        self.began = time.time()
        self.stop = False

    def publish(self, path: Path, content: object) -> None:
        path.with_suffix(f".{self.rank}").write_text(json.dumps(content))
        path.with_suffix(f".{self.rank}").rename(path)

    def beat(self, step: int, silent: float = 0.0) -> None:
        """Write the heartbeat. Its clock is 20 times as fast, so that three seconds are as a minute."""
        written = self.began + 20 * (time.time() - self.began)
        what = {"rank": self.rank, "host": os.environ["SLURMD_NODENAME"], "pid": os.getpid(), "step": step}
        self.publish(self.run / "logs" / f"rank-{self.rank}.heartbeat", what | {"written": written})

    def write_state(self, state: str, step: int) -> None:
        if self.rank == 0:
            self.publish(self.status, {"state": state, "step": step, "checkpoints": str(self.checkpoints)})

    def agree(self, step: int) -> bool:
        """Wait for the other ranks at a step; returns whether one of them has got a signal."""
        self.publish(self.status.with_name(f"step-{step}-of-{self.rank}.json"), self.stop)
        files = [self.status.with_name(f"step-{step}-of-{rank}.json") for rank in range(self.ranks)]
        began = time.monotonic()
        while not all(file.exists() for file in files):
            if time.monotonic() - began > HANG_S:
                self.beat(step)
                print("megabase: has not moved: ending this rank", file=sys.stderr, flush=True)
                os._exit(1)
            time.sleep(0.02)
        return any(json.loads(file.read_text()) for file in files)

    def train(self) -> int:
        """Returns the exit code."""
        steps = int(self.settings.get("steps", 40))
        self.write_state("running", self.first)
        print(f"from step {self.first} on {os.environ['SLURMD_NODENAME']}", flush=True)
        for step in range(self.first + 1, steps + 1):
            time.sleep(STEP_S)
            self.beat(step)
            stop = self.agree(step)
            if self.rank == 0 and (stop or step % EVERY == 0):
                (self.checkpoints / f"step-{step}").mkdir(exist_ok=True)
            if stop:
                self.write_state("again", step)
                return 75
            if step == self.first + EVERY:
                if self.settings.get("bad_node") == os.environ["SLURMD_NODENAME"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                if "crash" in self.settings and not self.first:
                    self.write_state("crashed", step)
                    return 1
        self.write_state("finished", steps)
        return 0


def main() -> int:
    if sys.argv[1] == "job-end":  # decided by megabase itself
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-P", "-m", "megabase.pipeline.cli", *sys.argv[1:]])
    home, *settings = sys.argv[2:]
    if "STUB_HOME" in os.environ:
        home, settings = os.environ["STUB_HOME"], [f"steps={os.environ['STUB_STEPS']}"]
    stub = Stub(Path(home), dict(setting.split("=", 1) for setting in settings))

    def handler(number: int, frame: object) -> None:
        stub.stop = True

    signal.signal(signal.SIGUSR1, handler)
    signal.signal(signal.SIGTERM, handler)
    return stub.train()


if __name__ == "__main__":
    sys.exit(main())
