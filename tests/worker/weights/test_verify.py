"""`verify` finds one changed byte anywhere: in the result by its manifest, in a source by recomputing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def make(folder: Path, *, keep_paths: bool = True, hash_sources: bool = False) -> Path:
    RECIPE.write(folder)
    (folder / "instruct" / "additional_chat_templates").mkdir()
    (folder / "instruct" / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "instruct" / "tokenizer.json").write_text("{}")
    graft(
        instruct=folder / "instruct",
        delta=FullDelta(folder / "base", folder / "tuned"),
        out=folder / "out",
        selection=Selection(scope="all"),
        provenance=Provenance(keep_paths=keep_paths),
        hash_sources=hash_sources,
    )
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that put back what they change."""
    return make(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Without the places of its sources, which are nobody's business."""
    return make(tmp_path, keep_paths=False)


def sources(folder: Path) -> dict[str, Path]:
    return {role: folder / role for role in ROLES}


def rewrite(file: Path, change: Callable[[Any], object]) -> None:
    """As an editor of JSON would, who also mends the manifest beside it."""
    content = json.loads(file.read_bytes())
    changed = change(content)
    write(file, content if changed is None else changed)


def write(file: Path, content: Any) -> None:
    file.write_bytes(as_bytes(content))
    if file.name != "manifest.json":
        record_anew(file)


def as_bytes(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content, indent=2).encode() + b"\n"


def record_anew(file: Path) -> None:
    raw = file.read_bytes()
    record = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    rewrite(file.with_name("manifest.json"), lambda manifest: manifest["files"].update({file.name: record}))


def forget_content(shadow: dict[str, Any]) -> None:
    """As if nobody had looked into the sources' weights."""
    for source in shadow["sources"].values():
        for entry in source["files"].values():
            entry.pop("sampled_sha256", None)


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


def test_a_folder_that_does_not_say_where_its_sources_lie_is_checked_by_its_files(published):
    found = verify(published / "out")
    assert (found.problems, found.tensors, found.tensors_in_all) == ((), 0, 0)
    assert found.files == len(all_bytes(published / "out")) - 1
    assert found.unmade is not None
    assert all(f"--{role} FOLDER" in found.unmade for role in ROLES)
    told = verify(published / "out", sources=sources(published))
    assert (told.problems, told.unmade) == ((), None)
    assert told.tensors > 0


def test_it_is_said_that_the_tuned_weights_of_a_job_cannot_be_had(published):
    """What full tuning made is not published, and its delta is another source."""
    said = verify(published / "out").unmade
    save_delta(base=published / "base", tuned=published / "tuned", out=published / "delta")
    with pytest.raises(InvalidInput, match="without a source 'delta'") as other:
        verify(published / "out", sources={"delta": published / "delta"})
    with pytest.raises(InvalidInput, match="'tuned' is not told") as missing:
        verify(published / "out", everything=True, sources={role: published / role for role in ("base", "instruct")})
    graft(instruct=published / "instruct", delta=SavedDelta(published / "delta"), out=published / "later")
    for words in (said, other.value.hint, missing.value.hint):
        assert "A job does not publish the weights that it tuned" in words
    assert "A job" not in verify(published / "later").unmade


def test_a_changed_byte_needs_no_sources(published):
    (published / "out" / "tokenizer.json").write_text("[]")
    found = verify(published / "out")
    assert (len(found.problems), found.unmade) == (1, None)


def test_sources_that_are_asked_for_must_be_told(published):
    """All tensors, or some with the sources that were given: the missing one is named."""
    with pytest.raises(InvalidInput, match="is not told") as asked:
        verify(published / "out", everything=True)
    some = {role: published / role for role in ROLES if role != "tuned"}
    with pytest.raises(InvalidInput, match="'tuned' is not told") as missing:
        verify(published / "out", sources=some)
    with pytest.raises(InvalidInput, match="without a source 'adapter'"):
        verify(published / "out", sources={"adapter": published / "tuned"})
    assert (asked.value.code, missing.value.code) == ("source_not_found", "source_not_found")
    assert missing.value.param == "tuned"


def test_without_hashes_the_files_alone_prove_nothing(published):
    def forget_hashes(manifest: dict[str, Any]) -> None:
        for record in manifest["files"].values():
            record["sha256"] = None

    rewrite(published / "out" / "manifest.json", forget_hashes)
    with pytest.raises(InvalidInput, match="is not told"):
        verify(published / "out")
    found = verify(published / "out", sources=sources(published))
    assert (found.problems, found.tensors) == ((), found.tensors_in_all)


BESIDE = ("README.md", ".gitattributes", ".cache/huggingface/.gitignore", ".cache/huggingface/download/x.metadata")
ADDED = (
    *("onnx/README.md", "onnx/.gitattributes", "onnx/manifest.json", "readme.md"),
    *(".env", ".config/model.bin", ".cache/model.bin", ".cache/huggingface", "onnx/.cache/huggingface/x"),
)


def add(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("added")


def test_what_no_loader_reads_may_be_added(made):
    """A card, and what version control and the Hub's client leave."""
    for name in BESIDE:
        add(made / "out" / name)
    assert verify(made / "out").problems == ()


@pytest.mark.parametrize("name", ADDED)
def test_all_else_that_is_added_is_named(made, name):
    add(made / "out" / name)
    assert verify(made / "out").problems == (f"{name} is not in the manifest",)


def test_a_link_to_a_folder_is_named_too(made):
    """It is not looked into, and a loader would be."""
    (made / "out" / "onnx").symlink_to(made / "base", target_is_directory=True)
    assert verify(made / "out").problems == ("onnx is not in the manifest",)


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
    rewrite(made / "out" / "shadow.json", forget_content)
    name = sorted(RECIPE.kind.shapes.keys() - {"model.layers.0.empty"})[which * 4]
    info = read_checkpoint(made / role).tensors[name]
    # The highest of the fraction's bits: small enough to stay finite, too large to be rounded away.
    swap_byte(made / role / info.file, info.end - 2, 0x40)
    problems = verify(made / "out", sources=sources(made), everything=True).problems
    assert any(name in problem for problem in problems), problems


def test_a_changed_weight_is_found_though_the_manifest_agrees(made):
    """Someone who edits weights and manifest alike is found out by the sources."""
    info = read_checkpoint(made / "out").tensors["model.layers.0.self_attn.q_proj.weight"]
    swap_byte(made / "out" / info.file, info.start, 1)
    record_anew(made / "out" / info.file)
    problems = verify(made / "out", sources=sources(made), everything=True).problems
    assert any("q_proj" in problem for problem in problems), problems


def test_a_graft_of_a_saved_delta_is_verified_too(made):
    save_delta(base=made / "base", tuned=made / "tuned", out=made / "delta")
    graft(instruct=made / "instruct", delta=SavedDelta(made / "delta"), out=made / "again", scale=0.5)
    found: Verification = verify(
        made / "again", sources={"instruct": made / "instruct", "delta": made / "delta"}, everything=True
    )
    assert (found.problems, found.tensors) == ((), found.tensors_in_all)


# --- the sources against what is on record ----------------------------------------------------------------------------


def test_another_source_is_named_and_nothing_is_made_of_it(made):
    (made / "base").rename(made / "moved")
    found = verify(made / "out", sources=sources(made) | {"base": made / "tuned"})
    assert all("the base source's " in problem for problem in found.problems)
    assert len(found.problems) > 0
    assert (found.tensors, found.tensors_in_all, found.unmade) == (0, 0, None)


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "size"),
    "another header": (lambda file: swap_byte(file, 12, 1), "header"),
    "a header without end": (lambda file: swap_byte(file, 7, 0xFF), "header"),
    "another weight": (lambda file: swap_byte(file, file.stat().st_size - 1, 1), "content"),
}


