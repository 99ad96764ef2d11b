"""How fast the gap between two models is measured, against a `cat` of both: what no way can do without.

Prints one JSON line per case: the whole process, and the pass alone without the imports. See `bench/graft.py` for what
stands in it.

    python bench/similarity.py                                  # the pair of 1.3 B needs 12 GB of disk
    python bench/similarity.py --folder FOLDER --pairs 7        # a pair that another bench has left there
    python bench/similarity.py --quick                          # a tiny pair, once: does the bench itself work?
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from yardsticks.setting import MODEL_BYTES, PROGRAMS, machine, models_in, sink
from yardsticks.timing import Run, Way, primed_run, ratio, summary

TARGET_SIZE, TARGET = "1.3b", 1.3
FIGURES = "figures.json"


@dataclass(frozen=True)
class Turn:
    """One run of each way, right after the other."""

    ours: Run
    floor: Run
    #: Seconds of ours: the pass over the bytes, the imports; and what it found.
    figures: dict[str, float]

    @property
    def pass_alone(self) -> Run:
        return replace(self.ours, wall=self.figures["pass"])


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # then the models go as after an error
    with models_in(options.folder, keep=options.keep) as models, sink("similarity", save=options.save) as saved:
        _say(saved, "machine", **machine(), size=options.size, pairs=options.pairs)
        turns = [_turn(models.pair(options.size)) for _ in range(options.pairs)]
        _say_cases(saved, options.size, turns)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", choices=MODEL_BYTES, default=TARGET_SIZE, help="parameters of the pair (default 1.3b)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each way (default 5)")
    parser.add_argument("--folder", type=Path, help="where the models live; default: a temporary one under build/")
    parser.add_argument("--keep", action="store_true", help="leave the models there, for the next run to use")
    parser.add_argument("--save", action="store_true", help="write the lines to bench/results/ too")
    parser.add_argument("--quick", action="store_true", help="a tiny pair, one run of each way")
    options = parser.parse_args()
    if options.quick:
        options.size, options.pairs = "tiny", 1
    return options


def _turn(pair: Path) -> Turn:
    base, instruct, out = pair / "base", pair / "instruct", pair / "sigma"
    files = tuple(path for folder in (base, instruct) for path in sorted(folder.glob("*.safetensors")))
    program = [sys.executable, str(PROGRAMS / "sigma.py"), str(base), str(instruct)]
    ours = Way("ours", "", lambda out: [*program, str(out / FIGURES)], files, makes_folder=False)
    cat = f"cat {shlex.join(map(str, files))} > /dev/null"
    floor = Way("floor", "", lambda out: ["sh", "-c", cat], files, makes_folder=False)
    measured = primed_run(ours, out, cold=False)
    figures = json.loads((out / FIGURES).read_bytes())
    turn = Turn(measured, primed_run(floor, out, cold=False), figures)
    out.rmdir()
    return turn


def _say_cases(saved: TextIO | None, size: str, turns: Sequence[Turn]) -> None:
    floor = [turn.floor for turn in turns]
    cases = {
        "whole-process": ("measure_similarity in a process of its own, imports included", [one.ours for one in turns]),
        "pass-alone": ("the same without the imports", [one.pass_alone for one in turns]),
    }
    for case, (what, ours) in cases.items():
        figures = ratio(ours, floor)
        judged = {"target": f"at most {TARGET} x", "met": figures["ratio"] <= TARGET} if size == TARGET_SIZE else {}
        _say(
            saved,
            case,
            size=size,
            **figures,
            **judged,
            ours={"what": what, **summary(ours)},
            yardstick={"what": "cat of both models to /dev/null", **summary(floor)},
            gigabytes=round(turns[0].figures["bytes"] / 1e9, 2),
            import_seconds=round(min(turn.figures["imports"] for turn in turns), 2),
            sigma=turns[0].figures["sigma"],
        )


def _say(saved: TextIO | None, case: str, **values: Any) -> None:
    line = json.dumps({"bench": "similarity", "case": case, **values}, ensure_ascii=False)
    for target in (sys.stdout, saved):
        if target:
            print(line, file=target, flush=True)


if __name__ == "__main__":
    main()
