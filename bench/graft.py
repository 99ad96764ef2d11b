"""How fast and how lean a graft is, against floors and against other ways to the same model.

Prints one JSON line per case: ours and the yardstick (medians, system time, peak memory, every wall time), the ratio of
the medians, its spread and its target, and what a comparison of the results to the bit found. Every run is a whole
process, imports included; the ways take turns and are primed alike right before each run. See `yardsticks/timing.py`.

    python bench/graft.py                                # everything; the pair of 5 B needs 46 GB of disk
    python bench/graft.py --cases full,lora --pairs 7
    python bench/graft.py --quick                        # a tiny pair, once: does the bench itself work?
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, TextIO

from yardsticks import with_mergekit
from yardsticks.setting import (
    BUILD,
    MODEL_BYTES,
    PROGRAMS,
    ROOT,
    Models,
    Unavailable,
    machine,
    models_in,
    program,
    sink,
)
from yardsticks.timing import Outcome, Way, prime, ratio, summary, take_turns

#: The size that the targets are for.
TARGET_SIZE = "1.3b"
LARGE = "5b"
PEAK_MIB = 0.6 * 1024

#: What the hashes of a manifest cost by themselves depends on the processor alone: 0.4 GB/s a core, or 1.3 with the
#: instructions for it. So one floor has them too.
HASH = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
with ThreadPoolExecutor() as pool:
    print(*pool.map(digest, sys.argv[1:]))
"""


@dataclass(frozen=True)
class Case:
    """Ours takes at most `target` times as long as the yardstick; None: only to know."""

    name: str
    ours: str
    yardstick: str
    target: float | None

    @property
    def family(self) -> str:
        return "lora" if "lora" in self.ours else "full"


CASES = (
    Case("full", "ours-weights-only", "floor-full", 1.1),
    Case("full-checked", "ours", "floor-full", 1.4),
    Case("full-hashed", "ours", "floor-hashed", None),
    # The others write neither hashes nor figures, so that the same work is ours without them.
    Case("mergekit-fast", "ours-weights-only", "mergekit-fast", 1 / 3),
    Case("mergekit-exact", "ours-weights-only", "mergekit-exact", 1 / 6),
    Case("mergekit-linear", "ours-weights-only", "mergekit-linear", None),
    Case("transformers", "ours-weights-only", "transformers", 1 / 5),
    Case("lora", "ours-lora-weights-only", "floor-lora", 1.6),
    Case("lora-checked", "ours-lora", "floor-lora", 1.6),
    Case("peft", "ours-lora", "peft", None),
)
#: These are no comparison of two ways, and have functions of their own.
OTHERS = ("peft-float32", "profile", "sizes")
NAMES = (*(case.name for case in CASES), *OTHERS)


@dataclass
class Bench:
    models: Models
    size: str
    pairs: int
    sink: TextIO | None
    failed: bool = False

    @property
    def pair(self) -> Path:
        return self.models.pair(self.size)

    def say(self, case: str, **values: Any) -> None:
        """A line to the terminal and to the file, as soon as it is known."""
        line = json.dumps({"bench": "graft", "case": case, **values}, ensure_ascii=False)
        for target in (sys.stdout, self.sink):
            if target:
                print(line, file=target, flush=True)

    def fail(self, case: str, reason: str) -> None:
        self.failed = True
        self.say(case, failed=reason)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # then the models go as after an error
    with models_in(options.folder, keep=options.keep) as models, sink("graft", save=options.save) as saved:
        bench = Bench(models, options.size, options.pairs, saved)
        bench.say("machine", **machine(), size=options.size, pairs=options.pairs)
        for family in ("full", "lora"):
            cases = [case for case in CASES if case.name in options.cases and case.family == family]
            if cases:
                _say_failures(bench, family, partial(_compare_ways, bench, cases))
        if "peft-float32" in options.cases:
            _say_failures(bench, "peft-float32", lambda: _compare_with_peft(bench, options.small))
        if "profile" in options.cases:
            _say_failures(bench, "profile", lambda: _profile(bench))
        if "sizes" in options.cases:
            _say_failures(bench, "sizes", lambda: _compare_sizes(bench, options.large))
    sys.exit(1 if bench.failed else 0)


