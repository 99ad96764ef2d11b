"""The second stage of a pair's check, in a child of the light worker: what needs tokenizers, or a look at weights.

inputs/pair.json says how far to look; inputs/instruct and inputs/base are the models' folders, base only where it
matters. A pair that cannot be used is a result, not a failure.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from core.checkpoints import read_checkpoint
from core.errors import InvalidInput
from core.verdict import Finding, Level, verdict_of
from worker.progress import ProgressWriter
from worker.tokenizers_check import Chats, check_chats
from worker.weights.similarity import Band, OutOfTime, Similarity, band, measure_similarity, remark
from worker.weights.special_rows import untrained_rows
from worker.weights.tensors import Reader
from worker.weights.tied_heads import UNTIED_REMEDY, Model, untied_heads
from worker.workspace import Workspace

_LEVELS: dict[Band, Level] = {"tested": "note", "untested": "note", "doubtful": "warn"}


class Asked(msgspec.Struct, frozen=True):
    """inputs/pair.json"""

    #: Whether the weights of all models in inputs/ are there as well.
    weights: bool
    #: Processor time for the texts; the kernel ends the step beyond it.
    texts_cpu_seconds: int
    #: After so long the measuring of sigma is given up.
    similarity_seconds: float


@dataclass(frozen=True)
class Weighed:
    findings: list[Finding] = field(default_factory=list)
    similarity: Similarity | None = None


def read_asked(workspace: Workspace) -> Asked:
    return msgspec.json.decode(workspace.pair_file.read_bytes(), type=Asked)


def look_at_texts(workspace: Workspace) -> Chats:
    """Run the models' tokenizers and the template, which strangers wrote: the caller caps what they may take."""
    return check_chats(workspace.instruct, _base(workspace))


def look_at_weights(workspace: Workspace, asked: Asked, chats: Chats, progress: ProgressWriter) -> Weighed:
    """Compare the weights, where that is asked for and the texts leave a reason to."""
    base = _base(workspace)
    if verdict_of(chats.findings) == "refuse":
        return Weighed()
    if not asked.weights:
        return Weighed([_not_here()] if base else [])
    try:
        untied = [*_untied("instruct", workspace.instruct), *(_untied("base", base) if base else [])]
        if untied or base is None:
            return Weighed(untied)
        untrained = _untrained(base, chats)
        measured = _measure(base, workspace.instruct, asked.similarity_seconds, progress)
    except InvalidInput as error:  # what the headers could not tell: a weight is no number
        return Weighed([Finding("refuse", error.code, f"{error.message.rstrip('.')}.", error.hint)])
    return Weighed([*untrained, *measured.findings], measured.similarity)


def result_of(chats: Chats, weighed: Weighed) -> dict[str, Any]:
    """`{"findings": [...], "similarity": {...} or null}`"""
    return {
        "findings": [finding.as_dict() for finding in (*chats.findings, *weighed.findings)],
        "similarity": asdict(weighed.similarity) if weighed.similarity else None,
    }


def _base(workspace: Workspace) -> Path | None:
    return workspace.base if workspace.base.exists() else None


def _untied(role: str, folder: Path) -> list[Finding]:
    with closing(Reader(folder)) as reader:
        found = untied_heads([Model(f"the {role} model", read_checkpoint(folder), reader)])
    remedy = f"{UNTIED_REMEDY[0].upper()}{UNTIED_REMEDY[1:]}."
    return [Finding("refuse", "untied_head", f"{one[0].upper()}{one[1:]}.", remedy) for one in found]


def _untrained(base: Path, chats: Chats) -> list[Finding]:
    found = untrained_rows(base, chats.marks)
    ids = sorted({one for rows in found.values() for one in rows})
    if not ids:
        return []
    return [
        Finding(
            "warn",
            "untrained_rows",
            f"Every chat holds {', '.join(chats.names[one] for one in ids)}, and base has never been trained on them "
            f"({', '.join(found)}).",
            "Training starts from a base that has the instruct model's rows for these tokens; nothing is to be done.",
        )
    ]


def _measure(base: Path, instruct: Path, seconds: float, progress: ProgressWriter) -> Weighed:
    try:
        similarity = measure_similarity(base, instruct, on_progress=progress.step, deadline=time.monotonic() + seconds)
    except OutOfTime:
        said = f"The distance of the two models (sigma) was not measured: that takes more than {seconds:.0f} seconds."
        remedy = "A check by POST /v1/pairs/check has more time for it than an admission."
        return Weighed([Finding("note", "similarity_not_measured", said, remedy)])
    if similarity.sigma_ratio == 0:
        return Weighed([_same_weights()], similarity)
    level = _LEVELS[band(similarity.sigma_mean)]
    return Weighed([Finding(level, "similarity", remark(similarity))], similarity)


def _not_here() -> Finding:
    return Finding(
        "note",
        "weights_not_here",
        "The models' weights are not on this machine, so neither the distance of the two (sigma) nor untrained rows of "
        "special tokens were looked at.",
        "The first job fetches them; a check after it looks at both.",
    )


def _same_weights() -> Finding:
    return Finding(
        "warn",
        "same_weights",
        "Base and instruct have the same weights, so a graft is the same as tuning the instruct model directly.",
        "Name the base model that instruct was made from.",
    )
