"""How the commands that speak to a server do it: where it is, which key, what to ask again, and errors as one sentence.

httpx is imported by the commands that use it: it costs every other command a moment.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

import typer

from cli.printing import printable
from core.errors import ShadowError

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")

REQUEST_SECONDS = 60.0
PAGE_ITEMS = 100
#: Between two tries; each pause is twice as long as the one before.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 8.0

Url = Annotated[str, typer.Option("--url", envvar="SHADOWFT_URL", help="Where the server is.")]
DEFAULT_URL = "http://127.0.0.1:8000"
ApiKey = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="SHADOWFT_API_KEY",
        help="Your key. For a server of this machine, the admin's in SHADOWFT_DATA_DIR if you give none.",
    ),
]
Format = Annotated[Literal["table", "json"], typer.Option("--format", help="For people, or for programs.")]


class ServerRefused(ShadowError):
    """The server answered with an error; `code` is its code."""


class Transient(ShadowError):
    """No answer came, or one after which it helps to ask again."""


class Interrupted(ShadowError):
    """Somebody wants it to end, or another thread has failed."""


def sentence(error: ShadowError) -> str:
    message = error.message if error.message.endswith((".", "?", "!")) else f"{error.message}."
    return printable(f"{message} {error.hint}".rstrip())


class Patience:
    """How long to bear a server that is away: so many seconds since it last gave something."""

    def __init__(self, seconds: float, stop: threading.Event) -> None:
        self._seconds = seconds
        self._stop = stop
        self.renew()

    def renew(self) -> None:
        self._end = time.monotonic() + self._seconds
        self._pause = FIRST_PAUSE_SECONDS

    def endure(self, error: Transient) -> None:
        """Pause before the next try; raises the error where there is to be none."""
        if time.monotonic() + self._pause > self._end:
            raise error
        if self._stop.wait(self._pause):
            raise Interrupted("Interrupted.") from None
        self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS)


def patiently(act: Callable[[], T], *, seconds: float, stop: threading.Event | None = None) -> T:
    """What `act` returns, which may be called several times."""
    patience = Patience(seconds, stop or threading.Event())
    while True:
        try:
            return act()
        except Transient as error:
            patience.endure(error)


class Server:
    """A client of one server. Its methods may be used by several threads at once."""

    def __init__(self, url: str, key: str) -> None:
        import httpx

        self.url = url
        self._http = httpx.Client(
            base_url=f"{url.rstrip('/')}/v1",
            headers={"authorization": f"Bearer {key}"},
            timeout=REQUEST_SECONDS,
            trust_env=not _is_here(url),  # a proxy has no business between this machine and itself
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def get(self, path: str, **query: str | int) -> dict[str, Any]:
        return self._ask("GET", path, params=query)

    def post(
        self, path: str, body: dict[str, Any], *, key: str | None = None, seconds: float = REQUEST_SECONDS
    ) -> dict[str, Any]:
        """With a `key` the server does it once, however often it is asked to."""
        headers = {"idempotency-key": key} if key else {}
        return self._ask("POST", path, json=body, headers=headers, timeout=seconds)

    def send(
        self, path: str, content: IO[bytes], *, part: str, filename: str, fields: dict[str, str]
    ) -> dict[str, Any]:
        """A form with one file in it, which is read while it is sent."""
        return self._ask("POST", path, data=fields, files={part: (filename, content, "application/octet-stream")})

    def delete(self, path: str) -> dict[str, Any]:
        return self._ask("DELETE", path)

    @contextmanager
    def stream(
        self, path: str, headers: dict[str, str], *, seconds: float = REQUEST_SECONDS, **query: str | int
    ) -> Iterator[httpx.Response]:
        """An answer whose body the block reads; no part of it may be later than `seconds` after the one before."""
        import httpx

        try:
            with self._http.stream("GET", path, params=query, headers=headers, timeout=seconds) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer, self.url)
                yield answer
        except httpx.TransportError as error:
            raise _away(self.url, error) from None

    def every(self, path: str, **query: str | int) -> Iterator[dict[str, Any]]:
        """All items of a list, page by page."""
        page = self.get(path, limit=PAGE_ITEMS, **query)
        yield from page["data"]
        while page["has_more"]:
            page = self.get(path, limit=PAGE_ITEMS, after=page["last_id"], **query)
            yield from page["data"]

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        import httpx

        try:
            answer = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise _away(self.url, error) from None
        return _read(answer, self.url)


def connect(url: str, api_key: str | None) -> Server:
    """Raises ShadowError where `url` is none, or no key can be found."""
    import httpx

    try:
        return Server(url, api_key or _admin_key(url))
    except (ValueError, httpx.InvalidURL) as error:
        raise ShadowError(f"{url!r} is no address ({error}).", hint=f"One reads {DEFAULT_URL}.") from None


def _admin_key(url: str) -> str:
    """The key that `shadowft serve` left on this machine. It is shown to no other one."""
    from core.config import get_settings

    file = get_settings().admin_key_file
    if _is_here(url):
        try:
            return file.read_text().strip()
        except OSError:
            pass
    raise ShadowError(
        f"There is no API key for {url}.",
        hint=f"Give one with --api-key or SHADOWFT_API_KEY; the admin's is in the server's data folder, here {file}.",
    )


def _is_here(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def segment(name: str) -> str:
    """As one part of a path, whatever it holds."""
    from urllib.parse import quote

    return quote(name, safe="")


def _read(answer: httpx.Response, url: str) -> dict[str, Any]:
    body = _json(answer)
    if answer.is_success and isinstance(body, dict):
        return body
    raise _refusal(answer, url)


def _refusal(answer: httpx.Response, url: str) -> ShadowError:
    body, helps = _json(answer), _helps_to_ask_again(answer)
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        refused = Transient if helps else ServerRefused
        return refused(str(body["error"].get("message")), code=body["error"].get("code"))
    if helps:
        return Transient(f"The server at {url} is not to be had just now: HTTP status {answer.status_code}.")
    return ShadowError(
        f"What answers at {url} is no Shadow-FT server: HTTP status {answer.status_code}, and not the JSON expected.",
        hint="Check --url or SHADOWFT_URL.",
    )


def _helps_to_ask_again(answer: httpx.Response) -> bool:
    """As the SDK decides it."""
    said = answer.headers.get("x-should-retry")
    return said == "true" or (said is None and (answer.status_code in {408, 429} or answer.status_code >= 500))


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return None


def _away(url: str, error: Exception) -> Transient:
    return Transient(
        f"No server answers at {url} ({str(error) or type(error).__name__}).",
        hint="Start one with `shadowft serve`, or name another with --url or SHADOWFT_URL.",
    )
