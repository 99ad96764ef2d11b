"""What a model folder holds, read from its config, its index and its safetensors headers; never from its weights.

The headers are parsed here and not by a library because this is the gate for files of strangers: a name that stands
twice, a gap, an overlap or a cut file must be refused with a sentence that says where, and the API must be able to do
it with neither torch nor safetensors installed. Pickles are never opened. A safetensors file is: 8 bytes little-endian
header length, the header as JSON, then the tensors without a gap
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import InvalidInput, Unavailable
from core.hub import HUB_TIMEOUT_SECONDS, ask_hub, hub_away, hub_errors, readable_snapshot

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
#: Of PEFT before 0.5, and of later ones that are told so; never read.
ADAPTER_PICKLE = "adapter_model.bin"
#: A delta's files have a name of their own, so that nothing loads differences as a model's weights.
DELTA_STEM = "delta"
DELTA_FILE = "delta.safetensors"
DELTA_INDEX_FILE = "delta.safetensors.index.json"

#: The small files that belong to a model: configs, tokenizers, templates, licences; in any letter case. A list of what
#: is taken and not of what is left out, since pickles come under ever new names.
_SMALL_SUFFIXES = (
    *(".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe"),
    *(".md", ".html", ".yaml", ".yml"),
)
#: Whatever follows, such as `LICENSE-2.0`, `LICENSE_GEMMA`, `tokenizer.model.v3`.
_SMALL_PREFIXES = (
    *("license", "licence", "notice", "copying", "terms", "use_policy", "acceptable_use", "attribution", "safety"),
    "tokenizer.model",
)
_SMALL_NAMES = ("vocab",)
#: Except for these: code, pickles and weights, and the indexes of weights in other layouts.
_NEVER_SMALL = (
    *(".py", ".pyc", ".so", ".sh", ".ipynb"),
    *(".bin", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".ckpt", ".npy", ".npz"),
    *(".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".zip"),
    *(".bin.index.json", ".h5.index.json", ".msgpack.index.json"),
)


def is_small_file(name: str) -> bool:
    """Whether a file beside a model's weights belongs to the model; `name` is a bare file name."""
    lowered = name.lower()
    if lowered.endswith(_NEVER_SMALL):
        return False
    return lowered.endswith(_SMALL_SUFFIXES) or lowered.startswith(_SMALL_PREFIXES) or lowered in _SMALL_NAMES


def _any_case(pattern: str) -> str:
    return "".join(f"[{letter}{letter.upper()}]" if letter.isalpha() else letter for letter in pattern)


#: `is_small_file` as shell patterns, for the Hub's client, which heeds the case: what is taken, and what of it is not.
SMALL_FILE_PATTERNS = [
    *(_any_case(f"*{suffix}") for suffix in _SMALL_SUFFIXES),
    *(_any_case(f"{prefix}*") for prefix in _SMALL_PREFIXES),
    *(_any_case(name) for name in _SMALL_NAMES),
]
NOT_SMALL_FILE_PATTERNS = [_any_case(f"*{suffix}") for suffix in _NEVER_SMALL]

#: Bytes of one element.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

#: By what a config sends transformers to other weights, and to another config.
_OTHER_FILES = ("transformers_weights", "configuration_files")

#: What else the format has (F4, F6_E2M3, F6_E3M2, F8_E4M3FNUZ, ...) is narrow too, and used in quantised models only.
_QUANTISED_DTYPES = ("F4", "F6", "F8")

#: A folder that cannot be read for one of these may be read later, as it is.
PASSING_ERRORS = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})

#: Of a JSON file beside the weights, and of the headers of all weight files together: the models with the most tensors
#: (a hundred thousand) have ten megabytes of either. The API reads both while a client waits.
MAX_JSON_BYTES = 16 * 2**20
_LENGTH_BYTES = 8
#: Of a header, beside the tensors.
_METADATA = "__metadata__"
#: Other programs count elements in 64 bits.
_MAX_ELEMENTS = 2**64 - 1

