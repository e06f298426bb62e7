"""The torture test: a run is killed N times, damaged in between, and must end as the run that nothing disturbed.

    python -m tests.torture --kills 20 [--seed S] [--stage 0..3] [--ranks 2] [--background] [--directory D] [--keep]
        [KEY=VALUE...]

Every job is a real `megabase train`, watched from outside. For each kill the seed decides the phase, the process, and
what is damaged afterwards. A phase is recognised by what appears in the run directory; the moment within it is a random
fraction of how long that phase usually takes.

After every kill:
- the journal is the beginning of the undisturbed one, byte for byte, and reaches the newest checkpoint;
- every published checkpoint is complete, except those that this program has damaged;
- no process of the job is left. If one rank was killed, the others ended within a bounded time.
After every start: it resumed from the newest complete checkpoint. At the end: `metrics.jsonl` and every tensor of the
last checkpoint, weights and optimizer states, are those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.disk import mount, unmount
from tests.torture.rundir import Failed
from tests.torture.torture import Options, Torture


def run(options: Options) -> int:
    """Run the torture test; returns the exit code."""
    began = time.monotonic()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="torture-"))
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    why_not = "--plain-disk" if options.plain_disk else mount(directory / "disk")
    print(
        f"torture: {options.kills} kills, seed {options.seed}, ZeRO stage {options.stage}, {options.ranks} ranks,"
        f" in {directory}" + (f"; without a full disk ({why_not})" if why_not else ""),
        flush=True,
    )
    torture = Torture(options, directory, small_disk=not why_not)
    try:
        same = torture.go()
    except BaseException as error:
        if not why_not:
            unmount(directory / "disk", keep=True)
        if not isinstance(error, Failed):
            raise
        print(f"{torture.pending}\ntorture: NOT SURVIVED, seed {options.seed}: {error}\nkept: {directory}")
        return 1
    for title, counter in (
        ("", torture.phases),
        ("killed: ", torture.targets),
        ("damaged: ", torture.damages),
    ):
        print(f"  {title}{', '.join(f'{name} {count}' for name, count in counter.most_common())}")
    minutes = (time.monotonic() - began) / 60
    print(f"torture: {options.kills} kills survived, seed {options.seed}: {same}; {minutes:.1f} minutes")
    if not why_not:
        unmount(directory / "disk", keep=options.keep)
    if not options.keep:
        shutil.rmtree(directory)
    return 0


def main() -> int:
    """Read the command line."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="python -m tests.torture",
        description="Kill a training run again and again; its result must not change.",
    )
    parser.add_argument("--kills", type=int, default=defaults.kills, metavar="N")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="of the plan")
    parser.add_argument("--stage", type=int, default=defaults.stage, choices=range(4), help="zero.stage")
    parser.add_argument("--ranks", type=int, default=defaults.ranks, metavar="N")
    parser.add_argument("--background", action="store_true", help="checkpoint.background")
    parser.add_argument("--tracking", action="store_true", help="with MLflow")
    parser.add_argument("--plain-disk", action="store_true", help="no small tmpfs, so no full disk")
    parser.add_argument(
        "--chance",
        type=float,
        default=defaults.chance,
        metavar="P",
        help="of each kind of damage after a kill",
    )
    parser.add_argument("--directory", type=Path, metavar="D", help="where (default: a temporary directory)")
    parser.add_argument("--keep", action="store_true", help="keep the directory")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="further settings of the run")
    return run(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    sys.exit(main())
