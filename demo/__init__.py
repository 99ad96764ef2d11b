"""A tiny base/instruct pair and a dataset, made from scratch on a CPU, on which Shadow-FT can be seen.

from demo.data import RECIPE, write_datasets
from demo.pair import build_pair

pair = build_pair(Path("demo-data/pair"))        # pair.base, pair.instruct: ordinary Hugging Face folders
files = write_datasets(Path("demo-data/rows"))   # files["training"], ["validation"], ["old_skills"], ["refusals"]
"""

import os

# Read once, when torch loads OpenMP, so it stands here. Where others use the same cores, threads that spin while they
# wait for each other make a step of this small model several times slower (measured: 1.0 s against 0.2 to 0.4 s).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
