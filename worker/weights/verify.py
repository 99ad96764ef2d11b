"""Looks whether a grafted or saved folder is still what was made, and whether its sources make the same again."""

from __future__ import annotations

import json
import math
import os
import random
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from core.checkpoints import DELTA_STEM
from core.errors import InvalidInput
from core.fingerprint import header_sha256, sampled_sha256
from core.graft_plan import Selection
from worker.weights.delta import Delta, FullDelta, LoraDelta, SavedDelta
from worker.weights.figures import Tally
from worker.weights.files import MANIFEST_FILE, json_bytes, sha256_of
from worker.weights.graft import SHADOW_FILE, Options, planned
from worker.weights.layout import OutputDtype, Shard, plan_difference
from worker.weights.recipe import Recipe
from worker.weights.save import DELTA_DESCRIPTION, WHOLE
from worker.weights.tensors import Reader, Scratch
from worker.weights.writing import BLOCK_BYTES, OnProgress

#: Tensors made again where not all are asked for.
SAMPLE = 16
#: What may come to lie beside the model, as it says nothing of how it is loaded; where the manifest names one of them,
#: it is checked. And where the Hub's client keeps its notes.
_BESIDE = frozenset({"README.md", ".gitattributes", MANIFEST_FILE})
_HUB_NOTES = ".cache/huggingface/"

_MANIFEST_FORMAT = 1
#: Of what a folder says of itself.
_FORMATS = {SHADOW_FILE: 2, DELTA_DESCRIPTION: 1}
#: The sources that each kind of delta may have.
_ROLES = {
    "full": ({"instruct", "base", "tuned"},),
    "lora": ({"instruct", "adapter"}, {"instruct", "adapter", "base"}),
    "delta": ({"instruct", "delta"},),
}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TUNED_ELSEWHERE = (
    "A job does not publish the weights that it tuned, and their difference from base is not a source in their place: "
    "of a model that a job tuned in full, the files' hashes are what can be checked."
)


@dataclass(frozen=True)
class Verification:
    files: int
    bytes: int
    #: Tensors made again from the sources, and those of the model.
    tensors: int
    tensors_in_all: int
    #: Empty: all is as it was made.
    problems: tuple[str, ...]
    #: A sentence where no tensor was made again, though nothing is wrong: nobody says where the sources lie.
    unmade: str | None = None


