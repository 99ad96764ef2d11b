"""Every error this service raises on purpose.

    ShadowError
    ├── InvalidInput            400  a value, a field or a file that cannot be used
    │   ├── InvalidDataset           rows that cannot be trained on
    │   └── PairRefused              two models that cannot be grafted, with every reason
    ├── AuthenticationFailed    401
    ├── PermissionDenied        403
    ├── NotFound                404
    ├── TooSlow                 408  the body did not arrive in time
    ├── Conflict                409  the thing exists, but its state forbids the act
    │   └── InFlight                 the same request is being answered just now; trying again helps
    ├── TooLarge                413
    ├── RangeUnusable           416  a `Range` that names no byte of the file
    ├── QuotaExceeded           429  the team's share is used up; asking again changes nothing by itself
    ├── UnsupportedMedia        415  a body in a form that is not read here
    ├── Unavailable             503  a part that this needs is away; trying again helps
    ├── StepFailed                   a job's step ended badly; carries a Cause
    └── LeaseLost                    another worker may own the job by now: stop, write nothing

An error names the thing, the value found and the remedy. `code` is stable: clients may test for it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

Fault = Literal["user", "memory", "infrastructure"]


#: Longer texts are made of strangers' values, and nobody reads them.
_MAX_TEXT = 4000


def clean(text: str) -> str:
    """A text that may hold names and values from strangers' files, as an answer and a row can hold it: without U+0000
    and lone surrogates. PostgreSQL takes neither, and UTF-8 not the latter."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def told(text: str) -> str:
    """The same, and not endless: for sentences."""
    cleaned = clean(text)
    return cleaned if len(cleaned) <= _MAX_TEXT else f"{cleaned[:_MAX_TEXT]}…"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a job failed, in words for its owner."""

    code: str
    #: One sentence.
    message: str
    #: What to do about it; empty when there is nothing to do.
    hint: str = ""
    #: Whether the same job may succeed when run again unchanged.
    retryable: bool = False
    fault: Fault = "user"
    #: The request field at fault, when one is.
    param: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", told(self.message))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ShadowError(Exception):
    """The root. `status` is the HTTP status that the API answers with."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    fault: ClassVar[Fault] = "infrastructure"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None, hint: str = "") -> None:
        super().__init__(told(message))
        self.message = told(message)
        self.code = code or self.default_code
        self.param = param
        self.hint = hint

    @property
    def cause(self) -> Cause:
        return Cause(
            code=self.code,
            message=self.message,
            hint=self.hint,
            retryable=self.retryable,
            fault=self.fault,
            param=self.param,
        )


class InvalidInput(ShadowError):
    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"
    fault = "user"


class InvalidDataset(InvalidInput):
    default_code = "invalid_training_file"


class PairRefused(InvalidInput):
    """`reasons` holds every finding, so that nobody mends one only to meet the next."""

    default_code = "pair_refused"

    def __init__(self, reasons: list[str], *, param: str | None = "model") -> None:
        super().__init__("These two models cannot be grafted: " + "; ".join(reasons), param=param)
        self.reasons = [told(reason) for reason in reasons]


class AuthenticationFailed(ShadowError):
    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"
    fault = "user"


class PermissionDenied(ShadowError):
    status = 403
    type = "permission_error"
    default_code = "permission_denied"
    fault = "user"


class NotFound(ShadowError):
    status = 404
    type = "invalid_request_error"
    default_code = "not_found"
    fault = "user"


class TooSlow(ShadowError):
    status = 408
    type = "invalid_request_error"
    default_code = "request_timeout"
    fault = "user"
    retryable = True


class Conflict(ShadowError):
    status = 409
    type = "invalid_request_error"
    default_code = "conflict"
    fault = "user"


class InFlight(Conflict):
    default_code = "request_in_flight"
    retryable = True


class TooLarge(ShadowError):
    status = 413
    type = "invalid_request_error"
    default_code = "too_large"
    fault = "user"


class UnsupportedMedia(ShadowError):
    status = 415
    type = "invalid_request_error"
    default_code = "unsupported_media_type"
    fault = "user"


class RangeUnusable(ShadowError):
    status = 416
    type = "invalid_request_error"
    default_code = "bad_range"
    fault = "user"


class QuotaExceeded(ShadowError):
    """A client would try a 429 again by itself; the answer says that it need not."""

    status = 429
    type = "rate_limit_error"
    default_code = "quota_exceeded"
    fault = "user"


class Unavailable(ShadowError):
    status = 503
    default_code = "unavailable"
    retryable = True


class StepFailed(ShadowError):
    """A step's child ended without its completion mark."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause.message, code=cause.code, param=cause.param, hint=cause.hint)
        self._cause = cause

    @property
    def cause(self) -> Cause:
        return self._cause


class LeaseLost(ShadowError):
    default_code = "lease_lost"
    retryable = True
