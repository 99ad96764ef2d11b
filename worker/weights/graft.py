"""`out = instruct + scale * delta`, streamed shard by shard into a folder that looks like Instruct's.

The laws (each one a test):
- Output keeps Instruct's shards, headers and dtypes, byte for byte where nothing is added.
- An element whose update is zero keeps its bits: `-0.0 + 0.0` would give `+0.0`, and NaN times 0 is NaN.
- Where Instruct is base itself and the scale is 1, the output is the tuned model, bit for bit.
- Arithmetic is float32 and storage rounds once. The paper's script adds in the stored dtype (arXiv 2505.12716).
- Neither shards nor chunks nor threads change a bit.
- Whatever goes wrong, nothing stands at `out`; what a kill left is gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from core.checkpoints import CONFIG_FILE, INDEX_FILE, Checkpoint, is_small_file, read_checkpoint, read_config
from core.errors import InvalidInput
from core.graft_plan import Selection
from worker.weights.delta import BoundDelta, Delta
from worker.weights.figures import Measurement, Tally
from worker.weights.files import (
    MANIFEST_FILE,
    FileRecord,
    copy_file,
    draft_of,
    refuse_taken,
    write_bytes,
    write_json,
    write_manifest,
)
from worker.weights.layout import OutputDtype, Shard, plan_shards
from worker.weights.origin import Provenance, fingerprint
from worker.weights.recipe import Recipe
from worker.weights.tensors import Reader
from worker.weights.tied_heads import Model, refuse_untied_heads
from worker.weights.writing import OnProgress, write_shards

SHADOW_FILE = "shadow.json"
#: What the arithmetic is made with.
MADE_BY = ("shadowft", "numpy", "numba")

#: These would speak of another model than the output, or make a loader look for other weights.
_LEFT_BEHIND = frozenset({"README.md", "adapter_config.json", SHADOW_FILE, MANIFEST_FILE})
_TEMPLATE_FOLDER = "additional_chat_templates"


@dataclass(frozen=True, kw_only=True)
class GraftResult(Measurement):
    scale: float
    #: Shards that an earlier, killed run had finished.
    resumed_shards: int
    #: Of all files.
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a graft is made with; `shadow.json` keeps it."""

    scale: float
    selection: Selection
    output_dtype: OutputDtype

    def as_json(self, kind: str) -> dict[str, Any]:
        return {
            "delta": kind,
            "scale": self.scale,
            "scope": self.selection.scope,
            "include": list(self.selection.include),
            "exclude": list(self.selection.exclude),
            "output_dtype": self.output_dtype,
        }


@dataclass(frozen=True)
class Plan:
    """Everything decided, nothing read but headers."""

    instruct: Path
    checkpoint: Checkpoint
    delta: Delta
    bound: BoundDelta
    options: Options
    shards: list[Shard]
    reader: Reader
    #: What each source's files were like before the first of them was read.
    fingerprints: dict[str, list[Any]]

    @property
    def sources(self) -> dict[str, Path]:
        return {"instruct": self.instruct, **self.delta.sources}

    def recipe(self, tally: Tally, *, measure: bool) -> Recipe:
        return Recipe(self.reader, self.bound, float(self.options.scale), measure, tally)

    def key(self, *, measure: bool = True, hashes: bool = True) -> str:
        """One text for one output: a draft made under another one is not gone on with."""
        made_by = versions(*MADE_BY)
        wanted = {**self.options.as_json(self.delta.kind), "measure": measure, "hashes": hashes}
        return hashlib.sha256(json.dumps([self.fingerprints, wanted, made_by]).encode()).hexdigest()

    def weight_files(self, role: str) -> list[str]:
        tensors = self.checkpoint.tensors if role == "instruct" else self.bound.checkpoints[role]
        return sorted({info.file for info in tensors.values()})

    def refuse_changed_sources(self) -> None:
        """InvalidInput: a file is not what it was when the graft was planned, so that the output is of two minds."""
        for role, folder in self.sources.items():
            if _fingerprints(folder) != self.fingerprints[role]:
                raise InvalidInput(
                    f"The {role} model in {folder.name} was changed while it was read",
                    code="source_changed",
                    hint="Run it again when nothing writes there.",
                )

    def close(self) -> None:
        for reader in (self.reader, *self.bound.readers.values()):
            reader.close()


