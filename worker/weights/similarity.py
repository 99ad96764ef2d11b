"""How far Instruct lies from Base: `sigma = sum|A-B| / (sum|A| + sum|B|)`, from 0 (equal) to 1 (Shadow-FT, arXiv
2505.12716; the two aggregates are those of the paper and of its authors' later code).

Both models are read once, in chunks. Each chunk's sums are float64, and the chunks' are added up exactly (math.fsum),
so that no number of threads changes a bit.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from core.checkpoints import Checkpoint, TensorInfo, read_checkpoint
from core.errors import InvalidInput
from core.graft_plan import GraftPlan, Selection, embedding, is_head, is_language, is_tied, plan_graft
from worker.weights import kernels
from worker.weights.delta import common_elements
from worker.weights.figures import by_group, layer_of, module_of
from worker.weights.tensors import CHUNK_ELEMENTS, Reader, Scratch, widened
from worker.weights.writing import OnProgress, default_threads

#: Elements that a thread takes at once.
BLOCK_ELEMENTS = 16 * CHUNK_ELEMENTS

#: What the paper's own pairs lie within, and twice as far. Nobody has validated either as a limit.
TESTED, UNTESTED = 0.045, 0.09

Band = Literal["tested", "untested", "doubtful"]


class OutOfTime(Exception):
    """The deadline came before the end of the two models."""


@dataclass(frozen=True)
class Similarity:
    #: The unweighted mean over the tensors of the language model's layers, as in the paper; over all of them where
    #: none lies in a layer.
    sigma_mean: float
    #: The ratio of the sums over all tensors that both models have.
    sigma_ratio: float
    #: Ratios of sums, of the language model: by the layer's number, and by the module's name, such as `q_proj`.
    layers: dict[str, float]
    modules: dict[str, float]
    #: Instruct's name of the tensor that differs most, whichever part it belongs to.
    worst_tensor: str
    worst_sigma: float
    #: Compared pairs of tensors and of elements, and the bytes that were read of both models.
    tensors: int
    elements: int
    bytes: int


def measure_similarity(
    base: Path,
    instruct: Path,
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    deadline: float | None = None,
) -> Similarity:
    """Compare every float tensor that the two have in common; of a vocabulary, the leading rows that both have.

    `on_progress` (bytes read, bytes in all) is called from one thread at a time. `deadline` is a moment of
    `time.monotonic`.

    PairRefused: the two are not of one lineage. InvalidInput: a file is damaged, a weight is not a finite number, or
    there is nothing to compare.
    OutOfTime: the deadline has passed.
    """
    left, right = read_checkpoint(instruct), read_checkpoint(base)
    pairs = _pairs(left, right)
    if not pairs:
        raise InvalidInput(
            f"{instruct.name} and {base.name} have no weight in common that holds a number",
            code="empty_weights",
            hint="Copy or download the models again, whole.",
        )
    readers = Reader(instruct), Reader(base)
    work = _Work(pairs, readers, on_progress, deadline)
    try:
        work.run(threads or default_threads())
    finally:
        for reader in readers:
            reader.close()
    return _similarity(pairs, [_total(work.sums[number]) for number in range(len(pairs))])


def band(sigma_mean: float) -> Band:
    """How far the paper's experience reaches; a rule of thumb that nobody has validated."""
    if sigma_mean <= TESTED:
        return "tested"
    return "untested" if sigma_mean <= UNTESTED else "doubtful"


def remark(similarity: Similarity) -> str:
    """What the distance means, in words for the owner of a job."""
    said = {
        "tested": f"which is within {TESTED}, as in the tests of the Shadow-FT paper",
        "untested": f"which is beyond the {TESTED} of the pairs that the Shadow-FT paper tested",
        "doubtful": f"which is above {UNTESTED}: one pair as far apart is a documented failure of Shadow-FT",
    }
    return (
        f"The two models differ by sigma {similarity.sigma_mean:.4f}, {said[band(similarity.sigma_mean)]}. "
        "These bands are rules of thumb and validated by nobody: look at the evaluation."
    )


