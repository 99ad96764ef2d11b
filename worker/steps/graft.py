"""The step `graft`: one model folder for each scale, from what the step `train` left.

python -m worker.steps.graft FOLDER
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.job_spec import JobSpec, ModelSource
from worker.progress import ProgressWriter
from worker.steps import child
from worker.weights import Delta, FullDelta, GraftResult, LoraDelta, Provenance, graft
from worker.workspace import Workspace

#: Below it, the owner is told that storage ate a part of the training (notes of the method: full tuning at a rate of
#: 1e-5 in bfloat16 can lose a third and more).
LOW_FIDELITY = 0.9


def main(workspace: Workspace, progress: ProgressWriter) -> dict[str, Any]:
    spec = workspace.spec()
    results = {
        f"{scale:g}": _graft_one(workspace, spec, progress, scale=scale, position=position)
        for position, scale in enumerate(spec.scales)
    }
    published = results[f"{spec.scales[0]:g}"]
    _tell_fidelity(spec, published, progress)
    return {
        "published": f"{spec.scales[0]:g}",
        "scales": {scale: asdict(result) for scale, result in results.items()},
        "seconds": sum(result.seconds for result in results.values()),
    }


def _graft_one(
    workspace: Workspace, spec: JobSpec, progress: ProgressWriter, *, scale: float, position: int
) -> GraftResult:
    def tell(done: int, total: int) -> None:
        progress.step(position * total + done, len(spec.scales) * total)

    return graft(
        instruct=workspace.instruct,
        delta=_delta(workspace, spec),
        out=workspace.grafted(scale),
        scale=scale,
        scope=spec.graft.scope if spec.strategy == "shadow" else "all",
        names=_names(spec),
        on_progress=tell,
    )


def _delta(workspace: Workspace, spec: JobSpec) -> Delta:
    """Direct tuning is the same graft with Instruct in the place of Base."""
    if spec.tuning.type == "lora":
        return LoraDelta(workspace.adapter)
    return FullDelta(base=workspace.start(spec), tuned=workspace.tuned)


def _names(spec: JobSpec) -> Provenance:
    return Provenance(
        pair=spec.pair.name,
        instruct=_name(spec.pair.instruct),
        base=_name(spec.start),
        tuned=f"{spec.job_id} ({spec.tuning.type} tuning of {_name(spec.start)})",
    )


def _name(source: ModelSource) -> str:
    """A local model is known by its folder's name: where it lies is this machine's affair."""
    name = source.location if source.kind == "hub" else Path(source.location).name
    return f"{name}@{source.revision}" if source.revision else name


def _tell_fidelity(spec: JobSpec, result: GraftResult, progress: ProgressWriter) -> None:
    data: dict[str, Any] = {
        "fidelity": result.fidelity,
        "worst_tensor": result.worst_tensor,
        "worst_fidelity": result.worst_fidelity,
    }
    message = f"The graft at scale {result.scale:g} keeps {result.fidelity:.1%} of the learned change."
    if result.grafted == 0:
        progress.note("The graft changes nothing: the training left no change.", level="warn", **data)
    elif result.fidelity >= LOW_FIDELITY:
        progress.note(message, **data)
    else:
        progress.note(f"{message} {_remedy(spec)}", level="warn", **data)


def _remedy(spec: JobSpec) -> str:
    lost = "The rest is lost to rounding in the dtype of the instruct model"
    if spec.tuning.type == "lora":
        return f"{lost}; the unmerged adapter, loaded on the instruct model, keeps all of it."
    return f"{lost}; LoRA tuning keeps all of it in its unmerged adapter."


if __name__ == "__main__":
    child.run("graft", main)