@contextmanager
def planned(instruct: Path, delta: Delta, options: Options) -> Iterator[Plan]:
    """PairRefused: the delta does not fit, with every reason. InvalidInput: a source is damaged.

    Headers decide all but one thing: whether a model that ties its head stores another one (see `tied_heads`).
    """
    folders = {"instruct": instruct, **delta.sources}
    fingerprints = {role: _fingerprints(folder) for role, folder in folders.items()}
    checkpoint = read_checkpoint(instruct)
    reader = Reader(instruct)
    bound = delta.bind(checkpoint, reader, options.selection)
    shards = plan_shards(checkpoint, reader, bound, scale=options.scale, output_dtype=options.output_dtype)
    plan = Plan(instruct, checkpoint, delta, bound, options, shards, reader, fingerprints)
    try:
        refuse_untied_heads(_models(plan))
        yield plan
    finally:
        plan.close()


def _models(plan: Plan) -> Iterator[Model]:
    """Every source but an adapter, which has no head."""
    yield Model("instruct", plan.checkpoint, plan.reader)
    for role, reader in plan.bound.readers.items():
        if role != "adapter":
            config = read_config(reader.folder)
            yield Model(role, Checkpoint(str(reader.folder), config, dict(plan.bound.checkpoints[role])), reader)


def graft(
    *,
    instruct: Path,
    delta: Delta,
    out: Path,
    scale: float = 1.0,
    selection: Selection = Selection(),
    output_dtype: OutputDtype = "auto",
    provenance: Provenance = Provenance(),
    threads: int | None = None,
    measure: bool = True,
    hashes: bool = True,
    hash_sources: bool = False,
    on_progress: OnProgress | None = None,
) -> GraftResult:
    """Write `instruct + scale * delta` to the new folder `out`.

    `measure` and `hashes` can be left out for speed: then there are no figures, and the manifest has no hashes.
    `hash_sources` reads every source once more where its hash is not on record.

    PairRefused: the delta does not fit, with every reason. InvalidInput: `out` is taken, a source is damaged, the scale
    or a weight is not a finite number. Conflict: another process writes to `out`. Unavailable: the disk refused.
    Nothing stands at `out` before all of it does. Run again after a kill, it goes on behind the finished shards.
    """
    started = time.monotonic()
    refuse_scale(scale)
    refuse_taken(out)
    refuse_inside(out, (instruct, *delta.sources.values()))
    options = Options(scale=scale, selection=selection, output_dtype=output_dtype)
    with planned(instruct, delta, options) as plan, draft_of(out, plan.key(measure=measure, hashes=hashes)) as draft:
        small_files, rewritten = _small_files(plan), _rewritten_files(plan)
        recipe = plan.recipe(Tally(), measure=measure)
        shards = write_shards(recipe, plan.shards, draft, threads=threads, hashed=hashes, on_progress=on_progress)
        draft.keep_only(shards.records)
        records = shards.records | _carry(small_files, plan.instruct, draft.folder, rewritten)
        measurement = _measurement(plan, recipe.tally, measure=measure)
        shadow = describe(plan, provenance, measurement, out, hash_sources=hash_sources)
        records[SHADOW_FILE] = write_json(draft.folder / SHADOW_FILE, shadow)
        plan.refuse_changed_sources()
        written = write_manifest(draft.folder, records)
    return GraftResult(
        **{name: getattr(measurement, name) for name in Measurement.__dataclass_fields__},
        scale=scale,
        resumed_shards=shards.resumed,
        bytes=written,
        seconds=time.monotonic() - started,
    )


def refuse_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise InvalidInput(f"The scale is {scale}", param="scale", hint="Give a finite number, such as 1.0.")


def _measurement(plan: Plan, tally: Tally, *, measure: bool) -> Measurement:
    tensors, remarks = len(plan.checkpoint.tensors), plan.bound.remarks
    if not measure:
        grafted = len(plan.bound.grafted) if plan.options.scale else 0
        return Measurement.none(grafted=grafted, tensors=tensors, remarks=remarks)
    return tally.measurement(scale=plan.options.scale, tensors=tensors, remarks=remarks)


