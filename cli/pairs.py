"""`shadowft pairs`: the pairs that a server knows, and whether each is fit to be trained, over HTTP.

Rich is imported by the commands that draw with it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.http import DEFAULT_URL, ApiKey, Format, Server, Url, connect, segment, sentence
from cli.printing import coloured, draw, facts, findings, plain, print_json, table
from cli.progress import counter, spinner
from core.errors import ShadowError

if TYPE_CHECKING:
    from rich.table import Table

pairs = typer.Typer(no_args_is_help=True, help="List, show, register and check pairs of models.")

REFUSED = 1
#: Of a check: that it could not be made. A mistake in the command's own options ends so too.
UNCHECKED = 2

#: Between two looks at a check that runs.
POLL_SECONDS = 0.5
#: A server answers the first stage from the Hub; more at once would only earn a 429 there.
CHECKS_AT_ONCE = 4

Outcome = Literal["ok", "warn", "refuse", "unchecked"]

Base = Annotated[str | None, typer.Option(help="Hub repository, or a folder under the server's model roots.")]
Instruct = Annotated[str | None, typer.Option(help="Hub repository, or a folder under the server's model roots.")]
BaseRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]
InstructRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository.")]


@pairs.command("list")
def list_pairs(
    search: Annotated[str, typer.Option(help="Part of a name, id, family or licence.")] = "",
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List the pairs: those that an admin registered, then the catalogue's."""
    with connect(url, api_key) as server:
        found = list(server.every("/pairs", search=search))
    if output == "json":
        print_json(found)
        return
    draw(_pairs_table(found))
    typer.echo(f"{len(found)} pairs. `shadowft pairs show NAME` tells what is known about one.")


