"""From a request to a JobSpec: every choice that the client left open is made here, and nowhere else.

Admission makes the spec that a job keeps; an estimate makes the one that the job would get.
"""

from __future__ import annotations

from typing import Any

from core.checkpoints import Checkpoint
from core.errors import InvalidInput
from core.graft_plan import GraftPlan, Selection, is_linear, smallest_linear_dimension
from core.job_spec import DataSource, Evaluation, Graft, JobSpec, PairSource, Publish, Tuning
from core.models import File, Job

#: The paper's recipe (arXiv 2505.12716, and its code).
PAPER_EPOCHS = 1
PAPER_BATCH_SIZE = 32
PAPER_RANK = 128
PAPER_LEARNING_RATE = {"lora": 2e-4, "full": 1e-5}
#: Fewer rows than this are all trained on, unless the share itself asks for a held-out row.
ROWS_WORTH_SPLITTING = 10


def make_spec(
    job: Job, files: dict[str, File], *, pair: PairSource, team_name: str, start: Checkpoint, rows: int
) -> JobSpec:
    """Every choice made. `start` is the checkpoint that will be tuned."""
    shadow = job.request["shadow"]
    evaluation = shadow["evaluation"]
    return JobSpec(
        job_id=job.id,
        kind="fine_tune",
        strategy=shadow["strategy"],
        pair=pair,
        training=_source(files[job.training_file_id]),
        validation=_source(files[job.validation_file_id]) if job.validation_file_id else None,
        holdout_ratio=evaluation["holdout_ratio"],
        seed=job.seed,
        tuning=_tuning(job.request, start, rows),
        graft=Graft.model_validate(shadow["graft"]),
        evaluation=Evaluation(
            scales=tuple(evaluation["scales"]),
            exact_match=evaluation["exact_match"],
            max_rows=evaluation["max_rows"],
            max_new_tokens=evaluation["max_new_tokens"],
            probes={name: _source(files[file_id]) for name, file_id in evaluation["probes"].items()},
        ),
        publish=Publish.model_validate(shadow.get("publish", {})),  # a job from before this option waits without it
        fine_tuned_model=model_name(job, pair, team_name),
    )


def model_name(job: Job, pair: PairSource, team_name: str) -> str:
    return f"ft:{pair.name}:{team_name}:{job.suffix or ''}:{job.id[-8:]}"


def _tuning(request: dict[str, Any], start: Checkpoint, rows: int) -> Tuning:
    asked, hyperparameters = request["shadow"]["tuning"], request["hyperparameters"]
    rank = _rank(asked, start)
    n_epochs, batch_size = epochs_and_batch(hyperparameters, rows)
    return Tuning(
        type=asked["type"],
        n_epochs=n_epochs,
        batch_size=batch_size,
        learning_rate=_learning_rate(asked, hyperparameters),
        lr_scheduler=asked["lr_scheduler"],
        warmup_ratio=asked["warmup_ratio"],
        weight_decay=asked["weight_decay"],
        max_grad_norm=asked["max_grad_norm"],
        max_length=asked["max_length"],
        precision=asked["precision"],
        rank=rank,
        alpha=_or(asked["alpha"], 2 * rank) if rank else 0,
        dropout=asked["dropout"] if rank else 0.0,
    )


def epochs_and_batch(hyperparameters: dict[str, Any], rows: int) -> tuple[int, int]:
    return (
        _or(hyperparameters["n_epochs"], PAPER_EPOCHS),
        _or(hyperparameters["batch_size"], min(PAPER_BATCH_SIZE, rows)),
    )


def _rank(asked: dict[str, Any], start: Checkpoint) -> int:
    """0 for full tuning. `auto` is the paper's, or the smallest dimension of a linear where that is smaller."""
    if asked["type"] == "full":
        return 0
    smallest = smallest_linear_dimension(start)
    rank: int = _or(asked["rank"], min(PAPER_RANK, smallest))
    if rank > smallest:
        raise InvalidInput(
            f"shadow.tuning.rank is {rank}, but the smallest linear of the model has dimension {smallest}: a larger "
            "rank adds nothing. Use that or less, or full tuning.",
            param="shadow.tuning.rank",
        )
    return rank


def _learning_rate(asked: dict[str, Any], hyperparameters: dict[str, Any]) -> float:
    chosen: float = _or(asked["learning_rate"], PAPER_LEARNING_RATE[asked["type"]])
    return chosen * float(_or(hyperparameters["learning_rate_multiplier"], 1.0))


def _or(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _source(file: File) -> DataSource:
    return DataSource(file_id=file.id, filename=file.filename, storage_key=file.storage_key, sha256=file.sha256)


def selection_of(spec: JobSpec) -> Selection:
    return Selection(spec.scope, spec.graft.include, spec.graft.exclude)


def require_something_to_learn(spec: JobSpec, plan: GraftPlan) -> None:
    """LoRA moves the weights of linears alone, so a graft of none of them would train in vain."""
    if spec.tuning.type == "lora" and not any(name.endswith("weight") and is_linear(name) for name in plan.grafted):
        raise InvalidInput(
            f"LoRA changes the weights of linears alone, and the patterns leave none of them to graft: include "
            f"{list(spec.graft.include)}, exclude {list(spec.graft.exclude)}. Widen them, or use full tuning.",
            param="shadow.graft.include",
        )


def held_out_count(rows: int, ratio: float) -> int:
    """Rows held out of a file: their share, and one at least where there are enough."""
    count = int(rows * ratio)
    return max(count, 1) if ratio > 0 and rows >= ROWS_WORTH_SPLITTING else count
