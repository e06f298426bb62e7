"""Reading with a state equals a pass over the whole sequence; what a state costs; how tokens are drawn.

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

from megabase.models import ConfigError, LocalConfig, LSHConfig, Reformer, ReformerConfig, Seeds
from megabase.models.chance import Purpose
from megabase.models.generation import Sampling, State, generate, read, start
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
    max_length=st.just(80),
    positions=st.sampled_from(["rotary", "axial", "learned", "none"]),
    norm=st.sampled_from(["layer", "rms"]),
    conv=st.integers(1, 5),
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


@given(configs, st.integers(1, 3), st.integers(1, 50), st.integers(1, 12))
@settings(max_examples=40, derandomize=True)
def test_reading_in_blocks_equals_one_pass(config, batch, prompt, more):
    model = build(config)
    x = tokens(batch, prompt + more)
    logits, _ = in_blocks(model, x, prompt)
    torch.testing.assert_close(logits, one_pass(model, x)[:, prompt - 1 :], atol=1e-9, rtol=0)


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
    logits, _ = in_blocks(model, x, 20)
    torch.testing.assert_close(logits, one_pass(model, x)[:, 19:], atol=1e-9, rtol=0)


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


def test_the_size_of_a_state_does_not_depend_on_the_prompt():
    model = build(BOUNDED)
    sizes = []
    for length in (1, 9, 500):
        state = start(model, 2)
        read(model, tokens(length=length), state)
        sizes.append(state.nbytes)
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_copied_state_is_a_fork():
    model = build(SMALL)
    x, other = tokens(), tokens(seed=1)
    _, state = in_blocks(model, x[:, :30], 20)
    fork = copy.deepcopy(state)
    for i in range(30, 60):
        read(model, other[:, i : i + 1], fork)
    rest = [read(model, x[:, i : i + 1], state) for i in range(30, 60)]
    torch.testing.assert_close(torch.stack(rest, 1), one_pass(model, x)[:, 30:], atol=1e-9, rtol=0)


def test_reading_uses_no_dropout_and_makes_no_graph():
    model = build(dataclasses.replace(SMALL, dropout=0.5, attention_dropout=0.5)).train()
    x = tokens()
    logits, _ = in_blocks(model, x, 20)
    assert not logits.requires_grad
    torch.testing.assert_close(logits, one_pass(model.eval(), x)[:, 19:], atol=1e-9, rtol=0)


def test_temperature_zero_takes_the_likeliest_token():
    model = build(SMALL)
    prompt = tokens(length=11)
    found = generate(model, prompt, 30, temperature=0.0, seed=4)
    assert found.shape == (2, 30)
    for i in range(30):
        prefix = torch.cat((prompt, found[:, :i]), dim=1)
        assert torch.equal(model(prefix, seeds=Seeds(run=4))[:, -1].argmax(-1), found[:, i])
    assert torch.equal(generate(model, prompt, 30, top_k=1, seed=4), found)


@pytest.mark.slow
def test_generation_is_a_function_of_its_seed_and_continues_from_its_tokens():
    model = build(SMALL)
    prompt = tokens(length=11)
    state = torch.get_rng_state()
    found = generate(model, prompt, 40, seed=4)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(generate(model, prompt, 40, seed=4), found)
    assert not torch.equal(generate(model, prompt, 40, seed=5), found)
    longer = torch.cat((prompt, found[:, :15]), dim=1)
    assert torch.equal(generate(model, longer, 25, seed=4), found[:, 15:])
    assert torch.equal(generate(model, prompt[:1], 40, seed=4), found[:1])
    rows = generate(model, prompt[:1].expand(2, -1), 40, seed=4)
    assert not torch.equal(rows[0], rows[1])


def test_drawing_follows_the_distribution():
    n = 40_000
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -1.0])
    keys = Seeds().keys(Purpose.SAMPLING, 0, n, logits.device)

    def shares(**options) -> Tensor:
        drawn = Sampling(**options).draw(logits.expand(n, 5), keys, 7)
        return torch.bincount(drawn, minlength=5) / n

    def assert_shares(found: Tensor, expected: Tensor) -> None:
        assert (found - expected).abs().max() < 4 * 0.5 * n**-0.5
        assert torch.equal(found > 0, expected > 0)

    assert_shares(shares(), logits.softmax(0))
    assert_shares(shares(temperature=0.5), (logits / 0.5).softmax(0))
    two = torch.tensor([-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf])
    assert_shares(shares(top_k=2), two.softmax(0))
    assert_shares(shares(top_k=100), logits.softmax(0))
    assert_shares(shares(allowed=[1, 3]), two.softmax(0))
    assert_shares(shares(allowed=[4]), torch.tensor([0.0, 0, 0, 0, 1]))
    assert_shares(shares(temperature=1e-320), torch.tensor([0.0, 0, 0, 1, 0]))
    # The positions of one sequence draw independently of each other.
    places = torch.stack([Sampling().draw(logits.expand(99, 5), keys[:99], p) for p in range(200)])
    assert_shares(torch.bincount(places.flatten(), minlength=5) / places.numel(), logits.softmax(0))


def test_generation_draws_allowed_tokens_only_and_repeats_stop():
    model = build(SMALL)
    prompt = tokens(batch=3, length=4)
    found = generate(model, prompt, 50, allowed=[5, 7])
    assert set(found.unique().tolist()) == {5, 7}
    stopped = generate(model, prompt, 50, allowed=[5, 7], stop=7)
    assert stopped.shape[1] == max((row == 7).nonzero()[0].item() for row in found) + 1
    for row, free in zip(stopped, found, strict=True):
        first = (free == 7).nonzero()[0].item()
        assert torch.equal(row[: first + 1], free[: first + 1])
        assert (row[first:] == 7).all()
    assert generate(model, prompt, 0).shape == (3, 0)


def test_logits_that_are_not_finite_are_refused():
    model = build(SMALL)
    with torch.no_grad():
        model.body.norm.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="not finite"):
        generate(model, tokens(length=3), 2)


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


def test_settings_of_lsh_do_not_matter_without_lsh_layers():
    model = build(dataclasses.replace(SMALL, layers=["local"], lsh=LSHConfig(attend="chunk")))
    assert generate(model, tokens(length=3), 2).shape == (2, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, state: read(model, tokens(batch=3, length=1), state), r"\(batch, n\)"),
        (lambda model, state: read(model, tokens()[0], state), r"\(batch, n\)"),
        (lambda model, state: read(model, tokens(length=0), state), "at least 1"),
        (lambda model, state: read(model, tokens(length=65), state), "max_length=64"),
        (lambda model, state: generate(model, tokens(length=60), 10), "max_length=64"),
        (lambda model, state: generate(model, tokens(), 3, temperature=-1.0), "temperature=-1.0"),
        (lambda model, state: generate(model, tokens(), 3, top_k=0), "top_k=0"),
        (lambda model, state: generate(model, tokens(), -3), "length=-3"),
        (lambda model, state: generate(model, tokens(), 3, allowed=[]), "allowed"),
        (lambda model, state: generate(model, tokens(), 3, allowed=[9]), "from 0 to 8"),
        (lambda model, state: start(model, 2, source=tokens()), "reads no source"),
    ],
)
def test_arguments_that_cannot_work_are_refused(call, message):
    model = build(dataclasses.replace(SMALL, positions="learned", max_length=64))
    with pytest.raises(ValueError, match=message):
        call(model, start(model, 2))
