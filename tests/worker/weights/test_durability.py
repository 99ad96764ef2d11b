"""A graft that is killed, crowded out or refused: the disk holds all of the result or none, and no source changes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from core.errors import Conflict, InvalidInput, PairRefused, ShadowError
from core.graft_plan import Selection
from tests.worker.weights.children import (
    graft_and_wait,
    graft_slowly,
    graft_until_killed,
    graft_until_published,
    graft_within,
    pipe,
    run_child,
    start_child,
)
from tests.worker.weights.families import Layout, Recipe, Sizes
from tests.worker.weights.made_checkpoints import all_bytes, save_model
from worker.weights import FullDelta, GraftResult, LoraDelta, graft, verify, writing
from worker.weights.graft import planned
from worker.weights.save import WHOLE
from worker.weights.writing import OnProgress

SOURCES = {"base", "tuned", "instruct"}
RECIPE = Recipe(sizes=Sizes(16, 24, 8, 64, layers=3), layouts=(Layout(2), Layout(), Layout(5)))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    RECIPE.write(tmp_path)
    return tmp_path


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    delta = FullDelta(base=folder / "base", tuned=folder / "tuned")
    places = {"instruct": folder / "instruct", "delta": delta, "out": folder / "out"}
    return places | {"selection": Selection(scope="all")} | changes


def run(folder: Path, **changes: Any) -> GraftResult:
    return graft(**options(folder, **changes))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hashes", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 1.0])
def test_a_killed_graft_goes_on_and_ends_in_the_same_bytes(pair, share, hashes):
    run(pair, hashes=hashes)
    undisturbed = all_bytes(pair / "out")
    (pair / "out").rename(pair / "undisturbed")
    assert run_child(graft_until_killed, share, options(pair, hashes=hashes)) == -signal.SIGKILL
    assert not (pair / "out").exists()
    result = run(pair, hashes=hashes)
    assert all_bytes(pair / "out") == undisturbed
    assert share < 0.3 or 0 < result.resumed_shards <= 5
    assert names(pair) == SOURCES | {"out", "undisturbed"}


def fail_at(share: float) -> OnProgress:
    def watch(done: int, total: int) -> None:
        if done >= share * total:
            raise RuntimeError("enough")

    return watch


@pytest.mark.parametrize(("hashes", "kept"), [(True, 2), (False, 4)])
def test_what_is_lost_is_the_shards_that_were_made_at_once(pair, monkeypatch, hashes, kept):
    """Of five that are hashed two and then three, which end together; otherwise one after the other. No part stays."""
    monkeypatch.setattr(writing, "BLOCK_BYTES", 256)
    with pytest.raises(RuntimeError, match="enough"):
        run(pair, hashes=hashes, threads=1, on_progress=fail_at(0.93))
    assert not list(pair.rglob("*.part"))
    seen: list[int] = []
    assert run(pair, hashes=hashes, on_progress=lambda done, total: seen.append(done)).resumed_shards == kept
    assert seen == sorted(seen)
    run(pair, hashes=hashes, out=pair / "undisturbed")
    assert all_bytes(pair / "out") == all_bytes(pair / "undisturbed")


@pytest.mark.parametrize("count", range(20))
def test_few_shards_are_hashed_at_once_and_none_alone_at_the_end(count):
    groups = list(writing._groups(list(range(count))))
    assert [shard for group in groups for shard in group] == list(range(count))
    assert all(min(2, count) <= len(group) <= writing.AT_ONCE for group in groups)


def test_a_graft_killed_at_any_moment_ends_in_the_same_bytes(pair):
    """The moments are whatever they are: three kills in a row, each further on, and then the rest."""
    run(pair)
    undisturbed = all_bytes(pair / "out")
    (pair / "out").rename(pair / "undisturbed")
    for seconds in (0.02, 0.08, 0.15):
        child = start_child(graft_slowly, 0.01, options(pair))
        time.sleep(seconds)
        child.kill()
        child.join()
    if not (pair / "out").exists():
        run(pair)
    assert all_bytes(pair / "out") == undisturbed
    assert names(pair) == SOURCES | {"out", "undisturbed"}


def rewrite_tuned(folder: Path) -> None:
    """Other weights under the same names, of the same sizes."""
    for file in (folder / "tuned").iterdir():
        file.unlink()
    (folder / "tuned").rmdir()
    other = Recipe(sizes=RECIPE.sizes, layouts=RECIPE.layouts, seed=1)
    other.save(folder / "made", other.models())
    (folder / "made" / "tuned").rename(folder / "tuned")


def flip_a_weight(folder: Path) -> None:
    """In place, and with the old times put back, as a careless copy does."""
    file = folder / "tuned" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


CHANGES = {
    "another tuned model": (rewrite_tuned, {}),
    "one bit of a weight": (flip_a_weight, {}),
    "another scale": (lambda folder: None, {"scale": 0.5}),
    "another scope": (lambda folder: None, {"selection": Selection(scope="linear")}),
    "another dtype": (lambda folder: None, {"output_dtype": "float32"}),
}


@pytest.mark.parametrize(("change", "changed"), CHANGES.values(), ids=CHANGES.keys())
def test_what_a_killed_graft_left_serves_no_other_graft(pair, change, changed):
    assert run_child(graft_until_killed, 0.9, options(pair)) == -signal.SIGKILL
    change(pair)
    result = run(pair, **changed)
    run(pair, **changed, out=pair / "fresh")
    assert result.resumed_shards == 0
    assert all_bytes(pair / "out") == all_bytes(pair / "fresh")
    assert not [name for name in names(pair) if name.startswith(".")]


def test_a_damaged_shard_of_a_killed_graft_is_made_again(pair):
    """A power cut may leave a file of the right length with wrong bytes, where a disk promises more than it keeps."""
    run(pair, out=pair / "undisturbed")
    assert run_child(graft_until_killed, 0.9, options(pair)) == -signal.SIGKILL
    shard = min((pair / ".out.graft").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8])
    run(pair)
    assert all_bytes(pair / "out") == all_bytes(pair / "undisturbed")


def cut_the_record(draft: Path) -> None:
    record = min((draft / "records").iterdir())
    record.write_bytes(record.read_bytes()[:40])


def change_a_figure(draft: Path) -> None:
    """Still a record by its shape; what the graft says of itself would be made of it."""
    record = min((draft / "records").iterdir())
    content = re.sub(rb'"sha256": "..', b'"sha256": "00', record.read_bytes())
    assert content != record.read_bytes()
    record.write_bytes(content)


DAMAGED_DRAFTS: dict[str, Callable[[Path], object]] = {
    "a cut record": cut_the_record,
    "an empty record": lambda draft: min((draft / "records").iterdir()).write_bytes(b""),
    "a record of another shape": lambda draft: min((draft / "records").iterdir()).write_bytes(b"[]"),
    "a record with another figure": change_a_figure,
    "a plan that is no text": lambda draft: (draft / "plan.json").write_bytes(b"\xff\xfe"),
    "no plan": lambda draft: (draft / "plan.json").unlink(),
    "no folder": lambda draft: shutil.rmtree(draft / "folder"),
    "no records": lambda draft: shutil.rmtree(draft / "records"),
}


@pytest.mark.parametrize("damage", DAMAGED_DRAFTS.values(), ids=DAMAGED_DRAFTS.keys())
def test_what_is_damaged_in_a_draft_is_made_again_at_the_first_try(pair, damage):
    assert run_child(graft_until_killed, 0.9, options(pair)) == -signal.SIGKILL
    damage(pair / ".out.graft")
    run(pair)
    run(pair, out=pair / "undisturbed")
    assert all_bytes(pair / "out") == all_bytes(pair / "undisturbed")
    assert names(pair) == SOURCES | {"out", "undisturbed"}


def test_a_kill_after_the_last_rename_spoils_no_later_graft(pair):
    """What is left of the draft has a plan and no folder."""
    assert run_child(graft_until_published, options(pair)) == -signal.SIGKILL
    published = all_bytes(pair / "out")
    shutil.rmtree(pair / "out")
    assert run(pair).resumed_shards == 0
    assert all_bytes(pair / "out") == published
    assert names(pair) == SOURCES | {"out"}


# --- two at once ------------------------------------------------------------------------------------------------------


def test_of_two_grafts_to_one_place_the_second_is_refused(pair):
    here, there = pipe()
    first = start_child(graft_and_wait, there, options(pair))
    assert here.recv() == "half-way"
    with pytest.raises(ShadowError, match="out"):
        run(pair)
    assert not (pair / "out").exists()
    here.send("go on")
    first.join()
    assert first.exitcode == 0
    run(pair, out=pair / "alone")
    assert all_bytes(pair / "out") == all_bytes(pair / "alone")
    assert names(pair) == SOURCES | {"out", "alone"}


def test_a_lock_that_its_holder_took_away_locks_nobody_out_and_nobody_in(pair, monkeypatch):
    """Between the opening of a lock and its locking another graft may end, and a third begin."""
    real, held = fcntl.flock, []

    def late(file: BinaryIO, how: int) -> None:
        if not held:
            held.append(Path(file.name).parent)
            shutil.rmtree(held[0])  # the first graft has ended
            held[0].mkdir()
            held.append((held[0] / "lock").open("wb"))  # the third has begun
            real(held[1], how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(Conflict, match="Another process is writing out"):
        run(pair)
    held[1].close()
    run(pair)
    assert names(pair) == SOURCES | {"out"}


def make_a_file(draft: Path) -> Path:
    draft.write_text("mine")
    return draft


def make_the_lock_a_folder(draft: Path) -> Path:
    (draft / "lock").mkdir(parents=True)
    return draft / "lock"


@pytest.mark.parametrize("put", [make_a_file, make_the_lock_a_folder])
def test_what_lies_in_the_place_of_a_draft_is_named_and_kept(pair, put):
    thing = put(pair / ".out.graft")
    with pytest.raises(Conflict) as refused:
        run(pair)
    assert str(thing) in refused.value.message
    assert thing.exists()
    assert names(pair) == SOURCES | {".out.graft"}


# --- the place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [250, 256])
def test_a_name_that_is_too_long_is_refused(pair, length):
    """The draft's name is longer than its own."""
    with pytest.raises(InvalidInput, match="is too long"):
        run(pair, out=pair / ("x" * length))
    assert names(pair) == SOURCES


