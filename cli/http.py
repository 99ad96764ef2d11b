"""How the commands that speak to a server do it: where it is, which key, and its errors as one sentence.

httpx is imported by the commands that use it: it costs every other command a moment.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self
from urllib.parse import urlsplit

import typer

from core.errors import ShadowError

if TYPE_CHECKING:
    import httpx

REQUEST_SECONDS = 60.0
PAGE_ITEMS = 100

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


def sentence(error: ShadowError) -> str:
    message = error.message if error.message.endswith((".", "?")) else f"{error.message}."
    return f"{message} {error.hint}".rstrip()


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

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, json=body)

    def delete(self, path: str) -> dict[str, Any]:
        return self._ask("DELETE", path)

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


def _read(answer: httpx.Response, url: str) -> dict[str, Any]:
    try:
        body = answer.json()
    except ValueError:
        body = None
    if answer.is_success and isinstance(body, dict):
        return body
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        raise ServerRefused(str(body["error"].get("message")), code=body["error"].get("code"))
    raise ShadowError(
        f"What answers at {url} is no Shadow-FT server: HTTP status {answer.status_code}, and not the JSON expected.",
        hint="Check --url or SHADOWFT_URL.",
    )


def _away(url: str, error: Exception) -> ShadowError:
    return ShadowError(
        f"No server answers at {url} ({str(error) or type(error).__name__}).",
        hint="Start one with `shadowft serve`, or name another with --url or SHADOWFT_URL.",
    )
