"""A console whose server is the API behind a socket, and a team of its own."""

from __future__ import annotations

import pytest

from tests.api.talk import client
from tests.wire import wire_to

__all__ = ["client"]


@pytest.fixture
def ours(shadowft, monkeypatch, client, tmp_path):
    """`shadowft …` as the client's team, in an empty folder."""
    monkeypatch.setenv("SHADOWFT_URL", client.api.url)
    monkeypatch.setenv("SHADOWFT_API_KEY", client.member.key)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return shadowft


@pytest.fixture
def wire(api, monkeypatch, ours):
    """Between that console and the server."""
    with wire_to(api.port) as wire:
        monkeypatch.setenv("SHADOWFT_URL", wire.url)
        yield wire
