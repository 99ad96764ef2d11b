"""Storage: an object is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import resource
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import LeaseLost, Unavailable
from core.storage import COPY_BYTES, LocalStorage


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "storage")


def everything(storage):
    """Every file, the hidden ones too."""
    return sorted(str(path.relative_to(storage.path(""))) for path in storage.path("").rglob("*") if path.is_file())


@given(pieces=st.lists(st.binary(max_size=300), max_size=8))
def test_what_is_kept_is_what_was_written(tmp_path_factory, pieces):
    storage = LocalStorage(tmp_path_factory.mktemp("storage"))
    incoming = storage.receive("files/team/one")
    for piece in pieces:
        incoming.write(piece)
    whole = b"".join(pieces)
    stored = incoming.keep()
    assert (stored.bytes, stored.sha256) == (len(whole), hashlib.sha256(whole).hexdigest())
    assert storage.path("files/team/one").read_bytes() == whole
    assert everything(storage) == ["files/team/one"]


def test_nothing_can_be_read_before_it_is_kept(storage):
    incoming = storage.receive("one")
    incoming.write(b"x" * 10_000_000)
    assert not storage.path("one").exists()
    incoming.keep()
    assert storage.path("one").stat().st_size == 10_000_000


def test_what_is_dropped_leaves_nothing(storage):
    incoming = storage.receive("folder/one")
    incoming.write(b"half")
    incoming.drop()
    assert everything(storage) == []


def test_what_is_still_coming_in_at_the_end_is_dropped(storage):
    kept, dropped, cut = (storage.receive(f"a/{name}") for name in ("kept", "dropped", "cut"))
    for incoming in (kept, dropped, cut):
        incoming.write(b"x")
    kept.keep()
    dropped.drop()
    storage.close()
    assert [path.name for path in storage.path("a").iterdir()] == ["kept"]
    with pytest.raises(Unavailable):
        cut.keep()


def test_a_second_object_of_the_name_replaces_the_first_whole(storage):
    for content in (b"first", b"second, longer"):
        incoming = storage.receive("one")
        incoming.write(content)
        incoming.keep()
    assert storage.path("one").read_bytes() == b"second, longer"


def test_a_file_is_adopted_by_copy(storage, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5_000_000))
    with source.open("rb") as file:
        stored = storage.adopt("jobs/1/model", file)
    source.write_bytes(b"changed later")
    assert stored.bytes == 5_000_000
    assert hashlib.sha256(storage.path("jobs/1/model").read_bytes()).hexdigest() == stored.sha256


def test_what_is_adopted_can_be_broken_off_at_any_piece_and_leaves_nothing(storage):
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise LeaseLost("taken")

    with pytest.raises(LeaseLost):
        storage.adopt("jobs/1/model", io.BytesIO(bytes(3 * COPY_BYTES)), check=check)
    assert everything(storage) == []


def test_a_source_that_cannot_be_read_leaves_nothing(storage, tmp_path):
    with (tmp_path / "source").open("wb") as file, pytest.raises(io.UnsupportedOperation):
        storage.adopt("one", file)
    assert everything(storage) == []


@pytest.mark.parametrize("key", ["../one", "jobs/1/resume/l/../../../../one", "/etc/one"])
def test_a_key_that_leads_out_of_the_storage_is_refused(storage, key):
    with pytest.raises(ValueError, match="leads out"):
        storage.receive(key)


def test_a_fetched_object_is_readable_and_a_second_fetch_is_fine(storage, tmp_path):
    storage.adopt("one", io.BytesIO(b"rows"))
    for _ in range(2):
        storage.fetch("one", tmp_path / "inputs" / "file")
    assert (tmp_path / "inputs" / "file").read_bytes() == b"rows"


def test_deleting_takes_one_object_or_all_below_a_prefix_and_does_not_mind_absence(storage):
    for key in ("jobs/1/a1/model/w", "jobs/1/a1/card", "jobs/1/a2/card", "files/1"):
        storage.adopt(key, io.BytesIO(b"x"))
    storage.delete("jobs/1/a1")
    storage.delete("files/1")
    storage.delete("files/absent")
    assert everything(storage) == ["jobs/1/a2/card"]


@contextmanager
def disk_full_after(size):
    """The kernel refuses to let any file of this process grow past `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "pieces", [[4106], [4096, 100_000], [5000, 5000], [100] * 90], ids=["flush", "big", "kept", "many"]
)
def test_a_full_disk_is_said_so_and_leaves_nothing(storage, pieces):
    storage.receive("neighbour").keep()
    incoming = storage.receive("one")
    with disk_full_after(4096), pytest.raises(Unavailable) as caught:  # noqa: PT012 - the last write may be the flush
        for size in pieces:
            incoming.write(b"x" * size)
        incoming.keep()
    with disk_full_after(4096):
        incoming.drop()  # as the caller does in its except clause, the disk still full
    assert (caught.value.status, caught.value.code) == (503, "storage_unavailable")
    assert everything(storage) == ["neighbour"]


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "storage").write_text("a file in the way")
    with pytest.raises(Unavailable):
        LocalStorage(tmp_path / "storage").receive("files/one")


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EDQUOT, "disk_full"), (errno.EROFS, "storage_unavailable")]
)
def test_only_a_full_disk_is_called_so(storage, monkeypatch, number, code):
    """The one passes once somebody makes room, the other may stay for ever."""

    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    incoming = storage.receive("one")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(Unavailable) as caught:
        incoming.keep()
    assert caught.value.code == code
