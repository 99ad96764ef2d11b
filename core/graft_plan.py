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
    "query": ("q_proj", "q_a_proj", "q_b_proj", "q_gate_proj", "wq", "wq_b", "q"),
    "key, value": (
        *("k_proj", "v_proj", "kv_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wk", "wv"),
        *("key", "value", "receptance", "k", "v"),
    ),
    "fused query, key, value": ("qkv_proj", "Wqkv", "wqkv", "query_key_value", "c_attn", "W_pack"),
    # Of Qwen3-Next and Qwen3.5, OLMo Hybrid, Kimi Linear. Their in_proj_a, in_proj_b, a_proj and b_proj only gate the
    # heads, a number each.
    "linear attention": ("in_proj_qkvz", "in_proj_qkv", "in_proj_z", "g_proj", "g_a_proj", "g_b_proj"),
    "its forgetting": ("f_proj", "f_a_proj", "f_b_proj"),
    # Mamba's dt_proj is none: its kernels take that weight as a table of steps.
    "state space, short convolution": ("in_proj", "x_proj"),
    "attention output": ("o_proj", "o_b_proj", "out_proj", "dense", "wo", "Wo", "c_proj", "output", "o"),
    "attention gate": ("output_gate", "ogate_preact"),
    "gate, up": (
        *("gate_proj", "up_proj", "proj_up", "w1", "w3", "wi_0", "wi_1"),
        *("c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    ),
    "fused gate and up": ("gate_up_proj", "input_linear", "Wi", "wi", "proj_up_gate"),
    "down": ("down_proj", "w2", "fc2", "fc_out", "dense_4h_to_h", "output_linear", "proj_down"),
    # RecurrentGemma's recurrence; Gemma 3n's input for each layer (not its laurel, whose rank of 64 would bound that of
    # every LoRA); what joins Zamba's shared blocks, and Moshi's q_proj.linear.
    "other branches": (
        *("linear_x", "linear_y", "linear_out"),
        *("per_layer_input_gate", "per_layer_projection", "linear"),
    ),
}
_LINEARS = frozenset(name for names in LINEAR_ROLES.values() for name in names)
_MIXERS = ("mamba", "mixer", "lstm")
#: Names that mean a linear of ours only inside a block whose own name holds one of these words.
_ONLY_INSIDE: dict[str, tuple[str, ...]] = {
    "dense": ("att",),
    "output_gate": ("att",),
    "out_proj": ("att", "conv", *_MIXERS),
    "in_proj": ("conv", *_MIXERS),
    "x_proj": _MIXERS,
    "g_proj": ("linear_attn",),  # elsewhere it gates the heads
    **dict.fromkeys(("q", "k", "v", "o"), ("Attention", "lstm")),  # T5, xLSTM
    **dict.fromkeys(("key", "value", "receptance"), ("attention", "feed_forward")),  # RWKV
    "output": ("attention",),
}
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in"})
_HEADS = frozenset({"lm_head", "embed_out", "output_layer"})
#: Parts that are not the language model: always Instruct's own in scope `linear`, and never missed.
_OTHER_PARTS = frozenset(
    {
        *("vision_tower", "vision_model", "vision_encoder", "vision_backbone", "vision_embed_tokens", "visual"),
        *("vision_adapter", "image_tower", "video_tower", "embed_vision", "visual_embeddings_table", "vqmodel"),
        *("multi_modal_projector", "mm_projector", "vision_projection", "connector", "aligner", "image_newline"),
        *("projector", "merger", "language_projection", "image_to_text_projection", "resampler_model"),
        *("qformer", "query_tokens", "high_res_vision_neck", "high_res_vision_proj", "high_res_vision_alpha"),
        "embed_tokens_extend",
        *("generation_aligner", "generation_embeddings", "generation_head", "view_separator"),
        *("audio_tower", "audio_model", "audio_encoder", "audio_projection", "embed_audio", "embed_audio_tokens"),
        *("audio_lm_head", "speech_encoder", "acoustic_tokenizer_encoder", "semantic_tokenizer_encoder"),
        *("semantic_connector", "codec_model", "diffusion_head", "word_timestamp_encoder", "word_timestamp_head"),
        *("talker", "token2wav", "code2wav", "depth_decoder"),
        *("protein_encoder", "dit", "embed_action_time", "action_out_proj"),
    }
)
#: Parts of a path that only say where the language model is kept; `language_model.model.X`, `model.language_model.X`,
#: `model.text_model.X`, `model.X` and the bare `X` of a model saved without its head are one tensor. `base_model` is
#: PEFT's.
_WRAPPERS = frozenset(
    {
        *("model", "language_model", "text_model", "transformer", "thinker", "vlm", "base_model"),
        *("gpt_neox", "gpt_neox_japanese", "biogpt", "prophetnet", "rwkv"),
    }
)
#: A layer of the language model, in a canonical name.
_LAYER = re.compile(r"(?:decoder\.|backbone\.)?(?:layers|h|blocks)\.(\d+)\.")
#: Where its linears lie: also in the encoder of a model that has one (but not in one of sound, with its two halves of a
#: feed-forward), in the parts of the Byte Latent Transformer and of HRM, and in Idefics' layers between the layers.
_HOME = re.compile(
    r"(?:(?:decoder|backbone|encoder|encoder\.text_model|local_encoder|local_decoder|global_transformer|patcher"
    r"|[HL]_module)\.)?(?:layers|h|blocks?|cross_attn_layers|gated_cross_attn_layers)\.\d+\.(?!ff[12]\.)"
)
#: Computed, not learned: old checkpoints store them, newer ones do not. A causal mask has the name of a bias, and is
#: told from one by its shape, (1, 1, positions, positions); beside it lies the one number that it masks with.
_FREQUENCIES = re.compile(r"rotary_emb\.inv_freq$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_MASKED = re.compile(r"(^|\.)(attn|attention)\.masked_bias$")

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

#: By what a config says that its weights are quantised; the second is compressed-tensors' older word.
_QUANTISED = ("quantization_config", "compression_config")

#: What two models of one lineage agree on. Not here on purpose: rope settings, lengths, token ids, dtype.
ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_embd", "n_layer", "n_head"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts"),
    *("num_experts_per_tok", "hidden_act", "hidden_activation", "activation_function"),
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
        if not info.is_float or is_buffer(info):
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
        remarks=tuple(in_words(_remarks(lineage, selection, grafted))),
    )


