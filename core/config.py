"""Settings: one class, read once from `SHADOWFT_*` variables and a `.env` file. Units are in the names."""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MEBIBYTE = 1024 * 1024
GIBIBYTE = 1024 * MEBIBYTE


class Settings(BaseSettings):
    """Every default runs one machine with nothing to install: SQLite, local storage, the embedded broker."""

    model_config = SettingsConfigDict(env_prefix="SHADOWFT_", env_file=".env", extra="ignore")

    #: Everything this deployment keeps: database, uploads, artifacts, workspaces, the models' cache, the admin key.
    data_dir: Path = Path("./shadowft-data")
    host: str = "127.0.0.1"
    port: int = 8000

    #: `postgresql+psycopg://…` for several machines; empty means SQLite in the data folder.
    database_url: SecretStr = SecretStr("")
    #: `redis://…` for several machines; empty means messages as files in the data folder.
    broker_url: SecretStr = SecretStr("")
    #: Folders from which local pairs may be registered, separated by commas.
    model_roots: Annotated[tuple[Path, ...], NoDecode] = ()

    max_file_bytes: int = 512 * MEBIBYTE
    #: Of one file that comes by parts.
    max_upload_bytes: int = 8 * GIBIBYTE
    #: What a team's files, pending parts and artifacts may take together; empty means no limit.
    team_storage_bytes: int | None = None
    max_json_bytes: int = MEBIBYTE

    #: A worker that has not renewed its lease for this long has lost its job.
    lease_seconds: float = 60
    beat_seconds: float = 10
    sweep_seconds: float = 15
    #: A cancelled child that has not left by then is killed.
    cancel_grace_seconds: float = 20
    #: Longer checks of one uploaded file are ended.
    inspect_timeout_seconds: float = 600
    #: How often a training saves its state, so that no more than this is lost with its worker.
    save_seconds: float = 600
    #: A training that is told to save its state and leave gets so long; then it is ended and the last saved one counts.
    save_grace_seconds: float = 120
    #: A training that makes no step for so long, and for ten times as long as its steps usually take, is ended;
    #: a graft and an evaluation get four times as long.
    stall_seconds: float = 900
    #: A job whose worker died this often is not tried again.
    max_lost_workers: int = 3
    #: How often a step that failed through the infrastructure's fault is tried again.
    max_infra_retries: int = 3

    #: `auto`, `cpu`, or the index of a GPU: what this worker's lane runs on.
    device: str = "auto"
    #: The walls around each step, which keep it from the network and from all files but its own: `auto` puts up those
    #: that this machine offers, `require` lets no worker start without them, `off` does without.
    sandbox: Literal["auto", "require", "off"] = "auto"
    #: Memory that one job may use in this worker's lane; empty means the device's own, less a reserve.
    lane_memory_bytes: int | None = None

    #: Bytes that the cache of models may hold; beyond them the longest unused go. Empty means no limit: nothing goes.
    model_cache_bytes: int | None = None
    #: Bytes of the cache's disk that a download leaves free.
    model_cache_reserve_bytes: int = 2 * GIBIBYTE

    #: Opens `/metrics`, and nothing else, to other machines; empty keeps it to this one.
    metrics_token: SecretStr = SecretStr("")

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "console"

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().absolute()

    @field_validator("model_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return tuple(Path(part.strip()).expanduser().resolve() for part in value.split(",") if part.strip())

    @field_validator("lane_memory_bytes", "team_storage_bytes", "model_cache_bytes", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @cached_property
    def database(self) -> str:
        return self.database_url.get_secret_value() or f"sqlite:///{self.data_dir / 'shadowft.db'}"

    @property
    def uses_sqlite(self) -> bool:
        return self.database.startswith("sqlite")

    @property
    def admin_key_file(self) -> Path:
        return self.data_dir / "admin.key"

    @property
    def storage_dir(self) -> Path:
        return self.data_dir / "storage"

    @property
    def work_dir(self) -> Path:
        return self.data_dir / "work"

    @property
    def model_cache_dir(self) -> Path:
        return self.data_dir / "models"

    @property
    def broker_dir(self) -> Path:
        return self.data_dir / "broker"


@lru_cache
def get_settings() -> Settings:
    return Settings()
