"""megabase: pretrain reversible Reformers on very long sequences.

In the repository this directory holds links to the packages beside it; in a wheel it holds the packages.
"""

import logging
from importlib.metadata import PackageNotFoundError, version

# Messages are shown only where a program asks for them, as `megabase.pipeline.log.set_up` does for the command line.
logging.getLogger(__name__).addHandler(logging.NullHandler())

try:
    __version__ = version("megabase")
except PackageNotFoundError:  # run from a source tree that nobody installed
    __version__ = "0.2.0"