def judge(instruct: Checkpoint, base: Checkpoint, selection: Selection) -> tuple[list[Reason], list[Reason]]:
    """What `plan_graft` would refuse the two for, and the remarks that it would make; each with its code."""
    lineage = Lineage(instruct, base, ("instruct", "base"))
    grafted = _taken(lineage, selection)
    return _reasons(lineage, selection, grafted), _remarks(lineage, selection, grafted)


def _taken(lineage: Lineage, selection: Selection) -> dict[str, str]:
    tensors = lineage.left.tensors
    return {name: other for name, other in lineage.shared.items() if selection.takes(tensors[name])}


def _reasons(lineage: Lineage, selection: Selection, grafted: dict[str, str]) -> list[Reason]:
    left, right = lineage.words
    none = Reason("nothing_to_graft", f"no tensor of {left} is in {selection} and in {right} too")
    return [
        *pattern_reasons(selection, lineage.left, left),
        *lineage.reasons(),
        *lineage.shape_reasons(_unlike(lineage, selection, taken=True)),
        *_dtype_reasons(lineage, grafted),
        *([] if grafted else [none]),
    ]


def _remarks(lineage: Lineage, selection: Selection, grafted: dict[str, str]) -> list[Reason]:
    return [
        *lineage.remarks(),
        *lineage.part_remarks(_unlike(lineage, selection, taken=False)),
        *lineage.vocabulary_remarks(grafted),
    ]


def _unlike(lineage: Lineage, selection: Selection, *, taken: bool) -> list[str]:
    """Tensors outside the language model that have another shape, by whether they are to be grafted."""
    return [name for name in lineage.unlike if selection.takes(lineage.left.tensors[name]) == taken]


def in_words(reasons: Iterable[Reason]) -> list[str]:
    return [reason.words for reason in reasons]


def plan_saved(instruct: Checkpoint, delta: Checkpoint, *, selection: Selection = Selection()) -> GraftPlan:
    """`plan_graft` for a delta that was saved as files: it holds float tensors alone. PairRefused: as there."""
    floats = {name: info for name, info in instruct.tensors.items() if info.is_float}
    comparable = replace(instruct, tensors=floats)
    return plan_graft(comparable, delta, selection=selection, words=("instruct", "the delta"))


def plan_tuning(base: Checkpoint, tuned: Checkpoint) -> GraftPlan:
    """Where the tuned base has each float tensor of base. PairRefused: as for `plan_graft`.

    Those that float32 does not hold are looked at by nobody: where a graft asks for one, its own plan refuses it.
    """
    foreign = {name for name, info in base.tensors.items() if info.is_float and info.dtype not in GRAFTABLE}
    left, right = (
        replace(one, tensors={name: info for name, info in one.tensors.items() if name not in foreign})
        for one in (base, tuned)
    )
    return plan_graft(left, right, selection=Selection("all"), words=("base", "tuned base"))


