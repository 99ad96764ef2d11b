"""The laws of the graft, on real files."""

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidInput, PairRefused
from tests.worker.weights.made_checkpoints import NAMES, SHAPES, cast, draw, load_model, same_bits, save_model
from worker.weights import FullDelta, graft, tensors

LINEARS = {name for name in SHAPES if "_proj" in name}
Q = "model.layers.0.self_attn.q_proj.weight"

bits16 = st.integers(0, 2**16 - 1)
finite16 = bits16.filter(lambda bits: bits & 0x7F80 != 0x7F80)  # bfloat16 with an exponent below all ones


def from_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.fixture
def pair(tmp_path):
    """An instruct model near its base, and the base tuned; the tuned one in float32."""
    base = cast(draw(0))
    moved = draw(1, std=0.05)
    tuned = {name: base[name].float() + moved[name] for name in base}
    instruct = cast({name: base[name].float() + 0.1 * delta for name, delta in draw(2).items()})
    save_model(tmp_path / "base", base)
    save_model(tmp_path / "tuned", tuned)
    save_model(tmp_path / "instruct", instruct, shards=3)
    return tmp_path


def run(folder: Path, *, out: str = "out", scale: float = 1.0, scope: str = "linear", **options: Any):
    delta = FullDelta(base=folder / "base", tuned=folder / "tuned")
    places = {"instruct": folder / "instruct", "out": folder / out}
    return graft(**places, delta=delta, scale=scale, scope=scope, names=NAMES, **options)


def test_the_graft_is_instruct_plus_scale_times_delta_rounded_once(pair):
    run(pair, scale=0.7, scope="all")
    base, tuned, instruct, out = (load_model(pair / each) for each in ("base", "tuned", "instruct", "out"))
    for name in SHAPES:
        exact = instruct[name].float() + (tuned[name] - base[name].float()) * 0.7
        assert same_bits(out[name], exact.to(torch.bfloat16))


def test_scope_linear_leaves_every_other_byte(pair):
    result = run(pair)
    instruct, out = load_model(pair / "instruct"), load_model(pair / "out")
    assert {name for name in SHAPES if not same_bits(out[name], instruct[name])} == LINEARS
    assert (result.grafted, result.copied) == (3, 2)


def test_the_change_that_the_scope_discards_is_measured(pair):
    result = run(pair, scale=0.5)
    base, tuned = load_model(pair / "base"), load_model(pair / "tuned")
    squares = {name: float((tuned[name] - base[name].float()).double().square().sum()) for name in SHAPES}
    outside = sum(squares[name] for name in SHAPES if name not in LINEARS)
    assert result.discarded_share == pytest.approx((outside / sum(squares.values())) ** 0.5, rel=1e-5)
    assert run(pair, out="other", scope="all").discarded_share == 0


def whole_norm(model: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in model.values()]).norm())


def test_fidelity_is_the_share_of_the_update_that_is_stored(pair):
    result = run(pair, scope="all")
    base, tuned, instruct, out = (load_model(pair / each) for each in ("base", "tuned", "instruct", "out"))
    updates = {name: tuned[name].double() - base[name].double() for name in SHAPES}
    errors = {name: out[name].double() - instruct[name].double() - updates[name] for name in SHAPES}
    kept = {name: 1 - float(errors[name].norm() / updates[name].norm()) for name in SHAPES}
    whole = (
        1
        - torch.cat([e.flatten() for e in errors.values()]).norm()
        / torch.cat([u.flatten() for u in updates.values()]).norm()
    )
    assert result.fidelity == pytest.approx(float(whole), abs=1e-5)
    assert result.worst_tensor == min(kept, key=kept.__getitem__)
    assert result.worst_fidelity == pytest.approx(min(kept.values()), abs=1e-5)


def test_the_rounding_of_a_float32_output_is_seen_too(tmp_path):
    save_model(tmp_path / "instruct", {Q: torch.full((4, 4), 1.0)})
    save_model(tmp_path / "base", {Q: torch.zeros(4, 4)})
    save_model(tmp_path / "tuned", {Q: torch.full((4, 4), 2.0**-25)})  # a quarter of 1.0's last place
    assert run(tmp_path).fidelity == 0


@settings(max_examples=25, deadline=None)
@given(bits=st.lists(bits16, min_size=16, max_size=16), scale=st.sampled_from([0.0, 1.0, -2.5]))
def test_a_zero_update_gives_instruct_bit_for_bit(tmp_path_factory, bits, scale):
    """Any bit pattern: NaN with payload, infinities, -0.0, subnormals. Tuned equals base unless the scale is zero."""
    folder = tmp_path_factory.mktemp("zero")
    save_model(folder / "instruct", {Q: from_bits(bits).view(4, 4)})
    save_model(folder / "base", {Q: torch.ones(4, 4)})
    save_model(folder / "tuned", {Q: torch.full((4, 4), 1.0 if scale else 3.0)})
    result = run(folder, scale=scale)
    written = (folder / "out" / "model.safetensors").read_bytes()
    assert written == (folder / "instruct" / "model.safetensors").read_bytes()
    assert (result.grafted, result.fidelity, result.worst_tensor) == (0, 1.0, None)


