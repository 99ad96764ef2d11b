"""Which tensors of Instruct a PEFT adapter changes, and by what; from headers alone.

A LoRA adapter learned on Base adds `scaling * B @ A` to a weight, so that Base cancels out. Two kinds need Base: DoRA,
whose magnitudes are absolute for it, and whole saved modules, whose change is the difference. Everything else that PEFT
knows (0.21 at the time of writing) is refused by name: a test enumerates its adapter types and options.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import sqrt
from typing import Any

from core.checkpoints import AdapterHeader, Checkpoint, TensorInfo
from core.errors import PairRefused
from core.graft_plan import (
    GRAFTABLE,
    Lineage,
    Selection,
    alike_but_rows,
    canonical_name,
    canonical_names,
    embedding,
    head,
    in_words,
    is_head,
    is_language,
    is_linear,
    is_tied,
    is_vocabulary,
    listed,
    module_name,
    pattern_reasons,
    quantisation_reasons,
    same_vocabulary,
    vocabulary_remark,
)

_MERGE = "merge it into base with PEFT's merge_and_unload() and graft the merged model as a tuned base"
_PROMPT = "it learns prompts and changes no weight"
_PRODUCT = f"its change depends on base's own weights; {_MERGE}"
_SHARED = f"its change is made of vectors and matrices that all layers share; {_MERGE}"
_OTHER_SUM = f"its change is no product of two factors; {_MERGE}"
_RUNTIME = "it acts while the model runs and cannot be merged into weights"

#: Every type of PEFT but LORA, and why its change is not planned here.
REFUSED_TYPES = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"), _PROMPT),
    **dict.fromkeys(("CARTRIDGE", "ADAPTION_PROMPT"), _PROMPT),
    **dict.fromkeys(("IA3", "OFT", "BOFT", "HRA", "ROAD", "HIRA", "GLORA", "PSOFT", "OSF", "DEFT"), _PRODUCT),
    **dict.fromkeys(("ADAMSS", "DELORA", "FROD", "TINYLORA"), _PRODUCT),
    **dict.fromkeys(("VERA", "PVERA", "RANDLORA", "VBLORA", "UNILORA"), _SHARED),
    **dict.fromkeys(("ADALORA", "LOHA", "LOKR", "FOURIERFT", "C3A", "WAVEFT", "GRALORA", "MISS", "BONE"), _OTHER_SUM),
    **dict.fromkeys(("SHIRA", "SUPERTUNING", "LN_TUNING", "BEFT", "TRAINABLE_TOKENS"), _OTHER_SUM),
    **dict.fromkeys(("XLORA", "POLY", "LILY", "SHADOW"), _RUNTIME),
    "PEANUT": f"its change is a small network's answer to base's own weights; {_MERGE}",
}

#: Options of a LoRA adapter that this plan reads.
HANDLED_OPTIONS = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
        *("use_dora", "modules_to_save", "bias", "init_lora_weights", "ensure_weight_tying"),
        *("target_modules", "exclude_modules"),
    }
)
#: Options that leave the saved factors' meaning as it is.
HARMLESS_OPTIONS = frozenset(
    {
        # Where the adapter comes from.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        # In which layers modules were trained: the saved tensors say it themselves.
        *("layers_to_transform", "layers_pattern"),
        # PEFT itself goes by the module's class and overwrites this one with that of the last module it met.
        "fan_in_fan_out",
        # Training only. MonteCLoRA's noise and VeLoRA's backward pass leave `B @ A` as what acts and what is merged.
        *("lora_dropout", "runtime_config", "merge_weights", "velora_config", "monteclora_config"),
        # Settings of an initialisation, which `init_lora_weights` names; converted adapters keep them.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        # Without effect but for another option, which is refused.
        *("qalora_group_size", "megatron_core"),
    }
)
#: Options with which the change is not `B @ A` alone.
REFUSED_OPTIONS = {
    "lora_bias": f"its factors have biases, which change the biases of the model; {_MERGE}",
    "trainable_token_indices": f"it replaces single token embeddings; {_MERGE}",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": f"it changes parameters, such as fused experts, and not modules; {_MERGE}",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens",
    "use_qalora": "QALoRA pools its inputs by groups",
    "use_bdlora": f"BD-LoRA stores only the blocks of its block-diagonal factors; {_MERGE}",
    "arrow_config": "Arrow chooses among adapters while the model runs",
    "kasa_config": "KaSA cuts the base model's weights, which are not in the adapter",
    "megatron_config": "Megatron saves the factors of its parallel layers in shards",
}
#: Initialisations that leave base's weights as they are: whatever the factors began with, their product is the change.
PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})
_CONVERTIBLE_INITS = ("pissa", "olora", "corda", "lora_ga")
_CONVERT = (
    "save it again with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), which names the adapter "
    "as it was before training and makes a plain LoRA of twice the rank"
)
#: Modules that are linears stored as (in, out) in the families that have transformers' `Conv1D`.
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
#: What decides which expert works, and how much the shared ones do, has one of these in its path.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
#: In a model's names only its layers and their experts are numbered.
_NUMBERED = re.compile(r"\.\d+\.")

#: Far beyond any in use; what is larger is a slip, and could be no number of float32.
MAX_ALPHA = 1e6

_PREFIX = "base_model.model."
#: `default` is the adapter's name, which PEFT leaves out when it saves and tolerates when it loads.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(?P<weight>\.weight)?")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.default)?(\.weight)?")
#: Copies of base's own tensors that PEFT saves beside a changed embedding, and aids of training.
_ASIDE = re.compile(r".+\.(base_layer\.\w+|original_module\..+|lora_velora_embed.*|lora_monteclora_sampler\..+)")
_BASE_COPY = re.compile(r"(?P<module>.+)\.base_layer\.(?P<kind>\w+)")
_BIAS = re.compile(r"(?P<module>.+?)(\.base_layer)?\.bias")
_WRAPPED = re.compile(r"\.modules_to_save(\.default)?(?=\.)")


@dataclass(frozen=True)
class LowRank:
    """The change of one weight by two factors: `scaling * B @ A`, of shape (out, in).

    A weight stored as (in, out), which are Conv1D's and embeddings, changes by the transpose, `scaling * A.T @ B.T`.
    DoRA: base's weight plus that, each row (or column) scaled to the length that `magnitude` gives, minus base's
    weight. Lengths are taken along `out`'s vectors of length `in`, over the whole of base's weight.
    """

    #: (r, in)
    a: TensorInfo
    #: (out, r)
    b: TensorInfo
    scaling: float
    transposed: bool
    #: (out,); None is plain LoRA.
    magnitude: TensorInfo | None
    #: The axis of the stored weight along which the magnitude has its entries: 0 is one per row, 1 one per column.
    magnitude_axis: int
    #: Base's own weight, where base was given; always for DoRA.
    base: TensorInfo | None


@dataclass(frozen=True)
class Replacement:
    """The change of a tensor that was saved whole: `tensor - base`."""

    tensor: TensorInfo
    base: TensorInfo


@dataclass(frozen=True)
class AdapterPlan:
    """One fate for each tensor of Instruct, by Instruct's names."""

    selection: Selection
    grafted: dict[str, LowRank | Replacement]
    #: What the adapter changes and the selection leaves out.
    discarded: dict[str, LowRank | Replacement]
    #: Everything that is not grafted, `discarded` among it.
    copied: tuple[str, ...]
    #: Embeddings and heads, grafted or discarded, whose row counts differ: the leading rows that all have.
    common_rows: dict[str, int]
    #: Of grafted tensors that PEFT said to have tied: the change under the other name. Headers cannot tell whether it
    #: is the same one, which it must be.
    twins: dict[str, LowRank | Replacement]
    #: Differences that do no harm, and what the selection leaves out, in words.
    remarks: tuple[str, ...]


