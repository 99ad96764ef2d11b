"""What a graft changed and what rounding took of it: sums gathered in the pass over the bytes, and figures from them.

Every sum is float64, over one chunk, and the chunks' sums are added up exactly (math.fsum): neither the order in which
threads finish nor a resumed run changes a figure. Where another layout cuts chunks elsewhere, figures differ by about
1e-15 of themselves.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from core.graft_plan import listed

#: Below it, the owner is told that storage ate a part of the training (full tuning at a rate of 1e-5, stored in
#: bfloat16, can lose a third and more).
LOW_FIDELITY = 0.9

T = TypeVar("T")

_LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")


class Sums(NamedTuple):
    """Over some elements; u is scale * delta."""

    #: u²
    update: float = 0.0
    #: (stored - (instruct + u))²
    error: float = 0.0
    #: instruct²
    kept: float = 0.0
    #: u * (instruct - base)
    towards: float = 0.0
    #: (instruct - base)²
    gap: float = 0.0


@dataclass(frozen=True)
class Figures:
    """Of the grafted tensors of one layer or of one module."""

    tensors: int
    #: `1 - |stored - exact| / |scale * delta|` (L2); 1 where there was nothing to add. Below 0 where rounding moved the
    #: weights by more than the change does; in words that is none of it.
    fidelity: float
    #: `|scale * delta| / |instruct|` (L2); None where Instruct's weights are all zero.
    relative_norm: float | None
    #: Of the update and (instruct - base); None where base is not known or is Instruct itself.
    cosine: float | None


@dataclass(frozen=True)
class Measurement:
    """All figures of a graft; None and empty where measuring was not asked for."""

    fidelity: float | None
    #: The grafted tensor that keeps least of its update; None where there was nothing to add.
    worst_tensor: str | None
    worst_fidelity: float | None
    #: Share of the whole change (L2) that the selection left out; None at scale 0, and where that is no finite number.
    discarded_share: float | None
    relative_norm: float | None
    cosine: float | None
    #: Tensors that differ from Instruct's by an update, and all others; unmeasured: that the graft reaches.
    grafted: int
    copied: int
    #: By the layer's number; tensors outside the layers are in none.
    layers: dict[str, Figures]
    #: By the module's name, such as `q_proj`.
    modules: dict[str, Figures]
    #: Harmless differences between the models, and what is wrong with a change that was left out; in words.
    remarks: tuple[str, ...]

    @classmethod
    def none(cls, *, grafted: int, tensors: int, remarks: tuple[str, ...]) -> Measurement:
        return cls(None, None, None, None, None, None, grafted, tensors - grafted, {}, {}, remarks)


class Tally:
    """Collects what the threads measure. Adding to a list is atomic, and nothing is summed before the end."""

    def __init__(self) -> None:
        self._chunks: dict[str, list[Sums]] = defaultdict(list)
        self._discarded: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, sums: Sums) -> None:
        self._chunks[name].append(sums)

    def add_discarded(self, name: str, squares: float) -> None:
        """`squares` may be infinite: the tuning has diverged in a part that the graft does not take."""
        self._discarded[name].append(squares)

    def of(self, names: Iterable[str]) -> dict[str, Any]:
        """The sums of finished tensors, as JSON for `restore`; from here on nothing else is kept of them."""
        here = list(names)
        kept = {
            "grafted": {name: _total(self._chunks[name]) for name in here if name in self._chunks},
            "discarded": {name: _finite(math.fsum(self._discarded[name])) for name in here if name in self._discarded},
        }
        self.restore(kept)
        return kept

    def restore(self, kept: Mapping[str, Any]) -> None:
        self._chunks.update({name: [Sums(*sums)] for name, sums in kept["grafted"].items()})
        discarded = kept["discarded"].items()
        self._discarded.update({name: [math.inf if squares is None else squares] for name, squares in discarded})

    def measurement(self, *, scale: float, tensors: int, remarks: tuple[str, ...]) -> Measurement:
        """`remarks` are what was remarkable before the pass."""
        totals = {name: _total(chunks) for name, chunks in self._chunks.items()}
        totals = {name: sums for name, sums in sorted(totals.items()) if sums.update}
        whole = _figures(totals.values())
        worst = min(totals, key=lambda name: _fidelity(totals[name]), default=None)
        return Measurement(
            fidelity=whole.fidelity,
            worst_tensor=worst,
            worst_fidelity=_fidelity(totals[worst]) if worst else 1.0,
            discarded_share=self._discarded_share(scale, _total(totals.values())),
            relative_norm=whole.relative_norm,
            cosine=whole.cosine,
            grafted=len(totals),
            copied=tensors - len(totals),
            layers=_grouped(totals, layer_of),
            modules=_grouped(totals, module_of),
            remarks=(*remarks, *self._diverged()),
        )

    def _discarded_share(self, scale: float, total: Sums) -> float | None:
        if not scale:  # nothing was looked at
            return None
        left_out = math.sqrt(math.fsum(square for squares in self._discarded.values() for square in squares))
        if math.isinf(left_out):
            return None
        whole = math.hypot(left_out, math.sqrt(total.update) / abs(scale))
        return left_out / whole if whole else 0.0

    def _diverged(self) -> list[str]:
        names = sorted(name for name, squares in self._discarded.items() if math.inf in squares)
        if not names:
            return []
        return [f"the change of {listed(names)}, which is left out, is not a finite number: has the tuning diverged?"]


def layer_of(name: str) -> str | None:
    found = _LAYER.search(f".{name}")
    return found[1] if found else None


def module_of(name: str) -> str:
    """`q_proj` for `model.layers.0.self_attn.q_proj.weight`; fused experts are parameters without `.weight`."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


