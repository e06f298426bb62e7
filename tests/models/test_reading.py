"""Reading in blocks of any size equals a pass over the whole sequence; what a state costs; forks.

Comparisons are in fp64. There the two ways differ by less than one unit of the streams. So the logits agree to the last
digits if every query attends to the same keys, and differ visibly if one key is missing or added.
"""

import copy
import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megabase.models import ConfigError, LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds, reading
from megabase.models.attention import lsh, lsh_cache
from megabase.models.call import Call
from megabase.models.generation import State, read, read_block, start
from megabase.models.reading import near_borders
from tests.quick import slow

SMALL = ReformerConfig(
    vocab_size=9,
    dim=16,
    depth=3,
    heads=2,
    layers=["local", "lsh", "full"],
    lsh=LSHConfig(rounds=2, chunk_length=5, n_buckets=4),
    local=LocalConfig(window=6),
)
BOUNDED = dataclasses.replace(SMALL, layers=["local", "lsh", "performer"])
SEEDS = Seeds(run=3, step=17)


def tokens(batch: int = 2, length: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(5, 9, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(config: ReformerConfig, dtype: torch.dtype = torch.float64) -> Reformer:
    torch.manual_seed(0)
    return Reformer(config).to(dtype).eval()


@torch.no_grad()
def one_pass(model: Reformer, x: Tensor) -> Tensor:
    return model(x, seeds=SEEDS)


def in_blocks(model: Reformer, x: Tensor, prompt: int) -> tuple[Tensor, State]:
    """Logits (batch, length − prompt + 1, vocab) after the prompt and after every token that follows."""
    state = start(model, x.shape[0], seeds=SEEDS)
    blocks = [x[:, :prompt], *x[:, prompt:].split(1, dim=1)]
    return torch.stack([read(model, block, state) for block in blocks], dim=1), state


configs = st.builds(
    ReformerConfig,
    vocab_size=st.just(9),
    dim=st.sampled_from([8, 12]),
    depth=st.integers(1, 3),
    heads=st.sampled_from([1, 2]),
    layers=st.lists(st.sampled_from(["local", "lsh", "full", "performer"]), min_size=1, max_size=3),
    max_length=st.just(200),
    positions=st.sampled_from(["rotary", "axial", "learned", "none"]),
    norm=st.sampled_from(["layer", "rms"]),
    conv=st.sampled_from([0, 1, 5]),
    values_ahead=st.sampled_from([None, False]),
    head_bias=st.booleans(),
    tie_embeddings=st.booleans(),
    lsh=st.builds(
        LSHConfig,
        rounds=st.integers(1, 4),
        chunk_length=st.integers(1, 9),
        n_buckets=st.sampled_from([2, 6]),
        duplicates=st.sampled_from(["average", "once"]),
    ),
    local=st.builds(LocalConfig, window=st.integers(1, 9), attend=st.sampled_from(["window", "chunk"])),
)


def in_parts(
    model: Reformer, x: Tensor, sizes: list[int], state: State | None = None
) -> tuple[Tensor, State]:
    """Log-probabilities (batch, length, vocab) of every token in each place, read in blocks of these sizes."""
    state = start(model, x.shape[0], seeds=SEEDS) if state is None else state
    blocks = [read_block(model, part, state, every_token=True) for part in x.split(sizes, dim=1)]
    return torch.cat([block.every_token for block in blocks], dim=1), state


def assert_one_pass(found: Tensor, model: Reformer, x: Tensor, atol: float = 1e-9) -> None:
    """The log-probabilities found are those of one pass; the first token has none."""
    assert found[:, 0].isnan().all()
    expected = one_pass(model, x).double().log_softmax(-1)[:, :-1]
    torch.testing.assert_close(found[:, 1:].double(), expected, atol=atol, rtol=0)


@given(
    configs,
    st.integers(1, 3),
    st.lists(st.sampled_from([1, 2, 7, 19, 40]), min_size=1, max_size=5),
    st.booleans(),
)
@settings(max_examples=30, derandomize=True)
def test_any_partition_equals_one_pass(config, batch, sizes, removing):
    """With removals of entries that are too old, and with small blocks in the kernels; or with neither."""
    model = build(config)
    x = tokens(batch, sum(sizes))
    with pytest.MonkeyPatch.context() as patch:
        if removing:
            patch.setattr(lsh_cache, "SPARE", 3)
            patch.setattr(lsh, "FEWEST", 2)
        found, _ = in_parts(model, x, sizes)
    assert_one_pass(found, model, x)


def test_the_native_kernel_reads_in_blocks():
    """In fp32, where it runs if there is a compiler: long enough for several strips, with removals."""
    model = build(
        dataclasses.replace(SMALL, layers=["local", "lsh"], lsh=LSHConfig(2, 9, 6, duplicates="once")),
        torch.float32,
    )
    x = tokens(length=1501)
    sizes = [700, 1, 30, 400, 370]
    found, state = in_parts(model, x, sizes)
    assert_one_pass(found, model, x, atol=1e-4)
    assert state.caches[2].layer.used < 700  # entries were removed


def test_a_block_has_the_log_probabilities_and_hidden_states_that_were_asked_for():
    model = build(SMALL)
    x = tokens()
    state = start(model, 2, seeds=SEEDS)
    blocks = [read_block(model, part, state, layers=[0, 3]) for part in x.split([33, 27], dim=1)]
    every, _ = in_parts(model, x, [60])
    assert all(block.every_token is None for block in blocks)
    found = torch.cat([block.log_probs for block in blocks], dim=1)
    assert found[:, 0].isnan().all()
    torch.testing.assert_close(
        found[:, 1:], every.gather(2, x[..., None]).squeeze(2)[:, 1:], atol=1e-9, rtol=0
    )
    with torch.no_grad():
        body = model.body(x, seeds=SEEDS)
    torch.testing.assert_close(
        torch.cat([block.hidden[3] for block in blocks], dim=1), body, atol=1e-9, rtol=0
    )
    first = torch.cat([block.hidden[0] for block in blocks], dim=1)
    assert first.dtype == torch.float32
    assert first.shape == body.shape
    assert not torch.equal(first, body.float())
    # The stack without its other blocks.
    model.body.stack.blocks = model.body.stack.blocks[:1]
    with torch.no_grad():
        alone = model.body.stack(model.body.embedding(x, Call(SEEDS)), Call(SEEDS))
    torch.testing.assert_close(first, alone, atol=1e-6, rtol=0)


def test_log_probabilities_of_a_block_do_not_need_all_logits(monkeypatch):
    model = build(dataclasses.replace(SMALL, loss_chunk=7))
    x, sizes = tokens(), []
    computed = model.head.log_probs
    monkeypatch.setattr(model.head, "log_probs", lambda hidden: sizes.append(len(hidden)) or computed(hidden))
    read_block(model, x, start(model, 2, seeds=SEEDS))
    assert max(sizes) == 7
    assert sum(sizes) == 2 * 59


@pytest.mark.parametrize("prompt", [slow(1), 31, slow(97)])
@pytest.mark.parametrize("residual", ["fixed", slow("float")])
@pytest.mark.parametrize(
    ("layers", "duplicates"),
    [
        *(([kind], "once") for kind in ("local", "full", "performer")),  # `duplicates` is of LSH layers only
        *itertools.product([["lsh"], ["local", "lsh", "full"]], ["average", "once"]),
    ],
)
def test_fp32_differs_by_1e_5_at_most(layers, residual, duplicates, prompt):
    lsh = LSHConfig(rounds=4, chunk_length=5, n_buckets=4, duplicates=duplicates)
    model = build(dataclasses.replace(SMALL, layers=layers, lsh=lsh, residual=residual), torch.float32)
    x = tokens(length=101)
    logits, _ = in_blocks(model, x, prompt)
    torch.testing.assert_close(logits, one_pass(model, x)[:, prompt - 1 :], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_reading_in_blocks_with_factored_buckets_and_no_convolution():
    lsh = LSHConfig(rounds=2, chunk_length=3, n_buckets=300)
    model = build(dataclasses.replace(SMALL, conv=0, lsh=lsh))
    x = tokens()
    assert_one_pass(in_parts(model, x, [20, 1, 20, 19])[0], model, x)


def test_reading_a_prompt_longer_than_the_kernels_chunks():
    model = build(dataclasses.replace(SMALL, layers=["performer", "lsh", "local"]))
    x = tokens(length=310)
    logits, _ = in_blocks(model, x, 300)
    torch.testing.assert_close(logits, one_pass(model, x)[:, 299:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_bf16_differs_by_its_rounding(precision):
    model = build(SMALL, torch.bfloat16 if precision == "bf16" else torch.float32)
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits, _ = in_blocks(model, x, 20)
        expected = one_pass(model, x)[:, 19:]
    assert (logits - expected).abs().median() < 2e-3


class Work(TorchDispatchMode):
    """Counts operations and the elements they return."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.elements += sum(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
        return out


def work_at(model: Reformer, positions: list[int]) -> list[tuple[int, int, int, int]]:
    """FLOPs, operations, elements that these return, and bytes of the state, for a token at each of `positions`."""
    from torch.utils.flop_counter import FlopCounterMode

    model.requires_grad_(False)
    x, state, found = tokens(length=max(positions) + 1), start(model, 2), []
    for i in range(x.shape[1]):
        if i not in positions:
            read(model, x[:, i : i + 1], state)
            continue
        fork = copy.deepcopy(state)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            read(model, x[:, i : i + 1], fork)
        with Work() as work:
            read(model, x[:, i : i + 1], state)
        found.append((flops.get_total_flops(), work.operations, work.elements, state.nbytes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["rotary", "axial", "learned"])
def test_a_token_costs_the_same_at_any_position(positions):
    model = build(dataclasses.replace(BOUNDED, positions=positions, max_length=1000), torch.float32)
    first, *others = work_at(model, [1, 9, 10, 300])
    assert all(other == first for other in others)
    assert all(number > 0 for number in first)


def test_tokens_that_do_not_fit_leave_the_state_as_it_was():
    model = build(dataclasses.replace(SMALL, max_length=64, positions="learned"))
    x = tokens(length=70)
    state = start(model, 2, seeds=SEEDS)
    read(model, x[:, :60], state)
    with pytest.raises(ConfigError, match="max_length=64"):
        read(model, x[:, 60:], state)
    logits = read(model, x[:, 60:64], state)
    torch.testing.assert_close(logits, one_pass(model, x[:, :64])[:, -1], atol=1e-9, rtol=0)


def test_full_layers_make_a_state_grow():
    model = build(dataclasses.replace(SMALL, layers=["full"], depth=1))
    (_, _, _, before), (_, _, _, after) = work_at(model, [10, 30])
    assert after - before == 20 * 2 * 2 * 16 * 8  # positions · keys and values · batch · width · bytes


def test_the_size_of_a_state_has_a_bound():
    model = build(BOUNDED)
    layer = BOUNDED.lsh
    state, lengths, sizes = start(model, 2), (1, 600, 2000, 3000), []
    for length in lengths:
        read_block(model, tokens(length=length), state)
        most = layer.rounds * layer.n_buckets * layer.chunk_length
        assert state.caches[2].layer.used <= most + lsh_cache.SPARE
        sizes.append(state.nbytes)
    assert max(sizes[2:]) <= max(sizes[:2])


@pytest.mark.parametrize("layers", [["local", "lsh", "full"], ["performer", "lsh"]])
def test_forks_are_separate_passes_and_leave_the_state_as_it_was(layers):
    model = build(dataclasses.replace(SMALL, layers=layers))
    x, others = tokens(length=70), tokens(batch=3, length=30, seed=1)
    _, state = in_parts(model, x[:, :40], [30, 9, 1])
    fork = state.fork([1, 0, 1])
    of_fork, _ = in_parts(model, others, [1, 20, 9], fork)
    again = fork.fork(torch.tensor([2]))
    assert (fork.batch, again.batch, fork.position, state.position) == (3, 1, 70, 40)
    rest, _ = in_parts(model, x[:, 40:], [1, 25, 4], state)
    whole = torch.cat((x[[1, 0, 1], :40], others), dim=1)
    expected = one_pass(model, whole).log_softmax(-1)
    torch.testing.assert_close(of_fork, expected[:, 39:-1], atol=1e-9, rtol=0)
    torch.testing.assert_close(rest, one_pass(model, x).log_softmax(-1)[:, 39:-1], atol=1e-9, rtol=0)
    more, _ = in_parts(model, others[:1], [30], again)
    longer = torch.cat((x[1:, :40], others[2:], others[:1]), dim=1)
    torch.testing.assert_close(more, one_pass(model, longer).log_softmax(-1)[:, 69:-1], atol=1e-9, rtol=0)


def test_a_deep_copy_is_a_fork():
    model = build(SMALL)
    x, other = tokens(), tokens(seed=1)
    _, state = in_blocks(model, x[:, :30], 20)
    fork = copy.deepcopy(state)
    in_parts(model, other, [1, 59], fork)
    rest = [read(model, x[:, i : i + 1], state) for i in range(30, 60)]
    torch.testing.assert_close(torch.stack(rest, 1), one_pass(model, x)[:, 30:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("buckets", [2, 6, 300])
def test_query_keys_near_a_border_are_counted(buckets):
    """Moving a query-key by less than its distance never changes its bucket; by a bit more it can."""
    x = torch.randn(2, 2, 50, 8, generator=torch.Generator().manual_seed(0))
    rotations = lsh.draw_rotations(2, 8, rounds=3, n_buckets=buckets, seed=5, device=x.device)
    distances = lsh.border_distances(x, rotations)
    before = lsh.rotate_and_hash(x, rotations)
    assert distances.shape == before.shape
    changed = []
    for step in (1e-4, 1e-2):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        noise *= step * x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        moved = lsh.rotate_and_hash(x + noise, rotations) != before
        # |noise · (column − other column)| is at most step · |x| · 2 · the longest column.
        longest = rotations.table.float().norm(dim=2).max()
        assert not (moved & (distances > 2 * step * longest / 8**0.5)).any()
        changed.append(int(moved.sum()))
    assert 0 <= changed[0] < changed[1]


def test_near_borders_reports_each_lsh_layer():
    model = build(dataclasses.replace(SMALL, layers=["lsh", "local"]), torch.float32)
    x = tokens()
    found = near_borders(model, x, seeds=SEEDS, tolerance=1e-2, block=31)
    assert found.hashed == 2 * 2 * 60 * 2 * 2  # layers · batch · tokens · heads · rounds
    assert set(found.near) == {0, 2}
    assert 0 < sum(found.near.values()) < found.hashed
    whole = near_borders(model, x, seeds=SEEDS, tolerance=1e-2)
    assert abs(sum(whole.near.values()) - sum(found.near.values())) <= 2
    everything = near_borders(model, x, seeds=SEEDS, tolerance=100.0)
    assert sum(everything.near.values()) == found.hashed
    assert not any(layer.attention.query_key._forward_hooks for layer in lsh_branches(model))


def lsh_branches(model: Reformer) -> list:
    return [
        branch
        for branch in model.body.stack.branches
        if hasattr(getattr(branch, "attention", None), "query_key")
    ]


def test_reading_uses_no_dropout_and_makes_no_graph():
    model = build(dataclasses.replace(SMALL, dropout=0.5, attention_dropout=0.5)).train()
    x = tokens()
    logits, _ = in_blocks(model, x, 20)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, one_pass(model.eval(), x)[:, 19:], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": False}, "causal=False"),
        ({"lsh": LSHConfig(attend="chunk")}, r"lsh\.attend=chunk"),
        ({"layers": ["linformer"], "max_length": 64, "causal": False}, "'linformer', which cannot"),
    ],
)
def test_models_that_cannot_generate_are_refused(change, message):
    model = Reformer(dataclasses.replace(SMALL, **change))
    with pytest.raises(ConfigError, match=message) as error:
        start(model, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, state: read(model, tokens(batch=3, length=1), state), r"\(batch, n\)"),
        (lambda model, state: read_block(model, tokens(batch=3, length=1), state), "batch of 2"),
        (lambda model, state: read_block(model, tokens()[0], state), r"\(batch, n\)"),
        (lambda model, state: read_block(model, tokens(length=0), state), "at least 1"),
        (lambda model, state: read_block(model, tokens(length=65), state), "max_length=64"),
        (
            lambda model, state: read_block(model, tokens(length=3), state, layers=[0, 4]),
            r"layers=\[4\].* 0 to 3",
        ),
        (lambda model, state: start(model, 2, source=tokens()), "reads no source"),
        (lambda model, state: state.fork([0, 2]), r"fork\(\[0, 2\]\).*from 0 to 1"),
        (lambda model, state: state.fork([]), "from 0 to 1"),
        (lambda model, state: state.fork([-1]), "from 0 to 1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(call, message):
    model = build(dataclasses.replace(SMALL, positions="learned", max_length=64))
    state = start(model, 2)
    with pytest.raises(ValueError, match=message):
        call(model, state)
    assert state.position == 0


def test_models_with_full_layers_are_read_up_to_a_length(monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_WITH_FULL_LAYERS", 50)
    model = build(SMALL)
    state = start(model, 2)
    read_block(model, tokens(length=50), state)
    with pytest.raises(ConfigError, match=r"at most 50 tokens.* 51 are"):
        read_block(model, tokens(length=1), state)
    bounded = build(BOUNDED)
    read_block(bounded, tokens(length=51), start(bounded, 2))