def test_a_place_that_is_there_by_another_name_is_refused(pair):
    with pytest.raises(InvalidInput, match="exists already"):
        run(pair, out=pair / "new" / "..")
    assert names(pair) == SOURCES
    run(pair, out=pair / "new" / ".." / "out")
    assert names(pair) == SOURCES | {"out"}


# --- no room ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a small tmpfs is mounted here, which needs root; the next test fills no disk and always runs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_an_error_in_words_and_trying_again_helps(pair, small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(220_000))
    with pytest.raises((ShadowError, OSError), match=r"(?i)space|disk|room|full") as failure:
        run(pair, out=small_disk / "out")
    assert str(failure.value)
    assert not (small_disk / "out").exists()
    ballast.unlink()
    run(pair, out=small_disk / "out")
    run(pair)
    assert all_bytes(small_disk / "out") == all_bytes(pair / "out")
    assert names(small_disk) == {"out"}


def test_a_disk_that_fills_later_keeps_what_is_finished_and_no_more(pair, small_disk):
    """Room is taken when a file is begun: one that is refused must not stay in the way of the next try."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(60_000))

    def crowd(done: int, total: int) -> None:
        free = os.statvfs(small_disk)
        with ballast.open("ab") as file:
            file.write(bytes(max(0, free.f_bavail * free.f_bsize - 4096)))

    with pytest.raises(ShadowError, match=r"(?i)space"):
        run(pair, out=small_disk / "out", on_progress=crowd, threads=1)
    draft = small_disk / ".out.graft"
    assert not draft.exists() or not list(draft.rglob("*.part"))
    ballast.unlink()
    run(pair, out=small_disk / "out")
    run(pair)
    assert all_bytes(small_disk / "out") == all_bytes(pair / "out")


def test_a_file_that_may_not_grow_ends_the_graft(pair):
    here, there = pipe()
    assert run_child(graft_within, 3000, there, options(pair)) == 0
    _, sentence = here.recv()
    assert sentence
    assert not (pair / "out").exists()
    run(pair)
    run(pair, out=pair / "undisturbed")
    assert all_bytes(pair / "out") == all_bytes(pair / "undisturbed")
    assert names(pair) == SOURCES | {"out", "undisturbed"}


# --- the sources ------------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """What a write, a touch or a change of mode would alter."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns, path.stat().st_mode)
        for each in SOURCES
        for path in (folder / each, *(folder / each).iterdir())
    }


