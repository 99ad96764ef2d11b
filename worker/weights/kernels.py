"""Loops over elements in machine code, without the interpreter's lock (see `loops` and `machine_code`).

They take contiguous, aligned arrays of one dimension: float32, or uint16 for the bits of bfloat16, of which numpy does
not know. float16 comes here widened to float32 (see `tensors.Reader.values`). Every call looks whether the dtypes are
such and the arrays of one size, since the loops would read and write beyond the end: TypeError and ValueError, which no
user sees.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from worker.weights.machine_code import ROWS, TILE, Function, function, load

Array = NDArray[Any]


def compile_all() -> None:
    """Make the loops' machine code and keep it for every process to come, where it is not kept yet."""
    load()


# --- weights ----------------------------------------------------------------------------------------------------------


def difference(tuned: Array, base: Array, factor: float, decrement: Array) -> None:
    """`decrement = (base - tuned) * factor`, all (n,), in float32; never -0.0."""
    _over("difference", tuned, base, decrement)(*_places(tuned, base, decrement), tuned.size, factor)


def scaled(change: Array, factor: float, decrement: Array) -> None:
    """`decrement = change * factor`, both (n,) and maybe one, in float32; never -0.0."""
    _over("scaled", change, decrement)(*_places(change, decrement), change.size, factor)


def add(kept: Array, decrement: Array, out: Array) -> int:
    """`out = kept - decrement`, all (n,): subtracted in float32, rounded to `out`'s dtype.

    Returns the largest bits, but for the sign, of the sums before they are rounded: what is as large as infinity's is
    infinity or NaN.
    """
    largest: int = _over("add", kept, decrement, out)(*_places(kept, decrement, out), out.size)
    return largest


def store(values: Array, out: Array) -> int:
    """`out = values`, both (n,), rounded to `out`'s dtype. Returns what `add` returns."""
    largest: int = _over("store", values, out)(*_places(values, out), out.size)
    return largest


def product(left: Array, tiles: Array, scaling: float, factor: float, first: int, out: Array) -> None:
    """`out = (left @ right) * scaling * factor`, (n, C) float32, for the rows from `first` on; never -0.0. `left` and
    `tiles` are from `pack`.

    Each element is summed in the order of the ranks, from 0.0, by fused multiply-add, as the BLAS libraries do it for
    ranks of some hundreds: neither the rows made at once nor the processor can change a bit of it.
    """
    (rows, columns), rank = out.shape, left.shape[1]
    sums = np.empty(ROWS * TILE, np.float32)
    if first < 0 or first + rows > len(left) - ROWS + 1 or tiles.shape != (-(-columns // TILE), rank * TILE):
        raise ValueError(f"No product of {left.shape} and {tiles.shape} has {rows} rows from {first} of {columns}")
    call = _for("product", left, tiles, sums, out)
    call(*_places(left, tiles, sums, out), first, rank, rows, columns, scaling, factor)


def pack(left: Array, right: Array) -> tuple[Array, Array]:
    """(R, r) and (r, C) float32 as `product` wants them, with zeros where its steps go beyond the end.

    (R + 7, r), and (C / TILE, r * TILE): the columns in tiles.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    padded = np.zeros((rows + ROWS - 1, rank), np.float32)
    padded[:rows] = left
    wide = np.zeros((rank, columns + -columns % TILE), np.float32)
    wide[:, :columns] = right
    tiles = wide.reshape(rank, -1, TILE).transpose(1, 0, 2)
    return padded, np.ascontiguousarray(tiles).reshape(-1, rank * TILE)


# --- sums -------------------------------------------------------------------------------------------------------------


def figures(
    kept: Array, decrement: Array, base: Array | None, stored: Array
) -> tuple[float, float, float, float, float]:
    """The five sums of `figures.Sums` over (n,) elements, u being `-decrement`; those with base are 0 without it."""
    sums = np.empty(5)
    if base is None:
        call = _over("figures_alone", kept, decrement, stored, also=sums)
        call(*_places(kept, decrement, stored, sums), kept.size)
    else:
        call = _over("figures", kept, decrement, base, stored, also=sums)
        call(*_places(kept, decrement, base, stored, sums), kept.size)
    update, error, squared, towards, gap = sums.tolist()
    return update, error, squared, towards, gap


def squares(values: Array) -> float:
    """The sum of the squares of (n,) elements."""
    found: float = _over("squares", values)(*_places(values), values.size)
    return found


def distance(one: Array, other: Array) -> tuple[float, float, float]:
    """Sums over (n,) elements: |one - other|, |one|, |other|."""
    sums = np.empty(3)
    _over("distance", one, other, also=sums)(*_places(one, other, sums), one.size)
    gap, first, second = sums.tolist()
    return gap, first, second


def add_squares(values: Array, by_row: bool, sums: Array) -> None:
    """Add the squares of (R, C) float32 values to `sums`, float64: (R,) by row, or (C,) by column. In the order of the
    rows, and of the columns in them, so that whoever comes piece by piece gets the same."""
    rows, columns = values.shape
    if sums.shape != (rows if by_row else columns,):
        raise ValueError(f"{sums.shape} are not the sums of {values.shape}")
    _for("add_squares", values, sums)(*_places(values, sums), rows, columns, by_row)


# --- calls ------------------------------------------------------------------------------------------------------------


def _over(name: str, *arrays: Array, also: Array | None = None) -> Function:
    """The loop for arrays that have one size; `also` takes its sums."""
    if len({array.size for array in arrays}) != 1:
        raise ValueError(f"{name}: the arrays have {[array.size for array in arrays]} elements")
    return _for(name, *arrays) if also is None else _for(name, *arrays, also)


def _for(name: str, *arrays: Array) -> Function:
    for array in arrays:
        if not (array.flags.c_contiguous and array.flags.aligned):
            raise ValueError(f"{name}: an array is not contiguous and aligned")
    try:
        return function(f"{name}_{''.join([array.dtype.char for array in arrays])}")
    except KeyError:
        raise TypeError(f"{name}: no loop is for {[str(array.dtype) for array in arrays]}") from None


def _places(*arrays: Array) -> list[int]:
    return [array.__array_interface__["data"][0] for array in arrays]
