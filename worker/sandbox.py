"""The walls around a step: no network, and of the disk only what the step needs.

Run as a program, this file puts the walls around itself and becomes the step: walls of this kind can be added to and
never taken down, and they stay across `exec`. Two parts of the kernel make them, and neither wants a privilege:

- network: a seccomp filter refuses every new socket, of whatever kind, and the ways around it. It also refuses to look
  into other processes.
- files: Landlock shows the interpreter, the system's libraries, the devices and the workspace; the step writes in its
  own folder and in a temporary one. What the workspace links to can be read. Environments, memory and signals of
  processes outside are out of reach.

What this kernel and this device really bear is tried once in a process (`find_walls`), by a child behind the walls; the
setting SHADOWFT_SANDBOX says what happens where one of them cannot stand: `auto` goes without it and says so, `require`
refuses to start. This file imports the standard library alone: it runs before the interpreter knows of any other.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: How long a trial behind the walls may take; CUDA's start is most of it.
TRIAL_SECONDS = 60.0
#: The exit status where a wall could not be put up although the trial had said that it can.
EXIT_NO_WALL = 71

# --- what stands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walls:
    network: bool = False
    files: bool = False
    #: Why one of them does not stand; empty where both do.
    missing: str = ""


@dataclass(frozen=True)
class Plan:
    """What the program is to do to itself before it becomes `command`."""

    command: Sequence[str]
    walls: Walls
    #: The process without which this one has no reason to live.
    parent: int
    readable: Sequence[str] = ()
    #: Names below it can be seen, and nothing else of it.
    listed: Sequence[str] = ()
    writable: Sequence[str] = ()
    #: CUDA names its threads at its start, by writing to /proc/self/task.
    names_threads: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def find_walls(device: str) -> Walls:
    """Which walls stand on this machine around a step on `device` (`cpu`, `cuda:0`), as a trial showed."""
    trouble = ""
    for wanted in (Walls(network=True, files=True), Walls(network=True), Walls(files=True)):
        found = _try(wanted, device)
        if not found.missing:
            return Walls(found.network, found.files, trouble)
        trouble = trouble or found.missing
    return Walls(missing=trouble)


def command(step: Sequence[str], *, walls: Walls, workspace: Path, folder: Path, device: str) -> list[str]:
    """The command line that runs `step` behind the walls. It writes in `folder` and below `workspace`/tmp alone."""
    scratch = workspace / "tmp"
    machine_code = scratch / "machine-code"
    kept = _link_machine_code(machine_code)
    home = scratch / "home"
    home.mkdir(parents=True, exist_ok=True)
    return _wrapped(
        Plan(
            command=step,
            walls=walls,
            parent=os.getpid(),
            readable=[*_of_the_system(), str(workspace), *_linked(workspace / "inputs"), *kept],
            listed=[str(_CODE)],
            writable=[str(folder), str(scratch)],
            names_threads=device != "cpu",
            environment={"HOME": str(home), "TMPDIR": str(scratch), "NUMBA_CACHE_DIR": str(machine_code)},
        )
    )


def _wrapped(plan: Plan) -> list[str]:
    return [sys.executable, "-I", "-S", __file__, json.dumps(asdict(plan))]


# --- what a step needs ----------------------------------------------------------------------------------------------

_SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/opt/rocm", "/sys", "/proc"),
    *("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone"),
    *("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/os-release", "/etc/mime.types", "/etc/alternatives"),
    *("/etc/ssl/openssl.cnf", "/nix/store", "/run/current-system"),
)
#: The parts of /dev that are everybody's, and those of GPUs.
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_GPU_DEVICES = ("nvidia*", "dri", "kfd")


#: Where the packages lie. Of an installed one it is site-packages; of a checkout, secrets may lie beside the code.
_CODE = Path(__file__).parents[1]


def _of_the_system() -> list[str]:
    """The system's libraries, the interpreter with its packages, and this code."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    ours = [str(_CODE / "core"), str(_CODE / "worker")]
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    python = (sys.prefix, sys.base_prefix, sys.exec_prefix)
    return [path for path in dict.fromkeys([*_SYSTEM, *python, *packages, *ours, *libraries]) if path]


def _linked(inputs: Path) -> list[str]:
    """Where the links in a workspace lead, files in storage and models, and where models are of links themselves, as
    those in the Hub's cache are, the files that they lead to."""
    targets = [link.resolve() for link in _links(inputs)]
    files = [link.resolve() for target in targets if target.is_dir() for link in _links(target)]
    return [str(path) for path in (*targets, *files)]


