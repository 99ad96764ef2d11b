"""The loops over elements, as numba compiles them for the processor at hand; `kernels` is how they are called.

Imported only where machine code is to be made: importing numba takes longer than loading what it made (see
`machine_code`). So a loop here is a C function: it takes places in memory and counts, makes no array, raises nothing
and calls nothing of Python. Values are float32, or uint16 for the bits of bfloat16, and are widened and rounded on the
way; rounding is to nearest, ties to even. No loop that makes weights lets the compiler change the arithmetic (no
fastmath): each element is the same whatever stands beside it, on every processor. Sums are float64, in which no square
of a float32 number overflows or vanishes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

from worker.weights.signatures import LOOPS, ROWS, TILE, Signature, variants

#: A place in memory, and how many elements lie there; the counts are int64.
Place = Any

#: Of the vectors that a product is made by.
LANES = 16

_PLACE, _WORD, _HALF = ir.IntType(64), ir.IntType(32), ir.IntType(16)
_SIZE = np.uint32(0x7FFFFFFF)
_ZERO = np.float32(0.0)

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
def _make_tile(
    _context: Any,
    left: Any,
    tile: Any,
    rank: Any,
    scaling: Any,
    factor: Any,
    out: Any,
    stride: Any,
) -> Any:
    """`out = (left @ tile) * scaling * factor + 0.0`, (ROWS, TILE) with rows `stride` elements apart, for `left` (rank,
    ROWS) and `tile` (rank, TILE), all float32. Each of the three is a place and the number of its first element.

    Written as vectors that stay in registers, which no loop could tell the compiler to do: half the time of the best
    one (measured).
    """
    vector = ir.VectorType(ir.FloatType(), LANES)
    fused = ir.FunctionType(vector, [vector] * 3)

    def make_tile(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        left, tile, rank, scaling, factor, out, stride = arguments
        factors, columns, target = (
            builder.gep(*[builder.extract_value(one, [0]), [builder.extract_value(one, [1])]])
            for one in (left, tile, out)
        )
        fma = cgutils.get_or_insert_function(builder.module, fused, f"llvm.fma.v{LANES}f32")
        parts = range(TILE // LANES)

        def at(data: Any, place: Any) -> Any:
            return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

        def every(one: Any) -> Any:
            empty = ir.Constant(vector, ir.Undefined)
            alike = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
            return builder.shuffle_vector(builder.insert_element(empty, one, _word(0)), empty, alike)

        running = [[cgutils.alloca_once(builder, vector) for _ in parts] for _ in range(ROWS)]
        for register in itertools.chain(*running):
            builder.store(ir.Constant(vector, None), register)
        with cgutils.for_range(builder, rank) as loop:
            start = builder.mul(loop.index, _place(TILE))
            right = [builder.load(at(columns, builder.add(start, _place(part * LANES))), align=4) for part in parts]
            start = builder.mul(loop.index, _place(ROWS))
            for number, registers in enumerate(running):
                one = every(builder.load(builder.gep(factors, [builder.add(start, _place(number))])))
                for part, register in zip(right, registers, strict=True):
                    builder.store(builder.call(fma, [one, part, builder.load(register)]), register)
        scalings, zeros = [every(scaling), every(factor)], ir.Constant(vector, None)
        for number, registers in enumerate(running):
            for part, register in enumerate(registers):
                found = builder.load(register)
                for each in scalings:
                    found = builder.fmul(found, each)
                place = builder.add(builder.mul(stride, _place(number)), _place(part * LANES))
                builder.store(builder.fadd(found, zeros), at(target, place), align=4)
        return context.get_dummy_value()

    return types.void(left, tile, rank, scaling, factor, out, stride), make_tile


# --- weights ----------------------------------------------------------------------------------------------------------


def difference(tuned: Place, base: Place, decrement: Place, count: int, factor: float) -> None:
    """`decrement = (base - tuned) * factor`, all (n,), in float32; never -0.0."""
    tuned_n, base_n, decrement_n = carray(tuned, count), carray(base, count), carray(decrement, count)
    factor32 = np.float32(factor)
    for i in range(count):
        decrement_n[i] = (_wide(base_n[i]) - _wide(tuned_n[i])) * factor32 + _ZERO


def scaled(change: Place, decrement: Place, count: int, factor: float) -> None:
    change_n, decrement_n = carray(change, count), carray(decrement, count)
    factor32 = np.float32(factor)
    for i in range(count):
        decrement_n[i] = _wide(change_n[i]) * factor32 + _ZERO


def add(kept: Place, decrement: Place, out: Place, count: int) -> np.uint32:
    kept_n, decrement_n, out_n = carray(kept, count), carray(decrement, count), carray(out, count)
    largest = np.uint32(0)
    for i in range(count):
        total = _wide(kept_n[i]) - decrement_n[i]
        largest = max(largest, np.uint32(_bits(total) & _SIZE))
        out_n[i] = _rounded(total, out_n)
    return largest


def store(values: Place, out: Place, count: int) -> np.uint32:
    values_n, out_n = carray(values, count), carray(out, count)
    largest = np.uint32(0)
    for i in range(count):
        value = _wide(values_n[i])
        largest = max(largest, np.uint32(_bits(value) & _SIZE))
        out_n[i] = _rounded(value, out_n)
    return largest


def product(
    left: Place,
    tiles: Place,
    packed: Place,
    edge: Place,
    out: Place,
    first: int,
    rank: int,
    rows: int,
    columns: int,
    scaling: float,
    factor: float,
) -> None:
    """`packed`, (rows / ROWS, rank, ROWS), and `edge`, (ROWS, TILE), are memory to work in: for the rows of `left` in
    the order of their use, and for what is only in part of the product."""
    groups = (rows + ROWS - 1) // ROWS
    left_nr, packed_gre = carray(left, (first + rows, rank)), carray(packed, (groups, rank, ROWS))
    edge_rc, out_rc = carray(edge, (ROWS, TILE)), carray(out, (rows, columns))
    scaling32, factor32 = np.float32(scaling), np.float32(factor)
    for row in range(groups * ROWS):
        for place in range(rank):
            packed_gre[row // ROWS, place, row % ROWS] = left_nr[first + row, place] if row < rows else _ZERO
    for column in range(0, columns, TILE):
        tile = (tiles, column * rank)
        for row in range(0, rows, ROWS):
            group = (packed, row * rank)
            if row + ROWS <= rows and column + TILE <= columns:
                _make_tile(group, tile, rank, scaling32, factor32, (out, row * columns + column), columns)
                continue
            _make_tile(group, tile, rank, scaling32, factor32, (edge, 0), TILE)
            for each in range(min(ROWS, rows - row)):
                for place in range(min(TILE, columns - column)):
                    out_rc[row + each, column + place] = edge_rc[each, place]


# --- sums -------------------------------------------------------------------------------------------------------------


def figures(kept: Place, decrement: Place, base: Place, stored: Place, sums: Place, count: int) -> None:
    kept_n, decrement_n, stored_n = carray(kept, count), carray(decrement, count), carray(stored, count)
    base_n, sums_5 = carray(base, count), carray(sums, 5)
    update = error = squares = towards = gap = 0.0
    for i in range(count):
        down, instruct = np.float64(decrement_n[i]), np.float64(_wide(kept_n[i]))
        lost = (np.float64(_wide(stored_n[i])) - instruct) + down
        apart = instruct - np.float64(_wide(base_n[i]))
        update += down * down
        error += lost * lost
        squares += instruct * instruct
        towards -= down * apart
        gap += apart * apart
    sums_5[0], sums_5[1], sums_5[2], sums_5[3], sums_5[4] = update, error, squares, towards, gap


def figures_alone(kept: Place, decrement: Place, stored: Place, sums: Place, count: int) -> None:
    """Where base is not known."""
    kept_n, decrement_n, stored_n = carray(kept, count), carray(decrement, count), carray(stored, count)
    sums_5 = carray(sums, 5)
    update = error = squares = 0.0
    for i in range(count):
        down, instruct = np.float64(decrement_n[i]), np.float64(_wide(kept_n[i]))
        lost = (np.float64(_wide(stored_n[i])) - instruct) + down
        update += down * down
        error += lost * lost
        squares += instruct * instruct
    sums_5[0], sums_5[1], sums_5[2], sums_5[3], sums_5[4] = update, error, squares, 0.0, 0.0


def squares(values: Place, count: int) -> float:
    values_n = carray(values, count)
    found = 0.0
    for i in range(count):
        value = np.float64(_wide(values_n[i]))
        found += value * value
    return found


def distance(one: Place, other: Place, sums: Place, count: int) -> None:
    one_n, other_n, sums_3 = carray(one, count), carray(other, count), carray(sums, 3)
    gap = first = second = 0.0
    for i in range(count):
        left, right = np.float64(_wide(one_n[i])), np.float64(_wide(other_n[i]))
        gap += abs(left - right)
        first += abs(left)
        second += abs(right)
    sums_3[0], sums_3[1], sums_3[2] = gap, first, second


def add_squares(values: Place, sums: Place, rows: int, columns: int, by_row: int) -> None:
    values_rc, sums_n = carray(values, (rows, columns)), carray(sums, rows if by_row else columns)
    for row in range(rows):
        for column in range(columns):
            value = np.float64(values_rc[row, column])
            place = row if by_row else column
            sums_n[place] += value * value


# --- machine code -----------------------------------------------------------------------------------------------------

#: The order of a sum's terms is the compiler's: it moves a figure by 1e-15 of itself, and makes vectors of the loop.
_ANY_ORDER = {"reassoc", "nsz", "contract"}
_FASTMATH: dict[Callable[..., Any], set[str]] = dict.fromkeys((figures, figures_alone, squares, distance), _ANY_ORDER)

#: By their letters in a signature.
_TYPES = {
    "H": types.uint16,
    "f": types.float32,
    "d": types.float64,
    "q": types.int64,
    "I": types.uint32,
    "": types.void,
}


def object_code() -> bytes:
    """Every loop for all that it may be given, as one object file for this processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static",
        codemodel="jitdefault",
    )
    whole = llvm.parse_assembly("")
    whole.triple = machine.triple
    whole.data_layout = str(machine.target_data)
    for module in _modules():
        whole.link_in(module)
    _clear(whole, machine)
    strange = [
        one.name
        for one in (*whole.functions, *whole.global_variables)
        if one.is_declaration and not one.name.startswith("llvm.")
    ]
    if strange:  # what loads it has none of them, and would end the process
        raise RuntimeError(f"The loops' machine code calls {', '.join(strange)}")
    code: bytes = machine.emit_object(whole)
    return code