def plan_adapter(
    instruct: Checkpoint, adapter: AdapterHeader, base: Checkpoint | None, *, selection: Selection = Selection()
) -> AdapterPlan:
    """Find the tensors of `instruct` that the adapter changes, and by what. `base` is what the adapter was trained on.

    PairRefused: the change is not one of those that can be planned, or it does not fit, or the selection leaves
    nothing of it; it holds every reason.
    """
    reasons = [*in_words(pattern_reasons(selection, instruct, "instruct")), *option_reasons(adapter.config)]
    lineage = None if base is None else Lineage(instruct, base, ("instruct", "base"))
    reasons += in_words(quantisation_reasons(instruct, "instruct") if lineage is None else lineage.reasons())
    if adapter.config.get("peft_type") != "LORA" or _unreadable_reasons(adapter.config):
        raise PairRefused(reasons)  # its tensors cannot be read
    parts = _parts_of(adapter)
    planner = _Planner(instruct, adapter.config, lineage, selection)
    for module, factors in parts.factors.items():
        planner.add_factors(module, factors)
    for name, info in parts.whole.items():
        planner.add_whole(name, info)
    reasons += [*parts.reasons(), *_untargeted_reasons(adapter.config, parts.factors), *planner.reasons()]
    if not parts.factors and not parts.whole:
        reasons.append("the adapter holds no LoRA factors")
    grafted = {name: one for name, one in planner.changes.items() if planner.takes(name)}
    if not grafted and not reasons:
        reasons.append(f"nothing that the adapter changes is in {selection}")
    if reasons:
        raise PairRefused(reasons)
    return AdapterPlan(
        selection=selection,
        grafted=grafted,
        discarded={name: one for name, one in planner.changes.items() if name not in grafted},
        copied=tuple(name for name in instruct.tensors if name not in grafted),
        common_rows=planner.common_rows,
        twins={name: one for name, one in planner.twins.items() if name in grafted},
        remarks=tuple(planner.remarks(grafted)),
    )


