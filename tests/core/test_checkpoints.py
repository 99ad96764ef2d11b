"""Headers of strangers: the good ones are read exactly, each damaged one is refused with the place and the finding."""

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import close_session, constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from core.checkpoints import (
    DTYPE_BYTES,
    MAX_JSON_BYTES,
    NOT_SMALL_FILE_PATTERNS,
    SMALL_FILE_PATTERNS,
    is_small_file,
    read_adapter,
    read_checkpoint,
    read_delta,
    read_hub_checkpoint,
)
from core.errors import InvalidInput, Unavailable

CONFIG = {"model_type": "qwen3", "num_hidden_layers": 2, "vocab_size": 8}


def framed(header: str | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write_model(folder: Path, files: dict[str, bytes], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def shard(**tensors: int) -> bytes:
    return save({name: np.zeros(size, dtype=np.float32) for name, size in tensors.items()})


def index(**shard_of: str) -> bytes:
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": shard_of}).encode()


def sharded_files() -> dict[str, bytes]:
    return {
        "a.safetensors": shard(one=2),
        "b.safetensors": shard(two=3),
        "model.safetensors.index.json": index(one="a.safetensors", two="b.safetensors"),
    }


def test_a_header_is_read_with_absolute_offsets(tmp_path):
    content = framed(json.dumps({"__metadata__": {"format": "pt"}, "w": entry("BF16", (2, 3), (0, 12))}), bytes(12))
    checkpoint = read_checkpoint(write_model(tmp_path, {"model.safetensors": content}))
    info = checkpoint.tensors["w"]
    assert (info.dtype, info.shape, info.file) == ("BF16", (2, 3), "model.safetensors")
    assert (info.start, info.end) == (len(content) - 12, len(content))


def test_totals_come_from_the_headers(tmp_path):
    header = {"w": entry("BF16", (2, 3), (0, 12)), "b": entry("F32", (1,), (12, 16)), "i": entry("I64", (1,), (16, 24))}
    checkpoint = read_checkpoint(write_model(tmp_path, {"model.safetensors": framed(json.dumps(header), bytes(24))}))
    assert (checkpoint.parameter_count, checkpoint.total_bytes, checkpoint.layer_count) == (7, 24, 2)
    assert checkpoint.dtypes[0] == "BF16"
    assert not checkpoint.is_sharded


def test_a_sharded_model_is_read_through_its_index(tmp_path):
    checkpoint = read_checkpoint(write_model(tmp_path, sharded_files()))
    assert {name: info.file for name, info in checkpoint.tensors.items()} == {
        "one": "a.safetensors",
        "two": "b.safetensors",
    }
    assert checkpoint.is_sharded


def test_stray_weights_beside_the_shards_are_never_read(tmp_path):
    stray = dict.fromkeys(["consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin"], b"rubbish")
    checkpoint = read_checkpoint(write_model(tmp_path, sharded_files() | stray))
    assert checkpoint.tensors.keys() == {"one", "two"}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_every_well_formed_header_is_read_back(tmp_path_factory, tensors):
    header, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * DTYPE_BYTES[dtype]
        header[name] = entry(dtype, shape, (position, position + size))
        position += size
    folder = tmp_path_factory.mktemp("model")
    checkpoint = read_checkpoint(
        write_model(folder, {"model.safetensors": framed(json.dumps(header), bytes(position))})
    )
    assert {name: (info.dtype, list(info.shape)) for name, info in checkpoint.tensors.items()} == tensors


GOOD = json.dumps({"w": entry()})
DAMAGED = {
    "empty": (b"", "claims 0 bytes"),
    "shorter than its length field": (b"\x01\x00", "claims"),
    "header longer than the file": (framed(GOOD)[:20], "claims"),
    "header of a terabyte": ((1 << 40).to_bytes(8, "little") + b"{}", "claims"),
    "cut data": (framed(GOOD, bytes(7)), "end at byte"),
    "data after the last tensor": (framed(GOOD, bytes(9)), "end at byte"),
    "not JSON": (framed("{nonsense", bytes(8)), "not valid JSON"),
    "not UTF-8": (framed(b'{"\xff": 1}', bytes(8)), "not valid JSON"),
    "deep nesting": (framed("[" * 100_000), "not valid JSON"),
    "not an object": (framed("[]"), "JSON list"),
    "name twice": (framed('{"w": 1, "w": 2}'), "'w' stands twice"),
    "half a surrogate in a name": (framed('{"\\ud800": 1}'), r"the name '\ud800' is no text"),
    "entry not an object": (framed('{"w": 1}'), "not dtype, shape"),
    "missing offsets": (framed('{"w": {"dtype": "F32", "shape": [2]}}', bytes(8)), "not dtype, shape"),
    "unknown dtype": (framed(json.dumps({"w": entry("X4", (2,), (0, 1))}), bytes(1)), "'X4'"),
    "dtype not a word": (framed(json.dumps({"w": entry(["F32"])}), bytes(8)), "has the dtype"),
    "negative shape": (framed(json.dumps({"w": entry(shape=(-2,))}), bytes(8)), "not whole numbers"),
    "fractional shape": (framed(json.dumps({"w": entry(shape=(2.0,))}), bytes(8)), "not whole numbers"),
    "boolean offset": (framed(json.dumps({"w": entry(offsets=(False, 8))}), bytes(8)), "not whole numbers"),
    "three offsets": (framed(json.dumps({"w": entry(offsets=(0, 8, 8))}), bytes(8)), "not whole numbers"),
    "offsets too far apart": (framed(json.dumps({"w": entry(offsets=(0, 12))}), bytes(12)), "needs 8 bytes"),
    "offsets reversed": (framed(json.dumps({"w": entry(offsets=(8, 0))}), bytes(8)), "needs 8 bytes"),
    "offsets past the end": (framed(json.dumps({"w": entry(offsets=(8, 16))}), bytes(8)), "leaves a gap"),
    "overlap": (framed(json.dumps({"v": entry(), "w": entry(offsets=(4, 12))}), bytes(12)), "overlaps"),
    "gap": (framed(json.dumps({"v": entry(), "w": entry(offsets=(12, 20))}), bytes(20)), "leaves a gap"),
    "metadata not an object": (framed('{"__metadata__": ["format"]}'), "its __metadata__ is ['format'], not texts"),
    "metadata not of texts": (framed('{"__metadata__": {"step": 1}}'), "its __metadata__ is {'step': 1}, not texts"),
    "more than 64 bits, times 0": (framed(json.dumps({"w": entry(shape=(0, 2**70), offsets=(0, 0))})), "can count"),
    "more than 64 bits together": (framed(json.dumps({"w": entry(shape=(2**40, 2**40, 0))})), "no program can count"),
}


@pytest.mark.parametrize(("content", "finding"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_with_its_name_and_the_finding(tmp_path, content, finding):
    folder = write_model(tmp_path / "qwen", {"model.safetensors": content})
    with pytest.raises(InvalidInput, match=r"qwen/model\.safetensors is damaged") as refusal:
        read_checkpoint(folder)
    assert finding in refusal.value.message
    assert refusal.value.code == "damaged_checkpoint"
    assert refusal.value.hint


BAD_FOLDERS = {
    "a shard is missing": ({"b.safetensors": None}, "b.safetensors is missing"),
    "index names a tensor that its shard lacks": ({"b.safetensors": shard(other=3)}, "puts two into b.safetensors"),
    "index puts a tensor into the other shard": (
        {"model.safetensors.index.json": index(one="b.safetensors", two="a.safetensors")},
        "puts one into b.safetensors",
    ),
    "a shard holds more than the index says": ({"b.safetensors": shard(two=3, three=1)}, "does not name three"),
    "a tensor stands in two shards": ({"b.safetensors": shard(one=2, two=3)}, "both a.safetensors and b.safetensors"),
    "index leads out of the folder": (
        {"model.safetensors.index.json": index(one="../a.safetensors")},
        "'../a.safetensors'",
    ),
    "index leads to a pickle": (
        {"model.safetensors.index.json": index(one="pytorch_model.bin")},
        "'pytorch_model.bin'",
    ),
    "index without a map": ({"model.safetensors.index.json": b"{}"}, "no weight_map"),
    "index whose metadata is a text": (
        {"model.safetensors.index.json": b'{"metadata": "v1", "weight_map": {"one": "a.safetensors"}}'},
        "its metadata is 'v1', not an object",
    ),
    "index with a name twice": (
        {"model.safetensors.index.json": b'{"weight_map": {"one": "a.safetensors", "one": "b.safetensors"}}'},
        "'one' stands twice",
    ),
    "only a pickle": ({"model.safetensors.index.json": None, "pytorch_model.bin": b"x"}, "pickles are never read"),
    "a Python file": ({"modeling_mine.py": b""}, "modeling_mine.py"),
    "config without sense": ({"config.json": b"{"}, "config.json is damaged"),
    "no config": ({"config.json": None}, "config.json is missing"),
}


@pytest.mark.parametrize(("changes", "finding"), BAD_FOLDERS.values(), ids=BAD_FOLDERS.keys())
def test_a_bad_folder_is_refused(tmp_path, changes, finding):
    folder = write_model(tmp_path, sharded_files())
    for name, content in changes.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(InvalidInput) as refusal:
        read_checkpoint(folder)
    assert finding in refusal.value.message


@pytest.mark.parametrize("config", [{"auto_map": {"AutoModel": "m.M"}}, {"text_config": {"auto_map": {"A": "m.M"}}}])
def test_a_config_that_needs_code_is_refused(tmp_path, config):
    folder = write_model(tmp_path, {"model.safetensors": shard(one=2)}, config)
    with pytest.raises(InvalidInput, match="auto_map"):
        read_checkpoint(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_too_large_is_refused_with_its_size_and_the_limit(tmp_path, file):
    folder = write_model(tmp_path / "qwen", sharded_files())
    with (folder / file).open("ab") as stream:
        stream.write(b" " * MAX_JSON_BYTES)
    said = rf"qwen/{file} takes {(folder / file).stat().st_size:,} bytes, and at most {MAX_JSON_BYTES:,} are read"
    with pytest.raises(InvalidInput, match=said) as caught:
        read_checkpoint(folder)
    assert caught.value.code == "checkpoint_too_large"


def test_so_are_headers_one_by_one_and_together(tmp_path):
    def padded(name: str, size: int) -> bytes:
        return framed(json.dumps({"__metadata__": {"x": " " * size}, name: entry()}), bytes(8))

    single = write_model(tmp_path / "one", {"model.safetensors": padded("one", MAX_JSON_BYTES)})
    with pytest.raises(InvalidInput, match=r"The header of one/model\.safetensors takes 16,777,\d+ bytes"):
        read_checkpoint(single)
    halves = {f"{name}.safetensors": padded(name, MAX_JSON_BYTES // 2) for name in ("one", "two")}
    files = halves | {"model.safetensors.index.json": index(one="one.safetensors", two="two.safetensors")}
    with pytest.raises(InvalidInput, match=r"The headers of two take 16,777,\d+ bytes"):
        read_checkpoint(write_model(tmp_path / "two", files))


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="is not a folder"):
        read_checkpoint(tmp_path / "nowhere")


def test_an_adapter_is_read_and_a_pickled_one_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InvalidInput, match=r"adapter_model.safetensors is missing"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    said = refusal_of(read_adapter, tmp_path)
    assert "holds adapter_model.bin and no adapter_model.safetensors; pickles are never read. Load it" in said
    (tmp_path / "adapter_model.safetensors").write_bytes(shard(a=2))
    header = read_adapter(tmp_path)
    assert (header.config, list(header.tensors)) == ({"peft_type": "LORA"}, ["a"])


def refusal_of(read: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises(InvalidInput) as refusal:
        read(folder)
    return f"{refusal.value.message}. {refusal.value.hint}"


def test_a_folder_without_an_adapter_is_told_from_a_model(tmp_path):
    empty = tmp_path / "notes"
    empty.mkdir()
    said = refusal_of(read_adapter, empty)
    assert said.startswith("notes is no PEFT adapter: it holds no adapter_config.json. Name the folder")
    model = write_model(tmp_path / "qwen", {"model.safetensors": shard(one=2)})
    assert "it is a model: give it as the tuned model" in refusal_of(read_adapter, model)
    assert refusal_of(read_adapter, tmp_path / "nowhere").startswith("nowhere is not a folder.")


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ"])
def test_a_dtype_of_quantised_models_is_no_damage(tmp_path, dtype):
    content = framed(json.dumps({"w": entry(dtype, (8,), (0, 4))}), bytes(4))
    folder = write_model(tmp_path / "qwen", {"model.safetensors": content})
    assert refusal_of(read_checkpoint, folder) == (
        f"qwen/model.safetensors is quantised, which cannot be used: w has the dtype {dtype}. "
        "Take the unquantised model."
    )


@pytest.mark.parametrize(
    ("read", "file"),
    [
        (read_checkpoint, "config.json"),
        (read_checkpoint, "model.safetensors.index.json"),
        (read_delta, "config.json"),
        (read_adapter, "adapter_config.json"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, read, file):
    folder = write_model(tmp_path / "qwen", {})
    (folder / file).unlink(missing_ok=True)
    (folder / file).mkdir()
    assert refusal_of(read, folder).startswith(f"qwen/{file} cannot be read (Is a directory). Make it readable")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, file):
    folder = write_model(tmp_path / "qwen", sharded_files())
    (folder / file).unlink()
    os.mkfifo(folder / file)
    assert refusal_of(read_checkpoint, folder).startswith(f"qwen/{file} is damaged: it is a pipe")


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    folder = write_model(tmp_path / "qwen", {"model.safetensors": shard(one=2)})
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert refusal_of(read_checkpoint, folder).startswith("qwen/config.json cannot be read (Too many levels")


def test_a_disk_that_fails_may_be_asked_again(tmp_path, monkeypatch):
    def fail(self: Path, *_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", str(self))

    folder = write_model(tmp_path / "qwen", {"model.safetensors": shard(one=2)})
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Unavailable, match=r"qwen/config\.json cannot be read \(Input/output error\)"):
        read_checkpoint(folder)


# --- the small files of a model ---------------------------------------------------------------------------------------

SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json", "vocab.json"),
    *("merges.txt", "vocab.txt", "chat_template.jinja", "tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken"),
    *("sentencepiece.bpe.model", "source.spm", "vocab", "vocab.bpe", "dict.vocab", "MODEL_CARD.md", "recipe.yaml"),
    *("LICENSE", "LICENCE", "license", "License.txt", "LICENSE.pdf", "LICENSE_GEMMA", "LICENSE-2.0", "NOTICE"),
    *("Notice.md", "COPYING.LESSER", "TERMS_OF_USE", "USE_POLICY.md", "Use_Policy.pdf"),
    *("ATTRIBUTION", "SAFETY", "Acceptable_Use_Policy.pdf", "terms.html", "config.yml"),
)
OTHER_FILES = (
    *("model-00001-of-00002.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"),
    *("optimizer.pt", "consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "training_args.bin", "vocab.pkl"),
    *("modeling_mine.py", "LICENSE.py", "tokenizer.model.pkl", "NOTICE.BIN", "vocabulary", "figure.png"),
)


@pytest.mark.parametrize("name", [*SMALL_FILES, *OTHER_FILES])
def test_which_small_files_belong_to_a_model_is_one_list(name):
    assert is_small_file(name) is (name in SMALL_FILES)
    taken = any(fnmatchcase(name, pattern) for pattern in SMALL_FILE_PATTERNS)
    left_out = any(fnmatchcase(name, pattern) for pattern in NOT_SMALL_FILE_PATTERNS)
    assert (taken and not left_out) is (name in SMALL_FILES)


# --- the Hub: a real server that speaks the part of its protocol that is used --------------------------------------


class FakeHub(ThreadingHTTPServer):
    def __init__(self, files: dict[str, bytes], status: int = 200, error_code: str = "") -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files, self.status, self.error_code = files, status, error_code
        self.bytes_sent = 0


class FakeHubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.server.status != 200:
            self.answer(self.server.status, b"{}", {"X-Error-Code": self.server.error_code})
        elif self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(200, json.dumps({"id": "o/m", "sha": "c0ffee", "siblings": siblings}).encode())
        elif (name := self.path.rsplit("/", 1)[1]) in self.server.files:
            self.send_part(self.server.files[name])
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send_part(self, content: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": "c0ffee",
            "Accept-Ranges": "bytes",
        }
        wanted = self.headers.get("Range", "")
        if not wanted.startswith("bytes="):
            return self.answer(200, content, headers)
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        return self.answer(206, content[first : last + 1], headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.server.bytes_sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def reach(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@contextmanager
def serve(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    reach(f"http://127.0.0.1:{hub.server_port}", monkeypatch)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
        close_session()


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_a_hub_model_reads_like_its_folder(tmp_path, monkeypatch, layout):
    files = sharded_files() if layout == "sharded" else {"model.safetensors": shard(one=2, two=3)}
    local = read_checkpoint(write_model(tmp_path / "local", files))
    with serve(FakeHub({"config.json": json.dumps(CONFIG).encode(), **files}), monkeypatch):
        remote = read_hub_checkpoint("o/m", "c0ffee", cache_dir=tmp_path / "cache")
    assert (remote.config, remote.tensors) == (local.config, local.tensors)
    assert remote.location == "o/m@c0ffee"


def test_only_headers_of_a_hub_model_are_fetched(tmp_path, monkeypatch):
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": shard(one=5_000_000)}
    with serve(FakeHub(files), monkeypatch) as hub:
        read_hub_checkpoint("o/m", "main", cache_dir=tmp_path)
    assert hub.bytes_sent < 200_000


def test_a_hub_model_with_code_is_refused(tmp_path, monkeypatch):
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": shard(one=2), "modeling.py": b""}
    with serve(FakeHub(files), monkeypatch), pytest.raises(InvalidInput, match=r"modeling\.py"):
        read_hub_checkpoint("o/m", "main", cache_dir=tmp_path)


def test_a_cut_hub_file_is_refused(tmp_path, monkeypatch):
    files = {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": framed(GOOD)[:-4]}
    with serve(FakeHub(files), monkeypatch), pytest.raises(InvalidInput, match="damaged"):
        read_hub_checkpoint("o/m", "main", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("status", "error_code", "kind", "code"),
    [
        (403, "GatedRepo", InvalidInput, "gated_model"),
        (401, "RepoNotFound", InvalidInput, "model_not_found"),
        (404, "RevisionNotFound", InvalidInput, "model_not_found"),
        (403, "", InvalidInput, "gated_model"),
        (429, "", Unavailable, "hub_unavailable"),
        (500, "", Unavailable, "hub_unavailable"),
        (503, "", Unavailable, "hub_unavailable"),
    ],
)
def test_each_refusal_of_the_hub_has_its_cause(tmp_path, monkeypatch, status, error_code, kind, code):
    with serve(FakeHub({}, status, error_code), monkeypatch), pytest.raises(kind) as refusal:
        read_hub_checkpoint("o/m", "main", cache_dir=tmp_path)
    assert refusal.value.code == code


def test_a_hub_out_of_reach_is_unavailable(tmp_path, monkeypatch):
    reach("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(Unavailable, match="cannot be reached"):
        read_hub_checkpoint("o/m", "main", cache_dir=tmp_path)


def test_a_hub_without_the_model_file_is_refused(tmp_path, monkeypatch):
    files = {"config.json": b"{}", "pytorch_model.bin": b""}
    with serve(FakeHub(files), monkeypatch), pytest.raises(InvalidInput, match="pickles are never read"):
        read_hub_checkpoint("o/m", "main", cache_dir=tmp_path)


def test_a_name_that_is_no_repository_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="not the name"):
        read_hub_checkpoint("a/b/c", "main", cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"transformers_weights": "other.safetensors"}, "foreign_file", "transformers_weights 'other.safetensors'"),
        ({"text_config": {"transformers_weights": "a"}}, "foreign_file", "transformers_weights"),
        ({"configuration_files": ["config.4.0.0.json"]}, "foreign_file", "configuration_files"),
        ({"attn_implementation": "owner/kernel"}, "remote_code_refused", "'owner/kernel'"),
        ({"text_config": {"_attn_implementation": {"": "owner/kernel"}}}, "remote_code_refused", "owner/kernel"),
        ({"a": {"b": {"auto_map": {"AutoModel": "own.Own"}}}}, "remote_code_refused", "auto_map"),
    ],
)
def test_a_config_that_leads_to_other_files_or_code_is_refused(tmp_path, fields, code, said):
    folder = write_model(tmp_path / "qwen", {"model.safetensors": shard(one=2)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(InvalidInput, match=said) as caught:
        read_checkpoint(folder)
    assert caught.value.code == code


def test_what_a_config_says_of_attention_by_its_own_name_is_taken(tmp_path):
    folder = write_model(tmp_path / "qwen", {"model.safetensors": shard(one=2)})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "_attn_implementation": "sdpa", "transformers_weights": None, "configuration_files": []})
    )
    assert read_checkpoint(folder).tensors
