"""Compiles the C++ in cpp/ for this machine, once, and loads the library.

The compiler is the one that $CXX names, else g++ or clang++. It takes some seconds, and the library goes into
$MEGABASE_CACHE (default: ~/.cache/megabase). The file's name is a hash of source, compiler, flags and processor, so one
home directory serves a cluster of different machines, and a library that does not match is never loaded. If the folder
cannot be written, every process builds its own library.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from megabase.models.device import processor_lines

SOURCE = Path(__file__).with_name("cpp") / "attention.cpp"
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread")
BUILD_SECONDS = 300


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The library, built if it does not exist yet. None, with a warning, if it cannot be built."""
    compiler = _compiler()
    try:
        if compiler is None:
            raise FileNotFoundError("there is no C++ compiler (looked for $CXX, else g++ and clang++)")
        library = ctypes.CDLL(str(_build(compiler)))
        library.megabase_use_threads(_torch_threads())
        return library
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = f"{compiler} failed: " + next(
            (line for line in lines if "error" in line), " ".join(lines[-1:])
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    warnings.warn(
        f"attention on the CPU runs several times slower than it could: {reason}. "
        "Install g++, or set CXX to a C++17 compiler.",
        stacklevel=2,
    )
    return None


def _torch_threads() -> ctypes.c_void_p | None:
    """Address of GOMP_parallel in the OpenMP library of this process (GNU's; LLVM's and Intel's have it too)."""
    try:
        loaded = re.findall(r"/\S*/lib[gi]?omp[^/\s]*\.so\S*", Path("/proc/self/maps").read_text())
        return ctypes.cast(ctypes.CDLL(loaded[0]).GOMP_parallel, ctypes.c_void_p)
    except (OSError, IndexError, AttributeError):
        return None


def _compiler() -> str | None:
    """Path of the C++ compiler, None if there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def _build(compiler: str) -> Path:
    """Path of the library for this machine, built if needed. It is moved into place by a rename, so several processes
    may build it at the same time."""
    tuned = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    command = [compiler, *FLAGS, tuned]
    sources = (path.read_text() for path in sorted(SOURCE.parent.iterdir()))
    # The compiler's `native` depends on these.
    processor = sorted(set(processor_lines("model name", "flags", "features", "cpu part"))) or [
        platform.processor()
    ]
    identity = (*sources, *command, _run([compiler, "--version"]), *processor)
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:20]
    library = _cache() / f"attention-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            built = Path(scratch) / library.name
            _run([*command, str(SOURCE), "-o", str(built)])
            built.replace(library)
    return library


def _run(command: Sequence[str]) -> str:
    """Run a command and return what it prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=True).stdout


def _cache() -> Path:
    """The folder of libraries. If it cannot be written: a temporary folder, removed when this process ends."""
    named = os.environ.get("MEGABASE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(named) if named else Path(home) / "megabase"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        private = tempfile.mkdtemp(prefix="megabase-")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return Path(private)
