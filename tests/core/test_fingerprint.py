"""A fingerprint differs wherever a verdict might: two states of one folder are never taken for the same."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core.checkpoints import read_checkpoint
from core.fingerprint import content_sha256, model_fingerprint
from core.job_spec import ModelSource
from tests.core.test_pairs import write_model


@pytest.fixture
def folder(tmp_path):
    """With more weights than the samples cover."""
    folder = write_model(tmp_path / "model")
    save_file({"w": np.ones(3_000_000, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def fingerprint(folder):
    return model_fingerprint(ModelSource(kind="local", location=str(folder)), read_checkpoint(folder))


def mend_one_weight(file):
    weights = load_file(file)
    weights["w"][30_000] = 2  # behind the first sample and before the second
    save_file(weights, file)


def mend_in_place(file):
    state = file.stat()
    with file.open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"\1")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def put_a_copy_in_its_place(file):
    shutil.copy2(file, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


@pytest.mark.parametrize("change", [mend_one_weight, mend_in_place, put_a_copy_in_its_place])
def test_what_no_sample_shows_changes_it_too(folder, change):
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    change(folder / "model.safetensors")
    assert fingerprint(folder) != before


def test_a_copy_elsewhere_has_the_same_content_and_another_model_has_not(folder, tmp_path):
    def content(one):
        return content_sha256(one, read_checkpoint(one))

    before = content(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert content(tmp_path / "copy") == before
    save_file({"w": np.zeros(3_000_000, dtype=np.float32)}, folder / "model.safetensors")
    assert content(folder) != before
