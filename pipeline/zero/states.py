"""The fp32 weights and AdamW states of a checkpoint by parameter name, from DeepSpeed's sharded files.

The file of a rank holds long vectors without names. The ZeRO stage decides where in them a parameter lies:

- 0: rank 0's file has every parameter unsharded; in fp32 these are the model's own weights.
- 1 and 2: the parameters of an optimizer group, one behind the other, are one long vector. It is padded and cut into as
  many equal parts as there are ranks; a cut may fall inside a parameter.
- 3: each parameter is padded and cut into as many equal parts as there are ranks. The parts of a rank, one behind the
  other, are a vector. A group may have several vectors (DeepSpeed's sub-groups).

A file is mapped into memory when a part of it is first read. Reading loads only the pages that hold the part, whatever
the size of the model. No DeepSpeed engine is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabase.pipeline.errors import RunError
from megabase.pipeline.zero import checkpoint_engine
from megabase.pipeline.zero.checkpoint_engine import DIRECTORY
from megabase.pipeline.zero.settings import SavedLayout

WEIGHTS = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
WAY_OUT = "take another checkpoint, or resume with the same number of ranks and the same zero.stage"


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter. In their vector in the file of `rank` they begin at `offset`."""

    rank: int
    offset: int
    start: int
    stop: int


@dataclass(frozen=True)
class Place:
    """Where a parameter begins: at element `offset` of vector number `vector`.

    In stages 1 and 2 the element is one of the full vector, before it is cut. In stage 3 the offset is the same in the
    vector of every rank.
    """

    vector: int
    offset: int


