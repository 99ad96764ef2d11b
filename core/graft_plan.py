"""Which tensors of Instruct take part in a graft, and under which name Base has them; from headers alone.

A pair is refused whole and with every reason at once, before a weight is read. The alternative is known: the paper's
own script drops a name that Instruct lacks without a word, and writes Instruct unchanged when nothing matches.
The two scopes are those of the Shadow-FT paper (arXiv 2505.12716): its code grafts the linears, its formula everything.
What an adapter changes is planned in `core.adapter_plan`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import dropwhile
from typing import TYPE_CHECKING, Any, NamedTuple

from core.checkpoints import Checkpoint, TensorInfo
from core.errors import PairRefused

if TYPE_CHECKING:
    from core.job_spec import Scope

#: What a linear of a decoder layer is called, by its role; the fused ones of several families among them.
LINEAR_ROLES = {
    "query": ("q_proj", "q_a_proj", "q_b_proj", "wq"),
    "key, value": ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wk", "wv"),
    "fused query, key, value": ("qkv_proj", "Wqkv", "wqkv", "query_key_value", "c_attn", "W_pack"),
    # Qwen3-Next and Qwen3.5; their in_proj_a and in_proj_b only gate the heads, a number each.
    "linear attention": ("in_proj_qkvz", "in_proj_qkv", "in_proj_z"),
    "attention output": ("o_proj", "out_proj", "dense", "wo", "c_proj"),
    "gate, up": ("gate_proj", "up_proj", "w1", "w3", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "fused gate and up": ("gate_up_proj", "input_linear"),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "output_linear"),
}
_LINEARS = frozenset(name for names in LINEAR_ROLES.values() for name in names)
#: Names that mean a linear of ours only inside an attention block.
_ATTENTION_ONLY = frozenset({"dense", "out_proj"})
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"})
_HEADS = frozenset({"lm_head", "embed_out", "output_layer"})
#: Parts that are not the language model: always Instruct's own in scope `linear`, and never missed.
_OTHER_PARTS = frozenset(
    {
        *("vision_tower", "vision_model", "vision_encoder", "vision_backbone", "vision_embed_tokens", "visual"),
        *("multi_modal_projector", "mm_projector", "vision_projection", "connector", "aligner", "image_newline"),
        *("audio_tower", "audio_model", "audio_encoder", "audio_projection", "embed_vision", "embed_audio"),
        *("talker", "token2wav", "code2wav"),
    }
)
#: Parts of a path that only say where the language model is kept; `language_model.model.X`, `model.language_model.X`,
#: `model.text_model.X`, `model.X` and the bare `X` of a model saved without its head are one tensor.
_WRAPPERS = frozenset({"model", "language_model", "text_model", "transformer", "gpt_neox"})
#: A layer of the language model, in a canonical name.
_LAYER = re.compile(r"(?:decoder\.|backbone\.)?(?:layers|h|blocks)\.(\d+)\.")
#: Computed, not learned: old checkpoints store them, newer ones do not.
_BUFFER = re.compile(r"(rotary_emb\.inv_freq|(^|\.)attn\.(masked_)?bias)$")

#: Families that tie head and embedding unless their config says otherwise: saving writes only what is not the default,
#: so that a tied model's config may be silent. (A test compares them with transformers' config classes.)
TIED_BY_DEFAULT = frozenset(
    {
        *("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "recurrent_gemma", "vaultgemma"),
        *("gpt2", "gpt_neo", "gpt_bigcode", "opt", "bloom", "mpt", "falcon", "starcoder2"),
        *("cohere", "cohere2", "ernie4_5", "ernie4_5_moe", "lfm2", "lfm2_moe", "smollm3"),
    }
)

#: Dtypes whose values float32 holds exactly.
GRAFTABLE = frozenset({"F32", "F16", "BF16"})
#: What quantised checkpoints store beside or instead of a weight (GPTQ, AWQ, bitsandbytes, compressed-tensors, FP8,
#: MXFP4), also where the config has lost its word of it.
_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map)$|\.quant_state\."
    r"|weight_(scale|scale_inv|scale_2|zero_point|packed|shape|format)$|\.(input|output|k|v)_scale$"
    r"|_proj_(blocks|scales)$"
)

#: What two models of one lineage agree on. Not here on purpose: rope settings, lengths, token ids, dtype.
ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_embd", "n_layer", "n_head"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts"),
    "hidden_act",
)

#: Vocabularies are one where they differ only by padding or by rows added behind: by at most so many rows, and the
#: larger at most so many times the smaller. Padding goes to the next multiple of 64 to 1024; a new tokenizer differs
#: by thousands. Tiny models need the second rule.
MAX_OTHER_ROWS = 1024
MAX_ROWS_RATIO = 1.25

_EXAMPLES = 3


class Reason(NamedTuple):
    """Why a pair is refused, or what is remarkable about it."""

    #: Stable: a program tells one kind from the others by it.
    code: str
    words: str


@dataclass(frozen=True)
class Selection:
    """Which tensors of Instruct take part."""

    scope: Scope = "linear"
    #: Shell patterns on Instruct's tensor names, case-sensitive; none means all of the scope.
    include: tuple[str, ...] = ()
    #: The same; wins over `include`.
    exclude: tuple[str, ...] = ()

    def takes(self, info: TensorInfo) -> bool:
        """Whether the tensor takes part; computed buffers and integers never do."""
        if not info.is_float or is_buffer(info.name):
            return False
        if self.scope == "linear" and not is_linear(info.name):
            return False
        if self.include and not _matches(info.name, self.include):
            return False
        return not _matches(info.name, self.exclude)

    def __str__(self) -> str:
        parts = [f"the scope {self.scope!r}"]
        parts += [f"include {', '.join(self.include)}"] if self.include else []
        parts += [f"exclude {', '.join(self.exclude)}"] if self.exclude else []
        return " with ".join([parts[0], " and ".join(parts[1:])] if parts[1:] else parts)


@dataclass(frozen=True)
class GraftPlan:
    """One fate for each tensor of Instruct. The values of the mappings are Base's names."""

    selection: Selection
    grafted: dict[str, str]
    #: Float tensors that both have and the selection leaves out; tuning may move them in vain.
    discarded: dict[str, str]
    #: Everything that is not grafted, `discarded` among it.
    copied: tuple[str, ...]
    #: Embeddings and heads, grafted or discarded, whose row counts differ: the leading rows that both have.
    common_rows: dict[str, int]
    #: Differences that do no harm, in words.
    remarks: tuple[str, ...]


