"""The way through mergekit: `instruct + (tuned - base)` in three configurations that mean the same.

mergekit gets a virtual environment of its own, which sees the packages of ours: its pins may one day ask for others,
and must not change ours. Made on demand.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

from yardsticks.setting import Unavailable

VERSION = "0.1.5"
#: What makes it fastest on two cores; and nothing that asks for the network or for a tokenizer.
FLAGS = (
    *("--lazy-unpickle", "--async-write", "--write-threads", "2", "--num-threads", "2"),
    *("--no-copy-tokenizer", "--no-write-model-card", "--quiet"),
)


def install(environment: Path, constraints: Path) -> None:
    """Unavailable: pip could not."""
    if (environment / "bin" / "mergekit-yaml").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "-c", str(constraints), f"mergekit=={VERSION}"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"mergekit {VERSION} cannot be installed: {done.stderr.strip()[-500:]}")


def configuration(way: str, pair: Path) -> str:
    """`fast` works in bfloat16, `exact` in float32; `linear` weighs three models by 1, 1 and -1 instead."""
    signs = {"tuned": 1, "base": -1} if way != "linear" else {"instruct": 1, "tuned": 1, "base": -1}
    models = [{"model": str(pair / name), "parameters": {"weight": sign}} for name, sign in signs.items()]
    if way == "linear":
        method = {"merge_method": "linear", "parameters": {"normalize": False}}
    else:
        method = {"merge_method": "task_arithmetic", "base_model": str(pair / "instruct")}
    dtypes = {"dtype": "float32", "out_dtype": "bfloat16"} if way == "exact" else {"dtype": "bfloat16"}
    return json.dumps(method | dtypes | {"models": models})  # JSON is YAML too


def command(environment: Path, configuration_file: Path, out: Path) -> list[str]:
    return [str(environment / "bin" / "mergekit-yaml"), str(configuration_file), str(out), *FLAGS]
