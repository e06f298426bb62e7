"""What the job scripts run, and what a dry run prints, as texts in tests/golden/slurm.

Each script runs under bash with stubs in place of SLURM, the container and megabase; a stub records its arguments, and
`srun` the variables that the script exports. Renew the texts after a change of a script, and read their diff:

    MEGABASE_RENEW_GOLDEN=1 pytest tests/pipeline/slurm/test_golden.py
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.slurm.script import job_script, program, settings_of
from megabase.pipeline.slurm.submit import call_for

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "slurm"
SCRIPTS = ROOT / "slurm"
HERE = Path("/home/me")

# A profile is an experiment and the file of a cluster, or several.
PROFILES = {
    "cpu": ["demo", "cluster/cpu"],
    "h100-infiniband": ["human-131k", "cluster/h100-infiniband"],
    "aws-efa-apptainer": ["human-1m", "cluster/aws-efa", "cluster/apptainer"],
}
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "12",
}
# $0's arguments, quoted, as a line of the record. `srun` first writes what the script has exported.
RECORD = 'printf "%s" "$(basename "$0")" >> RECORD; printf " %q" "$@" >> RECORD; echo >> RECORD\n'
STUBS = {
    "srun": r"""env | grep -vE '^(SLURM_|PATH=|PWD=|SHLVL=|_=|OLDPWD=)' | sort | sed 's/^/export /' >> RECORD
"""
    + RECORD,
    "scontrol": """case "$1 $2" in
"show hostnames") [ -z "$3" ] || printf 'n1\\nn2\\n' ;;
"show job") echo "JobId=7 JobState=RUNNING Reason=None StdOut=DIR/slurm-7.out x=y" ;;
esac
""",
    "sinfo": "printf 'n1\\nn2\\nn3\\n'",
    "megabase": RECORD + "echo end 0 -\n",
    "apptainer": RECORD + "echo end 0 -\n",
    "getent": "exit 0\n",
    "tail": "exit 0\n",
}


def recorded(script: str, arguments: list[str], directory: Path, **more: str) -> str:
    """What a script runs, a line for each call; DIR stands for `directory`."""
    stubs = directory / "stubs"
    stubs.mkdir()
    for name, body in STUBS.items():
        text = body.replace("RECORD", str(directory / "record")).replace("DIR", str(directory))
        (stubs / name).write_text(f"#!/bin/bash\n{text}")
        (stubs / name).chmod(0o755)
    (directory / "script").write_text(script)
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", **JOB, **more}
    call = ["bash", str(directory / "script"), *arguments]
    done = subprocess.run(call, env=environment, cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    record = (directory / "record").read_text().replace(str(directory), "DIR")
    return re.sub(r"(?<=--seconds )\d+", "S", record)


def check(name: str, text: str) -> None:
    """Compare with the golden text, or write it if it is to be renewed."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("MEGABASE_RENEW_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path.name} differs: see the docstring of this file"


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles(profile: str, tmp_path: Path) -> None:
    files = [ROOT / "configs" / f"{name}.yaml" for name in PROFILES[profile]]
    settings = ["run.name=hg38", "run.root=/scratch/runs", "data.shards=/data/hg38", "slurm.partition=gpu"]
    config = load(files, settings)
    call, _ = call_for(config, HERE)
    script = job_script(config, call, HERE).replace(shlex.join(program(config)), "megabase")
    dry_run = settings_of(config, HERE).replace(shlex.join(program(config)), "megabase")
    ran = recorded(script, call[-1:], tmp_path)
    text = f"megabase submit {' '.join(f'configs/{name}.yaml' for name in PROFILES[profile])} {' '.join(settings)}"
    check(profile, f"$ {text} --dry-run\n{shlex.join(call)}\n\n{dry_run}\n# The job runs:\n{ran}")


ARRAY = {
    "SLURM_ARRAY_JOB_ID": "6",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "10",
    "SLURM_ARRAY_TASK_COUNT": "10",
}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["a b.yaml", "trainer.nodes=2", "trainer.devices=8"]),
        ("evaluate", ["runs/hg38", "data.workers=2", "--split", "test", "--output", "out"]),
        ("prepare", ["hg38.fa.gz", "data/hg38", "--valid", "chr 8"]),
        ("use", ["score", "runs/hg38", "chr 8.fa", "-o", "scores.parquet"]),
    ],
)
def test_scripts(name: str, arguments: list[str], tmp_path: Path) -> None:
    ran = recorded((SCRIPTS / f"{name}.sbatch").read_text(), arguments, tmp_path)
    check(name, f"$ sbatch slurm/{name}.sbatch {shlex.join(arguments)}\n{ran}")


def test_an_array_of_prepare(tmp_path: Path) -> None:
    script = (SCRIPTS / "prepare.sbatch").read_text()
    ran = recorded(script, ["a.fa", "b.fa", "data/two"], tmp_path, **ARRAY)
    check(
        "prepare-array", f"$ sbatch --array=1-10 slurm/prepare.sbatch a.fa b.fa data/two  # element 3\n{ran}"
    )


def test_an_array_of_prepare_with_gaps_is_refused(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], **JOB, **ARRAY, "SLURM_ARRAY_TASK_COUNT": "2"}
    call = ["bash", str(SCRIPTS / "prepare.sbatch"), "a.fa", "out"]
    done = subprocess.run(call, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(
        "prepare.sbatch: the array has gaps: use --array=0-9"
    )
