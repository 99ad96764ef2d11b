"""Admission: every `auto` becomes a number, and what cannot succeed is refused before it costs a GPU."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file
from sqlalchemy import delete, update

from api.routes.grafts import GraftEvaluation
from api.routes.jobs import GraftOptions, Hyperparameters, ShadowOptions
from core import jobs
from core.ids import new_id
from core.job_spec import DeltaFile, DeltaSource, JobSpec, ModelSource
from core.models import File, Job, PairCheck
from core.storage import LocalStorage
from core.verdict import examine, verdict_of
from tests.core.test_jobs import act, events, make_team, messages, read
from worker.admission import admit_waiting
from worker.pair_check import fingerprint_of
from worker.pipeline import Context

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "tie_word_embeddings": True,
}
SHAPES = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "mlp.gate_proj": (32, 16),
    "mlp.down_proj": (16, 32),
}


def write_model(folder, *, hidden=16, layers=2, rows=32, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps(CONFIG | {"hidden_size": hidden, "num_hidden_layers": layers} | config)
    )
    tensors = {"model.embed_tokens.weight": np.zeros((rows, hidden), dtype=np.float32)}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            shape = tuple(hidden if size == 16 else size for size in (rows, columns))
            tensors[f"model.layers.{layer}.{name}.weight"] = np.zeros(shape, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def know_pair(database, team_id, *, base, instruct, direct):
    """What somebody's check found before, so that no child needs to look again: nothing. These models have no
    tokenizer; what a child finds is in test_pair_check.py."""
    sources = ModelSource(**base), ModelSource(**instruct)
    first = examine(*sources, settle=lambda source: source, cache=Path("/"), without_base=direct)
    if verdict_of(first.findings) == "refuse":
        return
    check = PairCheck(
        id=new_id("pchk_"), team_id=team_id, base=base, instruct=instruct, depth="full", status="completed",
        findings=[], fingerprint=fingerprint_of(first),
    )  # fmt: skip
    act(database, lambda session: session.add(check))


@pytest.fixture
def models(tmp_path):
    for name in ("base", "instruct"):
        write_model(tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def context(settings, database, tmp_path):
    settings.model_roots = (tmp_path,)
    storage = LocalStorage(settings.storage_dir)
    return Context(settings=settings, database=database, storage=storage, device="cpu", draining=threading.Event())


@pytest.fixture
def team_id(database):
    return make_team(database)


@pytest.fixture
def make_file(database, team_id):
    def make(status="processed", rows=100, details=None):
        file = File(
            id=new_id("file-"), team_id=team_id, filename="rows.jsonl", purpose="fine-tune", bytes=1, sha256="0" * 64,
            storage_key="k", status=status, status_details=details,
            report={"ok": True, "rows": rows, "longest_row": {"number": 1, "characters": 1000}},
        )  # fmt: skip
        act(database, lambda session: session.add(file))
        return file.id

    return make


@pytest.fixture
def submit(database, team_id, make_file, models):
    """A job as the API writes it."""

    def make(file_id=None, *, hyperparameters=None, shadow=None, base="base", **fields):
        local = {
            name: {"kind": "local", "location": str(models / folder)}
            for name, folder in (("base", base), ("instruct", "instruct"))
        }
        request = {
            "pair": {"name": "tiny", **local},
            "hyperparameters": Hyperparameters(**hyperparameters or {}).model_dump(mode="json"),
            "shadow": ShadowOptions(**shadow or {}).model_dump(mode="json"),
        }
        know_pair(database, team_id, **local, direct=request["shadow"]["strategy"] == "direct")
        job = Job(
            team_id=team_id, kind="fine_tune", model="tiny", training_file_id=file_id or make_file(), seed=1,
            request=request, **fields,
        )  # fmt: skip
        return act(database, jobs.create, job).id

    return make


@pytest.fixture
def admitted(context, database, submit):
    """The spec of a job after its admission."""

    def make(*args, **kwargs):
        job_id = submit(*args, **kwargs)
        assert admit_waiting(context) == 1
        job = read(database, job_id)
        assert job.status == "queued", job.error
        return JobSpec.model_validate(job.spec)

    return make


def test_every_auto_becomes_the_papers_number(admitted):
    tuning = admitted().tuning
    assert (tuning.n_epochs, tuning.batch_size, tuning.learning_rate) == (1, 32, 2e-4)
    assert (tuning.type, tuning.rank, tuning.alpha) == ("lora", 8, 16)  # the smallest dimension of a linear is 8


def test_a_batch_is_not_larger_than_the_file(admitted, make_file):
    assert admitted(make_file(rows=7)).tuning.batch_size == 7


def test_full_tuning_has_its_own_rate_and_no_rank(admitted):
    tuning = admitted(shadow={"tuning": {"type": "full"}}).tuning
    assert (tuning.learning_rate, tuning.rank, tuning.alpha, tuning.dropout) == (1e-5, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("rate", "multiplier", "expected"),
    [("auto", 0.5, 1e-4), ("auto", "auto", 2e-4), (1e-3, "auto", 1e-3), (1e-3, 2.0, 2e-3), ("auto", 3.0, 6e-4)],
)
def test_the_multiplier_multiplies_the_rate_whoever_chose_it(admitted, rate, multiplier, expected):
    asked = {"hyperparameters": {"learning_rate_multiplier": multiplier}, "shadow": {"tuning": {"learning_rate": rate}}}
    assert admitted(**asked).tuning.learning_rate == pytest.approx(expected)


def test_what_was_asked_for_is_kept(admitted):
    spec = admitted(
        hyperparameters={"n_epochs": 3, "batch_size": 5},
        shadow={"tuning": {"rank": 4, "alpha": 5, "max_length": 64}, "graft": {"scale": 0.5, "scope": "all"}},
        suffix="mine",
    )
    assert (spec.tuning.n_epochs, spec.tuning.batch_size, spec.tuning.rank, spec.tuning.alpha) == (3, 5, 4, 5)
    assert (spec.graft.scale, spec.graft.scope, spec.seed) == (0.5, "all", 1)
    assert spec.fine_tuned_model == f"ft:tiny:blue:mine:{spec.job_id[-8:]}"


def test_a_direct_job_tunes_the_instruct_model(admitted):
    spec = admitted(shadow={"strategy": "direct"})
    assert (spec.start, spec.scales) == (spec.pair.instruct, (1.0,))


def test_an_admission_tells_what_it_chose_and_what_it_will_take(context, database, submit):
    job_id = submit()
    admit_waiting(context)
    assert messages(database, job_id)[-2:] == [
        "Chosen: LoRA of rank 8, 1 epochs, batch size 32, learning rate 0.0002",
        "Files validated, moving job to queued state",
    ]
    assert read(database, job_id).memory_bytes > 2**30


def test_a_longer_row_and_a_larger_batch_need_more_memory(context, database, submit):
    sizes = []
    for batch, length in ((1, 64), (8, 64), (8, 512)):
        job_id = submit(hyperparameters={"batch_size": batch}, shadow={"tuning": {"max_length": length}})
        admit_waiting(context)
        sizes.append(read(database, job_id).memory_bytes)
    assert sizes == sorted(set(sizes))


def test_a_models_text_that_no_database_takes_stops_neither_its_refusal_nor_the_next_job(
    context, database, submit, models
):
    write_model(models / "odd", model_type="\ud800x")
    odd, good = submit(base="odd"), submit()
    assert admit_waiting(context) == 2
    assert (read(database, odd).status, read(database, good).status) == ("failed", "queued")
    assert "\\ud800x" in read(database, odd).error["message"]


def test_a_rank_beyond_the_smallest_linear_is_refused(context, database, submit):
    job_id = submit(shadow={"tuning": {"rank": 9}})
    assert admit_waiting(context) == 1
    job = read(database, job_id)
    assert (job.status, job.error["param"]) == ("failed", "shadow.tuning.rank")
    assert "dimension 8" in job.error["message"]


def test_a_pair_that_does_not_fit_is_refused_with_every_reason(context, database, submit, models):
    write_model(models / "other", hidden=24, layers=3, vocab_size=40)
    job_id = submit(base="other")
    admit_waiting(context)
    job = read(database, job_id)
    assert (job.status, job.error["code"], job.error["fault"]) == ("failed", "pair_refused", "user")
    for word in ("hidden_size", "num_hidden_layers"):
        assert word in job.error["message"]
    assert messages(database, job_id)[-1].startswith("The job failed: ")


@pytest.mark.parametrize(
    ("graft", "said"),
    [
        ({"include": ["*.q_prj.*"]}, "'*.q_prj.*' matches no tensor of instruct"),
        ({"exclude": ["*"]}, "exclude *"),
        ({"scope": "linear", "include": ["*embed*"]}, "include *embed*"),
    ],
)
def test_patterns_that_leave_nothing_are_refused_before_any_training(context, database, submit, graft, said):
    job_id = submit(shadow={"graft": graft})
    admit_waiting(context)
    error = read(database, job_id).error
    assert error["code"] == "pair_refused"
    assert said in error["message"]


def test_lora_is_not_trained_for_a_graft_of_what_it_cannot_change(context, database, submit):
    graft = {"scope": "all", "include": ["*embed*"]}
    lora, full = (submit(shadow={"graft": graft, "tuning": {"type": kind}}) for kind in ("lora", "full"))
    admit_waiting(context)
    assert read(database, lora).error["param"] == "shadow.graft.include"
    assert read(database, full).status == "queued"


def test_the_options_of_the_graft_reach_the_spec(admitted):
    graft = {"scale": 0.5, "scope": "all", "include": ["*.0.*"], "exclude": ["*.mlp.*"], "output_dtype": "bfloat16"}
    spec = admitted(shadow={"graft": graft, "tuning": {"type": "full"}, "publish": {"delta": True}})
    assert spec.graft.model_dump(mode="json") == graft
    assert (spec.saves_delta, spec.delta, spec.scope) == (True, None, "all")
    assert not admitted(shadow={"publish": {"delta": True}}).saves_delta


def test_a_direct_job_grafts_everything_that_it_learned(admitted):
    assert admitted(shadow={"strategy": "direct"}).scope == "all"


def test_what_the_models_differ_in_is_told(context, database, submit, models):
    shutil.rmtree(models / "base")
    write_model(models / "base", rows=36, vocab_size=36)
    job_id = submit()
    admit_waiting(context)
    (remark,) = [event for event in events(database, job_id) if event.message.startswith("The models differ")]
    assert "32" in remark.message
    assert remark.level == "info"


# --- grafts -----------------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def learned(context, database, team_id, submit, make_file):
    """A job that has succeeded, with its change in storage: `learned(kind)` -> its id and what it published."""

    def make(kind="adapter", *, files=None, shadow=None):
        tuning = {"type": "lora" if kind == "adapter" else "full"}
        job_id = submit(make_file(), shadow={"tuning": tuning, **(shadow or {})}, hyperparameters={"n_epochs": 3})
        admit_waiting(context)
        act(database, lambda session: session.execute(update(Job).where(Job.id == job_id).values(status="succeeded")))
        published = files or (adapter_files() if kind == "adapter" else delta_files())
        delta = DeltaSource(
            kind=kind, job_id=job_id, files=tuple(keep(context, job_id, *one) for one in published.items())
        )
        return read(database, job_id), delta

    return make


def keep(context, job_id, path, content):
    key = f"jobs/{job_id}/a1/{path}"
    incoming = context.storage.receive(key)
    incoming.write(content)
    stored = incoming.keep()
    return DeltaFile(path=path, storage_key=key, sha256=stored.sha256, bytes=stored.bytes)


def adapter_files(rank=2):
    factors = {"lora_A": np.ones((rank, 16)), "lora_B": np.ones((16, rank))}
    tensors = {f"base_model.model.{Q}.{side}.weight": value.astype(np.float32) for side, value in factors.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none"}
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


def delta_files():
    tensors = {f"{Q}.weight": np.ones((16, 16), dtype=np.float32)}
    for layer in range(2):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(shape, dtype=np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((32, 16), dtype=np.float32)
    return {"config.json": json.dumps(CONFIG).encode(), "delta.safetensors": save(tensors)}


@pytest.fixture
def submit_graft(database, team_id, models):
    """A graft as the API writes it."""

    def make(source, delta, *, target="instruct", evaluation=None, **fields):
        local = {
            name: {"kind": "local", "location": str(models / folder)}
            for name, folder in (("base", "another-base"), ("instruct", target))
        }
        evaluation = GraftEvaluation(**evaluation or {})
        request = {
            "pair": {"name": "other", **local},
            "source": source.id,
            "delta": delta.model_dump(mode="json"),
            "graft": GraftOptions(**fields).model_dump(mode="json"),
            "evaluation": evaluation.model_dump(mode="json"),
            "files": source.files if evaluation.compare else {},
        }
        job = Job(
            team_id=team_id, kind="graft", model="other", training_file_id=source.training_file_id, seed=source.seed,
            request=request,
        )  # fmt: skip
        return act(database, jobs.create, job).id

    return make


def admitted_graft(context, database, job_id):
    assert admit_waiting(context) == 1
    job = read(database, job_id)
    assert job.status == "queued", job.error
    return job, JobSpec.model_validate(job.spec)


@pytest.mark.parametrize("kind", ["adapter", "delta"])
def test_a_graft_carries_over_what_its_source_was_trained_and_measured_on(
    context, database, learned, submit_graft, kind
):
    source, delta = learned(kind)
    origin = JobSpec.model_validate(source.spec)
    job_id = submit_graft(source, delta, scale=0.5, exclude=["*.mlp.*"], evaluation={"scales": [1.0], "max_rows": 7})
    job, spec = admitted_graft(context, database, job_id)
    assert (spec.kind, spec.delta, spec.scales) == ("graft", delta, (0.5, 1.0))
    assert (spec.pair.name, spec.pair.base, spec.start) == ("other", origin.pair.base, origin.pair.base)
    assert (spec.training, spec.tuning, spec.seed) == (origin.training, origin.tuning, origin.seed)
    assert (spec.evaluation.max_rows, spec.evaluation.left_out) == (7, None)
    assert spec.evaluation.max_new_tokens == origin.evaluation.max_new_tokens
    assert spec.graft.exclude == ("*.mlp.*",)
    assert spec.fine_tuned_model == f"ft:other:blue::{job_id[-8:]}"
    assert job.memory_bytes > 2**30


def test_the_change_of_a_direct_job_is_grafted_as_any_other(context, database, learned, submit_graft):
    source, delta = learned(shadow={"strategy": "direct"})
    _, spec = admitted_graft(context, database, submit_graft(source, delta, scale=0.5))
    assert (spec.scales, spec.scope) == ((0.5,), "linear")
    assert spec.start.location.endswith("instruct")


def test_a_graft_that_compares_nothing_streams_in_little_memory(context, database, learned, submit_graft):
    job_id = submit_graft(*learned(), evaluation={"compare": False})
    job, spec = admitted_graft(context, database, job_id)
    assert (job.memory_bytes, job.gpu_memory_bytes) == (2**30, 2**30)
    assert spec.evaluation.left_out == "it was not asked for"


def test_deleted_data_costs_the_comparison_and_not_the_graft(context, database, learned, submit_graft):
    source, delta = learned()
    job_id = submit_graft(source, delta, evaluation={"scales": [0.5]})
    act(database, lambda session: session.execute(delete(File)))
    _, spec = admitted_graft(context, database, job_id)
    assert spec.scales == (1.0,)
    assert f"has been deleted since ({source.training_file_id})" in spec.evaluation.left_out
    assert messages(database, job_id)[-2] == f"The models will not be compared: {spec.evaluation.left_out}"


REFUSED = {
    "another size": ({"target": "wide"}, "pair_refused", "target"),
    "a pattern without a match": ({"include": ["*.q_prj.*"]}, "pair_refused", "target"),
    "a change that is left out whole": ({"exclude": ["*.q_proj.*"]}, "pair_refused", "target"),
    "a target that is not there": ({"target": "nowhere"}, "invalid_value", "target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_grafted_is_refused_before_a_worker_is_used(
    context, database, learned, submit_graft, models, case
):
    write_model(models / "wide", hidden=24)
    fields, code, param = REFUSED[case]
    job_id = submit_graft(*learned(), **fields)
    admit_waiting(context)
    job = read(database, job_id)
    assert (job.status, job.error["code"], job.error["param"]) == ("failed", code, param)
    assert (job.started_at, job.error["fault"]) == (None, "user")


def test_an_adapter_is_kept_from_a_model_of_another_family_whose_shapes_it_fits(
    context, database, learned, submit_graft, models
):
    write_model(models / "llama", model_type="llama")
    source, delta = learned()
    foreign = submit_graft(source, delta, target="llama")
    admit_waiting(context)
    assert "model_type" in read(database, foreign).error["message"]
    shutil.rmtree(models / "base")
    own = submit_graft(source, delta)
    admit_waiting(context)
    assert read(database, own).status == "queued"
    assert any("by its shapes alone" in message for message in messages(database, own))


def test_a_delta_of_another_size_is_refused(context, database, learned, submit_graft, models):
    write_model(models / "wide", hidden=24)
    job_id = submit_graft(*learned("delta"), target="wide")
    admit_waiting(context)
    assert "the delta" in read(database, job_id).error["message"]


def test_a_damaged_adapter_and_one_that_is_gone_are_named(context, database, learned, submit_graft):
    source, damaged = learned(files={**adapter_files(), "adapter_model.safetensors": b"\0" * 9})
    first = submit_graft(source, damaged)
    source, gone = learned()
    second = submit_graft(source, gone)
    context.storage.delete(gone.files[1].storage_key)
    admit_waiting(context)
    assert read(database, first).error["code"] == "damaged_checkpoint"
    assert f"{damaged.job_id}/adapter_model.safetensors" in read(database, first).error["message"]
    assert read(database, second).error["code"] == "artifact_missing"


def test_a_model_that_has_gone_is_named(context, database, submit, models):
    job_id = submit()
    shutil.rmtree(models / "base")
    admit_waiting(context)
    job = read(database, job_id)
    assert (job.status, job.error["code"]) == ("failed", "pair_refused")
    assert "The base model cannot be used" in job.error["message"]
    assert [finding["code"] for finding in job.pair_check["findings"]] == ["invalid_value"]


def test_a_file_that_is_not_checked_yet_is_waited_for(context, database, submit, make_file):
    file_id = make_file("uploaded")
    job_id = submit(file_id)
    assert admit_waiting(context) == 0
    assert read(database, job_id).status == "validating_files"
    act(database, lambda session: session.execute(update(File).values(status="processed")))
    assert admit_waiting(context) == 1
    assert read(database, job_id).status == "queued"


def test_a_bad_or_deleted_file_is_named(context, database, submit, make_file):
    bad, gone = submit(make_file("error", details="Row 3 is empty.")), make_file()
    deleted = submit(gone)
    act(database, lambda session: session.execute(delete(File).where(File.id == gone)))
    assert admit_waiting(context) == 2
    for job_id, code in ((bad, "invalid_training_file"), (deleted, "file_not_found")):
        job = read(database, job_id)
        assert (job.status, job.error["code"], job.error["param"]) == ("failed", code, "training_file")
    assert "Row 3 is empty." in read(database, bad).error["message"]


def test_a_job_that_nobody_foresaw_ends_and_lets_the_next_one_pass(context, database, submit, models):
    """A model whose config holds words where every estimate needs numbers, say."""
    for name in ("base", "instruct"):
        config = json.loads((models / name / "config.json").read_text())
        config["hidden_size"] = "wide"
        (models / name / "config.json").write_text(json.dumps(config))
    odd = submit()
    write_model(models / "other", hidden=24)
    next_one = submit(base="other")
    assert admit_waiting(context) == 2
    assert (read(database, odd).status, read(database, next_one).status) == ("failed", "failed")
    assert read(database, next_one).error["code"] == "pair_refused"


def test_two_admissions_at_once_admit_once(context, database, submit):
    job_id = submit()
    done = []
    threads = [threading.Thread(target=lambda: done.append(admit_waiting(context))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 1
    assert messages(database, job_id).count("Files validated, moving job to queued state") == 1


def test_a_job_cancelled_meanwhile_stays_cancelled(context, database, submit):
    job_id = submit()
    act(database, jobs.request_cancel, job_id)
    assert admit_waiting(context) == 0
    assert read(database, job_id).status == "cancelled"


def test_a_config_without_the_sizes_is_measured_by_its_tensors(context, database, submit, models):
    for name in ("base", "instruct"):
        config = json.loads((models / name / "config.json").read_text())
        del config["vocab_size"]
        (models / name / "config.json").write_text(json.dumps(config))
    job_id = submit()

    admit_waiting(context)

    assert read(database, job_id).status == "queued"
    assert read(database, job_id).gpu_memory_bytes > 2**30
