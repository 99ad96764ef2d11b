"""What tuning changed, as float32 rows for any tensor of Instruct.

A `Delta` names its folders; bound to an Instruct checkpoint it has checked that it fits. Both kinds give the same,
so that the graft knows only one: `tuned - base` for full tuning, and `scaling * B @ A` for LoRA, where the base has
cancelled out (Shadow-FT, arXiv 2505.12716).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from core.checkpoints import Checkpoint, read_adapter, read_checkpoint
from core.graft_plan import LoraFactors, plan_graft, plan_lora
from core.job_spec import Scope
from worker.weights.tensors import read_rows, read_tensor


@dataclass(frozen=True)
class BoundDelta:
    """A delta that fits one Instruct checkpoint. A tensor in neither set has the delta zero."""

    #: Instruct's names of the tensors that the graft changes.
    grafted: frozenset[str]
    #: Instruct's names of tensors that tuning may have moved and the scope leaves out.
    discarded: frozenset[str]
    #: `rows(name, first, last)`: rows of the delta of Instruct's tensor `name`, (last - first, C), float32, to be kept.
    rows: Callable[[str, int, int], Tensor]


class Delta(Protocol):
    @property
    def kind(self) -> Literal["full", "lora"]: ...

    @property
    def sources(self) -> tuple[Path, ...]:
        """Every folder it reads."""
        ...

    def bind(self, instruct: Checkpoint, scope: Scope) -> BoundDelta:
        """PairRefused: it does not fit `instruct`, with every reason. InvalidInput: a file of it is damaged."""
        ...


@dataclass(frozen=True)
class FullDelta:
    """`tuned - base`, both subtracted in float32. `base` is the very start of the tuning, token patches included."""

    base: Path
    tuned: Path
    kind: ClassVar[Literal["full"]] = "full"

    @property
    def sources(self) -> tuple[Path, ...]:
        return self.base, self.tuned

    def bind(self, instruct: Checkpoint, scope: Scope) -> BoundDelta:
        base, tuned = read_checkpoint(self.base), read_checkpoint(self.tuned)
        plan = plan_graft(instruct, base, scope=scope)
        base_names = plan.grafted | plan.discarded
        tuned_names = plan_graft(base, tuned, scope="all", words=("base", "tuned base")).grafted

        def rows(name: str, first: int, last: int) -> Tensor:
            base_name = base_names[name]
            start = read_rows(self.base, base.tensors[base_name], first, last)  # (R', C) as stored
            end = read_rows(self.tuned, tuned.tensors[tuned_names[base_name]], first, last)  # (R', C) as stored
            return end.float().sub_(start.float())  # (R', C) float32; equal values give +0.0

        return BoundDelta(frozenset(plan.grafted), frozenset(plan.discarded), rows)


@dataclass(frozen=True)
class LoraDelta:
    """`scaling * B @ A` of a PEFT adapter. The adapter has chosen its modules, so the scope changes nothing."""

    adapter: Path
    kind: ClassVar[Literal["lora"]] = "lora"

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.adapter,)

    def bind(self, instruct: Checkpoint, scope: Scope) -> BoundDelta:
        plan = plan_lora(instruct, read_adapter(self.adapter))
        held: dict[str, tuple[Tensor, Tensor]] = {}  # the factors of the tensor at work, and of no other

        def rows(name: str, first: int, last: int) -> Tensor:
            if name not in held:
                held.clear()
                held[name] = self._factors(plan[name])
            left, right = held[name]
            return (left[first:last] @ right).mul_(plan[name].scaling)  # (R', C) float32

        return BoundDelta(frozenset(plan), frozenset(), rows)

    def _factors(self, factors: LoraFactors) -> tuple[Tensor, Tensor]:
        """(R, r) and (r, C), float32. For a weight stored as (in, out) the product is `A^T @ B^T`."""
        a = read_tensor(self.adapter, factors.a).to(torch.float32)  # (r, in)
        b = read_tensor(self.adapter, factors.b).to(torch.float32)  # (out, r)
        return (a.T, b.T) if factors.transposed else (b, a)