@pytest.mark.parametrize(("change", "word"), OTHERS.values(), ids=OTHERS.keys())
def test_it_is_said_what_differs(made, change, word):
    file = made / "tuned" / read_checkpoint(made / "tuned").files[0]
    change(file)
    expected = f"the tuned source's {file.name} is not the file that was grafted (its {word} differs)"
    assert verify(made / "out").problems == (expected,)


def test_a_hash_that_is_on_record_is_compared_where_all_is(tmp_path):
    folder = make(tmp_path, hash_sources=True)
    rewrite(folder / "out" / "shadow.json", forget_content)
    file = folder / "base" / read_checkpoint(folder / "base").files[0]
    swap_byte(file, file.stat().st_size - 1, 1)
    expected = f"the base source's {file.name} is not the file that was grafted (its sha256 differs)"
    assert verify(folder / "out", everything=True).problems == (expected,)
    assert not any("sha256" in problem for problem in verify(folder / "out").problems)


def test_a_manifest_beside_a_source_vouches_for_nothing(made):
    """A file may have come later and keep an older time, as one that was moved or copied with its time does."""
    shard = made / "out" / read_checkpoint(made / "out").files[0]
    state = shard.stat()
    swap_byte(shard, state.st_size - 2, 1)
    os.utime(shard, ns=(state.st_atime_ns, state.st_mtime_ns - 10**9))
    delta = FullDelta(made / "base", made / "tuned")
    graft(instruct=made / "out", delta=delta, out=made / "again", provenance=Provenance(keep_paths=True))
    said = json.loads((made / "again" / "shadow.json").read_bytes())["sources"]["instruct"]["files"][shard.name]
    assert said["sha256"] is None
    assert verify(made / "again", everything=True).problems == ()


