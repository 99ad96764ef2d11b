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

import numpy as np

from core.adapter_plan import AdapterPlan, LowRank, Replacement, plan_adapter
from core.checkpoints import Checkpoint, TensorInfo, read_adapter, read_checkpoint, read_delta
from core.errors import PairRefused
from core.graft_plan import GraftPlan, Selection, listed, plan_graft, plan_saved, plan_tuning
from worker.weights import kernels, tensors
from worker.weights.arithmetic import Change
from worker.weights.kernels import Array
from worker.weights.signatures import ROWS
from worker.weights.special_rows import (
    StartRows,
    read_start_rows,
    require_fitting_rows,
    require_rows_of_a_vocabulary,
    row_numbers,
)
from worker.weights.tensors import F32, Reader, Scratch, Slot, widened

Kind = Literal["full", "lora", "delta"]

#: Tensors whose factors are kept in memory: blocks of a few tensors are at work at once, two in each shard.
_FACTORS_HELD = 8


class TensorChange(Protocol):
    """The delta of one tensor."""

    #: Chunks begin at multiples of so many elements: for speed, not for the result.
    grain: int

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        """The change of the flattened elements `first` to `last`, in `scratch`'s memory.

        `careful`: elements that are the same NaN or infinity before and after the tuning have no update.
        """
        ...

    def total(self, first: int, last: int, scratch: Scratch) -> Array | None:
        """The tuned values, if Instruct's tensor holds base's own values: the graft at scale 1."""
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
        tuning = plan_tuning(base, tuned)
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

    def values(self, first: int, last: int, slot: Slot) -> Array:
        """As the kernels take them."""
        return self.reader.values(self.info, first, last, slot)

    def announce(self, first: int, last: int) -> None:
        self.reader.announce(self.info, first, last)


@dataclass(frozen=True)
class Patched(Stored):
    """A tensor of (R, C) with rows of (C,) float32 in place of those that are stored."""

    rows: Mapping[int, Array]

    def values(self, first: int, last: int, slot: Slot) -> Array:
        found = super().values(first, last, slot)
        columns = self.info.shape[1]
        here = [number for number in self.rows if number * columns < last and first < (number + 1) * columns]
        if not here:
            return found
        wide = slot.wide.floats(last - first)
        if wide is not found:
            kernels.store(found, wide)
        for number in here:
            start, end = max(first, number * columns), min(last, (number + 1) * columns)
            row = self.rows[number]
            wide[start - first : end - first] = row[start - number * columns : end - number * columns]
        return wide


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
        tuned = self._tuned.values(first, last, scratch.tuned)
        base = self._base.values(first, last, scratch.base)
        decrement = scratch.change.floats(last - first)
        if careful:
            tuned32, base32 = widened(tuned), widened(base)
            with np.errstate(all="ignore"):
                same = (tuned32 == base32) | (np.isnan(tuned32) & np.isnan(base32))
                _scale_carefully(np.where(same, 0, base32 - tuned32), scale, decrement)
        else:
            kernels.difference(tuned, base, scale, decrement)
        return Change(decrement, base)

    def total(self, first: int, last: int, scratch: Scratch) -> Array | None:
        """Asked of the whole tensor and not of single elements, which would cost a mask (see `arithmetic`)."""
        with self._lock:
            if self._same is None:
                self._same = self._compare()
        return self._tuned.values(first, last, scratch.total) if self._same else None

    def announce(self, first: int, last: int) -> None:
        self._base.announce(first, last)
        self._tuned.announce(first, last)

    def _compare(self) -> bool:
        return _same_values(self._instruct, self._base, self._elements)


def _same_values(one: Stored, two: Stored, elements: int) -> bool:
    """Whether the first `elements` of both are the same, bit for bit."""
    slots = Slot(), Slot()
    for first in range(0, elements, tensors.CHUNK_ELEMENTS):
        last = min(first + tensors.CHUNK_ELEMENTS, elements)
        if not _same_bits(one.values(first, last, slots[0]), two.values(first, last, slots[1])):
            return False
    return True


def _same_bits(one: Array, two: Array) -> bool:
    """In float32, which holds every value, where only one of the two is float32."""
    if one.dtype != two.dtype:
        one, two = widened(one), widened(two)
    return np.array_equal(one.view(np.uint8), two.view(np.uint8))


