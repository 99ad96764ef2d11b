"""A request's line is written past structlog, and looks as if it were not."""

from __future__ import annotations

import json
import logging
import re

import pytest
import structlog

from core.config import Settings
from core.logs import access_log, configure_logging


@pytest.fixture
def written(capsys, monkeypatch):
    """`written(**settings)`: the same two lines, by structlog and by the access log."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)

    def write(path="/v1/files", retry=None, **settings):
        made = Settings(_env_file=None, **settings)
        structlog.reset_defaults()
        configure_logging(made)
        fields = {"method": "GET", "path": path, "status": 200, "ms": 1.5, "retry": retry}
        structlog.get_logger("api").info("request", request_id="req_1", **fields)
        access_log(made)("req_1", "GET", path, 200, 1.5, retry)
        return [re.sub(r"20\d\d-\S+Z", "NOW", line) for line in capsys.readouterr().err.splitlines()]

    yield write
    structlog.reset_defaults()


@pytest.mark.parametrize("path", ["/v1/files", "/v1/a b", "/v1/a=b", '/v1/"', "/v1/'", "/v1/a\nb"])
@pytest.mark.parametrize("retry", [None, "0", "1 2"])
def test_a_requests_line_is_that_of_structlog(written, path, retry):
    ours, theirs = written(path, retry, log_format="console")
    assert ours == theirs
    ours, theirs = (json.loads(line) for line in written(path, retry, log_format="json"))
    assert ours == theirs


def test_no_character_of_a_path_reaches_the_terminal_that_could_command_it(written):
    assert "\x1b" not in written("/v1/\x1b[2J", log_format="console")[1]


def test_a_higher_level_leaves_requests_out(written):
    assert written(log_level="warning") == []
