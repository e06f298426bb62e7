"""Loading a config: merging, round trip, and every kind of bad input."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabase.datamodules.config import accumulation
from megabase.datamodules.errors import DataError
from megabase.models.config import ConfigError
from megabase.pipeline.config.load import load, save
from megabase.pipeline.errors import UserError
from megabase.pipeline.slurm.script import settings_of
from megabase.pipeline.slurm.submit import call_for

MINIMAL = ["run.name=x", "data.shards=s"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_merge_left_to_right_and_arguments_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "run: {name: a}\ndata: {shards: s, length: 1024}\noptim: {lr: 0.1}\n")
    second = write(tmp_path / "b.yaml", "data: {length: 2048}\nmodel: {layers: [lsh]}\n")
    merged = load([first, second], ["data.length=4096"])
    assert (merged.run.name, merged.data.length, merged.optim.lr, merged.model.layers) == (
        "a",
        4096,
        0.1,
        ["lsh"],
    )


@pytest.mark.slow
@given(
    lr=st.floats(1e-8, 1.0),
    steps=st.integers(1, 10**7),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
)
def test_saved_config_loads_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory, lr: float, steps: int, name: str
) -> None:
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    original = load([], [*MINIMAL, f"optim.lr={lr!r}", f"trainer.max_steps={steps}"])
    original.run.name = name
    save(original, path)
    assert load([path]) == original


def test_unknown_key_names_the_closest_one_and_its_place(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.yaml", "data: {lenght: 5}\n")
    with pytest.raises(
        UserError, match=r"bad\.yaml: unknown key 'data\.lenght'; did you mean 'data\.length'\?"
    ):
        load([bad], MINIMAL)
    with pytest.raises(
        UserError, match=r"unknown key 'model\.lsh\.round'; did you mean 'model\.lsh\.rounds'\?"
    ):
        load([], [*MINIMAL, "model.lsh.round=2"])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.max_steps=soon", r"trainer\.max_steps.*'soon'.*[Ii]nteger"),
        ("trainer.max_steps=0", r"trainer\.max_steps=0: must be above zero"),
        ("zero.stage=4", r"zero\.stage=4"),
        ("trainer.max_minutes=-1", r"trainer\.max_minutes=-1\.0: must not be negative"),
        (
            "trainer.hang_minutes=-1",
            r"trainer\.hang_minutes=-1\.0: must not be negative \(0 switches it off\)",
        ),
        ("tracking.system_seconds=-1", r"tracking\.system_seconds=-1\.0: must not be negative"),
        ("checkpoint.every_minutes=-1", r"checkpoint\.every_minutes=-1\.0: must not be negative"),
        ("trainer.precision=fp8", r"trainer\.precision='fp8': choose one of"),
        ("run.name=a/b", r"run\.name='a/b'"),
        ("model.heads=3", r"model\.dim=256 is not a multiple of model\.heads=3"),
        ("model.layers=[lhs]", r"model\.layers='lhs' is unknown: did you mean 'lsh'"),
        (
            "model.causal=false",
            r"data\.objective=causal .* set model\.causal=true, or data\.objective=masked",
        ),
        ("data.objective=masked", r"masked bases .* set model\.causal=false, or data\.objective=causal"),
        ("data.objective=mlm", r"data\.objective 'mlm': choose causal or masked"),
        ("data.mask_rate=2", r"data\.mask_rate 2\.0"),
        ("model.layers=local", r"model\.layers: must be a list, such as 'model\.layers=\[a,b\]'"),
        ("optim.beta1=7", r"optim\.beta1=7\.0: must be at least 0 and below 1"),
        ("optim.min_lr=5", r"optim\.min_lr=5\.0: it is a fraction"),
        ("zzzz.q=1", r"unknown key 'zzzz\.q'; the sections are run, model, data"),
        ("lr=1e-3", r"argument 'lr=1e-3': unknown key 'lr'; did you mean 'optim\.lr'\?"),
        ("optm.lr=1", r"unknown key 'optm\.lr'; did you mean 'optim\.lr'\?"),
        ("model=big", r"model is a section of settings, not one value: write model\.NAME=VALUE"),
        ("model.lsh=4", r"model\.lsh is a section of settings, not one value: write model\.lsh\.NAME=VALUE"),
        (
            "data.mixture=5",
            r"data\.mixture: must hold names and values, such as 'data\.mixture=\{NAME: VALUE\}'",
        ),
        ("optim=", r"optim is a section of settings"),
        ("nonsense", r"'nonsense' is neither a config file nor KEY=VALUE"),
        ("optim.lr=[", r"optim\.lr=\["),
    ],
)
def test_bad_argument_is_one_clear_line(argument: str, message: str) -> None:
    with pytest.raises((UserError, ConfigError, DataError), match=message) as caught:
        load([], [*MINIMAL, argument])
    assert "\n" not in str(caught.value)


def test_missing_file_bad_yaml_and_missing_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load([tmp_path / "none.yaml"], MINIMAL)
    with pytest.raises(
        UserError, match=r"data\.length is a setting, not a config file: write data\.length=VALUE"
    ):
        load(["data.length"], MINIMAL)
    with pytest.raises(UserError, match=r"empty\.yaml: slurm is a section of settings, not one value"):
        load([write(tmp_path / "empty.yaml", "slurm:\n")], MINIMAL)
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load([write(tmp_path / "torn.yaml", "a: [1, 2\n")], MINIMAL)
    with pytest.raises(UserError, match="must hold keys and values"):
        load([write(tmp_path / "list.yaml", "- 1\n")], MINIMAL)
    with pytest.raises(UserError, match=r"data\.shards is missing.*data\.shards=VALUE"):
        load([], ["run.name=x"])


def test_a_model_that_reads_both_sides_is_not_for_mlflow() -> None:
    masked = ["data.objective=masked", "model.causal=false"]
    load([], [*MINIMAL, *masked]).validate()
    for wanted in ("tracking.log_model=true", "tracking.register=genome"):
        with pytest.raises(UserError, match=r"data\.objective=masked cannot: set tracking\.log_model=false"):
            load([], [*MINIMAL, *masked, wanted]).validate()


ROOT = Path(__file__).parents[3]


EXPERIMENTS = ["demo", "genome-8k", "human-131k", "human-1m", "text-64k"]


@pytest.mark.parametrize("names", [*([name] for name in EXPERIMENTS), ["demo", "ecoli"]], ids="+".join)
def test_the_experiments_in_configs_fit_their_ranks(names: list[str]) -> None:
    loaded = load(config_files(names), ["run.name=x", "data.shards=s"])
    loaded.validate()
    devices = loaded.trainer.devices
    assert devices is not None
    accumulation(loaded.data.global_batch, loaded.data.micro_batch, loaded.trainer.nodes * devices)


def test_every_experiment_is_tested() -> None:
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == {*EXPERIMENTS, "ecoli"}


@pytest.mark.parametrize(
    "cluster", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_cluster_fits_the_experiments(cluster: Path) -> None:
    experiments = ["demo"] if cluster.stem == "cpu" else ["genome-8k", "human-131k", "human-1m", "text-64k"]
    for name in experiments:
        loaded = load([*config_files([name]), cluster], ["run.name=x", "data.shards=s"])
        loaded.validate()
        _, ranks = call_for(loaded, Path("/home/me"))
        accumulation(loaded.data.global_batch, loaded.data.micro_batch, ranks)
        settings_of(loaded, Path("/home/me"))


def config_files(names: list[str]) -> list[Path]:
    return [ROOT / "configs" / f"{name}.yaml" for name in names]