# --- the adapter's config ---------------------------------------------------------------------------------------------


def option_reasons(config: Mapping[str, Any]) -> list[str]:
    """Why an adapter of this config is no plain LoRA, DoRA or saved module; one reason for each option."""
    kind = config.get("peft_type")
    if kind != "LORA":
        why = REFUSED_TYPES.get(str(kind), "this version does not know it")
        return [f"the adapter is of the type {kind}: {why}"]
    reasons = [f"the adapter sets {key}: {why}" for key, why in REFUSED_OPTIONS.items() if config.get(key)]
    known = HANDLED_OPTIONS | HARMLESS_OPTIONS | REFUSED_OPTIONS.keys()
    reasons += [
        f"the adapter sets {key} to {repr(value)[:80]}, an option that this version does not know"
        for key, value in config.items()
        if value and key not in known
    ]
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        reasons.append(f"the adapter's config has the bias {bias!r}, which is not none, all or lora_only")
    return [*reasons, *_init_reasons(config), *_unreadable_reasons(config)]


def _init_reasons(config: Mapping[str, Any]) -> list[str]:
    init = config.get("init_lora_weights", True)
    word = str(init).lower()
    if word in PLAIN_INITS:
        return []
    if word.startswith(_CONVERTIBLE_INITS):
        return [f"the adapter was initialised by {init!r}, which changes the base model's weights; {_CONVERT}"]
    if word == "loftq":
        return ["the adapter was initialised by 'loftq' and makes up for what it quantised in the base model"]
    return [f"the adapter was initialised by {init!r}, which this version does not know"]


def _unreadable_reasons(config: Mapping[str, Any]) -> list[str]:
    return [*_number_reasons(config), *_target_reasons(config)]


def _number_reasons(config: Mapping[str, Any]) -> list[str]:
    """Ranks and alphas, and the patterns that they are given for."""
    reasons = []
    for key, patterns_key, kind in (("r", "rank_pattern", "rank"), ("lora_alpha", "alpha_pattern", "alpha")):
        patterns = config.get(patterns_key) or {}
        if not isinstance(patterns, dict):
            reasons.append(f"the adapter's {patterns_key} is {repr(patterns)[:80]}, not a mapping")
            continue
        fits = _is_rank if kind == "rank" else _is_alpha
        values = {"the adapter": config.get(key)} | {
            f"the modules {repr(pattern)[:80]}": one for pattern, one in patterns.items()
        }
        reasons += [f"the config gives {who} the {kind} {one!r}" for who, one in values.items() if not fits(one)]
        reasons += [_no_pattern(patterns_key, pattern) for pattern in patterns if not _is_pattern(pattern)]
    return reasons


