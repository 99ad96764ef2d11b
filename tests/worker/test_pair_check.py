"""Checks of pairs: what each fault is told as, and how the light worker does a check, once and to its end."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from sqlalchemy import delete, select, update

from core import own_files
from core.checkpoints import read_side_file
from core.db import db_now
from core.ids import new_id
from core.job_spec import ModelSource
from core.models import Job, PairCheck, Worker
from core.storage import LocalStorage
from core.verdict import FirstStage, examine, verdict_of
from tests.core.test_jobs import act, events, make_team, read
from tests.worker.broken_pairs import CASES, copied, give_tokenizer, make_pair, write_template
from tests.worker.test_admission import make_file, submit  # noqa: F401 - fixtures
from tests.worker.test_model_cache import pinned, put
from worker import pair_check
from worker.admission import admit_waiting
from worker.model_cache import ModelCache
from worker.pair_check import check_next, fingerprint_of
from worker.pair_inspection import Asked, look_at_texts, look_at_weights
from worker.pipeline import Context
from worker.progress import ProgressWriter
from worker.sweep import Sweeper
from worker.workspace import Workspace

#: The child costs seconds; what it finds does not depend on the database.
on_sqlite = pytest.mark.parametrize("backend", ["sqlite"])


@pytest.fixture(scope="session")
def whole_pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def pair(whole_pair, tmp_path):
    """A copy of the test's own."""
    return copied(whole_pair, tmp_path / "models")


def source(folder):
    return ModelSource(kind="local", location=str(folder))


def first_stage(pair, tmp_path) -> FirstStage:
    return examine(source(pair.base), source(pair.instruct), settle=lambda one: one, cache=tmp_path)


def both_stages(pair, tmp_path):
    """Every finding, without a child around the second stage."""
    first = first_stage(pair, tmp_path)
    if verdict_of(first.findings) == "refuse":
        return first.findings, None
    chats, weighed = second_stage(pair, tmp_path)
    return [*first.findings, *chats.findings, *weighed.findings], weighed.similarity


def second_stage(pair, tmp_path, *, without_base=False):
    workspace = Workspace(tmp_path / "workspace")
    workspace.inputs.mkdir(parents=True)
    if not without_base:
        workspace.base.symlink_to(pair.base)
    workspace.instruct.symlink_to(pair.instruct)
    asked = Asked(weights=True, texts_cpu_seconds=60, similarity_seconds=60)
    chats = look_at_texts(workspace)
    return chats, look_at_weights(workspace, asked, chats, ProgressWriter(io.BytesIO()))


@pytest.mark.parametrize("name", CASES)
def test_each_fault_gives_its_verdict_and_its_reasons(pair, tmp_path, name):
    verdict, codes, damage = CASES[name]
    damage(pair)
    findings, similarity = both_stages(pair, tmp_path)
    assert verdict_of(findings) == verdict
    assert {finding.code for finding in findings if verdict == "ok" or finding.level == verdict} == codes
    assert all(finding.message.endswith(".") for finding in findings)
    assert (similarity is None) == (verdict == "refuse")


def test_a_model_that_is_tuned_itself_is_looked_at_too(pair, tmp_path):
    CASES["a_tied_head_that_is_another_tensor"].damage(pair)
    _, weighed = second_stage(pair, tmp_path, without_base=True)
    (finding,) = weighed.findings
    assert (finding.level, finding.code) == ("refuse", "untied_head")
    assert finding.message.startswith("The instruct model ties its head to its embedding by its config.json, and ")
    assert finding.remedy.startswith("Set tie_word_embeddings to false")


def test_the_distance_is_told_by_layer_and_by_module(pair, tmp_path):
    _, similarity = both_stages(pair, tmp_path)
    assert 0 < similarity.sigma_mean < 0.01
    assert similarity.layers.keys() == {"0", "1"}
    assert {"q_proj", "down_proj"} <= similarity.modules.keys()


# --- the worker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(settings, database, tmp_path):
    settings.model_roots = (tmp_path,)
    settings.lease_seconds = 60  # importing torch stops a child's other threads for seconds on a busy machine
    storage = LocalStorage(settings.storage_dir)
    return Context(settings=settings, database=database, storage=storage, device="cpu", draining=threading.Event())