def is_linear(name: str) -> bool:
    """Whether the tensor is a weight or bias of a linear in a layer of the language model, an expert's among them.

    A router decides which expert works and is none; neither is what gates heads or experts with a number each.
    """
    home = _HOME.match(canonical_name(name)) if is_language(name) else None
    if home is None:
        return False
    *path, last = home.string[home.end() :].split(".")
    if last not in ("weight", "bias"):  # fused experts are bare parameters: `mlp.experts.gate_up_proj[_bias]`
        role = last.removesuffix("_bias")
        return any(part.endswith("experts") for part in path) and role in _LINEARS | {"v1"}  # DBRX has w1, v1 and w2
    return bool(path) and path[-1] in _LINEARS and _is_inside(path)


def _is_inside(path: list[str]) -> bool:
    """Whether a module's name means in its place what it is taken for."""
    module, block = path[-1], path[-2] if len(path) > 1 else ""
    return module not in _ONLY_INSIDE or any(word in block for word in _ONLY_INSIDE[module])


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
        pairs = self._counterparts()
        #: Each left name with the right name of the same part, whatever their shapes.
        self.shared = {name: other for name, other in pairs.items() if self._alike(name, other)}
        #: Parts outside the language model that only have the name in common: not shared.
        self.unlike = {name: other for name, other in pairs.items() if name not in self.shared}

    def _counterparts(self) -> dict[str, str]:
        left_names, right_names = canonical_names(self.left), canonical_names(self.right)
        partners = {name: right_names.get(canonical) for canonical, name in left_names.items()}
        pairs = {name: self._counterpart(name, partners.get(name)) for name in self.left.tensors}
        return {name: other for name, other in pairs.items() if other is not None}

    def _counterpart(self, name: str, partner: str | None) -> str | None:
        if name in self.right.tensors:
            return name
        if partner is None and is_vocabulary(name) and self._both_tied():
            return embedding(self.right) or head(self.right)  # tied: what is stored of the two is the other once more
        return partner

    def _alike(self, name: str, other: str) -> bool:
        """Parts outside the language model may differ, unless the selection takes them."""
        left, right = self._shapes(name, other)
        return is_language(name) or left == right

    def _shapes(self, name: str, other: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.left.tensors[name].shape, self.right.tensors[other].shape

    def _both_tied(self) -> bool:
        return is_tied(self.left) and is_tied(self.right)

    def can_be_grafted(self, name: str, other: str) -> bool:
        dtypes = {self.left.tensors[name].dtype, self.right.tensors[other].dtype}
        return dtypes <= GRAFTABLE and not is_buffer(self.left.tensors[name])

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
            *self.shape_reasons(self._misshapen()),
        ]

    def _unmatched(self, checkpoint: Checkpoint, matched: Iterable[str]) -> list[str]:
        known = set(matched)
        return [
            name for name, info in checkpoint.tensors.items() if name not in known and not self._is_dispensable(info)
        ]

    def _is_dispensable(self, info: TensorInfo) -> bool:
        if not is_language(info.name) or is_buffer(info) or _PACKED.search(info.name) is not None:
            return True
        return is_vocabulary(info.name) and self._both_tied()

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

    def _misshapen(self) -> list[str]:
        found = []
        for name, other in self.shared.items():
            left, right = self._shapes(name, other)
            # The number of rows of a vocabulary is judged by `_vocabulary_reasons`.
            if left != right and not (is_vocabulary(name) and alike_but_rows(left, right)):
                found.append(name)
        return [name for name in found if not is_buffer(self.left.tensors[name])]

    def shape_reasons(self, names: list[str]) -> list[Reason]:
        return [Reason("other_shapes", f"other shapes: {self._shown_shapes(names)}")] if names else []

    def part_remarks(self, names: list[str]) -> list[Reason]:
        """Of `unlike` ones that the selection leaves out."""
        keeper = f"{len(names)} tensors outside the language model have other shapes, and stay those of {self.words[0]}"
        return [Reason("other_parts", f"{keeper}: {self._shown_shapes(names)}")] if names else []

    def _shown_shapes(self, names: list[str]) -> str:
        shapes = [(name, *self._shapes(name, (self.shared | self.unlike)[name])) for name in names]
        return listed([f"{name} {list(left)} against {list(right)}" for name, left, right in shapes])

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
    stated = next((part[key] for part in parts for key in _QUANTISED if part.get(key)), None)
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


def is_buffer(info: TensorInfo) -> bool:
    if _FREQUENCIES.search(info.name) is not None:
        return True
    if _MASKED.search(info.name) is not None:
        return info.elements == 1
    return len(info.shape) == 4 and _MASK.search(info.name) is not None


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