# --- what is compared -------------------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """A tensor of Instruct and its counterpart, of which the leading elements are compared."""

    instruct: TensorInfo
    base: TensorInfo
    elements: int

    @property
    def bytes(self) -> int:
        return sum(self.elements * (info.nbytes // info.elements) for info in (self.instruct, self.base))


class _Sums(NamedTuple):
    """Over some elements."""

    #: |instruct - base|
    gap: float
    #: |instruct|
    instruct: float
    #: |base|
    base: float

    @property
    def sigma(self) -> float:
        both = self.instruct + self.base
        return self.gap / both if both else 0.0


def _pairs(instruct: Checkpoint, base: Checkpoint) -> list[_Pair]:
    plan = plan_graft(instruct, base, selection=Selection("all"))
    pairs = (_pair(instruct, base, plan, name) for name in plan.grafted if not _is_copy(instruct, name))
    return [pair for pair in pairs if pair.elements]


def _pair(instruct: Checkpoint, base: Checkpoint, plan: GraftPlan, name: str) -> _Pair:
    info = instruct.tensors[name]
    return _Pair(info, base.tensors[plan.grafted[name]], common_elements(info, plan.common_rows))


def _is_copy(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is a tied head, stored although it is the embedding over again."""
    return is_head(name) and is_tied(checkpoint) and embedding(checkpoint) is not None


def _similarity(pairs: list[_Pair], sums: list[_Sums]) -> Similarity:
    by_name = {pair.instruct.name: one for pair, one in zip(pairs, sums, strict=True)}
    language = {name: one for name, one in by_name.items() if is_language(name)}
    sigmas = {name: one.sigma for name, one in by_name.items()}
    of_layers = [sigma for name, sigma in sigmas.items() if name in language and layer_of(name) is not None]
    averaged = of_layers or list(sigmas.values())
    worst = max(sigmas, key=lambda name: sigmas[name])
    return Similarity(
        sigma_mean=math.fsum(averaged) / len(averaged),
        sigma_ratio=_total(sums).sigma,
        layers=_ratios(language, layer_of),
        modules=_ratios(language, module_of),
        worst_tensor=worst,
        worst_sigma=sigmas[worst],
        tensors=len(pairs),
        elements=sum(pair.elements for pair in pairs),
        bytes=sum(pair.bytes for pair in pairs),
    )


def _ratios(sums: dict[str, _Sums], key: Callable[[str], str | None]) -> dict[str, float]:
    return {group: _total(found).sigma for group, found in by_group(sums, key).items()}


def _total(sums: Iterable[_Sums]) -> _Sums:
    return _Sums(*(math.fsum(column) for column in zip(*sums, strict=True)))


# --- the pass over the bytes ------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    pair: int
    #: Elements of the flattened tensors.
    first: int
    last: int


class _Work:
    """The blocks of all pairs, in order, for whichever thread is free."""

    def __init__(
        self,
        pairs: list[_Pair],
        readers: tuple[Reader, Reader],
        on_progress: OnProgress | None,
        deadline: float | None,
    ) -> None:
        #: By the pair's number.
        self.sums: dict[int, list[_Sums]] = defaultdict(list)
        self._pairs, self._readers = pairs, readers
        self._deadline = math.inf if deadline is None else deadline
        self._tell, self._done = on_progress, 0
        self._total = sum(pair.bytes for pair in pairs)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._blocks = _blocks(pairs)

    def run(self, threads: int) -> None:
        """The first error of any thread is raised."""
        with ThreadPoolExecutor(threads, thread_name_prefix="similarity") as pool:
            futures = [pool.submit(self._run_one) for _ in range(threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self._stop.set()
        for future in futures:
            future.result()

    def _run_one(self) -> None:
        """One thread's part."""
        scratch = Scratch()
        while (block := self._next()) is not None:
            sums = list(self._measure(block, scratch))
            with self._lock:
                self.sums[block.pair] += sums
                self._tell_of(block)

    def _next(self) -> _Block | None:
        if time.monotonic() > self._deadline:
            raise OutOfTime
        with self._lock:
            return None if self._stop.is_set() else next(self._blocks, None)

    def _tell_of(self, block: _Block) -> None:
        pair = self._pairs[block.pair]
        self._done += pair._replace(elements=block.last - block.first).bytes
        if self._tell is not None:
            self._tell(self._done, self._total)

    def _measure(self, block: _Block, scratch: Scratch) -> Iterator[_Sums]:
        """InvalidInput: an element is no finite number."""
        infos = self._pairs[block.pair][:2]
        for reader, info in zip(self._readers, infos, strict=True):
            reader.announce(info, block.first, block.last)
        for first in range(block.first, block.last, CHUNK_ELEMENTS):
            last = min(first + CHUNK_ELEMENTS, block.last)
            slots = scratch.kept, scratch.base
            chunks = [
                reader.values(info, first, last, slot)
                for reader, info, slot in zip(self._readers, infos, slots, strict=True)
            ]
            sums = _Sums(*kernels.distance(*chunks))
            if not math.isfinite(sum(sums)):
                odd = 0 if not np.isfinite(widened(chunks[0])).all() else 1
                raise _not_finite(self._readers[odd], infos[odd])
            yield sums


def _blocks(pairs: list[_Pair]) -> Iterator[_Block]:
    for number, pair in enumerate(pairs):
        for first in range(0, pair.elements, BLOCK_ELEMENTS):
            yield _Block(number, first, min(first + BLOCK_ELEMENTS, pair.elements))


def _not_finite(reader: Reader, info: TensorInfo) -> InvalidInput:
    return InvalidInput(
        f"{info.name} in {reader.folder.name}/{info.file} holds NaN or infinity",
        code="not_finite",
        hint="Download the model again; if it was published so, choose another one.",
    )