@pytest.fixture
def team_id(database):
    return make_team(database)


@pytest.fixture
def ask(database, team_id, pair):
    """A check as the API writes it; its id."""

    def make(*, depth="full", **values):
        row = PairCheck(
            id=new_id("pchk_"), team_id=team_id, base=source(pair.base).model_dump(),
            instruct=source(pair.instruct).model_dump(), depth=depth, status="queued", findings=[], **values,
        )  # fmt: skip
        act(database, lambda session: session.add(row))
        return row.id

    return make


@pytest.fixture
def known(database, team_id, pair, tmp_path):
    """What a check of the same files found before."""

    def make(**values):
        row = PairCheck(
            id=new_id("pchk_"), team_id=team_id, base={}, instruct={}, depth="full", status="completed",
            fingerprint=fingerprint_of(first_stage(pair, tmp_path)), **values,
        )  # fmt: skip
        act(database, lambda session: session.add(row))

    return make


def check_of(database, check_id):
    with database.reading() as session:
        return session.get_one(PairCheck, check_id)


def codes(check):
    return [finding["code"] for finding in check.findings]


@on_sqlite
def test_a_check_is_done_in_a_child_and_the_next_one_of_the_same_files_needs_none(
    context, database, ask, settings, monkeypatch
):
    first, second = ask(), ask()
    assert check_next(context)
    monkeypatch.setattr(sys, "executable", "/nowhere")  # no child can be started any more
    assert check_next(context)
    assert not check_next(context)
    one, other = check_of(database, first), check_of(database, second)
    assert (one.status, one.error, one.check_lease_until) == ("completed", None, None)
    assert one.finished_at is not None
    assert codes(one) == ["similarity"]
    assert one.similarity["sigma_mean"] < 0.01
    assert (other.findings, other.similarity, other.fingerprint) == (one.findings, one.similarity, one.fingerprint)
    assert list(settings.work_dir.iterdir()) == []


def test_headers_alone_and_a_pair_that_they_refuse_need_no_child(context, database, ask, pair):
    shallow = ask(depth="headers")
    assert check_next(context)
    CASES["a_quantised_base"].damage(pair)
    refused = ask()
    assert check_next(context)
    assert (check_of(database, shallow).status, codes(check_of(database, shallow))) == ("completed", [])
    row = check_of(database, refused)
    assert (row.status, codes(row), row.fingerprint) == ("completed", ["quantised_checkpoint"], None)


def test_a_folder_outside_the_roots_is_refused_when_it_is_read(context, database, ask, settings):
    settings.model_roots = ()
    check_id = ask()
    check_next(context)
    row = check_of(database, check_id)
    assert (row.status, verdict(row)) == ("completed", "refuse")
    assert "SHADOWFT_MODEL_ROOTS" in row.findings[0]["remedy"] + row.findings[0]["message"]


def verdict(row):
    return "refuse" if any(one["level"] == "refuse" for one in row.findings) else "other"


NOT_HERE = {"stage": "files", "level": "note", "code": "weights_not_here", "message": "m", "remedy": ""}


def test_what_is_known_is_told_again_by_the_team_that_asks(context, database, ask, known):
    known(findings=[{**NOT_HERE, "code": "similarity"}], similarity={"sigma_mean": 0.01})
    check_id = ask()
    check_next(context)
    row = check_of(database, check_id)
    assert (codes(row), row.similarity) == (["similarity"], {"sigma_mean": 0.01})


@pytest.mark.slow
@on_sqlite
def test_weights_that_have_come_meanwhile_are_measured(context, database, ask, known):
    known(findings=[NOT_HERE])
    check_id = ask()
    check_next(context)
    assert codes(check_of(database, check_id)) == ["similarity"]


@pytest.mark.parametrize("at_hand", [True, False])
def test_a_refusal_is_kept_for_admissions_and_looked_at_anew_by_a_check(at_hand):
    known = PairCheck(findings=[{**NOT_HERE, "level": "refuse", "code": "not_finite"}], similarity=None)
    assert pair_check._is_enough(known, at_hand=at_hand, insist=False)
    assert not pair_check._is_enough(known, at_hand=at_hand, insist=True)


