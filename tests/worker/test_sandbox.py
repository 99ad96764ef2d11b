"""The walls around a step, tried from the inside by programs that run against them. What cannot stand is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from core.config import Settings
from core.errors import Unavailable
from worker import sandbox, step_runner
from worker.sandbox import Walls, find_walls
from worker.workspace import Workspace

FULL = Walls(network=True, files=True)

#: `tried` keeps for each name how the act went: "done", or the name of what it raised.
PROLOGUE = """
    import ctypes, json, os, signal, socket, sys
    from pathlib import Path

    tried = {}

    def attempt(name, act):
        try:
            act()
            tried[name] = "done"
        except OSError as error:
            tried[name] = type(error).__name__
"""


@pytest.fixture(scope="session")
def walls():
    found = find_walls("cpu")
    if found != FULL:
        pytest.skip(f"this kernel does not offer both walls: {found}")
    return found


@pytest.fixture
def workspace(tmp_path):
    """With a model whose one file is a link, as the Hub's cache has them, and a neighbour."""
    made = Workspace(tmp_path / "work" / "job")
    blob, model = tmp_path / "models" / "blobs" / "abc", tmp_path / "models" / "snapshot"
    for folder in (
        made.inputs,
        made.step("train"),
        made.step("graft"),
        blob.parent,
        model,
        tmp_path / "work" / "other",
    ):
        folder.mkdir(parents=True)
    blob.write_text("weights")
    (model / "model.safetensors").symlink_to(blob)
    (model / "config.json").write_text("{}")
    made.base.symlink_to(model)
    (tmp_path / "stored").write_text("rows")
    made.probe("small").parent.mkdir()
    made.probe("small").symlink_to(tmp_path / "stored")
    made.spec_file.write_text("{}")
    (tmp_path / "work" / "other" / "job.json").write_text("{}")
    (tmp_path / "shadowft.db").write_text("rows")
    return made


