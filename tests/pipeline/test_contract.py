"""The names that users type: a change of one fails here, so it cannot happen by accident."""

import argparse
import dataclasses
import subprocess
import sys

import pytest

import megabase
from megabase.pipeline import cli
from megabase.pipeline.commands.settings import HELP_ON_SETTINGS, split_settings
from megabase.pipeline.config.keys import dotted
from megabase.pipeline.config.schema import RunConfig

SPLITS = ["--alphabet", "--valid", "--test", "--intervals", "--split-by", "--allow-other"]
COMMANDS = {
    "prepare": [
        "inputs",
        "output",
        *SPLITS,
        "--field",
        "--prefix-names",
        "--similarity",
        "--jobs",
        "--portion",
        "--check",
    ],
    "index": ["directory", *SPLITS],
    "data": ["directory", "--length", "--json", "--picture"],
    "checkpoints": ["directory", "--json", "--fast"],
    "watch": ["directory", "--once"],
    "status": ["directories", "--json", "--watch"],
    "cancel": ["directory", "--now"],
    "sync": ["directory", "settings", "--follow"],
    "plan": ["settings", "--hardware", "--ranks", "--json"],
    "train": ["settings", "--dry-run"],
    "submit": ["settings", "--dry-run", "--chain", "--force"],
    "report": ["directory"],
    "export": ["directory", "output", "--format", "--step", "--best", "--dtype"],
    "evaluate": [
        "model",
        "settings",
        "--split",
        "--shards",
        "--length",
        "--step",
        "--best",
        "--windows",
        "--recall",
        "--annotation",
        "--output",
        "--json",
    ],
    "score": [
        *("model", "fasta", "--regions", "--strand", "--track", "--assembly", "--output", "--block"),
        *("--portion", "--step", "--best", "--json"),
    ],
    "embed": [
        *("model", "fasta", "--regions", "--layer", "--pool", "--strand", "--dtype", "--output", "--block"),
        *("--portion", "--step", "--best", "--json"),
    ],
    "generate": [
        *(
            "model",
            "--length",
            "--number",
            "--prompts",
            "--temperature",
            "--top-k",
            "--top-p",
            "--seed",
            "--stop",
        ),
        *(
            "--forbid",
            "--forbid-strand",
            "--gc",
            "--batch",
            "--output",
            "--block",
            "--portion",
            "--step",
            "--best",
        ),
        "--json",
    ],
    "variants": [
        *("model", "vcf", "--genome", "--downstream", "--context", "--strand", "--hash-seeds"),
        *(
            "--null",
            "--seed",
            "--rename",
            "--keep-going",
            "--output",
            "--block",
            "--portion",
            "--step",
            "--best",
            "--json",
        ),
    ],
    "finetune": [
        *("model", "table", "settings", "--output", "--mode", "--pool", "--lora-rank", "--task"),
        *("--sequence", "--label", "--split", "--genome", "--window", "--step", "--best"),
        *("--predict", "--json"),
    ],
    "bench": ["benchmark"],
    "doctor": ["settings", "--json"],
    "job-end": [
        *("--code", "--status", "--record", "--log", "--job", "--seconds", "--job-state", "--reason"),
        *("--max-stalls", "--successors", "--needed", "--usable", "--excluded", "--required"),
    ],
}
SHARED = ["--repeat", "--seconds", "--json", "--picture"]
BENCHMARKS = {
    "attention": [
        "--lengths",
        "--contestants",
        "--dtype",
        "--heads",
        "--head-dim",
        "--chunk",
        "--rounds",
        "--device",
        *SHARED,
    ],
    "model": [
        "--lengths",
        "--depths",
        "--contestants",
        "--dtype",
        "--dim",
        "--depth",
        "--heads",
        "--chunk",
        "--rounds",
        "--sequence-ranks",
        "--longest",
        "--device",
        *SHARED,
    ],
    "data": ["--lengths", "--contestants", "--mebibytes", "--directory", *SHARED],
}
KEYS = [
    "run.name",
    "run.root",
    "run.seed",
    "model.dim",
    "model.depth",
    "model.heads",
    "model.layers",
    "model.causal",
    "data.shards",
    "data.length",
    "data.global_batch",
    "data.micro_batch",
    "data.objective",
    "data.mask_rate",
    "data.stride",
    "data.shift",
    "data.reverse_complement",
    "data.softmask_weight",
    "data.mixture",
    "data.pack",
    "data.on_error",
    "optim.lr",
    "optim.weight_decay",
    "optim.warmup_steps",
    "optim.clip",
    "trainer.max_steps",
    "trainer.devices",
    "trainer.nodes",
    "trainer.precision",
    "trainer.max_minutes",
    "trainer.hang_minutes",
    "trainer.eval_recall",
    "trainer.callbacks",
    "zero.stage",
    "zero.offload",
    "zero.offload_parameters",
    "zero.nvme_path",
    "zero.overlap_comm",
    "zero.deepspeed",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.keep_best",
    "guard.on_bad",
    "guard.spike",
    "guard.window",
    "guard.max_skips",
    "tracking.uri",
    "tracking.experiment",
    "tracking.log_model",
    "tracking.register",
    "slurm.partition",
    "slurm.account",
    "slurm.time",
]


