"""Loops over elements in machine code, without the interpreter's lock (see `loops` and `machine_code`).

They take contiguous, writable arrays of one dimension: float32, or uint16 for the bits of bfloat16, of which numpy does
not know. float16 comes here widened to float32 (see `tensors.Reader.values`). Every call looks whether the dtypes are
such and the arrays of one size, since the loops would read and write beyond the end: TypeError and ValueError, which no
user sees.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.weights.machine_code import Function, function, load
from worker.weights.signatures import ROWS, TILE

Array = NDArray[Any]


def compile_all() -> None:
    """Make the loops' machine code and keep it for every process to come, where it is not kept yet."""
    load()


# --- weights ----------------------------------------------------------------------------------------------------------


def difference(tuned: Array, base: Array, factor: float, decrement: Array) -> None:
    """`decrement = (base - tuned) * factor`, all (n,), in float32; never -0.0."""
    call, places = _over("difference_", tuned, base, decrement)
    call(*places, tuned.size, factor)


def scaled(change: Array, factor: float, decrement: Array) -> None:
    """`decrement = change * factor`, both (n,) and maybe one, in float32; never -0.0."""
    call, places = _over("scaled_", change, decrement)
    call(*places, change.size, factor)


def add(kept: Array, decrement: Array, out: Array) -> int:
    """`out = kept - decrement`, all (n,): subtracted in float32, rounded to `out`'s dtype.

    Returns the largest bits, but for the sign, of the sums before they are rounded: what is as large as infinity's is
    infinity or NaN.
    """
    call, places = _over("add_", kept, decrement, out)
    largest: int = call(*places, out.size)
    return largest


def store(values: Array, out: Array) -> int:
    """`out = values`, both (n,), rounded to `out`'s dtype. Returns what `add` returns."""
    call, places = _over("store_", values, out)
    largest: int = call(*places, out.size)
    return largest


def product(left: Array, tiles: Array, scaling: float, factor: float, first: int, out: Array) -> None:
    """`out = (left @ right) * scaling * factor`, (n, C) float32, for the rows from `first` on; never -0.0. `left` and
    `tiles` are from `pack`.

    Each element is summed in the order of the ranks, from 0.0, by fused multiply-add, as the BLAS libraries do it for
    ranks of some hundreds: neither the rows made at once nor the processor can change a bit of it.
    """
    (rows, columns), rank = out.shape, left.shape[1]
    if first < 0 or first + rows > len(left) or tiles.shape != (-(-columns // TILE), rank * TILE):
        raise ValueError(f"No product of {left.shape} and {tiles.shape} has {rows} rows from {first} of {columns}")
    packed, edge = np.empty((rows + ROWS) * rank, np.float32), np.empty(ROWS * TILE, np.float32)
    call, places = _for("product_", left, tiles, packed, edge, out)
    call(*places, first, rank, rows, columns, scaling, factor)


def pack(left: Array, right: Array) -> tuple[Array, Array]:
    """(R, r) and (r, C) float32 as `product` wants them: (R, r), and (C / TILE, r * TILE), the columns in tiles, with
    zeros where the last goes beyond the end."""
    rank, columns = right.shape
    wide = np.zeros((rank, columns + -columns % TILE), np.float32)
    wide[:, :columns] = right
    tiles = wide.reshape(rank, -1, TILE).transpose(1, 0, 2)
    return np.ascontiguousarray(left, np.float32), np.ascontiguousarray(tiles).reshape(-1, rank * TILE)


# --- sums -------------------------------------------------------------------------------------------------------------


def figures(
    kept: Array, decrement: Array, base: Array | None, stored: Array
) -> tuple[float, float, float, float, float]:
    """The five sums of `figures.Sums` over (n,) elements, u being `-decrement`; those with base are 0 without it."""
    sums = np.empty(5)
    if base is None:
        call, places = _over("figures_alone_", kept, decrement, stored, also=sums)
    else:
        call, places = _over("figures_", kept, decrement, base, stored, also=sums)
    call(*places, kept.size)
    update, error, squared, towards, gap = sums.tolist()
    return update, error, squared, towards, gap


def squares(values: Array) -> float:
    """The sum of the squares of (n,) elements."""
    call, places = _over("squares_", values)
    found: float = call(*places, values.size)
    return found


def distance(one: Array, other: Array) -> tuple[float, float, float]:
    """Sums over (n,) elements: |one - other|, |one|, |other|."""
    sums = np.empty(3)
    call, places = _over("distance_", one, other, also=sums)
    call(*places, one.size)
    gap, first, second = sums.tolist()
    return gap, first, second


def add_squares(values: Array, by_row: bool, sums: Array) -> None:
    """Add the squares of (R, C) float32 values to `sums`, float64: (R,) by row, or (C,) by column. In the order of the
    rows, and of the columns in them, so that whoever comes piece by piece gets the same."""
    rows, columns = values.shape
    if sums.shape != (rows if by_row else columns,):
        raise ValueError(f"{sums.shape} are not the sums of {values.shape}")
    call, places = _for("add_squares_", values, sums)
    call(*places, rows, columns, by_row)


# --- calls ------------------------------------------------------------------------------------------------------------


def _over(name: str, *arrays: Array, also: Array | None = None) -> tuple[Function, list[Any]]:
    """The loop for arrays that have one size, and their places; `also` takes its sums."""
    size = arrays[0].size
    for array in arrays:
        if array.size != size:
            raise ValueError(f"{name}: the arrays have {[each.size for each in arrays]} elements")
    return _for(name, *arrays) if also is None else _for(name, *arrays, also)


def _for(name: str, *arrays: Array) -> tuple[Function, list[Any]]:
    symbol = name
    for array in arrays:
        symbol += array.dtype.char
    try:
        return function(symbol), [_place(array) for array in arrays]
    except KeyError:
        raise TypeError(f"{name}: no loop is for {[str(array.dtype) for array in arrays]}") from None


#: An array's memory, for a C function. It refuses what is not contiguous or only to be read; an array's own
#: `ctypes.data` takes five times as long (measured), and there are thousands of calls.
_place: Callable[[Any], Any] = (ctypes.c_char * 0).from_buffer