_HUB_THREADS = 8
#: Each costs two requests; the largest models have a few hundred.
MAX_HUB_SHARDS = 2000


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `start` and `end` count bytes from the beginning of the file, not of its data part."""

    name: str
    #: The format's word, such as `BF16`.
    dtype: str
    shape: tuple[int, ...]
    #: A file name in the checkpoint's folder.
    file: str
    start: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Checkpoint:
    #: A folder, or `owner/name@revision`.
    location: str
    config: dict[str, Any]
    #: By name, in the order of the files and of their headers.
    tensors: dict[str, TensorInfo]

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's part of a multimodal config, the whole config of any other."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    @property
    def is_sharded(self) -> bool:
        """Whether an index names the files."""
        return self.files != (SINGLE_FILE,)

    @property
    def parameter_count(self) -> int:
        return sum(info.elements for info in self.tensors.values() if info.is_float)

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Every dtype, the one of most elements first."""
        elements: Counter[str] = Counter()
        for info in self.tensors.values():
            elements[info.dtype] += info.elements
        return tuple(dtype for dtype, _ in elements.most_common())

    @property
    def layer_count(self) -> int | None:
        """Layers of the language model; None where the config does not say."""
        stated = (self.text_config.get(key) for key in ("num_hidden_layers", "n_layer", "num_layers"))
        return next((count for count in stated if isinstance(count, int)), None)


class _Header(NamedTuple):
    """Of one safetensors file."""

    bytes: int
    tensors: list[TensorInfo]


@dataclass(frozen=True)
class AdapterHeader:
    """A PEFT adapter without its weights."""

    location: str
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the model in `folder`. Files that neither the index nor the single file's name points to are not looked at.

    InvalidInput: there is no such model, it is damaged, it needs code of its own, it is not stored as safetensors, or
    it may not be read. Unavailable: the disk failed.
    """
    with _disk_errors(folder):
        config = _read_config(folder)
        return Checkpoint(str(folder), config, _read_weights(folder, SINGLE_FILE, INDEX_FILE))


def read_config(folder: Path) -> dict[str, Any]:
    """The config of the model in `folder`. Raises as for a model."""
    with _disk_errors(folder):
        return _read_config(folder)


def read_delta(folder: Path) -> Checkpoint:
    """Read a saved delta: base's config, and the differences under base's names. Raises as for a model."""
    with _disk_errors(folder):
        config = _read_config(folder)
        return Checkpoint(str(folder), config, _read_weights(folder, DELTA_FILE, DELTA_INDEX_FILE))


def read_side_file(folder: Path, file: str) -> dict[str, Any] | None:
    """A JSON file beside the weights, such as the generation config; None where there is none.

    Raises as for a model.
    """
    with _disk_errors(folder):
        return _read_json(folder, file) if (folder / file).exists() else None


def shard_files(index: Path, where: str) -> set[str]:
    """The weight files that an index names; `where` is what an error calls it. Raises as for a model."""
    with _disk_errors(index):
        return set(_shards_by_tensor(_strict_json(_read_whole(index, where), where), where).values())


def read_adapter(folder: Path) -> AdapterHeader:
    """Read the PEFT adapter in `folder`. InvalidInput: it is missing, damaged, or kept as a pickle only."""
    with _disk_errors(folder):
        if not (folder / ADAPTER_CONFIG_FILE).exists():
            raise _no_adapter(folder)
        config = _read_json(folder, ADAPTER_CONFIG_FILE)
        if (folder / ADAPTER_PICKLE).exists() and not (folder / ADAPTER_FILE).exists():
            raise _pickled_adapter(folder)
        return AdapterHeader(str(folder), config, _by_name([_read_header(folder, ADAPTER_FILE)], folder.name))


def read_tensors(folder: Path, file: str) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises as for a model."""
    with _disk_errors(folder):
        return _by_name([_read_header(folder, file)], folder.name)


