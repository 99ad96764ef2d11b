"""Whether what a model's small files name is the model's own.

transformers opens what a tokenizer's options name as its vocabulary, wherever that lies, and puts an adapter that lies
beside a model's weights onto them. Nobody has checked what is read so; and what a file of somebody else's holds would
show in findings. The rule: an option that names a file names a small file of the model's own folder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from core.checkpoints import ADAPTER_CONFIG_FILE, CONFIG_FILE, is_small_file, read_hub_side_file, read_side_file
from core.errors import InvalidInput
from core.hub import readable_snapshot

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
#: A tokenizer's options: transformers merges the second into the first.
_OPTION_FILES = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json")
#: What may name a tokenizer's class.
_CLASS_FILES = (TOKENIZER_CONFIG_FILE, CONFIG_FILE)

#: Options that transformers' tokenizers open as files or folders; any that ends so is taken for one more.
_FILE_OPTIONS = frozenset({"vocab", "merges", "init_inputs", "subfolder"})
_FILE_ENDINGS = ("_file", "_files", "_path", "_spm", "_dir", "_dic")
#: What old releases left behind, full of their makers' paths; transformers overwrites or ignores these.
_REMNANTS = frozenset({"name_or_path", "_name_or_path", "special_tokens_map_file"})
#: Tokens and texts, under names and with values of anybody's choosing.
_TEXTS = frozenset(
    {
        *("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens"),
        *("model_specific_special_tokens", "chat_template"),
    }
)
#: The lists in these are the vocabulary itself.
_TABLES = frozenset({"vocab", "merges"})
#: What the classes of tokenizers end in. transformers would take any other class of its own as well: a model's, say.
_TOKENIZER_ENDINGS = ("Tokenizer", "TokenizerFast", "Backend")

#: Named at most in a message.
_EXAMPLES = 3


def require_own_files(folder: Path) -> None:
    """InvalidInput: to load the model in `folder` would read, or make, what is not the model's own."""
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise InvalidInput(
            f"{folder.name} holds {ADAPTER_CONFIG_FILE}, so that an adapter would be put onto the weights that were "
            "checked",
            code="adapter_beside_model",
            hint="Merge the adapter into the model, or move its files elsewhere.",
        )
    _require_own_tokenizer(lambda file: read_side_file(folder, file), folder.name, folder)


def require_own_files_of_hub(repo_id: str, revision: str, *, cache_dir: Path) -> None:
    """`require_own_files` of a Hub model at a commit; of one that is still to be fetched nothing but its small files
    and its weights will come. Raises as `core.checkpoints` does."""
    if (there := readable_snapshot(cache_dir, repo_id, revision)) is not None:
        require_own_files(there.folder)
        return
    _require_own_tokenizer(lambda file: read_hub_side_file(repo_id, revision, file, cache_dir=cache_dir), repo_id, None)


def names_file(option: str) -> bool:
    """Whether transformers may take the option's value for the name of a file or folder."""
    return option not in _REMNANTS and (option in _FILE_OPTIONS or option.endswith(_FILE_ENDINGS))


def _require_own_tokenizer(read: Callable[[str], dict[str, Any] | None], where: str, folder: Path | None) -> None:
    """`folder`: where the model's files lie, as far as they are here."""
    for file in _CLASS_FILES:
        kind = (read(file) or {}).get("tokenizer_class")
        if isinstance(kind, str) and not kind.endswith(_TOKENIZER_ENDINGS):
            raise _foreign(f"{where}/{file}", [("tokenizer_class", kind)], "no tokenizer that transformers has")
    for file in _OPTION_FILES:
        foreign = [(option, name) for option, name in _named(read(file) or {}) if not _is_own(name, folder)]
        if foreign:
            raise _foreign(f"{where}/{file}", foreign, "no small file of the model's own folder")


def _named(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each file that the options name, with the option. Not recursive: a stranger says how deep they go."""
    waiting: deque[tuple[str, Any]] = deque(options.items())
    while waiting:
        option, value = waiting.popleft()
        if isinstance(value, str) and names_file(option):
            yield option, value
        elif isinstance(value, dict) and option not in _TEXTS:
            waiting += value.items()
        elif isinstance(value, list) and option not in _TEXTS | _TABLES:
            waiting += [(option, one) for one in value]


def _is_own(name: str, folder: Path | None) -> bool:
    if Path(name).name != name or not is_small_file(name):
        return False
    return folder is None or (folder / name).is_file()


def _foreign(where: str, found: list[tuple[str, str]], what: str) -> InvalidInput:
    listed = ", ".join(f"{option} {name[:200]!r}" for option, name in found[:_EXAMPLES])
    options = ", ".join(dict.fromkeys(option for option, _ in found[:_EXAMPLES]))
    return InvalidInput(
        f"{where} has {listed}, which is {what}",
        code="foreign_file",
        hint=f"Take {options} out of {Path(where).name}; beside a whole tokenizer.json it is needed for nothing.",
    )
