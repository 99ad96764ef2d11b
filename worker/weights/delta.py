"""What tuning changed, chunk by chunk for any tensor of Instruct.

A `Delta` names its folders; bound to an Instruct checkpoint it has checked that it fits. All kinds give the same, so
that the graft knows only one: `tuned - base` for full tuning, and `scaling * B @ A` for LoRA, where the base has
cancelled out (Shadow-FT, arXiv 2505.12716).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from core.adapter_plan import AdapterPlan, LowRank, Replacement, plan_adapter
from core.checkpoints import Checkpoint, TensorInfo, read_adapter, read_checkpoint, read_delta
from core.errors import PairRefused
from core.graft_plan import GraftPlan, Selection, listed, plan_graft, plan_saved
from worker.weights import tensors
from worker.weights.arithmetic import Change
from worker.weights.special_rows import StartRows, read_start_rows, require_fitting_rows, row_numbers
from worker.weights.tensors import Buffer, Reader, Scratch

Kind = Literal["full", "lora", "delta"]

#: Rows of a low-rank product are made in panels of about so many elements, whatever the chunks: a product's last bit
#: depends on how many rows are made at once (seen below eight rows), and no setting may change a bit.
PANEL_ELEMENTS = 128 * 1024
_PANEL_ROWS = 16

#: Added to or subtracted from, it makes +0.0 of -0.0.
_ZERO = torch.tensor(0.0)

#: Tensors whose factors are kept in memory: blocks of a few tensors are at work at once.
_FACTORS_HELD = 4


class TensorChange(Protocol):
    """The delta of one tensor."""

    #: Chunks begin at multiples of so many elements.
    grain: int

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        """The change of the flattened elements `first` to `last`, which lie within one chunk, in `scratch`'s memory.

        `careful`: elements that are the same NaN or infinity before and after the tuning have no update.
        """
        ...

    def total(self, first: int, last: int, buffer: Buffer) -> Tensor | None:
        """The tuned values as stored, if Instruct's tensor is base's own, bit for bit: the graft at scale 1."""
        ...

    def announce(self, first: int, last: int) -> None:
        """These elements will be read soon."""
        ...


@dataclass(frozen=True)
class BoundDelta:
    """A delta that fits one Instruct checkpoint. A tensor in neither mapping has the delta zero."""

    #: By Instruct's names: what the graft changes, and what tuning may have moved and the selection leaves out.
    grafted: Mapping[str, TensorChange]
    discarded: Mapping[str, TensorChange]
    #: Of embeddings and heads with a row count of their own: the leading rows that take part.
    common_rows: Mapping[str, int]
    remarks: tuple[str, ...]
    #: What it reads, by role.
    readers: Mapping[str, Reader]
    checkpoints: Mapping[str, Mapping[str, TensorInfo]]
    #: Rows of base in whose place the tuning began with Instruct's: by base's names.
    start_rows: Mapping[str, list[int]] = field(default_factory=dict)


class Delta(Protocol):
    @property
    def kind(self) -> Kind: ...

    @property
    def sources(self) -> dict[str, Path]:
        """Every folder it reads, by its role."""
        ...

    def bind(self, instruct: Checkpoint, reader: Reader, selection: Selection) -> BoundDelta:
        """`reader` reads Instruct.

        PairRefused: it does not fit `instruct`, with every reason. InvalidInput: a file of it is damaged.
        """
        ...


# --- full tuning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FullDelta:
    """`tuned - base`, both subtracted in float32.

    `base` is the start of the tuning. Rows of it in whose place the tuning began with others lie in `tuned`, and count
    as base's wherever base is read (see `special_rows`): in the delta, in its cosine, in what is left out.
    """

    base: Path
    tuned: Path
    kind: ClassVar[Kind] = "full"

    @property
    def sources(self) -> dict[str, Path]:
        return {"base": self.base, "tuned": self.tuned}

    def bind(self, instruct: Checkpoint, reader: Reader, selection: Selection) -> BoundDelta:
        base, tuned = read_checkpoint(self.base), read_checkpoint(self.tuned)
        if self.base.samefile(self.tuned):
            raise PairRefused(["base and tuned base are one folder, so that there is no change to graft"])
        plan = plan_graft(instruct, base, selection=selection)
        tuning = plan_graft(base, tuned, selection=Selection("all"), words=("base", "tuned base"))
        _refuse_untold(plan, tuning)
        rows = read_start_rows(self.tuned)
        require_fitting_rows(rows, base, self.tuned)
        common_rows = _common_rows(plan, tuning)
        base_reader, tuned_reader = Reader(self.base), Reader(self.tuned)

        def differences(names: Mapping[str, str]) -> dict[str, TensorChange]:
            return {
                name: Difference(
                    Stored(reader, instruct.tensors[name]),
                    _start(Stored(base_reader, base.tensors[other]), rows),
                    Stored(tuned_reader, tuned.tensors[tuning.grafted[other]]),
                    elements=common_elements(instruct.tensors[name], common_rows),
                )
                for name, other in names.items()
                if other in tuning.grafted
            }

        return BoundDelta(
            grafted=differences(plan.grafted),
            discarded=differences(plan.discarded),
            common_rows=common_rows,
            remarks=(*plan.remarks, *_vocabulary_remarks(tuning)),
            readers={"base": base_reader, "tuned": tuned_reader},
            checkpoints={"base": base.tensors, "tuned": tuned.tensors},
            start_rows=row_numbers(rows),
        )


def _vocabulary_remarks(tuning: GraftPlan) -> list[str]:
    counts = sorted(set(tuning.common_rows.values()))
    return [f"the tuned base has not as many rows as base: the first {count} are grafted" for count in counts]


def _refuse_untold(plan: GraftPlan, tuning: GraftPlan) -> None:
    """A part outside the language model may be missing in the tuned base, unless the graft asks for it."""
    missing = sorted(name for name in plan.grafted.values() if name not in tuning.grafted)
    if missing:
        raise PairRefused([f"{len(missing)} tensors to graft are missing in the tuned base: {listed(missing)}"])


def _common_rows(plan: GraftPlan, tuning: GraftPlan) -> dict[str, int]:
    """By Instruct's names: the leading rows that Instruct, base and tuned base all have."""
    names = plan.grafted | plan.discarded
    tuned_rows = {name: tuning.common_rows[other] for name, other in names.items() if other in tuning.common_rows}
    both = plan.common_rows.keys() & tuned_rows.keys()
    return {**plan.common_rows, **tuned_rows, **{name: min(plan.common_rows[name], tuned_rows[name]) for name in both}}