def run_behind(walls, workspace, program, **values):
    """What `tried` holds after the program. `values` are its globals."""
    parts = (PROLOGUE, f"globals().update({values!r})", program, "print(json.dumps(tried))")
    code = "\n".join(textwrap.dedent(part) for part in parts)
    command = sandbox.command(
        [sys.executable, "-P", "-c", code],
        walls=walls,
        workspace=workspace.root,
        folder=workspace.step("train"),
        device="cpu",
    )
    done = subprocess.run(command, cwd=workspace.root, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_step_has_no_network_by_any_way(walls, workspace):
    program = """
        attempt("tcp", lambda: socket.socket())
        attempt("udp", lambda: socket.socket(type=socket.SOCK_DGRAM))
        attempt("ipv6", lambda: socket.socket(socket.AF_INET6))
        attempt("unix", lambda: socket.socket(socket.AF_UNIX))
        attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
        attempt("a name", lambda: socket.getaddrinfo("example.org", 80))

        def io_uring():
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syscall(425, 8, ctypes.create_string_buffer(120)) < 0:
                raise OSError(ctypes.get_errno(), "io_uring_setup")

        attempt("io_uring", io_uring)
        attempt("a pair of its own", lambda: [one.close() for one in socket.socketpair()])
    """
    tried = run_behind(walls, workspace, program)
    assert tried.pop("a pair of its own") == "done"
    assert tried.pop("a name") == "gaierror"
    assert set(tried.values()) == {"PermissionError"}


def test_a_step_sees_its_workspace_and_the_linked_models_and_nothing_else_of_the_deployment(walls, workspace, tmp_path):
    program = """
        attempt("spec", Path("job.json").read_text)
        attempt("config", Path("inputs/base/config.json").read_text)
        attempt("weights", Path("inputs/base/model.safetensors").read_text)
        attempt("probe", Path("inputs/probes/small").read_text)
        attempt("another job", Path(root, "work/other/job.json").read_text)
        attempt("other jobs", lambda: os.listdir(Path(root, "work")))
        attempt("database", Path(root, "shadowft.db").read_text)
        attempt("passwords", Path("/etc/shadow").read_text)
        attempt("home", lambda: os.listdir(home))
        attempt("beside the code", Path(code, "pyproject.toml").read_text)
    """
    tried = run_behind(
        walls,
        workspace,
        program,
        root=str(tmp_path),
        home=str(Path.home()),
        code=str(Path(sandbox.__file__).parents[1]),
    )
    assert {name for name, outcome in tried.items() if outcome == "done"} == {"spec", "config", "weights", "probe"}
    assert {outcome for outcome in tried.values() if outcome != "done"} == {"PermissionError"}


def test_a_step_writes_in_its_own_folder_alone(walls, workspace):
    program = """
        attempt("own", lambda: Path("train/a").write_text("x"))
        attempt("own, renamed", lambda: Path("train/a").rename("train/b"))
        attempt("temporary", lambda: Path(os.environ["TMPDIR"], "c").write_text("x"))
        attempt("spec", lambda: Path("job.json").write_text("x"))
        attempt("an input", lambda: Path("inputs/training").write_text("x"))
        attempt("another step", lambda: Path("graft/done.json").write_text("x"))
        attempt("a model", lambda: Path("inputs/base/config.json").write_text("x"))
        attempt("a model's name", lambda: Path("inputs/base/config.json").unlink())
        attempt("weights", lambda: os.truncate("inputs/base/model.safetensors", 0))
        attempt("the code", lambda: Path(code).with_name("evil.py").write_text("x"))
        attempt("everybody's", lambda: Path("/tmp/x").write_text("x"))
        attempt("everybody's memory", lambda: Path("/dev/shm/x").write_text("x"))
    """
    tried = run_behind(walls, workspace, program, code=sandbox.__file__)
    assert {name for name, outcome in tried.items() if outcome == "done"} == {"own", "own, renamed", "temporary"}
    assert {outcome for outcome in tried.values() if outcome != "done"} == {"PermissionError"}


def test_a_step_reaches_into_no_other_process(walls, workspace):
    program = """
        attempt("environment", Path(f"/proc/{parent}/environ").read_bytes)
        attempt("memory", lambda: open(f"/proc/{parent}/mem", "rb"))
        attempt("open files", lambda: os.readlink(f"/proc/{parent}/fd/0"))
        attempt("signal", lambda: os.kill(parent, 0))
    """
    tried = run_behind(walls, workspace, program, parent=os.getpid())
    assert set(tried.values()) == {"PermissionError"}


def test_machine_code_is_taken_from_what_is_kept_and_kept_apart(walls, workspace):
    program = """
        import numpy as np
        sys.path.insert(0, code)
        from worker.weights import kernels

        tried["result"] = kernels.squares(np.ones(4, np.float32))
        tried["compiled"] = "numba" in sys.modules
        tried["private"] = os.environ["NUMBA_CACHE_DIR"].startswith(root)
    """
    code = Path(sandbox.__file__).parents[1]
    subprocess.run([sys.executable, "-c", "import worker.weights.machine_code as m; m.load()"], check=True, cwd=code)
    tried = run_behind(walls, workspace, program, code=str(code), root=str(workspace.root))
    assert tried == {"result": 4.0, "compiled": False, "private": True}


def test_without_walls_a_step_runs_all_the_same(workspace, tmp_path):
    program = """
        attempt("socket", lambda: socket.socket().close())
        attempt("database", Path(root, "shadowft.db").read_text)
    """
    tried = run_behind(Walls(), workspace, program, root=str(tmp_path))
    assert set(tried.values()) == {"done"}


# --- what is said of them ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_files_wall(monkeypatch):
    """A kernel that has never heard of Landlock."""
    real = sandbox._wrapped

    older = Path(sandbox.__file__).read_text().replace("= 444, 445, 446", "= 1444, 1445, 1446")

    def wrapped(plan):
        program = real(plan)
        return [*program[:3], "-c", older.replace("__file__", repr(sandbox.__file__)), *program[4:]]

    monkeypatch.setattr(sandbox, "_wrapped", wrapped)


def test_a_wall_that_does_not_stand_is_said_and_the_other_one_stands(walls, no_files_wall):
    found = find_walls("cpu")
    assert (found.network, found.files) == (True, False)
    assert "Function not implemented" in found.missing


@pytest.fixture
def setting(monkeypatch):
    def set_to(value):
        step_runner.walls_around.cache_clear()
        monkeypatch.setattr(step_runner, "get_settings", lambda: Settings(_env_file=None, sandbox=value))

    yield set_to
    step_runner.walls_around.cache_clear()


def test_a_worker_that_requires_the_walls_does_not_start_without_them(setting, walls, no_files_wall):
    setting("require")
    with pytest.raises(Unavailable, match="SHADOWFT_SANDBOX=require"):
        step_runner.walls_around("cpu")


def test_a_worker_that_requires_the_walls_starts_where_they_stand(setting, walls):
    setting("require")
    assert step_runner.walls_around("cpu") == FULL


def test_walls_that_are_not_wanted_are_not_tried(setting):
    setting("off")
    assert step_runner.walls_around("cpu") == Walls()


def test_a_gpu_that_cannot_be_used_behind_the_walls_is_a_reason_against_them(walls, monkeypatch):
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    found = find_walls("cuda:0")
    assert found == Walls(missing=found.missing)
    assert "CUDA cannot be loaded" in found.missing


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU")
def test_a_gpu_is_used_behind_both_walls(walls):
    assert find_walls("cuda:0") == FULL
