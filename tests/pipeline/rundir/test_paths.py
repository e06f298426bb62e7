"""The paths of a run directory."""

from pathlib import Path

from megabase.pipeline.rundir.paths import RunPaths


def test_names_that_users_and_job_scripts_rely_on() -> None:
    paths = RunPaths(Path("runs/x"))
    names = {
        "config": "config.yaml",
        "environment": "environment.json",
        "metrics": "metrics.jsonl",
        "performance": "performance.jsonl",
        "checkpoints": "checkpoints",
        "logs": "logs",
        "mlflow": "mlflow.json",
        "submit_script": "submit.sbatch",
        "status": "status.json",
        "stop": "STOP",
        "baselines": "baselines.json",
        "loss_curve": "loss.png",
        "lock": ".lock",
        "dataset": "dataset.json",
        "tracking_lock": ".mlflow.lock",
    }
    assert {name: str(getattr(paths, name)) for name in names} == {
        name: f"runs/x/{file}" for name, file in names.items()
    }


def test_names_of_logs() -> None:
    paths = RunPaths(Path("x"))
    assert [str(path) for path in (paths.heartbeat(3), paths.stacks(3), paths.bad_step(7))] == [
        "x/logs/rank-3.heartbeat",
        "x/logs/rank-3.stacks.txt",
        "x/logs/bad-step-7.json",
    ]
    assert str(paths.slurm_log("%j")) == "x/logs/slurm-%j.out"
