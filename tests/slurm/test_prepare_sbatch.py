"""slurm/prepare.sbatch on a real SLURM: an array and one more job make the shards of a single prepare."""

import os
import sys
from pathlib import Path

import pytest

from megabase.datamodules.prepare.run import prepare
from megabase.slurm.testcluster.cluster import TestCluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "prepare.sbatch"

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


PROGRAM = """
import os, signal, sys
from functools import partial
from megabase.datamodules.prepare import run
from megabase.pipeline import cli

if "2/2" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
run.prepare = partial(run.prepare, shard_bytes=4096)
run.prepare_portion = partial(run.prepare_portion, shard_bytes=4096)
sys.exit(cli.main())
"""


def test_an_array_of_which_an_element_dies(cluster: TestCluster, tmp_path: Path) -> None:
    files = [tmp_path / f"f{number}.fa" for number in range(3)]
    for number, path in enumerate(files):
        path.write_text(f">r{number}\n{'ACGGT' * (3000 + number)}\n")
    program = tmp_path / "bin" / "megabase"
    program.parent.mkdir()
    # Small shards, so that each file is a unit of its own. The second element dies before it has written anything.
    program.write_text(f"#!{sys.executable}\n{PROGRAM}")
    program.chmod(0o755)
    environment = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    output = tmp_path / "out"
    arguments = [str(SCRIPT), *map(str, files), str(output), "--valid", "0.1"]
    options = ["--cpus-per-task=1", f"--output={tmp_path / 'log-%j.out'}"]
    array = cluster.submit("--array=0-1", *options, *arguments, env=environment)
    last = cluster.submit(f"--dependency=afterany:{array}", *options, *arguments, env=environment)
    cluster.wait(last, {"COMPLETED"}, 120)
    logs = [path.read_text() for path in tmp_path.glob("log-*.out")]
    assert any("portion 1/2 has 1 input file, all written" in log for log in logs), logs
    prepare(files, tmp_path / "whole", valid=0.1, shard_bytes=4096, jobs=1, progress=False)
    whole, made = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "out")
    )
    assert made == whole
    assert not list(tmp_path.glob("out.p*"))
