"""One client's whole life with the `openai` SDK, against a running service: every call of the contract that concerns
fine-tuning. The same file runs under every version of the SDK that is promised, so it needs nothing but the SDK.

    OPENAI_API_KEY=… python tests/conformance/script.py http://127.0.0.1:8000 tiny rows.jsonl

The model must be one that the service tunes within a minute, and the team a new one. Prints one JSON line for each
call: `call`, `ok`, `detail` (what was wrong) and `seconds`.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import io
import json
import os
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types import FileObject, Model
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint

MAJOR = int(openai.__version__.split(".")[0])
#: The HTTP library that this version of the SDK stands on.
http = importlib.import_module("httpx2" if MAJOR >= 3 else "httpx")

ROW = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
STATUSES = {"validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"}
METRICS_HEADER = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
ENDED = {"succeeded", "failed", "cancelled"}
SHADOW = {
    "tuning": {"learning_rate": 1e-2, "rank": 4},
    "evaluation": {"holdout_ratio": 0.2, "max_rows": 10, "exact_match": "off"},
}
WAIT_SECONDS = 180.0

Call = Callable[["World"], None]
CALLS: list[tuple[str, Call]] = []


def call(name: str) -> Callable[[Call], Call]:
    """The function shows that this call does what the contract says. They run in the order of this file."""

    def register(function: Call) -> Call:
        CALLS.append((name, function))
        return function

    return register


class World:
    """The service, clients of it, and what earlier calls have made."""

    def __init__(self, url: str, model: str, rows: Path) -> None:
        self.url = url
        self.model = model
        self.rows = rows
        self.folder = Path(tempfile.mkdtemp(prefix="conformance-"))
        #: Every request that `sdk` sent.
        self.sent: list[Any] = []
        self.sdk = self.client(http_client=openai.DefaultHttpxClient(event_hooks={"request": [self.sent.append]}))
        #: It refuses an answer in which a required field is missing or has another type.
        self.strict = self.client(_strict_response_validation=True)
        self.file = self.sdk.files.create(file=rows, purpose="fine-tune")
        #: It runs while the other calls are tried, and is waited for at the end.
        self.job = self.submit(extra_body={"shadow": SHADOW}, suffix="conform", metadata={"whole": "job"})
        self.statuses = {self.job.status}

    def client(self, url: str | None = None, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{url or self.url}/v1", **options)

    def submit(self, sdk: openai.OpenAI | None = None, **fields: Any) -> Any:
        fields = {"model": self.model, "training_file": self.file.id, **fields}
        return (sdk or self.sdk).fine_tuning.jobs.create(**fields)

    def submit_and_cancel(self, **fields: Any) -> str:
        """The id of a job that takes no worker's time."""
        job = self.submit(**fields)
        self.sdk.fine_tuning.jobs.cancel(job.id)
        return str(job.id)

    def upload(self, content: bytes = ROW, **fields: Any) -> Any:
        return self.sdk.files.create(file=("rows.jsonl", content), **{"purpose": "fine-tune", **fields})

    def ended_job(self) -> Any:
        """The job that was submitted first, once it has ended."""
        end = time.monotonic() + WAIT_SECONDS
        while self.job.status not in ENDED and time.monotonic() < end:
            self.job = self.strict.fine_tuning.jobs.retrieve(self.job.id)
            self.statuses.add(self.job.status)
            time.sleep(0.1)
        assert self.job.status == "succeeded", f"{self.job.status}: {self.job.error}"
        return self.job


