"""The way through PEFT: the adapter put on Instruct, merged into it, saved.

python bench/yardsticks/with_peft.py INSTRUCT ADAPTER OUT [DTYPE]
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    instruct, adapter, out, *dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(instruct, dtype=getattr(torch, *dtype or ["bfloat16"]))
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    main()