def plan_graft(
    instruct: Checkpoint,
    base: Checkpoint,
    *,
    selection: Selection = Selection(),
    words: tuple[str, str] = ("instruct", "base"),
) -> GraftPlan:
    """Decide the fate of every tensor of `instruct`; `words` are what the reasons call the two.

    PairRefused: the two are not of one lineage, or one cannot be grafted at all, or the selection names nothing; it
    holds every reason.
    """
    lineage = Lineage(instruct, base, words)
    grafted = _taken(lineage, selection)
    reasons = _reasons(lineage, selection, grafted)
    if reasons:
        raise PairRefused(in_words(reasons))
    discarded = {
        name: other
        for name, other in lineage.shared.items()
        if name not in grafted and lineage.can_be_grafted(name, other)
    }
    return GraftPlan(
        selection=selection,
        grafted=grafted,
        discarded=discarded,
        copied=tuple(name for name in instruct.tensors if name not in grafted),
        common_rows=lineage.common_rows(),
        remarks=tuple(in_words(_remarks(lineage, grafted))),
    )


def judge(instruct: Checkpoint, base: Checkpoint, selection: Selection) -> tuple[list[Reason], list[Reason]]:
    """What `plan_graft` would refuse the two for, and the remarks that it would make; each with its code."""
    lineage = Lineage(instruct, base, ("instruct", "base"))
    grafted = _taken(lineage, selection)
    return _reasons(lineage, selection, grafted), _remarks(lineage, grafted)


