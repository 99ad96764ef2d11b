"""`out = instruct + scale * delta`, streamed shard by shard into a folder that looks like Instruct's.

The laws (each one a test):
- Output keeps Instruct's shards, headers and dtypes, byte for byte where nothing is added.
- An element whose update is zero keeps its bits: `-0.0 + 0.0` would give `+0.0`, and NaN times 0 is NaN.
- Arithmetic is float32 and storage rounds once. The paper's script adds in the stored dtype (arXiv 2505.12716).
- Whatever goes wrong, nothing stands at `out`.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoints import INDEX_FILE, Checkpoint, TensorInfo, read_checkpoint
from core.errors import InvalidInput
from core.job_spec import Scope
from worker.weights.delta import BoundDelta, Delta
from worker.weights.files import FileRecord, HashedFile, copy_file, folder_at, hashed_file, write_json
from worker.weights.tensors import read_rows, row_chunks

SHADOW_FILE = "shadow.json"
MANIFEST_FILE = "manifest.json"

#: What a model folder carries besides weights: configs, tokenizers, templates, policies. A list of what is taken and
#: not of what is left out, since pickles come under ever new names.
_CARRIED_SUFFIXES = frozenset({".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe", ".md"})
#: And these, which have no suffix.
_CARRIED_NAMES = frozenset({"LICENSE", "LICENCE", "NOTICE", "COPYING"})
#: These would speak of another model than the output, or make a loader look for other weights.
_LEFT_BEHIND = frozenset({"README.md", "adapter_config.json", SHADOW_FILE, MANIFEST_FILE})
_TEMPLATE_FOLDER = "additional_chat_templates"

#: Tensors done, tensors in all.
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The names that `shadow.json` gives the models: repositories, revisions, folder names; never a machine's paths."""

    instruct: str
    base: str
    tuned: str
    pair: str | None = None


@dataclass(frozen=True, kw_only=True)
class GraftResult:
    scale: float
    #: `1 - |stored - exact| / |scale * delta|` (L2) over all grafted tensors; 1 where there was nothing to add.
    fidelity: float
    #: The grafted tensor that keeps least of its update; None where there was nothing to add.
    worst_tensor: str | None
    worst_fidelity: float
    #: Share of the whole change (L2) that the scope left out. Zero for LoRA.
    discarded_share: float
    #: Tensors that differ from Instruct's by an update, and all others.
    grafted: int
    copied: int
    #: Of all files.
    bytes: int
    seconds: float


def graft(
    *,
    instruct: Path,
    delta: Delta,
    out: Path,
    scale: float,
    scope: Scope,
    names: Provenance,
    on_progress: OnProgress | None = None,
) -> GraftResult:
    """Write `instruct + scale * delta` to the new folder `out`.

    PairRefused: the delta does not fit, with every reason. InvalidInput: `out` is taken, a source is damaged, the scale
    or a weight is not a finite number. A failure leaves nothing at `out`; only a kill leaves a hidden folder beside it.
    """
    started = time.monotonic()
    _refuse_scale(scale)
    _refuse_place(out, (instruct, *delta.sources))
    checkpoint = read_checkpoint(instruct)
    run = _Run(instruct, checkpoint, delta.bind(checkpoint, scope), scale, on_progress or _silent)
    with folder_at(out) as draft, _one_torch_thread():
        records = {file: run.write_shard(file, draft / file) for file in checkpoint.files}
        records |= _carry_small_files(instruct, draft, with_index=checkpoint.is_sharded)
        shadow = _describe(run.tally, names, {"scale": scale, "scope": scope, "delta": delta.kind})
        records[SHADOW_FILE] = write_json(draft / SHADOW_FILE, shadow)
        files = {file: asdict(records[file]) for file in sorted(records)}
        manifest = write_json(draft / MANIFEST_FILE, {"format": 1, "files": files})
    written = manifest.bytes + sum(record.bytes for record in records.values())
    return GraftResult(scale=scale, **run.tally.summary(), bytes=written, seconds=time.monotonic() - started)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Chunks are too small to share: on busy cores the threads wait for each other (measured: 5 s become 30).

    It also makes the result independent of the machine's thread count.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _silent(_done: int, _total: int) -> None:
    pass


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """Sums of squares in float64. Fidelity is measured on what is written, in the pass that writes it."""

    scale: float
    total: int
    done: int = 0
    grafted: int = 0
    squared_update: float = 0.0
    squared_error: float = 0.0
    #: Of the delta itself, before the scale.
    squared_discarded: float = 0.0
    worst_tensor: str | None = None
    worst_fidelity: float = 1.0

    def add(self, name: str, squared_update: float, squared_error: float) -> None:
        self.grafted += 1
        self.squared_update += squared_update
        self.squared_error += squared_error
        fidelity = _fidelity(squared_update, squared_error)
        if self.worst_tensor is None or fidelity < self.worst_fidelity:
            self.worst_tensor, self.worst_fidelity = name, fidelity

    def discarded_share(self) -> float:
        kept = self.squared_update / self.scale**2 if self.scale else 0.0
        whole = kept + self.squared_discarded
        return math.sqrt(self.squared_discarded / whole) if whole else 0.0

    def summary(self) -> dict[str, Any]:
        return {
            "fidelity": _fidelity(self.squared_update, self.squared_error),
            "worst_tensor": self.worst_tensor,
            "worst_fidelity": self.worst_fidelity,
            "discarded_share": self.discarded_share(),
            "grafted": self.grafted,
            "copied": self.total - self.grafted,
        }


