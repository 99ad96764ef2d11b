"""Keeps a delta as files of its own, to be grafted later and onto other models of the lineage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.checkpoints import CONFIG_FILE, DELTA_INDEX_FILE, DELTA_STEM
from core.graft_plan import Selection
from worker.weights.delta import FullDelta
from worker.weights.figures import Tally
from worker.weights.files import copy_file, draft_of, refuse_taken, write_json, write_manifest
from worker.weights.graft import (
    MADE_BY,
    Options,
    Plan,
    describe_sources,
    describe_start,
    planned,
    refuse_inside,
    versions,
)
from worker.weights.layout import Shard, plan_difference
from worker.weights.origin import Provenance
from worker.weights.writing import OnProgress, write_shards

DELTA_DESCRIPTION = "delta.json"
#: As a graft of the difference onto base would be planned: every tensor, as it is.
WHOLE = Options(scale=1.0, selection=Selection("all"), output_dtype="float32")


@dataclass(frozen=True)
class DeltaResult:
    tensors: int
    bytes: int
    seconds: float


def save_delta(
    *,
    base: Path,
    tuned: Path,
    out: Path,
    provenance: Provenance = Provenance(),
    on_progress: OnProgress | None = None,
) -> DeltaResult:
    """Write `tuned - base`, float32, to the new folder `out`: every float tensor under base's name, and base's config.

    A graft from it is the graft from the two models, bit for bit, but where Instruct's tensor is base's own and the
    scale is 1. There the graft from the two models takes the tuned values as they are, and the one from the delta adds
    the change to base, which float32 has rounded: before it is rounded to the output's dtype, the sum is off by at most
    one float32 step of the change (2^-23 of it). It is exact where a weight has kept its sign and neither more than
    doubled nor more than halved (Sterbenz). Errors and resuming: as for `graft`.
    """
    with saving_delta(base=base, tuned=tuned, out=out, provenance=provenance, on_progress=on_progress) as result:
        return result


@contextmanager
def saving_delta(
    *,
    base: Path,
    tuned: Path,
    out: Path,
    provenance: Provenance = Provenance(),
    on_progress: OnProgress | None = None,
) -> Iterator[DeltaResult]:
    """`save_delta` for a delta that is to stand only if the body succeeds, which finds it whole but not yet at `out`.

    An InvalidInput of the body leaves nothing; after every other error the same can be gone on with.
    """
    started = time.monotonic()
    refuse_taken(out)
    refuse_inside(out, (base, tuned))
    with planned(base, FullDelta(base, tuned), WHOLE) as plan, draft_of(out, plan.key()) as draft:
        recipe = plan.recipe(Tally(), measure=True)
        shards = plan_difference(plan.checkpoint, plan.bound, DELTA_STEM)
        records = write_shards(recipe, shards, draft, threads=None, hashed=True, on_progress=on_progress).records
        draft.keep_only(records)
        records[CONFIG_FILE] = copy_file(base / CONFIG_FILE, draft.folder / CONFIG_FILE)
        if len(shards) > 1:
            records[DELTA_INDEX_FILE] = write_json(draft.folder / DELTA_INDEX_FILE, _index(shards))
        description = _describe(plan, provenance, out)
        records[DELTA_DESCRIPTION] = write_json(draft.folder / DELTA_DESCRIPTION, description)
        plan.refuse_changed_sources()
        written = write_manifest(draft.folder, records)
        yield DeltaResult(tensors=len(plan.bound.grafted), bytes=written, seconds=time.monotonic() - started)


def _index(shards: list[Shard]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.bytes - len(shard.header) for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.tensors},
    }


def _describe(plan: Plan, provenance: Provenance, out: Path) -> dict[str, Any]:
    sources = describe_sources(plan, provenance, out, hashed=False)
    return {
        "format": 1,
        "method": "Shadow-FT (arXiv 2505.12716): tuned - base",
        "sources": {role: sources[role] for role in ("base", "tuned")},
        **describe_start(plan),
        "dtype": "float32",
        "tensors": len(plan.bound.grafted),
        "versions": versions(*MADE_BY),
    }