def test_a_config_is_compared_by_its_hash(made):
    """It has no header, and is small."""
    config = made / "instruct" / "config.json"
    entry = {"bytes": config.stat().st_size, "sha256": hashlib.sha256(config.read_bytes()).hexdigest()}
    rewrite(
        made / "out" / "shadow.json",
        lambda shadow: shadow["sources"]["instruct"]["files"].update({"config.json": entry}),
    )
    assert verify(made / "out").problems == ()
    swap_byte(config, 0, 1)
    assert verify(made / "out").problems == (
        "the instruct source's config.json is not the file that was grafted (its sha256 differs)",
    )


def test_a_file_that_a_source_lacks_is_named(made):
    lost = read_checkpoint(made / "tuned").files[-1]
    (made / "tuned" / lost).unlink()
    assert verify(made / "out").problems == (f"the tuned source's {lost} is missing",)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_source_that_may_not_be_read_is_named(made):
    file = made / "tuned" / read_checkpoint(made / "tuned").files[0]
    file.chmod(0)
    assert verify(made / "out").problems == (f"the tuned source's {file.name} cannot be read (Permission denied)",)


def test_weights_that_no_source_gives_are_found_though_the_manifest_names_them(made):
    """A loader may take them before the shards."""
    (made / "out" / "adapter_model.safetensors").write_bytes(b"added")
    record_anew(made / "out" / "adapter_model.safetensors")
    assert verify(made / "out").problems == ("adapter_model.safetensors is not what its sources give",)


def test_a_shard_that_the_manifest_does_not_know_is_missed(made):
    shard = max((made / "out").glob("*.safetensors"))
    shard.unlink()
    rewrite(made / "out" / "manifest.json", lambda manifest: manifest["files"].pop(shard.name) and None)
    assert verify(made / "out").problems == (f"{shard.name} is missing, which its sources give",)


def test_a_shard_that_the_manifest_has_cut_is_found(made):
    shard = max((made / "out").glob("*.safetensors"))
    size = shard.stat().st_size
    cut(shard)
    record_anew(shard)
    assert verify(made / "out").problems == (f"{shard.name} has {size - 1} bytes, and its sources give {size}",)


def test_the_bytes_that_were_looked_at_only_grow_until_tensors_are_counted(made):
    told: list[tuple[int, int]] = []
    verify(made / "out", everything=True, on_progress=lambda done, total: told.append((done, total)))
    falls = [place for place in range(1, len(told)) if told[place][0] < told[place - 1][0]]
    assert len(falls) == 1
    assert told[falls[0] - 1][0] == told[falls[0] - 1][1]
    assert told[-1][0] == told[-1][1] == len(read_checkpoint(made / "out").tensors)


# --- odd, but well-formed ---------------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000
ODD_VALUES: tuple[Any, ...] = (None, True, -1, 1.5, 2**70, 10**400, "", "x", "../x", [], [[]], {}, {"a": 1}, ["a", 2])


def put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    content[path[0]] = put(content.get(path[0]), path[1:], value) if isinstance(content, dict) else value
    return content


MANIFEST_PLACES: tuple[tuple[str, ...], ...] = (
    *((), ("format",), ("files",), ("files", "config.json")),
    *(("files", "config.json", key) for key in ("bytes", "sha256", "more")),
)
SHADOW_PLACES: tuple[tuple[str, ...], ...] = (
    *(
        (),
        ("format",),
        ("options",),
        ("sources",),
        ("sources", "base"),
        ("sources", "more"),
        ("sources", "base", "files"),
    ),
    *(("options", key) for key in ("delta", "scale", "scope", "include", "exclude", "output_dtype")),
    *(("sources", "base", key) for key in ("name", "path")),
    ("sources", "base", "files", "config.json"),
    *(("sources", "base", "files", "config.json", key) for key in ("bytes", "sha256", "header_sha256")),
)


def verified_or_refused(folder: Path) -> str:
    """The code of the refusal, or nothing; any other error is the test's failure."""
    try:
        verify(folder)
    except InvalidInput as error:
        return error.code
    return ""


