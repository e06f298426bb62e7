"""Hashes of samples, and what ranks agree on."""

from hypothesis import given
from hypothesis import strategies as st

from megabase.pipeline.ranks.agreement import Agreed, Agreement, hash_samples
from megabase.pipeline.ranks.groups import Group


@given(st.lists(st.integers(-1, 2**40), max_size=30), st.integers(1, 5), st.randoms())
def test_hash_of_parts_adds_up_to_the_hash_of_all(ids: list[int], parts: int, chance) -> None:
    shuffled = ids[:]
    chance.shuffle(shuffled)
    total = sum(hash_samples(shuffled[part::parts]) for part in range(parts))
    assert total % 2**64 == hash_samples(ids) % 2**64
    assert -(2**63) <= hash_samples(ids) < 2**63


def test_swapping_bases_of_equal_sum_changes_the_hash() -> None:
    assert hash_samples([1, 4]) != hash_samples([2, 3])


def test_the_hash_is_splitmix64() -> None:
    # The first output of splitmix64 seeded with 0, from the reference implementation.
    assert hash_samples([0]) % 2**64 == 0xE220A8397B1DCDAF
    assert hash_samples([]) == 0


def test_each_exchange_returns_what_was_agreed_about_the_step_before(ranks: Group) -> None:
    agreement = Agreement(ranks)
    assert agreement.settle() is None
    assert agreement.exchange(1, stop=False, save=True, progress=1, samples=-1) is None
    assert agreement.exchange(2, stop=True, save=False, progress=2, samples=5, trouble=True) == Agreed(
        1, False, True, 1, 2**64 - 1
    )
    assert agreement.settle() == Agreed(2, True, False, 2, 5, True)
    assert agreement.settle() is None
