"""Which tensors of Instruct take part in a graft, and under which name Base has them; from headers alone.

A pair is refused whole and with every reason at once, before a weight is read. The alternative is known: the paper's
own script drops a name that Instruct lacks without a word, and writes Instruct unchanged when nothing matches.
The two scopes are those of the Shadow-FT paper (arXiv 2505.12716): its code grafts the linears, its formula everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

from core.checkpoints import AdapterHeader, Checkpoint, TensorInfo
from core.errors import PairRefused
from core.job_spec import Scope

#: What a linear of a decoder layer is called, by its role; the fused ones of several families among them.
LINEAR_ROLES = {
    "query": ("q_proj", "q_a_proj", "q_b_proj", "wq"),
    "key, value": ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wk", "wv"),
    "fused query, key, value": ("qkv_proj", "Wqkv", "wqkv", "query_key_value", "c_attn", "W_pack"),
    "attention output": ("o_proj", "out_proj", "dense", "wo", "c_proj"),
    "gate, up": ("gate_proj", "up_proj", "w1", "w3", "c_fc", "fc1", "dense_h_to_4h"),
    "fused gate and up": ("gate_up_proj",),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h"),
}
_LINEARS = frozenset(name for names in LINEAR_ROLES.values() for name in names)
#: Names that mean a linear of ours only inside an attention block.
_ATTENTION_ONLY = frozenset({"dense", "out_proj"})
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"})
_HEADS = frozenset({"lm_head", "embed_out", "output_layer"})
#: Parts that are not the language model: always Instruct's own in scope `linear`, and never missed.
_OTHER_PARTS = frozenset(
    {
        "vision_tower",
        "vision_model",
        "vision_encoder",
        "vision_embed_tokens",
        "visual",
        "multi_modal_projector",
        "mm_projector",
        "audio_tower",
        "embed_vision",
        "embed_audio",
    }
)
#: Computed, not learned: old checkpoints store them, newer ones do not.
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|(^|\.)attn\.(masked_)?bias)$")

#: Dtypes whose values float32 holds exactly.
GRAFTABLE = frozenset({"F32", "F16", "BF16"})

#: What two models of one lineage agree on. Not here on purpose: rope settings, lengths, token ids, dtype.
_ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_embd", "n_layer", "n_head"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts"),
    "hidden_act",
)

#: A delta of one of these is not `B @ A` alone.
_LORA_VARIANTS = {
    "use_dora": "DoRA learns a magnitude that is absolute for the base model",
    "use_qalora": "QALoRA pools its inputs by groups",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "lora_bias": "its factors have biases",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces single token embeddings",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it targets parameters and not modules",
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "arrow_config": "Arrow chooses among adapters at run time",
    "kasa_config": "KaSA changes the base model's weights",
    "lora_ga_config": "LoRA-GA changes the base model's weights",
    "monteclora_config": "MonteCLoRA samples its factors",
    "velora_config": "VeLoRA is not known well enough",
}
#: Initialisations that leave the base model's weights as they are. PiSSA, OLoRA, CorDA and LoftQ do not.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
_LORA_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

_EXAMPLES = 3


@dataclass(frozen=True)
class GraftPlan:
    """One fate for each tensor of Instruct. The values of the mappings are Base's names."""

    scope: Scope
    grafted: dict[str, str]
    #: Float tensors that both have and the scope leaves out; tuning may move them in vain.
    discarded: dict[str, str]
    #: Everything that is not grafted, `discarded` among it.
    copied: tuple[str, ...]
    #: Differences that do no harm, in words.
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class LoraFactors:
    """The delta of one weight: `scaling * B @ A`, transposed where the weight is stored as (in, out)."""

    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool


def plan_graft(
    instruct: Checkpoint, base: Checkpoint, *, scope: Scope, words: tuple[str, str] = ("instruct", "base")
) -> GraftPlan:
    """Decide the fate of every tensor of `instruct`; `words` are what the reasons call the two.

    PairRefused: the two are not of one lineage, or one cannot be grafted at all; it holds every reason.
    """
    pair = _Pair(instruct, base, words)
    shared = pair.counterparts()
    grafted = {name: other for name, other in shared.items() if _takes_part(instruct.tensors[name], scope)}
    reasons = [*pair.reasons(shared), *_dtype_reasons(pair, grafted)]
    if not grafted:
        reasons.append(f"no tensor of {words[0]} is in the scope {scope!r} and in {words[1]} too")
    if reasons:
        raise PairRefused(reasons)
    everything = {name for name in shared if _takes_part(instruct.tensors[name], "all")}
    return GraftPlan(
        scope=scope,
        grafted=grafted,
        discarded={name: shared[name] for name in shared if name in everything and name not in grafted},
        copied=tuple(name for name in instruct.tensors if name not in grafted),
        remarks=tuple(pair.remarks(shared)),
    )