def _target_reasons(config: Mapping[str, Any]) -> list[str]:
    """Modules are named by a regular expression or by the ends of their paths."""
    reasons = []
    for key in ("target_modules", "exclude_modules"):
        named = config.get(key)
        if isinstance(named, str) and not _is_pattern(named):
            reasons.append(_no_pattern(key, named))
        elif named and not isinstance(named, str | list):
            reasons.append(f"the adapter's {key} is {repr(named)[:80]}, neither names nor a regular expression")
    return reasons


def _no_pattern(key: str, pattern: str) -> str:
    return f"the adapter's {key} holds {repr(pattern)[:80]}, which is no regular expression"


def _untargeted_reasons(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    untargeted = [module for module in modules if not _is_targeted(config, module)]
    if not untargeted or config.get("target_parameters"):  # which have factors too
        return []
    finding = f"{len(untargeted)} modules with factors are not among the adapter's target_modules"
    return [f"{finding}, so that PEFT would not load them: {listed(untargeted)}"]


def _is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives the module factors. With `ensure_weight_tying` it adds the other end of the tied two."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _names(excluded, module):
        return False
    if config.get("ensure_weight_tying") and is_vocabulary(f"{module}.weight"):
        return True
    return not targets or targets == "all-linear" or _names(targets, module)


def _names(named: str | list[Any], module: str) -> bool:
    if isinstance(named, str):
        return re.fullmatch(named, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in named)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_ALPHA  # which neither NaN nor infinity is


def _is_pattern(pattern: str) -> bool:
    try:
        _module_pattern(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _module_pattern(pattern: str) -> re.Pattern[str]:
    """PEFT's rule: the pattern matches the end of the module's path, from a dot or from the beginning."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _matching(patterns: dict[str, Any] | None, module: str) -> dict[str, Any]:
    """The patterns that match, in the file's order, with their values. In training the first of them acted; but that
    was in the order of the code, and PEFT writes them in that of the alphabet."""
    return {pattern: one for pattern, one in (patterns or {}).items() if _module_pattern(pattern).match(module)}


# --- the adapter's tensors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Factors:
    """What an adapter holds for one module."""

    a: TensorInfo | None = None
    b: TensorInfo | None = None
    magnitude: TensorInfo | None = None
    #: Of an `nn.Embedding`, whose weight is stored as (in, out).
    is_embedding: bool = False


@dataclass
class _Parts:
    factors: dict[str, _Factors] = field(default_factory=lambda: defaultdict(_Factors))
    #: Tensors that were saved whole, by their names in the model.
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    #: Weights of base beside a linear's factors.
    copies: list[str] = field(default_factory=list)
    #: The names in the file by what they name.
    _keys: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add_factor(self, key: str, module: str, side: str, info: TensorInfo, *, is_embedding: bool) -> None:
        self._keys[f"{module} {side}"].append(key)
        found = {"A": {"a": info}, "B": {"b": info}}[side]
        self.factors[module] = replace(self.factors[module], **found, is_embedding=is_embedding)

    def add_magnitude(self, key: str, module: str, info: TensorInfo) -> None:
        self._keys[f"{module} magnitude"].append(key)
        self.factors[module] = replace(self.factors[module], magnitude=info)

    def add_whole(self, key: str, name: str, info: TensorInfo) -> None:
        self._keys[name].append(key)
        self.whole[name] = info

    def reasons(self) -> list[str]:
        reasons = [
            f"the adapter holds one tensor under two names: {' and '.join(keys)}"
            for keys in self._keys.values()
            if len(keys) > 1
        ]
        if self.copies:
            reasons.append(
                f"the adapter holds weights of base beside its factors: {listed(self.copies)}; PEFT writes none and "
                "would load them in the place of the model's: save the adapter again with save_pretrained()"
            )
        if self.unknown:
            names = listed(self.unknown)
            reasons.append(f"the adapter holds tensors that are neither LoRA factors nor whole modules: {names}")
        return reasons


def _parts_of(adapter: AdapterHeader) -> _Parts:
    """Sort the adapter's tensors by the names that PEFT gives them and accepts."""
    trains_biases = adapter.config.get("bias", "none") != "none"
    parts = _Parts()
    for key, info in adapter.tensors.items():
        name = key.removeprefix(_PREFIX)
        factor, magnitude = _FACTOR.fullmatch(name), _MAGNITUDE.fullmatch(name)
        bias, copy = _BIAS.fullmatch(name), _BASE_COPY.fullmatch(name)
        if name == key:
            parts.unknown.append(key)
        elif factor is not None and bool(factor["kind"]) != bool(factor["weight"]):
            parts.add_factor(key, factor["module"], factor["side"], info, is_embedding=bool(factor["kind"]))
        elif magnitude is not None:
            parts.add_magnitude(key, magnitude["module"], info)
        elif bias is not None and trains_biases and ".lora_" not in name:
            parts.add_whole(key, f"{bias['module']}.bias", info)
        elif copy is not None and is_linear(f"{copy['module']}.{copy['kind']}"):
            parts.copies.append(key)
        elif _ASIDE.fullmatch(name):
            continue
        elif ".lora_" in name or ".token_adapter." in name:
            parts.unknown.append(key)
        else:
            parts.add_whole(key, _WRAPPED.sub("", name), info)
    return parts


# --- the plan ---------------------------------------------------------------------------------------------------------


class _Planner:
    """Gathers the changes of Instruct's tensors, and the reasons against them."""

    def __init__(
        self, instruct: Checkpoint, config: Mapping[str, Any], lineage: Lineage | None, selection: Selection
    ) -> None:
        self.changes: dict[str, LowRank | Replacement] = {}
        self.twins: dict[str, LowRank | Replacement] = {}
        self.common_rows: dict[str, int] = {}
        self._instruct = instruct
        self._config = config
        self._lineage = lineage
        self._selection = selection
        self._names = canonical_names(instruct)
        #: Which module or tensor of the adapter changes which tensor.
        self._authors: dict[str, str] = {}
        #: What factors say is a linear.
        self._linears: set[str] = set()
        #: What is left out and cannot be measured, with the reason.
        self._unmeasured: dict[str, str] = {}
        self._refused: list[str] = []
        self._lacking: list[str] = []
        self._left_out: list[str] = []
        self._renamed: tuple[str, str] | None = None
        #: Instruct's rows and the adapter's, where they differ.
        self._row_counts: dict[str, tuple[int, int]] = {}

    def add_factors(self, module: str, factors: _Factors) -> None:
        for name in self._targets(f"{module}.weight"):
            self._linears.update([] if factors.is_embedding else [name])
            self._add(module, name, partial(self._low_rank, module, name, factors))

    def add_whole(self, tensor_name: str, info: TensorInfo) -> None:
        for name in self._targets(tensor_name):
            if self._counterpart(name) is None and not self.takes(name):
                self._unmeasured[name] = "which only base would tell (--base)"
                continue
            self._add(tensor_name, name, partial(self._replacement, tensor_name, name, info))

    def takes(self, name: str) -> bool:
        """The scope `linear` goes by names, since full tuning moves everything. Factors say themselves that they change
        a linear, whatever it is called."""
        info = self._instruct.tensors[name]
        if self._selection.takes(info):
            return True
        return name in self._linears and _is_of_a_layer(info) and replace(self._selection, scope="all").takes(info)

    def _targets(self, tensor_name: str) -> list[str]:
        """Every stored tensor of Instruct that the part changes: one, or both where a tied one is stored twice."""
        name = self._names.get(canonical_name(tensor_name))
        shared = self._shared_for(tensor_name)
        if shared and (name in shared or (name is None and is_head(tensor_name) != is_head(shared[0]))):
            return shared
        if name is None:
            # What a multimodal model sees with is called otherwise in the file, and the scope leaves it out anyhow.
            is_left_out = not is_language(tensor_name) and self._selection.scope == "linear"
            (self._left_out if is_left_out else self._lacking).append(tensor_name)
            return []
        if tensor_name != name and self._renamed is None:
            self._renamed = (tensor_name, name)
        return [name]

    def _shared_for(self, tensor_name: str) -> list[str]:
        """The stored names of the tensor that is embedding and head at once, if that is what is asked for."""
        if not is_vocabulary(tensor_name) or not tensor_name.endswith(".weight") or not is_tied(self._instruct):
            return []
        return [name for name in (embedding(self._instruct), head(self._instruct)) if name is not None]

    def _add(self, author: str, name: str, make: Callable[[], LowRank | Replacement]) -> None:
        earlier = self._authors.setdefault(name, author)
        try:
            if earlier != author:
                self._add_second(author, name, make)
            else:
                self.changes[name] = make()
        except PairRefused as refusal:
            self._refused += refusal.reasons

    def _add_second(self, author: str, name: str, make: Callable[[], LowRank | Replacement]) -> None:
        """Of a tied tensor PEFT may save one change under both names; two cannot act on one tensor."""
        first, is_shared = self.changes.get(name), bool(self._shared_for(name))
        if first is None:
            return  # refused
        second = make() if is_shared and self._is_kept_tied(first) else None
        if second is not None and _may_be_one(first, second):
            self.twins[name] = second
        elif is_shared and not self.takes(name):
            del self.changes[name]
            self._unmeasured[name] = "which the adapter changes twice"
        else:
            tied = ", which instruct ties to one tensor" if is_shared else ""
            raise PairRefused([f"the adapter changes {name} twice: by {self._authors[name]} and by {author}{tied}"])

    def _is_kept_tied(self, change: LowRank | Replacement) -> bool:
        """PEFT was told to tie the changes too, or has saved a resized vocabulary, of which it made no copies."""
        is_resized = isinstance(change, Replacement) and not self._config.get("modules_to_save")
        return is_resized or bool(self._config.get("ensure_weight_tying"))

    # --- two factors

    def _low_rank(self, module: str, name: str, factors: _Factors) -> LowRank:
        a, b = factors.a, factors.b
        if a is None or b is None:
            raise PairRefused([f"the adapter has only one factor of {module}"])
        _check_kind(module, factors)
        weight, magnitude = self._instruct.tensors[name], self._magnitude(module, factors, b)
        _check_dtypes(module, [a, b, weight, *([] if magnitude is None else [magnitude])])
        rank, alpha = self._rank(module, a), self._alpha(module)
        if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank):
            raise _misfit(module, a, b, rank, weight)
        transposed = factors.is_embedding or self._is_conv1d(name, (b.shape[0], a.shape[1]))
        stored = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if stored != weight.shape:
            if not is_vocabulary(name) or not alike_but_rows(stored, weight.shape):
                raise _misfit(module, a, b, rank, weight)
            self._share_rows(module, name, stored[0])
        return LowRank(
            a=a,
            b=b,
            scaling=alpha / (sqrt(rank) if self._config.get("use_rslora") else rank),
            transposed=transposed,
            magnitude=magnitude,
            magnitude_axis=int(transposed),
            base=self._base_of(module, name, rows=stored[0], over_rows=transposed and magnitude is not None),
        )

    def _rank(self, module: str, a: TensorInfo) -> int:
        """Where several patterns match, the factor's shape tells which one acted."""
        ranks: list[int] = [*_matching(self._config.get("rank_pattern"), module).values()] or [self._config["r"]]
        return next((rank for rank in ranks if a.shape[:1] == (rank,)), ranks[0])

    def _alpha(self, module: str) -> float:
        found = _matching(self._config.get("alpha_pattern"), module)
        if len(set(found.values())) > 1:
            raise _ambiguous(module, found)
        alpha: float = next(iter(found.values()), self._config["lora_alpha"])
        return alpha

    def _is_conv1d(self, name: str, delta: tuple[int, int]) -> bool:
        """PEFT goes by the class of the module, which its name and family tell, or the config where it knows of a
        Conv1D and shapes do not say otherwise; `delta` is (out, in)."""
        family = str(self._instruct.text_config.get("model_type")) in _CONV1D_FAMILIES
        if module_name(name) not in _CONV1D_MODULES or not (family or self._config.get("fan_in_fan_out")):
            return False
        return delta[0] == delta[1] or delta[::-1] == self._instruct.tensors[name].shape

    def _magnitude(self, module: str, factors: _Factors, b: TensorInfo) -> TensorInfo | None:
        magnitude, is_dora = factors.magnitude, bool(self._config.get("use_dora"))
        if is_dora != (magnitude is not None):
            finding = (
                "sets use_dora, but holds no magnitude" if is_dora else "does not set use_dora, but has a magnitude"
            )
            raise PairRefused([f"the adapter {finding} of {module}"])
        if magnitude is not None and magnitude.shape != b.shape[:1]:
            raise PairRefused([f"the magnitude of {module} is {list(magnitude.shape)}, and its B is {list(b.shape)}"])
        return magnitude

    def _base_of(self, module: str, name: str, *, rows: int, over_rows: bool) -> TensorInfo | None:
        """`over_rows`: DoRA's lengths run over the rows of the vocabulary, each of which must be there."""
        if self._config.get("use_dora"):
            self._require_base(name, "the adapter sets use_dora, and DoRA's magnitudes are absolute for base")
        base = self._counterpart(name)
        if base is not None and is_vocabulary(name):
            if over_rows and base.shape[0] != rows:
                raise PairRefused(
                    [f"other vocabulary: DoRA's {module} has {rows} rows, and base's has {base.shape[0]}"]
                )
            self._share_rows(module, name, min(rows, base.shape[0]))
        return base

    # --- whole tensors

    def _replacement(self, saved: str, name: str, info: TensorInfo) -> Replacement:
        weight = self._instruct.tensors[name]
        _check_dtypes(name, [info, weight])
        if info.shape != weight.shape and not (is_vocabulary(name) and alike_but_rows(info.shape, weight.shape)):
            shapes = f"{list(info.shape)}, and instruct has {list(weight.shape)}"
            raise PairRefused([f"the adapter saves {name} as {shapes}"])
        if is_vocabulary(name):
            self._share_rows(name, name, info.shape[0])
        base = self._require_base(
            name, f"the adapter saves {saved} whole, and the change of a whole tensor is a difference"
        )
        if is_vocabulary(name):
            self._share_rows(name, name, min(info.shape[0], base.shape[0]))
        change = Replacement(info, base)
        if self._shared_for(name) and not self._is_kept_tied(change) and self.takes(name):
            raise _untied(saved, name)
        return change

    # --- what both need

    def _counterpart(self, name: str) -> TensorInfo | None:
        if self._lineage is None or name not in self._lineage.shared:
            return None
        return self._lineage.right.tensors[self._lineage.shared[name]]

    def _require_base(self, name: str, why: str) -> TensorInfo:
        base = self._counterpart(name)
        if base is not None:
            return base
        if self._lineage is None:
            raise PairRefused([f"{why}: give the model that the adapter was trained on, with --base"])
        raise PairRefused([f"{why}: base lacks {name}"])

    def _share_rows(self, module: str, name: str, rows: int) -> None:
        own = self._instruct.tensors[name].shape[0]
        if not same_vocabulary(own, rows):
            raise PairRefused([f"other vocabulary: {module} has {own} rows in instruct and {rows} in the adapter"])
        if rows != own:
            self.common_rows[name] = min(own, rows)
            self._row_counts[name] = (own, rows)

    # --- words

    def reasons(self) -> list[str]:
        reasons = list(dict.fromkeys(self._refused))
        if self._lacking:
            count = len(self._lacking)
            reasons.append(f"{count} tensors that the adapter changes are missing in instruct: {listed(self._lacking)}")
        return reasons

    def remarks(self, grafted: Mapping[str, object]) -> list[str]:
        found = [] if self._lineage is None else in_words(self._lineage.remarks())
        if self._lineage is None and self._renamed is not None:
            theirs, ours = self._renamed
            found.append(f"the names differ by a prefix: {ours} in instruct and {theirs} in the adapter")
        for name, (own, rows) in self._row_counts.items():
            taken = self.common_rows[name] if name in grafted else 0
            found.append(vocabulary_remark(f"{own} in instruct and {rows} in the adapter", taken, "instruct").words)
        if any(self._shared_for(name) for name in grafted.keys() - self.twins.keys()):
            found.append(
                "instruct ties its head to its embedding: the graft changes both, the unmerged adapter only one of them"
            )
        left_out = [*(name for name in self.changes if name not in grafted), *self._unmeasured, *self._left_out]
        if left_out:
            found.append(f"{len(left_out)} changes of the adapter are not in {self._selection}: {listed(left_out)}")
        for why in dict.fromkeys(self._unmeasured.values()):
            names = [name for name, its in self._unmeasured.items() if its == why]
            found.append(f"the discarded share does not count {listed(names)}, {why}")
        return list(dict.fromkeys(found))


def _is_of_a_layer(info: TensorInfo) -> bool:
    """Whether it is a weight of the language model's layers, and no router."""
    if len(info.shape) != 2 or not is_language(info.name) or is_vocabulary(info.name):
        return False
    return _NUMBERED.search(info.name) is not None and not _ROUTERS.intersection(info.name.split("."))


def _may_be_one(first: LowRank | Replacement, second: LowRank | Replacement) -> bool:
    """As far as headers tell. DoRA's magnitudes belong to an embedding's columns and to a head's rows."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return first.scaling == second.scaling and first.magnitude is None
    return isinstance(first, Replacement) and isinstance(second, Replacement)


def _check_kind(module: str, factors: _Factors) -> None:
    """Factors that PEFT would not load, where the module's name tells its kind."""
    name = f"{module}.weight"
    finding = None
    if factors.is_embedding and (is_linear(name) or is_head(name)):
        finding = f"{module} is a linear, and has the factors of an embedding"
    elif not factors.is_embedding and is_vocabulary(name) and not is_head(name):
        finding = f"{module} is an embedding, and has the factors of a linear"
    if finding is not None:
        raise PairRefused([f"{finding}: PEFT would not load them"])


def _ambiguous(module: str, alphas: Mapping[str, float]) -> PairRefused:
    values = " and ".join(f"{alpha} by {pattern!r}" for pattern, alpha in alphas.items())
    why = "PEFT takes the first and writes them in another order, so that nothing tells which one acted in training"
    remedy = "leave in adapter_config.json the one that acted"
    return PairRefused([f"the adapter's alpha_pattern gives {module} {values}: {why}; {remedy}"])


def _untied(saved: str, name: str) -> PairRefused:
    finding = f"the adapter saves {saved} whole, and instruct ties its head to its embedding"
    why = "PEFT's merge is a model with two tensors in the place of one"
    remedy = (
        f"train with ensure_weight_tying, leave the tensor out with --exclude {name}, or save base and instruct with "
        "heads of their own and tie_word_embeddings false"
    )
    return PairRefused([f"{finding}: {why}; {remedy}"])


def _check_dtypes(what: str, infos: Iterable[TensorInfo]) -> None:
    foreign = {info.dtype for info in infos} - GRAFTABLE
    if foreign:
        raise PairRefused([f"{what} is stored in {', '.join(sorted(foreign))}, which cannot be grafted"])


def _misfit(module: str, a: TensorInfo, b: TensorInfo, rank: int, weight: TensorInfo) -> PairRefused:
    shapes = f"B {list(b.shape)} and A {list(a.shape)}"
    return PairRefused(
        [f"{module} has the factors {shapes}, which do not fit rank {rank} and {list(weight.shape)} of instruct"]
    )
