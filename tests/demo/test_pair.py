import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import pair
from demo.pair import PairPaths, PairRecipe, build_pair

SHORT = PairRecipe(base_steps=2, instruct_steps=2, rows_per_step=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> PairPaths:
    return build_pair(tmp_path_factory.mktemp("demo") / "pair", recipe=SHORT)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(path.read_text())
    return loaded


def test_base_has_no_chat_template_and_another_eos(built: PairPaths) -> None:
    base, instruct = (AutoTokenizer.from_pretrained(folder) for folder in (built.base, built.instruct))
    assert base.chat_template is None
    assert (base.eos_token, instruct.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert base.pad_token == instruct.pad_token == "<|endoftext|>"
    assert read_json(built.base / "config.json")["eos_token_id"] == base.eos_token_id
    assert read_json(built.instruct / "config.json")["eos_token_id"] == instruct.eos_token_id
    assert read_json(built.instruct / "generation_config.json")["eos_token_id"] == [
        instruct.eos_token_id,
        base.eos_token_id,
    ]


@pytest.mark.parametrize(("name", "dtype"), [("base", "F32"), ("instruct", "BF16")])
def test_weights_are_sharded_and_tied(built: PairPaths, name: str, dtype: str) -> None:
    folder = built.base.parent / name
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (folder / "model.safetensors.index.json").exists()
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert "lm_head.weight" not in opened.keys()  # noqa: SIM118
            assert {opened.get_slice(key).get_dtype() for key in opened.keys()} == {dtype}  # noqa: SIM118


def test_models_load_as_any_other_and_differ(built: PairPaths) -> None:
    base, instruct = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (built.base, built.instruct)
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert base.config.model_type == "qwen3"
    assert not torch.equal(base.get_parameter(name), instruct.get_parameter(name))


@pytest.mark.parametrize("text", ["rev abcd", "Grüße, 世界 🦀\n", "user assistant system"])
def test_tokenizers_agree_and_any_text_survives(built: PairPaths, text: str) -> None:
    base, instruct = (AutoTokenizer.from_pretrained(folder) for folder in (built.base, built.instruct))
    assert base(text)["input_ids"] == instruct(text)["input_ids"]
    assert instruct.decode(instruct(text)["input_ids"]) == text


def test_words_of_the_language_are_one_token_per_letter() -> None:
    assert len(pair.make_tokenizer().encode("abcdefghij").ids) == 10


def test_template_renders_what_instruct_was_trained_on(built: PairPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.instruct)
    question = [{"role": "user", "content": "rev abc"}]
    rendered = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "<cba>!"}], tokenize=False)
    opening = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert rendered == pair.chat_text("rev abc", "<cba>!")
    assert str(rendered).startswith(str(opening))


def test_same_seed_gives_the_same_bytes_and_another_seed_others(built: PairPaths, tmp_path: Path) -> None:
    again = build_pair(tmp_path / "again", recipe=SHORT)
    other = build_pair(tmp_path / "other", recipe=SHORT, seed=1)
    assert contents(again.base.parent) == contents(built.base.parent)
    assert contents(other.instruct) != contents(built.instruct)


def test_made_pair_is_reused(built: PairPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "_make", lambda *arguments: pytest.fail("made again"))
    assert build_pair(built.base.parent, recipe=SHORT) == built


def test_pair_of_another_recipe_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    before = contents(build_pair(folder, recipe=SHORT).instruct)
    after = contents(build_pair(folder, recipe=SHORT, seed=1).instruct)
    assert before != after
    assert list(tmp_path.iterdir()) == [folder]


def stop_in_instruct(phase: str, step: int, total_steps: int, loss: float) -> None:
    if phase == "instruct":
        raise KeyboardInterrupt


def test_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_pair(tmp_path / "pair", recipe=SHORT, on_progress=stop_in_instruct)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_other_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="other than a demo pair"):
        build_pair(tmp_path, recipe=SHORT)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_progress_names_phase_step_and_total(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_pair(
        tmp_path / "pair",
        recipe=SHORT,
        on_progress=lambda phase, step, total_steps, loss: seen.append((phase, step, total_steps)),
    )
    assert seen == [("base", 2, 2), ("instruct", 2, 2)]
