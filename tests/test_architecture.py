"""The arrows between the rooms, read from the imports: `api -> core <- worker`, and nothing points back."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("core", "api", "worker", "cli", "demo", "migrations")
TRAINERS = {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
HEAVY = {*TRAINERS, "numba", "llvmlite"}

#: room -> what it never imports.
FORBIDDEN = {
    "core": {"api", "worker", "cli", "demo", "migrations", "fastapi", "starlette", "uvicorn", *HEAVY},
    "api": {"worker", "cli", "demo", "migrations", "celery", *HEAVY},
    "worker": {"api", "cli", "demo", "migrations", "fastapi", "starlette", "uvicorn"},
    "migrations": {"api", "worker", "cli", "demo", "fastapi", *HEAVY},
}

#: How high a module of worker stands; an import goes down. What is not named is a helper.
HEIGHT = {
    "worker.tasks": 4,
    "worker.sweep": 3,
    "worker.admission": 3,
    "worker.file_check": 3,
    "worker.pair_check": 2,
    "worker.pipeline": 1,
}
#: What runs in a job's child, and may therefore import torch.
IN_A_CHILD = (
    *("worker.steps.", "worker.weights.", "worker.chat_text", "worker.scoring", "worker.report"),
    *("worker.pair_inspection", "worker.tokenizers_check", "worker.start_rows_in_model"),
)


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of ours by its dotted name."""
    found = {}
    for path in chain.from_iterable((ROOT / room).rglob("*.py") for room in ROOMS):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(), str(path))
    return found


def imports(name: str) -> Iterator[str]:
    """The full name of everything the module imports, also inside its functions."""
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            assert node.module is not None
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ([one for one in inner if one in modules()] or [node.module])


def of_room(room: str) -> list[str]:
    return [name for name in modules() if name.split(".")[0] == room]


def test_every_room_is_looked_at():
    assert all(len(of_room(room)) > 1 for room in ROOMS)
    assert "core.jobs" in imports("api.routes.jobs")


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_nothing_that_lies_above_or_beside_it(room):
    wrong = [
        f"{name} imports {imported}"
        for name in of_room(room)
        for imported in imports(name)
        if imported.split(".")[0] in FORBIDDEN[room]
    ]
    assert wrong == []


def test_only_cli_and_demo_look_at_both_sides():
    both = {
        name.split(".")[0]
        for name in modules()
        if {"api", "worker"} <= {imported.split(".")[0] for imported in [name, *imports(name)]}
    }
    assert both <= {"cli", "demo"}


def test_weights_can_be_used_alone():
    wrong = [
        f"{name} imports {imported}"
        for name in of_room("worker")
        if name.startswith("worker.weights")
        for imported in imports(name)
        if imported.startswith("worker.") and not imported.startswith("worker.weights")
    ]
    assert wrong == []


def test_inside_worker_arrows_point_down():
    wrong = [
        f"{name} imports {imported}"
        for name in of_room("worker")
        for imported in imports(name)
        if HEIGHT.get(imported, 0) and HEIGHT.get(imported, 0) >= HEIGHT.get(name, 0)
    ]
    assert wrong == []


def test_a_step_is_a_program_that_nobody_imports():
    wrong = [
        f"{name} imports {imported}"
        for name in modules()
        for imported in imports(name)
        if imported.startswith("worker.steps.") and not name.startswith("worker.steps.")
    ]
    assert wrong == []


def test_a_step_knows_neither_database_nor_broker():
    forbidden = (
        "core.db",
        "core.models",
        "core.jobs",
        "core.broker",
        "core.celery_app",
        "core.storage",
        "sqlalchemy",
        "celery",
        "worker.lease",
    )
    wrong = [
        f"{name} imports {imported}"
        for name in of_room("worker")
        if name.startswith(IN_A_CHILD)
        for imported in imports(name)
        if imported.startswith(forbidden)
    ]
    assert wrong == []


def test_torch_is_imported_only_where_a_child_runs():
    wrong = [
        f"{name} imports {imported}"
        for name in of_room("worker")
        if not name.startswith(IN_A_CHILD)
        for imported in imports(name)
        if imported.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_modules_import_each_other_in_no_circle():
    """Take away what imports nothing that is left, again and again: a circle is what cannot be taken."""
    graph = {name: {one for one in imports(name) if one in modules() and one != name} for name in modules()}
    while free := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in free:
            del graph[name]
    assert graph == {}


@pytest.mark.parametrize("module", ["api.app", "worker.tasks", "cli.main"])
def test_a_light_process_leaves_the_heavy_libraries_alone(module, tmp_path):
    assert imported_of(HEAVY - {"accelerate"}, module, tmp_path) == "[]"


@pytest.mark.parametrize("module", ["worker.weights", "worker.steps.graft"])
def test_a_graft_needs_no_torch(module, tmp_path):
    assert imported_of({*TRAINERS, "safetensors"}, module, tmp_path) == "[]"


def imported_of(libraries, module, tmp_path):
    """Those that a process has after the import of the module, as a list in words."""
    program = f"import sys, {module}; print(sorted(sys.modules.keys() & {libraries!r}))"
    env = {**os.environ, "SHADOWFT_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# --- what never stands in the sources ---------------------------------------------------------------------------------


def calls() -> Iterator[tuple[str, ast.Call]]:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", node


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_trust_remote_code_is_only_ever_the_literal_false():
    for place, node in calls():
        for keyword in node.keywords:
            if keyword.arg == "trust_remote_code":
                assert isinstance(keyword.value, ast.Constant), place
                assert keyword.value.value is False, place
    strings = [name for name, tree in modules().items() for node in ast.walk(tree) if is_the_word(node)]
    assert strings == [], "a string could become a keyword argument"


def is_the_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == "trust_remote_code"


def test_what_loads_a_model_says_that_it_trusts_no_code():
    silent = [
        place
        for place, node in calls()
        if called(node).startswith("Auto")
        and called(node).endswith((".from_pretrained", ".from_config"))
        and "trust_remote_code" not in {keyword.arg for keyword in node.keywords}
    ]
    assert silent == []


def test_nothing_goes_through_a_shell():
    wrong = [place for place, node in calls() if any(one.arg == "shell" for one in node.keywords)]
    wrong += [place for place, node in calls() if called(node) in {"os.system", "os.popen", "subprocess.getoutput"}]
    assert wrong == []


def test_nothing_is_unpickled_and_no_text_is_run_as_code():
    loaders = {"torch.load", "joblib.load", "numpy.load", "np.load", "yaml.load", "eval", "exec", "__import__"}
    assert [place for place, node in calls() if called(node) in loaders] == []
    picklers = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    found = [f"{name} imports {one}" for name in modules() for one in imports(name) if one.split(".")[0] in picklers]
    assert found == []
