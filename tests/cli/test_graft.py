"""`shadowft graft` on tiny models: in this process, which has torch already, and in children where that matters."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pytest
import torch

from cli.__main__ import main as start
from cli.main import main
from core.graft_plan import Selection
from tests.worker.weights.families import Layout, Recipe, Sizes
from tests.worker.weights.made_checkpoints import all_bytes, draw, load_model, save_model
from worker.weights import FullDelta, GraftResult, LoraDelta, SavedDelta, graft
from worker.weights.kernels import compile_all

ROOT = Path(__file__).parents[2]
SOURCES = {"base", "tuned", "instruct"}
RECIPE = Recipe("tied, with biases", layouts=(Layout(), Layout(2), Layout(3)))
FULL = ("--base", "base", "--tuned", "tuned")
ONTO = ("--instruct", "instruct", "--out", "out")
#: What no result says, since it depends on the machine.
CHANCE = {"seconds"}


class Done(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of three models, which is the working folder too."""
    RECIPE.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shadowft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`shadowft graft …` as the console script runs it, without a process of its own."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["shadowft", "graft", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return Done(ended.value.code, *capsys.readouterr())

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def library(folder: Path, **options: Any) -> GraftResult:
    """The same by the library, in `expected`."""
    full = FullDelta(folder / "base", folder / "tuned")
    return graft(**{"instruct": folder / "instruct", "out": folder / "expected", "delta": full} | options)


def weights(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in all_bytes(folder).items() if name.endswith(".safetensors")}


def facts(result: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({name: value for name, value in result.items() if name not in CHANCE}))


def rewrite(file: Path, change: Callable[[bytearray], None]) -> None:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)


def flip(content: bytearray) -> None:
    content[-1] ^= 1


