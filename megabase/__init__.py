"""megabase: pretrain reversible Reformers on very long sequences.

In the repository this directory holds links to the packages beside it; in a wheel it holds the packages.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("megabase")
except PackageNotFoundError:  # run from a source tree that nobody installed
    __version__ = "0.2.0"