def plan_lora(instruct: Checkpoint, adapter: AdapterHeader) -> dict[str, LoraFactors]:
    """Find the weight of Instruct that each pair of LoRA factors changes. The adapter itself decides the scope.

    PairRefused: the adapter's delta is not plainly `scaling * B @ A`, or it does not fit; it holds every reason.
    """
    reasons = [*_quantisation_reasons(instruct, "instruct"), *_adapter_reasons(adapter)]
    factors, unknown = _factors_by_module(adapter)
    if unknown:
        reasons.append(f"the adapter holds tensors that are not plain LoRA factors: {_listed(unknown)}")
    weights = {_canonical(name).removesuffix(".weight"): name for name in instruct.tensors}
    plan: dict[str, LoraFactors] = {}
    for module, sides in factors.items():
        name = weights.get(_canonical(module))
        if name is None:
            reasons.append(f"the adapter changes {module}, which instruct lacks")
            continue
        found = _fit_factors(module, sides, instruct.tensors[name], adapter.config)
        if isinstance(found, str):
            reasons.append(found)
        else:
            plan[name] = found
    if not factors:
        reasons.append("the adapter holds no LoRA factors")
    if reasons:
        raise PairRefused(reasons)
    return plan


def is_linear(name: str) -> bool:
    """Whether the tensor is a weight or bias of a decoder layer's linear, an expert's among them."""
    *path, last = name.split(".")
    if _OTHER_PARTS.intersection(path):
        return False
    if last not in ("weight", "bias"):  # fused experts are bare parameters: `mlp.experts.gate_up_proj[_bias]`
        return "experts" in path and last.removesuffix("_bias") in _LINEARS
    module = path[-1] if path else ""
    if module in _ATTENTION_ONLY:
        return len(path) > 1 and "att" in path[-2]
    return module in _LINEARS


def linear_module_names(checkpoint: Checkpoint) -> list[str]:
    """The last part of every linear module's name, sorted: what LoRA calls its target modules."""
    weights = (name for name in checkpoint.tensors if name.endswith(".weight") and is_linear(name))
    return sorted({_module(name) for name in weights})


def smallest_linear_dimension(checkpoint: Checkpoint) -> int:
    """The upper bound of a useful LoRA rank. PairRefused: the model has no linear that we know."""
    shapes = [info.shape for name, info in checkpoint.tensors.items() if is_linear(name) and len(info.shape) > 1]
    if not shapes:
        raise PairRefused(["the model has no linear layer of a known name"])
    return min(min(shape[-2:]) for shape in shapes)


