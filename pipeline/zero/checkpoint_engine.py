"""How a checkpoint's files are written and read, in DeepSpeed's format.

- Every file is hashed while it is written, and synced to disk: no file is read back for its checksum.
- With `background`, `save` copies the states to host memory and returns; a thread writes them while training goes
  on. The buffers are kept for the next checkpoint: this mode costs host memory for a copy of the states.
- A file with numbers that are not finite is not written. Each tensor is checked first: on its device or, with
  `background`, in its copy.
- DeepSpeed's ranks wait for each other at barriers while saving, so nothing here raises an error before `result`: a
  rank that raised alone would leave the others at the barrier.
- No code from a file is executed: files are read with `weights_only`, which accepts tensors, plain containers and the
  few classes named in `ALLOWED`.
"""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns on import that it uses the CPU

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megabase.pipeline.errors import RunError
from megabase.pipeline.ranks import watchdog

T = TypeVar("T")

# The directory of DeepSpeed's files within a checkpoint, and the file that names it for DeepSpeed's own tools.
DIRECTORY = "checkpoint"
LATEST = "latest"
# The classes of objects in DeepSpeed's files, beside tensors and plain containers.
ALLOWED = [fragment_address, LossScaler, DynamicLossScaler, ZeroStageEnum]


@dataclass
class Written:
    """What one rank wrote.

    Attributes:
        files: {path: {"size": bytes, "sha256": hexadecimal digits}}.
        error: why not all files could be written; None if they were.
    """

    files: dict[Path, dict[str, Any]] = field(default_factory=dict)
    error: Exception | None = None


class Storage(CheckpointEngine):
    """DeepSpeed's reader and writer of checkpoint files, for one rank and one checkpoint at a time."""

    def __init__(self, background: bool) -> None:
        super().__init__()
        self.name = "megabase"
        self._snapshots = Snapshots() if background else None
        self._writer = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._pending: list[Future[None]] = []
        self._written = Written()

    @property
    def done(self) -> bool:
        """Whether all files are written."""
        return all(future.done() for future in self._pending)

    def result(self) -> Written:
        """Wait until the files of the current checkpoint are written, and return them. Then the next one may begin."""
        for future in self._pending:
            future.result()
        written, self._written, self._pending = self._written, Written(), []
        return written

    def create(self, info: CheckpointCommitInfo) -> None:
        """Begin a checkpoint, after `result` of the one before."""
        assert not self._pending and not self._written.files
        if self._snapshots:
            self._snapshots.rewind()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory; an error is kept for `result`."""
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self._written.error = self._written.error or error

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, now or in the background; an error is kept for `result`."""
        watchdog.beat("writing a checkpoint")
        state = self._snapshots.take(state_dict) if self._snapshots else state_dict
        self._pending.append(self.run(lambda: self._write(state, Path(path))))

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Call `work` after all files so far are written: now or, with `background`, on the writer's thread."""
        if self._writer:
            return self._writer.submit(work)
        future: Future[T] = Future()
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)
        return future

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a file, in host memory; DeepSpeed copies it to its devices."""
        return load(Path(path))

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Does nothing: the pipeline publishes the checkpoint when every rank is done."""
        return True

    def _write(self, state: Any, path: Path) -> None:
        if self._written.error:
            return
        try:
            if not finite(state):
                raise RunError("weights or optimizer states are not finite")
            with HashingFile(path) as file:
                torch.save(state, file)  # type: ignore[arg-type]
            self._written.files[path] = {"size": file.size, "sha256": file.digest()}
        except Exception as error:  # any error: the other ranks must receive it, or they would wait
            # torch raises an error of its own if a file cannot be written; the OSError behind it says why.
            self._written.error = error.__context__ if isinstance(error.__context__, OSError) else error


class HashingFile:
    """A new file that is hashed while it is written, and synced to disk when it is closed.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append `data`."""
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Pass buffered data to the system."""
        self._file.flush()

    def digest(self) -> str:
        """SHA-256 of what was written, as hexadecimal digits."""
        return self._hash.hexdigest()

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


class Snapshots:
    """Copies states to host memory, into buffers that the next checkpoint reuses.

    Tensors that share a storage share it in the copy, as `torch.save` wants it. On a machine with GPUs the buffers
    are pinned.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0
        # The copy of each storage of the current state, by its device and address.
        self._copied: dict[tuple[str, int], torch.UntypedStorage] = {}

    def rewind(self) -> None:
        """Let the next copies overwrite the last ones, which must not be used any more."""
        self._used = 0

    def take(self, state: Any) -> Any:
        """A copy of nested dictionaries, lists and tuples of tensors and small values, independent of the original."""
        self._copied = {}
        copied = self._copy(state)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value.detach())
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._copy(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._copy(item) for item in value)
        return copy.deepcopy(value)

    def _tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = str(storage.device), storage.data_ptr()
        # Empty storages have no address to tell them apart.
        if key not in self._copied or not storage.nbytes():
            self._copied[key] = self._storage(storage)
        empty = torch.empty(0, dtype=tensor.dtype)
        return empty.set_(self._copied[key], tensor.storage_offset(), tensor.shape, tensor.stride())

    def _storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        bytes_of = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[self._used].numel() != storage.nbytes():
            pinned = torch.cuda.is_available()
            self._buffers[self._used] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        buffer = self._buffers[self._used]
        self._used += 1
        buffer.copy_(bytes_of, non_blocking=True)
        return buffer.untyped_storage()


def finite(state: Any) -> bool:
    """Whether all numbers in nested dictionaries, lists and tuples of tensors are finite. One read from each device."""
    extremes: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in _tensors(state):
        if tensor.is_floating_point() and tensor.numel():
            # Minimum and maximum show it without a mask as large as the tensor: a NaN makes both NaN, and an infinity
            # is one of the two.
            both = torch.stack(torch.aminmax(tensor.detach())).float()
            extremes.setdefault(tensor.device, []).append(both)
    return all(bool(torch.stack(values).isfinite().all()) for values in extremes.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def load(path: Path, *, mmap: bool = False) -> Any:
    """The content of a file of a checkpoint.

    Args:
        path: the file.
        mmap: map tensors from the file; otherwise they are read into host memory.

    Raises:
        RunError: it is incomplete, or holds an object of a class that is not in `ALLOWED`.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise RunError(f"{path} holds more than weights and is not loaded: {error}") from None
    except (RuntimeError, EOFError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
