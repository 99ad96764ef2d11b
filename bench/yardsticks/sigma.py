"""Measures the gap between two models, and writes what the pass alone took, imports left out.

python bench/yardsticks/sigma.py BASE INSTRUCT FILE
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    started = time.perf_counter()
    from worker.weights import measure_similarity  # here, since imports are timed

    imported = time.perf_counter()
    base, instruct, file = map(Path, sys.argv[1:])
    found = measure_similarity(base, instruct)
    done = time.perf_counter()
    figures = {"pass": done - imported, "imports": imported - started, "sigma": found.sigma_ratio, "bytes": found.bytes}
    file.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
