"""The tables."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from core.db import Base, UtcDateTime, db_now

#: None is SQL's NULL, which a query can ask for; JSON's own `null` would be a value.
JsonColumn = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")

#: SQLite counts a row id only in a column of exactly this type.
RowId = BigInteger().with_variant(Integer(), "sqlite")


def _created() -> Mapped[datetime]:
    return mapped_column(UtcDateTime, default=db_now())


class Team(Base):
    """Who shares files, jobs and models."""

    __tablename__ = "team"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    #: How long one of its jobs may run, all its attempts together; None for as long as it takes.
    max_job_seconds: Mapped[int | None]
    created_at: Mapped[datetime] = _created()


class ApiKey(Base):
    """A key's secret is kept only as its hash; the key is shown once."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"), index=True)
    name: Mapped[str] = mapped_column(String(64))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    is_admin: Mapped[bool]
    created_at: Mapped[datetime] = _created()
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class File(Base):
    """An uploaded dataset, or a job's result file."""

    __tablename__ = "file"
    __table_args__ = (
        CheckConstraint("status IN ('uploaded', 'processed', 'error')", name="status"),
        Index(
            "ix_file_waiting",
            "created_at",
            sqlite_where=text("status = 'uploaded'"),
            postgresql_where=text("status = 'uploaded'"),
        ),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"), index=True)
    filename: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str] = mapped_column(String(256))
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(String(1024))
    #: What the check found, row by row.
    report: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    #: Until then one light worker is checking it.
    check_lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    #: How often a check was begun; one that the infrastructure broke is begun again, within a budget.
    check_tries: Mapped[int] = mapped_column(default=0)
    #: From then on a sweep deletes it, unless a live job reads it.
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    created_at: Mapped[datetime] = _created()


class Upload(Base):
    """A large file on its way in by parts. See `core.uploads` for who may change what."""

    __tablename__ = "upload"
    __table_args__ = (
        CheckConstraint("status IN ('pending', 'completed', 'cancelled', 'expired')", name="status"),
        CheckConstraint("(status = 'completed') = (file_id IS NOT NULL)", name="file_once_completed"),
        Index("ix_upload_status_expires_at", "status", "expires_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"), index=True)
    filename: Mapped[str] = mapped_column(String(512))
    mime_type: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    #: As declared; the parts must add up to it.
    bytes: Mapped[int] = mapped_column(BigInteger)
    #: How long the finished file is kept; None for ever.
    file_lifetime_seconds: Mapped[int | None]
    status: Mapped[str] = mapped_column(String(16), default="pending")
    #: What it was completed with; the same again is answered alike.
    part_ids: Mapped[list[str] | None] = mapped_column(JsonColumn)
    md5: Mapped[str | None] = mapped_column(String(32))
    #: No foreign key: the file may be deleted, the upload stays as it went.
    file_id: Mapped[str | None] = mapped_column(String(40))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = _created()