def test_single_elements_without_an_update_keep_their_bits(tmp_path):
    kept = torch.tensor([[-0.0, float("nan"), float("-inf"), 1.0]] * 4, dtype=torch.bfloat16)
    save_model(tmp_path / "instruct", {Q: kept})
    save_model(tmp_path / "base", {Q: torch.zeros(4, 4)})
    save_model(tmp_path / "tuned", {Q: torch.tensor([[0.0, 0.0, 0.0, 1.0]] * 4)})
    result = run(tmp_path)
    out = load_model(tmp_path / "out")[Q]
    assert same_bits(out[:, :3], kept[:, :3])
    assert out[:, 3].tolist() == [2.0] * 4
    assert (result.grafted, result.fidelity) == (1, 1.0)


@settings(max_examples=25, deadline=None)
@given(
    start=st.lists(st.integers(-128, 128), min_size=16, max_size=16),
    end=st.lists(st.integers(-128, 128), min_size=16, max_size=16),
)
def test_grafting_onto_base_itself_gives_the_tuned_model(tmp_path_factory, start, end):
    folder = tmp_path_factory.mktemp("identity")
    base, tuned = (torch.tensor(values, dtype=torch.bfloat16).view(4, 4) for values in (start, end))
    save_model(folder / "instruct", {Q: base})
    save_model(folder / "base", {Q: base})
    save_model(folder / "tuned", {Q: tuned})
    run(folder)
    assert torch.equal(load_model(folder / "out")[Q], tuned)


@pytest.mark.parametrize("chunk", [1, 5, 7, 1 << 20])
def test_neither_shards_nor_chunks_change_a_bit(pair, monkeypatch, chunk):
    run(pair, out="reference", scope="all")
    single = load_model(pair / "instruct")
    for file in (pair / "instruct").iterdir():
        file.unlink()
    (pair / "instruct").rmdir()
    save_model(pair / "instruct", single)
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", chunk)
    run(pair, scope="all")
    reference, out = load_model(pair / "reference"), load_model(pair / "out")
    assert all(same_bits(out[name], reference[name]) for name in SHAPES)


def test_shards_headers_and_index_are_instructs_own(pair):
    run(pair)
    for file in sorted((pair / "instruct").glob("*.safetensors")):
        original, copy = file.read_bytes(), (pair / "out" / file.name).read_bytes()
        header = 8 + int.from_bytes(original[:8], "little")
        assert copy[:header] == original[:header]
        assert len(copy) == len(original)
    index = "model.safetensors.index.json"
    assert (pair / "out" / index).read_bytes() == (pair / "instruct" / index).read_bytes()


def test_a_float32_base_leaves_instructs_dtype(pair):
    run(pair, scope="all")
    assert {tensor.dtype for tensor in load_model(pair / "out").values()} == {torch.bfloat16}


def test_tensors_of_other_kinds_are_copied(tmp_path):
    rest = {"model.ids": torch.arange(3), "model.empty": torch.empty(0, 4), "model.step": torch.tensor(7.0)}
    for each, value in {"instruct": 1.0, "base": 0.0, "tuned": 1.0}.items():
        save_model(tmp_path / each, {Q: torch.full((4, 4), value), **rest})
    run(tmp_path, scope="all")
    out = load_model(tmp_path / "out")
    assert all(same_bits(out[name], tensor) for name, tensor in rest.items())
    assert torch.equal(out[Q], torch.full((4, 4), 2.0))


def test_a_tied_head_stored_by_instruct_follows_the_embedding(tmp_path):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    both = {name: torch.ones(8, 4) for name in (embedding, head)}
    save_model(tmp_path / "instruct", both)
    save_model(tmp_path / "base", {embedding: torch.ones(8, 4)})
    save_model(tmp_path / "tuned", {embedding: torch.full((8, 4), 3.0)})
    run(tmp_path, scope="all")
    out = load_model(tmp_path / "out")
    assert torch.equal(out[head], torch.full((8, 4), 3.0))
    assert torch.equal(out[head], out[embedding])


