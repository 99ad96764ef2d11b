"""JobSpec: a job with nothing left to decide.

Admission makes it once from what the client sent; the job's row keeps it; the steps read it from `job.json`. It holds
no secret and no database id that a step would have to look up.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Strategy = Literal["shadow", "direct"]
TuningType = Literal["lora", "full"]
Scope = Literal["linear", "all"]
OutputDtype = Literal["auto", "bfloat16", "float32"]
JobKind = Literal["fine_tune", "graft"]
DeltaKind = Literal["adapter", "delta"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSource(_Frozen):
    """Where one model comes from: a folder of this machine, or a Hub repository pinned to a commit."""

    kind: Literal["local", "hub"]
    #: An absolute folder (local), or `owner/name` (hub).
    location: str
    #: The commit hash (hub), or None (local).
    revision: str | None = None


class PairSource(_Frozen):
    name: str
    base: ModelSource
    instruct: ModelSource


class DataSource(_Frozen):
    file_id: str
    filename: str
    storage_key: str
    sha256: str


class Tuning(_Frozen):
    type: TuningType
    n_epochs: int
    #: Rows per optimizer step.
    batch_size: int
    learning_rate: float
    lr_scheduler: Literal["cosine", "linear", "constant"]
    #: Share of all steps over which the rate rises from zero.
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    #: Tokens; longer rows are cut at the end.
    max_length: int
    #: `bfloat16` means autocast over float32 trainable weights; `auto` is bfloat16 on a GPU and float32 on a CPU.
    precision: Literal["auto", "float32", "bfloat16"]
    #: LoRA only; zero for full tuning.
    rank: int
    alpha: int
    dropout: float


class Graft(_Frozen):
    scale: float
    scope: Scope
    #: Shell patterns on Instruct's tensor names; none means all of the scope, and `exclude` wins.
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    #: `auto` is Instruct's own.
    output_dtype: OutputDtype = "auto"


class Publish(_Frozen):
    #: Full tuning only: the learned change as artifacts of its own. LoRA's adapter is its change and always published.
    delta: bool = False


class DeltaFile(_Frozen):
    #: Relative to the delta's folder.
    path: str
    storage_key: str
    sha256: str
    bytes: int


class DeltaSource(_Frozen):
    """What an earlier job learned, as it was published: a PEFT adapter, or a saved delta."""

    kind: DeltaKind
    job_id: str
    files: tuple[DeltaFile, ...]


class Evaluation(_Frozen):
    #: Scales to graft and measure besides the one that is published.
    scales: tuple[float, ...]
    #: `auto`: only where every reference answer is short enough to be generated cheaply.
    exact_match: Literal["auto", "on", "off"]
    max_rows: int
    max_new_tokens: int
    #: Named sets of rows that show what must survive the tuning.
    probes: dict[str, DataSource]
    #: Why nothing is compared, as the end of a sentence (a graft only). None: the models are compared.
    left_out: str | None = None


class JobSpec(_Frozen):
    """A graft's data, seed and tuning are those of the job whose change it grafts: so it is measured on rows which that
    one held out. Its pair is the base of that job and the instruct model of its own."""

    version: Literal[1] = 1
    job_id: str
    kind: JobKind
    strategy: Strategy
    pair: PairSource
    training: DataSource
    #: None: a share of the training rows is held out.
    validation: DataSource | None
    #: Share of the training rows that is held out when `validation` is None.
    holdout_ratio: Annotated[float, Field(ge=0, lt=1)]
    seed: int
    tuning: Tuning
    graft: Graft
    evaluation: Evaluation
    publish: Publish = Publish()
    #: What a graft grafts; None for a job that learns it.
    delta: DeltaSource | None = None
    fine_tuned_model: str
    #: Of a training's models that are folders of this machine, what they held when `job.json` was written: a path may
    #: hold another model tomorrow. The job's row keeps none.
    snapshots: tuple[str, ...] = ()

    @property
    def scope(self) -> Scope:
        """Direct tuning keeps everything that it learned."""
        return "all" if self.strategy == "direct" else self.graft.scope

    @property
    def tunes_base(self) -> bool:
        return self.kind == "fine_tune" and self.strategy == "shadow"

    @property
    def saves_delta(self) -> bool:
        return self.kind == "fine_tune" and self.tuning.type == "full" and self.publish.delta

    @property
    def scales(self) -> tuple[float, ...]:
        """Every scale to graft, the published one first, none twice (as it is written: six digits)."""
        if self.strategy == "direct":
            return (1.0,)
        if self.evaluation.left_out is not None:  # nobody would look at the others
            return (self.graft.scale,)
        by_name: dict[str, float] = {}
        for scale in (self.graft.scale, *self.evaluation.scales):
            by_name.setdefault(f"{scale:g}", scale)
        return tuple(by_name.values())

    @property
    def start(self) -> ModelSource:
        """The model that is tuned: base for Shadow-FT, instruct for direct tuning."""
        return self.pair.base if self.strategy == "shadow" else self.pair.instruct

    @property
    def training_sha256(self) -> str:
        """One hash of all that the training's numbers depend on: where it agrees, one job may go on from a state that
        another one saved. What is grafted and compared afterwards, and what things are called, is not among it."""
        data = (self.training, self.validation)
        parts = {
            "strategy": self.strategy,
            "models": [source.model_dump(mode="json") for source in (self.pair.base, self.pair.instruct)],
            "snapshots": self.snapshots,
            "data": [source.sha256 if source else None for source in data],
            "holdout_ratio": self.holdout_ratio,
            "seed": self.seed,
            "tuning": self.tuning.model_dump(mode="json"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
