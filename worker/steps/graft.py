"""The step `graft`: one model folder for each scale, from what the step `train` left, or from what an earlier job
published. A killed one goes on where it was: the library resumes a graft, and a scale that stands is not made again.

python -m worker.steps.graft FOLDER
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.graft_plan import Selection
from core.job_spec import JobSpec, ModelSource, OutputDtype
from worker.progress import ProgressWriter
from worker.steps import child
from worker.weights import (
    LOW_FIDELITY,
    Delta,
    FullDelta,
    LoraDelta,
    Origin,
    Provenance,
    SavedDelta,
    graft,
    remedy,
    save_delta,
)
from worker.weights.delta import Kind
from worker.workspace import Workspace, write_durably


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    spec = workspace.spec()
    if spec.saves_delta:
        _save_delta(workspace, spec, progress)
    figures = {
        f"{scale:g}": _graft_one(workspace, spec, scale, on_progress=_share(progress, position, len(spec.scales)))
        for position, scale in enumerate(spec.scales)
    }
    published = f"{spec.scales[0]:g}"
    _tell(figures[published], progress, kind=_delta(workspace, spec).kind, output_dtype=spec.graft.output_dtype)
    return {
        "published": published,
        "scales": figures,
        "seconds": sum(one["seconds"] for one in figures.values()),
    }


def _share(progress: ProgressWriter, position: int, parts: int) -> Callable[[int, int], None]:
    """Bytes of all scales. Each is as large as the others."""
    return lambda done, total: progress.step(position * total + done, parts * total)


def _graft_one(
    workspace: Workspace, spec: JobSpec, scale: float, *, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The figures of the graft at `scale`."""
    kept = workspace.figures(scale)
    if not kept.exists():
        out = workspace.grafted(scale)
        shutil.rmtree(out, ignore_errors=True)  # it stands, but a kill took its figures
        result = graft(
            instruct=workspace.instruct,
            delta=_delta(workspace, spec),
            out=out,
            scale=scale,
            selection=Selection(spec.scope, spec.graft.include, spec.graft.exclude),
            output_dtype=spec.graft.output_dtype,
            provenance=_provenance(spec),
            hash_sources=True,
            on_progress=on_progress,
        )
        write_durably(kept, json.dumps(asdict(result)).encode())
    figures: dict[str, Any] = json.loads(kept.read_bytes())
    return figures


def _delta(workspace: Workspace, spec: JobSpec) -> Delta:
    """Direct tuning is the same graft with Instruct in the place of Base."""
    if spec.delta is not None:
        return LoraDelta(workspace.delta) if spec.delta.kind == "adapter" else SavedDelta(workspace.delta)
    if spec.tuning.type == "lora":
        return LoraDelta(workspace.adapter, base=workspace.base if spec.strategy == "shadow" else None)
    return FullDelta(base=workspace.start(spec), tuned=workspace.tuned)


def _save_delta(workspace: Workspace, spec: JobSpec, progress: ProgressWriter) -> None:
    if workspace.saved_delta.exists():
        return
    progress.note("Saving the learned change, to be published beside the model.")
    save_delta(
        base=workspace.start(spec), tuned=workspace.tuned, out=workspace.saved_delta, provenance=_provenance(spec)
    )


def _provenance(spec: JobSpec) -> Provenance:
    """A change is named by the job that learned it."""
    learned = Origin(
        f"{spec.delta.job_id if spec.delta else spec.job_id} ({spec.tuning.type} tuning of {_name(spec.start)})"
    )
    return Provenance(
        names={
            "instruct": _origin(spec.pair.instruct),
            "base": _origin(spec.start),
            **dict.fromkeys(("tuned", "adapter", "delta"), learned),
        },
        pair=spec.pair.name,
    )


def _origin(source: ModelSource) -> Origin:
    return Origin(_name(source), source.revision)


def _name(source: ModelSource) -> str:
    """A local model is known by its folder's name: where it lies is this machine's affair."""
    return source.location if source.kind == "hub" else Path(source.location).name


def _tell(figures: dict[str, Any], progress: ProgressWriter, *, kind: Kind, output_dtype: OutputDtype) -> None:
    if figures["resumed_shards"]:
        progress.note(f"Went on behind {figures['resumed_shards']} shards that an earlier attempt had finished.")
    for remark in figures["remarks"]:
        progress.note(f"About the graft: {remark}.")
    shown = ("fidelity", "worst_tensor", "worst_fidelity", "discarded_share", "relative_norm", "cosine")
    data = {name: figures[name] for name in shown}
    kept = max(0.0, figures["fidelity"])
    message = f"The graft at scale {figures['scale']:g} keeps {kept:.1%} of the learned change."
    if figures["discarded_share"]:
        message += f" Scope and patterns had left out {figures['discarded_share']:.1%} of it."
    if figures["grafted"] == 0:
        progress.note("The graft changes nothing: there is no change to add.", level="warn", **data)
    elif figures["fidelity"] >= LOW_FIDELITY:
        progress.note(message, **data)
    else:
        progress.note(f"{message} {remedy(kind, output_dtype)}", level="warn", **data)


if __name__ == "__main__":
    child.run("graft", main)
