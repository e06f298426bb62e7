"""The fp32 weights and AdamW states of a checkpoint by parameter name, out of DeepSpeed's sharded files.

A file holds what its rank held: long vectors without names. Where in them a parameter lies follows from the stage:

- 0: rank 0's file has each parameter whole; in fp32 it is the model's own.
- 1 and 2: the parameters of an optimizer group, one behind the other, are one long vector. It is cut into as many
  equal parts as there are ranks, wherever that falls; the end is padded.
- 3: each parameter is cut into as many equal parts as there are ranks, its end padded. The parts of a rank, one
  behind the other, are a vector. A group may have several (DeepSpeed's sub-groups).

Files are mapped into memory, and each is opened when something is asked that it has: reading costs the pages
that hold the answer, whatever the size of the model. Nothing in here starts or needs a DeepSpeed engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.pipeline.checkpoint.manifest import Damaged, Manifest, read_manifest
from megabase.pipeline.checkpoint.publish import TAG
from megabase.pipeline.errors import RunError
from megabase.pipeline.zero import checkpoint_engine as storage

WEIGHTS = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
WAY_OUT = "take another checkpoint, or train on as it was written: as many ranks, the same zero.stage"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter: in rank `rank`'s file, from element `offset` of a vector."""

    rank: int
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: number of the vector, and first element: of the whole vector, in stage 3 of a part."""

    vector: int
    offset: int


@dataclass
class Shards:
    """Reads one checkpoint, `step-N`, that has been verified.

    names: of stored parameters, in the order of the optimizer; as the trained module, `PretrainModule`, names them.
    shapes: of these. shared: {name that is not stored: name that its data has}, for tied weights.
    optimizer_step: AdamW's `step`; at 0 it has no states. client: all of the model's file but weights and optimizer:
    Lightning's loops and DeepSpeed's counters. scaler: of rank 0, in DeepSpeed's words, which differ between stage 0
    and the others: what fp16 needs to go on with its loss scale.
    """

    path: Path
    manifest: Manifest
    client: dict[str, Any]
    names: tuple[str, ...] = ()
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    optimizer_step: float = 0.0
    _places: dict[str, Place] = field(default_factory=dict)
    _files: dict[int, RankFile] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Shards:
        """Read where everything is, and the small things; weights and states only when `read` asks for them.

        Raises:
            RunError: a file is missing or damaged, or does not hold what this reader needs.
            UserError: a newer megabase wrote it.
        """
        try:
            manifest = read_manifest(path)
        except Damaged as damage:
            raise RunError(f"checkpoint {path} is broken: {damage}") from None
        model = _model_file(path, manifest)
        content = _load(model)
        client = {key: value for key, value in content.items() if key not in ("module", "optimizer")}
        shards = cls(path, manifest, client)
        if manifest.stage == 0:
            shards._describe_whole(model, content)
        else:
            shards._describe_sharded(model)
        return shards

    def read(self, name: str, what: str = WEIGHTS, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a flattened parameter, or of a state of AdamW's for it: a new fp32 vector.

        Args:
            name: one of `names`, or of `shared`.
            what: fp32 (the weights that the optimizer steps), exp_avg or exp_avg_sq.
            stop: None: to the end.

        Raises:
            RunError: a file is missing or damaged.
        """
        name = self.shared.get(name, name)
        size = self.shapes[name].numel()
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise IndexError(f"elements [{start}, {stop}) of {name}, which has {size}")
        result = torch.empty(stop - start)
        for piece in self._pieces(name):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                begin = piece.offset + first - piece.start
                vector = self._file(piece.rank).vector(self._places[name].vector, what)
                part = vector[begin : begin + last - first]
                if len(part) != last - first:
                    raise RunError(
                        f"{self._file(piece.rank).path} has {len(vector)} elements of {what} where {name} needs"
                        f" {begin + last - first}: {WAY_OUT}"
                    )
                result[first - start : last - start] = part
        return result

    def _pieces(self, name: str) -> Iterator[Piece]:
        """What a parameter is put together from, in order."""
        place, size = self._places[name], self.shapes[name].numel()
        if self.manifest.stage == 3:
            return _cut(place.offset, size, self.manifest.ranks)
        # A padded vector has equal parts; the last rank's alone is stored without the padding.
        part = len(self._file(0).vector(place.vector, WEIGHTS)) if self._spread else place.offset + size
        return _consecutive(place.offset, size, part)

    @property
    def _spread(self) -> bool:
        return self.manifest.stage > 0 and self.manifest.ranks > 1

    def _file(self, rank: int) -> RankFile:
        if rank not in self._files:
            prefix = "bf16_" if self.manifest.precision == "bf16" else ""
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            self._files[rank] = _sharded(self.path / TAG / name, self.manifest)
        return self._files[rank]

    def _describe_whole(self, model: Path, content: dict[str, Any]) -> None:
        """Stage 0."""
        weights = _get(content, model, "module")
        groups = _get(content, model, "parameters")
        self.names = tuple(name for group in groups for name in group)
        self._files[0] = _whole(model, content, self.names)
        for number, name in enumerate(self.names):
            self.shapes[name] = _get(weights, model, name).shape
            self._places[name] = Place(number, 0)
        known = {_address(weights[name]): name for name in self.names}
        self.shared = {
            name: known[_address(tensor)]
            for name, tensor in weights.items()
            if name not in self.shapes and _address(tensor) in known
        }
        optimizer = _get(content, model, "optimizer")
        self.scaler = {key: value for key, value in optimizer.items() if not isinstance(value, (dict, list))}
        self.optimizer_step = self._files[0].step

    def _describe_sharded(self, model: Path) -> None:
        """Stages 1 to 3."""
        first = self._file(0)
        paddings = first.content.get("param_alignment_paddings")
        for number, group in enumerate(_get(self.client, model, "param_shapes")):
            offset = 0
            for position, (name, shape) in enumerate(group.items()):
                self.shapes[name] = torch.Size(shape)
                self._places[name] = Place(number, offset)
                size = self.shapes[name].numel()
                offset += -(-size // self.manifest.ranks) if self.manifest.stage == 3 else size
                offset += paddings[number][position] if paddings else 0
        self.names = tuple(self.shapes)
        self.shared = dict(_get(self.client, model, "shared_params"))
        self.scaler = {
            key: first.content[key]
            for key in ("loss_scaler", "dynamic_loss_scale", "overflow")
            if key in first.content
        }
        self.optimizer_step = first.step


@dataclass
class RankFile:
    """What a rank's file holds. weights, states: by number of the vector; a stage-0 "vector" is one parameter."""

    path: Path
    content: dict[str, Any]
    weights: list[Tensor]
    states: Any

    def vector(self, number: int, what: str) -> Tensor:
        """A flat vector, mapped from the file: nothing is read before its elements are."""
        if what == WEIGHTS:
            found: Tensor = _get(self.weights, self.path, number)
        elif what in MOMENTS:
            found = _get(self.states, self.path, number, what)
        else:
            raise ValueError(f"{what!r}: a checkpoint has {WEIGHTS}, {', '.join(MOMENTS)}")
        return found.detach().reshape(-1)

    @property
    def step(self) -> float:
        """AdamW's `step`, which all its parameters share; 0, and no states yet, before the first."""
        return float(_get(self.states, self.path, 0, "step")) if self.states else 0.0


def _sharded(path: Path, manifest: Manifest) -> RankFile:
    """A file of stages 1 to 3. Raises RunError unless it is of the stage and number of ranks that the manifest says."""
    content = _get(_load(path), path, "optimizer_state_dict")
    stage, counts = int(_get(content, path, "zero_stage")), _get(content, path, "partition_count")
    ranks = max(counts) if isinstance(counts, list) else counts
    if (stage, ranks) != (manifest.stage, manifest.ranks):
        raise RunError(
            f"{path} is of {ranks} ranks in stage {stage}, but the manifest beside it says {manifest.ranks}"
            f" in stage {manifest.stage}: take another checkpoint"
        )
    if stage == 3:
        weights, states = _get(content, path, "fp32_flat_groups"), _get(content, path, "optimizer_state_dict")
    else:
        weights = _get(content, path, "single_partition_of_fp32_groups")
        states = _get(content, path, "base_optimizer_state")
    # With DeepSpeed's `elastic_checkpoint` the states are a list of their own.
    return RankFile(
        path, content, weights, states if isinstance(states, list) else _get(states, path, "state")
    )


def _whole(path: Path, content: dict[str, Any], names: tuple[str, ...]) -> RankFile:
    """The file of stage 0, where 16 bits have fp32 weights beside the optimizer's states."""
    optimizer = _get(content, path, "optimizer")
    if "fp32_groups" in optimizer:
        weights = [weight for group in optimizer["fp32_groups"] for weight in group]
        optimizer = _get(optimizer, path, "optimizer_state_dict")
    else:
        module = _get(content, path, "module")
        weights = [_get(module, path, name) for name in names]
    return RankFile(path, content, weights, _get(optimizer, path, "state"))


def _consecutive(offset: int, size: int, part: int) -> Iterator[Piece]:
    """Elements [offset, offset + size) of a vector that is cut every `part` elements."""
    end = offset + size
    for rank in range(offset // part, -(-end // part)):
        first, last = max(offset, rank * part), min(end, (rank + 1) * part)
        yield Piece(rank, first - rank * part, first - offset, last - offset)


def _cut(offset: int, size: int, ranks: int) -> Iterator[Piece]:
    """A parameter of `size` elements in `ranks` equal parts, each at `offset` of its rank's vector."""
    part = -(-size // ranks)
    for rank in range(-(-size // part)):
        yield Piece(rank, offset, rank * part, min((rank + 1) * part, size))


def _model_file(path: Path, manifest: Manifest) -> Path:
    return path / TAG / f"{'zero_pp_rank_0_' if manifest.stage == 3 else ''}mp_rank_00_model_states.pt"


def _load(path: Path) -> dict[str, Any]:
    try:
        content = storage.load(path, mmap=True)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): {WAY_OUT}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no checkpoint: {WAY_OUT}")
    return content


def _get(content: Any, path: Path, *keys: str | int) -> Any:
    """`content[keys[0]][keys[1]]...`. Raises RunError where that is not there."""
    for key in keys:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            raise RunError(f"{path} does not hold {key!r}, which a checkpoint has: {WAY_OUT}") from None
        if content is None:
            raise RunError(f"{path} holds nothing as {key!r}: {WAY_OUT}")
    return content


def _address(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's data lies: tied weights have one address."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()