def read_hub_checkpoint(repo_id: str, revision: str, *, cache_dir: Path) -> Checkpoint:
    """Read a Hub model without downloading its weights; config and index are kept in `cache_dir`.

    A commit that lies in the cache is read from there, without a request. The Hub's client reads `HF_TOKEN`,
    `HF_ENDPOINT` and `HF_HUB_OFFLINE` by itself.
    InvalidInput: the repository is unknown, gated or not usable. Unavailable: the Hub cannot be reached just now.
    """
    if (there := readable_snapshot(cache_dir, repo_id, revision)) is not None:
        found = read_checkpoint(there.folder)
        _refuse_code(repo_id, found.config, [name for name in there.left_out if "/" not in name])
        return replace(found, location=f"{repo_id}@{revision}")
    with hub_errors(repo_id, revision):
        config, tensors = _fetch(repo_id, revision, cache_dir)
    return Checkpoint(f"{repo_id}@{revision}", config, tensors)


def read_hub_side_file(repo_id: str, revision: str, file: str, *, cache_dir: Path) -> dict[str, Any] | None:
    """`read_side_file` of a Hub model. Raises as for a Hub model."""
    if (there := readable_snapshot(cache_dir, repo_id, revision)) is not None:
        return read_side_file(there.folder, file)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with hub_errors(repo_id, revision):
        try:
            return _fetch_json(HfApi(), repo_id, file, revision, cache_dir)
        except RemoteEntryNotFoundError:
            return None


# --- one file ---------------------------------------------------------------------------------------------------------