@pytest.mark.slow
@on_sqlite
def test_a_template_without_an_end_is_a_finding(context, database, ask, pair, monkeypatch):
    monkeypatch.setattr(pair_check, "TEXTS_CPU_SECONDS", 2)
    write_template(pair.instruct, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    check_id = ask()
    check_next(context)
    row = check_of(database, check_id)
    assert (row.status, codes(row)) == ("completed", ["endless_tokenizer"])


@on_sqlite
def test_a_check_that_asks_for_the_distance_is_not_put_off_with_one_that_had_no_time_for_it(
    context, database, ask, known, settings, monkeypatch
):
    """As an admission leaves it."""
    monkeypatch.setattr(sys, "executable", "/nowhere")  # to look again would take a child
    settings.max_infra_retries = 0
    known(findings=[{**NOT_HERE, "code": "similarity_not_measured"}])
    check_id = ask()
    check_next(context)
    row = check_of(database, check_id)
    assert (row.status, row.error["code"]) == ("failed", "pair_check_crashed")


@on_sqlite
def test_an_admission_is_content_with_what_an_earlier_one_had_no_time_for(
    context, database, submit_fresh, known, monkeypatch
):
    monkeypatch.setattr(sys, "executable", "/nowhere")
    job_id = submit_fresh()
    known(findings=[{**NOT_HERE, "code": "similarity_not_measured"}])
    assert admit_waiting(context) == 1
    assert read(database, job_id).status == "queued"


@pytest.mark.slow
@on_sqlite
def test_what_nobody_foresaw_is_tried_again_and_then_told(context, database, ask, settings, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere")
    settings.max_infra_retries = 1
    check_id = ask()
    assert check_next(context)
    assert (check_of(database, check_id).status, check_of(database, check_id).error) == ("running", None)
    act(database, expire(check_id))
    assert check_next(context)
    row = check_of(database, check_id)
    assert (row.status, row.error["code"], row.error["retryable"]) == ("failed", "pair_check_crashed", True)
    assert "/nowhere" in row.error["message"]


# --- held while it is read --------------------------------------------------------------------------------------------


class Watched(threading.Event):
    """Says `stop` to a worker that comes to look after further reading, and notes who held the models then."""

    def __init__(self, sources, cache) -> None:
        super().__init__()
        self.sources, self.cache = sources, cache
        self.reading = True
        self.held = []

    def is_set(self):
        if self.reading:
            return False
        self.held.append(are_held(self.sources, self.cache))
        return True


def are_held(sources, cache):
    """Whether somebody uses each of the snapshots, so that nobody may remove it."""
    locks = [
        cache / ".shadowft" / f"models--{one.location.replace('/', '--')}" / f"{one.revision}.lock" for one in sources
    ]
    return [lock.exists() and not can_be_taken(lock) for lock in locks]


def can_be_taken(lock):
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture
def in_cache(pair, tmp_path, settings):
    """The pair as snapshots in the models' cache."""
    cache = ModelCache(settings.model_cache_dir)
    sources = []
    for folder in pair:
        location = f"acme/{folder.name}"
        shutil.copytree(folder, tmp_path / "hub" / location)
        sources.append(pinned(tmp_path / "hub", location))
        put(cache, tmp_path / "hub", sources[-1])
    return sources


class Gate:
    """Who reads the instruct model's small files waits at one of them."""

    def __init__(self, sources) -> None:
        self.folder = sources[-1].revision
        self.come, self.open = threading.Event(), threading.Event()

    def read(self, folder, file):
        if (folder.name, file) == (self.folder, "special_tokens_map.json"):
            self.come.set()
            assert self.open.wait(60)
        return read_side_file(folder, file)


@pytest.fixture
def gate(in_cache, monkeypatch):
    gate = Gate(in_cache)
    monkeypatch.setattr(own_files, "read_side_file", gate.read)
    return gate


@on_sqlite
@pytest.mark.parametrize("act_of", ["check", "admission"])
def test_models_are_held_from_before_they_are_read_to_the_end(
    context, database, ask, submit_fresh, settings, in_cache, gate, act_of
):
    base, instruct = (source.model_dump() for source in in_cache)
    context = replace(context, draining=Watched(in_cache, settings.model_cache_dir))
    if act_of == "check":
        ask()
        act(database, lambda session: session.execute(update(PairCheck).values(base=base, instruct=instruct)))
        begin = check_next
    else:
        job = read(database, submit_fresh())
        request = {**job.request, "pair": {"name": "tiny", "base": base, "instruct": instruct}}
        act(database, lambda session: session.execute(update(Job).values(request=request)))
        begin = admit_waiting
    thread = threading.Thread(target=begin, args=(context,))
    thread.start()
    assert gate.come.wait(30)
    held = are_held(in_cache, settings.model_cache_dir)
    gate.open.set()
    context.draining.reading = False
    thread.join()
    assert held == [True, True]
    assert context.draining.held == [[True, True]]
    assert are_held(in_cache, settings.model_cache_dir) == [False, False]


# --- leases -----------------------------------------------------------------------------------------------------------


def test_a_check_whose_worker_died_is_done_by_another(context, database, ask, known):
    known(findings=[], similarity={"sigma_mean": 0.01})
    held = ask(check_tries=1, check_lease_until=db_now(60))
    lost = ask(check_tries=1, check_lease_until=db_now(-1))
    for check_id in (held, lost):
        act(database, set_status(check_id, "running"))
    assert check_next(context)
    assert not check_next(context)
    assert check_of(database, lost).status == "completed"
    assert (check_of(database, held).status, check_of(database, held).check_tries) == ("running", 1)


def set_status(check_id, status):
    return lambda session: session.execute(update(PairCheck).where(PairCheck.id == check_id).values(status=status))


def test_a_check_that_kills_each_worker_is_given_up_with_a_cause(context, database, ask):
    check_id = ask(check_tries=context.settings.max_infra_retries + 1)
    assert check_next(context)
    row = check_of(database, check_id)
    assert (row.status, row.error["code"]) == ("failed", "worker_lost")
    assert row.finished_at is not None


@on_sqlite
def test_a_check_that_breaks_its_child_is_tried_again_and_then_given_up(context, database, ask, settings):
    settings.max_infra_retries = 1
    check_id = ask()
    for _ in range(2):
        with killed_children(settings):
            check_next(context)
        act(database, expire(check_id))
    row = check_of(database, check_id)
    assert (row.status, row.error["code"], row.check_tries) == ("failed", "step_killed", 2)


def expire(check_id):
    values = {"check_lease_until": db_now(-1)}
    return lambda session: session.execute(update(PairCheck).where(PairCheck.id == check_id).values(values))


class killed_children:  # noqa: N801 - reads as what it does
    """While this is open, a thread kills each child that inspects."""

    def __init__(self, settings) -> None:
        self._settings = settings
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _kill(self) -> None:
        while not self._over.wait(0.02):
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):  # it ended by itself meanwhile
                    command = " ".join(child.cmdline())
                    if "worker.steps.inspect" in command and str(self._settings.work_dir) in command:
                        child.kill()


def test_a_check_is_left_to_the_next_worker_when_this_one_shuts_down(context, database, ask):
    check_id = ask()
    context.draining.set()
    assert check_next(context)
    row = check_of(database, check_id)
    assert (row.status, row.check_tries, row.check_lease_until) == ("queued", 0, None)


def test_a_worker_that_lost_its_check_writes_nothing(context, database, ask, settings):
    """Another worker took it while this one's database was away."""
    check_id = ask()
    settings.beat_seconds = 0.01
    taken = update(PairCheck).where(PairCheck.id == check_id, PairCheck.status == "running").values(check_tries=7)
    thread = threading.Thread(target=lambda: steal(database, taken))
    thread.start()
    check_next(context)
    thread.join()
    row = check_of(database, check_id)
    assert (row.status, row.check_tries, row.findings) == ("running", 7, [])


def steal(database, taken):
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with database.writing() as session:
            changed = session.execute(taken).rowcount
            session.commit()
        if changed:
            return
        time.sleep(0.005)


def test_a_sweep_announces_a_check_that_waits_and_removes_what_a_dead_worker_left(context, database, ask, settings):
    check_id = ask()
    folder = settings.work_dir / f"check-{check_id}-1"
    folder.mkdir(parents=True)
    os.utime(folder, (1, 1))
    announced = []
    sweeper = Sweeper(context, worker_row, announced.append)
    sweeper.sweep()
    assert announced == ["check_pair"]
    assert not folder.exists()
    folder.mkdir(parents=True)
    os.utime(folder, (1, 1))
    act(database, set_status(check_id, "running"))
    sweeper.sweep()
    assert folder.exists()


def worker_row():
    return Worker(
        id="worker-1", host="h", pid=1, queue="light", device="cpu", lane_memory_bytes=1, version="0", draining=False
    )


# --- admission --------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(pair):
    """What `submit` takes its models from."""
    return pair.base.parent


@pytest.fixture
def submit_fresh(submit, database):  # noqa: F811 - the fixture above
    """A job whose pair nobody has checked yet."""

    def make(**fields):
        job_id = submit(**fields)
        act(database, lambda session: session.execute(delete(PairCheck).where(PairCheck.pair.is_(None))))
        return job_id

    return make


@on_sqlite
def test_an_admission_keeps_the_verdict_and_spares_the_next_one_the_child(context, database, submit_fresh):
    job_id = submit_fresh()
    assert admit_waiting(context) == 1
    job = read(database, job_id)
    assert (job.status, job.error) == ("queued", None)
    assert job.pair_check["verdict"] == "ok"
    assert job.pair_check["similarity"]["sigma_mean"] < 0.01
    assert [event.message for event in events(database, job_id) if "pair was checked" in event.message]
    with database.reading() as session:
        (kept,) = session.scalars(select(PairCheck))
    assert (kept.status, kept.pair, codes(kept)) == ("completed", "tiny", ["similarity"])
    again = submit_fresh()
    assert admit_waiting(context) == 1
    assert read(database, again).pair_check == job.pair_check
    with database.reading() as session:
        assert len(session.scalars(select(PairCheck)).all()) == 1


@on_sqlite
def test_what_a_child_refuses_never_reaches_the_queue(context, database, submit_fresh, pair):
    give_tokenizer(pair.base, first="z")
    job_id = submit_fresh()
    assert admit_waiting(context) == 1
    job = read(database, job_id)
    assert (job.status, job.error["code"], job.spec) == ("failed", "pair_refused", None)
    assert {"other_tokens", "other_ids"} == {one["code"] for one in job.pair_check["findings"]}
    for finding in job.pair_check["findings"]:
        assert finding["message"].rstrip(".") in job.error["message"]
    assert job.error["hint"]


@pytest.mark.slow
@on_sqlite
def test_warnings_become_events_and_a_direct_job_has_none_of_bases(context, database, submit_fresh, pair):
    CASES["untrained_marks"].damage(pair)
    shadow = submit_fresh()
    admit_waiting(context)
    direct = submit_fresh(shadow={"strategy": "direct"})
    admit_waiting(context)
    (warning,) = [event for event in events(database, shadow) if event.level == "warn"]
    assert warning.message.startswith("Pair check: Every chat holds <|im_start|>, <|im_end|>")
    assert warning.data["code"] == "untrained_rows"
    assert read(database, shadow).pair_check["verdict"] == "warn"
    assert read(database, direct).status == "queued"
    assert read(database, direct).pair_check == {"verdict": "ok", "findings": [], "similarity": None}


def test_a_refused_job_keeps_the_reasons(context, database, submit, pair):  # noqa: F811
    CASES["other_positions"].damage(pair)
    CASES["a_quantised_base"].damage(pair)
    job_id = submit()
    admit_waiting(context)
    job = read(database, job_id)
    assert (job.status, job.pair_check["verdict"]) == ("failed", "refuse")
    assert {one["level"] for one in job.pair_check["findings"]} == {"warn", "refuse"}
    assert [event for event in events(database, job_id) if event.level == "warn"] == []
