"""Looks whether a grafted or saved folder is still what was made, and whether its sources make the same again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoints import DELTA_STEM
from core.errors import InvalidInput
from core.graft_plan import Selection
from worker.weights.delta import Delta, FullDelta, LoraDelta, SavedDelta
from worker.weights.figures import Tally
from worker.weights.files import MANIFEST_FILE, json_bytes, sha256_of
from worker.weights.graft import SHADOW_FILE, Options, planned
from worker.weights.layout import Shard, plan_difference
from worker.weights.recipe import Recipe
from worker.weights.save import DELTA_DESCRIPTION, WHOLE
from worker.weights.tensors import Reader, Scratch
from worker.weights.writing import BLOCK_BYTES

#: Tensors made again where not all are asked for.
SAMPLE = 16
#: Files beside the model that say nothing of how it is loaded.
_BESIDE = frozenset({"README.md", ".gitattributes", MANIFEST_FILE})

#: Bytes looked at, bytes in all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    files: int
    bytes: int
    #: Tensors made again from the sources, and those of the model.
    tensors: int
    tensors_in_all: int
    #: Empty: all is as it was made.
    problems: tuple[str, ...]


def verify(
    folder: Path,
    *,
    sources: Mapping[str, Path] | None = None,
    everything: bool = False,
    on_progress: OnProgress | None = None,
) -> Verification:
    """Check every file against the manifest, then make a sample of tensors (or `everything`) again.

    `sources` says by role where the sources lie; what it does not name is looked for where `shadow.json` says. On a
    processor of another kind a product of LoRA factors may differ in its last place; that too is a problem then.

    A graft without hashes in its manifest is made again whole.

    InvalidInput: the folder is not of our making, or a source cannot be found.
    """
    records = _manifest(folder)
    problems = list(_file_problems(folder, records, on_progress))
    if problems:  # what is damaged needs no second proof, and may not even be readable
        return _verification(folder, records, 0, 0, problems)
    everything = everything or any(record["sha256"] is None for record in records.values())
    with _planned_again(folder, sources or {}) as (recipe, shards):
        names = [name for shard in shards for name in shard.tensors]
        chosen = names if everything else random.sample(names, min(SAMPLE, len(names)))
        problems += _remade(folder, recipe, shards, set(chosen), on_progress)
    return _verification(folder, records, len(chosen), len(names), problems)


@contextmanager
def _planned_again(folder: Path, given: Mapping[str, Path]) -> Iterator[tuple[Recipe, list[Shard]]]:
    """As the folder was planned, from what it says of itself."""
    file = SHADOW_FILE if (folder / SHADOW_FILE).exists() else DELTA_DESCRIPTION
    description = json.loads((folder / file).read_bytes())
    found = _sources(folder, description, dict(given))
    if file == DELTA_DESCRIPTION:
        with planned(found["base"], FullDelta(found["base"], found["tuned"]), WHOLE) as plan:
            yield plan.recipe(Tally(), measure=False), plan_difference(plan.checkpoint, plan.bound, DELTA_STEM)
    else:
        with planned(found["instruct"], _delta(description, found), _options(description)) as plan:
            yield plan.recipe(Tally(), measure=False), plan.shards


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
        records: dict[str, Any] = content["files"]
        whole = content["format"] == 1 and raw == json_bytes(content)
        whole = whole and all(record.keys() == {"bytes", "sha256"} for record in records.values())
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise InvalidInput(
            f"{folder.name}/{MANIFEST_FILE} is not as it was written",
            code="damaged_manifest",
            hint="Copy or download the folder again.",
        )
    return records


def _file_problems(folder: Path, records: dict[str, Any], on_progress: OnProgress | None) -> Iterator[str]:
    total, done = sum(record["bytes"] for record in records.values()), 0
    for name, record in records.items():
        found = _problem_of(folder / name, record)
        if found is not None:
            yield f"{name} {found}"
        done += record["bytes"]
        if on_progress is not None:
            on_progress(done, total)
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    for path in paths:
        if path.as_posix() not in records and path.name not in _BESIDE and not path.parts[0].startswith("."):
            yield f"{path.as_posix()} is not in the manifest"


def _problem_of(path: Path, record: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != record["bytes"]:
        return f"has {size} bytes and had {record['bytes']}"
    if record["sha256"] is not None and sha256_of(path) != record["sha256"]:
        return "was changed: its sha256 is another"
    return None


# --- against the sources ----------------------------------------------------------------------------------------------


def _sources(folder: Path, description: dict[str, Any], given: dict[str, Path]) -> dict[str, Path]:
    found = {role: _source(folder, role, source, given.get(role)) for role, source in description["sources"].items()}
    unknown = sorted(given.keys() - found.keys())
    if unknown:
        raise InvalidInput(
            f"The graft was made without a source {unknown[0]!r}; its sources are {', '.join(found)}",
            param=unknown[0],
        )
    return found


def _source(folder: Path, role: str, source: dict[str, Any], given: Path | None) -> Path:
    place = given or (folder.resolve() / source["path"] if "path" in source else None)
    if place is not None and place.is_dir():
        return place
    where = "is not told" if place is None else f"was {source.get('path', place)!s}, where nothing is now"
    raise InvalidInput(
        f"The place of the {role} model {source['name']!r} {where}",
        code="source_not_found",
        param=role,
        hint=f"Say where it lies: --{role} FOLDER.",
    )


def _delta(description: dict[str, Any], found: Mapping[str, Path]) -> Delta:
    kind = description["options"]["delta"]
    if kind == "full":
        return FullDelta(found["base"], found["tuned"])
    return SavedDelta(found["delta"]) if kind == "delta" else LoraDelta(found["adapter"], found.get("base"))


def _options(description: dict[str, Any]) -> Options:
    options = description["options"]
    selection = Selection(options["scope"], tuple(options["include"]), tuple(options["exclude"]))
    return Options(scale=options["scale"], selection=selection, output_dtype=options["output_dtype"])


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
    folder: Path, records: dict[str, Any], tensors: int, in_all: int, problems: list[str]
) -> Verification:
    size = sum((folder / name).stat().st_size for name in records if (folder / name).is_file())
    return Verification(len(records), size, tensors, in_all, tuple(problems))
