"""The loops' machine code: kept for the next process, trusted only when it is whole and of this processor."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.worker.weights.families import Dtypes, Layout, Recipe
from worker.weights import FullDelta, SavedDelta, graft, machine_code, measure_similarity, save_delta

ROOT = Path(__file__).parents[3]

USE = """
import sys
import numpy as np
from worker.weights import kernels
change, decrement = np.ones(3, np.float32), np.empty(3, np.float32)
kernels.scaled(change, 2.0, decrement)
print(decrement.tolist(), *sorted({"numba", "torch"} & set(sys.modules)))
"""
LOADED, MADE = "[2.0, 2.0, 2.0]\n", "[2.0, 2.0, 2.0] numba\n"


def start(folder: Path | str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(folder)}
    return subprocess.Popen([sys.executable, "-c", USE], env=env, stdout=subprocess.PIPE, text=True)


def use(folder: Path | str) -> str:
    return start(folder).communicate()[0]


@pytest.fixture(scope="module")
def code() -> bytes:
    """What every other test's process has loaded."""
    machine_code.load()
    kept = machine_code._kept()
    assert kept is not None
    return kept


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_a_process_that_finds_it_imports_neither_numba_nor_torch(folder, code):
    assert machine_code._keep(code, folder)
    assert use(folder) == LOADED


def torn(content: bytes) -> bytes:
    return content[:-1]


def changed(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def of_another_key(content: bytes) -> bytes:
    return (b"0" if content[:1] != b"0" else b"1") + content[1:]


def foreign(content: bytes) -> bytes:
    return b"\x7fELF" + content


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [torn, changed, of_another_key, foreign, empty])
def test_what_is_not_whole_or_of_something_else_is_not_run(folder, code, damage):
    assert machine_code._keep(code, folder)
    assert machine_code._kept() == code
    file = folder / machine_code._name()
    file.write_bytes(damage(file.read_bytes()))
    assert machine_code._kept() is None
    assert machine_code._keep(code, folder)
    assert machine_code._kept() == code
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_a_folder_that_cannot_be_written_is_passed_over(tmp_path, code):
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert not machine_code._keep(code, file)
    assert not machine_code._keep(code, file / "below")
    assert not machine_code._keep(code, Path("/proc"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_lies_beside_the_module_or_with_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    beside = Path(machine_code.__file__).parent / "__pycache__"
    assert list(machine_code._folders()) == [beside, tmp_path / "shadowft"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(machine_code._folders()) == [beside, tmp_path / ".cache" / "shadowft"]


@pytest.mark.slow
def test_two_processes_that_find_a_torn_file_make_it_anew(folder, code):
    assert machine_code._keep(code, folder)
    file = folder / machine_code._name()
    whole = file.read_bytes()
    file.write_bytes(torn(whole))
    both = [start(folder) for _ in range(2)]
    assert [one.communicate()[0] for one in both] == [MADE, MADE]
    assert [path.name for path in folder.iterdir()] == [file.name]
    assert file.read_bytes() == whole
    assert use(folder) == LOADED


@pytest.mark.slow
def test_where_nothing_can_be_kept_a_process_makes_its_own():
    assert use("/proc") == MADE


def test_there_is_a_loop_for_every_pair_of_dtypes(tmp_path):
    """Files in which elements lie at odd places, and whole numbers as scale, among them: none is refused its loop."""
    for number, three in enumerate(itertools.product((torch.bfloat16, torch.float16, torch.float32), repeat=3)):
        recipe = Recipe(dtypes=Dtypes(*three), layouts=(Layout(), Layout(), Layout(misaligned=bool(number % 2))))
        recipe.write(folder := tmp_path / str(number))
        delta = FullDelta(folder / "base", folder / "tuned")
        graft(instruct=folder / "instruct", delta=delta, out=folder / "out", scale=1 + number % 2)
        save_delta(base=folder / "base", tuned=folder / "tuned", out=folder / "delta")
        graft(instruct=folder / "instruct", delta=SavedDelta(folder / "delta"), out=folder / "later", scale=1)
        measure_similarity(folder / "base", folder / "instruct")
