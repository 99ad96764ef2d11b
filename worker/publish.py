"""Workspace -> storage: what a job publishes, as rows that become visible with the job's success and not before.

Every attempt writes below a prefix of its own, so that one that lost its lease can dirty nothing but its own files.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.errors import Cause, StepFailed
from core.ids import new_id
from core.job_spec import Graft, JobSpec, ModelSource
from core.jobs import Claim, Outcome
from core.models import Artifact, Checkpoint, File
from core.storage import Storage
from worker.left_files import open_left, read_left
from worker.workspace import Workspace

#: The header that OpenAI's result files have.
RESULT_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}


@dataclass(frozen=True)
class Publication:
    """One file of the workspace on its way out."""

    kind: str
    path: str
    source: Path


def prefix(claim: Claim) -> str:
    return f"jobs/{claim.job_id}/a{claim.attempt}"


def publish(
    spec: JobSpec, workspace: Workspace, claim: Claim, *, team_id: str, storage: Storage, check: Callable[[], None]
) -> Outcome:
    """Put everything into storage. `check` is asked all the while and raises when the work must end."""
    artifacts = [
        _store(publication, workspace, claim, team_id, storage, check) for publication in publications(spec, workspace)
    ]
    _verify_manifest(artifacts, "model", workspace.grafted(spec.scales[0]), workspace)
    if spec.saves_delta:
        _verify_manifest(artifacts, "delta", workspace.saved_delta, workspace)
    artifacts.append(_manifest(artifacts, claim, team_id, storage))
    trains = spec.kind == "fine_tune"
    compares = spec.evaluation.left_out is None
    return Outcome(
        artifacts=artifacts,
        result_files=[_result_file(workspace, claim, team_id, storage)] if trains else [],
        trained_tokens=_trained(workspace)["trained_tokens"] if trains else None,
        evaluation=json.loads(_read(workspace.report, workspace)) if compares else None,
        graft_result=graft_result(workspace),
        checkpoints=_checkpoints(spec, workspace) if trains else [],
    )


def publications(spec: JobSpec, workspace: Workspace) -> Iterator[Publication]:
    card = _write_card(spec, workspace)
    manifest = _write_manifest(spec, workspace, card)
    for publication in _folder("model", workspace.grafted(spec.scales[0])):
        yield replace(publication, source=manifest) if publication.path == "model/manifest.json" else publication
    yield Publication("card", "model/README.md", card)
    if spec.evaluation.left_out is None:
        for path in (workspace.report, workspace.report.with_suffix(".md")):
            yield Publication("report", path.name, path)
    if spec.kind == "graft":
        return
    if spec.tuning.type == "lora":
        yield from _folder("adapter", workspace.adapter)
        for step in _steps(workspace)[:-1]:
            yield from _folder("adapter", workspace.checkpoint(step), below=_checkpoint_folder(step))
    if spec.saves_delta:
        yield from _folder("delta", workspace.saved_delta)
    yield Publication("metrics", workspace.metrics.name, workspace.metrics)


def _trained(workspace: Workspace) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_read(workspace.result("train"), workspace))
    return result


def _steps(workspace: Workspace) -> list[int]:
    return [checkpoint["step"] for checkpoint in _trained(workspace)["checkpoints"]]


def _checkpoint_folder(step: int) -> str:
    return f"checkpoints/step-{step}"


def _checkpoints(spec: JobSpec, workspace: Workspace) -> list[Checkpoint]:
    """The last one is the training's end: what is published as the job's adapter or delta."""
    last = "adapter" if spec.tuning.type == "lora" else "delta" if spec.saves_delta else None
    steps = _steps(workspace)
    folders = [*(_checkpoint_folder(step) for step in steps[:-1]), last]
    return [
        Checkpoint(id=new_id("ftckpt_"), job_id=spec.job_id, step=one["step"], metrics=one["metrics"], folder=folder)
        for one, folder in zip(_trained(workspace)["checkpoints"], folders, strict=True)
    ]


def graft_result(workspace: Workspace) -> dict[str, Any]:
    """The published graft's figures. Those of single layers and modules stand in its shadow.json."""
    result = json.loads(_read(workspace.result("graft"), workspace))
    figures: dict[str, Any] = result["scales"][result["published"]]
    return {name: value for name, value in figures.items() if name not in ("layers", "modules")}


def _write_card(spec: JobSpec, workspace: Workspace) -> Path:
    """The model's card, as the Hub reads one: what it was made of and how, then the evaluation."""
    front = f"---\nbase_model: {json.dumps(_name(spec.pair.instruct))}\ntags: [shadow-ft]\n---\n"
    parts = [f"{front}\n# {spec.fine_tuned_model}", _how_made(spec), _kept(graft_result(workspace))]
    if spec.evaluation.left_out is None:
        parts.append(_read(workspace.report.with_suffix(".md"), workspace).decode())
    card = workspace.root / "README.md"
    card.write_text("\n\n".join(parts))
    return card


def _write_manifest(spec: JobSpec, workspace: Workspace, card: Path) -> Path:
    """The graft's own, and the card in it: whoever checks the model later finds a change there too."""
    written = json.loads(_read(workspace.grafted(spec.scales[0]) / "manifest.json", workspace))
    content = card.read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = dict(sorted({**written["files"], "README.md": entry}.items()))
    manifest = workspace.root / "model-manifest.json"
    manifest.write_text(json.dumps({**written, "files": files}, indent=2) + "\n")
    return manifest


