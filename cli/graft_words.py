"""What `shadowft graft` says of what it has done: a label and a value for each thing to know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cli.printing import counted, size

if TYPE_CHECKING:
    from worker.weights import DeltaResult, GraftResult, Verification

Rows = list[tuple[str, str]]


def of_graft(result: GraftResult) -> Rows:
    rows = [("tensors", f"{result.grafted} grafted, {result.copied} copied"), *_figures(result), _written(result)]
    if result.resumed_shards:
        rows.append(("resumed", f"{result.resumed_shards} of the files were finished by an earlier run"))
    return [*rows, *_remarks(result.remarks)]


def of_delta(result: DeltaResult) -> Rows:
    return [("tensors", f"{result.tensors}, in float32"), _written(result)]


def of_plan(found: dict[str, Any]) -> Rows:
    rows = [("tensors", f"{found['grafted']} to graft, {found['copied']} to copy")]
    if found["discarded"]:
        rows.append(("left out", f"{found['discarded']} of the copied ones, which tuning may have changed too"))
    rows += [("rows", f"the first {count} of {name}") for name, count in found["common_rows"].items()]
    rows.append(("weights", f"{size(found['bytes'])} in {counted(found['files'], 'file')}"))
    return [*rows, *_remarks(found["remarks"])]


def of_verification(found: Verification) -> Rows:
    remade = f"{found.tensors} of {found.tensors_in_all} made again" if found.tensors_in_all else "none made again"
    return [("files", f"{found.files}, {size(found.bytes)}"), ("tensors", remade)]


def _figures(result: GraftResult) -> Rows:
    if result.fidelity is None:
        return [("fidelity", "not measured; no file was hashed")]
    rows = [("fidelity", f"{max(0.0, result.fidelity):.4f} of the change survives rounding")]
    if result.worst_tensor is not None and result.worst_fidelity is not None:
        rows.append(("  worst", f"{max(0.0, result.worst_fidelity):.4f} in {result.worst_tensor}"))
    if result.discarded_share:
        rows.append(("left out", f"{result.discarded_share:.4f} of the whole change, by scope or patterns"))
    if result.relative_norm is not None:
        rows.append(("norm", f"{result.relative_norm:.3g} of that of the weights it was added to"))
    if result.cosine is not None:
        rows.append(("cosine", f"{result.cosine:+.4f} with instruct minus base"))
    return rows


def _written(result: GraftResult | DeltaResult) -> tuple[str, str]:
    return "written", f"{size(result.bytes)} in {result.seconds:.1f} s"


def _remarks(remarks: list[str] | tuple[str, ...]) -> Rows:
    return [("remark", remark) for remark in remarks]