@dataclass
class Shards:
    """Reads one checkpoint, `step-N`, that has been checked for damage.

    Attributes:
        path: the checkpoint's directory.
        layout: how its states are laid out.
        client: the model's file without weights and optimizer: Lightning's loops and DeepSpeed's counters.
        names: names of the stored parameters in the trained module, `PretrainModule`, in the order of the optimizer.
        shapes: {name: shape} of the stored parameters.
        shared: {name that is not stored: name of the stored parameter with the same data}, for tied weights.
        scaler: rank 0's state of the fp16 loss scale. DeepSpeed's keys for it differ between stage 0 and the others.
        optimizer_step: AdamW's `step`. At 0, AdamW has no states.
    """

    path: Path
    layout: SavedLayout
    client: dict[str, Any]
    names: tuple[str, ...] = ()
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    optimizer_step: float = 0.0
    _places: dict[str, Place] = field(default_factory=dict)
    _files: dict[int, RankFile] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, layout: SavedLayout) -> Shards:
        """Read names, shapes, places and counters. Weights and states are read by `read` only.

        Args:
            path: the checkpoint's directory.
            layout: how its states are laid out.

        Raises:
            RunError: a file is missing or damaged, or lacks what this reader needs.
        """
        model = _model_file(path, layout)
        content = _load(model)
        client = {key: value for key, value in content.items() if key not in ("module", "optimizer")}
        shards = cls(path, layout, client)
        if layout.stage == 0:
            shards._describe_unsharded(model, content)
        else:
            shards._describe_sharded(model)
        return shards

    def read(self, name: str, what: str = WEIGHTS, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of a flattened parameter, or of one of its AdamW states.

        Args:
            name: one of `names`, or of `shared`.
            what: fp32 (the weights that the optimizer steps), exp_avg or exp_avg_sq.
            start: first element.
            stop: end; None: the end of the parameter.

        Returns:
            A new fp32 vector of stop - start elements.

        Raises:
            IndexError: the parameter has no such elements.
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
        """The pieces of a parameter, in order."""
        place, size = self._places[name], self.shapes[name].numel()
        if self.layout.stage == 3:
            return _cut(place.offset, size, self.layout.ranks)
        # All parts have rank 0's length; only the last rank's may be shorter, because it is stored without the padding.
        part = (
            len(self._file(0).vector(place.vector, WEIGHTS)) if self._vectors_are_cut else place.offset + size
        )
        return _consecutive(place.offset, size, part)

    @property
    def _vectors_are_cut(self) -> bool:
        return self.layout.stage > 0 and self.layout.ranks > 1

    def _file(self, rank: int) -> RankFile:
        if rank not in self._files:
            prefix = "bf16_" if self.layout.precision == "bf16" else ""
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            self._files[rank] = _sharded_file(self.path / DIRECTORY / name, self.layout)
        return self._files[rank]

    def _describe_unsharded(self, model: Path, content: dict[str, Any]) -> None:
        """Fill in names, shapes, places and counters from the content of the model's file, in stage 0."""
        weights = _get(content, model, "module")
        groups = _get(content, model, "parameters")
        self.names = tuple(name for group in groups for name in group)
        self._files[0] = _unsharded_file(model, content, self.names)
        for number, name in enumerate(self.names):
            self.shapes[name] = _get(weights, model, name).shape
            self._places[name] = Place(number, 0)
        stored = {_address(weights[name]): name for name in self.names}
        self.shared = {
            name: stored[_address(tensor)]
            for name, tensor in weights.items()
            if name not in self.shapes and _address(tensor) in stored
        }
        optimizer = _get(content, model, "optimizer")
        self.scaler = {key: value for key, value in optimizer.items() if not isinstance(value, (dict, list))}
        self.optimizer_step = self._files[0].step

    def _describe_sharded(self, model: Path) -> None:
        """Fill in names, shapes, places and counters from the files of the model and of rank 0, in stages 1 to 3."""
        first = self._file(0)
        paddings = first.content.get("param_alignment_paddings")
        for number, group in enumerate(_get(self.client, model, "param_shapes")):
            offset = 0
            for position, (name, shape) in enumerate(group.items()):
                self.shapes[name] = torch.Size(shape)
                self._places[name] = Place(number, offset)
                size = self.shapes[name].numel()
                offset += -(-size // self.layout.ranks) if self.layout.stage == 3 else size
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
    """The content of one rank's file.

    Attributes:
        path: the file.
        content: its content, without DeepSpeed's outer dictionary in stages 1 to 3.
        weights: fp32 weights by number of the vector. In stage 0, a vector is one parameter.
        states: AdamW's states by number of the vector.
    """

    path: Path
    content: dict[str, Any]
    weights: list[Tensor]
    states: Any

    def vector(self, number: int, what: str) -> Tensor:
        """One vector, flattened. It is mapped from the file: its elements are read when they are used."""
        if what == WEIGHTS:
            found: Tensor = _get(self.weights, self.path, number)
        elif what in MOMENTS:
            found = _get(self.states, self.path, number, what)
        else:
            raise ValueError(f"{what!r}: a checkpoint has {WEIGHTS}, {', '.join(MOMENTS)}")
        return found.detach().reshape(-1)

    @property
    def step(self) -> float:
        """AdamW's `step`, the same for all parameters; 0 before the first step, when there are no states."""
        return float(_get(self.states, self.path, 0, "step")) if self.states else 0.0


def _sharded_file(path: Path, layout: SavedLayout) -> RankFile:
    """Open a rank's file of stages 1 to 3. Raises RunError unless it has the stage and number of ranks of `layout`."""
    content = _get(_load(path), path, "optimizer_state_dict")
    stage, counts = int(_get(content, path, "zero_stage")), _get(content, path, "partition_count")
    ranks = max(counts) if isinstance(counts, list) else counts
    if (stage, ranks) != (layout.stage, layout.ranks):
        raise RunError(
            f"{path} is of {ranks} ranks in stage {stage}, but its manifest says {layout.ranks} in stage"
            f" {layout.stage}: take another checkpoint"
        )
    if stage == 3:
        weights, states = _get(content, path, "fp32_flat_groups"), _get(content, path, "optimizer_state_dict")
    else:
        weights = _get(content, path, "single_partition_of_fp32_groups")
        states = _get(content, path, "base_optimizer_state")
    # With DeepSpeed's `elastic_checkpoint` the states are a list.
    return RankFile(
        path, content, weights, states if isinstance(states, list) else _get(states, path, "state")
    )


def _unsharded_file(path: Path, content: dict[str, Any], names: tuple[str, ...]) -> RankFile:
    """Weights and states of the only file of stage 0. At 16 bits, the fp32 weights are with the optimizer's states."""
    optimizer = _get(content, path, "optimizer")
    if "fp32_groups" in optimizer:
        weights = [weight for group in optimizer["fp32_groups"] for weight in group]
        optimizer = _get(optimizer, path, "optimizer_state_dict")
    else:
        module = _get(content, path, "module")
        weights = [_get(module, path, name) for name in names]
    return RankFile(path, content, weights, _get(optimizer, path, "state"))


def _consecutive(offset: int, size: int, part: int) -> Iterator[Piece]:
    """The pieces of elements [offset, offset + size) of a vector that is cut every `part` elements."""
    end = offset + size
    for rank in range(offset // part, -(-end // part)):
        first, last = max(offset, rank * part), min(end, (rank + 1) * part)
        yield Piece(rank, first - rank * part, first - offset, last - offset)


def _cut(offset: int, size: int, ranks: int) -> Iterator[Piece]:
    """The pieces of a parameter that is cut into `ranks` equal parts, each at `offset` of its rank's vector."""
    part = -(-size // ranks)
    for rank in range(-(-size // part)):
        yield Piece(rank, offset, rank * part, min((rank + 1) * part, size))


def _model_file(path: Path, layout: SavedLayout) -> Path:
    return path / DIRECTORY / f"{'zero_pp_rank_0_' if layout.stage == 3 else ''}mp_rank_00_model_states.pt"


def _load(path: Path) -> dict[str, Any]:
    try:
        content = checkpoint_engine.load(path, mmap=True)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}): {WAY_OUT}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no checkpoint: {WAY_OUT}")
    return content


def _get(content: Any, path: Path, *keys: str | int) -> Any:
    """`content[keys[0]][keys[1]]...`. Raises RunError if there is no such value, or if it is None."""
    for key in keys:
        try:
            content = content[key]
        except (KeyError, IndexError, TypeError):
            raise RunError(f"{path} lacks {key!r}, which a checkpoint has: {WAY_OUT}") from None
        if content is None:
            raise RunError(f"{path} has no value for {key!r}: {WAY_OUT}")
    return content


def _address(tensor: Tensor) -> tuple[object, ...]:
    """Where a tensor's data lies in memory. Tied weights have the same address."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset()
