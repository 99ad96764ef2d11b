"""The tables."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, CheckConstraint, ForeignKey, Index, Integer, String, UniqueConstraint, text
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
    created_at: Mapped[datetime] = _created()


class Pair(Base):
    """A base and an instruct checkpoint of one lineage, registered by an admin; the catalogue's need no row."""

    __tablename__ = "pair"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), unique=True)
    base: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    instruct: Mapped[dict[str, Any]] = mapped_column(JsonColumn)
    created_at: Mapped[datetime] = _created()


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
    #: What a CPU's lane must hold, by admission's estimate; and what a GPU's must, which holds less in float32.
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    gpu_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    #: Events so far; the next one's number is one more.
    event_count: Mapped[int] = mapped_column(default=0)

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