@dataclass(frozen=True)
class SavedDelta:
    """The difference itself, as `save_delta` wrote it."""

    folder: Path
    kind: ClassVar[Kind] = "delta"

    @property
    def sources(self) -> dict[str, Path]:
        return {"delta": self.folder}

    def bind(self, instruct: Checkpoint, reader: Reader, selection: Selection) -> BoundDelta:
        delta = read_delta(self.folder)
        plan = plan_saved(instruct, delta, selection=selection)
        saved = Reader(self.folder)

        def change(other: str) -> SavedChange:
            return SavedChange(Stored(saved, delta.tensors[other]))

        return BoundDelta(
            grafted={name: change(other) for name, other in plan.grafted.items()},
            discarded={name: change(other) for name, other in plan.discarded.items()},
            common_rows=plan.common_rows,
            remarks=plan.remarks,
            readers={"delta": saved},
            checkpoints={"delta": delta.tensors},
        )


@dataclass(frozen=True)
class Stored:
    """A tensor and where to read it."""

    reader: Reader
    info: TensorInfo

    def read(self, first: int, last: int, buffer: Buffer) -> Tensor:
        return self.reader.elements(self.info, first, last, buffer)

    def read32(self, first: int, last: int, raw: Buffer, into: Buffer) -> Tensor:
        return into.floats(last - first).copy_(self.read(first, last, raw))

    def announce(self, first: int, last: int) -> None:
        self.reader.announce(self.info, first, last)


@dataclass(frozen=True)
class Patched(Stored):
    """A tensor of (R, C) with rows of (C,) float32 in place of those that are stored."""

    rows: Mapping[int, Tensor]

    def read32(self, first: int, last: int, raw: Buffer, into: Buffer) -> Tensor:
        values = super().read32(first, last, raw, into)
        columns = self.info.shape[1]
        for number, row in self.rows.items():
            start, end = max(first, number * columns), min(last, (number + 1) * columns)
            if start < end:
                values[start - first : end - first] = row[start - number * columns : end - number * columns]
        return values


def _start(stored: Stored, rows: StartRows) -> Stored:
    patches = rows.get(stored.info.name)
    return Patched(stored.reader, stored.info, patches) if patches else stored