def save_small_adapter(folder: Path, name: str, rows: int, columns: int) -> Path:
    """Of rank 1, on one linear."""
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    factors = {f"{stem}.lora_A.weight": torch.full((1, columns), 0.5), f"{stem}.lora_B.weight": torch.ones(rows, 1)}
    save_model(folder, factors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [name.split(".")[-2]]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# --- what it makes ----------------------------------------------------------------------------------------------------


def test_a_graft_is_that_of_the_library_and_is_told_in_a_few_lines(pair, shadowft, monkeypatch):
    monkeypatch.setenv("HOME", str(pair))
    expected = library(pair, scale=-0.5, selection=Selection("all"), output_dtype="float32")
    done = shadowft(
        "--base=~/base", "--tuned=~/tuned", *ONTO, "--scale", "-0.5", "--scope", "all", "--output-dtype", "float32"
    )
    assert (done.status, done.err) == (0, "")
    assert weights(pair / "out") == weights(pair / "expected")
    lines = done.out.splitlines()
    assert lines[0] == "out"
    assert f"{expected.grafted} grafted, {expected.copied} copied" in lines[1]
    assert f"{expected.fidelity:.4f}" in done.out
    assert str(expected.worst_tensor) in done.out
    assert names(pair) == SOURCES | {"out", "expected"}
    shadow = json.loads((pair / "out" / "shadow.json").read_bytes())
    assert {role: source["path"] for role, source in shadow["sources"].items()} == {
        role: f"../{role}" for role in SOURCES
    }


def test_every_figure_comes_as_json(pair, shadowft):
    selection = Selection("linear", include=("*_proj.*", "model.norm.*"), exclude=("*.q_proj.*", "*.bias"))
    expected = library(pair, selection=selection)
    patterns = [f"--{kind}={one}" for kind in ("include", "exclude") for one in getattr(selection, kind)]
    done = shadowft(*FULL, *ONTO, *patterns, "--json", "--hash-sources", "--threads", 1)
    assert facts(json.loads(done.out)) | {"bytes": 0} == facts(asdict(expected)) | {"bytes": 0}
    sources = json.loads((pair / "out" / "shadow.json").read_bytes())["sources"]
    assert all(file["sha256"] for source in sources.values() for file in source["files"].values())


def test_an_adapter_is_grafted_with_and_without_its_base(pair, shadowft):
    name = next(name for name in RECIPE.kind.linear if name.endswith("q_proj.weight"))
    adapter = save_small_adapter(pair / "adapter", name, *RECIPE.kind.linear[name])
    library(pair, delta=LoraDelta(adapter))
    assert "cosine" not in shadowft("--adapter", "adapter", *ONTO).out
    done = shadowft("--adapter", adapter, "--base", "base", "--instruct", "instruct", "--out", "with base")
    assert "cosine" in done.out
    assert "1 grafted" in done.out
    assert weights(pair / "out") == weights(pair / "with base") == weights(pair / "expected")


def test_a_delta_is_kept_alone_or_beside_a_model_and_grafted_later(pair, shadowft):
    alone = shadowft(*FULL, "--delta-out", "delta")
    assert (alone.status, alone.err, alone.out.splitlines()[0]) == (0, "", "delta")
    both = shadowft(*FULL, *ONTO, "--delta-out", "beside", "--json")
    told = json.loads(both.out)
    assert told["delta"]["tensors"] == len(load_model(pair / "delta")) == len(RECIPE.kind.shapes)
    assert told["fidelity"] == library(pair, delta=SavedDelta(pair / "delta")).fidelity
    assert weights(pair / "delta") == weights(pair / "beside")
    later = shadowft("--delta", "beside", "--instruct", "instruct", "--out", "later")
    assert later.status == 0
    assert weights(pair / "later") == weights(pair / "expected") == weights(pair / "out")
    assert json.loads(shadowft(*FULL, "--delta-out", "again", "--json").out).keys() == {"tensors", "bytes", "seconds"}


def test_without_the_report_there_are_weights_and_no_figures(pair, shadowft):
    library(pair)
    done = shadowft(*FULL, *ONTO, "--no-report")
    assert "not measured" in done.out
    assert weights(pair / "out") == weights(pair / "expected")
    manifest = json.loads((pair / "out" / "manifest.json").read_bytes())
    assert {record["sha256"] for name, record in manifest["files"].items() if name.endswith(".safetensors")} == {None}


def test_a_low_fidelity_is_warned_of_with_what_helps(tmp_path, shadowft, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = draw(0)
    tuned = {name: tensor + 1e-4 for name, tensor in base.items()}
    instruct = {name: tensor.to(torch.bfloat16) for name, tensor in base.items()}
    for name, model in {"base": base, "tuned": tuned, "instruct": instruct}.items():
        save_model(tmp_path / name, model)
    done = shadowft(*FULL, *ONTO, "--json")
    fidelity = json.loads(done.out)["fidelity"]
    assert fidelity < 0.9
    assert done.status == 0
    assert f"{fidelity:.4f}" in done.err
    assert "float32" in done.err
    assert shadowft(*FULL, "--instruct", "instruct", "--out", "wide", "--output-dtype", "float32").err == ""


def test_a_folder_of_the_hubs_cache_tells_its_repository_and_commit(pair, shadowft):
    commit = "c0ffee" + 34 * "0"
    cache = pair / "models--Owner--Some-Base" / "snapshots"
    cache.mkdir(parents=True)
    (pair / "base").rename(cache / commit)
    assert shadowft("--base", cache / commit, "--tuned", "tuned", *ONTO).status == 0
    sources = json.loads((pair / "out" / "shadow.json").read_bytes())["sources"]
    assert (sources["base"]["name"], sources["base"]["revision"]) == ("Owner/Some-Base", commit)
    assert sources["instruct"]["name"] == "instruct"


# --- what it only says ------------------------------------------------------------------------------------------------


def test_a_plan_says_what_would_be_done_and_writes_nothing(pair, shadowft):
    planned = shadowft(*FULL, *ONTO, "--plan")
    told = json.loads(shadowft(*FULL, "--instruct", "instruct", "--plan", "--json").out)
    assert names(pair) == SOURCES
    done = json.loads(shadowft(*FULL, *ONTO, "--json").out)
    assert (told["grafted"], told["copied"]) == (done["grafted"], done["copied"])
    assert f"{told['grafted']} to graft, {told['copied']} to copy" in planned.out
    assert told["bytes"] == sum(map(len, weights(pair / "out").values()))
    assert told["files"] == 3
    assert told["discarded"] > 0


def test_an_untouched_result_is_verified_wherever_its_sources_lie(pair, shadowft):
    shadowft(*FULL, *ONTO)
    done = shadowft("--verify", "out")
    assert (done.status, done.err) == (0, "")
    told = json.loads(shadowft("--verify", "out", "--all", "--json").out)
    assert told["tensors"] == told["tensors_in_all"] == len(load_model(pair / "out"))
    assert f"of {told['tensors_in_all']} made again" in done.out
    (pair / "tuned").rename(pair / "moved")
    lost = shadowft("--verify", "out")
    assert (lost.status, lost.out) == (1, "")
    assert "--tuned FOLDER" in lost.err
    assert shadowft("--verify", "out", "--tuned", "moved").status == 0


@pytest.mark.parametrize("place", ["out/model-00002-of-00003.safetensors", "out/config.json", "tuned"])
def test_one_changed_byte_is_found_and_named(pair, shadowft, place):
    shadowft(*FULL, *ONTO, "--scope", "all")
    file = pair / place
    if file.is_dir():  # the file's last tensor is one of the grafted ones: integers come before it
        file = max(file.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    rewrite(file, flip)
    done = shadowft("--verify", "out", "--all")
    assert done.status == 1
    assert "out is not as it was made" in done.out
    problems = done.err.splitlines()
    assert len(problems) == 1
    assert problems[0].startswith("shadowft: ")
    assert place.rpartition("/")[2] in problems[0] or "is not what its sources give" in problems[0]
    assert json.loads(shadowft("--verify", "out", "--all", "--json").out)["problems"] == [
        problems[0].removeprefix("shadowft: ")
    ]


def test_a_result_that_does_not_say_where_its_sources_lie_is_checked_by_its_files(pair, shadowft):
    """As every published one."""
    library(pair)
    done = shadowft("--verify", "expected")
    assert done.status == 0
    assert "expected is as it was made." in done.out
    assert "none made again" in done.out
    assert done.err.startswith("shadowft: No tensor was made again: ")
    assert "--instruct FOLDER --base FOLDER --tuned FOLDER" in done.err
    assert json.loads(shadowft("--verify", "expected", "--json").out)["unmade"] in done.err
    for more in (("--all",), ("--base", "base", "--instruct", "instruct")):
        refused = shadowft("--verify", "expected", *more)
        assert (refused.status, refused.out) == (1, "")
        assert "is not told" in refused.err
    given = ("--base", "base", "--tuned", "tuned", "--instruct", "instruct")
    assert (shadowft("--verify", "expected", *given).err, shadowft("--verify", "expected", *given).status) == ("", 0)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_are_refused_with_every_reason(pair, shadowft):
    config = pair / "instruct" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama", "hidden_size": 5}))
    before = all_bytes(pair)
    for arguments in ((*ONTO, "--delta-out", "delta"), (*ONTO, "--json"), ("--instruct", "instruct", "--plan")):
        done = shadowft(*FULL, *arguments)
        first, *reasons = done.err.splitlines()
        assert (done.status, done.out) == (1, "")
        assert first == "shadowft: these models cannot be grafted:"
        assert len(reasons) >= 2
        assert all(reason.startswith("- ") for reason in reasons)
        assert "llama" in done.err
        assert names(pair) == SOURCES
    assert all_bytes(pair) == before


def is_there(folder: Path) -> None:
    (folder / "out").mkdir()


def is_a_dangling_link(folder: Path) -> None:
    (folder / "out").symlink_to("nowhere")


def cut_a_shard(folder: Path) -> None:
    rewrite(folder / "tuned" / "model-00001-of-00002.safetensors", lambda content: content.pop())


def make_the_parent_a_file(folder: Path) -> None:
    (folder / "file").write_text("")


DAMAGE = {
    "out is there": (is_there, ONTO, ("out exists already", "does not exist yet")),
    "out is a dangling link": (is_a_dangling_link, ONTO, ("out exists already",)),
    "a cut shard": (cut_a_shard, ONTO, ("tuned/model-00001-of-00002.safetensors is damaged",)),
    "out below a file": (make_the_parent_a_file, ("--instruct", "instruct", "--out", "file/out"), ("file",)),
    "an endless scale": (lambda folder: None, (*ONTO, "--scale", "inf"), ("scale is inf", "finite")),
    "a pattern without a match": (lambda folder: None, (*ONTO, "--include", "*.q_prj.*"), ("q_prj",)),
}


@pytest.mark.parametrize(("damage", "arguments", "said"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_goes_wrong_is_a_sentence_and_leaves_nothing(pair, shadowft, damage, arguments, said):
    damage(pair)
    before = names(pair)
    done = shadowft(*FULL, *arguments)
    assert (done.status, done.out) == (1, "")
    assert all(word in done.err for word in said), done.err
    assert done.err.startswith("shadowft: ")
    assert "Traceback" not in done.err
    assert names(pair) == before


def delta_at(place: str, out: str = "out") -> tuple[str, ...]:
    return ("--instruct", "instruct", "--out", out, "--delta-out", place)


def link_to_tuned(folder: Path) -> None:
    (folder / "link").symlink_to("tuned")


def spoil_a_norm(folder: Path) -> None:
    """Which the scope leaves out of the model, and the delta holds."""
    tensors = load_model(folder / "tuned")
    tensors["model.norm.weight"][0] = torch.nan
    shutil.rmtree(folder / "tuned")
    save_model(folder / "tuned", tensors, **RECIPE.kind.config)


#: Of a delta beside a model: what is refused, before or after the delta is made, and what is said.
REFUSED_BESIDE = {
    "inside tuned": (None, delta_at("tuned/d"), ("--delta-out", "inside --tuned")),
    "inside instruct": (None, delta_at("instruct/a/b"), ("--delta-out", "inside --instruct")),
    "inside a link's folder": (link_to_tuned, delta_at("link/d"), ("--delta-out", "inside --tuned")),
    "the model inside base": (None, delta_at("d", "base/out"), ("--out", "inside --base")),
    "inside the model": (None, delta_at("out/d"), ("a folder each",)),
    "the model inside it": (None, delta_at("d", "d/out"), ("a folder each",)),
    "one folder, said differently": (None, delta_at("new/../out"), ("a folder each",)),
    "a folder that is there": (None, delta_at("new/.."), ("a folder each",)),
    "below a file": (make_the_parent_a_file, delta_at("file/d"), ("d cannot be written into file",)),
    "a name too long": (None, delta_at("d" * 256), ("is too long",)),
    "the model's name too long": (None, delta_at("d", "o" * 256), ("is too long",)),
    "a delta that is not finite": (spoil_a_norm, (*delta_at("d"), "--no-report"), ("model.norm.weight",)),
    "a model that is not finite": (None, (*delta_at("d"), "--scale", "1e300"), ("finite",)),
}


@pytest.mark.parametrize(("damage", "arguments", "said"), REFUSED_BESIDE.values(), ids=REFUSED_BESIDE.keys())
def test_a_delta_beside_a_model_is_refused_with_it_and_leaves_nothing(pair, shadowft, damage, arguments, said):
    if damage is not None:
        damage(pair)
    before = all_bytes(pair)
    done = shadowft(*FULL, *arguments)
    assert (done.status, done.out) == (1, "")
    assert all(word in done.err for word in said), done.err
    assert len(done.err.splitlines()) == 1
    assert all_bytes(pair) == before
    assert not [name for name in names(pair) if name.startswith((".", "d", "o", "new"))]


MISFITS = {
    "nothing": ((), ("--base and --tuned", "--adapter", "--delta")),
    "no base": (("--tuned", "tuned", *ONTO), ("--tuned needs --base",)),
    "no tuned": (("--base", "base", *ONTO), ("--base needs --tuned or --adapter",)),
    "two ways": ((*FULL, "--adapter", "base", *ONTO), ("--adapter and --tuned", "one is enough")),
    "a delta and its base": (("--delta", "base", "--base", "base", *ONTO), ("leave out --base",)),
    "no aim": (FULL, ("--instruct and --out",)),
    "no out": ((*FULL, "--instruct", "instruct"), ("--instruct needs --out",)),
    "no instruct": ((*FULL, "--out", "out"), ("--out needs --instruct",)),
    "a delta of a delta": (("--delta", "base", "--delta-out", "out"), ("--delta-out needs --base and --tuned",)),
    "one folder for two": ((*FULL, *ONTO, "--delta-out", "out"), ("a folder each",)),
    "a scaled delta": ((*FULL, "--delta-out", "out", "--scale", "1.0"), ("leave out --scale",)),
    "a plan for nothing": ((*FULL, "--plan"), ("--plan needs --instruct",)),
    "all of a graft": ((*FULL, *ONTO, "--all"), ("--all goes with --verify", "--scope all")),
    "verify and write": (("--verify", "base", "--out", "out", "--scope", "all"), ("leave out --out and --scope",)),
    "a name of the Hub": (
        ("--base", "Qwen/Qwen3-4B-Base", "--tuned", "tuned", *ONTO),
        ("hf download Qwen/Qwen3-4B-Base --local-dir Qwen3-4B-Base", "--base Qwen3-4B-Base"),
    ),
    "a folder that is not there": (("--base", "./absent/model", "--tuned", "tuned", *ONTO), ("absent/model",)),
    "a file": (("--base", "base/config.json", "--tuned", "tuned", *ONTO), ("--base: base/config.json is a file",)),
    "not a graft": (("--verify", "base"), ("base has no manifest.json",)),
}


@pytest.mark.parametrize(("arguments", "said"), MISFITS.values(), ids=MISFITS.keys())
def test_a_slip_of_the_pen_is_answered_with_what_to_give(pair, shadowft, arguments, said):
    done = shadowft(*arguments)
    assert (done.status, done.out) == (1, "")
    assert all(word in done.err for word in said), done.err
    assert len(done.err.splitlines()) == 1
    assert names(pair) == SOURCES


# --- as a process -----------------------------------------------------------------------------------------------------

HELP_AND_GRAFT = """
import sys
from cli.main import main

def modules_after(*arguments):
    sys.argv = ["shadowft", "graft", *arguments]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0
    print(*sys.modules, file=sys.stderr)

arguments = sys.argv[1:]
modules_after("--help")
modules_after(*arguments)
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_process_imports_what_it_needs_when_it_needs_it(pair):
    compile_all()
    command = [sys.executable, "-c", HELP_AND_GRAFT, *FULL, *ONTO]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=True)
    helped, grafted = (set(line.split()) for line in done.stderr.splitlines())
    assert "--base" in done.stdout
    assert not helped & {"llvmlite", "worker.weights"}
    assert "llvmlite" in grafted
    assert not grafted & {
        "numba",
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "huggingface_hub",
        "core.job_spec",
        "rich.progress",
    }


def test_a_terminal_sees_a_bar_and_a_pipe_only_the_result(pair):
    ours, theirs = pty.openpty()
    seen: list[bytes] = []
    reader = Thread(target=read_all, args=(ours, seen))
    reader.start()
    command = [sys.executable, "-m", "cli", "graft", *FULL, *ONTO, "--json"]
    done = subprocess.run(command, env=ENV | {"TERM": "xterm"}, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert json.loads(done.stdout)["grafted"] > 0
    assert b"grafting" in b"".join(seen)


def read_all(descriptor: int, into: list[bytes]) -> None:
    with suppress(OSError):  # how a terminal says that its other end is closed
        while content := os.read(descriptor, 1 << 16):
            into.append(content)


def a_full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def a_pipe_that_nobody_reads() -> int:
    end, ours = os.pipe()
    os.close(end)
    return ours


@pytest.mark.parametrize("stdout", [a_full_disk, a_pipe_that_nobody_reads])
def test_a_model_is_kept_where_the_words_about_it_cannot_be_written(pair, stdout):
    descriptor = stdout()
    command = [sys.executable, "-m", "cli", "graft", *FULL, *ONTO]
    done = subprocess.run(command, env=ENV, stdout=descriptor, stderr=subprocess.PIPE, text=True, check=False)
    os.close(descriptor)
    assert done.returncode == 1
    assert re.fullmatch(r"shadowft: Standard output cannot be written \([A-Z].*\)\. .* whole: out\.\n", done.stderr)
    library(pair)
    assert weights(pair / "out") == weights(pair / "expected")


class Interruption:
    """Ctrl-C while a module is imported."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "cli.main":
            raise KeyboardInterrupt


def test_ctrl_c_before_the_commands_are_imported_is_told_in_words_too(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "cli.main")
    monkeypatch.setattr(sys, "meta_path", [Interruption(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        start()
    assert (ended.value.code, *capsys.readouterr()) == (130, "", "shadowft: stopped. Nothing was written.\n")


def interrupt_when(paths: Callable[[], Iterable[Path]], *arguments: str) -> Done:
    """Ctrl-C as soon as there is such a path."""
    command = [sys.executable, "-m", "cli", "graft", *arguments]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any(paths()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)
    process.send_signal(signal.SIGINT)
    return Done(-1, *process.communicate())._replace(status=process.returncode)


def test_ctrl_c_leaves_nothing_half_made_and_the_same_command_goes_on(tmp_path, shadowft, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(sizes=Sizes(32, 48, 16, 64, layers=12), layouts=(Layout(), Layout(), Layout(90)))
    recipe.write(tmp_path)
    library(tmp_path)
    records = tmp_path / ".out.graft" / "records"
    done = interrupt_when(lambda: records.glob("*.json"), *FULL, *ONTO, "--threads", "1")
    assert (done.status, done.out) == (130, "")
    assert done.err == "shadowft: stopped. The same command again goes on behind the files that are finished.\n"
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / ".out.graft").rglob("*.part"))
    assert "of the files were finished by an earlier run" in shadowft(*FULL, *ONTO, "--threads", "1").out
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert names(tmp_path) == SOURCES | {"out", "expected"}


def test_ctrl_c_before_a_file_is_finished_leaves_nothing_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    save_model(tmp_path / "model", {name: torch.ones(8000, 8000, dtype=torch.bfloat16)})
    parts = (tmp_path / ".out.graft" / "folder").glob
    shutil.copytree(tmp_path / "model", tmp_path / "tuned", copy_function=os.link)
    same = ("--base", "model", "--tuned", "tuned", "--instruct", "model")
    done = interrupt_when(lambda: parts("*.part"), *same, "--out", "out", "--threads", "1")
    assert (done.status, done.err) == (130, "shadowft: stopped. Nothing was written.\n")
    assert names(tmp_path) == {"model", "tuned"}