@pytest.mark.parametrize("path", MANIFEST_PLACES, ids=".".join)
def test_an_odd_manifest_is_refused_in_a_sentence(shared, path):
    """Or believed where the value may be one: no hash, no files."""
    file = shared / "out" / "manifest.json"
    raw = file.read_bytes()
    for value in ODD_VALUES:
        write(file, put(json.loads(raw), path, value))
        code = verified_or_refused(shared / "out")
        file.write_bytes(raw)
        fits = (path[-1:] == ("sha256",) and value is None) or (path == ("files",) and value == {})
        assert code == ("" if fits else "damaged_manifest"), (path, value)


#: Where some of the values may be true: then they are believed, or the folder is not there.
FITTING: dict[tuple[str, ...], set[str]] = {
    ("sources", "base", "path"): {"damaged_description", "source_not_found", ""},
    ("sources", "base", "name"): {"damaged_description", ""},
    ("sources", "base", "files"): {"damaged_description", ""},
    ("sources", "base", "files", "config.json", "sha256"): {"damaged_description", ""},
    ("sources", "base", "files", "config.json", "header_sha256"): {"damaged_description", ""},
    ("options", "scale"): {"damaged_description", ""},
    ("options", "include"): {"damaged_description", "pair_refused", ""},
    ("options", "exclude"): {"damaged_description", ""},
}


@pytest.mark.parametrize("path", SHADOW_PLACES, ids=".".join)
def test_an_odd_description_is_refused_in_a_sentence(shared, path):
    file, manifest = shared / "out" / "shadow.json", shared / "out" / "manifest.json"
    raw = file.read_bytes(), manifest.read_bytes()
    for value in ODD_VALUES:
        write(file, put(json.loads(raw[0]), path, value))
        code = verified_or_refused(shared / "out")
        file.write_bytes(raw[0])
        manifest.write_bytes(raw[1])
        assert code in FITTING.get(path, {"damaged_description"}), (path, value)


NAMES = ("../config.json", "/etc/passwd", "a/../config.json", "a//b", "./config.json", "config.json/", ".", "..", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_out_of_the_folder_is_refused(made, name):
    entry = {"bytes": 1, "sha256": None}
    rewrite(made / "out" / "shadow.json", lambda shadow: shadow["sources"]["base"]["files"].update({name: entry}))
    assert verified_or_refused(made / "out") == "damaged_description"
    rewrite(made / "out" / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    assert verified_or_refused(made / "out") == "damaged_manifest"


@pytest.mark.parametrize("name", ["x" * 5000, "nul\0", "\ud800", "config.json/x"])
def test_a_name_that_no_file_can_have_is_that_of_a_missing_file(made, name):
    entry = {"bytes": 1, "sha256": None}
    rewrite(made / "out" / "shadow.json", lambda shadow: shadow["sources"]["base"]["files"].update({name: entry}))
    assert verify(made / "out").problems == (f"the base source's {name} is missing",)
    rewrite(made / "out" / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))
    assert verify(made / "out").problems == (f"{name} is missing",)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", DEEP, b'{"format": NaN}', b"9" * 5000])
def test_what_is_not_json_is_refused_too(made, raw):
    write(made / "out" / "shadow.json", raw)
    assert verified_or_refused(made / "out") == "damaged_description"
    write(made / "out" / "manifest.json", raw)
    assert verified_or_refused(made / "out") == "damaged_manifest"


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_the_sources_are_those_that_the_kind_of_delta_has(made, kind):
    rewrite(made / "out" / "shadow.json", lambda shadow: shadow["options"].update(delta=kind))
    assert verified_or_refused(made / "out") == "damaged_description"


def test_a_folder_that_says_nothing_of_itself_is_refused(made):
    (made / "out" / "shadow.json").unlink()
    rewrite(made / "out" / "manifest.json", lambda manifest: manifest["files"].pop("shadow.json") and None)
    assert verified_or_refused(made / "out") == "damaged_description"


def test_an_odd_description_of_a_saved_delta_is_refused(made):
    save_delta(base=made / "base", tuned=made / "tuned", out=made / "delta", provenance=Provenance(keep_paths=True))
    assert verify(made / "delta", everything=True).problems == ()
    for change in ({"format": 2}, {"sources": {}}, {"sources": {"base": {}, "tuned": {}}}):
        before = all_bytes(made / "delta")
        rewrite(made / "delta" / "delta.json", lambda content, change=change: content.update(change))
        assert verified_or_refused(made / "delta") == "damaged_description"
        for name in ("delta.json", "manifest.json"):
            (made / "delta" / name).write_bytes(before[name])
