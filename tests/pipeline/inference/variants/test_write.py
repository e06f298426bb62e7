"""Names of what is written."""

from pathlib import Path

import pysam

from megabase.pipeline.inference.variants.calls import Alternate, Calls
from megabase.pipeline.inference.variants.write import index_of


def test_long_chromosomes_get_an_index_that_reaches_their_end() -> None:
    for position, name in ((536_870_911, "out.vcf.gz.tbi"), (536_870_912, "out.vcf.gz.csi")):
        alternates = [Alternate(0, "1", place, None, "A", "C") for place in (5, position)]
        calls = Calls(Path("x.vcf"), pysam.VariantHeader(), [0, 1], alternates)
        assert index_of(Path("new/out.vcf.gz"), calls) == Path("new") / name
