"""The verdict on a pair: what is wrong or remarkable about it, before any GPU time.

This is its first stage, from configs and safetensors headers alone, so that the API can give it; the second one reads
tokenizers and weights, in a child of the light worker (worker/steps/inspect.py). What would make a training worthless
or impossible refuses the pair; what may disappoint warns; the rest is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core.checkpoints import (
    CONFIG_FILE,
    Checkpoint,
    TensorInfo,
    read_checkpoint,
    read_hub_checkpoint,
    read_hub_side_file,
    read_side_file,
)
from core.errors import InvalidInput, told
from core.graft_plan import ARCHITECTURE, Reason, Selection, embedding, head, judge, language_layers
from core.job_spec import ModelSource
from core.own_files import TOKENIZER_CONFIG_FILE, require_own_files, require_own_files_of_hub

Level = Literal["note", "warn", "refuse"]
Outcome = Literal["ok", "warn", "refuse"]
Role = Literal["base", "instruct"]
#: `headers`: from configs and headers; `files`: from tokenizers and weights.
Stage = Literal["headers", "files"]

_ROLES: tuple[Role, ...] = ("base", "instruct")

GENERATION_CONFIG_FILE = "generation_config.json"

#: What to do about a reason of the graft plan, where its own words do not say so already.
_OTHER_MODEL = "Name the base model that this instruct model was made from."
_REMEDIES = {
    "other_architecture": _OTHER_MODEL,
    "other_vocabulary": _OTHER_MODEL,
    "other_shapes": _OTHER_MODEL,
    "missing_tensors": _OTHER_MODEL,
    "foreign_dtype": "Take models stored as float32, float16 or bfloat16.",
    "nothing_to_graft": "Widen the scope or the patterns.",
    "unknown_pattern": "Correct the pattern.",
}

#: By what names configs give the columns of the embedding; by the first three where it is narrower than the layers.
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "input_embedding_size", "hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
#: Rows that a family's embedding has behind those of the vocabulary: for image marks, or for the start.
_ROWS_BEHIND = {"mllama_text_model": 8, "moshi": 1}

#: By what names configs give the longest text that a model reads.
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Finding:
    """One thing that a check found."""

    level: Level
    #: Stable: programs may test for it.
    code: str
    #: A sentence that names the values found.
    message: str
    #: What to do about it; empty where there is nothing to do.
    remedy: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", told(self.message))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ModelHead:
    """What can be read of a model without its weights."""

    checkpoint: Checkpoint
    generation_config: dict[str, Any] | None
    tokenizer_config: dict[str, Any] | None


@dataclass(frozen=True)
class FirstStage:
    """The first stage on a pair, whose models are settled as far as they can be used."""

    base: ModelSource
    instruct: ModelSource
    #: By role, as far as they could be read.
    heads: Mapping[Role, ModelHead]
    findings: tuple[Finding, ...]


def verdict_of(findings: Iterable[Finding]) -> Outcome:
    levels = {finding.level for finding in findings}
    if "refuse" in levels:
        return "refuse"
    return "warn" if "warn" in levels else "ok"


def staged(stage: Stage, findings: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Findings as they are kept and shown."""
    return [{"stage": stage, **finding} for finding in findings]


def read_head(source: ModelSource, cache: Path) -> ModelHead:
    """Read a local folder, or a Hub model at a pinned commit. Raises as `core.checkpoints` does, and InvalidInput for a
    model whose loading would reach beyond its own files."""
    if source.kind == "local":
        folder = Path(source.location)
        checkpoint = read_checkpoint(folder)
        require_own_files(folder)
        return ModelHead(
            checkpoint=checkpoint,
            generation_config=read_side_file(folder, GENERATION_CONFIG_FILE),
            tokenizer_config=read_side_file(folder, TOKENIZER_CONFIG_FILE),
        )
    commit = str(source.revision)
    checkpoint = read_hub_checkpoint(source.location, commit, cache_dir=cache)
    require_own_files_of_hub(source.location, commit, cache_dir=cache)
    return ModelHead(
        checkpoint=checkpoint,
        generation_config=read_hub_side_file(source.location, commit, GENERATION_CONFIG_FILE, cache_dir=cache),
        tokenizer_config=read_hub_side_file(source.location, commit, TOKENIZER_CONFIG_FILE, cache_dir=cache),
    )


