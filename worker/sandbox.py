"""The walls around a step: no network, and of the disk only what the step needs.

Run as a program, this file puts the walls around itself and becomes the step: walls of this kind can be added to and
never taken down, and they stay across `exec`. Two parts of the kernel make them, and neither wants a privilege:

- network: a seccomp filter refuses every socket but a pair of streams, and the ways around it. It also refuses what
  Landlock leaves to every process of a user: signals, limits, priorities and a look into the user's other processes;
  mode, owner, times and attributes of the user's files, also of those that cannot be read.
- files: Landlock shows the interpreter, the system's libraries, the devices and the workspace; the step writes in its
  own folder and in a temporary one, and makes no links there that lead out. What the workspace links to can be read.

Both together stand whole from Linux 5.13 on: what Landlock learnt later (emptying a file by its name, 6.2; signals and
abstract sockets, 6.12) the filter refuses on every kernel. Where only one can stand, the other one's part is open; of
Landlock alone that is also what it learnt later, on a kernel before that. What both leave: a step sees names and sizes
of files whose place it knows, command lines of other processes, and can bind those of its user to a core. It can use up
disk, memory and processes.

What this kernel and this device really bear is tried once in a process (`find_walls`), by a child behind the walls; the
setting SHADOWFT_SANDBOX says what happens where one of them cannot stand: `auto` goes without it and says so, `require`
refuses to start. This file imports the standard library alone: it runs before the interpreter knows of any other.
"""

from __future__ import annotations

import ctypes
import errno
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
    first = ""
    for network, files in ((True, True), (True, False), (False, True)):
        trouble = _try(Walls(network, files), device)
        if not trouble:
            return Walls(network, files, first)
        first = first or trouble
    return Walls(missing=first)


def command(step: Sequence[str], *, walls: Walls, workspace: Path, folder: Path, device: str) -> list[str]:
    """The command line that runs `step` behind the walls. It writes in `folder` and below `workspace`/tmp alone."""
    scratch = workspace / "tmp"
    scratch.mkdir(exist_ok=True)  # and nothing above it: a workspace that is gone must not come back
    machine_code = scratch / "machine-code"
    kept = _link_machine_code(machine_code)
    home = scratch / "home"
    home.mkdir(exist_ok=True)
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
    folder.mkdir(exist_ok=True)
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


def _try(walls: Walls, device: str) -> str:
    """Put the walls up around a small program that runs against them. Why they do not do; empty where they do."""
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
        return tried
    if tried["trouble"]:
        return str(tried["trouble"])
    walled = {"network": walls.network, "files": walls.files, "both": walls.network and walls.files}
    went_on = [act for wall, stands in walled.items() if stands for act in tried[wall]]
    return f"a step could still {', '.join(went_on)}" if went_on else ""


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
    """What could be done, by the wall that is to stand before it."""
    import socket  # loading it costs every step's start, and no step has a use for it

    worker = os.getppid()
    return {
        "network": _done(
            {
                "open a socket": lambda: socket.socket().close(),
                "send datagrams": lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].close(),
            }
        ),
        "files": _done({"read a file outside": Path(outside).read_text}),
        "both": _done(
            {
                "empty a file outside": lambda: os.truncate(outside, 0),
                "change the mode of a file outside": lambda: Path(outside).chmod(0o600),
                "signal the worker": lambda: os.kill(worker, 0),
                "limit the worker": lambda: resource.prlimit(worker, resource.RLIMIT_CORE),
            }
        ),
        "trouble": "" if device == "cpu" else _cuda_trouble(),
    }


def _done(acts: dict[str, Callable[[], object]]) -> list[str]:
    return [name for name, act in acts.items() if not _is_refused(act)]


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
#: Devices, sockets, pipes and links: no step makes one, and a worker that opened one later could be held up by it, or
#: led to what the step may not read. (Making characters, sockets, pipes, blocks, symbolic links.)
_NEVER_MADE = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12
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

#: How the kernel calls the machine, and the numbers of its calls; newer ones are the same on all machines.
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "open": 2, "ioctl": 16, "socket": 41, "connect": 42, "bind": 49, "listen": 50, "socketpair": 53,
        "clone": 56, "kill": 62, "fcntl": 72, "truncate": 76, "chmod": 90, "fchmod": 91, "chown": 92, "fchown": 93,
        "lchown": 94, "ptrace": 101, "setpgid": 109, "setsid": 112, "rt_sigqueueinfo": 129, "utime": 132,
        "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144, "setxattr": 188, "lsetxattr": 189,
        "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "tkill": 200, "tgkill": 234,
        "utimes": 235, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251,
        "inotify_add_watch": 254, "openat": 257, "fchownat": 260, "futimesat": 261, "fchmodat": 268, "unshare": 272,
        "utimensat": 280, "rt_tgsigqueueinfo": 297, "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302,
        "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "sched_setattr": 314, "bpf": 321,
    },
    "aarch64": {
        "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15, "fremovexattr": 16,
        "fcntl": 25, "inotify_add_watch": 27, "ioctl": 29, "ioprio_set": 30, "truncate": 45, "fchmod": 52,
        "fchmodat": 53, "fchownat": 54, "fchown": 55, "openat": 56, "utimensat": 88, "unshare": 97, "ptrace": 117,
        "sched_setparam": 118, "sched_setscheduler": 119, "kill": 129, "tkill": 130, "tgkill": 131,
        "rt_sigqueueinfo": 138, "setpriority": 140, "setpgid": 154, "setsid": 157, "socket": 198, "socketpair": 199,
        "bind": 200, "listen": 201, "connect": 203, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220,
        "rt_tgsigqueueinfo": 240, "perf_event_open": 241, "prlimit64": 261, "fanotify_init": 262, "setns": 268,
        "process_vm_readv": 270, "process_vm_writev": 271, "sched_setattr": 274, "bpf": 280,
    },
}  # fmt: skip
_EVERYWHERE = {"pidfd_send_signal": 424, "io_uring_setup": 425, "clone3": 435, "openat2": 437, "pidfd_getfd": 438}
#: What came into the kernel behind cachestat is not known here, and does not exist for a step. x32 calls lie above too.
_UNKNOWN = 452

