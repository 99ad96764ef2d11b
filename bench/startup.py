"""What importing the API and the Celery worker costs, against a bare FastAPI import in the same run.

Prints one JSON line each: seconds and resident memory, medians of interleaved fresh interpreters.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

RUNS = 7
#: The last one shows what the queue's process is spared.
MODULES = {"bare fastapi": "fastapi", "api": "api.app", "celery worker": "worker.tasks", "torch": "torch"}
YARDSTICK = "bare fastapi"

PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
__import__(sys.argv[1])
seconds = time.perf_counter() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "torch" in sys.modules]))
"""


def measure(module: str) -> tuple[float, float, bool]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, module], capture_output=True, text=True, check=True)
    seconds, mebibytes, torch_imported = json.loads(done.stdout)
    return seconds, mebibytes, torch_imported


def main() -> None:
    for module in MODULES.values():
        measure(module)  # the page cache is primed alike
    runs = {name: [] for name in MODULES}
    for _ in range(RUNS):
        for name, module in MODULES.items():
            runs[name].append(measure(module))
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in runs.items()
    }
    for name, (seconds, mebibytes, torch_imported) in medians.items():
        print(
            json.dumps(
                {
                    "bench": f"import {name}",
                    "seconds": round(seconds, 3),
                    "mebibytes": round(mebibytes),
                    "ratio_to_bare_fastapi": round(seconds / medians[YARDSTICK][0], 2),
                    "imports_torch": bool(torch_imported),
                }
            )
        )


if __name__ == "__main__":
    main()