def remedy(kind: Literal["full", "lora", "delta"], output_dtype: str) -> str:
    """What helps where the fidelity is low."""
    whole = (
        "the unmerged adapter, loaded on the instruct model"
        if kind == "lora"
        else "the delta kept as files of its own (a job's `publish.delta`, `--delta-out` of `shadowft graft`)"
    )
    wider = "" if output_dtype == "float32" else "an output in float32, or "
    return f"The rest is lost to rounding in the output's dtype; {wider}{whole}, keeps all of it."


def by_group(sums: Mapping[str, T], key: Callable[[str], str | None]) -> dict[str, list[T]]:
    """What was summed of each tensor, under the key of its name, in natural order; None as a key leaves it out."""
    groups: dict[str, list[T]] = defaultdict(list)
    for name, one in sums.items():
        group = key(name)
        if group is not None:
            groups[group].append(one)
    return {group: groups[group] for group in sorted(groups, key=_natural)}


def _grouped(totals: Mapping[str, Sums], key: Callable[[str], str | None]) -> dict[str, Figures]:
    return {group: _figures(found) for group, found in by_group(totals, key).items()}


def _natural(group: str) -> tuple[int, str]:
    return (int(group), "") if group.isdecimal() else (0, group)


def _figures(sums: Iterable[Sums]) -> Figures:
    found = list(sums)
    total = _total(found)
    return Figures(
        tensors=len(found),
        fidelity=_fidelity(total),
        relative_norm=math.sqrt(total.update / total.kept) if total.kept else (None if total.update else 0.0),
        cosine=total.towards / math.sqrt(total.update * total.gap) if total.update and total.gap else None,
    )


def _finite(value: float) -> float | None:
    """JSON has no word for infinity."""
    return value if math.isfinite(value) else None


def _total(sums: Iterable[Sums]) -> Sums:
    columns = zip(*sums, strict=True)
    return Sums(*(math.fsum(column) for column in columns))


def _fidelity(sums: Sums) -> float:
    return 1.0 - math.sqrt(sums.error / sums.update) if sums.update else 1.0