def refuse_inside(out: Path, sources: Iterable[Path]) -> None:
    inside = [source.name for source in sources if out.resolve().is_relative_to(source.resolve())]
    if inside:
        raise InvalidInput(f"{out.name} lies inside {inside[0]}, which is read", param="out", hint="Write elsewhere.")


# --- the folder -------------------------------------------------------------------------------------------------------


def _carry(names: list[str], instruct: Path, folder: Path, rewritten: dict[str, bytes]) -> dict[str, FileRecord]:
    """Config, tokenizer, template and licence are Instruct's; only what speaks of another dtype is changed."""
    records = {}
    for name in names:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if name in rewritten:
            records[name] = write_bytes(target, rewritten[name])
        else:
            records[name] = copy_file(instruct / name, target)
    return records


def _rewritten_files(plan: Plan) -> dict[str, bytes]:
    """What config and index must say where the output is stored in a dtype of its own."""
    dtype = plan.options.output_dtype
    if dtype == "auto":
        return {}
    config = json.loads((plan.instruct / CONFIG_FILE).read_bytes())
    for part in _parts(config):
        part.update({key: dtype for key in ("torch_dtype", "dtype") if part.get(key) is not None})
    if "dtype" not in config:
        config["torch_dtype"] = dtype
    files = {CONFIG_FILE: config}
    if plan.checkpoint.is_sharded:
        index = json.loads((plan.instruct / INDEX_FILE).read_bytes())
        weights = sum(shard.bytes - len(shard.header) for shard in plan.shards)
        files[INDEX_FILE] = {**index, "metadata": {**(index.get("metadata") or {}), "total_size": weights}}
    return {name: json.dumps(content, indent=2).encode() + b"\n" for name, content in files.items()}


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and all in it: a multimodal model has one for each of its parts, and they may hold each other."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _small_files(plan: Plan) -> list[str]:
    """Relative to Instruct's folder. InvalidInput: one of them is a link to nothing."""
    found = [path for path in sorted(plan.instruct.iterdir()) if _is_carried(path.name, plan.checkpoint.is_sharded)]
    for path in found:
        if path.is_symlink() and not path.exists():
            raise InvalidInput(
                f"{path.name} of the instruct model is a link to nothing",
                code="damaged_checkpoint",
                hint="Copy or download the folder again, or remove the link.",
            )
    templates = sorted((plan.instruct / _TEMPLATE_FOLDER).glob("*.jinja"))
    return [path.name for path in found if path.is_file()] + [f"{_TEMPLATE_FOLDER}/{path.name}" for path in templates]


def _is_carried(name: str, with_index: bool) -> bool:
    if name.endswith(".index.json"):
        return with_index and name == INDEX_FILE
    if name.startswith(".") or name in _LEFT_BEHIND:
        return False
    return is_small_file(name)


def describe(
    plan: Plan, provenance: Provenance, measurement: Measurement, out: Path, *, hash_sources: bool
) -> dict[str, Any]:
    """What `shadow.json` says."""
    return {
        "format": 2,
        "method": "Shadow-FT (arXiv 2505.12716): instruct + scale * (tuned - base)",
        "pair": provenance.pair,
        "sources": describe_sources(plan, provenance, out, hashed=hash_sources),
        "options": plan.options.as_json(plan.delta.kind),
        **describe_start(plan),
        **asdict(measurement),
        "versions": {"python": platform.python_version(), **versions(*MADE_BY)},
    }


def describe_start(plan: Plan) -> dict[str, Any]:
    """Which rows of base were Instruct's when the tuning began; nothing where none were."""
    return {"start_rows": dict(plan.bound.start_rows)} if plan.bound.start_rows else {}


def describe_sources(plan: Plan, provenance: Provenance, out: Path, *, hashed: bool) -> dict[str, Any]:
    return {
        role: provenance.describe(role, folder, plan.weight_files(role), out, hashed=hashed)
        for role, folder in plan.sources.items()
    }


def _fingerprints(folder: Path) -> list[Any]:
    """Of all that can decide what is made of it: weights, indexes, configs."""
    if not folder.is_dir():
        return []
    return [fingerprint(path) for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".json")]


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: the library works from a bare checkout."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
