"""What is loaded for a check is the model's own, and what is said of its files is what they themselves say."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from core.errors import InvalidInput
from core.own_files import names_file
from tests.worker.steps.tiny import CHATML, make_tokenizer
from worker import tokenizers_check
from worker.chat_text import ChatText
from worker.tokenizers_check import check_chats


@pytest.fixture
def instruct(tmp_path):
    folder = tmp_path / "instruct"
    make_tokenizer(CHATML).save_pretrained(folder)
    return folder


def configure(folder: Path, **options: object) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **options}))


def test_nothing_of_a_file_that_is_not_the_models_is_read_or_told(instruct, tmp_path):
    """The class and the token are those by which transformers would say in a finding what the file holds."""
    (tmp_path / "deploy.env").write_text("# deployment secrets\nHF_TOKEN=hf_SECRET\n")
    (instruct / "tokenizer.json").unlink()
    configure(
        instruct, tokenizer_class="BertTokenizer", vocab=str(tmp_path / "deploy.env"), unk_token="# deployment secrets"
    )
    (finding,) = check_chats(instruct, None).findings
    assert (finding.level, finding.code) == ("refuse", "foreign_file")
    assert "hf_SECRET" not in finding.message
    with pytest.raises(InvalidInput, match=r"vocab '.*deploy\.env'"):
        ChatText.load(instruct)


def test_what_old_releases_left_behind_is_indeed_opened_by_nobody(instruct, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"eos_token": "<|im_start|>"}))
    configure(instruct, special_tokens_map_file=str(tmp_path / "map.json"), name_or_path=str(tmp_path))
    assert ChatText.load(instruct).tokenizer.eos_token == "<|im_end|>"


def test_every_option_by_which_transformers_names_a_file_is_known():
    """In the sources of the installed version, so that a new tokenizer does not open a new way out."""
    options = set(_file_options(Path(transformers.__file__).parent / "models"))
    assert {"vocab_file", "merges_file", "emoji_file", "source_spm", "sudachi_config_path"} <= options
    assert [option for option in sorted(options) if not names_file(option)] == []


def _file_options(models: Path) -> Iterator[str]:
    for path in models.glob("*/tokenization_*.py"):
        source = path.read_text()
        for names in re.findall(r"(?i)\bvocab_files_names\b[^=\n]*= \{(.*?)\}", source, re.DOTALL):
            yield from re.findall(r"\"(\w+)\":", names)
        for parameters in re.findall(r"def __init__\((.*?)\)(?: ->|:\n)", source, re.DOTALL):
            yield from re.findall(r"\b(\w+(?:file|files|path|dir|spm|dic))\b\s*[:=,]", parameters)


# --- what passes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.EMFILE, "Too many open files"),
        Exception("Too many open files (os error 24)"),
    ],
    ids=str,
)
def test_what_the_machine_fails_is_no_finding(instruct, monkeypatch, error):
    """A finding is kept and told again for as long as the files are the same."""

    def fail(*_: object, **__: object) -> None:
        try:
            raise error
        except BaseException as cause:
            raise OSError("Unable to load vocabulary from file.") from cause  # as transformers puts it

    monkeypatch.setattr(tokenizers_check.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="vocabulary"):
        check_chats(instruct, None)


def test_what_a_template_says_of_the_machine_is_a_finding(instruct):
    (instruct / "chat_template.jinja").write_text("{{ raise_exception('(os error 12)') }}")
    (instruct / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 259}')
    assert "broken_chat_template" in {finding.code for finding in check_chats(instruct, None).findings}


# --- padding ----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_can_pad_with_nothing_is_refused(instruct):
    configure(instruct, eos_token=None, pad_token=None)
    with pytest.raises(InvalidInput) as caught:
        ChatText.load(instruct)
    assert caught.value.code == "no_padding"


def test_a_padding_that_base_lacks_and_no_end_to_stand_in_for_it_are_refused(instruct, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 256}')
    assert ChatText.load(instruct, base=base).pad_id == 258
    configure(instruct, eos_token=None)
    with pytest.raises(InvalidInput) as caught:
        ChatText.load(instruct, base=base)
    assert caught.value.code == "no_padding"
