"""The table of docs/scale.md is what `megabase plan` computes today."""

from benchmarks import scale


def test_a_row_of_the_page_is_what_is_computed() -> None:
    page = scale.PAGE.read_text()
    assert scale.BEGIN in page and scale.END in page
    assert scale.row(1 << 20, 256) in page, "run `python -m benchmarks.scale --write`"
