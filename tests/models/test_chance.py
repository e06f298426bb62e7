"""Chance is a function of (run, step, layer, purpose, sample)."""

import itertools

import pytest
import torch

from megabase.models import Seeds
from megabase.models.chance import (
    GOLDEN,
    Purpose,
    _bits_of_places,
    _mix,
    _wrap,
    dropout,
    keep,
    normals,
    random_bits,
)

CPU = torch.device("cpu")


def test_numbers_differ_if_any_argument_does():
    numbers = {
        Seeds(run, step).number(purpose, layer)
        for run, step, purpose, layer in itertools.product(range(8), range(8), Purpose, range(8))
    }
    assert len(numbers) == 8 * 8 * len(Purpose) * 8
    assert all(0 <= number < 2**63 for number in numbers)


def test_numbers_never_change():
    """Other numbers would change every run that is resumed."""
    assert Seeds(1, 2).number(Purpose.HASH, 3) == 6597857829715660821
    keys = Seeds(1, 2, torch.tensor([5, -1])).keys(Purpose.ATTENTION, 3, 2, CPU)
    assert keys.tolist() == [-9204904243680663717, -2800465195712356942]
    assert random_bits(keys, torch.arange(2, dtype=torch.int32)).tolist() == [520020162, -1096258437]


def test_dropout_of_a_sample_is_the_same_in_any_batch():
    x = torch.ones(4, 10, 6)
    ids = torch.tensor([7, 3, 9, 2**40])
    together = dropout(x, 0.5, Seeds(1, 2, ids).keys(Purpose.FEEDFORWARD, 0, 4, CPU))
    for i in range(4):
        alone = dropout(x[:1], 0.5, Seeds(1, 2, ids[i : i + 1]).keys(Purpose.FEEDFORWARD, 0, 1, CPU))
        assert torch.equal(together[i], alone[0])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 4
    other = dropout(x, 0.5, Seeds(1, 3, ids).keys(Purpose.FEEDFORWARD, 0, 4, CPU))
    assert not torch.equal(together, other)


def test_dropout_of_a_part_is_that_of_the_whole():
    x, keys = torch.ones(2, 12, 5), Seeds(1).keys(Purpose.FEEDFORWARD, 0, 2, CPU)
    whole = dropout(x, 0.5, keys)
    assert torch.equal(dropout(x[:, 7:], 0.5, keys, start=7), whole[:, 7:])


def test_places_beyond_2_to_the_32_have_numbers_of_their_own():
    keys = Seeds(1).keys(Purpose.FEEDFORWARD, 0, 1, CPU)
    near, far = _bits_of_places(keys, 0, 4096), _bits_of_places(keys, 1 << 32, 4096)
    assert (near == far).sum() <= 1
    across = _bits_of_places(keys, (1 << 32) - 5, 10)
    assert torch.equal(across[:, 5:], far[:, :5])
    assert torch.equal(
        across[:, :5], random_bits(keys[:, None], torch.arange(-5, 0, dtype=torch.int32)[None])
    )


def test_dropout_does_not_use_the_global_generator():
    state = torch.get_rng_state()
    dropout(torch.ones(2, 5), 0.5, Seeds().keys(Purpose.FEEDFORWARD, 0, 2, CPU))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_its_rate_and_scale_and_draws_are_independent(rate):
    keys = Seeds(samples=torch.arange(64)).keys(Purpose.ATTENTION, 1, 64, CPU)
    y = dropout(torch.ones(64, 4096), rate, keys)
    kept = y > 0
    # 262,144 draws: five standard deviations.
    spread = 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - rate)) < spread
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - rate)))
    for a, b in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, 64:], kept[:, :-64])):
        both = (a & b).double().mean()
        assert abs(both - (1 - rate) ** 2) < 3 * spread


def test_bits_are_uniform():
    bits = random_bits(torch.tensor([[123456789012345]]), torch.arange(1 << 16, dtype=torch.int32)[None])
    assert bits.unique().numel() == 1 << 16
    for bit in range(32):
        assert abs(((bits >> bit) & 1).double().mean() - 0.5) < 0.01
    assert keep(bits, 0.0).all()


def test_ids_must_match_the_batch():
    with pytest.raises(ValueError, match="give one id for each"):
        Seeds(samples=torch.arange(3)).keys(Purpose.HASH, 0, 4, CPU)


def test_normals_are_normal_and_never_change():
    """Hash rotations are drawn from them. Checks their first moments, that they do not correlate, and known values."""
    x = normals(123, 1 << 18).double()
    assert x.mean().abs() < 0.01
    assert (x.var() - 1.0).abs() < 0.01
    assert (x.pow(4).mean() - 3.0).abs() < 0.1
    assert (x[1:] * x[:-1]).mean().abs() < 0.01
    assert (x * normals(124, 1 << 18).double()).mean().abs() < 0.01
    assert torch.equal(normals(123, 50), normals(123, 1 << 18)[:50])
    assert torch.equal(normals(-1, 5), normals((1 << 64) - 1, 5))
    assert normals(7, 4).tolist() == [0.2021484375, 1.375, -0.64453125, 0.5859375]


def test_mixing_equals_splitmix64():
    """The first outputs of splitmix64 with seed 1234567, from integers and from a tensor."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    counters = range(1, 6)
    found = [_mix(_wrap(1234567 + i * GOLDEN)) % (1 << 64) for i in counters]
    assert found == expected
    words = _mix(1234567 + torch.tensor(counters) * GOLDEN)
    assert [word % (1 << 64) for word in words.tolist()] == expected
