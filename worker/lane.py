"""What this worker's lane is: a device and the memory that one job may use on it. Found without importing torch."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import psutil

from core.config import MEBIBYTE, Settings
from core.errors import InvalidInput

#: Share of the device's memory that a job may count on; the rest is the system's and other processes'.
USABLE_SHARE = 0.85


@dataclass(frozen=True)
class Lane:
    #: `cpu`, or `cuda:N`.
    device: str
    memory_bytes: int


def find_lane(settings: Settings) -> Lane:
    """Raises InvalidInput where the settings name a GPU that is not there."""
    gpus = _gpu_memory_bytes() if settings.device != "cpu" else []
    device = _device(settings.device, len(gpus))
    if settings.lane_memory_bytes is not None:
        return Lane(device=device, memory_bytes=settings.lane_memory_bytes)
    total = psutil.virtual_memory().total if device == "cpu" else gpus[int(device.removeprefix("cuda:"))]
    return Lane(device=device, memory_bytes=int(total * USABLE_SHARE))


def _device(wanted: str, gpus: int) -> str:
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return "cpu"
    index = 0 if wanted == "auto" else _index(wanted)
    if index >= gpus:
        raise InvalidInput(
            f"SHADOWFT_DEVICE is {wanted!r}, but this machine shows {gpus} GPUs.", param="SHADOWFT_DEVICE"
        )
    return f"cuda:{index}"


def _index(wanted: str) -> int:
    if not wanted.removeprefix("cuda:").isdecimal():
        raise InvalidInput(
            f"SHADOWFT_DEVICE is {wanted!r}; it takes auto, cpu, or the index of a GPU.", param="SHADOWFT_DEVICE"
        )
    return int(wanted.removeprefix("cuda:"))


def _gpu_memory_bytes() -> list[int]:
    """Each GPU's memory, by index (0 where the driver does not say); empty where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) * MEBIBYTE if line.strip().isdecimal() else 0 for line in done.stdout.splitlines()]