def examine(
    base: ModelSource,
    instruct: ModelSource,
    *,
    settle: Callable[[ModelSource], ModelSource],
    cache: Path,
    selection: Selection = Selection(),
    without_base: bool = False,
) -> FirstStage:
    """Settle, read and compare the two. `settle` pins a revision, and refuses a folder that may not be read;
    `without_base`: instruct is tuned itself, so that nothing of base matters.

    A model that cannot be used is a finding. Unavailable: the Hub or the disk may answer later.
    """
    wanted: dict[Role, ModelSource] = {"base": base, "instruct": instruct}
    heads: dict[Role, ModelHead] = {}
    findings: list[Finding] = []
    for role in _ROLES:
        try:
            wanted[role] = settle(wanted[role])
            if role == "instruct" or not without_base:
                heads[role] = read_head(wanted[role], cache)
        except InvalidInput as error:
            findings.append(unusable(role, error))
    if heads.keys() == {"base", "instruct"}:
        findings += compare_heads(heads["base"], heads["instruct"], selection=selection)
    elif without_base and "instruct" in heads:
        findings += check_head(heads["instruct"], selection=selection)
    return FirstStage(wanted["base"], wanted["instruct"], heads, tuple(findings))


def unusable(role: Role, error: InvalidInput) -> Finding:
    return Finding("refuse", error.code, f"The {role} model cannot be used: {error.message.rstrip('.')}.", error.hint)


def compare_heads(base: ModelHead, instruct: ModelHead, *, selection: Selection = Selection()) -> list[Finding]:
    """Every finding on the two together; nothing is raised. `selection` is what a graft is to take of instruct."""
    if base.checkpoint.location == instruct.checkpoint.location:
        return [
            Finding(
                "refuse",
                "same_model",
                f"Base and instruct are the same model ({base.checkpoint.location}), so there is nothing to graft from "
                "one onto the other.",
                "Name the base model that instruct was made from, or use the strategy 'direct', which tunes the "
                "instruct model itself.",
            )
        ]
    return [
        *_plan_findings(base.checkpoint, instruct.checkpoint, selection),
        *_own_code(base, "base"),
        *_own_code(instruct, "instruct"),
        *_contradictions(base.checkpoint, "base"),
        *_contradictions(instruct.checkpoint, "instruct"),
        *_rope(base.checkpoint, instruct.checkpoint),
        *_lengths(base.checkpoint, instruct.checkpoint),
        *_generation(instruct),
        *_other_ends(base, instruct),
    ]


def check_head(instruct: ModelHead, *, selection: Selection = Selection()) -> list[Finding]:
    """Every finding on an instruct model that is tuned itself."""
    plan = _plan_findings(instruct.checkpoint, instruct.checkpoint, selection)
    # Whatever is said of the two sides is said twice here.
    once = {finding.code: finding for finding in reversed(plan)}
    return [
        *reversed(once.values()),
        *_own_code(instruct, "instruct"),
        *_contradictions(instruct.checkpoint, "instruct"),
        *_generation(instruct),
    ]


def _plan_findings(base: Checkpoint, instruct: Checkpoint, selection: Selection) -> list[Finding]:
    reasons, remarks = judge(instruct, base, selection)
    return [
        *(_finding("refuse", reason, _REMEDIES.get(reason.code, "")) for reason in reasons),
        *(_finding("note", remark) for remark in remarks),
    ]


def _finding(level: Level, reason: Reason, remedy: str = "") -> Finding:
    return Finding(level, reason.code, f"{reason.words[0].upper()}{reason.words[1:]}.", remedy)