class Difference:
    """`tuned - base` of one tensor."""

    def __init__(self, instruct: Stored, base: Stored, tuned: Stored, *, elements: int) -> None:
        self.grain = tensors.CHUNK_ELEMENTS
        self._instruct, self._base, self._tuned = instruct, base, tuned
        self._elements = elements
        self._lock = threading.Lock()
        self._same: bool | None = None

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        tuned32 = self._tuned.read32(first, last, scratch.raw, scratch.change32)
        base32 = self._base.read32(first, last, scratch.raw, scratch.base32)
        same = (tuned32 == base32) | (tuned32.isnan() & base32.isnan()) if careful else None
        one, two = (base32, tuned32) if scale > 0 else (tuned32, base32)
        decrement = torch.sub(one, two, out=tuned32)
        if same is not None:
            decrement.masked_fill_(same, 0.0)
        return Change(_scaled(decrement, abs(scale), careful=careful).add_(_ZERO), base32)  # never -0.0

    def total(self, first: int, last: int, buffer: Buffer) -> Tensor | None:
        """Asked of the whole tensor and not of single elements, which would cost a mask (see `arithmetic`)."""
        with self._lock:
            if self._same is None:
                self._same = self._compare()
        return self._tuned.read(first, last, buffer) if self._same else None

    def announce(self, first: int, last: int) -> None:
        self._base.announce(first, last)
        self._tuned.announce(first, last)

    def _compare(self) -> bool:
        if self._instruct.info.dtype != self._base.info.dtype:
            return False
        one, two = Scratch(), Scratch()
        for first in range(0, self._elements, self.grain):
            last = min(first + self.grain, self._elements)
            here, there = self._whole(self._instruct, first, last, one), self._whole(self._base, first, last, two)
            if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
                return False
        return True

    def _whole(self, stored: Stored, first: int, last: int, scratch: Scratch) -> Tensor:
        """As stored; in float32, which holds every value, where base has rows that are not."""
        if isinstance(self._base, Patched):
            return stored.read32(first, last, scratch.raw, scratch.base32)
        return stored.read(first, last, scratch.raw)


class SavedChange:
    """A difference that was stored in float32."""

    def __init__(self, delta: Stored) -> None:
        self.grain = tensors.CHUNK_ELEMENTS
        self._delta = delta

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        delta = self._delta.read32(first, last, scratch.raw, scratch.change32)
        return Change(_scaled(delta, -scale, careful=careful).add_(_ZERO))  # never -0.0

    def total(self, first: int, last: int, buffer: Buffer) -> Tensor | None:
        return None

    def announce(self, first: int, last: int) -> None:
        self._delta.announce(first, last)


def _scaled(change: Tensor, scale: float, *, careful: bool) -> Tensor:
    """In place. `careful`: no change stays none, also where the scale is beyond float32."""
    if scale == 1:
        return change
    nothing = change == 0 if careful else None
    change.mul_(scale)
    return change if nothing is None else change.masked_fill_(nothing, 0.0)