class Trickle(io.RawIOBase):
    """A body that is made while it is sent: no size, no way back."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._pieces, b"")
        piece, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def required(model: Any) -> set[str]:
    """The fields that the contract requires, those among them that may be null."""
    return {name for name, field in model.model_fields.items() if field.is_required()}


def refused(error_class: Any, act: Callable[[], Any], *, code: str | None = None, param: str | None = None) -> Any:
    """The error of a call that must fail so."""
    caught: Any = None
    try:
        answer = act()
    except openai.OpenAIError as error:
        caught, answer = error, None
    assert type(caught) is error_class, f"no {error_class.__name__}, but {caught or answer!r}"
    if isinstance(caught, openai.APIStatusError):
        _check_error(caught, code, param)
    return caught


def _check_error(error: openai.APIStatusError, code: str | None, param: str | None) -> None:
    assert error.request_id, "no request id"
    assert error.request_id == error.response.headers["x-request-id"]
    assert error.code, f"no code in {error.body}"
    assert isinstance(error.body, dict)
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert error.body["message"] in str(error), "the exception's text does not hold the message"
    assert code is None or error.code == code, f"code {error.code!r}, expected {code!r}"
    assert param is None or error.param == param, f"param {error.param!r}, expected {param!r}"


def once(world: World, act: Callable[[], Any]) -> None:
    """Nothing is retried."""
    world.sent.clear()
    act()
    assert len(world.sent) == 1, f"sent {len(world.sent)} times"


def same(found: Any, expected: Any) -> None:
    assert found == expected, f"{found!r}, expected {expected!r}"


# --- files ------------------------------------------------------------------------------------------------------------


@call("files.create from a path")
def _(world: World) -> None:
    path = world.folder / "my rows é.jsonl"
    path.write_bytes(ROW)
    same(world.strict.files.create(file=path, purpose="fine-tune").filename, path.name)


@call("files.create from bytes")
def _(world: World) -> None:
    file = world.strict.files.create(file=ROW, purpose="fine-tune")
    same((file.bytes, file.purpose, file.object), (len(ROW), "fine-tune", "file"))
    assert required(FileObject) <= file.to_dict().keys()


@call("files.create from a tuple")
def _(world: World) -> None:
    file = world.sdk.files.create(file=("a.jsonl", ROW, "application/jsonl"), purpose="evals")
    same((file.filename, file.purpose), ("a.jsonl", "evals"))


@call("files.create from an open file")
def _(world: World) -> None:
    with world.rows.open("rb") as stream:
        file = world.sdk.files.create(file=stream, purpose="fine-tune")
    same((file.filename, file.bytes), (world.rows.name, world.rows.stat().st_size))


@call("files.create from a stream of unknown size")
def _(world: World) -> None:
    stream = Trickle(iter([ROW] * 3000))
    file = world.sdk.files.create(file=("made.jsonl", stream), purpose="fine-tune")  # type: ignore[arg-type]
    same(file.bytes, 3000 * len(ROW))


@call("files.create as a form that a generator writes")
def _(world: World) -> None:
    def form() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="g.jsonl"\r\n\r\n'
        yield from [ROW] * 100
        yield b"\r\n--b--\r\n"

    headers = {"authorization": f"Bearer {world.sdk.api_key}", "content-type": "multipart/form-data; boundary=b"}
    with http.Client() as plain:
        answer = plain.post(f"{world.url}/v1/files", content=form(), headers=headers)
    same((answer.status_code, answer.json()["bytes"]), (200, 100 * len(ROW)))


@call("files.create with expires_after")
def _(world: World) -> None:
    file = world.strict.files.create(
        file=("a.jsonl", ROW), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    same(file.expires_at, file.created_at + 3600)


@call("files.list and its pages")
def _(world: World) -> None:
    made = [world.upload(purpose="user_data").id for _ in range(5)]
    page = world.strict.files.list(purpose="user_data", limit=2)
    same((len(page.data), page.has_more), (2, True))
    same([file.id for file in page], made[::-1])
    same([file.id for file in world.strict.files.list(purpose="user_data", limit=2, order="asc")], made)
    same([file.id for file in world.strict.files.list(purpose="user_data", after=made[2], limit=1)], made[1::-1])


@call("files.retrieve")
def _(world: World) -> None:
    found = world.strict.files.retrieve(world.file.id)
    same((found.id, found.bytes, found.filename), (world.file.id, world.file.bytes, world.file.filename))


@call("files.content")
def _(world: World) -> None:
    content = world.sdk.files.content(world.file.id)
    same(content.read(), world.rows.read_bytes())
    same(content.text, world.rows.read_text())
    target = world.folder / "content"
    world.sdk.files.content(world.file.id).write_to_file(target)
    same(target.read_bytes(), world.rows.read_bytes())


@call("files.delete")
def _(world: World) -> None:
    file = world.upload()
    deleted = world.strict.files.delete(file.id)
    same((deleted.id, deleted.deleted, deleted.object), (file.id, True, "file"))
    refused(openai.NotFoundError, lambda: world.sdk.files.retrieve(file.id), code="file_not_found")


@call("files.wait_for_processing")
def _(world: World) -> None:
    good = world.sdk.files.wait_for_processing(world.upload(ROW * 20).id, poll_interval=0.1)
    same((good.status, good.status_details), ("processed", None))
    same(good.validation["rows"], 20)  # type: ignore[attr-defined]  # ours
    bad = world.sdk.files.wait_for_processing(world.upload(b'{"no": "rows"}\n').id, poll_interval=0.1)
    same(bad.status, "error")
    assert bad.status_details, "an error without its reason"


# --- uploads ----------------------------------------------------------------------------------------------------------


def begin_upload(world: World, content: bytes) -> Any:
    kind = {"filename": "parts.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    return world.strict.uploads.create(bytes=len(content), **kind)  # type: ignore[arg-type]


@call("uploads.create")
def _(world: World) -> None:
    upload = begin_upload(world, ROW)
    same((upload.status, upload.bytes, upload.object), ("pending", len(ROW), "upload"))
    same(upload.expires_at, upload.created_at + 3600)


@call("uploads.parts.create in parallel and out of order")
def _(world: World) -> None:
    content = ROW * 1000
    pieces = [content[start : start + 20_000] for start in range(0, len(content), 20_000)]
    upload = begin_upload(world, content)
    with ThreadPoolExecutor(4) as pool:
        sent = pool.map(lambda piece: world.sdk.uploads.parts.create(upload.id, data=piece), reversed(pieces))
        ids = [part.id for part in sent][::-1]
    done = world.strict.uploads.complete(upload.id, part_ids=ids)
    assert done.file is not None
    same(world.sdk.files.content(done.file.id).read(), content)


@call("uploads.complete with md5")
def _(world: World) -> None:
    upload = begin_upload(world, ROW)
    part = world.strict.uploads.parts.create(upload.id, data=ROW)
    same((part.upload_id, part.object), (upload.id, "upload.part"))
    wrong = {"part_ids": [part.id], "md5": "0" * 32}
    refused(openai.BadRequestError, lambda: world.sdk.uploads.complete(upload.id, **wrong))
    md5 = hashlib.md5(ROW, usedforsecurity=False).hexdigest()
    done = world.strict.uploads.complete(upload.id, part_ids=[part.id], md5=md5)
    same(done.status, "completed")
    assert done.file is not None
    same(world.sdk.files.wait_for_processing(done.file.id, poll_interval=0.1).status, "processed")


@call("uploads.cancel")
def _(world: World) -> None:
    upload = begin_upload(world, ROW)
    same(world.strict.uploads.cancel(upload.id).status, "cancelled")
    once(world, lambda: refused(openai.ConflictError, lambda: world.sdk.uploads.parts.create(upload.id, data=ROW)))


@call("uploads.upload_file_chunked")
def _(world: World) -> None:
    kind: Any = {"mime_type": "text/jsonl", "purpose": "fine-tune"}
    done = world.sdk.uploads.upload_file_chunked(file=world.rows, part_size=1000, **kind)
    assert done.file is not None
    same((done.file.filename, done.file.bytes), (world.rows.name, world.rows.stat().st_size))
    content = ROW * 10
    done = world.sdk.uploads.upload_file_chunked(file=content, filename="b.jsonl", bytes=len(content), **kind)
    assert done.file is not None
    same(world.sdk.files.content(done.file.id).read(), content)


# --- jobs -------------------------------------------------------------------------------------------------------------


@call("fine_tuning.jobs.create with what is ours")
def _(world: World) -> None:
    job = world.submit(extra_body={"shadow": {"strategy": "shadow", "graft": {"scale": 0.5}}})
    world.sdk.fine_tuning.jobs.cancel(job.id)
    same((job.shadow["strategy"], job.shadow["graft"]["scale"]), ("shadow", 0.5))
    same(
        (job.object, job.status, job.model, job.method.type), ("fine_tuning.job", job.status, world.model, "supervised")
    )
    assert required(FineTuningJob) <= job.to_dict().keys()


@call("fine_tuning.jobs.create with a method")
def _(world: World) -> None:
    values: Any = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 0.5}
    method: Any = {"type": "supervised", "supervised": {"hyperparameters": values}}
    job = world.submit(world.strict, method=method, seed=7, suffix="support", metadata={"team": "a"})
    world.sdk.fine_tuning.jobs.cancel(job.id)
    same(job.method.supervised.hyperparameters.to_dict(), values)
    same((job.hyperparameters.to_dict(), job.seed, job.metadata), (values, 7, {"team": "a"}))


@call("fine_tuning.jobs.create with the old hyperparameters")
def _(world: World) -> None:
    values: Any = {"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2.0}
    job = world.submit(hyperparameters=values)
    world.sdk.fine_tuning.jobs.cancel(job.id)
    same(job.hyperparameters.to_dict(), values)


@call("fine_tuning.jobs.create with a validation file")
def _(world: World) -> None:
    file_id = world.upload().id
    job = world.submit(world.strict, validation_file=file_id)
    same(job.validation_file, file_id)
    world.sdk.fine_tuning.jobs.cancel(job.id)


@call("fine_tuning.jobs.list and its pages")
def _(world: World) -> None:
    made = [world.submit_and_cancel(metadata={"pages": "yes", "number": str(number)}) for number in range(5)]
    page = world.strict.fine_tuning.jobs.list(limit=2, metadata={"pages": "yes"})
    same((len(page.data), page.has_more), (2, True))
    same([job.id for job in page], made[::-1])
    listed = world.strict.fine_tuning.jobs.list(limit=2, after=made[3], metadata={"pages": "yes"})
    same([job.id for job in listed], made[2::-1])
    newest = world.strict.fine_tuning.jobs.list(limit=1)
    same([job.id for job in newest.data], made[-1:])
    unknown = {"after": "ftjob-unknown"}
    refused(openai.BadRequestError, lambda: world.sdk.fine_tuning.jobs.list(**unknown), param="after")


@call("fine_tuning.jobs.list by metadata")
def _(world: World) -> None:
    both = world.submit_and_cancel(metadata={"kind": "b", "run": "1"})
    empty = world.submit_and_cancel(metadata={"kind": "b", "a key.[0]": ""})
    none = world.submit_and_cancel()

    def found(**query: Any) -> list[str]:
        return [job.id for job in world.sdk.fine_tuning.jobs.list(**query)]

    same(found(metadata={"kind": "b"}), [empty, both])
    same(found(metadata={"kind": "b", "run": "1"}), [both])
    same(found(metadata={"kind": "c"}), [])
    assert none in found(extra_query={"metadata": "null"})
    assert both not in found(extra_query={"metadata": "null"})
    if MAJOR >= 3:  # older ones leave an empty value out
        same(found(metadata={"a key.[0]": ""}), [empty])


@call("fine_tuning.jobs.retrieve")
def _(world: World) -> None:
    found = world.strict.fine_tuning.jobs.retrieve(world.job.id)
    same((found.id, found.training_file, found.created_at), (world.job.id, world.file.id, world.job.created_at))
    assert found.status in STATUSES


@call("fine_tuning.jobs.cancel")
def _(world: World) -> None:
    job = world.submit()
    cancelled = world.strict.fine_tuning.jobs.cancel(job.id)
    same(cancelled.status, "cancelled")
    same(world.strict.fine_tuning.jobs.cancel(job.id), cancelled)


@call("fine_tuning.jobs.pause")
def _(world: World) -> None:
    job, pause = world.submit(), world.sdk.fine_tuning.jobs.pause
    paused = pause(job.id)
    assert paused.status in {"pausing", "paused"}
    same(pause(job.id).id, job.id)
    world.sdk.fine_tuning.jobs.cancel(job.id)
    ended = world.submit_and_cancel()
    once(world, lambda: refused(openai.ConflictError, lambda: pause(ended), code="job_not_pausable"))


@call("fine_tuning.jobs.resume")
def _(world: World) -> None:
    job, resume = world.submit(), world.sdk.fine_tuning.jobs.resume
    world.sdk.fine_tuning.jobs.pause(job.id)
    resumed = resume(job.id)
    assert resumed.status in STATUSES - {"pausing", "paused"}
    same(resume(job.id).id, job.id)
    world.sdk.fine_tuning.jobs.cancel(job.id)
    ended = world.submit_and_cancel()
    once(world, lambda: refused(openai.ConflictError, lambda: resume(ended), code="job_not_resumable"))


@call("fine_tuning.jobs.list_events and its pages")
def _(world: World) -> None:
    job_id = world.submit_and_cancel()
    events = list(world.strict.fine_tuning.jobs.list_events(job_id, limit=1))
    assert len(events) >= 2
    same(events[-1].message, f"Created fine-tuning job: {job_id}")
    assert all(required(FineTuningJobEvent) <= event.to_dict().keys() for event in events)
    after = list(world.strict.fine_tuning.jobs.list_events(job_id, after=events[0].id))
    same([event.id for event in after], [event.id for event in events[1:]])


@call("fine_tuning.jobs.checkpoints.list of a job without any")
def _(world: World) -> None:
    same(list(world.strict.fine_tuning.jobs.checkpoints.list(world.submit_and_cancel())), [])


# --- models of pairs --------------------------------------------------------------------------------------------------


@call("models.list")
def _(world: World) -> None:
    found = {model.id: model for model in world.strict.models.list()}
    assert world.model in found
    assert required(Model) <= found[world.model].to_dict().keys()


@call("models.retrieve of an id with a slash")
def _(world: World) -> None:
    model = world.strict.models.retrieve("Qwen/Qwen3-0.6B")
    same((model.id, model.object, model.owned_by), ("Qwen/Qwen3-0.6B", "model", "Qwen"))


# --- errors -----------------------------------------------------------------------------------------------------------


@call("400 BadRequestError names the field")
def _(world: World) -> None:
    def act() -> Any:
        return world.submit(hyperparameters={"n_epochs": 0})

    where = {"code": "invalid_value", "param": "hyperparameters.n_epochs"}
    once(world, lambda: refused(openai.BadRequestError, act, **where))
    unknown = refused(
        openai.BadRequestError, lambda: world.submit(extra_body={"sufix": "x"}), code="unknown_parameter", param="sufix"
    )
    assert "'suffix'" in str(unknown)
    missing: Any = {"model": "no-such-model"}
    refused(openai.NotFoundError, lambda: world.submit(**missing), code="model_not_found", param="model")
    missing = {"training_file": "file-unknown"}
    refused(openai.BadRequestError, lambda: world.submit(**missing), code="file_not_found", param="training_file")


@call("400 for what is not offered")
def _(world: World) -> None:
    for kind in ("dpo", "reinforcement"):
        method: Any = {"type": kind}
        refused(openai.BadRequestError, lambda given=method: world.submit(method=given), code="not_offered")
    wandb: Any = [{"type": "wandb", "wandb": {"project": "p"}}]
    refused(openai.BadRequestError, lambda: world.submit(integrations=wandb), code="not_offered", param="integrations")


@call("401 AuthenticationError")
def _(world: World) -> None:
    wrong = world.sdk.with_options(api_key="sft_wrong")
    once(world, lambda: refused(openai.AuthenticationError, wrong.files.list, code="invalid_api_key"))


@call("403 PermissionDeniedError")
def _(world: World) -> None:
    refused(openai.PermissionDeniedError, lambda: world.sdk.models.delete(world.model), code="model_not_deletable")


@call("404 NotFoundError")
def _(world: World) -> None:
    jobs, unknown = world.sdk.fine_tuning.jobs, "ftjob-unknown"
    for act in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.list_events, jobs.checkpoints.list):
        refused(openai.NotFoundError, lambda given=act: given(unknown), code="job_not_found")
    refused(openai.NotFoundError, lambda: world.sdk.files.content("file-unknown"), code="file_not_found")
    refused(openai.NotFoundError, lambda: world.sdk.models.retrieve("no/such:model"), code="model_not_found")
    cancel = world.sdk.uploads.cancel
    refused(openai.NotFoundError, lambda: cancel("upload_unknown"), code="upload_not_found")
    refused(openai.NotFoundError, lambda: world.sdk.get("/no/such/route", cast_to=object), code="unknown_url")


@call("404 for what is not offered")
def _(world: World) -> None:
    talk: Any = {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}
    error = refused(openai.NotFoundError, lambda: world.sdk.chat.completions.create(**talk), code="not_offered")
    assert "serve" in str(error)
    permissions = world.sdk.fine_tuning.checkpoints.permissions
    refused(openai.NotFoundError, lambda: permissions.create("ft:a/b:c:d:e", project_ids=["p"]), code="not_offered")
    grader: Any = {"type": "string_check", "name": "n", "input": "a", "reference": "b", "operation": "eq"}
    graders = world.sdk.fine_tuning.alpha.graders
    refused(openai.NotFoundError, lambda: graders.validate(grader=grader), code="not_offered")


@call("405 and 413 APIStatusError")
def _(world: World) -> None:
    wrong_method = refused(openai.APIStatusError, lambda: world.sdk.put("/files", cast_to=object))
    same((wrong_method.status_code, wrong_method.code), (405, "method_not_allowed"))
    long = {"x": "y" * 2_000_000}
    too_large = refused(openai.APIStatusError, lambda: world.submit(extra_body=long), code="too_large")
    same(too_large.status_code, 413)


@call("409 ConflictError is called once")
def _(world: World) -> None:
    job = world.ended_job()
    once(world, lambda: refused(openai.ConflictError, lambda: world.sdk.fine_tuning.jobs.cancel(job.id)))
    file = world.upload()
    live = world.submit(training_file=file.id)
    once(
        world,
        lambda: refused(openai.ConflictError, lambda: world.sdk.files.delete(file.id), code="file_in_use"),
    )
    world.sdk.fine_tuning.jobs.cancel(live.id)


# --- raw and streamed answers, other clients --------------------------------------------------------------------------


@call("with_raw_response")
def _(world: World) -> None:
    raw = world.sdk.fine_tuning.jobs.with_raw_response.retrieve(world.job.id)
    assert raw.headers["x-request-id"]
    assert int(raw.headers["openai-processing-ms"]) >= 0
    job = raw.parse()
    same((raw.status_code, job.id), (200, world.job.id))
    same(job._request_id, raw.headers["x-request-id"])
    headers = {"authorization": f"Bearer {world.sdk.api_key}", "if-none-match": raw.headers["etag"]}
    with http.Client() as plain:
        same(plain.get(f"{world.url}/v1/fine_tuning/jobs/{job.id}", headers=headers).status_code, 304)


@call("with_streaming_response")
def _(world: World) -> None:
    target = world.folder / "streamed"
    with world.sdk.files.with_streaming_response.content(world.file.id) as streamed:
        streamed.stream_to_file(target)
    same(target.read_bytes(), world.rows.read_bytes())
    with world.sdk.files.with_streaming_response.content(world.file.id) as streamed:
        same(b"".join(streamed.iter_bytes(1000)), world.rows.read_bytes())
    with world.sdk.models.with_streaming_response.list() as answer:
        assert world.model in [model.id for model in answer.parse()]


@call("events as a stream")
def _(world: World) -> None:
    stream = world.sdk.get(
        f"/fine_tuning/jobs/{world.ended_job().id}/events",
        options={"params": {"stream": True}},
        cast_to=FineTuningJobEvent,
        stream=True,
        stream_cls=openai.Stream[FineTuningJobEvent],
    )
    streamed = [event.id for event in stream]
    listed = [event.id for event in world.sdk.fine_tuning.jobs.list_events(world.job.id, limit=100)]
    same(streamed, listed[::-1])


@call("the asynchronous client")
def _(world: World) -> None:
    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=f"{world.url}/v1") as sdk:
            file = await sdk.files.create(file=("rows.jsonl", ROW * 20), purpose="fine-tune")
            same((await sdk.files.wait_for_processing(file.id, poll_interval=0.1)).status, "processed")
            same((await sdk.files.content(file.id)).content, ROW * 20)
            jobs, mark = sdk.fine_tuning.jobs, {"client": "async"}
            create = [jobs.create(model=world.model, training_file=file.id, metadata=mark) for _ in range(3)]
            made = {job.id for job in await asyncio.gather(*create)}
            await asyncio.gather(*[jobs.cancel(job_id) for job_id in made])
            same({job.id async for job in jobs.list(limit=1, metadata=mark)}, made)
            events = [event async for event in jobs.list_events(min(made), limit=1)]
            assert len(events) >= 2
            assert world.model in [model.id async for model in sdk.models.list()]
            same((await jobs.with_raw_response.retrieve(min(made))).status_code, 200)
            kind: Any = {"mime_type": "text/jsonl", "purpose": "fine-tune"}
            done = await sdk.uploads.upload_file_chunked(
                file=ROW * 5, filename="b", bytes=len(ROW) * 5, part_size=99, **kind
            )
            assert done.file is not None
            same((await sdk.files.delete(done.file.id)).deleted, True)
            try:
                await jobs.retrieve("ftjob-unknown")
            except openai.NotFoundError as error:
                same(error.code, "job_not_found")
            else:
                raise AssertionError("an unknown job was found")

    asyncio.run(talk())


@call("a base URL with a slash, an organization and a project")
def _(world: World) -> None:
    with openai.OpenAI(base_url=f"{world.url}/v1/", organization="org-x", project="proj_x") as sdk:
        same(sdk.fine_tuning.jobs.retrieve(world.job.id).id, world.job.id)


# --- a bad network ----------------------------------------------------------------------------------------------------


class Line:
    """A line to the service that cuts or holds back the first answers. `opened` counts the connections."""

    def __init__(self, url: str, *, cut: int = 0, hold_seconds: float = 0.0) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port)
        self._spoilt = cut or (1 if hold_seconds else 0)
        self._hold_seconds = hold_seconds
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.opened = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # or the accept that waits would take one more
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.opened += 1
                threading.Thread(target=self._carry, args=(connection,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        server = socket.create_connection(self._target)
        threading.Thread(target=self._forward, args=(client, server), daemon=True).start()
        with suppress(OSError), client, server:
            while answer := server.recv(1 << 16):
                if self._spoilt:
                    self._spoilt -= 1
                    time.sleep(self._hold_seconds)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(answer)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while piece := client.recv(1 << 16):
                server.sendall(piece)
            server.shutdown(socket.SHUT_WR)


@contextmanager
def line(world: World, **options: Any) -> Iterator[Line]:
    made = Line(world.url, **options)
    try:
        yield made
    finally:
        made.close()


def only_job(world: World, mark: str) -> str:
    """The one job with this metadata, cancelled."""
    found = [job.id for job in world.sdk.fine_tuning.jobs.list(metadata={"mark": mark})]
    same(len(found), 1)
    world.sdk.fine_tuning.jobs.cancel(found[0])
    return str(found[0])


@call("a lost answer makes no second job")
def _(world: World) -> None:
    with line(world, cut=2) as bad, world.client(bad.url, max_retries=2) as sdk:
        job = world.submit(sdk, metadata={"mark": "cut"})
        same(bad.opened, 3)
    same(job.id, only_job(world, "cut"))


@call("an answer after the client's timeout makes no second job")
def _(world: World) -> None:
    with line(world, hold_seconds=3.0) as slow, world.client(slow.url, timeout=1.5, max_retries=1) as sdk:
        job = world.submit(sdk, metadata={"mark": "slow"})
    same(job.id, only_job(world, "slow"))


@call("an Idempotency-Key makes one job")
def _(world: World) -> None:
    key = {"Idempotency-Key": f"key-{time.time_ns()}"}
    fields: Any = {"metadata": {"mark": "key"}, "extra_headers": key}
    first, second = world.submit(**fields), world.submit(**fields)
    same(first.id, second.id)
    same(first.id, only_job(world, "key"))
    refused(openai.BadRequestError, lambda: world.submit(extra_headers=key))


@call("a lost answer to a read is asked for again")
def _(world: World) -> None:
    with line(world, cut=1) as bad, world.client(bad.url) as sdk:
        same(sdk.fine_tuning.jobs.retrieve(world.job.id).id, world.job.id)
        same(bad.opened, 2)


@call("APIConnectionError and APITimeoutError")
def _(world: World) -> None:
    with line(world, hold_seconds=2.0) as slow, world.client(slow.url, timeout=0.3, max_retries=0) as sdk:
        refused(openai.APITimeoutError, sdk.models.list)
        longer = sdk.with_options(timeout=http.Timeout(20.0, connect=2.0))
        assert longer.models.list().data
    with line(world) as gone:
        url = gone.url
    with world.client(url, max_retries=0) as sdk:
        refused(openai.APIConnectionError, sdk.models.list)


# --- a whole job ------------------------------------------------------------------------------------------------------


@call("a whole job: its statuses and fields")
def _(world: World) -> None:
    job = world.ended_job()
    assert world.statuses <= STATUSES, world.statuses
    assert job.fine_tuned_model.startswith("ft:")
    assert ":conform:" in job.fine_tuned_model
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    same((job.error, job.integrations), (None, []))
    settings = job.hyperparameters
    assert all(isinstance(value, int | float) for value in settings.to_dict().values()), settings
    same(job.method.supervised.hyperparameters.to_dict(), settings.to_dict())


@call("a whole job: its events")
def _(world: World) -> None:
    events = list(world.strict.fine_tuning.jobs.list_events(world.ended_job().id, limit=100))[::-1]
    said = [event.message for event in events]
    same(said[0], f"Created fine-tuning job: {world.job.id}")
    assert f"New fine-tuned model created: {world.job.fine_tuned_model}" in said, said
    assert "completed" in said[-1]
    steps = [event for event in events if event.type == "metrics"]
    assert steps
    for event in steps:
        assert {"step", "total_steps", "train_loss"} <= event.data.keys(), event.data  # type: ignore[union-attr]
        assert event.message.startswith(f"Step {event.data['step']}/"), event.message  # type: ignore[index]


@call("a whole job: its result file")
def _(world: World) -> None:
    file = world.strict.files.retrieve(world.ended_job().result_files[0])
    same((file.purpose, file.status), ("fine-tune-results", "processed"))
    header, *rows = world.sdk.files.content(file.id).text.splitlines()
    same(header, METRICS_HEADER)
    assert rows


@call("fine_tuning.jobs.checkpoints.list")
def _(world: World) -> None:
    listed = list(world.strict.fine_tuning.jobs.checkpoints.list(world.ended_job().id, limit=1))
    assert listed
    again = list(world.strict.fine_tuning.jobs.checkpoints.list(world.job.id))
    same([one.id for one in listed], [one.id for one in again])
    first = listed[0]
    assert required(FineTuningJobCheckpoint) <= first.to_dict().keys()
    same(first.fine_tuned_model_checkpoint, f"{world.job.fine_tuned_model}:ckpt-step-{first.step_number}")
    same(first.fine_tuning_job_id, world.job.id)
    same(first.metrics.step, first.step_number)


@call("models.retrieve of a fine-tuned model and its checkpoint")
def _(world: World) -> None:
    name = world.ended_job().fine_tuned_model
    model = world.strict.models.retrieve(name)
    same((model.id, model.object, model.owned_by), (name, "model", world.job.organization_id))
    assert name in [one.id for one in world.strict.models.list()]
    checkpoint = world.sdk.fine_tuning.jobs.checkpoints.list(world.job.id).data[0].fine_tuned_model_checkpoint
    same(world.strict.models.retrieve(checkpoint).id, checkpoint)


@call("models.delete")
def _(world: World) -> None:
    name = world.ended_job().fine_tuned_model
    deleted = world.strict.models.delete(name)
    same((deleted.id, deleted.deleted, deleted.object), (name, True, "model"))
    refused(openai.NotFoundError, lambda: world.sdk.models.retrieve(name), code="model_not_found")
    same(world.strict.fine_tuning.jobs.retrieve(world.job.id).fine_tuned_model, name)


# --- the run ----------------------------------------------------------------------------------------------------------


def attempt(name: str, function: Call, world: World) -> bool:
    started = time.monotonic()
    try:
        function(world)
        detail = ""
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the other calls are tried
        here = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
        detail = f"{type(error).__name__}: {error} (line {here[-1].lineno})"[:1000]
    seconds = round(time.monotonic() - started, 2)
    print(json.dumps({"call": name, "ok": not detail, "detail": detail, "seconds": seconds}), flush=True)  # noqa: T201
    return not detail


def main() -> None:
    url, model, rows = sys.argv[1:]
    assert os.environ["OPENAI_API_KEY"]
    world = World(url, model, Path(rows))
    results = [attempt(name, function, world) for name, function in CALLS]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
