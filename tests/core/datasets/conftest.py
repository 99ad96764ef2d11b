from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Write = Callable[[bytes], Path]
WriteRows = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_bytes(content: bytes) -> Path:
        path = tmp_path / "training.jsonl"
        path.write_bytes(content)
        return path

    return write_bytes


@pytest.fixture
def write_rows(write: Write) -> WriteRows:
    def write_jsonl(*rows: Any) -> Path:
        return write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    return write_jsonl


@pytest.fixture
def good() -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
