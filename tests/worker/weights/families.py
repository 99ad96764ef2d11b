"""Every kind of checkpoint that a graft meets, tiny: names, shapes, dtypes, layouts and values drawn by Hypothesis.

A `Recipe` says how to make three models of one lineage, so that a failing example prints in a few lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.worker.weights.made_checkpoints import Tensors, save_model

Shapes = dict[str, tuple[int, ...]]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Sizes:
    hidden: int = 4
    inner: int = 6
    #: Width of keys and values; smaller than `hidden` in grouped attention.
    kv: int = 2
    vocabulary: int = 8
    layers: int = 1
    experts: int = 2


class Family(NamedTuple):
    """A kind of model: its config, and its tensors by whether the scope `linear` takes them."""

    config: dict[str, Any]
    linear: Shapes
    rest: Shapes

    @property
    def shapes(self) -> Shapes:
        return {**self.rest, **self.linear}


def _layers(sizes: Sizes, one: Callable[[Sizes], Shapes], prefix: str = "model.layers") -> Shapes:
    return {f"{prefix}.{n}.{name}": shape for n in range(sizes.layers) for name, shape in one(sizes).items()}


def _with_biases(shapes: Shapes) -> Shapes:
    return shapes | {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}


def _attention(s: Sizes) -> Shapes:
    sides = {"q": (s.hidden, s.hidden), "k": (s.kv, s.hidden), "v": (s.kv, s.hidden), "o": (s.hidden, s.hidden)}
    return {f"self_attn.{side}_proj.weight": shape for side, shape in sides.items()}


def _mlp(s: Sizes) -> Shapes:
    parts = {"gate": (s.inner, s.hidden), "up": (s.inner, s.hidden), "down": (s.hidden, s.inner)}
    return {f"mlp.{part}_proj.weight": shape for part, shape in parts.items()}


def _norms(s: Sizes) -> Shapes:
    """And what models have of odd kinds: a scalar, and a tensor without elements."""
    return {"input_layernorm.weight": (s.hidden,), "layer_scalar": (), "empty": (0, s.hidden)}


def _decoder(s: Sizes, linear: Callable[[Sizes], Shapes], *, tied: bool, model_type: str, **config: Any) -> Family:
    rest = {
        "model.embed_tokens.weight": (s.vocabulary, s.hidden),
        **_layers(s, _norms),
        "model.norm.weight": (s.hidden,),
    }
    head = {} if tied else {"lm_head.weight": (s.vocabulary, s.hidden)}
    stated = {"hidden_size": s.hidden, "num_hidden_layers": s.layers, "vocab_size": s.vocabulary}
    return Family(
        {"model_type": model_type, "tie_word_embeddings": tied, **stated, **config}, _layers(s, linear), rest | head
    )


def _dense(s: Sizes) -> Family:
    return _decoder(s, lambda s: _attention(s) | _mlp(s), tied=False, model_type="llama")


def _tied_with_biases(s: Sizes) -> Family:
    return _decoder(s, lambda s: _with_biases(_attention(s)) | _mlp(s), tied=True, model_type="qwen2")


def _fused(s: Sizes) -> Family:
    def linear(s: Sizes) -> Shapes:
        return {
            "self_attn.qkv_proj.weight": (s.hidden + 2 * s.kv, s.hidden),
            "self_attn.o_proj.weight": (s.hidden, s.hidden),
            "mlp.gate_up_proj.weight": (2 * s.inner, s.hidden),
            "mlp.down_proj.weight": (s.hidden, s.inner),
        }

    return _decoder(s, linear, tied=False, model_type="phi3")


def _gpt2(s: Sizes) -> Family:
    """Weights stored as (in, out), and the causal mask that old files carry."""
    h, inner = s.hidden, 4 * s.hidden
    weights = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, inner), "mlp.c_proj": (inner, h)}

    def linear(_: Sizes) -> Shapes:
        return {f"{name}.{kind}": shape[cut:] for name, shape in weights.items() for kind, cut in _KINDS}

    rest = {
        "transformer.wte.weight": (s.vocabulary, h),
        "transformer.wpe.weight": (5, h),
        "transformer.ln_f.bias": (h,),
    }
    rest |= _layers(s, lambda s: {"ln_1.weight": (h,), "ln_1.bias": (h,)}, "transformer.h")
    config = {"model_type": "gpt2", "n_embd": h, "n_layer": s.layers, "vocab_size": s.vocabulary}
    return Family(config, _layers(s, linear, "transformer.h"), rest)


_KINDS = (("weight", 0), ("bias", 1))


def _experts(s: Sizes) -> Family:
    def linear(s: Sizes) -> Shapes:
        each = {name.removeprefix("mlp."): shape for name, shape in _mlp(s).items()}
        experts = {f"mlp.experts.{n}.{name}": shape for n in range(s.experts) for name, shape in each.items()}
        return _attention(s) | experts

    family = _decoder(s, linear, tied=False, model_type="qwen3_moe", num_experts=s.experts)
    routers = _layers(s, lambda s: {"mlp.gate.weight": (s.experts, s.hidden)})
    return family._replace(rest=family.rest | routers)


def _fused_experts(s: Sizes) -> Family:
    def linear(s: Sizes) -> Shapes:
        return _with_biases(_attention(s)) | {
            "mlp.experts.gate_up_proj": (s.experts, s.hidden, 2 * s.inner),
            "mlp.experts.gate_up_proj_bias": (s.experts, 2 * s.inner),
            "mlp.experts.down_proj": (s.experts, s.inner, s.hidden),
            "mlp.experts.down_proj_bias": (s.experts, s.hidden),
        }

    family = _decoder(s, linear, tied=False, model_type="gpt_oss", num_local_experts=s.experts)
    routers = _layers(s, lambda s: {"mlp.router.weight": (s.experts, s.hidden), "mlp.router.bias": (s.experts,)})
    return family._replace(rest=family.rest | routers)


def _vision(s: Sizes) -> Family:
    """A language model under a prefix, beside a vision tower whose linears have the same names."""
    text = _decoder(s, lambda s: _attention(s) | _mlp(s), tied=True, model_type="gemma3_text")
    tower = {f"vision_tower.encoder.layers.0.{name}": shape for name, shape in _attention(s).items()}
    rest = {f"language_model.{name}": shape for name, shape in text.rest.items()} | tower
    rest["multi_modal_projector.linear_1.weight"] = (s.hidden, 3)
    config = {"model_type": "gemma3", "tie_word_embeddings": True, "text_config": text.config}
    return Family(config, {f"language_model.{name}": shape for name, shape in text.linear.items()}, rest)


FAMILIES: dict[str, Callable[[Sizes], Family]] = {
    "dense": _dense,
    "tied, with biases": _tied_with_biases,
    "fused": _fused,
    "gpt2": _gpt2,
    "experts": _experts,
    "fused experts": _fused_experts,
    "vision": _vision,
}


class Layout(NamedTuple):
    """How one model lies in its folder."""

    shards: int = 1
    salt: int = 0
    misaligned: bool = False


class Dtypes(NamedTuple):
    base: torch.dtype
    tuned: torch.dtype
    instruct: torch.dtype


#: A base trained with float32 weights.
_TRAINED = Dtypes(BF16, F32, BF16)


class Models(NamedTuple):
    """Three folders, and what lies in them."""

    base: Tensors
    tuned: Tensors
    instruct: Tensors


ROLES = Models._fields


@dataclass(frozen=True)
class Recipe:
    family: str = "dense"
    sizes: Sizes = field(default_factory=Sizes)
    dtypes: Dtypes = _TRAINED
    layouts: tuple[Layout, Layout, Layout] = (Layout(), Layout(), Layout())
    #: A key of `_VALUES`.
    values: str = "ordinary"
    seed: int = 0

    @property
    def kind(self) -> Family:
        return FAMILIES[self.family](self.sizes)

    def models(self) -> Models:
        generator = torch.Generator().manual_seed(self.seed)
        made = Models({}, {}, {})
        small = F16 in self.dtypes  # else overflow is a matter of a test of its own
        for name, shape in self.kind.shapes.items():
            base, tuned, instruct = _VALUES[self.values](shape, generator, small)
            # Many elements that tuning left alone, and some that the instruct model has from base.
            tuned = torch.where(torch.rand(shape, generator=generator) < 0.25, base, tuned)
            instruct = torch.where(torch.rand(shape, generator=generator) < 0.125, base, instruct)
            for values, tensors, dtype in zip((base, tuned, instruct), made, self.dtypes, strict=True):
                tensors[name] = values.to(dtype)
        for tensors in made:  # never grafted; of an odd length, so that in a file by hand all others lie at odd places
            tensors["model.flags"] = torch.randint(0, 255, (3,), generator=generator, dtype=torch.uint8)
            tensors["model.position_ids"] = torch.randint(0, 255, (1, 2), generator=generator)
        return made

    def save(self, folder: Path, models: Models) -> Path:
        for role, tensors, layout in zip(ROLES, models, self.layouts, strict=True):
            save_as(folder / role, tensors, layout, self.kind.config)
        return folder

    def write(self, folder: Path) -> Models:
        """The models, which lie below `folder` from now on."""
        models = self.models()
        self.save(folder, models)
        return models


def save_as(folder: Path, tensors: Tensors, layout: Layout, config: dict[str, Any]) -> Path:
    return save_model(folder, tensors, **layout._asdict(), **{"hidden_size": None} | config)


# --- values -----------------------------------------------------------------------------------------------------------

Three = tuple[Tensor, Tensor, Tensor]


def _ordinary(shape: tuple[int, ...], generator: torch.Generator, _: bool) -> Three:
    """Weights as they are: both changes are small against them."""
    base = 0.02 * torch.randn(shape, generator=generator)
    return base, *(base + 1e-3 * torch.randn(shape, generator=generator) for _ in range(2))


def _integers(shape: tuple[int, ...], generator: torch.Generator, _: bool) -> Three:
    def draw() -> Tensor:
        return torch.randint(-128, 129, shape, generator=generator).float()

    return draw(), draw(), draw()


def _gaps(shape: tuple[int, ...], generator: torch.Generator, small: bool) -> Three:
    """Exponents from the smallest subnormal on, zeros of both signs; no sum of three overflows."""
    low, high = (-26, 12) if small else (-151, 120)

    def draw() -> Tensor:
        exponents = torch.randint(low, high, shape, generator=generator)
        fractions = 1 + torch.rand(shape, generator=generator)
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        values = signs * torch.ldexp(fractions, exponents)
        return torch.where(torch.rand(shape, generator=generator) < 0.125, signs * 0.0, values)

    return draw(), draw(), draw()


def _few(shape: tuple[int, ...], generator: torch.Generator, small: bool) -> Three:
    """Every meeting of zeros of both signs, ones and the smallest number of bfloat16 or float16."""
    least = 2.0**-24 if small else 2.0**-133
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, least, -least])

    def draw() -> Tensor:
        return values[torch.randint(0, len(values), shape, generator=generator)]

    return draw(), draw(), draw()


_VALUES: dict[str, Callable[[tuple[int, ...], torch.Generator, bool], Three]] = {
    "ordinary": _ordinary,
    "integers": _integers,
    "gaps": _gaps,
    "few": _few,
}

# --- strategies -------------------------------------------------------------------------------------------------------

dimensions = st.sampled_from([1, 2, 3, 4, 7, 16, 33, 129])
sizes = st.builds(
    Sizes, dimensions, dimensions, st.sampled_from([1, 2, 3]), dimensions, st.integers(1, 3), st.integers(1, 3)
)
layouts = st.builds(Layout, st.sampled_from([1, 2, 3, 40]), st.integers(0, 9), st.booleans())
one_dtype = st.sampled_from([BF16, F32, F16])
dtypes = st.builds(Dtypes, one_dtype, one_dtype, one_dtype)
same_dtypes = one_dtype.map(lambda dtype: Dtypes(dtype, dtype, dtype))


def recipes(**fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Recipe]:
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "family": st.sampled_from(list(FAMILIES)),
        "sizes": sizes,
        "dtypes": dtypes,
        "layouts": st.tuples(layouts, layouts, layouts),
        "values": st.sampled_from(list(_VALUES)),
        "seed": st.integers(0, 2**32),
    }
    return st.builds(Recipe, **drawn | fixed)


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern is as likely as any other, but one in four is all ones in the exponent: NaN or infinity."""
    generator = torch.Generator().manual_seed(seed)
    word = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = torch.randint(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1), shape, generator=generator)
    infinite = torch.full((), float("inf"), dtype=dtype).view(word).long()
    special = torch.rand(shape, generator=generator) < 0.25
    return torch.where(special, bits | infinite, bits).to(word).view(dtype)
