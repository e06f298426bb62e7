"""Checks of single settings, and dataclasses that are built from dictionaries."""

from dataclasses import dataclass, field

import pytest

from megabase.models.checks import (
    SINGLE_ROTATION,
    ConfigError,
    build,
    check_at_least,
    check_buckets,
    check_name,
    check_rate,
    round_up,
)


@dataclass
class Inner:
    size: int = 1


@dataclass
class Outer:
    name: str = "a"
    inner: Inner = field(default_factory=Inner)


def test_a_name_must_be_one_of_the_valid_ones():
    check_name("key", "gelu", ("gelu", "relu"))
    with pytest.raises(ConfigError, match=r"key='gelo' is unknown: did you mean 'gelu'\? valid: gelu, relu"):
        check_name("key", "gelo", ("gelu", "relu"))
    with pytest.raises(ConfigError, match="key='x' is unknown: valid: gelu, relu"):
        check_name("key", "x", ("gelu", "relu"))


def test_numbers_have_limits():
    check_at_least(1, "key", 1)
    for rate in (None, 0.0, 0.999):
        check_rate("key", rate)
    with pytest.raises(ConfigError, match="key=0 must be at least 1"):
        check_at_least(1, "key", 0)
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=f"key={rate} must be at least 0 and below 1"):
            check_rate("key", rate)


@pytest.mark.parametrize("n", [2, 6, SINGLE_ROTATION, SINGLE_ROTATION + 4, 1 << 20])
def test_numbers_of_buckets_that_work(n):
    check_buckets(n, "key")


@pytest.mark.parametrize(
    ("n", "instead"), [(0, 2), (-4, 2), (1, 2), (5, 6), (SINGLE_ROTATION + 2, SINGLE_ROTATION + 4)]
)
def test_other_numbers_of_buckets_are_refused_with_one_that_works(n, instead):
    with pytest.raises(ConfigError, match=f"key={n} .*: take {instead}$"):
        check_buckets(n, "key")
    check_buckets(instead, "key")


def test_rounding_up():
    assert [round_up(value, 4) for value in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_build_copies_the_default_with_other_values():
    default = Outer()
    assert build(default, {"name": "b", "inner": {"size": 3}}, "outer") == Outer("b", Inner(3))
    assert build(default, {"inner.size": 4}, "outer") == Outer("a", Inner(4))
    assert default == Outer()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nam": "b"}, "outer.nam is a setting that this version does not know"),
        ({"name.size": 1}, "outer.name.size is a setting that this version does not know"),
        ({"inner": {"siz": 1}}, "outer.inner.siz is a setting"),
        ({"inner": 3}, "outer.inner=3 must be a group of settings"),
    ],
)
def test_build_refuses_names_that_do_not_exist(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer(), values, "outer")