def subcommands(parser: argparse.ArgumentParser, dest: str) -> dict[str, argparse.ArgumentParser]:
    subparsers = next(a for a in parser._actions if a.dest == dest)
    assert isinstance(subparsers.choices, dict)
    return subparsers.choices


def arguments_of(parser: argparse.ArgumentParser) -> list[str]:
    return [a.option_strings[-1] if a.option_strings else a.dest for a in parser._actions]


def test_commands() -> None:
    commands = subcommands(cli.build_parser(), "command")
    assert set(commands) == set(COMMANDS)
    for name, arguments in COMMANDS.items():
        assert arguments_of(commands[name]) == ["--help", *arguments], name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"megabase {megabase.__version__}\n")


def test_help_names_every_section_of_settings() -> None:
    sections = [line.split()[0] for line in HELP_ON_SETTINGS.splitlines() if line.startswith("  ")]
    assert sections == [field.name for field in dataclasses.fields(RunConfig)]


def test_benchmarks() -> None:
    benchmarks = subcommands(subcommands(cli.build_parser(), "command")["bench"], "benchmark")
    assert set(benchmarks) == set(BENCHMARKS)
    for name, arguments in BENCHMARKS.items():
        assert arguments_of(benchmarks[name]) == ["--help", *arguments], name


def test_keys() -> None:
    assert set(KEYS) <= set(dotted(RunConfig()))


def test_settings_are_distinguished_from_files(tmp_path) -> None:
    odd = tmp_path / "lr=1.yaml"
    odd.touch()
    assert split_settings(["a.yaml", str(odd), "optim.lr=1"]) == (["a.yaml", str(odd)], ["optim.lr=1"])
    long = "data.shards=" + "x" * 300  # longer than the name of a file may be
    assert split_settings(["a.yaml", long]) == (["a.yaml"], [long])


def test_signals_are_handled_before_the_heavy_libraries_load() -> None:
    program = (
        "import signal, sys\n"
        "from megabase.pipeline import cli\n"
        "from megabase.pipeline.ranks import stop\n"
        "def listen(self): print('heavy' if 'torch' in sys.modules else 'light'); sys.exit()\n"
        "stop.StopRequest.listen = listen\n"
        "cli.main(['train', 'x=1'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "light", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), *(["bench", name] for name in BENCHMARKS)]
)
def test_help_does_not_need_the_heavy_libraries(command: list[str]) -> None:
    program = (
        "import sys; from megabase.pipeline import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'pytorch_lightning', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "usage: megabase" in done.stdout
