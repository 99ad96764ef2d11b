"""The way through transformers: three models loaded, their weights added, one saved.

python bench/yardsticks/with_transformers.py INSTRUCT BASE TUNED OUT
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    *folders, out = sys.argv[1:]
    instruct, base, tuned = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in folders)
    weights, start, end = instruct.state_dict(), base.state_dict(), tuned.state_dict()
    with torch.no_grad():
        for name, weight in weights.items():
            weight.add_(end[name] - start[name])
    instruct.save_pretrained(out)


if __name__ == "__main__":
    main()