def _fidelity(squared_update: float, squared_error: float) -> float:
    return 1.0 - math.sqrt(squared_error / squared_update) if squared_update else 1.0


@dataclass
class _Run:
    instruct: Path
    checkpoint: Checkpoint
    delta: BoundDelta
    scale: float
    on_progress: OnProgress
    tally: _Tally = field(init=False)

    def __post_init__(self) -> None:
        self.tally = _Tally(self.scale, total=len(self.checkpoint.tensors))

    def write_shard(self, file: str, target: Path) -> FileRecord:
        infos = sorted(
            (info for info in self.checkpoint.tensors.values() if info.file == file), key=lambda info: info.start
        )
        with hashed_file(target) as out:
            out.copy(self.instruct / file, 0, infos[0].start)  # the header, which stays true to the byte
            for info in infos:
                self._write_tensor(info, out)
                self.tally.done += 1
                self.on_progress(self.tally.done, self.tally.total)
        return out.record

    def _write_tensor(self, info: TensorInfo, out: HashedFile) -> None:
        if self.scale and info.name in self.delta.grafted:
            self._graft(info, out)
            return
        out.copy(self.instruct / info.file, info.start, info.end)
        if self.scale and info.name in self.delta.discarded:
            self._measure_discarded(info)

    def _graft(self, info: TensorInfo, out: HashedFile) -> None:
        squared_update = squared_error = 0.0
        changed = False
        for first, last in row_chunks(info):
            kept = read_rows(self.instruct, info, first, last)  # (R', C) Instruct's dtype
            update = self.delta.rows(info.name, first, last).mul_(self.scale)  # (R', C) float32
            stored = add_update(kept, update)  # (R', C) Instruct's dtype
            out.write(_raw(stored))
            changed = changed or bool(update.any())
            squared_update += _squares(update)
            squared_error += _squares(rounding_error(kept, update, stored))
        if not math.isfinite(squared_update + squared_error):
            raise _not_finite(info.name)
        if changed:
            self.tally.add(info.name, squared_update, squared_error)

    def _measure_discarded(self, info: TensorInfo) -> None:
        squares = sum(_squares(self.delta.rows(info.name, first, last)) for first, last in row_chunks(info))
        if not math.isfinite(squares):
            raise _not_finite(info.name)
        self.tally.squared_discarded += squares


def add_update(kept: Tensor, update: Tensor) -> Tensor:
    """`kept + update` in float32, rounded once to kept's dtype; where the update is zero, kept's own bits."""
    rounded = (kept.float() + update).to(kept.dtype)
    return torch.where(update == 0, kept, rounded)


def rounding_error(kept: Tensor, update: Tensor, stored: Tensor) -> Tensor:
    """`stored - (kept + update)`, float32, without the sum itself being rounded.

    `stored - kept` is exact where the two are within a factor of two (Sterbenz), which an update that rounding can
    harm leaves them; so the loss of a float32 output is seen too.
    """
    error = (stored.float() - kept.float()).sub_(update)
    return error.masked_fill_(update == 0, 0.0)  # kept may be NaN there


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _raw(values: Tensor) -> memoryview:
    return values.view(-1).view(torch.uint8).numpy().data


def _not_finite(name: str) -> InvalidInput:
    return InvalidInput(
        f"The graft of {name} is not a finite number everywhere: its delta, Instruct's weights or their sum overflowed",
        code="not_finite",
        hint="Train with a smaller learning rate, or graft with a smaller scale.",
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def _refuse_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise InvalidInput(f"The scale is {scale}", param="scale", hint="Give a finite number, such as 1.0.")


def _refuse_place(out: Path, sources: Iterable[Path]) -> None:
    if out.exists() or out.is_symlink():
        raise InvalidInput(f"{out.name} exists already", param="out", hint="Name a folder that does not exist yet.")
    inside = [source.name for source in sources if out.resolve().is_relative_to(source.resolve())]
    if inside:
        raise InvalidInput(f"{out.name} lies inside {inside[0]}, which is read", param="out", hint="Write elsewhere.")


def _carry_small_files(instruct: Path, draft: Path, *, with_index: bool) -> dict[str, FileRecord]:
    records = {}
    for name in _small_files(instruct, with_index=with_index):
        target = draft / name
        target.parent.mkdir(exist_ok=True)
        records[name] = copy_file(instruct / name, target)
    return records


def _small_files(instruct: Path, *, with_index: bool) -> Iterator[str]:
    for path in sorted(instruct.iterdir()):
        if path.is_file() and _is_carried(path.name, with_index=with_index):
            yield path.name
    for path in sorted((instruct / _TEMPLATE_FOLDER).glob("*.jinja")):
        yield f"{_TEMPLATE_FOLDER}/{path.name}"


def _is_carried(name: str, *, with_index: bool) -> bool:
    if name.endswith(".index.json"):
        return with_index and name == INDEX_FILE
    if name.startswith(".") or name in _LEFT_BEHIND:
        return False
    return name in _CARRIED_NAMES or Path(name).suffix in _CARRIED_SUFFIXES


def _describe(tally: _Tally, names: Provenance, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "method": "Shadow-FT (arXiv 2505.12716): instruct + scale * (tuned - base)",
        **asdict(names),
        "options": options,
        **tally.summary(),
        "versions": {"python": platform.python_version(), **_versions("shadowft", "torch", "transformers", "peft")},
    }


def _versions(*packages: str) -> dict[str, str]:
    """Of those that are installed: the library works from a bare checkout, and without the trainers."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
