"""What a training leaves: an adapter, or the tuned model, readable by others and named as its start model is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from core.errors import Cause, StepFailed
from core.job_spec import JobSpec, ModelSource
from worker.weights.special_rows import StartRows, save_start_rows
from worker.workspace import Workspace


def save(model: Any, rows: StartRows, spec: JobSpec, workspace: Workspace) -> None:
    if spec.tuning.type == "lora":
        save_adapter(model, rows, spec.start, workspace.adapter)
    else:
        save_tuned(model, rows, workspace.tuned)
        require_same_tensors(workspace.tuned, workspace.start(spec))


def save_adapter(model: Any, rows: StartRows, start: ModelSource, folder: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = public_name(start)
    model.peft_config["default"].revision = start.revision
    # "auto" would ask the Hub whether the vocabulary had grown; it never has here.
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty card, with this machine's path in it
    save_start_rows(folder, rows)


def save_tuned(model: Any, rows: StartRows, folder: Path) -> None:
    model.save_pretrained(folder)
    save_start_rows(folder, rows)


def require_same_tensors(tuned: Path, start: Path) -> None:
    """Refuse a saved model that cannot be subtracted from its start: transformers may convert names on the way."""
    saved, published = dict(tensor_shapes(tuned)), dict(tensor_shapes(start))
    # A tied head is the embedding over again; either checkpoint may leave it out.
    differing = {name for name, _ in saved.items() ^ published.items()} - {"lm_head.weight"}
    if differing:
        raise StepFailed(
            Cause(
                code="checkpoint_converted",
                message=f"The tuned model does not match its start checkpoint in {len(differing)} tensors, "
                f"{min(differing)} among them, so no change can be told.",
                hint="Full tuning of this architecture is not supported; LoRA is.",
                fault="user",
            )
        )


def tensor_shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes from the headers of the folder's model files alone."""
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, tuple(file.get_slice(name).get_shape())


def public_name(source: ModelSource) -> str:
    """What others may know a model by; a path of this machine would mean nothing to them."""
    return source.location if source.kind == "hub" else Path(source.location).name