class UploadPart(Base):
    """A part that lies in storage while its upload is pending."""

    __tablename__ = "upload_part"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("upload.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str] = mapped_column(String(256))
    created_at: Mapped[datetime] = _created()


class Pair(Base):
    """A base and an instruct checkpoint of one lineage, registered by an admin; the catalogue's need no row."""

    __tablename__ = "pair"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    #: The name in small letters: of two that differ in capitals alone, one would be taken for the other.
    folded_name: Mapped[str] = mapped_column(String(128), unique=True)
    base: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    instruct: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = _created()


class PairCheck(Base):
    """A check of a pair, and its verdict once it has completed; the light worker's, as a file's check is."""

    __tablename__ = "pair_check"
    __table_args__ = (
        CheckConstraint("status IN ('queued', 'running', 'completed', 'failed')", name="status"),
        CheckConstraint("depth IN ('headers', 'full')", name="depth"),
        Index("ix_pair_check_fingerprint_id", "fingerprint", "id"),
        Index(
            "ix_pair_check_waiting",
            "created_at",
            sqlite_where=text("status IN ('queued', 'running')"),
            postgresql_where=text("status IN ('queued', 'running')"),
        ),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"), index=True)
    #: The pair's name where it was asked for by that.
    pair: Mapped[str | None] = mapped_column(String(128))
    #: ModelSource, pinned to a commit once the Hub has been asked.
    base: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    instruct: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    depth: Mapped[str] = mapped_column(String(8))
    status: Mapped[str] = mapped_column(String(16))
    #: What was found so far; each with the stage that found it.
    findings: Mapped[list[dict[str, Any]]] = mapped_column(JsonColumn)
    similarity: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    #: What the second stage read, in one hash: an equal one needs not be read again.
    fingerprint: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    #: Until then one light worker is at it.
    check_lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    #: How often it was begun; also the fence: a worker that lost the check to a later try writes nothing.
    check_tries: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = _created()
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class Job(Base):
    """The truth about a job. See `core.jobs` for who may change what."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(
            "status IN ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled')",
            name="status",
        ),
        CheckConstraint("wish IN ('run', 'pause', 'cancel')", name="wish"),
        CheckConstraint("(status = 'running') = (lease_until IS NOT NULL)", name="lease_only_while_running"),
        CheckConstraint("(status = 'running') = (phase IS NOT NULL)", name="phase_only_while_running"),
        Index("ix_job_team_id_id", "team_id", "id"),
        Index("ix_job_team_id_fine_tuned_model", "team_id", "fine_tuned_model"),
        Index("ix_job_kind_status", "kind", "status"),
        Index("ix_job_status_created_at", "status", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"))
    kind: Mapped[str] = mapped_column(String(16))
    #: As the client sent it; the job echoes it. A graft's target.
    model: Mapped[str] = mapped_column(String(256))
    #: Of a graft, too: those of the job whose change it grafts.
    training_file_id: Mapped[str] = mapped_column(String(40))
    validation_file_id: Mapped[str | None] = mapped_column(String(40))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int]
    #: `metadata` is a word of SQLAlchemy's.
    labels: Mapped[dict[str, str] | None] = mapped_column("metadata", JsonColumn)
    #: The request, checked, with defaults filled in; `auto` is still `auto`.
    request: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    #: JobSpec, from admission on.
    spec: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    #: `{verdict, findings, similarity}`, from the admission of a fine-tuning job on, also where it refused the pair.
    pair_check: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)

    status: Mapped[str] = mapped_column(String(20))
    phase: Mapped[str | None] = mapped_column(String(20))
    wish: Mapped[str] = mapped_column(String(8), default="run")
    #: The fence: raised by each claim.
    attempt: Mapped[int] = mapped_column(default=0)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    worker_id: Mapped[str | None] = mapped_column(String(40))
    #: Not to be claimed before.
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lost_count: Mapped[int] = mapped_column(default=0)
    infra_retries: Mapped[int] = mapped_column(default=0)
    #: How often the training was found to make no step.
    stall_count: Mapped[int] = mapped_column(default=0, server_default="0")
    #: How often the job has waited for room on a disk since it last got on.
    disk_waits: Mapped[int] = mapped_column(default=0, server_default="0")
    #: The training's micro-batch is halved so often: it had run out of memory.
    oom_level: Mapped[int] = mapped_column(default=0, server_default="0")
    #: How long workers have had the job, as of the last beat.
    run_seconds: Mapped[float] = mapped_column(Double, default=0.0, server_default="0")
    #: The job that this one runs again.
    parent_id: Mapped[str | None] = mapped_column(String(40))
    #: What a CPU's lane must hold, by admission's estimate; and what a GPU's must, which holds less in float32.
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    gpu_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    #: Events so far; the next one's number is one more.
    event_count: Mapped[int] = mapped_column(default=0)
    #: Raised by each write of the row, whoever does it: what a poll compares instead of the job itself.
    version: Mapped[int] = mapped_column(default=0, server_default="0", onupdate=literal_column("version + 1"))

    #: `{step, total_steps, loss}` of the running step.
    progress: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(256))
    result_file_ids: Mapped[list[str]] = mapped_column(JsonColumn, default=list)
    evaluation: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    #: The published graft's figures, fidelity first, once the job has succeeded.
    graft_result: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    error: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)

    created_at: Mapped[datetime] = _created()
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    phase_started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    @property
    def files(self) -> dict[str, str]:
        """Every file the job reads: the request's parameter -> the file's id."""
        if self.kind == "graft":
            carried_over: dict[str, str] = self.request["files"]
            return carried_over
        probes = self.request["shadow"]["evaluation"]["probes"]
        validation = {"validation_file": self.validation_file_id} if self.validation_file_id else {}
        named = {f"shadow.evaluation.probes.{name}": file_id for name, file_id in probes.items()}
        return {"training_file": self.training_file_id, **validation, **named}


class JobEvent(Base):
    """What happened to a job, numbered without gaps."""

    __tablename__ = "job_event"
    __table_args__ = (UniqueConstraint("job_id", "seq"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    seq: Mapped[int]
    level: Mapped[str] = mapped_column(String(8))
    type: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(String(2048))
    data: Mapped[dict[str, Any] | None] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = _created()


class Metric(Base):
    """One measurement of a training; a step trained again in a later attempt overwrites the earlier one."""

    __tablename__ = "metric"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = _created()


class Checkpoint(Base):
    """A state that a training passed through and that can still be had: the end of an epoch."""

    __tablename__ = "checkpoint"
    __table_args__ = (UniqueConstraint("job_id", "step"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    step: Mapped[int]
    #: What was measured at that step, with the keys of the fine-tuning contract.
    metrics: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    #: Below this part of their path lie the artifacts with its change: `adapter`, `checkpoints/step-12`, `delta`. None:
    #: full tuning whose change was not published.
    folder: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime] = _created()


class ResumePoint(Base):
    """The whole state of a training at a step, in storage. See `worker.resume_points` for how one is made and used."""

    __tablename__ = "resume_point"
    __table_args__ = (
        CheckConstraint("status IN ('ready', 'bad')", name="status"),
        Index("ix_resume_point_job_id_step", "job_id", "step"),
        Index("ix_resume_point_prefix", "prefix"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    #: That may go on from it. A job that is run again as another hands its points on: then two rows name one prefix.
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    #: The one that saved it.
    attempt: Mapped[int]
    step: Mapped[int]
    #: `JobSpec.training_sha256` of the job that saved it.
    spec_sha256: Mapped[str] = mapped_column(String(64))
    #: Of its files in storage.
    prefix: Mapped[str] = mapped_column(String(256))
    bytes: Mapped[int] = mapped_column(BigInteger)
    #: `{step, spec, files: {name: {bytes, sha256}}}`, as the trainer wrote it.
    manifest: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    #: `bad`: it did not agree with its manifest, belongs to another training, or the trainer refused it.
    status: Mapped[str] = mapped_column(String(8), default="ready")
    created_at: Mapped[datetime] = _created()


class PhaseTime(Base):
    """How long a finished phase of a job took, and how much there was to do: what estimates are made from."""

    __tablename__ = "phase_time"
    __table_args__ = (Index("ix_phase_time_pair_id", "pair", "id"),)

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"), index=True)
    #: The name of the job's pair.
    pair: Mapped[str] = mapped_column(String(128))
    #: `lora`, `full`, or `graft` for a job that trains nothing.
    tuning: Mapped[str] = mapped_column(String(8))
    phase: Mapped[str] = mapped_column(String(20))
    #: `cpu` or `cuda`.
    device: Mapped[str] = mapped_column(String(8))
    seconds: Mapped[float] = mapped_column(Double)
    #: Of them, those that grow with the work; the rest is starting and loading.
    busy_seconds: Mapped[float] = mapped_column(Double)
    #: Of the pair's instruct model.
    parameters: Mapped[int] = mapped_column(BigInteger)
    #: In the unit of the phase: see `core.history`.
    work: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = _created()


class Artifact(Base):
    """One file that a job published."""

    __tablename__ = "artifact"
    __table_args__ = (UniqueConstraint("job_id", "path"),)

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id", ondelete="CASCADE"))
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"))
    kind: Mapped[str] = mapped_column(String(16))
    #: Relative, with forward slashes: `model/config.json`.
    path: Mapped[str] = mapped_column(String(512))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    storage_key: Mapped[str] = mapped_column(String(512))
    created_at: Mapped[datetime] = _created()


class IdempotencyKey(Base):
    """What was answered to a request that created something. See `core.idempotency`."""

    __tablename__ = "idempotency_key"
    __table_args__ = (
        UniqueConstraint("team_id", "route", "key"),
        Index("ix_idempotency_key_retry", "team_id", "route", "body_sha256"),
        Index("ix_idempotency_key_created_at", "created_at"),
    )

    id: Mapped[int] = mapped_column(RowId, primary_key=True)
    team_id: Mapped[str] = mapped_column(ForeignKey("team.id"))
    route: Mapped[str] = mapped_column(String(64))
    #: None: the client sent none; its retry is known by the body.
    key: Mapped[str | None] = mapped_column(String(255))
    body_sha256: Mapped[str] = mapped_column(String(64))
    #: The JSON that was answered.
    answer: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = _created()


class Worker(Base):
    """A running Celery process and what its lane can hold."""

    __tablename__ = "worker"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    host: Mapped[str] = mapped_column(String(255))
    pid: Mapped[int]
    queue: Mapped[str] = mapped_column(String(16))
    device: Mapped[str] = mapped_column(String(64))
    lane_memory_bytes: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[str] = mapped_column(String(32))
    draining: Mapped[bool] = mapped_column(default=False)
    beat_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    created_at: Mapped[datetime] = _created()
