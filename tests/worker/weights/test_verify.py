"""`verify` finds one changed byte anywhere: in the result by its manifest, in a source by recomputing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.checkpoints import read_checkpoint
from core.errors import InvalidInput
from core.graft_plan import Selection
from tests.worker.weights.families import ROLES, Layout, Recipe
from tests.worker.weights.made_checkpoints import all_bytes
from worker.weights import FullDelta, Provenance, SavedDelta, Verification, graft, save_delta, verify

RECIPE = Recipe("tied, with biases", layouts=(Layout(), Layout(2, 0, True), Layout(3)))


def make(folder: Path) -> Path:
    RECIPE.write(folder)
    (folder / "instruct" / "additional_chat_templates").mkdir()
    (folder / "instruct" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "instruct" / "tokenizer.json").write_text("{}")
    graft(
        instruct=folder / "instruct",
        delta=FullDelta(folder / "base", folder / "tuned"),
        out=folder / "out",
        selection=Selection(scope="all"),
        provenance=Provenance(keep_paths=True),
    )
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that put back what they change."""
    return make(tmp_path_factory.mktemp("verify"))


def sources(folder: Path) -> dict[str, Path]:
    return {role: folder / role for role in ROLES}


def test_an_untouched_result_has_no_problem(made):
    sampled = verify(made / "out")
    whole = verify(made / "out", everything=True)
    files = all_bytes(made / "out")
    assert (sampled.problems, whole.problems) == ((), ())
    assert whole.tensors == whole.tensors_in_all >= sampled.tensors > 0
    assert whole.files in (len(files), len(files) - 1)  # with or without the manifest itself
    assert sum(map(len, files.values())) - len(files["manifest.json"]) <= whole.bytes <= sum(map(len, files.values()))


def test_the_sources_may_lie_elsewhere(made):
    for role in ROLES:
        (made / role).rename(made / f"moved {role}")
    elsewhere = {role: made / f"moved {role}" for role in ROLES}
    assert verify(made / "out", sources=elsewhere, everything=True).problems == ()


def test_sources_that_are_gone_are_a_problem_or_an_error_in_words(made):
    shutil.rmtree(made / "tuned")
    try:
        problems = verify(made / "out", everything=True).problems
    except InvalidInput as error:
        problems = (error.message,)
    assert any("tuned" in problem for problem in problems)


def test_what_no_loader_reads_may_be_added(made):
    """A card, and what version control and the Hub's client leave."""
    (made / "out" / "README.md").write_text("A model of ours.")
    (made / "out" / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert verify(made / "out").problems == ()


def swap_byte(file: Path, position: int, mask: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ mask]))


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_one_changed_byte_of_any_file_is_found(shared, examples):
    files = sorted(path for path in (shared / "out").rglob("*") if path.is_file())

    @settings(max_examples=examples, deadline=None)
    @given(st.sampled_from(files), st.integers(0, 2**32), st.integers(1, 255))
    def claim(file: Path, place: int, mask: int) -> None:
        position = place % file.stat().st_size
        swap_byte(file, position, mask)
        found = problems_of(shared / "out")
        swap_byte(file, position, mask)
        assert found, (file.name, position)

    claim()
    assert problems_of(shared / "out") == ()


def problems_of(folder: Path) -> tuple[str, ...]:
    """A manifest that cannot be read at all may be an error instead of a problem."""
    try:
        return verify(folder).problems
    except InvalidInput as error:
        return (error.message,)


def test_every_byte_of_the_manifest_counts(shared):
    """White space too: it is the one file without a hash of its own."""
    manifest = shared / "out" / "manifest.json"
    content = manifest.read_bytes()
    blanks = [place for place, byte in enumerate(content) if byte in b" \n"]
    for place in (*random.Random(0).sample(blanks, 10), len(content) - 1):
        for other in b" \t\r\n":
            if content[place] != other:
                manifest.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
                assert problems_of(shared / "out"), (place, other)
    manifest.write_bytes(content)
    assert problems_of(shared / "out") == ()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda out: (out / "tokenizer.model").write_bytes(b"x"),
    "an empty file more": lambda out: (out / "extra").touch(),
    "a folder more": lambda out: (out / "onnx").mkdir() or (out / "onnx" / "model.onnx").touch(),
    "a file less": lambda out: (out / "tokenizer.json").unlink(),
    "a template less": lambda out: (out / "additional_chat_templates" / "tools.jinja").unlink(),
    "a shard less": lambda out: min(out.glob("*.safetensors")).unlink(),
    "a byte more": lambda out: (out / "config.json").write_bytes((out / "config.json").read_bytes() + b" "),
    "a shard cut": lambda out: cut(min(out.glob("*.safetensors"))),
    "no manifest": lambda out: (out / "manifest.json").unlink(),
    "no shadow.json": lambda out: (out / "shadow.json").unlink(),
    "a link in place of a file": lambda out: link(out / "config.json"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def link(file: Path) -> None:
    file.write_bytes(b"{}")
    elsewhere = file.rename(file.parent.parent / "elsewhere.json")
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_more_or_less_is_found(made, change):
    change(made / "out")
    assert problems_of(made / "out")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("which", range(3))
def test_one_changed_bit_of_a_source_is_found_by_recomputing(made, role, which):
    """A bit of a weight that takes part; another one may lie where it makes no difference."""
    name = sorted(RECIPE.kind.shapes.keys() - {"model.layers.0.empty"})[which * 4]
    info = read_checkpoint(made / role).tensors[name]
    # The highest of the fraction's bits: small enough to stay finite, too large to be rounded away.
    swap_byte(made / role / info.file, info.end - 2, 0x40)
    problems = verify(made / "out", sources=sources(made), everything=True).problems
    assert any(name in problem or role in problem for problem in problems), problems


def test_a_changed_weight_is_found_though_the_manifest_agrees(made):
    """Someone who edits weights and manifest alike is found out by the sources."""
    import hashlib
    import json

    info = read_checkpoint(made / "out").tensors["model.layers.0.self_attn.q_proj.weight"]
    shard = made / "out" / info.file
    swap_byte(shard, info.start, 1)
    manifest = json.loads((made / "out" / "manifest.json").read_text())
    manifest["files"][info.file]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (made / "out" / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    problems = verify(made / "out", sources=sources(made), everything=True).problems
    assert any("q_proj" in problem for problem in problems), problems


def test_a_graft_of_a_saved_delta_is_verified_too(made):
    save_delta(base=made / "base", tuned=made / "tuned", out=made / "delta")
    graft(instruct=made / "instruct", delta=SavedDelta(made / "delta"), out=made / "again", scale=0.5)
    found: Verification = verify(
        made / "again", sources={"instruct": made / "instruct", "delta": made / "delta"}, everything=True
    )
    assert (found.problems, found.tensors) == ((), found.tensors_in_all)