# --- two checkpoints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pair:
    """Two checkpoints that should be of one lineage; `words` name them in the reasons."""

    left: Checkpoint
    right: Checkpoint
    words: tuple[str, str]

    def counterparts(self) -> dict[str, str]:
        """Each left name with the right name of the same part, whatever their shapes."""
        by_canonical = {_canonical(name): name for name in self.right.tensors}
        pairs = {name: self._counterpart(name, by_canonical) for name in self.left.tensors}
        return {name: other for name, other in pairs.items() if other is not None and self._alike(name, other)}

    def _counterpart(self, name: str, by_canonical: dict[str, str]) -> str | None:
        if name in self.right.tensors:
            return name
        other = by_canonical.get(_canonical(name))
        if other is None and _module(name) in _HEADS and self._both_tied():
            return _embedding(self.right)  # a stored head of tied models is the embedding once more
        return other

    def _alike(self, name: str, other: str) -> bool:
        """Parts outside the language model may differ: then they are simply not shared."""
        return _is_language(name) or self._shapes(name, other)[0] == self._shapes(name, other)[1]

    def _shapes(self, name: str, other: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.left.tensors[name].shape, self.right.tensors[other].shape

    def _both_tied(self) -> bool:
        return _is_tied(self.left) and _is_tied(self.right)

    def reasons(self, shared: dict[str, str]) -> list[str]:
        left, right = self.words
        return [
            *_quantisation_reasons(self.left, left),
            *_quantisation_reasons(self.right, right),
            *self._architecture_reasons(),
            *self._vocabulary_reasons(),
            *self._tying_reasons(),
            *_absence_reasons(self._unmatched(self.left, shared), have=left, lack=right),
            *_absence_reasons(self._unmatched(self.right, shared.values()), have=right, lack=left),
            *self._shape_reasons(shared),
        ]

    def _unmatched(self, checkpoint: Checkpoint, matched: Iterable[str]) -> list[str]:
        known = set(matched)
        return [name for name in checkpoint.tensors if name not in known and not self._is_dispensable(name)]

    def _is_dispensable(self, name: str) -> bool:
        if not _is_language(name) or _BUFFER.search(name) is not None:
            return True
        return _module(name) in _HEADS and self._both_tied()

    def _architecture_reasons(self) -> list[str]:
        left, right = self.left.text_config, self.right.text_config
        differing = [
            (key, left[key], right[key])
            for key in _ARCHITECTURE
            if left.get(key) is not None and right.get(key) is not None and left[key] != right[key]
        ]
        if _model_type(left) != _model_type(right):
            differing.insert(0, ("model_type", _model_type(left), _model_type(right)))
        return [f"other architecture: {key} is {self._against(one, two)}" for key, one, two in differing]

    def _vocabularies(self) -> tuple[Any, Any]:
        return _vocabulary(self.left), _vocabulary(self.right)

    def _vocabulary_reasons(self) -> list[str]:
        one, two = self._vocabularies()
        return [] if one == two else [f"other vocabulary: the entries are {self._against(one, two)}"]

    def _tying_reasons(self) -> list[str]:
        if _is_tied(self.left) == _is_tied(self.right):
            return []
        states = [self.words[side] for side in (0, 1) if _is_tied((self.left, self.right)[side])]
        return [f"only {states[0]} ties its head to its embedding"]

    def _shape_reasons(self, shared: dict[str, str]) -> list[str]:
        one, two = self._vocabularies()
        resized = _EMBEDDINGS | _HEADS if one != two else frozenset()  # named already
        differing = [
            f"{name} {list(self._shapes(name, other)[0])} against {list(self._shapes(name, other)[1])}"
            for name, other in shared.items()
            if self._shapes(name, other)[0] != self._shapes(name, other)[1]
            and _module(name) not in resized
            and _BUFFER.search(name) is None
        ]
        return [f"other shapes: {_listed(differing)}"] if differing else []

    def remarks(self, shared: dict[str, str]) -> list[str]:
        found = []
        if self.left.dtypes[0] != self.right.dtypes[0]:
            found.append(f"stored mostly in {self._against(self.left.dtypes[0], self.right.dtypes[0])}")
        if any(
            _canonical(name) != name or _canonical(other) != other for name, other in shared.items() if name != other
        ):
            found.append("the names differ by the prefix of a multimodal model")
        if self._both_tied() and (_head(self.left) is None) != (_head(self.right) is None):
            found.append("only one of the two stores the tied head")
        return found

    def _against(self, one: Any, two: Any) -> str:
        return f"{one} in {self.words[0]} and {two} in {self.words[1]}"


def _takes_part(info: TensorInfo, scope: Scope) -> bool:
    if _BUFFER.search(info.name) is not None:
        return False
    return is_linear(info.name) if scope == "linear" else info.is_float


def _absence_reasons(names: list[str], *, have: str, lack: str) -> list[str]:
    return [f"{len(names)} tensors of {have} are missing in {lack}: {_listed(names)}"] if names else []


def _dtype_reasons(pair: _Pair, grafted: dict[str, str]) -> list[str]:
    infos = [(pair.words[0], pair.left.tensors[name]) for name in grafted]
    infos += [(pair.words[1], pair.right.tensors[other]) for other in grafted.values()]
    foreign = [f"{info.name} in {word} ({info.dtype})" for word, info in infos if info.dtype not in GRAFTABLE]
    return [f"stored in a dtype that cannot be grafted: {_listed(foreign)}"] if foreign else []


def _quantisation_reasons(checkpoint: Checkpoint, word: str) -> list[str]:
    stated = checkpoint.config.get("quantization_config")
    if not stated:
        return []
    method = stated.get("quant_method", "unknown method") if isinstance(stated, dict) else stated
    return [f"{word} is quantised ({method}); take the unquantised model"]


# --- a checkpoint's own properties ------------------------------------------------------------------------------------


def _canonical(name: str) -> str:
    """The name without the prefix under which a multimodal model keeps its language model."""
    parts = name.split(".")
    return ".".join(part for position, part in enumerate(parts) if part != "language_model" or position > 1)


def _module(name: str) -> str:
    return ("." + name).rsplit(".", 2)[-2]


def _is_language(name: str) -> bool:
    return not _OTHER_PARTS.intersection(name.split("."))


def _model_type(config: dict[str, Any]) -> str:
    """`gemma3_text` is the language model inside a `gemma3`."""
    return str(config.get("model_type")).removesuffix("_text")


def _named(checkpoint: Checkpoint, modules: frozenset[str]) -> str | None:
    found = (name for name in checkpoint.tensors if name.endswith(".weight") and _module(name) in modules)
    return next((name for name in found if _is_language(name)), None)


def _embedding(checkpoint: Checkpoint) -> str | None:
    return _named(checkpoint, _EMBEDDINGS)


def _head(checkpoint: Checkpoint) -> str | None:
    return _named(checkpoint, _HEADS)


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """Rows of the embedding, padding included; 0 where neither weights nor config tell."""
    return int(_vocabulary(checkpoint) or 0)


def _vocabulary(checkpoint: Checkpoint) -> Any:
    embedding = _embedding(checkpoint)
    return checkpoint.tensors[embedding].shape[0] if embedding else checkpoint.text_config.get("vocab_size")


def _is_tied(checkpoint: Checkpoint) -> bool:
    """What the config says, else whether a head is stored: some families tie by default and do not say so."""
    stated = checkpoint.config.get("tie_word_embeddings", checkpoint.text_config.get("tie_word_embeddings"))
    return stated if isinstance(stated, bool) else _head(checkpoint) is None


def _listed(items: list[str]) -> str:
    more = len(items) - _EXAMPLES
    return ", ".join(items[:_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


# --- an adapter -------------------------------------------------------------------------------------------------------


def _adapter_reasons(adapter: AdapterHeader) -> list[str]:
    config = adapter.config
    if config.get("peft_type") != "LORA":
        return [f"the adapter is of the type {config.get('peft_type')}; only LORA has a delta that can be grafted"]
    reasons = [f"the adapter sets {key}: {why}" for key, why in _LORA_VARIANTS.items() if config.get(key)]
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        reasons.append(f"the adapter was initialised by {init!r}, which changes the base model's weights; convert it")
    if config.get("bias", "none") != "none":
        reasons.append(f"the adapter trains biases of the base model (bias is {config['bias']!r})")
    return reasons


def _factors_by_module(adapter: AdapterHeader) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """Each module's sides `A` and `B`, and the names that are neither."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    unknown = []
    for name, info in adapter.tensors.items():
        key = _LORA_KEY.fullmatch(name)
        if key is None:
            unknown.append(name)
        else:
            factors.setdefault(key["module"], {})[key["side"]] = info
    return factors, unknown


def _fit_factors(
    module: str, sides: dict[str, TensorInfo], weight: TensorInfo, config: dict[str, Any]
) -> LoraFactors | str:
    """The factors of `weight`, or the reason why they do not fit."""
    if sides.keys() != {"A", "B"}:
        return f"the adapter has only one factor of {module}"
    a, b = sides["A"], sides["B"]
    rank = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    transposed = bool(config.get("fan_in_fan_out"))
    out_in = weight.shape[::-1] if transposed else weight.shape  # (out, in)
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        return f"the adapter's config gives {module} the rank {rank!r} and the alpha {alpha!r}"
    if (b.shape, a.shape) != ((*out_in[:1], rank), (rank, *out_in[1:])):
        shapes = f"B {list(b.shape)} and A {list(a.shape)}"
        return f"{module} has the factors {shapes}, which do not fit rank {rank} and {list(weight.shape)} of instruct"
    foreign = {info.dtype for info in (a, b, weight)} - GRAFTABLE
    if foreign:
        return f"{module} is stored in {', '.join(sorted(foreign))}, which cannot be grafted"
    return LoraFactors(a, b, alpha / (sqrt(rank) if config.get("use_rslora") else rank), transposed)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