def verify(
    folder: Path,
    *,
    sources: Mapping[str, Path] | None = None,
    everything: bool = False,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Check every file against the manifest, then make a sample of tensors (or `everything`) again.

    `sources` says by role where the sources lie; what it does not name is looked for where `shadow.json` says. Where
    neither says anything, as for every published model, the files alone are checked, and `unmade` says so; with
    `everything` that is an error. What is made again is the same to the bit on every processor.

    A graft without hashes in its manifest is made again whole.

    InvalidInput: the folder is not of our making, or a source cannot be found.
    """
    given = dict(sources or {})
    records = _manifest(folder)
    problems = list(_file_problems(folder, records, on_progress))
    if problems:  # what is damaged needs no second proof, and may not even be readable
        return _verification(folder, records, problems)
    everything = everything or any(record["sha256"] is None for record in records.values())
    file, description = _description(folder, records)
    _refuse_unknown(description["sources"], given)
    unmade = None if everything else _unmade(folder, description["sources"], given)
    if unmade is not None:
        return _verification(folder, records, [], unmade=unmade)
    places = _places(folder, description["sources"], given)
    after_files = _shifted(on_progress, sum(record["bytes"] for record in records.values()))
    problems += _source_problems(description["sources"], places, everything=everything, on_progress=after_files)
    if problems:  # other sources give other tensors
        return _verification(folder, records, problems)
    with _planned_again(file, description, places) as (recipe, shards):
        names = [name for shard in shards for name in shard.tensors]
        chosen = names if everything else random.sample(names, min(SAMPLE, len(names)))
        problems += _shard_problems(records, shards)
        problems = problems or list(_remade(folder, recipe, shards, set(chosen), on_progress))
    return _verification(folder, records, problems, tensors=len(chosen), in_all=len(names))


@contextmanager
def _planned_again(
    file: str, description: dict[str, Any], places: Mapping[str, Path]
) -> Iterator[tuple[Recipe, list[Shard]]]:
    """As the folder was planned, from what it says of itself."""
    if file == DELTA_DESCRIPTION:
        with planned(places["base"], FullDelta(places["base"], places["tuned"]), WHOLE) as plan:
            yield plan.recipe(Tally(), measure=False), plan_difference(plan.checkpoint, plan.bound, DELTA_STEM)
    else:
        options = description["options"]
        with planned(places["instruct"], _delta(options["delta"], places), _options(options)) as plan:
            yield plan.recipe(Tally(), measure=False), plan.shards


def _shifted(on_progress: OnProgress | None, before: int) -> OnProgress | None:
    """Goes on counting behind the bytes that were looked at `before`."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(before + done, before + total)


# --- against the manifest ---------------------------------------------------------------------------------------------


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise InvalidInput(
            f"{folder.name} has no {MANIFEST_FILE}",
            code="not_a_graft",
            hint="Name a folder that `shadowft graft` or a job has written.",
        )
    raw = path.read_bytes()
    try:
        content = json.loads(raw)
        fault = _manifest_fault(content) or (None if raw == json_bytes(content) else "its bytes were changed")
    except (ValueError, RecursionError):
        fault = "it is not JSON"
    if fault:
        raise _damaged(f"{folder.name}/{MANIFEST_FILE} is not as it was written: {fault}", "damaged_manifest")
    files: dict[str, Any] = content["files"]
    return files


def _manifest_fault(content: Any) -> str | None:
    if not isinstance(content, dict):
        return "it is not an object"
    fault = _format_fault(content, _MANIFEST_FORMAT)
    if fault:
        return fault
    files = content.get("files")
    if not isinstance(files, dict):
        return "it names no files"
    odd = next((name for name, entry in files.items() if not _is_record(name, entry)), None)
    return None if odd is None else f"what it says of {reprlib.repr(odd)} is odd"


def _is_record(name: str, entry: Any) -> bool:
    return _is_entry(name, entry) and entry.keys() == {"bytes", "sha256"}


def _damaged(message: str, code: str) -> InvalidInput:
    hint = "Copy or download the folder again; if it is whole, check it with the version of shadowft that wrote it."
    return InvalidInput(message, code=code, hint=hint)


def _file_problems(folder: Path, records: dict[str, Any], on_progress: OnProgress | None) -> Iterator[str]:
    total, done = sum(record["bytes"] for record in records.values()), 0
    for name, record in records.items():
        found = _problem_of(folder / name, record)
        if found is not None:
            yield f"{name} {found}"
        done += record["bytes"]
        if on_progress is not None:
            on_progress(done, total)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in records or name in _BESIDE or name.startswith(_HUB_NOTES):
            continue
        if path.is_symlink() or not path.is_dir():  # a link may lead to a folder that is not looked into
            yield f"{name} is not in the manifest"


def _problem_of(path: Path, record: dict[str, Any]) -> str | None:
    if not _is_file(path):
        return "is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"has {size} bytes and had {record['bytes']}"
    if record["sha256"] is not None and sha256_of(path) != record["sha256"]:
        return "was changed: its sha256 is another"
    return None


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 - pathlib's own raises where a name is too long


# --- what the folder says of itself -----------------------------------------------------------------------------------


def _description(folder: Path, records: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Its file, and what it says."""
    file = next((file for file in _FORMATS if file in records), None)
    if file is None:
        raise _damaged(f"{folder.name} has neither {' nor '.join(_FORMATS)}", "damaged_description")
    try:
        description = json.loads((folder / file).read_bytes())
        fault = _description_fault(file, description)
    except (ValueError, RecursionError):
        fault = "it is not JSON"
    if fault:
        raise _damaged(f"{folder.name}/{file} cannot be used: {fault}", "damaged_description")
    return file, description


def _description_fault(file: str, description: Any) -> str | None:
    """What must not be believed; only what is used here is looked at."""
    if not isinstance(description, dict):
        return "it is not an object"
    fault = _format_fault(description, _FORMATS[file])
    if fault or file == DELTA_DESCRIPTION:
        return fault or _sources_fault(description.get("sources"), ({"base", "tuned"},))
    options = description.get("options")
    if not isinstance(options, dict):
        return "it has no options"
    odd = next((name for name, fits in _OPTIONS.items() if not fits(options.get(name))), None)
    if odd is not None:
        return f"its option {odd!r} is {reprlib.repr(options.get(odd))}"
    return _sources_fault(description.get("sources"), _ROLES[options["delta"]])


def _format_fault(content: dict[str, Any], wanted: int) -> str | None:
    found = content.get("format")
    if type(found) is int and found == wanted:
        return None
    return f"its format is {reprlib.repr(found)}, where {wanted} is read"


def _sources_fault(sources: Any, roles: tuple[set[str], ...]) -> str | None:
    if not isinstance(sources, dict) or sources.keys() not in roles:
        return f"its sources are not {' or '.join(', '.join(sorted(some)) for some in roles)}"
    return next((f"what it says of the {role} model is odd" for role in sources if not _is_source(sources[role])), None)


def _is_source(source: Any) -> bool:
    return (
        isinstance(source, dict)
        and isinstance(source.get("name"), str)
        and isinstance(source.get("path", ""), str)
        and isinstance(source.get("files"), dict)
        and all(_is_entry(name, entry) for name, entry in source["files"].items())
    )


def _is_entry(name: str, entry: Any) -> bool:
    """A file within its folder, its bytes, and its hashes."""
    return (
        _is_inside(name)
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and 0 <= entry["bytes"] < 2**63
        and all(_is_hash(value) for key, value in entry.items() if key.endswith("sha256"))
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name != "." and not path.is_absolute() and ".." not in path.parts


def _is_hash(value: Any) -> bool:
    return value is None or (isinstance(value, str) and _SHA256.fullmatch(value) is not None)


def _is_scale(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _are_patterns(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(pattern, str) for pattern in value)


#: What each option of a graft may be.
_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "delta": lambda value: value in list(_ROLES),
    "scale": _is_scale,
    "scope": lambda value: value in ("linear", "all"),
    "include": _are_patterns,
    "exclude": _are_patterns,
    "output_dtype": lambda value: value in get_args(OutputDtype),
}


def _delta(kind: str, places: Mapping[str, Path]) -> Delta:
    if kind == "full":
        return FullDelta(places["base"], places["tuned"])
    return SavedDelta(places["delta"]) if kind == "delta" else LoraDelta(places["adapter"], places.get("base"))


def _options(options: dict[str, Any]) -> Options:
    selection = Selection(options["scope"], tuple(options["include"]), tuple(options["exclude"]))
    return Options(scale=float(options["scale"]), selection=selection, output_dtype=options["output_dtype"])


# --- against the sources ----------------------------------------------------------------------------------------------


def _refuse_unknown(sources: dict[str, Any], given: Mapping[str, Path]) -> None:
    unknown = sorted(given.keys() - sources.keys())
    if unknown:
        raise InvalidInput(
            f"The graft was made without a source {unknown[0]!r}; its sources are {', '.join(sources)}",
            param=unknown[0],
            hint=_TUNED_ELSEWHERE if unknown[0] == "delta" and "tuned" in sources else "",
        )


def _unmade(folder: Path, sources: dict[str, Any], given: Mapping[str, Path]) -> str | None:
    """Why no tensor can be made again, where nothing was asked for that would need it."""
    lost = [role for role, source in sources.items() if "path" not in source]
    if given or not lost:
        return None
    _places(folder, {role: source for role, source in sources.items() if role not in lost}, {})
    flags = " ".join(f"--{role} FOLDER" for role in lost)
    said = (
        f"No tensor was made again: the folder does not say where its sources lie ({', '.join(lost)}). "
        f"To have some made again, say it: {flags}."
    )
    return f"{said} {_TUNED_ELSEWHERE}" if "tuned" in lost else said


def _places(folder: Path, sources: dict[str, Any], given: Mapping[str, Path]) -> dict[str, Path]:
    return {role: _place(folder, role, source, given.get(role)) for role, source in sources.items()}


def _place(folder: Path, role: str, source: dict[str, Any], given: Path | None) -> Path:
    place = given or (folder.resolve() / source["path"] if "path" in source else None)
    if place is not None and os.path.isdir(place):  # noqa: PTH112 - as in `_is_file`
        return place
    where = "is not told" if place is None else f"was {given or source['path']!s}, where no folder is now"
    remedy = f"Say where it lies: --{role} FOLDER."
    raise InvalidInput(
        f"The place of the {role} model {source['name']!r} {where}",
        code="source_not_found",
        param=role,
        hint=f"{remedy} {_TUNED_ELSEWHERE}" if role == "tuned" else remedy,
    )


def _source_problems(
    sources: dict[str, Any], places: Mapping[str, Path], *, everything: bool, on_progress: OnProgress | None
) -> Iterator[str]:
    """What is not as it was when it was grafted."""
    files = [(role, file, entry) for role, source in sources.items() for file, entry in source["files"].items()]
    total, done = sum(entry["bytes"] for _, _, entry in files), 0
    for role, file, entry in files:
        found = _source_problem(places[role] / file, entry, everything=everything)
        if found is not None:
            yield f"the {role} source's {file} {found}"
        done += entry["bytes"]
        if on_progress is not None:
            on_progress(done, total)


def _source_problem(path: Path, entry: dict[str, Any], *, everything: bool) -> str | None:
    if not _is_file(path):
        return "is missing"
    try:
        other = _difference(path, entry, everything=everything)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return other and f"is not the file that was grafted (its {other} differs)"


def _difference(path: Path, entry: dict[str, Any], *, everything: bool) -> str | None:
    """What differs from the record. Weights are read whole only for `everything`; configs are small."""
    if path.stat().st_size != entry["bytes"]:
        return "size"
    looks = {"header_sha256": ("header", header_sha256), "sampled_sha256": ("content", sampled_sha256)}
    if everything or "header_sha256" not in entry:
        looks["sha256"] = ("sha256", sha256_of)
    return next(
        (word for key, (word, look) in looks.items() if entry.get(key) is not None and look(path) != entry[key]), None
    )


def _shard_problems(records: dict[str, Any], shards: list[Shard]) -> Iterator[str]:
    """Weights that are more, fewer or of another size than what the sources give, whatever the manifest says."""
    made = {shard.file: shard.bytes for shard in shards}
    for file, size in made.items():
        if file not in records:
            yield f"{file} is missing, which its sources give"
        elif records[file]["bytes"] != size:
            yield f"{file} has {records[file]['bytes']} bytes, and its sources give {size}"
    for file in records:
        if file.endswith(".safetensors") and file not in made:
            yield f"{file} is not what its sources give"


def _remade(
    folder: Path, recipe: Recipe, shards: list[Shard], wanted: set[str], on_progress: OnProgress | None
) -> Iterator[str]:
    """Make the `wanted` tensors again and compare them with what is stored."""
    written, done = Reader(folder), 0
    try:
        for shard in shards:
            if not _same(recipe, shard, 0, len(shard.header), written):
                yield f"{shard.file} has another header than its sources give"
                continue
            for name in (name for name in shard.tensors if name in wanted):
                if not _same_tensor(recipe, shard, name, written):
                    yield f"{name} in {shard.file} is not what its sources give"
                done += 1
                if on_progress is not None:
                    on_progress(done, len(wanted))
    finally:
        written.close()


def _same_tensor(recipe: Recipe, shard: Shard, name: str, written: Reader) -> bool:
    return all(
        _same(recipe, shard, start, min(start + BLOCK_BYTES, piece.end), written)
        for piece in shard.pieces
        if piece.info.name == name
        for start in range(piece.start, piece.end, BLOCK_BYTES)
    )


def _same(recipe: Recipe, shard: Shard, start: int, end: int, written: Reader) -> bool:
    made, read = memoryview(bytearray(end - start)), memoryview(bytearray(end - start))
    recipe.fill(shard, start, end, made, Scratch())
    written.bytes_into(read, shard.file, start)
    return made == read


def _verification(
    folder: Path,
    records: dict[str, Any],
    problems: list[str],
    *,
    tensors: int = 0,
    in_all: int = 0,
    unmade: str | None = None,
) -> Verification:
    size = sum(path.stat().st_size for path in map(folder.joinpath, records) if _is_file(path))
    return Verification(len(records), size, tensors, in_all, tuple(problems), unmade)