def _how_made(spec: JobSpec) -> str:
    start, instruct = _name(spec.start), _name(spec.pair.instruct)
    tuning = f"LoRA of rank {spec.tuning.rank}" if spec.tuning.type == "lora" else "full tuning"
    if spec.delta is not None:
        return (
            f"Shadow-FT (arXiv 2505.12716), without training: what the job {spec.delta.job_id} learned ({tuning} on "
            f"{start}), grafted onto {instruct} at {_options(spec.graft)}."
        )
    if spec.strategy == "direct":
        return f"Direct tuning, for comparison: {tuning} on {instruct}."
    return (
        f"Shadow-FT (arXiv 2505.12716): {tuning} on {start}, its change grafted onto {instruct} at "
        f"{_options(spec.graft)}."
    )


def _options(graft: Graft) -> str:
    """Scale and scope, and what differs from the defaults."""
    parts = [f"scale {graft.scale:g}", f"scope {graft.scope}"]
    if graft.include:
        parts.append(f"only {_listed(graft.include)}")
    if graft.exclude:
        parts.append(f"without {_listed(graft.exclude)}")
    if graft.output_dtype != "auto":
        parts.append(f"stored in {graft.output_dtype}")
    return ", ".join(parts)


def _listed(patterns: Sequence[str]) -> str:
    """As Markdown code; what a client wrote must not end it."""
    return ", ".join(f"`{pattern.replace('`', '?')}`" for pattern in patterns)


def _kept(result: dict[str, Any]) -> str:
    if result["grafted"] == 0:
        return "There was no change to graft: the weights are the instruct model's own."
    kept = f"Of the grafted change {max(0.0, result['fidelity']):.1%} survived storage in the weights' dtype (L2)"
    discarded = f"; scope and patterns had left out {result['discarded_share']:.1%} of what was learned"
    return f"{kept}{discarded if result['discarded_share'] else ''}."


def _name(source: ModelSource) -> str:
    return source.location if source.kind == "hub" else Path(source.location).name


def _folder(kind: str, folder: Path, *, below: str | None = None) -> Iterator[Publication]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_dir():  # what is no file either is refused when it is opened
            yield Publication(kind, f"{below or kind}/{path.relative_to(folder).as_posix()}", path)


def _read(path: Path, workspace: Workspace) -> bytes:
    return read_left(path, below=workspace.root)


def _store(
    publication: Publication,
    workspace: Workspace,
    claim: Claim,
    team_id: str,
    storage: Storage,
    check: Callable[[], None],
) -> Artifact:
    key = f"{prefix(claim)}/{publication.path}"
    with open_left(publication.source, below=workspace.root) as source:
        stored = storage.adopt(key, source, check=check)
    return _artifact(publication.kind, publication.path, key, claim, team_id, stored.bytes, stored.sha256)


def _artifact(kind: str, path: str, key: str, claim: Claim, team_id: str, size: int, sha256: str) -> Artifact:
    return Artifact(
        id=new_id("art_"),
        job_id=claim.job_id,
        team_id=team_id,
        kind=kind,
        path=path,
        bytes=size,
        sha256=sha256,
        storage_key=key,
    )


def _verify_manifest(artifacts: list[Artifact], kind: str, folder: Path, workspace: Workspace) -> None:
    """What was stored must be what the graft wrote: compare with the hashes it took while writing."""
    written = json.loads(_read(folder / "manifest.json", workspace))["files"]
    stored = {artifact.path: artifact.sha256 for artifact in artifacts}
    for name, entry in written.items():
        if stored.get(f"{kind}/{name}") != entry["sha256"]:
            raise StepFailed(
                Cause(
                    code="artifact_damaged",
                    message=f"The stored copy of {kind}/{name} differs from what the graft wrote.",
                    hint="The worker's disk or memory is suspect; the job is tried again.",
                    retryable=True,
                    fault="infrastructure",
                )
            )


def _manifest(artifacts: list[Artifact], claim: Claim, team_id: str, storage: Storage) -> Artifact:
    """A list of every published file with its hash, itself published."""
    entries = {artifact.path: {"bytes": artifact.bytes, "sha256": artifact.sha256} for artifact in artifacts}
    content = json.dumps({"job_id": claim.job_id, "files": entries}, indent=2).encode()
    key = f"{prefix(claim)}/manifest.json"
    incoming = storage.receive(key)
    incoming.write(content)
    stored = incoming.keep()
    return _artifact("report", "manifest.json", key, claim, team_id, stored.bytes, stored.sha256)


def _result_file(workspace: Workspace, claim: Claim, team_id: str, storage: Storage) -> File:
    """The metrics as the CSV that clients of the fine-tuning contract read."""
    content = metrics_csv(_read(workspace.metrics, workspace).decode()).encode()
    key = f"{prefix(claim)}/result.csv"
    incoming = storage.receive(key)
    incoming.write(content)
    incoming.keep()
    return File(
        id=new_id("file-"),
        team_id=team_id,
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        storage_key=key,
        status="processed",
    )


def metrics_csv(lines: str) -> str:
    """Blank where a step did not measure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(RESULT_COLUMNS)
    for line in lines.splitlines():
        metrics = json.loads(line)
        writer.writerow([_cell(metrics.get(key)) for key in RESULT_COLUMNS.values()])
    return out.getvalue()


def _cell(value: float | None) -> float | str:
    return "" if value is None else value