class SavedChange:
    """A difference that was stored in float32."""

    def __init__(self, delta: Stored) -> None:
        self.grain = tensors.CHUNK_ELEMENTS
        self._delta = delta

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        decrement = scratch.change.floats(last - first)
        _scale(self._delta.values(first, last, scratch.tuned), -scale, decrement, careful=careful)
        return Change(decrement)

    def total(self, first: int, last: int, scratch: Scratch) -> Array | None:
        return None

    def announce(self, first: int, last: int) -> None:
        self._delta.announce(first, last)


def _scale(change: Array, factor: float, decrement: Array, *, careful: bool) -> None:
    """`decrement = change * factor`; the two may be one."""
    if careful:
        _scale_carefully(widened(change), factor, decrement)
    else:
        kernels.scaled(change, factor, decrement)


def _scale_carefully(change: Array, factor: float, decrement: Array) -> None:
    """No change stays none, also where the factor is beyond float32."""
    with np.errstate(all="ignore"):
        np.copyto(decrement, np.where(change == 0, 0, change * np.float32(factor)) + np.float32(0))


def common_elements(info: TensorInfo, common_rows: Mapping[str, int]) -> int:
    """Of Instruct's tensor: those that take part."""
    if info.name not in common_rows:
        return info.elements
    return common_rows[info.name] * (info.elements // info.shape[0])


# --- LoRA -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoraDelta:
    """What a PEFT adapter adds. `base` is read where DoRA and whole modules need it, and for the cosine.

    Rows of base in whose place the tuning began with others lie in `adapter`, as for full tuning.
    """

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
        rows = read_start_rows(self.adapter)
        if base is not None:
            require_fitting_rows(rows, base, self.adapter)
        else:
            require_rows_of_a_vocabulary(rows, instruct, self.adapter)
        _refuse_unlike_twins(plan, self.adapter)
        readers = {role: Reader(folder) for role, folder in self.sources.items()}
        changes = _Changes(instruct, plan, reader, _Factors(readers["adapter"]), readers.get("base"), rows)
        return BoundDelta(
            grafted={name: changes.of(name, found) for name, found in plan.grafted.items()},
            discarded={name: changes.of(name, found) for name, found in plan.discarded.items()},
            common_rows=plan.common_rows,
            remarks=plan.remarks,
            readers=readers,
            checkpoints={"adapter": adapter.tensors} | ({"base": base.tensors} if base else {}),
            start_rows=row_numbers(rows),
        )


def _refuse_unlike_twins(plan: AdapterPlan, folder: Path) -> None:
    """Of a base that does not tie its head PEFT trains two changes, also where it was told to tie them."""
    reader = Reader(folder)
    try:
        unlike = [name for name, twin in plan.twins.items() if not _is_same(plan.grafted[name], twin, reader)]
    finally:
        reader.close()
    remedy = "graft it onto a model that does not, or leave the tensor out with --exclude"
    if unlike:
        raise PairRefused(
            [
                f"the adapter's two changes of {name} differ, and instruct ties the ends to one tensor: {remedy} {name}"
                for name in unlike
            ]
        )


def _is_same(one: LowRank | Replacement, two: LowRank | Replacement, reader: Reader) -> bool:
    if isinstance(one, LowRank) and isinstance(two, LowRank):
        return all(map(np.array_equal, _read_factors(one, reader), _read_factors(two, reader)))
    if isinstance(one, Replacement) and isinstance(two, Replacement) and one.tensor.shape == two.tensor.shape:
        return _same_values(Stored(reader, one.tensor), Stored(reader, two.tensor), one.tensor.elements)
    return False


def _read_factors(factors: LowRank, reader: Reader) -> tuple[Array, Array]:
    """(R, r) and (r, C), whose product is the change as it is stored: of (in, out) that is `A^T @ B^T`."""
    a, b = reader.tensor(factors.a), reader.tensor(factors.b)
    return (a.T, b.T) if factors.transposed else (b, a)


@dataclass(frozen=True)
class _Changes:
    """Makes the change of each tensor that an adapter names."""

    instruct: Checkpoint
    plan: AdapterPlan
    reader: Reader
    factors: _Factors
    base: Reader | None
    rows: StartRows

    def of(self, name: str, found: LowRank | Replacement) -> TensorChange:
        info = self.instruct.tensors[name]
        base = None
        if self.base is not None and found.base is not None:
            base = _start(Stored(self.base, found.base), self.rows)
        if isinstance(found, LowRank):
            return Product(self.factors, found, base, columns=info.shape[-1])
        assert base is not None  # noqa: S101 - the plan refuses whole modules without base
        saved = Stored(self.factors.reader, found.tensor)
        elements = common_elements(info, self.plan.common_rows)
        return Difference(Stored(self.reader, info), base, saved, elements=elements)


class _Factors:
    """The factors of the tensors at work, as `kernels.product` takes them; those of finished tensors are let go."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._held: OrderedDict[str, tuple[Array, Array]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, factors: LowRank) -> tuple[Array, Array]:
        """Of (R, r) and (r, C)."""
        key = factors.a.name
        with self._lock:
            if key not in self._held:
                self._held[key] = kernels.pack(*_read_factors(factors, self.reader))
                if len(self._held) > _FACTORS_HELD:
                    self._held.popitem(last=False)
            return self._held[key]


class Product:
    """`scaling * left @ right` of one weight of C columns; with DoRA's magnitude, base's own rows made anew."""

    def __init__(self, factors: _Factors, plan: LowRank, base: Stored | None, *, columns: int) -> None:
        self._rows = plan.a.shape[1] if plan.transposed else plan.b.shape[0]
        self._columns = columns
        self.grain = _rows_at_once(columns) * columns
        self._factors, self._plan, self._base = factors, plan, base
        self._lock = threading.Lock()
        self._ratios: Array | None = None

    def read(self, first: int, last: int, scale: float, scratch: Scratch, *, careful: bool) -> Change:
        """Of the rows that the elements lie in."""
        start, end = first // self._columns, -(-last // self._columns)
        base = None
        if self._base is not None:
            base = self._base.values(start * self._columns, end * self._columns, scratch.base)
        if careful or self._plan.magnitude is not None:
            decrement = self._panel(start, end, 1.0, scratch)
            if base is not None and self._plan.magnitude is not None:
                self._remake(decrement, widened(base).reshape(decrement.shape), start)
            _scale(decrement.reshape(-1), -scale, decrement.reshape(-1), careful=careful)
        else:
            decrement = self._panel(start, end, -scale, scratch)
        inside = slice(first - start * self._columns, last - start * self._columns)
        return Change(decrement.reshape(-1)[inside], None if base is None else base[inside])

    def total(self, first: int, last: int, scratch: Scratch) -> Array | None:
        return None

    def announce(self, first: int, last: int) -> None:
        if self._base is not None:
            self._base.announce(first, last)

    def _panel(self, start: int, end: int, factor: float, scratch: Scratch) -> Array:
        """The rows `start` to `end` of the product by `factor`, (n, C)."""
        left, tiles = self._factors.of(self._plan)
        panel = scratch.change.floats((end - start) * self._columns).reshape(end - start, self._columns)
        kernels.product(left, tiles, self._plan.scaling, factor, start, panel)
        return panel

    def _remake(self, panel: Array, base: Array, start: int) -> None:
        """DoRA: `magnitude / |base + panel| * (base + panel) - base`, in the place of the panel (arXiv 2402.09353)."""
        ratios = self._magnitude_ratios()
        if self._plan.magnitude_axis == 0:
            ratios = ratios[start : start + len(panel), np.newaxis]
        with np.errstate(all="ignore"):
            panel += base
            panel *= ratios
            panel -= base

    def _magnitude_ratios(self) -> Array:
        """(R,) or (C,) float32: what DoRA multiplies each row or column by. It takes a pass of its own, once."""
        assert self._plan.magnitude is not None  # noqa: S101 - who asks has looked
        with self._lock:
            if self._ratios is None:
                with np.errstate(all="ignore"):
                    self._ratios = self._factors.reader.tensor(self._plan.magnitude).reshape(-1) / self._norms()
            return self._ratios

    def _norms(self) -> Array:
        assert self._base is not None  # noqa: S101 - the plan refuses DoRA without base
        by_row = self._plan.magnitude_axis == 0
        sums, scratch = np.zeros(self._rows if by_row else self._columns), Scratch()
        at_once = self.grain // self._columns
        for start in range(0, self._rows, at_once):
            end = min(start + at_once, self._rows)
            panel = self._panel(start, end, 1.0, scratch)
            base = widened(self._base.values(start * self._columns, end * self._columns, scratch.base))
            with np.errstate(all="ignore"):
                panel += base.reshape(panel.shape)
            kernels.add_squares(panel, by_row, sums[start:end] if by_row else sums)
        with np.errstate(all="ignore"):
            return np.sqrt(sums).astype(F32)


def _rows_at_once(columns: int) -> int:
    """As many as a chunk has, in the steps of the product."""
    rows = max(1, tensors.CHUNK_ELEMENTS // columns)
    return rows if rows < ROWS else rows - rows % ROWS