def _taken(lineage: Lineage, selection: Selection) -> dict[str, str]:
    tensors = lineage.left.tensors
    return {name: other for name, other in lineage.shared.items() if selection.takes(tensors[name])}


def _reasons(lineage: Lineage, selection: Selection, grafted: dict[str, str]) -> list[Reason]:
    left, right = lineage.words
    none = Reason("nothing_to_graft", f"no tensor of {left} is in {selection} and in {right} too")
    return [
        *pattern_reasons(selection, lineage.left, left),
        *lineage.reasons(),
        *_dtype_reasons(lineage, grafted),
        *([] if grafted else [none]),
    ]


def _remarks(lineage: Lineage, grafted: dict[str, str]) -> list[Reason]:
    return [*lineage.remarks(), *lineage.vocabulary_remarks(grafted)]


def in_words(reasons: Iterable[Reason]) -> list[str]:
    return [reason.words for reason in reasons]


def plan_saved(instruct: Checkpoint, delta: Checkpoint, *, selection: Selection = Selection()) -> GraftPlan:
    """`plan_graft` for a delta that was saved as files: it holds float tensors alone. PairRefused: as there."""
    floats = {name: info for name, info in instruct.tensors.items() if info.is_float}
    comparable = replace(instruct, tensors=floats)
    return plan_graft(comparable, delta, selection=selection, words=("instruct", "the delta"))


def is_linear(name: str) -> bool:
    """Whether the tensor is a weight or bias of a decoder layer's linear, an expert's among them.

    A router decides which expert works and is none; neither is a gate of shared experts.
    """
    *path, last = name.split(".")
    if _OTHER_PARTS.intersection(path):
        return False
    if last not in ("weight", "bias"):  # fused experts are bare parameters: `mlp.experts.gate_up_proj[_bias]`
        return "experts" in path and last.removesuffix("_bias") in _LINEARS | {"v1"}  # DBRX has w1, v1 and w2
    module = path[-1] if path else ""
    if module in _ATTENTION_ONLY:
        return len(path) > 1 and "att" in path[-2]
    return module in _LINEARS


def smallest_linear_dimension(checkpoint: Checkpoint) -> int:
    """The upper bound of a useful LoRA rank. PairRefused: the model has no linear that we know."""
    shapes = [info.shape for name, info in checkpoint.tensors.items() if is_linear(name) and len(info.shape) > 1]
    if not shapes:
        raise PairRefused(["the model has no linear layer of a known name"])
    return min(min(shape[-2:]) for shape in shapes)


def vocabulary_size(checkpoint: Checkpoint) -> int:
    """Rows of the embedding, padding included; 0 where neither weights nor config tell."""
    return _vocabulary(checkpoint) or 0


# --- two checkpoints --------------------------------------------------------------------------------------------------