def test_sources_that_may_only_be_read_are_left_as_they_are(pair):
    for each in SOURCES:
        for file in (pair / each).iterdir():
            file.chmod(0o400)
        (pair / each).chmod(0o500)
    before = state(pair)
    run(pair)
    assert state(pair) == before


def test_a_cache_of_links_is_read_and_its_hashes_are_recorded(pair):
    """The Hub's client keeps blobs under the name of their sha256, and a snapshot of links to them."""
    for each in SOURCES:
        cache = pair / f"models--o--{each}"
        (cache / "blobs").mkdir(parents=True)
        (cache / "snapshots" / "c0ffee").mkdir(parents=True)
        for file in (pair / each).iterdir():
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            (cache / "blobs" / digest).write_bytes(file.read_bytes())
            (cache / "snapshots" / "c0ffee" / file.name).symlink_to(f"../../blobs/{digest}")
    snapshot = {each: pair / f"models--o--{each}" / "snapshots" / "c0ffee" for each in SOURCES}
    run(pair)
    run(pair, instruct=snapshot["instruct"], delta=FullDelta(snapshot["base"], snapshot["tuned"]), out=pair / "linked")
    plain, linked = all_bytes(pair / "out"), all_bytes(pair / "linked")
    assert {name: content for name, content in linked.items() if name.endswith(".safetensors")} == {
        name: content for name, content in plain.items() if name.endswith(".safetensors")
    }
    sources = json.loads(linked["shadow.json"])["sources"]
    for each in SOURCES:
        for file in snapshot[each].glob("*.safetensors"):
            assert sources[each]["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert not any(path.is_symlink() for path in (pair / "linked").rglob("*"))


def test_modes_follow_the_umask(pair):
    for file in (pair / "instruct").iterdir():
        file.chmod(0o600)  # as safetensors saves
    old = os.umask(0o027)
    try:
        run(pair)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (pair / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((pair / "out").stat().st_mode) == 0o750


def test_a_place_that_cannot_be_written_is_said(pair):
    (pair / "file").write_text("not a folder")
    with pytest.raises((ShadowError, OSError)):
        run(pair, out=pair / "file" / "out")
    assert names(pair) == SOURCES | {"file"}


# --- what changes under way -------------------------------------------------------------------------------------------


def test_an_adapters_config_is_a_part_of_what_is_resumed(pair, tmp_path):
    """The factors are the same, and mean another change."""
    adapter = lora(pair / "adapter", alpha=8)
    changed = {"delta": LoraDelta(adapter)}
    assert run_child(graft_until_killed, 0.5, options(pair, **changed)) == -signal.SIGKILL
    lora(pair / "adapter", alpha=64)
    result = run(pair, **changed)
    assert result.resumed_shards == 0
    assert not verify(pair / "out", sources={"instruct": pair / "instruct", "adapter": adapter}).problems


def lora(folder: Path, *, alpha: int) -> Path:
    folder.mkdir(exist_ok=True)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]
    shapes = {"A": (2, RECIPE.sizes.hidden), "B": (RECIPE.sizes.hidden, 2)}
    factors = {
        f"base_model.model.{name}.lora_{side}.weight": torch.full(shape, 0.01)
        for name in names
        for side, shape in shapes.items()
    }
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    return folder


def test_a_source_that_changes_under_way_ends_the_graft(pair):
    def replace(done: int, total: int) -> None:
        weights = next((pair / "tuned").glob("*.safetensors"))
        weights.with_suffix(".new").write_bytes(weights.read_bytes())
        weights.with_suffix(".new").rename(weights)

    with pytest.raises(InvalidInput, match="The tuned model in tuned was changed while it was read"):
        run(pair, on_progress=replace)
    assert names(pair) == SOURCES


def test_a_small_file_that_is_gone_is_not_taken_from_the_draft(pair):
    template = pair / "instruct" / "chat_template.jinja"
    template.write_text("old")
    assert run_child(graft_until_killed, 1.0, options(pair)) == -signal.SIGKILL
    (pair / ".out.graft" / "folder" / template.name).write_text("old")
    run(pair)
    assert (pair / "out" / template.name).exists()
    template.unlink()
    (pair / "out").rename(pair / "first")
    assert run_child(graft_until_killed, 1.0, options(pair)) == -signal.SIGKILL
    (pair / ".out.graft" / "folder" / template.name).write_text("old")
    run(pair)
    assert not (pair / "out" / template.name).exists()


def test_a_late_refusal_leaves_no_folder_on_the_way(pair):
    far = pair / "new" / "below" / "out"
    with pytest.raises(InvalidInput, match="not a finite number"):
        run(pair, out=far, scale=1e300)
    assert names(pair) == SOURCES


def test_one_folder_as_base_and_tuned_is_refused(pair):
    same = FullDelta(base=pair / "base", tuned=pair / "base")
    with pytest.raises(PairRefused, match="no change to graft"):
        run(pair, delta=same)
    assert names(pair) == SOURCES


@pytest.mark.slow
def test_twenty_thousand_tensors_are_planned_in_the_time_of_their_number(tmp_path):
    """Twice the tensors take about twice as long, and not four times; the time is the yardstick of itself."""
    took = [planning_seconds(tmp_path / str(count), count) for count in (4000, 16000)]
    assert took[1] < 10 * took[0]


def planning_seconds(folder: Path, count: int) -> float:
    shapes = {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(1, 2) for n in range(count)}
    for role in SOURCES:
        save_model(folder / role, shapes)
    started = time.process_time()
    with planned(folder / "instruct", FullDelta(folder / "base", folder / "tuned"), WHOLE):
        return time.process_time() - started
