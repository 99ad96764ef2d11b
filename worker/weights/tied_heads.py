"""Whether a model whose config ties its head to its embedding really has one tensor for both.

Where such a model stores both and they differ, transformers loads it untied, each as it is stored, and a change of one
would be grafted onto the other. Headers cannot tell, so the bytes are compared: of few models, since one that ties
usually stores its embedding alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import NamedTuple

from core.checkpoints import CONFIG_FILE, Checkpoint, TensorInfo, read_checkpoint
from core.errors import PairRefused
from core.graft_plan import embedding, head, is_tied
from worker.weights.tensors import Reader

UNTIED_REMEDY = (
    f"set tie_word_embeddings to false in its {CONFIG_FILE} if the head is its own, or save the model again with "
    "transformers' save_pretrained"
)

#: Compared at once.
_CHUNK_BYTES = 4 * 2**20


class Model(NamedTuple):
    #: What a refusal calls it.
    word: str
    checkpoint: Checkpoint
    reader: Reader


def refuse_untied_heads(models: Iterable[Model]) -> None:
    """PairRefused: one of them stores another head than the embedding that its config ties it to."""
    found = untied_heads(models)
    if found:
        raise PairRefused([f"{one}; {UNTIED_REMEDY}" for one in found])


def refuse_untied_folders(folders: Mapping[str, Path]) -> None:
    """The same for models in folders, each by what a refusal calls it."""
    with ExitStack() as stack:
        readers = {word: stack.enter_context(closing(Reader(folder))) for word, folder in folders.items()}
        refuse_untied_heads(Model(word, read_checkpoint(folders[word]), reader) for word, reader in readers.items())


def untied_heads(models: Iterable[Model]) -> list[str]:
    """A sentence for each model of which that is so.

    InvalidInput: a file has been cut. Unavailable: the disk failed.
    """
    return [
        f"{model.word} ties its head to its embedding by its {CONFIG_FILE}, and stores a {head(model.checkpoint)} that "
        f"differs from its {embedding(model.checkpoint)}"
        for model in models
        if _has_head_of_its_own(model)
    ]


def _has_head_of_its_own(model: Model) -> bool:
    names = embedding(model.checkpoint), head(model.checkpoint)
    stored = [model.checkpoint.tensors[name] for name in names if name is not None]
    if len(stored) < len(names) or not is_tied(model.checkpoint):
        return False
    one, two = stored
    return (one.dtype, one.shape) != (two.dtype, two.shape) or not _same_bytes(model.reader, one, two)


def _same_bytes(reader: Reader, one: TensorInfo, two: TensorInfo) -> bool:
    return all(_bytes(reader, one, start) == _bytes(reader, two, start) for start in range(0, one.nbytes, _CHUNK_BYTES))


def _bytes(reader: Reader, info: TensorInfo, start: int) -> bytearray:
    found = bytearray(min(_CHUNK_BYTES, info.nbytes - start))
    reader.bytes_into(memoryview(found), info.file, info.start + start)
    return found