def _links(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):  # which follows no link
        yield from (path for name in (*folders, *files) if (path := Path(place) / name).is_symlink())


def _link_machine_code(folder: Path) -> list[str]:
    """Links to the machine code that is kept of the grafting loops (worker/weights/machine_code.py); the folders they
    lead to. What a step adds is its own: no other job runs code that this one wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    given = os.environ.get("NUMBA_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    beside = Path(__file__).parent / "weights" / "__pycache__"
    kept = [Path(given)] if given else [beside, Path(cache) / "shadowft"]
    for place in reversed(kept):  # the first one counts, as it does where no walls stand
        for file in place.glob("loops-*.o"):
            link = folder / file.name
            link.unlink(missing_ok=True)
            link.symlink_to(file)
    return [str(place) for place in kept]


# --- the trial --------------------------------------------------------------------------------------------------------


def _try(walls: Walls, device: str) -> Walls:
    """Put the walls up around a small program that runs against them."""
    with tempfile.TemporaryDirectory(prefix="shadowft-walls-") as place:
        inside, outside = Path(place) / "inside", Path(place) / "outside"
        inside.mkdir()
        outside.write_text("seen")
        trial = [sys.executable, "-I", "-S", __file__, "--try", str(outside), device]
        plan = Plan(
            command=trial,
            walls=walls,
            parent=os.getpid(),
            readable=_of_the_system(),
            listed=[str(_CODE)],
            writable=[str(inside)],
            names_threads=device != "cpu",
            environment={"HOME": str(inside), "TMPDIR": str(inside)},
        )
        # As a step has it: CUDA sees the lane's device alone.
        visible = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else device.removeprefix("cuda:")}
        tried = _run(_wrapped(plan), {**os.environ, **visible})
    if isinstance(tried, str):
        return Walls(missing=tried)
    if tried["trouble"]:
        return Walls(missing=tried["trouble"])
    return Walls(network=tried["network"], files=tried["files"])


def _run(program: Sequence[str], environment: dict[str, str]) -> dict[str, Any] | str:
    """What the program printed, or why it printed nothing."""
    try:
        done = subprocess.run(program, env=environment, capture_output=True, timeout=TRIAL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the trial did not end: {error}"
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return last[:300] or f"the trial ended with {done.returncode}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _trial(outside: str, device: str) -> dict[str, Any]:
    import socket  # loading it costs every step's start, and no step has a use for it

    return {
        "network": _is_refused(lambda: socket.socket().close()),
        "files": _is_refused(Path(outside).read_text),
        "trouble": "" if device == "cpu" else _cuda_trouble(),
    }


def _is_refused(act: Callable[[], object]) -> bool:
    try:
        act()
    except PermissionError:
        return True
    return False


def _cuda_trouble() -> str:
    """Why the lane's GPU cannot be used from here; empty where it can."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"CUDA cannot be loaded: {error}"
    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    for name, arguments in (
        ("cuInit", (0,)),
        ("cuDeviceGet", (ctypes.byref(device), 0)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), device)),
        ("cuCtxSetCurrent", (context,)),
        ("cuMemAlloc_v2", (ctypes.byref(memory), ctypes.c_size_t(1 << 20))),
    ):
        if status := getattr(cuda, name)(*arguments):
            return f"{name} answers {status}"
    return ""


# --- Landlock -------------------------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
#: The rights that each version of Landlock knows; a later one knows those of the last entry.
_KNOWN = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
#: What a rule about a single file may say.
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | _IOCTL
#: Devices and the pipes of others: no step makes one. (Making characters, sockets, blocks.)
_NEVER_MADE = 1 << 6 | 1 << 9 | 1 << 11
_NO_ABSTRACT_SOCKETS, _NO_SIGNALS = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)


def _system(number: int, *arguments: Any) -> int:
    answer = int(_libc.syscall(number, *arguments))
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return answer


