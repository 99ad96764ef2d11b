"""Counts the elements in which a model folder differs from another, or from the sum that a graft should be.

Prints one JSON line. `signed_zeros` differ in the sign of a zero only and are counted apart; `beyond_one_step` are
further away than the next number that the dtype has.

    python bench/yardsticks/compare.py OURS OTHER
    python bench/yardsticks/compare.py OURS INSTRUCT BASE TUNED     # against instruct + (tuned - base), rounded once
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

#: The integer that has a dtype's width, so that bits can be compared and steps counted.
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}

Reader = Callable[[str], Tensor]


def main() -> None:
    with ExitStack() as stack:
        (names, ours), *others = [_open(Path(argument), stack) for argument in sys.argv[1:]]
        counts = {"elements": 0, "differ": 0, "signed_zeros": 0, "beyond_one_step": 0}
        for name in sorted(names):
            expected = _expected([read for _, read in others], name)
            for key, value in _count(ours(name), expected).items():
                counts[key] += value
    print(json.dumps(counts))


def _open(folder: Path, stack: ExitStack) -> tuple[set[str], Reader]:
    files = [stack.enter_context(safe_open(path, framework="pt")) for path in sorted(folder.glob("model*.safetensors"))]
    homes = {name: file for file in files for name in file.keys()}  # noqa: SIM118  a file is not a mapping
    return set(homes), lambda name: homes[name].get_tensor(name)


def _expected(readers: list[Reader], name: str) -> Tensor:
    if len(readers) == 1:
        return readers[0](name)
    instruct, base, tuned = (read(name) for read in readers)
    update = tuned.float() - base.float()
    return torch.where(update == 0, instruct, (instruct.float() + update).to(instruct.dtype))


def _count(ours: Tensor, expected: Tensor) -> dict[str, int]:
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    left, right = (values.view(BITS[ours.dtype]) for values in (ours, expected))
    unlike = left != right
    left, right = left[unlike], right[unlike]  # few, so that widening them costs nothing
    zeros = (ours[unlike] == 0) & (expected[unlike] == 0)
    steps = (_rank(left) - _rank(right)).abs()
    return {
        "elements": ours.numel(),
        "differ": int((~zeros).sum()),
        "signed_zeros": int(zeros.sum()),
        "beyond_one_step": int((steps > 1).sum()),
    }


def _rank(bits: Tensor) -> Tensor:
    """Place in the order of all numbers of the dtype; both zeros have the same."""
    wide = bits.long()
    return torch.where(wide < 0, torch.iinfo(bits.dtype).min - wide, wide)


if __name__ == "__main__":
    main()
