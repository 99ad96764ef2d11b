"""The machine code of `loops`: made by numba once, kept as one file, loaded and called without numba.

Importing numba and letting it find its own cache takes 0.6 s, in which a small model is grafted; loading this file
takes a fraction of it (see bench/graft.py). The file's name holds a hash of all that the code depends on, and its first
line says its length and hash: a file that is torn or of something else is made anew, and never run.

It lies in `__pycache__` beside this module or, where that cannot be written, in the user's cache folder; the
environment may name another folder as NUMBA_CACHE_DIR. Where none can be written each process makes its own, which
takes some seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from worker.weights.signatures import LOOPS, variants

Function = Callable[..., Any]

_CTYPES: dict[str, Any] = {"q": ctypes.c_int64, "d": ctypes.c_double, "I": ctypes.c_uint32, "": None}


# --- calling ----------------------------------------------------------------------------------------------------------

_lock = threading.Lock()
_functions: dict[str, Function] = {}


def function(symbol: str) -> Function:
    """A loop's C function, which runs without the interpreter's lock. KeyError: there is none for these types."""
    found = _functions.get(symbol)
    if found is None:
        load()
        found = _functions[symbol]
    return found


def load() -> None:
    """Make the functions ready; where their code is not kept yet it is made, and kept."""
    with _lock:
        if not _functions:
            _functions.update(_prototypes(_linked(_kept() or _made())))


@cache  # what lies in memory must stay
def _linked(code: bytes) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _prototypes(engine: llvm.ExecutionEngine) -> dict[str, Function]:
    found: dict[str, Function] = {}
    for name, signature in LOOPS.items():
        rest = [_CTYPES[letter] for letter in signature.rest]
        prototype = ctypes.CFUNCTYPE(_CTYPES[signature.result], *[ctypes.c_void_p] * len(signature.arrays), *rest)
        for symbol, _ in variants(name, signature):
            found[symbol] = prototype(engine.get_function_address(symbol))
    return found


# --- keeping ----------------------------------------------------------------------------------------------------------


def _kept() -> bytes | None:
    for folder in _folders():
        try:
            head, _, code = (folder / _name()).read_bytes().partition(b"\n")
        except OSError:
            continue
        if head == _head(code):
            return code
    return None


def _made() -> bytes:
    from worker.weights.loops import object_code  # imports numba

    code = object_code()
    for folder in _folders():
        if _keep(code, folder):
            break
    return code


def _keep(code: bytes, folder: Path) -> bool:
    """Whether the folder took it. Others that make the same at the same time write files of their own aside."""
    part = folder / f"{_name()}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_head(code) + b"\n" + code)
        part.rename(folder / _name())
    except OSError:
        _discard(part)
        return False
    return True


def _discard(part: Path) -> None:
    try:
        part.unlink()
    except OSError:
        return


def _head(code: bytes) -> bytes:
    return f"{_key()} {len(code)} {hashlib.sha256(code).hexdigest()}".encode()


def _name() -> str:
    return f"loops-{_key()[:16]}.o"


@cache
def _key() -> str:
    """A hash of what the code is made of: the loops, what compiles them, and the processor."""
    sources = [Path(__file__).with_name(name).read_bytes() for name in ("loops.py", "signatures.py")]
    compilers = [version("numba"), version("llvmlite")]
    processor = [llvm.get_process_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    said = [*sources, *(word.encode() for word in (*compilers, *processor))]
    return hashlib.sha256(b"\0".join(said)).hexdigest()


def _folders() -> Iterator[Path]:
    told = os.environ.get("NUMBA_CACHE_DIR")
    if told:
        yield Path(told)
        return
    yield Path(__file__).with_name("__pycache__")
    told = os.environ.get("XDG_CACHE_HOME")
    try:
        yield (Path(told) if told else Path.home() / ".cache") / "shadowft"
    except RuntimeError:  # a user without a home
        return