def _wall_off_files(plan: Plan) -> None:
    version = _system(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    known = _KNOWN[min(version, max(_KNOWN))]
    scoped = _NO_ABSTRACT_SOCKETS | _NO_SIGNALS if version >= 6 else 0
    attributes = struct.pack("=QQQ", known, 0, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _system(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    reading, everything = _READ | _LIST | _EXECUTE, known & ~_NEVER_MADE
    for path in plan.readable:
        _allow(ruleset, path, reading & known)
    for path in plan.listed:
        _allow(ruleset, path, _LIST)
    for path in plan.writable:
        _allow(ruleset, path, everything)
    for path in _devices():
        _allow(ruleset, path, (_READ | _WRITE | _LIST | _TRUNCATE | _IOCTL) & known)
    if plan.names_threads:
        # Kept open across exec: the rule hangs on what the kernel has in memory of the folder.
        os.set_inheritable(_allow(ruleset, "/proc/self", _READ | _LIST | _WRITE, keep=True), True)
    _system(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _devices() -> Iterable[str]:
    dev = Path("/dev")
    return [*(str(dev / name) for name in _DEVICES), *(str(path) for name in _GPU_DEVICES for path in dev.glob(name))]


def _allow(ruleset: int, path: str, rights: int, *, keep: bool = False) -> int:
    """Let the process do this to `path` and what lies below it; nothing where there is no such path."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return -1
    rule = struct.pack("=Qi", rights if Path(path).is_dir() else rights & _OF_FILES, place)
    _system(_ADD_RULE, ruleset, 1, rule, 0)
    if not keep:
        os.close(place)
    return place


# --- seccomp ----------------------------------------------------------------------------------------------------------

#: By machine: how the kernel calls it, and the calls that a step has no use for: socket; io_uring, which can do the
#: same by another way; a look into another process; the kernel's keys, programs and counters.
_CALLS = {
    "x86_64": (0xC000003E, (41, 425, 101, 310, 311, 248, 249, 250, 321, 298)),
    "aarch64": (0xC00000B7, (198, 425, 117, 270, 271, 217, 218, 219, 280, 241)),
}
_LOAD, _EQUAL, _AT_LEAST, _ANSWER = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # EPERM
_X32 = 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22


def _wall_off_network() -> None:
    if platform.machine() not in _CALLS:
        raise OSError(f"no filter is written for {platform.machine()}")
    architecture, calls = _CALLS[platform.machine()]
    # Each line: what to do, with what, and how many lines to skip where it holds and where it does not.
    refuse = len(calls) + 1  # lines from the first comparison with a call to the refusal
    lines = [
        (_LOAD, 4, 0, 0),
        (_EQUAL, architecture, 0, refuse + 2),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, _X32, refuse, 0),
        *((_EQUAL, call, refuse - 1 - place, 0) for place, call in enumerate(calls)),
        (_ANSWER, _ALLOW, 0, 0),
        (_ANSWER, _REFUSE, 0, 0),
    ]
    program = b"".join(struct.pack("=HBBI", code, yes, no, value) for code, value, yes, no in lines)
    kept = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(lines), ctypes.addressof(kept))
    if _libc.prctl(_PR_SET_SECCOMP, 2, header):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# --- root -----------------------------------------------------------------------------------------------------------

_CAPABILITIES_V3 = 0x20080522
#: Files of other owners, which models often are: the one power of root that a step has a use for.
_DAC_OVERRIDE = 1 << 1


def _drop_powers() -> None:
    """Of a root's powers some lead past the walls, as the one to read other processes' memory for its figures."""
    kept = _DAC_OVERRIDE if os.geteuid() == 0 else 0
    header, sets = struct.pack("=Ii", _CAPABILITIES_V3, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    if _libc.capset(header, sets):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# --- the program ----------------------------------------------------------------------------------------------------


def _become(plan: Plan) -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != plan.parent:  # it died before the line above
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it would hold a customer's rows
    try:
        if plan.walls.files or plan.walls.network:
            _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            _drop_powers()
        if plan.walls.files:
            _wall_off_files(plan)
        if plan.walls.network:
            _wall_off_network()
    except OSError as error:
        sys.stderr.write(f"The walls around the step cannot be put up: {error}\n")
        sys.exit(EXIT_NO_WALL)
    os.execve(plan.command[0], list(plan.command), {**os.environ, **plan.environment})  # noqa: S606


def _main() -> None:
    if sys.argv[1] == "--try":
        sys.stdout.write(json.dumps(_trial(*sys.argv[2:])))
        return
    values = json.loads(sys.argv[1])
    _become(Plan(**{**values, "walls": Walls(**values["walls"])}))


if __name__ == "__main__":
    _main()
