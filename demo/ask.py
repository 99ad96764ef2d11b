"""Ask model folders a question: `python -m demo.ask QUESTION FOLDER…` prints the answers as a JSON list."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MAX_NEW_TOKENS = 32


def answer(folder: str, question: str) -> str:
    """The model's greedy answer: what anyone gets who loads the folder with transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    messages = [{"role": "user", "content": question}]
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    return str(tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    sys.stdout.write(json.dumps([answer(folder, sys.argv[1]) for folder in sys.argv[2:]]))