def test_small_files_are_carried_and_other_weights_are_not(pair):
    carried = (
        "generation_config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "spiece.model",
    )
    stray = ("adapter_config.json", "adapter_model.safetensors", "consolidated.safetensors", "pytorch_model.bin")
    other = ("pytorch_model.bin.index.json", "training.pt", "README.md", ".gitattributes", "shadow.json")
    for name in (*carried, *stray, *other):
        (pair / "instruct" / name).write_text(name)
    (pair / "instruct" / "additional_chat_templates").mkdir()
    (pair / "instruct" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    run(pair)
    out = pair / "out"
    assert all((out / name).read_text() == name for name in carried)
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert not [name for name in (*stray, *other[:-1]) if (out / name).exists()]
    assert json.loads((out / "shadow.json").read_text())["pair"] == "tiny"


def test_shadow_json_tells_the_origin_and_no_path(pair):
    result = run(pair, scale=0.5)
    text = (pair / "out" / "shadow.json").read_text()
    shadow = json.loads(text)
    assert str(pair) not in text
    assert (shadow["instruct"], shadow["base"], shadow["tuned"]) == ("o/instruct@c1", "o/base@c2", "run 1")
    assert shadow["options"] == {"scale": 0.5, "scope": "linear", "delta": "full"}
    assert (shadow["fidelity"], shadow["grafted"]) == (result.fidelity, 3)
    assert shadow["versions"]["torch"] == torch.__version__


def test_the_manifest_names_every_other_file_with_its_hash(pair):
    result = run(pair)
    files = json.loads((pair / "out" / "manifest.json").read_text())["files"]
    on_disk = {path.name: path.read_bytes() for path in (pair / "out").iterdir()}
    assert files.keys() == on_disk.keys() - {"manifest.json"}
    for name, record in files.items():
        expected = {"bytes": len(on_disk[name]), "sha256": hashlib.sha256(on_disk[name]).hexdigest()}
        assert record == expected
    assert result.bytes == sum(map(len, on_disk.values()))


def test_modes_follow_the_umask(pair):
    for file in (pair / "instruct").iterdir():
        file.chmod(0o600)  # as safetensors saves
    old = os.umask(0o027)
    try:
        run(pair)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (pair / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((pair / "out").stat().st_mode) == 0o750


def test_progress_counts_every_tensor(pair):
    seen = []
    run(pair, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 5) for done in range(1, 6)]


def test_the_number_of_threads_is_put_back(pair):
    before = torch.get_num_threads()
    run(pair)
    assert torch.get_num_threads() == before


# --- refusals and failures --------------------------------------------------------------------------------------------


def refused(pair: Path, **options: Any) -> InvalidInput:
    """Refused, and nothing but the three sources is left."""
    with pytest.raises(InvalidInput) as refusal:
        run(pair, **options)
    assert {path.name for path in pair.iterdir()} == {"base", "tuned", "instruct"}
    return refusal.value


@pytest.mark.parametrize("out", ["instruct", "base", "tuned", "instruct/out"])
def test_a_source_is_never_written(pair, out):
    assert refused(pair, out=out).param == "out"


def test_a_taken_place_is_refused_and_kept(pair):
    (pair / "out").mkdir()
    with pytest.raises(InvalidInput, match="exists already"):
        run(pair)
    assert (pair / "out").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_refused(pair, scale):
    assert refused(pair, scale=scale).param == "scale"


def test_a_diverged_tuning_is_refused(pair):
    tuned = load_model(pair / "tuned")
    tuned[Q][0, 0] = float("nan")
    (pair / "tuned" / "config.json").unlink()
    (pair / "tuned" / "model.safetensors").unlink()
    (pair / "tuned").rmdir()
    save_model(pair / "tuned", tuned)
    assert refused(pair).code == "not_finite"


def test_another_pair_is_refused_with_all_reasons(tmp_path):
    save_model(tmp_path / "instruct", cast(draw(0)))
    save_model(tmp_path / "base", cast(draw(1)) | {Q: torch.zeros(4, 5)}, model_type="llama")
    save_model(tmp_path / "tuned", draw(2))
    error = refused(tmp_path)
    assert isinstance(error, PairRefused)
    assert len(error.reasons) == 2


def test_a_tuned_model_that_lost_a_tensor_is_refused(tmp_path):
    lost = draw(2)
    del lost[Q]
    for each, content in {"instruct": cast(draw(0)), "base": cast(draw(1)), "tuned": lost}.items():
        save_model(tmp_path / each, content)
    assert "missing in tuned base" in refused(tmp_path).message


def test_a_failure_on_the_way_leaves_nothing(pair):
    def fail(done: int, total: int) -> None:
        if done == 3:
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        run(pair, on_progress=fail)
    assert {path.name for path in pair.iterdir()} == {"base", "tuned", "instruct"}


def test_a_killed_graft_leaves_nothing_at_out(pair):
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from worker.weights import FullDelta, Provenance, graft
        folder = Path(sys.argv[1])
        graft(instruct=folder / "instruct", delta=FullDelta(folder / "base", folder / "tuned"), out=folder / "out",
              scale=1.0, scope="linear", names=Provenance(instruct="i", base="b", tuned="t"),
              on_progress=lambda done, total: done == total and os.kill(os.getpid(), signal.SIGKILL))
    """)
    done = subprocess.run([sys.executable, "-c", program, str(pair)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (pair / "out").exists()
