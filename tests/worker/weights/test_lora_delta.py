"""LoRA against PEFT itself: the same adapter, merged by both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from core.errors import PairRefused
from tests.worker.weights.made_checkpoints import NAMES, load_model, same_bits
from worker.weights import LoraDelta, graft

#: PEFT 0.21 asks transformers 5 by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
#: Largest difference from PEFT's float32 merge; measured: 0. Both round `W + scaling * (B @ A)` in the same order,
#: but another build of torch may sum the products of `B @ A` in another one.
TOLERANCE = 1e-7


def save_instruct(folder: Path, dtype: torch.dtype, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**TINY)).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def save_adapter(folder: Path, **options: Any) -> Path:
    """An adapter trained on another model of the shape: its factors are drawn, none is zero."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options
    model = get_peft_model(Qwen3ForCausalLM(Qwen3Config(**TINY)), LoraConfig(**settings))
    model.save_pretrained(folder)
    return folder


def merge_by_peft(instruct: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*down_proj": 3}},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_graft_equals_pefts_merge_in_float32(tmp_path, options):
    instruct = save_instruct(tmp_path / "instruct", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", **options)
    graft(instruct=instruct, delta=LoraDelta(adapter), out=tmp_path / "out", scale=1.0, scope="linear", names=NAMES)
    merged, out = merge_by_peft(instruct, adapter), load_model(tmp_path / "out")
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=TOLERANCE)
    assert any(not torch.equal(out[name], tensor) for name, tensor in load_model(instruct).items())


def test_a_bfloat16_graft_is_the_float32_merge_rounded_once(tmp_path):
    instruct = save_instruct(tmp_path / "instruct", torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter")
    result = graft(
        instruct=instruct, delta=LoraDelta(adapter), out=tmp_path / "out", scale=1.0, scope="all", names=NAMES
    )
    merged, out = merge_by_peft(instruct, adapter), load_model(tmp_path / "out")
    assert all(same_bits(tensor, merged[name].to(torch.bfloat16)) for name, tensor in out.items())
    assert (result.grafted, result.discarded_share) == (14, 0)


def test_transformers_loads_the_result_and_it_answers(tmp_path):
    instruct = save_instruct(tmp_path / "instruct", torch.float32)
    adapter = save_adapter(tmp_path / "adapter")
    graft(instruct=instruct, delta=LoraDelta(adapter), out=tmp_path / "out", scale=1.0, scope="linear", names=NAMES)
    ids = torch.arange(6).view(1, 6)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(instruct, dtype=torch.float32), adapter)
    grafted = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(grafted(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_weight_stored_as_in_out_takes_the_transposed_product(tmp_path):
    """GPT-2's Conv1D: PEFT sets fan_in_fan_out for it and merges the transpose."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    model.save_pretrained(tmp_path / "instruct")
    options = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False, fan_in_fan_out=True)
    get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    delta = LoraDelta(tmp_path / "adapter")
    graft(instruct=tmp_path / "instruct", delta=delta, out=tmp_path / "out", scale=1.0, scope="linear", names=NAMES)
    merged, out = merge_by_peft(tmp_path / "instruct", tmp_path / "adapter"), load_model(tmp_path / "out")
    for name, tensor in out.items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=TOLERANCE)


def test_a_dora_adapter_is_refused_before_anything_is_written(tmp_path):
    instruct = save_instruct(tmp_path / "instruct", torch.float32)
    adapter = save_adapter(tmp_path / "adapter", use_dora=True, init_lora_weights=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"]
    with pytest.raises(PairRefused, match="DoRA"):
        graft(instruct=instruct, delta=LoraDelta(adapter), out=tmp_path / "out", scale=1.0, scope="all", names=NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"instruct", "adapter"}
