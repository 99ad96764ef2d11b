"""`stored = round(instruct + scale * delta)` over one chunk, and what the rounding took.

What is computed with is the *decrement*, `-scale * delta`, and it is subtracted. The sum is the same to the bit but for
one thing: `-0.0 - (+0.0)` is `-0.0`, while `-0.0 + (+0.0)` is `+0.0`. So an element without an update keeps its bits
without a mask, which would cost more than all the rest together (measured: 3.6 ns an element against 1.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.weights.figures import Sums
from worker.weights.tensors import Scratch

#: No element of a chunk whose squares sum to less can overflow on its way to the output.
_SAFE_SQUARES = {torch.float16: 65504.0**2, torch.bfloat16: math.inf, torch.float32: math.inf}
#: Sums of squares outside it may have lost terms in float32.
_SMALL, _LARGE = 1e-30, 1e30


@dataclass(frozen=True)
class Change:
    """What a delta says of one chunk of n elements. Who takes it may use up its memory."""

    #: (n,) float32: -scale * delta, where nothing changes +0.0.
    decrement: Tensor
    #: (n,) float32: base's own values, where they are known.
    base: Tensor | None = None


class NotFinite(Exception):
    """An element has an update, and the sum is not a finite number of the output's dtype."""


def add(
    kept: Tensor, change: Change, out: Tensor, scratch: Scratch, *, total: Tensor | None, measure: bool
) -> Sums | None:
    """Write `kept + update` to `out`, (n,) of the output's dtype, rounded once. `kept` is (n,) as stored.

    `total` is the sum where it is known without arithmetic: the tuned values, if Instruct is base's own.
    None: the chunk holds values that need `add_carefully`, and what `out` holds is not to be used.
    """
    kept32 = scratch.kept32.floats(len(kept)).copy_(kept)
    sums = _sums(kept32, change) if measure else Sums()
    to_float = out.dtype == torch.float32
    exact = torch.sub(kept32, change.decrement, out=out if to_float else scratch.base32.floats(len(kept)))
    if total is not None:
        exact.copy_(total)
    if not to_float:
        out.copy_(exact)
    if not measure:
        return sums if float(torch.dot(exact, exact)) < _SAFE_SQUARES[out.dtype] else None
    error = _error(out if to_float else exact.copy_(out), kept32, change.decrement)
    return sums._replace(error=error) if math.isfinite(error) else None


def _sums(kept32: Tensor, change: Change) -> Sums:
    """All but the error. Uses up base's values."""
    update, squares = _squares(change.decrement), _squares(kept32)
    if change.base is None:
        return Sums(update=update, kept=squares)
    gap = torch.sub(kept32, change.base, out=change.base)  # instruct - base
    return Sums(update=update, kept=squares, towards=-_dot(change.decrement, gap), gap=_squares(gap))


def _error(stored: Tensor, kept: Tensor, decrement: Tensor) -> float:
    """Sum of the squares of `stored - (kept + update)`. Uses up `kept`.

    Not `stored - sum`: the sum itself is rounded, and what that took would be overlooked. `stored - kept` is exact
    where the two are within a factor of two (Sterbenz), which an update that rounding can harm leaves them.
    """
    return _squares(torch.sub(stored, kept, out=kept).add_(decrement))


def add_carefully(kept: Tensor, change: Change, out: Tensor, *, total: Tensor | None, measure: bool) -> Sums:
    """`add` for chunks with NaN, infinities or enormous values: those of Instruct that have no update keep their bits.

    For every other element the arithmetic is that of `add`. Raises NotFinite.
    """
    kept32 = kept.float()
    stored = (kept32 - change.decrement if total is None else total).to(out.dtype)
    untouched = ~torch.isfinite(kept32) & (change.decrement == 0)
    if not bool((torch.isfinite(stored) | untouched).all()):
        raise NotFinite
    out.copy_(torch.where(untouched, kept.to(out.dtype), stored))
    if not measure:
        return Sums()
    finite = torch.where(untouched, 0.0, kept32)
    base = None if change.base is None else torch.where(torch.isfinite(change.base), change.base, finite).double()
    wide = Change(change.decrement.double(), base)
    sums = _sums(finite.double(), wide)
    return sums._replace(error=_error(torch.where(untouched, 0.0, out.double()), finite.double(), wide.decrement))


def change_squares(change: Change) -> float:
    """Of a change that is not applied: the sum of its squares. Raises NotFinite."""
    squares = _squares(change.decrement)
    if not math.isfinite(squares):
        raise NotFinite
    return squares


def _squares(values: Tensor) -> float:
    return _dot(values, values)


def _dot(one: Tensor, two: Tensor) -> float:
    found = float(torch.dot(one, two))
    if one.dtype == torch.float64 or _SMALL < abs(found) < _LARGE:
        return found
    return float(torch.dot(one.double(), two.double()))
