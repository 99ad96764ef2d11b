"""The contract under every version of the SDK that is promised: one script, a running service, real workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import openai
import pytest

from core.db import Database
from core.keys import create_key, create_team
from tests.servers import missing

pytestmark = pytest.mark.xdist_group("e2e-main")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "conformance" / "script.py"
OLD = ("1.109.1", "2.54.0")
VERSIONS = [*(pytest.param(version, marks=pytest.mark.slow) for version in OLD), openai.__version__]


def python_with(version: str) -> Path:
    """The interpreter of an environment that has this SDK; made once and kept below `build/`."""
    if version == openai.__version__:
        return Path(sys.executable)
    folder = ROOT / "build" / f"openai-{version}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    done = subprocess.run([python, "-m", "pip", "install", "-q", f"openai=={version}"], capture_output=True, text=True)
    if done.returncode:
        missing(f"openai {version} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    ready.touch()
    return python


def new_key(data_dir: Path, name: str) -> str:
    """Of a team of its own."""
    database = Database(f"sqlite:///{data_dir / 'shadowft.db'}")
    with database.writing() as session:
        _, key = create_key(session, create_team(session, name), name="test", is_admin=False)
        session.commit()
    database.close()
    return key


@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_of_the_contract_works(version, make_ready, tiny, record_property):
    python, ready = python_with(version), make_ready()
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI_")}
    env["OPENAI_API_KEY"] = new_key(ready.data_dir, f"sdk-{version}")
    command = [python, "-W", "ignore", SCRIPT, ready.url, "tiny", tiny.rows]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    lines = ROOT / "build" / f"conformance-{version}.jsonl"
    lines.parent.mkdir(exist_ok=True)
    lines.write_text(done.stdout)
    tried = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"{one['call']}: {one['detail']}" for one in tried if not one["ok"]]
    kept = f"{len(tried) - len(failed)} of {len(tried)} calls as promised, see {lines.relative_to(ROOT)}"
    record_property("summary", f"openai {version}: {kept}")
    assert tried, done.stderr
    assert not failed, "\n".join([*failed, done.stderr])
    assert done.returncode == 0, done.stderr
