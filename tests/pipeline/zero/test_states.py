"""Weights and states read from sharded files are the ranks' own, bit for bit; no code in the files is executed."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megabase.pipeline.checkpoint.manifest import Manifest
from megabase.pipeline.errors import RunError
from tests.pipeline.shards import open_shards
from tests.processes import run_ranks

RANKS = 3
WHATS = ("fp32", "exp_avg", "exp_avg_sq")
# Stage, precision, and further keys of `zero_optimization` that change the layout of states.
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    **{f"{stage}-{precision}": (stage, precision, {}) for stage in range(4) for precision in ("32", "bf16")},
    "1-aligned": (1, "bf16", {"parameter_alignment": True}),
    "2-elastic": (2, "32", {"elastic_checkpoint": True}),
    "2-round-robin": (2, "32", {"round_robin_gradients": True}),
    "3-subgroups": (3, "32", {"sub_group_size": 30}),
}


class Odd(nn.Module):
    """A model with a tied weight and with sizes that RANKS does not divide, one of them smaller than RANKS."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 5)
        self.middle = nn.Linear(5, 11)
        self.back = nn.Linear(11, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.back(self.middle(self.words(tokens)).tanh()) * self.scale)
        return nn.functional.cross_entropy(logits.float(), tokens.roll(1, 0))


def groups_of(model: nn.Module) -> list[list[str]]:
    """Names of matrices and of vectors, as PretrainModule's optimizer has them."""
    named = list(model.named_parameters())
    return [[n for n, p in named if p.dim() >= 2], [n for n, p in named if p.dim() < 2]]


def write_manifest(checkpoint: Path, stage: int, ranks: int, precision: str = "32") -> None:
    manifest = Manifest(
        step=2, samples=4, ranks=ranks, stage=stage, precision=precision, config={}, data="", versions={}
    )
    (checkpoint / "megabase.json").write_text(manifest.sealed())


def train_and_save(checkpoint: Path, stage: int, precision: str, more: dict[str, Any]) -> dict[str, Any]:
    """On each rank, train two steps under DeepSpeed and write a checkpoint; returns the engine's states."""
    import deepspeed

    torch.manual_seed(5)
    model = Odd()
    groups = groups_of(model)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [named[n] for n in names], "weight_decay": 0.1 * i} for i, names in enumerate(groups)],
        lr=0.01,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20, **more},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **({"bf16": {"enabled": True}} if precision == "bf16" else {}),
        },
        dist_init_required=False,
    )
    for step in range(2):
        engine.backward(engine(torch.arange(6) if step else torch.tensor([1, 3, 3, 6])))
        engine.step()
    engine.save_checkpoint(str(checkpoint), tag="checkpoint", client_state={"parameters": groups})
    held: dict[str, Any] = {}
    if stage in (1, 2):
        # DeepSpeed (0.19.8) shows the states of the first group only, unless it links them again.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    flat = itertools.chain(*getattr(engine.optimizer, "fp32_groups", []))
    for name in itertools.chain(*groups):
        parameter = named[name]
        if stage:
            held[name] = {"fp32": deepspeed.utils.safe_get_full_fp32_param(parameter)}
            for what in WHATS[1:]:
                held[name][what] = deepspeed.utils.safe_get_full_optimizer_state(parameter, what)
        else:
            weight = parameter if precision == "32" else next(flat)
            held[name] = {"fp32": weight, **optimizer.state[weight]}
        held[name] = {what: held[name][what].detach().clone() for what in WHATS}
    return held


