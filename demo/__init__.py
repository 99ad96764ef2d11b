"""A tiny base/instruct pair and a dataset, made from scratch on a CPU, on which Shadow-FT can be seen.

from demo.data import RECIPE, write_datasets
from demo.pair import build_pair

pair = build_pair(Path("demo-data/pair"))        # pair.base, pair.instruct: ordinary Hugging Face folders
files = write_datasets(Path("demo-data/rows"))   # files["train"], ["validation"], ["old_skills"], ["refusals"]
"""