def _own_code(head: ModelHead, role: Role) -> list[Finding]:
    """Configs with code of their own and .py files are refused when the head is read; here it is the tokenizer's."""
    if not (head.tokenizer_config or {}).get("auto_map"):
        return []
    return [
        Finding(
            "refuse",
            "remote_code_refused",
            f"The {role} model's {TOKENIZER_CONFIG_FILE} has an auto_map: its tokenizer needs code of its own.",
            "Only tokenizers that transformers itself knows can be used.",
        )
    ]


# --- config and weights -----------------------------------------------------------------------------------------------


class _Claim(NamedTuple):
    """What the config says of the weights, and what they are."""

    key: str
    stated: Any
    found: str


def _contradictions(checkpoint: Checkpoint, role: Role) -> list[Finding]:
    """transformers makes a model as the config says and fills it with the weights: what is too much stays random, and
    what does not fit, or is beyond all memory, ends the training."""
    return [
        Finding(
            "refuse",
            "config_contradicts_weights",
            f"The {role} model's {CONFIG_FILE} says {claim.key} {_shown(claim.stated)[:80]}, and {claim.found}.",
            "Take config and weights from the same release, whole.",
        )
        for claim in [*_false_claims(checkpoint), *_impossible_claims(checkpoint)]
    ]


def _false_claims(checkpoint: Checkpoint) -> Iterator[_Claim]:
    config = checkpoint.text_config
    layers = language_layers(checkpoint)
    extra = config.get("num_nextn_predict_layers")  # stored behind the others, and used by other programs alone
    for key, stated in _first_stated(config, _LAYERS):
        if layers and stated not in (layers, layers - extra if isinstance(extra, int) else layers):
            yield _Claim(key, stated, f"its weights have {layers} layers")
    tables = [checkpoint.tensors[name] for name in (embedding(checkpoint), head(checkpoint)) if name is not None]
    for table in tables:
        if len(table.shape) != 2:
            yield _Claim("vocab_size", config.get("vocab_size"), f"{_shape(table)}, so it is no table of rows")
            continue
        for key, stated in _first_stated(config, _WIDTHS):
            if stated != table.shape[1]:
                yield _Claim(key, stated, _shape(table))
        for key, stated in _first_stated(config, ("vocab_size",)):
            if table.shape[0] not in (stated, _rows_at_most(stated, config)):
                yield _Claim(key, stated, _shape(table))


def _impossible_claims(checkpoint: Checkpoint) -> Iterator[_Claim]:
    """Numbers of the model's shape that all of its weights together do not reach."""
    compared = {key for key, _, _ in _false_claims(checkpoint)}
    for key in ARCHITECTURE:
        stated = checkpoint.text_config.get(key)
        if isinstance(stated, int) and stated > checkpoint.parameter_count and key not in compared:
            yield _Claim(key, stated, f"its weights have {checkpoint.parameter_count} numbers in all")


def _first_stated(config: dict[str, Any], keys: Iterable[str]) -> list[tuple[str, Any]]:
    return [(key, config[key]) for key in keys if config.get(key) is not None][:1]


def _rows_at_most(stated: Any, config: dict[str, Any]) -> Any:
    return stated + _ROWS_BEHIND.get(str(config.get("model_type")), 0) if isinstance(stated, int) else stated


def _shape(table: TensorInfo) -> str:
    return f"{table.name} has the shape {list(table.shape)}"


# --- positions --------------------------------------------------------------------------------------------------------


def _rope(base: Checkpoint, instruct: Checkpoint) -> list[Finding]:
    """A change that base learned at one rotation of its positions is applied at another one."""
    left, right = rope_settings(base), rope_settings(instruct)
    # What one config does not state is its family's default, and that is not known here; scaling's default is none.
    stated = left.keys() & right.keys()
    compared = [name for name in sorted(left.keys() | right.keys()) if name in stated or not name.endswith("theta")]
    return [
        Finding(
            "warn",
            "other_rope",
            f"Positions are encoded otherwise: {name} is {_shown(left.get(name))} in base and "
            f"{_shown(right.get(name))} in instruct.",
            "Look at the evaluation before relying on the graft, above all for long texts.",
        )
        for name in compared
        if left.get(name) != right.get(name)
    ]