class Lineage:
    """Two checkpoints that should be of one lineage; `words` name them in the reasons."""

    def __init__(self, left: Checkpoint, right: Checkpoint, words: tuple[str, str]) -> None:
        self.left = left
        self.right = right
        self.words = words
        #: Each left name with the right name of the same part, whatever their shapes.
        self.shared = self._counterparts()

    def _counterparts(self) -> dict[str, str]:
        left_names, right_names = canonical_names(self.left), canonical_names(self.right)
        partners = {name: right_names.get(canonical) for canonical, name in left_names.items()}
        pairs = {name: self._counterpart(name, partners.get(name)) for name in self.left.tensors}
        return {name: other for name, other in pairs.items() if other is not None and self._alike(name, other)}

    def _counterpart(self, name: str, partner: str | None) -> str | None:
        if name in self.right.tensors:
            return name
        if partner is None and is_vocabulary(name) and self._both_tied():
            return embedding(self.right) or head(self.right)  # tied: what is stored of the two is the other once more
        return partner

    def _alike(self, name: str, other: str) -> bool:
        """Parts outside the language model may differ: then they are simply not shared."""
        left, right = self._shapes(name, other)
        return is_language(name) or left == right

    def _shapes(self, name: str, other: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.left.tensors[name].shape, self.right.tensors[other].shape

    def _both_tied(self) -> bool:
        return is_tied(self.left) and is_tied(self.right)

    def can_be_grafted(self, name: str, other: str) -> bool:
        dtypes = {self.left.tensors[name].dtype, self.right.tensors[other].dtype}
        return dtypes <= GRAFTABLE and not is_buffer(name)

    def common_rows(self) -> dict[str, int]:
        """Shared embeddings and heads whose row counts differ, with the leading rows that both have."""
        found = {}
        for name, other in self.shared.items():
            left, right = self._shapes(name, other)
            if is_vocabulary(name) and left != right and alike_but_rows(left, right):
                found[name] = min(left[0], right[0])
        return found

    def reasons(self) -> list[Reason]:
        left, right = self.words
        return [
            *quantisation_reasons(self.left, left),
            *quantisation_reasons(self.right, right),
            *self._architecture_reasons(),
            *self._vocabulary_reasons(),
            *self._tying_reasons(),
            *self._absence_reasons(self._unmatched(self.left, self.shared), left, right, self.right),
            *self._absence_reasons(self._unmatched(self.right, self.shared.values()), right, left, self.left),
            *self._shape_reasons(),
        ]

    def _unmatched(self, checkpoint: Checkpoint, matched: Iterable[str]) -> list[str]:
        known = set(matched)
        return [name for name in checkpoint.tensors if name not in known and not self._is_dispensable(name)]

    def _is_dispensable(self, name: str) -> bool:
        if not is_language(name) or is_buffer(name) or _PACKED.search(name) is not None:
            return True
        return is_vocabulary(name) and self._both_tied()

    def _architecture_reasons(self) -> list[Reason]:
        left, right = self.left.text_config, self.right.text_config
        differing = [
            (key, left[key], right[key])
            for key in ARCHITECTURE
            if left.get(key) is not None and right.get(key) is not None and left[key] != right[key]
        ]
        if _model_type(left) != _model_type(right):
            differing.insert(0, ("model_type", _model_type(left), _model_type(right)))
        return [
            Reason("other_architecture", f"other architecture: {key} is {self._against(one, two)}")
            for key, one, two in differing
        ]

    def _row_counts(self) -> list[tuple[int | None, int | None]]:
        """The two vocabularies' sizes, once for each way in which embeddings and heads show them."""
        shapes = [self._shapes(name, other) for name, other in self.shared.items() if is_vocabulary(name)]
        rows = [(left[0], right[0]) for left, right in shapes if alike_but_rows(left, right)]
        return list(dict.fromkeys(rows)) or [(_vocabulary(self.left), _vocabulary(self.right))]

    def _vocabulary_reasons(self) -> list[Reason]:
        return [
            Reason("other_vocabulary", f"other vocabulary: the entries are {self._against(one, two)}")
            for one, two in self._row_counts()
            if not same_vocabulary(one, two)
        ]

    def _tying_reasons(self) -> list[Reason]:
        if is_tied(self.left) == is_tied(self.right):
            return []
        tied = self.words[0] if is_tied(self.left) else self.words[1]
        remedy = f"take two models of one release, or save {tied} with a head of its own and tie_word_embeddings false"
        return [Reason("only_one_tied", f"only {tied} ties its head to its embedding; {remedy}")]

    def _absence_reasons(self, names: list[str], have: str, lack: str, lacking: Checkpoint) -> list[Reason]:
        if not names:
            return []
        reason = f"{len(names)} tensors of {have} are missing in {lack}: {listed(names)}"
        if any(map(is_head, names)) and not is_tied(lacking):  # of one that ties, `_tying_reasons` tells
            reason += f"; {lack} stores no such head: save it with its head, as AutoModelForCausalLM does"
        return [Reason("missing_tensors", reason)]

    def _shape_reasons(self) -> list[Reason]:
        differing = [
            f"{name} {list(left)} against {list(right)}"
            for name, (left, right) in ((name, self._shapes(name, other)) for name, other in self.shared.items())
            # The number of rows of a vocabulary is judged by `_vocabulary_reasons`.
            if left != right and not (is_vocabulary(name) and alike_but_rows(left, right)) and not is_buffer(name)
        ]
        return [Reason("other_shapes", f"other shapes: {listed(differing)}")] if differing else []

    def remarks(self) -> list[Reason]:
        found = []
        left, right = self.left.dtypes, self.right.dtypes
        if left and right and left[0] != right[0]:
            found.append(Reason("other_dtype", f"stored mostly in {self._against(left[0], right[0])}"))
        renamed = [(name, other) for name, other in self.shared.items() if name != other]
        prefixed = [(name, other) for name, other in renamed if canonical_name(name) == canonical_name(other)]
        if prefixed:
            found.append(Reason("other_prefix", f"the names differ by a prefix: {self._against(*prefixed[0])}"))
        if self._both_tied() and (head(self.left) is None) != (head(self.right) is None):
            found.append(Reason("tied_head_stored_once", "only one of the two stores the tied head"))
        return found

    def vocabulary_remarks(self, grafted: Iterable[str]) -> list[Reason]:
        """What becomes of rows that only one of the two has."""
        common = self.common_rows()
        taken = any(name in common for name in grafted)
        return [
            vocabulary_remark(self._against(one, two), min(one, two) if taken else 0, self.words[0])
            for one, two in self._row_counts()
            if common and one is not None and two is not None and one != two
        ]

    def _against(self, one: Any, two: Any) -> str:
        return f"{one} in {self.words[0]} and {two} in {self.words[1]}"


def same_vocabulary(one: int | None, two: int | None) -> bool:
    """Whether two row counts can be of one vocabulary, which then differ by padding or added rows."""
    if one is None or two is None or one == two:
        return one == two
    small, large = sorted((one, two))
    return large - small <= MAX_OTHER_ROWS and large <= MAX_ROWS_RATIO * small


def alike_but_rows(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """Whether two shapes agree in everything but perhaps their first number."""
    return len(one) == len(two) > 0 and one[1:] == two[1:]


def vocabulary_remark(counts: str, grafted_rows: int, keeper: str) -> Reason:
    fate = f"the first {grafted_rows} are grafted, the others stay those of {keeper}"
    fate = fate if grafted_rows else f"all stay those of {keeper}"
    return Reason("other_row_count", f"the rows of the vocabulary are {counts}: {fate}")


def pattern_reasons(selection: Selection, checkpoint: Checkpoint, word: str) -> list[Reason]:
    """One reason for each pattern that matches no tensor at all: a slip of the pen, which would be silent otherwise."""
    patterns = [("include", one) for one in selection.include] + [("exclude", one) for one in selection.exclude]
    return [
        Reason(
            "unknown_pattern", f"the {kind} pattern {pattern!r} matches no tensor of {word}{_near(pattern, checkpoint)}"
        )
        for kind, pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in checkpoint.tensors)
    ]


def _near(pattern: str, checkpoint: Checkpoint) -> str:
    """Patterns that do match: the names with their numbers as stars, and their modules with stars around them."""
    names = {re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in checkpoint.tensors}
    candidates = sorted(names | {f"*.{module_name(name)}.*" for name in names})
    near = get_close_matches(pattern, candidates, n=_EXAMPLES, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(one) for one in near)}?" if near else ""


