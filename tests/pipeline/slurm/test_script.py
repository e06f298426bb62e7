"""The job script of a run: what `megabase submit` writes into slurm/train.sbatch."""

import subprocess
import sys
from pathlib import Path

import pytest

from megabase.pipeline.config.load import load
from megabase.pipeline.config.schema import RunConfig
from megabase.pipeline.slurm.script import MARK, TRAIN_SCRIPT, copy_code, job_script, program, settings_of

HERE = Path("/home/me")


def settings(*more: str) -> RunConfig:
    run = ["run.name=genome", "run.root=/scratch/runs", "data.shards=/data/hg38", "data.length=64"]
    return load([], [*run, *more])


def test_the_script_is_the_file_with_the_call_and_the_settings(tmp_path: Path) -> None:
    config = settings("slurm.setup=[module load cuda/12.4, ulimit -l unlimited]", "slurm.interface=ib0")
    script = job_script(config, ["sbatch", "--nodes=2", "a b"], HERE)
    lines = script.splitlines()
    assert lines[:2] == ["#!/bin/bash", "# sbatch --nodes=2 'a b'"]
    assert MARK not in script
    place = lines.index("# Written by megabase submit:")
    assert lines[place + 1 : place + 8] == [
        f"MEGABASE=({' '.join(program(config))})",
        "MAX_STALLS=3",
        "INTERFACE=ib0",
        "CONTAINER=()",
        "SRUN_OPTIONS=()",
        "module load cuda/12.4",
        "ulimit -l unlimited",
    ]
    (tmp_path / "script").write_text(script)
    assert subprocess.run(["bash", "-n", tmp_path / "script"], capture_output=True).returncode == 0


def test_containers() -> None:
    mounts = "slurm.container_mounts=[/home/me/extra,/models]"
    apptainer = settings_of(settings("slurm.container=a b.sif", mounts), HERE)
    expected = (
        "CONTAINER=(apptainer exec --nv --bind /data/hg38 --bind /home/me --bind /models --bind /scratch/runs"
        " --pwd /home/me 'a b.sif')"
    )
    assert expected in apptainer.splitlines() and "MEGABASE=(megabase)" in apptainer
    assert "--nv" not in settings_of(settings("slurm.container=a.sif", "slurm.gpus=null"), HERE)
    pyxis = settings_of(
        settings(
            "slurm.container=nvcr.io#nvidia/pytorch", "slurm.container_runtime=pyxis", "data.shards=s3://b"
        ),
        HERE,
    )
    assert (
        "SRUN_OPTIONS=('--container-image=nvcr.io#nvidia/pytorch'"
        " --container-mounts=/home/me:/home/me,/scratch/runs:/scratch/runs --container-workdir=/home/me)"
    ) in pyxis.splitlines()


def test_the_program_has_its_absolute_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    module = [str(tmp_path / "python"), "-P", "-m", "megabase.pipeline.cli"]
    assert program(settings()) == module
    (tmp_path / "megabase").touch(mode=0o755)
    assert program(settings()) == [str(tmp_path / "megabase")]
    copied = program(settings("slurm.copy_code=true"))
    assert copied == ["env", "PYTHONPATH=/scratch/runs/genome/code", *module]


@pytest.mark.slow
def test_copied_code_runs_and_later_changes_do_not_reach_it(tmp_path: Path) -> None:
    copy_code(tmp_path / "code")
    (tmp_path / "code" / "stray").touch()
    copy_code(tmp_path / "code")
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["megabase"]
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import megabase.pipeline.cli as cli; print(cli.__file__)"],
        env={"PYTHONPATH": str(tmp_path / "code")},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == str(tmp_path / "code" / "megabase" / "pipeline" / "cli.py"), found.stderr


def test_a_heterogeneous_job_is_refused() -> None:
    variables = {"SLURM_JOB_ID": "5", "SLURM_HET_SIZE": "2"}
    done = subprocess.run(["bash", TRAIN_SCRIPT], env=variables, capture_output=True, text=True)
    assert done.returncode == 2
    assert "job 5: a heterogeneous job cannot train" in done.stderr


# Programs of SLURM and megabase for the script: NAME: lines of shell. DIR/calls gets what the script tells SLURM to do.
SLURM = {
    "scontrol": """case "$1 $2" in
"show hostnames") [ -z "$3" ] || printf 'n1\\nn2\\n' ;;
"show job") echo "JobId=7 JobState=RUNNING Reason=None StdOut=DIR/slurm-7.out ExcNodeList=n9 x=y" ;;
"ping "*) echo "Slurmctld(primary) at host is DOWN" ;;
*) echo "scontrol $*" >> DIR/calls; [ "$1" != requeue ] || [ "$(wc -l < DIR/calls)" -gt REFUSALS ] ;;
esac""",
    "scancel": 'echo "scancel $*" >> DIR/calls',
    "sleep": "exit 0",
    "sinfo": "exit 0",
    "srun": "exit 75",
    "getent": "exit 0",
    "tail": "exit 0",
}


@pytest.mark.parametrize(
    ("ends", "chain", "refusals", "code", "calls", "said"),
    [
        # The controller answers at the third attempt.
        ("again 75 -", "", 2, 0, ["scontrol requeue 7"] * 3, ""),
        # A running job takes no ExcNodeList: it gets it in the queue, beside what it had.
        ("again 75 n1", "", 0, 0, ["scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=n1,n9"], ""),
        # SLURM refuses for good.
        (
            "again 75 n1",
            "",
            99,
            75,
            ["scontrol requeue 7"] * 6,
            "scontrol cannot requeue the job: submit it again",
        ),
        ("next 75 n1", "6 7 8", 0, 75, ["scontrol update JobId=8 ExcNodeList=n1,n9"], ""),
        ("end 1 -", "7 8 9", 0, 1, ["scancel 8 9"], "the run needs no further job: cancels 8 9"),
        ("end 1 -", "6 7", 0, 1, [], ""),
    ],
)
def test_what_the_script_does_at_the_end(
    tmp_path: Path, ends: str, chain: str, refusals: int, code: int, calls: list[str], said: str
) -> None:
    for name, body in (SLURM | {"megabase": f"echo {ends}"}).items():
        text = body.replace("DIR", str(tmp_path)).replace("REFUSALS", str(refusals))
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "calls").touch()
    script = TRAIN_SCRIPT.read_text()
    if chain:
        (tmp_path / "job.json").write_text(f'{{"jobs": [{", ".join(chain.split())}]}}')
        script = script.replace(MARK, f"CHAIN={tmp_path}/job.json\n")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_PARTITION": "gpu", **variables}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == calls
    assert said in done.stderr and (said or not done.stderr)