#: What no step has a use for, by what it could do with it.
_REFUSED = (
    # Speak to others; io_uring can do it by another way.
    *("socket", "connect", "bind", "listen", "io_uring_setup"),
    # Look into another process, or make it slow.
    *("ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "perf_event_open", "bpf"),
    *("setpriority", "ioprio_set", "sched_setparam", "sched_setscheduler", "sched_setattr"),
    # Signal it by ways that name no process which could be compared; outlive the group that is killed.
    *("tkill", "pidfd_send_signal", "setsid", "setpgid"),
    # Have powers, and keys, of a world of its own.
    *("unshare", "setns", "add_key", "request_key", "keyctl"),
    # Change files of this user that it may not even read, or watch them: Landlock leaves that to any process.
    *("chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat"),
    *("utime", "utimes", "futimesat", "utimensat", "truncate", "inotify_add_watch", "fanotify_init"),
    *("setxattr", "lsetxattr", "fsetxattr", "removexattr", "lremovexattr", "fremovexattr"),
)
#: Their arguments lie in memory, where no filter sees them; libraries then take the older call.
_ABSENT = ("clone3", "openat2")

#: F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP: they have the kernel send a signal for the caller.
_OWNER_COMMANDS, _OWNER_REQUESTS = (8, 10, 15), (0x8901, 0x8902)
#: CLONE_NEW*, and CLONE_PARENT, with which a child would be the worker's.
_NEW_WORLDS = 0x7E020000 | 0x8000

_LOAD, _AND, _EQUAL, _AT_LEAST, _SKIP, _ANSWER = 0x20, 0x54, 0x15, 0x35, 0x05, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 38, 22

#: What to do, with what, and how many lines to skip where it holds and where it does not.
_Lines = list[tuple[int, int, int, int]]
_ALLOWED: _Lines = [(_ANSWER, _ALLOW, 0, 0)]
_REFUSAL: _Lines = [(_ANSWER, _ERROR | errno.EPERM, 0, 0)]
_ABSENCE: _Lines = [(_ANSWER, _ERROR | errno.ENOSYS, 0, 0)]


def _wall_off_network() -> None:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(f"no filter is written for {machine}")
    lines = _filter(_MACHINES[machine], {**_NUMBERS[machine], **_EVERYWHERE}, os.getpid())
    program = b"".join(struct.pack("=HBBI", code, yes, no, value) for code, value, yes, no in lines)
    kept = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(lines), ctypes.addressof(kept))
    if _libc.prctl(_PR_SET_SECCOMP, 2, header):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _filter(machine: int, numbers: dict[str, int], own: int) -> _Lines:
    """`own` is the step's process, which stays the same across exec."""
    lines = [
        *((_LOAD, 4, 0, 0), (_EQUAL, machine, 1, 0), *_REFUSAL),
        *((_LOAD, 0, 0, 0), (_AT_LEAST, _UNKNOWN, 0, 1), *_ABSENCE),
    ]
    for calls, answer in _answers(own):
        lines += _where([numbers[call] for call in calls if call in numbers], answer)
    return [*lines, *_ALLOWED]


def _answers(own: int) -> list[tuple[Sequence[str], _Lines]]:
    """What is answered to which calls. The lower half of an argument is compared: the kernel takes no more of these."""
    unix, stream, truncate, access = 1, 1, 0o1000, 0o3
    # Every kernel refuses to open a file for writing; one before 6.2 empties it also where it is opened for reading.
    emptied = _where((truncate, truncate | access), _REFUSAL)
    return [
        (_REFUSED, _REFUSAL),
        (_ABSENT, _ABSENCE),
        # One of datagrams could send to every socket that has a name; one of streams is a pipe with two directions.
        (("socketpair",), _argument(1, 0xF) + _where([stream], _argument(0) + _where([unix], _ALLOWED)) + _REFUSAL),
        # Itself and its group; before 6.12 nothing else keeps it from ending the worker.
        (
            ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "prlimit64"),
            _argument(0) + _where((0, own), _ALLOWED) + _REFUSAL,
        ),
        (("fcntl",), _argument(1) + _where(_OWNER_COMMANDS, _REFUSAL) + _ALLOWED),
        (("ioctl",), _argument(1) + _where(_OWNER_REQUESTS, _REFUSAL) + _ALLOWED),
        (("clone",), _argument(0, _NEW_WORLDS) + _where([0], _ALLOWED) + _REFUSAL),
        (("openat",), _argument(2, truncate | access) + emptied + _ALLOWED),
        (("open",), _argument(1, truncate | access) + emptied + _ALLOWED),
    ]


def _argument(place: int, mask: int = 0xFFFFFFFF) -> _Lines:
    return [(_LOAD, 16 + 8 * place, 0, 0), (_AND, mask, 0, 0)]


def _where(values: Sequence[int], then: _Lines) -> _Lines:
    """`then`, which ends with an answer, where what was loaded is one of `values`; else what follows."""
    compared = [(_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return [*compared, (_SKIP, len(then), 0, 0), *then]


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
