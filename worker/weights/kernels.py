"""The loops over elements, compiled by numba for the processor at hand. One pass each, without the interpreter's lock.

A kernel takes contiguous, aligned arrays of one dimension: float32, or uint16 for the bits of bfloat16, of which
neither numpy nor numba knows. float16 comes here widened to float32 (see `tensors.Reader.values`). Values are widened
and rounded on the way, without a pass of its own; rounding is to nearest, ties to even. No kernel that makes weights
lets the compiler change the arithmetic (no fastmath): each element is the same whatever stands beside it, on every
processor. Sums are float64, in which no square of a float32 number overflows or vanishes.

Machine code is kept beside this file, or in the user's cache folder, and loaded when a kernel is first called; what is
not there is compiled then, in a second or two. `compile_all` does it beforehand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])

#: Rows and columns of a product that are made at once, by vectors of so many lanes: what the registers hold.
ROWS, TILE, LANES = 8, 32, 16

_PLACE, _WORD, _HALF = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_SIZE = np.uint32(0x7FFFFFFF)
_ZERO = np.float32(0.0)


def compiled(**options: Any) -> Callable[[Kernel], Kernel]:
    def decorate(function: Kernel) -> Kernel:
        try:
            return cast(Kernel, njit(nogil=True, cache=True, **options)(function))
        except RuntimeError:  # no place to keep machine code, as on a read-only disk: every process makes its own
            return cast(Kernel, njit(nogil=True, **options)(function))

    return decorate


#: Decorates what tells the compiler which instructions a call stands for.
inlined = cast(Callable[[Any], Any], intrinsic)


# --- bits -------------------------------------------------------------------------------------------------------------


def _word(number: int) -> ir.Constant:
    return ir.Constant(_WORD, number)


def _place(number: int) -> ir.Constant:
    return ir.Constant(_PLACE, number)


@inlined
def _wide(_context: Any, value: types.Type) -> Any:
    """A value of any kernel's array as float32."""

    def widen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if isinstance(value, types.Float):
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _WORD), _word(16)), ir.FloatType())

    return types.float32(value), widen