@pairs.command("show")
def show(name: str, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show one pair, by its name or id, and what to be careful about."""
    with connect(url, api_key) as server:
        pair = server.get(f"/pairs/{segment(name)}")
    if output == "json":
        print_json(pair)
        return
    draw(_facts_table(pair))
    if pair["cautions"]:
        draw(_cautions_table(pair["cautions"]))


@pairs.command("add")
def add(
    name: str,
    base: Annotated[str, typer.Option(help="Hub repository, or a folder under the server's model roots.")],
    instruct: Annotated[str, typer.Option(help="Hub repository, or a folder under the server's model roots.")],
    base_revision: BaseRevision = None,
    instruct_revision: InstructRevision = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Register a pair (with an admin's key) and print its id."""
    body = {"name": name} | _models(base, instruct, base_revision, instruct_revision)
    with connect(url, api_key) as server:
        typer.echo(server.post("/pairs", body)["id"])


@pairs.command("remove")
def remove(name: str, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Forget a registered pair, by its name or id (with an admin's key). Jobs that use it go on."""
    with connect(url, api_key) as server:
        removed = server.delete(f"/pairs/{segment(name)}")
    typer.echo(f"{removed['id']} is removed.")


@pairs.command("check")
def check(
    name: Annotated[str | None, typer.Argument(help="A pair of the list; or give --base and --instruct.")] = None,
    base: Base = None,
    instruct: Instruct = None,
    base_revision: BaseRevision = None,
    instruct_revision: InstructRevision = None,
    every: Annotated[bool, typer.Option("--all", help="Check every pair of the list, by configs and headers.")] = False,
    full: Annotated[bool, typer.Option("--full", help="With --all: tokenizers and weights too.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for one check.")] = 3600,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Check whether pairs are fit to be trained, before any GPU time.

    Ends with status 0 if so (also with warnings), 1 if a pair is refused, 2 if one could not be checked.
    """
    if [name is not None, bool(base or instruct), every].count(True) != 1 or bool(base) != bool(instruct):
        raise typer.BadParameter("Name a pair, or give --base and --instruct, or --all.")
    if full and not every:
        raise typer.BadParameter("--full belongs to --all; a single check is always full.")
    try:
        with connect(url, api_key) as server:
            if every:
                status = _check_all(server, "full" if full else "headers", timeout, output)
            else:
                models = {} if name else _models(base, instruct, base_revision, instruct_revision)
                status = _check_one(server, {"pair": name} if name else models, timeout, output)
    except ShadowError as error:
        typer.echo(f"shadowft: {sentence(error)}", err=True)
        status = UNCHECKED
    raise typer.Exit(status)


# --- checking ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of one check. `check` is the server's object; None where it gave an error instead."""

    name: str
    outcome: Outcome
    check: dict[str, Any] | None
    error: str | None

    def as_dict(self) -> dict[str, Any]:
        return {"pair": self.name, "outcome": self.outcome, "error": self.error, "check": self.check}


def _check_one(server: Server, body: dict[str, Any], timeout: float, output: str) -> int:
    name = body.get("pair") or f"{body['base']} -> {body['instruct']}"
    with spinner(f"Checking {name}"):
        found = _followed(server, body, timeout, threading.Event())
    result = _judged(name, found)
    if output == "json":
        print_json(found)
    else:
        _print_result(result)
    return _status_of([result])


def _check_all(server: Server, depth: str, timeout: float, output: str) -> int:
    names = [pair["name"] for pair in server.every("/pairs")]
    results = []
    for result in _checked(server, names, depth, timeout):
        results.append(result)
        if output == "table" and (result.outcome != "ok"):
            _print_result(result)
    if output == "json":
        print_json([result.as_dict() for result in results])
    else:
        counts = Counter(result.outcome for result in results)
        typer.echo(
            f"{len(results)} pairs: {counts['ok']} ok, {counts['warn']} with warnings, {counts['refuse']} refused, "
            f"{counts['unchecked']} could not be checked."
        )
    return _status_of(results)


def _checked(server: Server, names: list[str], depth: str, timeout: float) -> Iterator[Result]:
    """In the order of `names`, a few at a time; one that fails stops no other."""
    stop = threading.Event()

    def one(name: str) -> Result:
        try:
            return _judged(name, _followed(server, {"pair": name, "depth": depth}, timeout, stop))
        except ShadowError as error:
            return Result(name, "unchecked", None, sentence(error))

    with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool, counter("Checking", len(names)) as advance:
        try:
            for result in pool.map(one, names):
                advance(result.name)
                yield result
        finally:  # interrupted: leave the running ones to the server, begin no other
            stop.set()
            pool.shutdown(cancel_futures=True)


def _followed(server: Server, body: dict[str, Any], timeout: float, stop: threading.Event) -> dict[str, Any]:
    """The check once it is done. Raises ShadowError when it is not in time."""
    end = time.monotonic() + timeout
    found = server.post("/pairs/check", body)
    while found["status"] not in {"completed", "failed"}:
        if time.monotonic() > end:
            raise ShadowError(
                f"The check {found['id']} is still {found['status']} after {timeout:g} s.",
                hint="It waits for a worker of the queue `light`; is one running? Or wait longer with --timeout.",
            )
        if stop.wait(POLL_SECONDS):
            raise ShadowError("Interrupted.")
        found = server.get(f"/pairs/check/{found['id']}")
    return found


def _judged(name: str, found: dict[str, Any]) -> Result:
    if found["status"] == "failed":
        error = found["error"] or {}
        return Result(name, "unchecked", found, f"{error.get('message', '')} {error.get('hint') or ''}".strip())
    return Result(name, found["verdict"], found, None)


def _status_of(results: list[Result]) -> int:
    outcomes = {result.outcome for result in results}
    if "refuse" in outcomes:
        return REFUSED
    return UNCHECKED if "unchecked" in outcomes else 0


def _models(
    base: str | None, instruct: str | None, base_revision: str | None, instruct_revision: str | None
) -> dict[str, Any]:
    given = {
        "base": base,
        "instruct": instruct,
        "base_revision": base_revision,
        "instruct_revision": instruct_revision,
    }
    return {field: value for field, value in given.items() if value is not None}


# --- printing ---------------------------------------------------------------------------------------------------------


def _pairs_table(found: list[dict[str, Any]]) -> Table:
    drawn = table("name", "base", "instruct", "licence", "gated", "ids")
    for pair in found:
        licence, ids = pair["licence"], pair["ids"]
        cells = (
            *(pair["name"], _model(pair, "base"), _model(pair, "instruct")),
            licence["text"] if licence else "",
            "yes" if pair["gated"] else "",
            ids["source"] if ids else pair["origin"],
        )
        drawn.add_row(*map(plain, cells))
    return drawn


def _model(pair: dict[str, Any], role: str) -> str:
    revision = pair[f"{role}_revision"]
    return f"{pair[role]}@{revision}" if revision else str(pair[role])


def _facts_table(pair: dict[str, Any]) -> Table:
    known = {label: pair[label] for label in ("name", "id", "origin", "family")}
    known |= {role: _model(pair, role) for role in ("base", "instruct")}
    for label in ("ids", "licence", "gated"):
        if claim := pair[label]:
            known[label] = f"{claim['text']} ({_origin(claim)})"
    return facts(known)


def _cautions_table(cautions: list[dict[str, Any]]) -> Table:
    drawn = table("caution", "what to know", "from")
    for caution in cautions:
        drawn.add_row(*map(plain, (caution["kind"], caution["text"], _origin(caution))))
    return drawn


def _origin(claim: dict[str, Any]) -> str:
    return f"seen in: {claim['seen']}" if claim["seen"] else "from memory"


def _print_result(result: Result) -> None:
    draw(plain(result.name), coloured(result.outcome))
    if result.error:
        draw(plain(f"  {result.error}"))
    if result.check and result.check["findings"]:
        draw(findings(result.check["findings"]))
    if result.check and (similarity := result.check["similarity"]):
        draw(plain(_sigma(similarity)))


def _sigma(similarity: dict[str, Any]) -> str:
    return (
        f"  sigma {similarity['sigma_mean']:.4f} (mean of the tensors), {similarity['sigma_ratio']:.4f} (of all); "
        f"the farthest tensor is {similarity['worst_tensor']} with {similarity['worst_sigma']:.4f}"
    )
