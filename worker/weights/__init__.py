"""Grafts what one model learned onto another, tensor by tensor, from folders to a folder.

    from pathlib import Path
    from worker.weights import FullDelta, LoraDelta, Provenance, graft

    delta = FullDelta(base=Path("qwen3-base"), tuned=Path("my-tuned-base"))   # or LoraDelta(Path("my-adapter"))
    names = Provenance(instruct="Qwen/Qwen3-4B", base="Qwen/Qwen3-4B-Base", tuned="my run of Monday")
    result = graft(instruct=Path("qwen3-4b"), delta=delta, out=Path("grafted"), scale=1.0, scope="linear", names=names)
    print(result.fidelity, result.worst_tensor)  # the share of the change that survives storage in Instruct's dtype

The result is `instruct + scale * (tuned - base)` (Shadow-FT, arXiv 2505.12716). Only a chunk of a tensor is in memory
at a time, nothing stands at `out` before all of it does, and a pair that does not fit is refused before any weight is
read.
"""

from worker.weights.delta import BoundDelta, Delta, FullDelta, LoraDelta
from worker.weights.graft import GraftResult, Provenance, graft

__all__ = ["BoundDelta", "Delta", "FullDelta", "GraftResult", "LoraDelta", "Provenance", "graft"]
