"""Numbers, sizes and times as people read them."""

from megabase.pipeline.readable import age, counted, readable_size, readable_time


def test_sizes_for_people() -> None:
    assert [readable_size(size) for size in (0, 1023, 1024, 3 * 2**29, 5 * 2**40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.5 GiB",
        "5.0 TiB",
    ]


def test_times_for_people() -> None:
    seconds = [0.123, 5.4, 42.2, 89, 5400, 86_400 * 12.4, 86_400 * 365 * 12_345]
    assert [readable_time(each) for each in seconds] == [
        *("0.12 s", "5.4 s", "42 s", "89 s"),
        *("1.5 hours", "12 days", "12,345 years"),
    ]


def test_numbers_of_things() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 2000)] == [
        "0 ranks",
        "1 rank",
        "2 ranks",
        "2,000 ranks",
    ]


def test_ages() -> None:
    assert [age(seconds) for seconds in (-1, 59, 119, 3_600, 7_200, 3 * 86_400)] == [
        *("0 s", "59 s", "119 s", "60 min", "2 h", "3 d"),
    ]