def main(output: str) -> None:
    """One of RANKS processes: all cases."""
    from megabase.pipeline.ranks import rendezvous
    from megabase.pipeline.zero import strategy

    rendezvous.start()
    strategy.start_deepspeed()
    for name, (stage, precision, more) in CASES.items():
        checkpoint = Path(output) / name / "step-2"
        held = train_and_save(checkpoint, stage, precision, more)
        if torch.distributed.get_rank() == 0:
            write_manifest(checkpoint, stage, RANKS, precision)
            torch.save(held, Path(output) / name / "held.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case the checkpoint that RANKS processes wrote, and `held.pt`."""
    output = tmp_path_factory.mktemp("shards")
    code, printed = run_ranks(RANKS, main, str(output))
    assert code == 0, printed
    return output


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_reads_what_the_engine_held(saved: Path, case: str) -> None:
    held: dict[str, dict[str, Tensor]] = torch.load(saved / case / "held.pt")
    shards = open_shards(saved / case / "step-2")
    assert set(shards.names) == set(held)
    assert shards.shared == {"head.weight": "words.weight"}
    assert shards.shapes == {name: held[name]["fp32"].shape for name in shards.names}
    # DeepSpeed steps once more when it wraps an optimizer for 16 bits without ZeRO.
    assert shards.optimizer_step == (3 if case == "0-bf16" else 2)
    assert shards.client["global_steps"] == 2
    for name, what in itertools.product(shards.names, WHATS):
        read = shards.read(name, what)
        assert read.dtype == torch.float32
        assert torch.equal(read.view(shards.shapes[name]), held[name][what]), (name, what)
    assert torch.equal(shards.read("head.weight"), shards.read("words.weight"))

    @given(st.data())
    def slices_are_slices(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(shards.names))
        what = data.draw(st.sampled_from(WHATS))
        size = shards.shapes[name].numel()
        start = data.draw(st.integers(0, size))
        stop = data.draw(st.integers(start, size))
        assert torch.equal(shards.read(name, what, start, stop), held[name][what].reshape(-1)[start:stop])

    slices_are_slices()


def write_sharded(checkpoint: Path, stage: int, ranks: int, groups: list[dict[str, Tensor]]) -> None:
    """Write vectors to files as DeepSpeed lays them out; exp_avg is minus the weight, exp_avg_sq its square."""
    folder = checkpoint / "checkpoint"
    folder.mkdir(parents=True)
    vectors: list[list[Tensor]] = [[] for _ in range(ranks)]
    for group in groups:
        if stage == 3:
            parts = [torch.zeros(ranks, -(-t.numel() // ranks)) for t in group.values()]
            for part, tensor in zip(parts, group.values(), strict=True):
                part.view(-1)[: tensor.numel()] = tensor.reshape(-1)
            whole = torch.cat(parts, dim=1)
        else:
            long = torch.cat([tensor.reshape(-1) for tensor in group.values()])
            whole = torch.zeros(ranks, -(-long.numel() // (2 * ranks)) * 2)
            whole.view(-1)[: long.numel()] = long
        for rank in range(ranks):
            vectors[rank].append(whole[rank].clone())
    shapes = [{name: tensor.shape for name, tensor in group.items()} for group in groups]
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save({"param_shapes": shapes, "shared_params": {}}, folder / f"{prefix}mp_rank_00_model_states.pt")
    for rank, own in enumerate(vectors):
        states = {i: {"step": 2, "exp_avg": -v, "exp_avg_sq": v * v} for i, v in enumerate(own)}
        content: dict[str, Any] = {"zero_stage": stage, "partition_count": ranks}
        if stage == 3:
            content |= {"fp32_flat_groups": own, "optimizer_state_dict": {"state": states}}
        else:
            content |= {"single_partition_of_fp32_groups": own, "base_optimizer_state": {"state": states}}
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, path)
    write_manifest(checkpoint, stage, ranks)


@settings(max_examples=40)
@given(
    stage=st.integers(1, 3),
    ranks=st.integers(1, 5),
    sizes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=2),
)
def test_every_parameter_comes_back(
    tmp_path_factory: pytest.TempPathFactory, stage: int, ranks: int, sizes: list[list[int]]
) -> None:
    groups = [
        {f"{i}.{j}": torch.randn(size) for j, size in enumerate(group)} for i, group in enumerate(sizes)
    ]
    checkpoint = tmp_path_factory.mktemp("synthetic") / "step-2"
    write_sharded(checkpoint, stage, ranks, groups)
    shards = open_shards(checkpoint)
    expected = {name: tensor for group in groups for name, tensor in group.items()}
    assert shards.names == tuple(expected)
    for name, tensor in expected.items():
        assert torch.equal(shards.read(name), tensor)
        assert torch.equal(shards.read(name, "exp_avg"), -tensor)
        assert torch.equal(shards.read(name, "exp_avg_sq"), tensor * tensor)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two parameters, of two ranks in stage 2."""
    path = tmp_path / "step-2"
    write_sharded(path, 2, 2, [{"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0)}])
    return path


def shard(checkpoint: Path, rank: int) -> Path:
    return checkpoint / "checkpoint" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def test_a_file_is_opened_when_it_is_needed(checkpoint: Path) -> None:
    shard(checkpoint, 1).unlink()
    shards = open_shards(checkpoint)
    # Rank 0 has the first half: 17 elements, padded to 20.
    assert shards.read("a", "fp32", 2, 10).tolist() == list(range(2, 10))
    with pytest.raises(RunError, match=r"zero_pp_rank_1_.*No such file.*take another checkpoint"):
        shards.read("a", "fp32", 2, 11)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 13)])
def test_elements_that_do_not_exist(checkpoint: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match="of a, which has 12"):
        open_shards(checkpoint).read("a", "fp32", start, stop)


def test_before_the_first_step(checkpoint: Path) -> None:
    for rank in (0, 1):
        content = torch.load(shard(checkpoint, rank))
        content["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}
        torch.save(content, shard(checkpoint, rank))
    shards = open_shards(checkpoint)
    assert shards.optimizer_step == 0
    assert shards.read("b").tolist() == list(range(5))
    with pytest.raises(RunError, match=r"zero_pp_rank_0_.* lacks 0"):
        shards.read("a", "exp_avg")


class Bomb:
    """Unpickled without care, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_cannot_run_code(checkpoint: Path, tmp_path: Path, rank: int) -> None:
    mark = tmp_path / "executed"
    content = torch.load(shard(checkpoint, rank))
    content["optimizer_state_dict"]["loss_scaler"] = Bomb(mark)
    torch.save(content, shard(checkpoint, rank))
    with pytest.raises(RunError, match=rf"zero_pp_rank_{rank}_.* holds more than weights"):
        open_shards(checkpoint).read("b")
    assert not mark.exists()
    torch.load(shard(checkpoint, rank), weights_only=False)
    assert mark.exists()  # the file does run code if it is loaded without `weights_only`


def damage_truncated(checkpoint: Path) -> None:
    path = shard(checkpoint, 0)
    path.write_bytes(path.read_bytes()[:-200])


def damage_empty(checkpoint: Path) -> None:
    shard(checkpoint, 0).write_bytes(b"")


def damage_other_ranks(checkpoint: Path) -> None:
    write_manifest(checkpoint, 2, 3)


def damage_other_stage(checkpoint: Path) -> None:
    write_manifest(checkpoint, 1, 2)


def damage_no_states(checkpoint: Path) -> None:
    content = torch.load(shard(checkpoint, 0))
    del content["optimizer_state_dict"]["base_optimizer_state"]
    torch.save(content, shard(checkpoint, 0))


def damage_a_list(checkpoint: Path) -> None:
    torch.save([1], shard(checkpoint, 0))


def damage_short(checkpoint: Path) -> None:
    content = torch.load(shard(checkpoint, 1))
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0] = torch.zeros(4)
    torch.save(content, shard(checkpoint, 1))


def damage_no_names(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "checkpoint")
    (checkpoint / "checkpoint").mkdir()
    torch.save({"module": {}}, checkpoint / "checkpoint" / "mp_rank_00_model_states.pt")
    write_manifest(checkpoint, 0, 2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, r"zero_pp_rank_0_.*cannot be read"),
        (damage_empty, r"zero_pp_rank_0_.*cannot be read"),
        (
            damage_other_ranks,
            r"zero_pp_rank_0_.* is of 2 ranks in stage 2, but its manifest says 3 in stage 2",
        ),
        (
            damage_other_stage,
            r"zero_pp_rank_0_.* is of 2 ranks in stage 2, but its manifest says 2 in stage 1",
        ),
        (damage_no_states, r"zero_pp_rank_0_.*lacks 'base_optimizer_state'"),
        (damage_a_list, r"zero_pp_rank_0_.* holds no checkpoint"),
        (damage_short, r"zero_pp_rank_1_.* has 4 elements of fp32 where b needs 7"),
        (damage_no_names, r"mp_rank_00_model_states.pt lacks 'parameters'"),
    ],
)
def test_damage_names_the_file(checkpoint: Path, damage: Any, message: str) -> None:
    damage(checkpoint)
    with pytest.raises(RunError, match=message):
        open_shards(checkpoint).read("b")
