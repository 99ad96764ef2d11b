"""`stored = round(instruct + scale * delta)` over one chunk, and what the rounding took.

What is computed with is the *decrement*, `-scale * delta`, and it is subtracted. The sum is the same to the bit but for
one thing: `-0.0 - (+0.0)` is `-0.0`, while `-0.0 + (+0.0)` is `+0.0`. So an element without an update keeps its bits
without a mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from worker.weights import kernels
from worker.weights.figures import Sums
from worker.weights.kernels import Array
from worker.weights.tensors import BF16, F16, F32, Buffer, rounded, widened

#: The bits, as `kernels.add` returns them, of the smallest sum that a dtype does not hold: it is rounded to infinity.
_TOO_LARGE = {F32: 0x7F800000, BF16: 0x7F7F8000, F16: 0x477FF000}


class Change(NamedTuple):
    """What a delta says of one chunk of n elements."""

    #: (n,) float32: -scale * delta, where nothing changes +0.0.
    decrement: Array
    #: (n,), as the kernels take it: base's own values, where they are known.
    base: Array | None = None


class NotFinite(Exception):
    """An element has an update, and the sum is not a finite number of the output's dtype."""


def add(kept: Array, change: Change, out: Array, spare: Buffer, *, total: Array | None, measure: bool) -> Sums | None:
    """Write `kept + update` to `out`, (n,) of the output's dtype, rounded once. `kept` is (n,), as the kernels take it.

    `total` is the sum where it is known without arithmetic: the tuned values, if Instruct is base's own.
    None: the chunk holds values that need `add_carefully`, and what `out` holds is not to be used.
    """
    made = _made_in(out, spare)
    largest = kernels.add(kept, change.decrement, made) if total is None else kernels.store(total, made)
    if largest >= _TOO_LARGE[out.dtype]:
        return None
    if made is not out:
        np.copyto(out, made, casting="same_kind")  # where `out` is float16 this rounds
    if not measure:
        return Sums()
    if out.dtype == F16:
        np.copyto(made, out)
    sums = Sums(*kernels.figures(kept, change.decrement, change.base, made))
    return sums if math.isfinite(sum(sums)) else None


def convert(values: Array, out: Array, spare: Buffer) -> bool:
    """Write `values`, (n,) as the kernels take them, to `out`, bfloat16 or float32, rounded once.

    False: a finite one is too large for the dtype of `out`.
    """
    made = _made_in(out, spare)
    largest = kernels.store(values, made)
    if made is not out:
        np.copyto(out, made)
    if largest < _TOO_LARGE[out.dtype]:
        return True
    return bool((np.isfinite(widened(out)) | ~np.isfinite(widened(values))).all())


def _made_in(out: Array, spare: Buffer) -> Array:
    """`out` itself where a kernel can write it: no float16, and not at an odd place of a file."""
    if out.dtype != F16 and out.flags.aligned:
        return out
    return spare.view(F32 if out.dtype == F16 else out.dtype, len(out))[0]


def add_carefully(kept: Array, change: Change, out: Array, *, total: Array | None, measure: bool) -> Sums:
    """`add` for chunks with NaN, infinities or enormous values: those of Instruct that have no update keep their bits.

    For every other element the arithmetic is that of `add`. `kept` is as stored. Raises NotFinite.
    """
    kept32 = widened(kept)
    with np.errstate(all="ignore"):
        exact = kept32 - change.decrement if total is None else widened(total)
    stored = rounded(exact, out.dtype)
    untouched = ~np.isfinite(kept32) & (change.decrement == 0)
    if not (np.isfinite(widened(stored)) | untouched).all():
        raise NotFinite
    out[:] = np.where(untouched, kept if kept.dtype == out.dtype else rounded(kept32, out.dtype), stored)
    if not measure:
        return Sums()
    finite = np.where(untouched, 0, kept32)
    base = None if change.base is None else widened(change.base)
    if base is not None:
        base = np.where(np.isfinite(base), base, finite)
    sums = Sums(*kernels.figures(finite, change.decrement, base, np.where(untouched, 0, widened(stored))))
    if not math.isfinite(sum(sums)):
        raise NotFinite
    return sums


def change_squares(change: Change) -> float:
    """The sum of the squares of a change that is not applied; not finite where an element is not."""
    return kernels.squares(change.decrement)