def _modules() -> Iterator[llvm.ModuleRef]:
    for name, signature in LOOPS.items():
        loop = globals()[name]
        for symbol, letters in variants(name, signature):
            made = cfunc(_typed(letters, signature), fastmath=_FASTMATH.get(loop, False), error_model="numpy")(loop)
            module = llvm.parse_assembly(made.inspect_llvm())
            for number, one in enumerate((*module.functions, *module.global_variables)):
                if one.name == made.native_name:
                    one.name = symbol
                elif not one.is_declaration:
                    one.name, one.linkage = f"{symbol}.{number}", "internal"  # numba's names differ from run to run
            yield module


def _typed(letters: str, signature: Signature) -> Any:
    places = [types.CPointer(_TYPES[letter]) for letter in letters]
    return _TYPES[signature.result](*places, *(_TYPES[letter] for letter in signature.rest))


def _clear(module: llvm.ModuleRef, machine: llvm.TargetMachine) -> None:
    """Take out what numba adds for a loop that raises: the compiler sees that none does, once nobody else can call."""
    passes = llvm.create_new_module_pass_manager()
    passes.add_ipsccp_pass()
    passes.add_simplify_cfg_pass()
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.add_global_dead_code_eliminate_pass()
    passes.add_strip_dead_prototype_pass()
    passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3)))