def _say_failures(bench: Bench, name: str, work: Callable[[], None]) -> None:
    """What cannot be had or breaks is said, and the rest goes on."""
    try:
        work()
    except Unavailable as error:
        bench.say(name, skipped=str(error))
    except RuntimeError as error:
        bench.fail(name, str(error))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(NAMES), help=f"some of {', '.join(NAMES)}")
    parser.add_argument(
        "--size", choices=MODEL_BYTES, default=TARGET_SIZE, help="parameters of the pair (default 1.3b)"
    )
    parser.add_argument("--large", choices=MODEL_BYTES, default=LARGE, help="the other size of the case `sizes`")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved runs of each way (default 5)")
    parser.add_argument("--folder", type=Path, help="where the models live; default: a temporary one under build/")
    parser.add_argument("--keep", action="store_true", help="leave the models there, for the next run to use")
    parser.add_argument("--save", action="store_true", help="write the lines to bench/results/ too")
    parser.add_argument("--quick", action="store_true", help="a tiny pair, one run of each way")
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(NAMES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    if options.quick:
        options.size, options.large, options.pairs = "tiny", "50m", 1
    options.small = "tiny" if options.quick else "50m"
    return options


# --- ways -------------------------------------------------------------------------------------------------------------


def _ways(pair: Path) -> dict[str, Way]:
    """All but mergekit's; the full delta in scope `all`, since then every byte of every file matters to every way."""
    instruct, base, tuned, adapter = (pair / name for name in ("instruct", "base", "tuned", "adapter"))
    full, lora = _weights(instruct, base, tuned), _weights(instruct, adapter)
    of_full = _ours(pair, "--base", str(base), "--tuned", str(tuned), "--scope", "all")
    of_lora = _ours(pair, "--adapter", str(adapter))
    checked, bare = "shadowft graft: fidelity, sha256 of every file", "shadowft graft --no-report: weights only"
    ways = [
        Way("ours", checked, lambda out: [*of_full, "--out", str(out)], full),
        Way("ours-weights-only", bare, lambda out: [*of_full, "--no-report", "--out", str(out)], full),
        _floor("floor-full", "cat of the three models, cp of one, its files synced", full, instruct),
        _floor("floor-hashed", "the same, and sha256 of the copy on every core", full, instruct, hashed=True),
        Way(
            "transformers",
            "three models loaded, added, save_pretrained",
            _python("with_transformers.py", instruct, base, tuned),
            full,
        ),
        Way("ours-lora", checked, lambda out: [*of_lora, "--out", str(out)], lora),
        Way("ours-lora-weights-only", bare, lambda out: [*of_lora, "--no-report", "--out", str(out)], lora),
        _floor("floor-lora", "cp of one model, its files synced", (), instruct),
        Way("peft", "merge_and_unload, save_pretrained", _python("with_peft.py", instruct, adapter), lora),
    ]
    return {way.name: way for way in ways}


def _ours(pair: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        *os.environ.get("OURS", "-m cli graft").split(),
        "--instruct",
        str(pair / "instruct"),
        *options,
    ]


def _weights(*folders: Path) -> tuple[Path, ...]:
    return tuple(path for folder in folders for path in sorted(folder.glob("*.safetensors")))


def _floor(name: str, what: str, read: Sequence[Path], copied: Path, *, hashed: bool = False) -> Way:
    """What no way can do without, by the tools that do nothing else."""
    files = _weights(copied)

    def command(out: Path) -> list[str]:
        written = [out / file.name for file in files]
        parts = [f"cat {_quoted(read)} > /dev/null"] if read else []
        parts += [f"cp {_quoted([*files, out])}", f"sync {_quoted(written)}"]
        parts += [_quoted([sys.executable, "-c", HASH, *written])] if hashed else []
        return ["sh", "-c", " && ".join(parts)]

    return Way(name, what, command, tuple(read) or files, makes_folder=False)


def _quoted(words: Sequence[str | Path]) -> str:
    return shlex.join(map(str, words))


def _python(program: str, *folders: Path) -> Callable[[Path], list[str]]:
    return lambda out: [sys.executable, *map(str, (PROGRAMS / program, *folders, out))]


def _mergekit_way(name: str, pair: Path) -> Way:
    """Unavailable: mergekit cannot be had here."""
    environment = BUILD / "bench-mergekit"
    with_mergekit.install(environment, ROOT / "requirements.lock")
    way = name.removeprefix("mergekit-")
    text = with_mergekit.configuration(way, pair)
    file = pair / f"{name}.yml"
    file.write_text(text)
    files = _weights(*(pair / model for model in ("instruct", "base", "tuned")))
    settings = {key: value for key, value in json.loads(text).items() if key not in ("models", "base_model")}
    what = f"mergekit {with_mergekit.VERSION}, {json.dumps(settings)}, {' '.join(with_mergekit.FLAGS)}"
    return Way(name, what, lambda out: with_mergekit.command(environment, file, out), files)


# --- comparisons ------------------------------------------------------------------------------------------------------


def _compare_ways(bench: Bench, cases: Sequence[Case]) -> None:
    """All ways of one family take turns, so that each case's pairs come from the same rounds."""
    ways, missing = _chosen_ways(bench.pair, cases)
    out = bench.pair / "out"
    out.mkdir(exist_ok=True)
    outcomes = take_turns(list(ways.values()), rounds=bench.pairs, folder=out)
    for case in cases:
        if case.yardstick in missing:
            bench.say(case.name, skipped=missing[case.yardstick])
        else:
            _say_case(bench, case, ways, outcomes, out)
    rmtree(out)


def _chosen_ways(pair: Path, cases: Sequence[Case]) -> tuple[dict[str, Way], dict[str, str]]:
    known, ways, missing = _ways(pair), {}, {}
    for name in dict.fromkeys(name for case in cases for name in (case.ours, case.yardstick)):
        try:
            ways[name] = _mergekit_way(name, pair) if name.startswith("mergekit") else known[name]
        except Unavailable as error:
            missing[name] = str(error)
    return ways, missing


def _say_case(bench: Bench, case: Case, ways: dict[str, Way], outcomes: dict[str, Outcome], out: Path) -> None:
    if failures := _failures(outcomes, case.ours, case.yardstick):
        bench.fail(case.name, failures)
        return
    ours, yardstick = outcomes[case.ours].runs, outcomes[case.yardstick].runs
    bench.say(
        case.name,
        size=bench.size,
        **_judged(ratio(ours, yardstick), case.target if bench.size == TARGET_SIZE else None),
        ours={"what": ways[case.ours].what, **summary(ours)},
        yardstick={"what": ways[case.yardstick].what, **summary(yardstick)},
        **_results(bench.pair, out, case),
    )


def _failures(outcomes: dict[str, Outcome], *names: str) -> str:
    return "; ".join(f"{name}: {outcomes[name].failure}" for name in names if outcomes[name].failure)


def _judged(figures: dict[str, Any], target: float | None) -> dict[str, Any]:
    """With the other side of the ratio where a target says how many times faster ours is to be."""
    if figures["ratio"] < 1:
        figures |= {"times_faster": round(1 / figures["ratio"], 2)}
    if target is None:
        return figures
    said = f"at most {target} x" if target >= 1 else f"at least {1 / target:.0f} x faster"
    return figures | {"target": said, "met": figures["ratio"] <= target}


def _results(pair: Path, out: Path, case: Case) -> dict[str, Any]:
    """To the bit: against the other way's, or against the plain sum where the yardstick is a floor."""
    if case.name.startswith("lora"):
        return {}  # the case `peft` and the case `peft-float32` compare these
    if case.yardstick == "floor-hashed":
        return {}  # `full-checked` has compared the same output
    if case.yardstick.startswith("floor"):
        sources = [pair / name for name in ("instruct", "base", "tuned")]
        return {"against_the_sum": json.loads(program("compare.py", out / case.ours, *sources))}
    return {"results": json.loads(program("compare.py", out / case.ours, out / case.yardstick))}


def _compare_with_peft(bench: Bench, size: str) -> None:
    """On a float32 copy, where nothing is rounded to bfloat16: what is left is the order of PEFT's sums."""
    pair = bench.models.pair(size)
    out = pair / "out"
    out.mkdir(exist_ok=True)
    options = ("--adapter", str(pair / "adapter"), "--output-dtype", "float32", "--out", str(out / "ours"))
    done = subprocess.run(_ours(pair, *options), capture_output=True, text=True, check=False)
    if done.returncode:
        bench.fail("peft-float32", done.stderr.strip()[-1500:])
    else:
        program("with_peft.py", pair / "instruct", pair / "adapter", out / "peft", "float32")
        counts = json.loads(program("compare.py", out / "ours", out / "peft"))
        bench.say("peft-float32", size=size, results=counts)
    rmtree(out)


# --- sizes ------------------------------------------------------------------------------------------------------------


def _compare_sizes(bench: Bench, large: str) -> None:
    """Peak memory and time per byte at both sizes, from cold inputs: those of the large pair fit no page cache."""
    small = _size_figures(bench, bench.size)
    bench.models.discard()  # the large one needs the room
    figures = _size_figures(bench, large)
    if small and figures:
        peaks = [small["peak_mib"], figures["peak_mib"]]
        bench.say(
            "sizes",
            sizes=[bench.size, large],
            seconds_per_gb_ratio=round(figures["seconds_per_gb"] / small["seconds_per_gb"], 3),
            peak_mib=peaks,
            target=f"peaks of at most {PEAK_MIB:.0f} MiB, within a tenth of each other",
            met=max(peaks) <= min(PEAK_MIB, 1.1 * min(peaks)),
        )


def _size_figures(bench: Bench, size: str) -> dict[str, Any]:
    """Empty: it failed, and that has been said. Unavailable: there is no room."""
    pair = bench.models.pair(size)
    known, out = _ways(pair), pair / "out"
    out.mkdir(exist_ok=True)
    ways = [known["ours"], known["floor-full"]]
    outcomes = take_turns(ways, rounds=bench.pairs, folder=out, cold=True, keep_output=False)
    rmtree(out)
    if failures := _failures(outcomes, "ours", "floor-full"):
        bench.fail(f"sizes-{size}", failures)
        return {}
    ours, floor = outcomes["ours"].runs, outcomes["floor-full"].runs
    gigabytes = sum(path.stat().st_size for path in known["ours"].reads) * 4 / 3 / 1e9  # three read, one written
    figures = {"seconds_per_gb": round(summary(ours)["wall"] / gigabytes, 3), "peak_mib": summary(ours)["peak_mib"]}
    bench.say(
        f"sizes-{size}",
        inputs="cold",
        gigabytes=round(gigabytes, 2),
        **figures,
        **ratio(ours, floor),
        ours={"what": known["ours"].what, **summary(ours)},
        yardstick={"what": known["floor-full"].what, **summary(floor)},
    )
    return figures


# --- profile ----------------------------------------------------------------------------------------------------------


def _profile(bench: Bench) -> None:
    """What bounds a full graft: its stages alone, and where its threads are found in a run of the whole."""
    pair, out = bench.pair, bench.pair / "profiled"
    files = _weights(*(pair / name for name in ("instruct", "base", "tuned")))
    prime(files, cold=False)
    stages = json.loads(program("stages.py", pair, pair / "scratch"))
    bench.say("profile-stages", size=bench.size, what="each stage alone, two threads", stages=stages)
    prime(files, cold=False)
    sampled = json.loads(program("sampled.py", *(pair / name for name in ("instruct", "base", "tuned")), out))
    bench.say("profile", size=bench.size, slowest_stage=max(stages, key=lambda name: stages[name]["wall"]), **sampled)
    rmtree(out)


if __name__ == "__main__":
    main()