def _read_header(folder: Path, file: str) -> _Header:
    where = f"{folder.name}/{file}"
    if not (folder / file).is_file():
        raise _missing(f"{where} is missing", "Copy or download the folder again, whole.")
    with (folder / file).open("rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        data_start = _LENGTH_BYTES + length
        if file_bytes <= _LENGTH_BYTES or length > file_bytes - _LENGTH_BYTES:
            raise _damaged(where, f"its header claims {length} bytes and the file has {file_bytes}")
        if length > MAX_JSON_BYTES:
            raise _too_large(f"The header of {where} takes", length)
        entries = _strict_json(stream.read(length), where)
    return _Header(length, _parse_entries(entries, where, file, data_start=data_start, file_bytes=file_bytes))


def _parse_entries(
    entries: dict[str, Any], where: str, file: str, *, data_start: int, file_bytes: int
) -> list[TensorInfo]:
    _check_metadata(entries.get(_METADATA, {}), where)
    tensors = [
        _parse_tensor(name, entry, where, file, data_start) for name, entry in entries.items() if name != _METADATA
    ]
    _check_layout(tensors, where, data_start=data_start, file_bytes=file_bytes)
    return tensors


def _check_metadata(metadata: Any, where: str) -> None:
    """The graft's output keeps it, and no other library opens a file that has it otherwise."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(where, f"its {_METADATA} is {str(metadata)[:80]}, not texts by their names")


def _parse_tensor(name: str, entry: Any, where: str, file: str, data_start: int) -> TensorInfo:
    if name != name.encode(errors="ignore").decode():  # half of a surrogate pair could be neither written nor shown
        raise _damaged(where, f"the name {ascii(name)[:80]} is no text")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(where, f"the entry of {name} is {str(entry)[:80]}, not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype.startswith(_QUANTISED_DTYPES) and dtype not in DTYPE_BYTES:
        raise _quantised(where, f"{name} has the dtype {dtype}")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _damaged(where, f"{name} has the dtype {dtype!r}, which is not one of {', '.join(DTYPE_BYTES)}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _damaged(
            where, f"{name} has the shape {shape!r} and the offsets {offsets!r}, which are not whole numbers"
        )
    if math.prod(size for size in shape if size) > _MAX_ELEMENTS:  # beside a 0 they would still be none
        raise _damaged(where, f"{name} has the shape {shape!r}, which no program can count")
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise _damaged(where, f"{name} needs {needed} bytes for {dtype} {shape}, its offsets are {offsets}")
    return TensorInfo(name, dtype, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(tensors: list[TensorInfo], where: str, *, data_start: int, file_bytes: int) -> None:
    """The tensors fill the file's data part exactly: an overlap would give one tensor another one's weights."""
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.start, info.end)):
        if info.start != position:
            kind = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise _damaged(where, f"{info.name} {kind}: it starts at byte {info.start}, expected {position}")
        position = info.end
    if position != file_bytes:
        raise _damaged(where, f"its tensors end at byte {position} and the file has {file_bytes}")


# --- a folder ---------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise _missing(f"{folder.name} is not a folder", "Name a folder with a model in the Hugging Face layout.")
    config = _read_json(folder, CONFIG_FILE)
    _refuse_code(folder.name, config, os.listdir(folder))
    _refuse_other_files(folder.name, config)
    return config


def _read_weights(folder: Path, single: str, index: str) -> dict[str, TensorInfo]:
    if (folder / single).exists():  # transformers, too, takes the single file first
        return _by_name([_read_header(folder, single)], folder.name)
    if not (folder / index).exists():
        raise _no_safetensors(folder.name, single, index)
    shard_of = _shards_by_tensor(_read_json(folder, index), f"{folder.name}/{index}")
    tensors = _by_name((_read_header(folder, shard) for shard in sorted(set(shard_of.values()))), folder.name)
    _compare_index(shard_of, tensors, f"{folder.name}/{index}")
    return tensors


def _by_name(headers: Iterable[_Header], where: str) -> dict[str, TensorInfo]:
    """The headers are looked at as they come: of those beyond the limit none is read."""
    tensors: dict[str, TensorInfo] = {}
    read_bytes = 0
    for header in headers:
        read_bytes += header.bytes
        if read_bytes > MAX_JSON_BYTES:
            raise _too_large(f"The headers of {where} take", read_bytes)
        for info in header.tensors:
            if info.name in tensors:
                raise _damaged(where, f"{info.name} stands in both {tensors[info.name].file} and {info.file}")
            tensors[info.name] = info
    return tensors


def _shards_by_tensor(index: dict[str, Any], where: str) -> dict[str, str]:
    shard_of = index.get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise _damaged(where, "it has no weight_map")
    if not isinstance(index.get("metadata") or {}, dict):
        raise _damaged(where, f"its metadata is {str(index['metadata'])[:80]!r}, not an object")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise _damaged(where, f"it puts {name} into {shard!r}, which is not a .safetensors file beside it")
    return shard_of


def _compare_index(shard_of: dict[str, str], tensors: dict[str, TensorInfo], where: str) -> None:
    """Index and shards must agree: loaders differ in which of the two they believe."""
    for name, shard in shard_of.items():
        if name not in tensors or tensors[name].file != shard:
            raise _damaged(where, f"it puts {name} into {shard}, which does not hold it")
    unnamed = tensors.keys() - shard_of.keys()
    if unnamed:
        raise _damaged(where, f"it does not name {min(unnamed)}, which {tensors[min(unnamed)].file} holds")


def _refuse_code(where: str, config: dict[str, Any], file_names: Iterable[str]) -> None:
    """A model that brings its own Python would run a stranger's code in our workers, or lack it in the output."""
    programs = sorted(name for name in file_names if name.endswith(".py"))
    if programs:
        raise _needs_code(where, f"it holds {programs[0]}")
    for part in _parts(config):
        if part.get("auto_map"):
            raise _needs_code(where, f"its {CONFIG_FILE} has an auto_map")
        for key, value in part.items():
            if key.endswith("_implementation") and "/" in str(value):  # transformers would fetch a kernel of that name
                raise _needs_code(where, f"its {CONFIG_FILE} has {key} {str(value)[:80]!r}")


def _refuse_other_files(where: str, config: dict[str, Any]) -> None:
    """What is checked is config.json and the weights that the index names, so nothing else may be loaded for them."""
    for part in _parts(config):
        for key in _OTHER_FILES:
            if part.get(key):
                raise InvalidInput(
                    f"{where}/{CONFIG_FILE} has {key} {str(part[key])[:200]!r}, so that other files would be loaded "
                    "than those that were checked",
                    code="foreign_file",
                    hint=f"Take {key} out of {CONFIG_FILE}, and keep the weights in {SINGLE_FILE} or under "
                    f"{INDEX_FILE}.",
                )


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and every config inside it. Not recursive: a stranger says how deep it goes."""
    waiting: list[Any] = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting += part.values()


def _read_json(folder: Path, file: str) -> dict[str, Any]:
    where = f"{folder.name}/{file}"
    try:
        raw = _read_whole(folder / file, where)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(f"{where} is missing", "Name a folder with a model in the Hugging Face layout.") from None
    return _strict_json(raw, where)


def _read_whole(path: Path, where: str) -> bytes:
    if stat.S_ISFIFO(path.stat().st_mode):  # to open one that nobody writes to never returns
        raise _damaged(where, "it is a pipe and no file")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise _too_large(f"{where} takes", size)
        return stream.read(MAX_JSON_BYTES)


def _strict_json(raw: bytes, where: str) -> dict[str, Any]:
    """Only an object, and no name twice: of two entries the json module would silently keep the last."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"it is not valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise _damaged(where, f"it is a JSON {type(value).__name__}, not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"the name {name!r} stands twice")
        seen[name] = value
    return seen


# --- the Hub ----------------------------------------------------------------------------------------------------------


def _fetch(repo_id: str, revision: str, cache_dir: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    # Imported here: reading a local folder, which every graft does, needs no HTTP client (half a second).
    from huggingface_hub import HfApi

    api = HfApi()
    info = ask_hub(repo_id, revision)
    names = {sibling.rfilename for sibling in info.siblings or []}

    def fetch_json(file: str) -> dict[str, Any]:
        return _fetch_json(api, repo_id, file, revision, cache_dir)

    def fetch_header(file: str) -> _Header:
        return _fetch_header(api, repo_id, file, revision)

    config = fetch_json(CONFIG_FILE)
    _refuse_code(repo_id, config, [name for name in names if "/" not in name])
    _refuse_other_files(repo_id, config)
    if SINGLE_FILE in names:
        return config, _by_name([fetch_header(SINGLE_FILE)], repo_id)
    if INDEX_FILE not in names:
        raise _no_safetensors(repo_id)
    shard_of = _shards_by_tensor(fetch_json(INDEX_FILE), f"{repo_id}/{INDEX_FILE}")
    if len(set(shard_of.values())) > MAX_HUB_SHARDS:
        raise _damaged(f"{repo_id}/{INDEX_FILE}", f"it names more than {MAX_HUB_SHARDS} files")
    pool = ThreadPoolExecutor(_HUB_THREADS)
    try:
        tensors = _by_name(pool.map(fetch_header, sorted(set(shard_of.values()))), repo_id)
    finally:
        pool.shutdown(cancel_futures=True)
    _compare_index(shard_of, tensors, f"{repo_id}/{INDEX_FILE}")
    return config, tensors


def _fetch_json(api: Any, repo_id: str, file: str, revision: str, cache_dir: Path) -> dict[str, Any]:
    from huggingface_hub import try_to_load_from_cache

    where = f"{repo_id}/{file}"
    if not isinstance(try_to_load_from_cache(repo_id, file, cache_dir, revision), str):
        size = _size_on_hub(api, repo_id, file, revision)
        if size > MAX_JSON_BYTES:
            raise _too_large(f"{where} takes", size)
    path = Path(api.hf_hub_download(repo_id, file, revision=revision, cache_dir=cache_dir))
    return _strict_json(_read_whole(path, where), where)


def _size_on_hub(api: Any, repo_id: str, file: str, revision: str) -> int:
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(repo_id, file, revision=revision, endpoint=api.endpoint)
    size: int | None = api.get_hf_file_metadata(url=url, timeout=HUB_TIMEOUT_SECONDS).size
    if size is None:
        raise hub_away(repo_id, f"does not say how large {file} is")
    return size


def _fetch_header(api: Any, repo_id: str, file: str, revision: str) -> _Header:
    """The Hub's client reads the header by a range request; the file's size tells how long that header is."""
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{repo_id}/{file}"
    try:
        header = api.parse_safetensors_file_metadata(repo_id, file, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
        data_bytes = max((int(tensor.data_offsets[1]) for tensor in header.tensors.values()), default=0)
    except HfHubHTTPError:  # some are ValueErrors
        raise
    # JSON of a shape that neither expects.
    except (AttributeError, IndexError, RecursionError, TypeError, ValueError) as error:
        raise _damaged(where, f"its header is no table of tensors ({str(error)[:200]})") from None
    file_bytes = _size_on_hub(api, repo_id, file, revision)
    entries = {
        name: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
        for name, tensor in header.tensors.items()
    }
    entries[_METADATA] = header.metadata
    if file_bytes < _LENGTH_BYTES + data_bytes:
        raise _damaged(where, f"its tensors need {data_bytes} bytes and the file has {file_bytes}")
    data_start = file_bytes - data_bytes
    tensors = _parse_entries(entries, where, file, data_start=data_start, file_bytes=file_bytes)
    return _Header(data_start - _LENGTH_BYTES, tensors)


# --- words ------------------------------------------------------------------------------------------------------------


def _missing(message: str, hint: str) -> InvalidInput:
    return InvalidInput(message, code="model_not_found", hint=hint)


def _damaged(where: str, finding: str) -> InvalidInput:
    return InvalidInput(
        f"{where} is damaged: {finding}", code="damaged_checkpoint", hint="Copy or download the file again."
    )


def _too_large(what_takes: str, size: int) -> InvalidInput:
    return InvalidInput(
        f"{what_takes} {size:,} bytes, and at most {MAX_JSON_BYTES:,} are read of such a thing",
        code="checkpoint_too_large",
        hint="Take the file of the model's own release.",
    )


def _quantised(where: str, finding: str) -> InvalidInput:
    return InvalidInput(
        f"{where} is quantised, which cannot be used: {finding}",
        code="quantised_checkpoint",
        hint="Take the unquantised model.",
    )


def _no_adapter(folder: Path) -> InvalidInput:
    if not folder.is_dir():
        return _missing(f"{folder.name} is not a folder", "Name a folder that PEFT's save_pretrained wrote.")
    hint = "Name the folder that PEFT's save_pretrained wrote."
    if (folder / CONFIG_FILE).exists():
        hint = f"It holds {CONFIG_FILE}, so it is a model: give it as the tuned model, not as an adapter."
    return _missing(f"{folder.name} is no PEFT adapter: it holds no {ADAPTER_CONFIG_FILE}", hint)


def _pickled_adapter(folder: Path) -> InvalidInput:
    return InvalidInput(
        f"{folder.name} holds {ADAPTER_PICKLE} and no {ADAPTER_FILE}; pickles are never read",
        code="not_safetensors",
        hint="Load it with PEFT, if you trust it, and save it again with save_pretrained(), which writes safetensors.",
    )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = Path(error.filename or folder)
        where = folder.name if file == folder else f"{folder.name}/{file.name}"
        finding = f"{where} cannot be read ({error.strerror or error})"
        if error.errno in PASSING_ERRORS:
            raise Unavailable(
                finding, code="storage_unavailable", hint="Try again; if it stays, look after the disk."
            ) from error
        hint = "Make it readable for this user, or copy the folder again, whole."
        raise InvalidInput(finding, code="unreadable_checkpoint", hint=hint) from error


def _needs_code(where: str, finding: str) -> InvalidInput:
    return InvalidInput(
        f"{where} needs code of its own: {finding}",
        code="remote_code_refused",
        hint="Only architectures that transformers itself knows can be used.",
    )


def _no_safetensors(where: str, single: str = SINGLE_FILE, index: str = INDEX_FILE) -> InvalidInput:
    return InvalidInput(
        f"{where} holds neither {single} nor {index}; pickles are never read",
        code="not_safetensors",
        hint="Save the model as safetensors with transformers' save_pretrained.",
    )
