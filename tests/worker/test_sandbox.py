"""The walls around a step, tried from the inside by programs that run against them. What cannot stand is said."""

from __future__ import annotations

import errno
import json
import os
import platform
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
    import ctypes, fcntl, json, os, resource, signal, socket, sys
    from pathlib import Path

    tried = {}

    def attempt(name, act):
        try:
            act()
            tried[name] = "done"
        except OSError as error:
            tried[name] = type(error).__name__

    def system(*arguments):
        if ctypes.CDLL(None, use_errno=True).syscall(*arguments) < 0:
            raise OSError(ctypes.get_errno(), "a call")
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


@pytest.fixture
def become_older(monkeypatch):
    """`become_older(line, other)`: the program that puts the walls up has another line, as an older kernel would."""
    real = sandbox._wrapped

    def become(line, other):
        code = Path(sandbox.__file__).read_text()
        assert line in code
        code = code.replace(line, other).replace("__file__", repr(sandbox.__file__))

        def wrapped(plan):
            program = real(plan)
            return [*program[:3], "-c", code, *program[4:]]

        monkeypatch.setattr(sandbox, "_wrapped", wrapped)

    return become


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


def test_a_step_has_no_network_by_any_way(walls, workspace, tmp_path):
    program = """
        attempt("tcp", lambda: socket.socket())
        attempt("udp", lambda: socket.socket(type=socket.SOCK_DGRAM))
        attempt("ipv6", lambda: socket.socket(socket.AF_INET6))
        attempt("unix", lambda: socket.socket(socket.AF_UNIX))
        attempt("netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
        attempt("a name", lambda: socket.getaddrinfo("example.org", 80))
        attempt("io_uring", lambda: system(425, 8, ctypes.create_string_buffer(120)))
        attempt("a pair of datagrams", lambda: socket.socketpair(type=socket.SOCK_DGRAM))
        attempt("a pair of packets", lambda: socket.socketpair(type=socket.SOCK_SEQPACKET))
        attempt("a pair of TIPC", lambda: socket.socketpair(socket.AF_TIPC))

        one, other = socket.socketpair()
        one.sendall(b"x")
        tried["a pair of its own"] = other.recv(1).decode()
        for act in (one.connect, one.bind):
            attempt(f"{act.__name__} to a path", lambda: act(log))
            attempt(f"{act.__name__} to a name", lambda: act("\\0shadowft-test"))
        attempt("listen", one.listen)
        attempt("send to a path", lambda: one.sendto(b"x", log))
    """
    tried = run_behind(walls, workspace, program, log=str(tmp_path / "log"))
    assert tried.pop("a pair of its own") == "x"
    assert tried.pop("a name") == "gaierror"
    assert tried.pop("send to a path") == "OSError"  # it is connected
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
        attempt("a link", lambda: os.symlink("/proc/self/environ", "train/environ"))
        attempt("a link between folders", lambda: os.rename("inputs/base", "train/base"))
        attempt("a pipe", lambda: os.mkfifo("train/pipe"))
    """
    tried = run_behind(walls, workspace, program, code=sandbox.__file__)
    assert {name for name, outcome in tried.items() if outcome == "done"} == {"own", "own, renamed", "temporary"}
    assert {outcome for outcome in tried.values() if outcome != "done"} == {"PermissionError"}


@pytest.fixture(params=["this kernel", "the oldest kernel with Landlock"])
def kernel(request, become_older):
    """An older Landlock knows fewer rights, and no scopes."""
    if request.param != "this kernel":
        become_older("    known = _KNOWN[", "    version = 1\n    known = _KNOWN[")


@pytest.mark.usefixtures("kernel")
def test_a_step_changes_no_file_that_it_may_only_read_and_none_that_it_may_not(walls, workspace, tmp_path):
    program = """
        readable = Path("inputs/base/config.json").resolve()
        for file in (readable, Path(root, "shadowft.db")):
            attempt(f"mode {file.name}", lambda: os.chmod(file, 0o600))
            attempt(f"owner {file.name}", lambda: os.chown(file, os.getuid(), -1))
            attempt(f"owner of a link {file.name}", lambda: os.lchown(file, os.getuid(), -1))
            attempt(f"times {file.name}", lambda: os.utime(file, (1, 1)))
            attempt(f"attribute {file.name}", lambda: os.setxattr(file, "user.x", b"x"))
            attempt(f"no attribute {file.name}", lambda: os.removexattr(file, "user.x"))
            attempt(f"length {file.name}", lambda: os.truncate(file, 0))
            attempt(f"a reader's length {file.name}", lambda: os.open(file, os.O_RDONLY | os.O_TRUNC))
            attempt(f"nobody's length {file.name}", lambda: os.open(file, 3 | os.O_TRUNC))
            attempt(f"watch {file.name}", lambda: system(watch, 0, bytes(file), 2))
        with readable.open() as held:
            attempt("an open one's mode", lambda: os.chmod(held.fileno(), 0o600))
            attempt("an open one's owner", lambda: os.chown(held.fileno(), os.getuid(), -1))
            attempt("an open one's times", lambda: os.utime(held.fileno(), (1, 1)))
    """
    before = [path.stat() for path in (workspace.base / "config.json", tmp_path / "shadowft.db")]
    watch = sandbox._NUMBERS[platform.machine()]["inotify_add_watch"]
    tried = run_behind(walls, workspace, program, root=str(tmp_path), watch=watch)
    assert {name for name, outcome in tried.items() if outcome != "PermissionError"} == set()
    assert [path.stat() for path in (workspace.base / "config.json", tmp_path / "shadowft.db")] == before


@pytest.mark.usefixtures("kernel")
def test_a_step_signals_and_limits_itself_and_no_other_process(walls, workspace):
    program = """
        import threading

        def thread_to_itself():
            signal.signal(signal.SIGUSR1, lambda *_: None)
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

        def limit(process):
            resource.prlimit(process, resource.RLIMIT_CORE)

        attempt("own kill", lambda: os.kill(os.getpid(), 0))
        attempt("own thread", thread_to_itself)
        attempt("own limit", lambda: limit(os.getpid()))
        attempt("own limit by default", lambda: limit(0))
        attempt("own thread's core", lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))

        attempt("kill", lambda: os.kill(parent, 0))
        attempt("kill a group", lambda: os.killpg(parent, 0))
        attempt("kill all", lambda: os.kill(-1, 0))
        attempt("kill by a handle", lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 0))
        attempt("kill by the kernel", lambda: fcntl.fcntl(1, fcntl.F_SETOWN, parent))
        attempt("kill by a socket", lambda: fcntl.ioctl(socket.socketpair()[0], 0x8901, parent.to_bytes(4, "little")))
        attempt("limit", lambda: limit(parent))
        attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, parent, 0))
        attempt("policy", lambda: os.sched_setscheduler(parent, os.SCHED_OTHER, os.sched_param(0)))
        attempt("session", os.setsid)
        attempt("group", lambda: os.setpgid(0, 0))
        attempt("a world of its own", lambda: system(unshare, 0x10000000))
        attempt("a child in a world of its own", lambda: system(clone, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0))
        attempt("a child of the worker", lambda: system(clone, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0))
    """
    calls = sandbox._NUMBERS[platform.machine()]
    tried = run_behind(walls, workspace, program, parent=os.getpid(), unshare=calls["unshare"], clone=calls["clone"])
    assert {name for name, outcome in tried.items() if outcome == "done"} == {
        name for name in tried if name.startswith("own ")
    }
    assert {outcome for outcome in tried.values() if outcome != "done"} == {"PermissionError"}


def test_a_call_that_is_newer_than_the_filter_or_that_hides_its_arguments_is_not_there(walls, workspace):
    program = """
        def errno_of(number):
            libc = ctypes.CDLL(None, use_errno=True)
            libc.syscall(number, 0, 0, 0, 0, 0)
            return ctypes.get_errno()

        tried.update({str(number): errno_of(number) for number in (435, 437, 452, 463, 100_000, 0x40000000 + 41)})
    """
    tried = run_behind(walls, workspace, program)
    assert set(tried.values()) == {errno.ENOSYS}


def test_a_step_has_threads_and_helpers(walls, workspace):
    program = """
        import concurrent.futures, subprocess

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            tried["threads"] = list(pool.map(abs, (-1, -2)))
        tried["helper"] = subprocess.check_output([sys.executable, "-c", "print('x')"], text=True)
    """
    assert run_behind(walls, workspace, program) == {"threads": [1, 2], "helper": "x\n"}


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
def no_files_wall(become_older):
    """A kernel that has never heard of Landlock."""
    become_older("= 444, 445, 446", "= 1444, 1445, 1446")


def test_a_wall_that_does_not_stand_is_said_and_the_other_one_stands(walls, no_files_wall):
    found = find_walls("cpu")
    assert (found.network, found.files) == (True, False)
    assert "Function not implemented" in found.missing


def test_what_a_step_could_do_all_the_same_is_found_and_said(walls, become_older):
    become_older('"chmod", "fchmod", "fchmodat"', '"fchmod"')
    assert find_walls("cpu").missing == "a step could still change the mode of a file outside"


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