def common_elements(info: TensorInfo, common_rows: Mapping[str, int]) -> int:
    """Of Instruct's tensor: those that take part."""
    if info.name not in common_rows:
        return info.elements
    return common_rows[info.name] * (info.elements // info.shape[0])


# --- LoRA -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraDelta:
    """What a PEFT adapter adds. `base` is read where DoRA and whole modules need it, and for the cosine."""

    adapter: Path
    base: Path | None = None
    kind: ClassVar[Kind] = "lora"

    @property
    def sources(self) -> dict[str, Path]:
        return {"adapter": self.adapter} | ({"base": self.base} if self.base else {})

    def bind(self, instruct: Checkpoint, reader: Reader, selection: Selection) -> BoundDelta:
        adapter = read_adapter(self.adapter)
        base = read_checkpoint(self.base) if self.base else None
        plan = plan_adapter(instruct, adapter, base, selection=selection)
        readers = {role: Reader(folder) for role, folder in self.sources.items()}
        changes = _Changes(instruct, plan, reader, _Factors(readers["adapter"]), readers.get("base"))
        return BoundDelta(
            grafted={name: changes.of(name, found) for name, found in plan.grafted.items()},
            discarded={name: changes.of(name, found) for name, found in plan.discarded.items()},
            common_rows=plan.common_rows,
            remarks=plan.remarks,
            readers=readers,
            checkpoints={"adapter": adapter.tensors} | ({"base": base.tensors} if base else {}),
            start_rows=row_numbers(read_start_rows(self.adapter)),
        )


@dataclass(frozen=True)
class _Changes:
    """Makes the change of each tensor that an adapter names."""

    instruct: Checkpoint
    plan: AdapterPlan
    reader: Reader
    factors: _Factors
    base: Reader | None

    def of(self, name: str, found: LowRank | Replacement) -> TensorChange:
        info = self.instruct.tensors[name]
        base = Stored(self.base, found.base) if self.base is not None and found.base is not None else None
        if isinstance(found, LowRank):
            return Product(self.factors, found, base, columns=info.shape[-1])
        assert base is not None  # noqa: S101 - the plan refuses whole modules without base
        saved = Stored(self.factors.reader, found.tensor)
        elements = common_elements(info, self.plan.common_rows)
        return Difference(Stored(self.reader, info), base, saved, elements=elements)


class _Factors:
    """The factors of the tensors at work, in float32; those of finished tensors are let go."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._held: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, factors: LowRank) -> tuple[Tensor, Tensor]:
        """(R, r) and (r, C). For a weight stored as (in, out) the product is `A^T @ B^T`."""
        key = factors.a.name
        with self._lock:
            if key not in self._held:
                a, b = self.reader.tensor(factors.a), self.reader.tensor(factors.b)
                self._held[key] = (a.T.contiguous(), b.T.contiguous()) if factors.transposed else (b, a)
                if len(self._held) > _FACTORS_HELD:
                    self._held.popitem(last=False)
            return self._held[key]


class Product:
    """`scaling * left @ right` of one weight of C columns; with DoRA's magnitude, base's own rows made anew."""

    def __init__(self, factors: _Factors, plan: LowRank, base: Stored | None, *, columns: int) -> None:
        self.grain = _panel_rows(columns) * columns
        self._factors, self._plan, self._base = factors, plan, base
        self._columns = columns
        self._lock = threading.Lock()
        self._ratios: Tensor | None = None

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        start = first // self.grain * self.grain
        panel, base = self._panel(first // self.grain, scratch)
        change = _scaled(self._delta(panel, base, start // self._columns), abs(scale), careful=careful)
        decrement = torch.sub(_ZERO, change, out=change) if scale > 0 else change.add_(_ZERO)  # never -0.0
        inside = slice(first - start, last - start)
        return Change(decrement.view(-1)[inside], None if base is None else base.view(-1)[inside])

    def total(self, first: int, last: int, buffer: Buffer) -> Tensor | None:
        return None

    def announce(self, first: int, last: int) -> None:
        if self._base is not None:
            self._base.announce(first, last)

    def _panel(self, number: int, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
        """Rows of the product and of base, both (R', C) float32."""
        left, right = self._factors.of(self._plan)
        step = self.grain // self._columns
        first, last = number * step, min((number + 1) * step, len(left))
        shape = (last - first, self._columns)
        panel = scratch.change32.floats(shape[0] * shape[1]).view(shape)
        torch.mm(left[first:last], right, out=panel).mul_(self._plan.scaling)
        if self._base is None:
            return panel, None
        start = first * self._columns
        base = self._base.read32(start, start + panel.numel(), scratch.raw, scratch.base32)
        return panel, base.view(shape)

    def _delta(self, panel: Tensor, base: Tensor | None, first_row: int) -> Tensor:
        """The panel itself; for DoRA `magnitude / |base + panel| * (base + panel) - base` (arXiv 2402.09353)."""
        if self._plan.magnitude is None or base is None:
            return panel
        ratios = self._magnitude_ratios(self._plan.magnitude)
        if self._plan.magnitude_axis == 0:
            ratios = ratios[first_row : first_row + len(panel)].unsqueeze(1)
        return panel.add_(base).mul_(ratios).sub_(base)

    def _magnitude_ratios(self, magnitude: TensorInfo) -> Tensor:
        """(R,) or (C,) float32: what DoRA multiplies each row or column by. It takes a pass of its own, once."""
        with self._lock:
            if self._ratios is None:
                self._ratios = self._factors.reader.tensor(magnitude).view(-1) / self._norms()
            return self._ratios

    def _norms(self) -> Tensor:
        scratch = Scratch()
        rows = len(self._factors.of(self._plan)[0])
        squares = []
        for number in range(-(-rows * self._columns // self.grain)):
            panel, base = self._panel(number, scratch)
            squares.append(panel.add_(base).square_().sum(1 - self._plan.magnitude_axis))  # type: ignore[arg-type]
        return (torch.cat(squares) if self._plan.magnitude_axis == 0 else torch.stack(squares).sum(0)).sqrt()


def _panel_rows(columns: int) -> int:
    """A multiple of 16 where a panel holds as many."""
    rows = max(1, PANEL_ELEMENTS // columns)
    return rows if rows < _PANEL_ROWS else rows - rows % _PANEL_ROWS