@inlined
def _rounded(_context: Any, _value: types.Type, like: types.Array) -> Any:
    """A float32 as an element of the array `like`. NaN stays NaN: adding to its bits could make a number of it."""

    def rounded(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if isinstance(like.dtype, types.Float):
            return number
        bits = builder.bitcast(number, _WORD)
        odd = builder.and_(builder.lshr(bits, _word(16)), _word(1))
        nearest = builder.add(builder.add(bits, _word(0x7FFF)), odd)
        quiet = builder.or_(bits, _word(0x400000))
        chosen = builder.select(builder.fcmp_unordered("uno", number, number), quiet, nearest)
        return builder.trunc(builder.lshr(chosen, _word(16)), _HALF)

    return like.dtype(types.float32, like), rounded


@inlined
def _bits(_context: Any, _value: types.Type) -> Any:
    def bits(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _WORD)

    return types.uint32(types.float32), bits


@inlined
def _sum_tile(_context: Any, left: types.Array, tile: types.Array, sums: types.Array) -> Any:
    """`sums = left @ tile` for (ROWS, r), (r, TILE) and (ROWS, TILE), float32, the last two flat.

    Written as vectors that stay in registers, which no loop could tell the compiler to do: half the time of the best
    one (measured).
    """
    vector = ir.VectorType(ir.FloatType(), LANES)
    fused = ir.FunctionType(vector, [vector] * 3)

    def sum_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        factors, columns, target = (array.data for array in arrays)
        rank = builder.extract_value(arrays[0].shape, 1)
        fma = cgutils.get_or_insert_function(builder.module, fused, f"llvm.fma.v{LANES}f32")

        def at(data: Any, place: Any) -> Any:
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        parts = range(TILE // LANES)
        running = [[cgutils.alloca_once(builder, vector) for _ in parts] for _ in range(ROWS)]
        for register in itertools.chain(*running):
            builder.store(ir.Constant(vector, None), register)
        with cgutils.for_range(builder, rank) as loop:
            start = builder.mul(loop.index, _place(TILE))
            right = [builder.load(at(columns, builder.add(start, _place(part * LANES))), align=4) for part in parts]
            for row, registers in enumerate(running):
                place = builder.add(builder.mul(rank, _place(row)), loop.index)
                one = builder.load(builder.gep(factors, [place]))
                every = builder.shuffle_vector(
                    builder.insert_element(ir.Constant(vector, ir.Undefined), one, _word(0)),
                    ir.Constant(vector, ir.Undefined),
                    ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES),
                )
                for part, register in zip(right, registers, strict=True):
                    builder.store(builder.call(fma, [every, part, builder.load(register)]), register)
        for row, registers in enumerate(running):
            for part, register in enumerate(registers):
                builder.store(builder.load(register), at(target, _place(row * TILE + part * LANES)), align=4)
        return context.get_dummy_value()

    return types.void(left, tile, sums), sum_tile


# --- weights ----------------------------------------------------------------------------------------------------------


@compiled()
def difference(tuned: Array, base: Array, factor: float, decrement: Array) -> None:
    """`decrement = (base - tuned) * factor`, all (n,), in float32; never -0.0."""
    factor32 = np.float32(factor)
    for i in range(decrement.size):
        decrement[i] = (_wide(base[i]) - _wide(tuned[i])) * factor32 + _ZERO


@compiled()
def scaled(change: Array, factor: float, decrement: Array) -> None:
    """`decrement = change * factor`, both (n,) and maybe one, in float32; never -0.0."""
    factor32 = np.float32(factor)
    for i in range(decrement.size):
        decrement[i] = _wide(change[i]) * factor32 + _ZERO


@compiled()
def add(kept: Array, decrement: Array, out: Array) -> int:
    """`out = kept - decrement`, all (n,): subtracted in float32, rounded to `out`'s dtype.

    Returns the largest bits, but for the sign, of the sums before they are rounded: what is as large as infinity's is
    infinity or NaN.
    """
    largest = np.uint32(0)
    for i in range(out.size):
        total = _wide(kept[i]) - decrement[i]
        size = np.uint32(_bits(total) & _SIZE)
        largest = max(largest, size)
        out[i] = _rounded(total, out)
    return int(largest)


@compiled()
def store(values: Array, out: Array) -> int:
    """`out = values`, both (n,), rounded to `out`'s dtype. Returns what `add` returns."""
    largest = np.uint32(0)
    for i in range(out.size):
        value = _wide(values[i])
        size = np.uint32(_bits(value) & _SIZE)
        largest = max(largest, size)
        out[i] = _rounded(value, out)
    return int(largest)


@compiled()
def product(left: Array, tiles: Array, scaling: float, factor: float, first: int, out: Array) -> None:
    """`out = (left @ right) * scaling * factor`, (n, C) float32, for the rows from `first` on; never -0.0. `left` and
    `tiles` are from `pack`.

    Each element is summed in the order of the ranks, from 0.0, by fused multiply-add, as the BLAS libraries do it for
    ranks of some hundreds: neither the rows made at once nor the processor can change a bit of it.
    """
    rows, columns = out.shape
    scaling32, factor32 = np.float32(scaling), np.float32(factor)
    sums = np.empty(ROWS * TILE, np.float32)
    for number in range(tiles.shape[0]):
        place = number * TILE
        for row in range(0, rows, ROWS):
            _sum_tile(left[first + row : first + row + ROWS], tiles[number], sums)
            for each in range(min(ROWS, rows - row)):
                for column in range(min(TILE, columns - place)):
                    out[row + each, place + column] = sums[each * TILE + column] * scaling32 * factor32 + _ZERO


def pack(left: Array, right: Array) -> tuple[Array, Array]:
    """(R, r) and (r, C) float32 as `product` wants them, with zeros where its steps go beyond the end.

    (R + 3, r), and (C / TILE, r * TILE): the columns in tiles.
    """
    (rows, rank), columns = left.shape, right.shape[1]
    padded = np.zeros((rows + ROWS - 1, rank), np.float32)
    padded[:rows] = left
    wide = np.zeros((rank, columns + -columns % TILE), np.float32)
    wide[:, :columns] = right
    tiles = wide.reshape(rank, -1, TILE).transpose(1, 0, 2)
    return padded, np.ascontiguousarray(tiles).reshape(-1, rank * TILE)


# --- sums -------------------------------------------------------------------------------------------------------------

#: The order of a sum's terms is the compiler's: it moves a figure by 1e-15 of itself, and makes vectors of the loop.
_ANY_ORDER = {"reassoc", "nsz", "contract"}


@compiled(fastmath=_ANY_ORDER)
def figures(
    kept: Array, decrement: Array, base: Array | None, stored: Array
) -> tuple[float, float, float, float, float]:
    """The five sums of `figures.Sums` over (n,) elements, u being `-decrement`; those with base are 0 without it."""
    update = error = squares = towards = gap = 0.0
    for i in range(decrement.size):
        down, instruct = np.float64(decrement[i]), np.float64(_wide(kept[i]))
        lost = (np.float64(_wide(stored[i])) - instruct) + down
        update += down * down
        error += lost * lost
        squares += instruct * instruct
        if base is not None:
            apart = instruct - np.float64(_wide(base[i]))
            towards -= down * apart
            gap += apart * apart
    return update, error, squares, towards, gap


@compiled(fastmath=_ANY_ORDER)
def squares(values: Array) -> float:
    """The sum of the squares of (n,) elements."""
    found = 0.0
    for i in range(values.size):
        value = np.float64(_wide(values[i]))
        found += value * value
    return found


@compiled(fastmath=_ANY_ORDER)
def distance(one: Array, other: Array) -> tuple[float, float, float]:
    """Sums over (n,) elements: |one - other|, |one|, |other|."""
    gap = first = second = 0.0
    for i in range(one.size):
        left, right = np.float64(_wide(one[i])), np.float64(_wide(other[i]))
        gap += abs(left - right)
        first += abs(left)
        second += abs(right)
    return gap, first, second


@compiled()
def add_squares(values: Array, by_row: bool, sums: Array) -> None:
    """Add the squares of (R, C) float32 values to `sums`, float64: (R,) by row, or (C,) by column. In the order of the
    rows, and of the columns in them, so that whoever comes piece by piece gets the same."""
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            value = np.float64(values[row, column])
            place = row if by_row else column
            sums[place] += value * value


# --- beforehand -------------------------------------------------------------------------------------------------------


def compile_all() -> None:
    """Compile every kernel for all that it may be given, and keep it: each is called once with next to nothing."""
    wide, table = np.zeros(1, np.float32), np.zeros((1, 1), np.float32)
    stored: tuple[Array, ...] = (np.zeros(1, np.uint16), wide)
    for one in stored:
        scaled(one, 1.0, wide)
        squares(one)
    for one, two in itertools.product(stored, stored):
        difference(one, two, 1.0, wide)
        add(one, wide, two)
        store(one, two)
        distance(one, two)
        for base in (*stored, None):
            figures(one, wide, base, two)
    product(*pack(table, table), 1.0, 1.0, 0, table)
    add_squares(table, True, np.zeros(1))