def quantisation_reasons(checkpoint: Checkpoint, word: str) -> list[Reason]:
    parts = (checkpoint.config, checkpoint.text_config)
    stated = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if stated:
        method = stated.get("quant_method", "unknown method") if isinstance(stated, dict) else stated
        return [Reason("quantised_checkpoint", f"{word} is quantised ({method}); take the unquantised model")]
    packed = [
        f"{name} ({info.dtype})"
        for name, info in checkpoint.tensors.items()
        if _PACKED.search(name) is not None or (is_linear(name) and not info.is_float)
    ]
    if not packed:
        return []
    said = f"{word} holds packed weights: {listed(packed)}; take the unquantised model"
    return [Reason("quantised_checkpoint", said)]


def _dtype_reasons(lineage: Lineage, grafted: dict[str, str]) -> list[Reason]:
    infos = [(lineage.words[0], lineage.left.tensors[name]) for name in grafted]
    infos += [(lineage.words[1], lineage.right.tensors[other]) for other in grafted.values()]
    foreign = [f"{info.name} in {word} ({info.dtype})" for word, info in infos if info.dtype not in GRAFTABLE]
    said = f"stored in a dtype that cannot be grafted: {listed(foreign)}"
    return [Reason("foreign_dtype", said)] if foreign else []


