"""Faults on demand, for tests: `SHADOWFT_FAILPOINT=PLACE=FAULT,…` names places and what happens there.

Inert unless that is set. The places are where the calls are.
"""

from __future__ import annotations

import errno
import os
import signal
import time


def failpoint(place: str, *, out_of_memory: type[Exception] = MemoryError) -> None:
    """Nothing, or the fault that is asked for here: `memory`, `disk`, `killed`, `asked` (to save and leave) or
    `stalled`."""
    wanted = dict(one.split("=") for one in os.environ.get("SHADOWFT_FAILPOINT", "").split(",") if one)
    fault = wanted.get(place)
    if fault == "memory":
        raise out_of_memory(f"{place}: out of memory, as asked for")
    if fault == "disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "asked":
        os.kill(os.getpid(), signal.SIGUSR1)
    while fault == "stalled":
        time.sleep(1)
