"""What a job publishes: every file with its hash, nothing that was not written so."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest

from core.errors import LeaseLost, StepFailed
from core.job_spec import DeltaSource, Publish
from core.jobs import Claim
from core.storage import LocalStorage
from tests.core.test_jobs import make_spec
from tests.worker.weights.families import Recipe
from worker.publish import metrics_csv, prefix, publish
from worker.weights import FullDelta, graft, verify
from worker.workspace import Workspace

CLAIM = Claim("ftjob-1", 3)
FIGURES = {
    "fidelity": 0.97, "discarded_share": 0.0, "grafted": 3, "layers": {"0": {}}, "modules": {"q_proj": {}}
}  # fmt: skip
CHECKPOINTS = [{"step": step, "metrics": {"step": step, "train_loss": 1 / step}} for step in (2, 4, 6)]
METRICS = [{"step": 1, "train_loss": 2.5, "train_mean_token_accuracy": 0.5}, {"step": 2, "valid_loss": 1.25}]


@pytest.fixture
def spec():
    return make_spec(CLAIM.job_id)


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path / "storage")


@pytest.fixture
def workspace(tmp_path, spec):
    made = Workspace(tmp_path / "job")
    leave_results(made, spec)
    return made


def leave_results(made, spec):
    """What the steps leave behind."""
    model = made.grafted(spec.scales[0])
    write(model / "config.json", "{}")
    write(model / "model.safetensors", "weights")
    hashes = {name: {"sha256": sha256((model / name).read_bytes())} for name in ("config.json", "model.safetensors")}
    write(model / "manifest.json", json.dumps({"files": hashes}))
    write(made.adapter / "adapter_model.safetensors", "adapter")
    write(made.result("graft"), json.dumps({"published": "1", "scales": {"1": FIGURES}}))
    write(made.metrics, "".join(json.dumps(line) + "\n" for line in METRICS))
    write(made.result("train"), json.dumps({"trained_tokens": 77, "checkpoints": CHECKPOINTS[-1:]}))
    write(made.report, json.dumps({"verdict": "better"}))
    write(made.report.with_suffix(".md"), "better")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def run(spec, workspace, storage, check=lambda: None):
    return publish(spec, workspace, CLAIM, team_id="team-1", storage=storage, check=check)


def test_every_file_is_stored_and_listed_with_its_hash(spec, workspace, storage):
    outcome = run(spec, workspace, storage)
    kinds = {artifact.path: artifact.kind for artifact in outcome.artifacts}
    assert kinds == {
        "model/config.json": "model", "model/model.safetensors": "model", "model/manifest.json": "model",
        "model/README.md": "card", "adapter/adapter_model.safetensors": "adapter", "report.json": "report",
        "report.md": "report", "metrics.jsonl": "metrics", "manifest.json": "report",
    }  # fmt: skip
    for artifact in outcome.artifacts:
        content = storage.path(artifact.storage_key).read_bytes()
        assert (artifact.bytes, artifact.sha256) == (len(content), sha256(content))
        assert (artifact.job_id, artifact.team_id) == (CLAIM.job_id, "team-1")
    assert (outcome.trained_tokens, outcome.evaluation) == (77, {"verdict": "better"})
    assert outcome.graft_result == {"fidelity": 0.97, "discarded_share": 0.0, "grafted": 3}


def test_the_manifest_lists_every_other_file(spec, workspace, storage):
    outcome = run(spec, workspace, storage)
    listed = json.loads(storage.path(f"{prefix(CLAIM)}/manifest.json").read_bytes())["files"]
    others = {artifact.path: artifact.sha256 for artifact in outcome.artifacts if artifact.path != "manifest.json"}
    assert {path: entry["sha256"] for path, entry in listed.items()} == others


def test_one_changed_byte_of_the_model_card_is_found_as_in_every_other_file(spec, workspace, storage, tmp_path):
    Recipe().write(tmp_path)
    model = workspace.grafted(spec.scales[0])
    shutil.rmtree(model)
    graft(instruct=tmp_path / "instruct", delta=FullDelta(tmp_path / "base", tmp_path / "tuned"), out=model)
    for artifact in run(spec, workspace, storage).artifacts:
        write(tmp_path / "got" / artifact.path, "")
        shutil.copy(storage.path(artifact.storage_key), tmp_path / "got" / artifact.path)
    got = tmp_path / "got" / "model"
    found = verify(got)
    assert (found.problems, found.files) == ((), len(list(got.iterdir())) - 1)
    card = (got / "README.md").read_text()
    write(got / "README.md", card.replace("rank", "Rank"))
    assert verify(got).problems == ("README.md was changed: its sha256 is another",)


def test_an_attempt_writes_below_its_own_prefix_only(spec, workspace, storage):
    outcome = run(spec, workspace, storage)
    keys = [one.storage_key for one in [*outcome.artifacts, *outcome.result_files]]
    assert all(key.startswith("jobs/ftjob-1/a3/") for key in keys)
    storage.delete(prefix(CLAIM))
    assert [path for path in storage.path("").rglob("*") if path.is_file()] == []


def test_the_ends_of_epochs_are_published_each_with_its_adapter_and_the_last_one_only_once(spec, workspace, storage):
    write(workspace.result("train"), json.dumps({"trained_tokens": 77, "checkpoints": CHECKPOINTS}))
    for step in (2, 4):
        write(workspace.checkpoint(step) / "adapter_model.safetensors", f"adapter {step}")
    outcome = run(spec, workspace, storage)

    adapters = {artifact.path: artifact for artifact in outcome.artifacts if artifact.kind == "adapter"}
    file = "adapter_model.safetensors"
    assert adapters.keys() == {f"adapter/{file}", f"checkpoints/step-2/{file}", f"checkpoints/step-4/{file}"}
    stored = storage.path(adapters[f"checkpoints/step-4/{file}"].storage_key).read_text()
    assert stored == "adapter 4"
    rows = [(one.job_id, one.step, one.metrics, one.folder) for one in outcome.checkpoints]
    folders = ("checkpoints/step-2", "checkpoints/step-4", "adapter")
    assert rows == [
        (CLAIM.job_id, one["step"], one["metrics"], folder) for one, folder in zip(CHECKPOINTS, folders, strict=True)
    ]
    assert all(one.id.startswith("ftckpt_") for one in outcome.checkpoints)


@pytest.mark.parametrize(("publishes", "folder"), [(False, None), (True, "delta")])
def test_full_tuning_has_its_last_state_as_the_one_checkpoint(spec, workspace, storage, publishes, folder):
    save_delta(workspace)
    asked = full_tuning(spec).model_copy(update={"publish": Publish(delta=publishes)})
    (checkpoint,) = run(asked, workspace, storage).checkpoints
    assert (checkpoint.step, checkpoint.folder) == (6, folder)


def test_full_tuning_publishes_no_adapter(spec, workspace, storage):
    assert "adapter" not in {artifact.kind for artifact in run(full_tuning(spec), workspace, storage).artifacts}


def full_tuning(spec):
    return spec.model_copy(update={"tuning": spec.tuning.model_copy(update={"type": "full"})})


def save_delta(workspace):
    write(workspace.saved_delta / "delta.safetensors", "change")
    hashes = {"delta.safetensors": {"sha256": sha256(b"change")}}
    write(workspace.saved_delta / "manifest.json", json.dumps({"files": hashes}))


def test_full_tuning_publishes_its_change_where_it_is_asked_to(spec, workspace, storage):
    save_delta(workspace)
    asked = full_tuning(spec).model_copy(update={"publish": Publish(delta=True)})
    deltas = [one.path for one in run(asked, workspace, storage).artifacts if one.kind == "delta"]
    assert deltas == ["delta/delta.safetensors", "delta/manifest.json"]
    write(workspace.saved_delta / "delta.safetensors", "changed")
    with pytest.raises(StepFailed, match=r"delta/delta\.safetensors"):
        run(asked, workspace, storage)


def graft_of(spec, **evaluation):
    return spec.model_copy(
        update={
            "kind": "graft",
            "delta": DeltaSource(kind="adapter", job_id="ftjob-0", files=()),
            "evaluation": spec.evaluation.model_copy(update=evaluation),
        }
    )


def test_a_graft_publishes_its_model_and_its_comparison(spec, workspace, storage):
    outcome = run(graft_of(spec), workspace, storage)
    assert {artifact.kind for artifact in outcome.artifacts} == {"model", "card", "report"}
    assert (outcome.result_files, outcome.trained_tokens, outcome.checkpoints) == ([], None, [])
    assert outcome.evaluation == {"verdict": "better"}


def test_a_graft_that_compared_nothing_publishes_no_report(spec, workspace, storage):
    workspace.report.unlink()
    outcome = run(graft_of(spec, left_out="it was not asked for"), workspace, storage)
    assert {artifact.path for artifact in outcome.artifacts if artifact.kind == "report"} == {"manifest.json"}
    assert outcome.evaluation is None


def test_a_file_that_changed_since_the_graft_is_not_published(spec, workspace, storage):
    write(workspace.grafted(spec.scales[0]) / "model.safetensors", "weighty")
    with pytest.raises(StepFailed) as caught:
        run(spec, workspace, storage)
    cause = caught.value.cause
    assert (cause.code, cause.fault, cause.retryable) == ("artifact_damaged", "infrastructure", True)


def test_a_file_that_is_missing_since_the_graft_is_noticed(spec, workspace, storage):
    (workspace.grafted(spec.scales[0]) / "model.safetensors").unlink()
    with pytest.raises(StepFailed, match=r"model\.safetensors"):
        run(spec, workspace, storage)


@pytest.mark.parametrize("where", ["adapter/environ", "adapter"])
def test_a_link_that_a_step_left_is_not_followed(spec, workspace, storage, tmp_path, where):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "environ").write_text("SECRET")
    if where == "adapter":
        shutil.rmtree(workspace.adapter)
        workspace.adapter.symlink_to(tmp_path / "secrets")
    else:
        (workspace.adapter / "environ").symlink_to(tmp_path / "secrets" / "environ")
    with pytest.raises(StepFailed, match=r"The job left train/adapter/environ, which is no plain file\."):
        run(spec, workspace, storage)
    stored = [path for path in storage.path("").rglob("*") if path.is_file()]
    assert not [path for path in stored if b"SECRET" in path.read_bytes()]


def test_the_lease_is_asked_before_each_file(spec, workspace, storage):
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 3:
            raise LeaseLost("taken")

    with pytest.raises(LeaseLost):
        run(spec, workspace, storage, check)
    assert len([path for path in storage.path("").rglob("*") if path.is_file()]) == 2


def test_the_result_file_is_the_contracts_csv(spec, workspace, storage):
    (file,) = run(spec, workspace, storage).result_files
    assert (file.purpose, file.filename, file.status) == ("fine-tune-results", "step_metrics.csv", "processed")
    content = storage.path(file.storage_key).read_bytes()
    assert (file.bytes, file.sha256) == (len(content), sha256(content))
    assert content.decode() == metrics_csv(workspace.metrics.read_text())


def test_the_csv_is_blank_where_a_step_did_not_measure():
    lines = "".join(json.dumps(line) + "\n" for line in METRICS)
    assert metrics_csv(lines).splitlines() == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy",
        "1,2.5,0.5,,",
        "2,,,1.25,",
    ]


def card_of(spec, workspace, storage):
    (card,) = [artifact for artifact in run(spec, workspace, storage).artifacts if artifact.kind == "card"]
    return storage.path(card.storage_key).read_text()


def test_the_card_of_a_graft_names_the_job_that_learned(spec, workspace, storage):
    text = card_of(graft_of(spec), workspace, storage)
    assert "without training: what the job ftjob-0 learned (LoRA of rank 4 on base), grafted onto instruct" in text
    assert "97.0% survived storage" in text


def test_the_card_tells_what_differs_from_the_defaults(spec, workspace, storage):
    assert "at scale 1, scope linear." in card_of(spec, workspace, storage)
    changes = {"include": ("*.0.*",), "exclude": ("a`b", "c"), "output_dtype": "float32"}
    changed = spec.model_copy(update={"graft": spec.graft.model_copy(update=changes)})
    figures = {**FIGURES, "discarded_share": 0.25}
    write(workspace.result("graft"), json.dumps({"published": "1", "scales": {"1": figures}}))
    text = card_of(changed, workspace, storage)
    assert "scope linear, only `*.0.*`, without `a?b`, `c`, stored in float32." in text
    assert "had left out 25.0% of what was learned" in text


def test_the_card_says_what_the_model_was_made_of_and_how_it_did(spec, workspace, storage):
    outcome = run(spec, workspace, storage)
    (card,) = [artifact for artifact in outcome.artifacts if artifact.kind == "card"]

    text = storage.path(card.storage_key).read_text()

    assert text.startswith("---\nbase_model: ")
    assert spec.fine_tuned_model in text
    assert "Shadow-FT (arXiv 2505.12716)" in text
    assert text.rstrip().endswith("better")