# --- a checkpoint's own properties ------------------------------------------------------------------------------------


def canonical_name(name: str) -> str:
    """The name without the prefix under which a model keeps its language model, and with one word for the head."""
    parts = list(dropwhile(_WRAPPERS.__contains__, name.split(".")))
    if len(parts) == 2 and parts[0] in _HEADS:  # transformers itself calls GPT-NeoX's `embed_out` by both names
        parts[0] = "lm_head"
    return ".".join(parts)


def canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """The stored names by their canonical ones; one that two tensors share says nothing and is left out."""
    count = Counter(canonical_name(name) for name in checkpoint.tensors)
    return {canonical_name(name): name for name in checkpoint.tensors if count[canonical_name(name)] == 1}


def module_name(name: str) -> str:
    """The last part but one: `q_proj` of `model.layers.0.self_attn.q_proj.weight`."""
    return ("." + name).rsplit(".", 2)[-2]


def is_vocabulary(name: str) -> bool:
    """Whether the tensor's rows are the vocabulary: an embedding or a head, or its bias."""
    return is_language(name) and module_name(name) in _EMBEDDINGS | _HEADS


def is_head(name: str) -> bool:
    return module_name(name) in _HEADS


def is_buffer(name: str) -> bool:
    return _BUFFER.search(name) is not None


def is_language(name: str) -> bool:
    """Whether the tensor belongs to the language model, and not to what a multimodal model sees or hears with."""
    return not _OTHER_PARTS.intersection(name.split("."))


def language_layers(checkpoint: Checkpoint) -> int:
    """How many layers of the language model are stored; 0 where none has a name that is known here."""
    found = (_LAYER.match(canonical_name(name)) for name in checkpoint.tensors if is_language(name))
    return len({layer.group(1) for layer in found if layer})


def embedding(checkpoint: Checkpoint) -> str | None:
    return _named(checkpoint, _EMBEDDINGS)


def head(checkpoint: Checkpoint) -> str | None:
    return _named(checkpoint, _HEADS)


def is_tied(checkpoint: Checkpoint) -> bool:
    """What the config says, else what its family does by default, else whether a head is stored: the two parts of a
    multimodal config may disagree."""
    parts = (checkpoint.config, checkpoint.text_config)
    said = [part.get("tie_word_embeddings") for part in parts]
    stated = {one for one in said if isinstance(one, bool)}
    if len(stated) == 1:
        return stated.pop()
    return (not stated and _ties_by_default(checkpoint)) or head(checkpoint) is None


def _ties_by_default(checkpoint: Checkpoint) -> bool:
    named = checkpoint.text_config if checkpoint.text_config.get("model_type") else checkpoint.config
    return _model_type(named) in TIED_BY_DEFAULT


def listed(items: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = len(items) - _EXAMPLES
    return ", ".join(items[:_EXAMPLES]) + (f" and {more} more" if more > 0 else "")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _model_type(config: dict[str, Any]) -> str:
    """`gemma3_text` is the language model inside a `gemma3`, `mllama_text_model` that inside an `mllama`."""
    return re.sub(r"_text(_model)?$", "", str(config.get("model_type")))


def _named(checkpoint: Checkpoint, modules: frozenset[str]) -> str | None:
    found = (name for name in checkpoint.tensors if name.endswith(".weight") and module_name(name) in modules)
    return next((name for name in found if is_language(name)), None)


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    stored = embedding(checkpoint) or head(checkpoint)
    if stored is not None:
        return next(iter(checkpoint.tensors[stored].shape), None)
    stated = checkpoint.text_config.get("vocab_size")
    return stated if isinstance(stated, int) else None
