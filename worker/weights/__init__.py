"""Grafts what one model learned onto another, tensor by tensor, from folders to a folder.

    from pathlib import Path
    from worker.weights import FullDelta, LoraDelta, Origin, Provenance, Selection, graft, verify

    delta = FullDelta(base=Path("qwen3-base"), tuned=Path("my-tuned-base"))   # or LoraDelta(Path("my-adapter"))
    result = graft(instruct=Path("qwen3-4b"), delta=delta, out=Path("grafted"), scale=1.0,
                   selection=Selection("linear", exclude=("*.layers.0.*",)),
                   provenance=Provenance(names={"instruct": Origin("Qwen/Qwen3-4B")}, keep_paths=True))
    print(result.fidelity, result.worst_tensor)  # the share of the change that survives storage in Instruct's dtype
    assert not verify(Path("grafted")).problems

The result is `instruct + scale * (tuned - base)` (Shadow-FT, arXiv 2505.12716). A few megabytes of it are in memory at
a time, nothing stands at `out` before all of it does, and a pair that does not fit is refused before any weight is
read. `save_delta` keeps the difference itself, and `SavedDelta` grafts it later, onto another model of the lineage.
"""

from core.graft_plan import Selection
from worker.weights.delta import BoundDelta, Delta, FullDelta, LoraDelta, SavedDelta
from worker.weights.figures import LOW_FIDELITY, Figures, remedy
from worker.weights.graft import GraftResult, graft
from worker.weights.origin import Origin, Provenance
from worker.weights.save import DeltaResult, save_delta
from worker.weights.similarity import OutOfTime, Similarity, band, measure_similarity, remark
from worker.weights.special_rows import untrained_rows
from worker.weights.verify import Verification, verify

__all__ = [
    "LOW_FIDELITY",
    "BoundDelta",
    "Delta",
    "DeltaResult",
    "Figures",
    "FullDelta",
    "GraftResult",
    "LoraDelta",
    "Origin",
    "OutOfTime",
    "Provenance",
    "SavedDelta",
    "Selection",
    "Similarity",
    "Verification",
    "band",
    "graft",
    "measure_similarity",
    "remark",
    "remedy",
    "save_delta",
    "untrained_rows",
    "verify",
]