def rope_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The rotary embedding's settings, flat and by one set of names, whichever way the config spells them.

    Older configs have `rope_theta`, `rope_local_base_freq` and `rope_scaling`; newer ones `rope_parameters`, for each
    kind of layer where there are several.
    """
    config = checkpoint.text_config
    newer = config.get("rope_parameters")
    if not isinstance(newer, dict):
        older = {"rope_theta": config.get("rope_theta"), "local_rope_theta": config.get("rope_local_base_freq")}
        return _named({**older, **_scaling(config.get("rope_scaling"))})
    kinds = {kind: part for kind, part in newer.items() if isinstance(part, dict)}
    whole = kinds.get("full_attention", {} if kinds else newer)
    local = kinds.get("sliding_attention", {}).get("rope_theta")
    return _named({"rope_theta": whole.get("rope_theta"), "local_rope_theta": local, **_scaling(whole)})


def _scaling(settings: Any) -> dict[str, Any]:
    """Of a `rope_scaling`, or of newer settings, which hold the angle's base beside it."""
    if not isinstance(settings, dict):
        return {}
    kind = settings.get("rope_type", settings.get("type"))
    if kind in (None, "default"):
        return {}
    named = {f"rope_scaling.{name}": value for name, value in settings.items() if name not in _NOT_SCALING}
    return {"rope_scaling.type": kind, **named}


_NOT_SCALING = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _lengths(base: Checkpoint, instruct: Checkpoint) -> list[Finding]:
    """Worth no warning while the positions turn alike: many families state a longer context for instruct alone."""
    left, right = _length(base), _length(instruct)
    if left is None or right is None or left == right:
        return []
    return [
        Finding(
            "warn" if _rope(base, instruct) else "note",
            "other_context_length",
            f"The context length is {left} tokens in base and {right} in instruct.",
            f"Keep max_length within {min(left, right)}.",
        )
    ]


def _length(checkpoint: Checkpoint) -> int | None:
    stated = (checkpoint.text_config.get(key) for key in _LENGTHS)
    return next((length for length in stated if isinstance(length, int)), None)


# --- where texts end --------------------------------------------------------------------------------------------------


def _generation(instruct: ModelHead) -> list[Finding]:
    found = []
    if instruct.generation_config is None:
        found.append(
            Finding(
                "note",
                "no_generation_config",
                f"The instruct model has no {GENERATION_CONFIG_FILE}; the end of a text is read from its config alone.",
            )
        )
    if not _ends_of(instruct):
        found.append(
            Finding(
                "warn",
                "no_end_of_text",
                "Neither the config nor the generation config of the instruct model names an eos_token_id, so nothing "
                "stops its answers.",
                f"Add the eos_token_id to the model's {GENERATION_CONFIG_FILE}.",
            )
        )
    return found


def _other_ends(base: ModelHead, instruct: ModelHead) -> list[Finding]:
    left, right = _ends_of(base), _ends_of(instruct)
    if left == right:
        return []
    return [
        Finding(
            "note",
            "other_end_ids",
            f"Texts end with the ids {_shown(left)} in base and {_shown(right)} in instruct; the result keeps "
            "instruct's.",
        )
    ]


def _ends_of(head: ModelHead) -> list[int]:
    return end_ids(head.generation_config, head.checkpoint.config)


def end_ids(generation_config: dict[str, Any] | None, config: dict[str, Any]) -> list[int]:
    """The ids that end a text: those of the generation config, else those of the config."""
    nested = config.get("text_config")
    for stating in (generation_config or {}, config, nested if isinstance(nested, dict) else {}):
        stated = stating.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [stated]
        if found := sorted({one for one in ids if isinstance(one, int)}):
            return found
    return []


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
