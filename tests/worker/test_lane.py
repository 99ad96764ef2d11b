"""What a worker's lane is, asked of a real program named `nvidia-smi`, of which the tests bring their own."""

from __future__ import annotations

import psutil
import pytest

from core.config import MEBIBYTE, Settings
from core.errors import InvalidInput
from worker.lane import USABLE_SHARE, Lane, find_lane


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine("81559", "40960")`: a machine with two GPUs; `machine()`: one without a driver."""

    def make(*lines, status=0):
        monkeypatch.setenv("PATH", str(tmp_path))
        if lines:
            program = tmp_path / "nvidia-smi"
            program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines) + f"exit {status}\n")
            program.chmod(0o755)

    return make


def lane(**values):
    return find_lane(Settings(_env_file=None, **values))


def test_a_machine_without_a_driver_computes_on_its_cpu(machine):
    machine()
    found = lane()
    assert found.device == "cpu"
    assert found.memory_bytes == int(psutil.virtual_memory().total * USABLE_SHARE)


def test_auto_takes_the_first_gpu_and_leaves_some_of_its_memory(machine):
    machine("81559", "40960")
    assert lane() == Lane(device="cuda:0", memory_bytes=int(81559 * MEBIBYTE * USABLE_SHARE))


@pytest.mark.parametrize("name", ["1", "cuda:1"])
def test_a_gpu_is_named_by_its_index(machine, name):
    machine("81559", "40960")
    assert lane(device=name) == Lane(device="cuda:1", memory_bytes=int(40960 * MEBIBYTE * USABLE_SHARE))


def test_the_cpu_can_be_asked_for_beside_a_gpu(machine):
    machine("81559")
    assert lane(device="cpu").device == "cpu"


def test_a_memory_that_is_set_is_taken_as_it_is(machine):
    machine("81559")
    assert lane(lane_memory_bytes=123) == Lane(device="cuda:0", memory_bytes=123)


@pytest.mark.parametrize("name", ["2", "cuda:2", "gpu", "-1", "", "cuda:"])
def test_a_gpu_that_is_not_there_is_said_so(machine, name):
    machine("81559", "40960")
    with pytest.raises(InvalidInput) as caught:
        lane(device=name)
    assert caught.value.param == "SHADOWFT_DEVICE"


def test_a_driver_that_fails_is_no_gpu(machine):
    machine("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver", status=9)
    assert lane().device == "cpu"
