"""`shadowft files`: training files, checked here and sent to a server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.http import DEFAULT_URL, ApiKey, Format, Server, Url, connect, segment
from cli.printing import coloured, counted, draw, facts, grid, moment, plain, print_json, say, size, table
from cli.progress import progress_bar, spinner
from core.errors import ShadowError

files = typer.Typer(
    no_args_is_help=True,
    help="Check, upload, list and download training files.",
    epilog="Exit status: 0 done; 1 refused, or the file cannot be trained on; 2 a mistake in the options; "
    "130 interrupted.",
)

#: As in `cli.upload`, which is imported where it is used.
PART_BYTES = 64 * 1024 * 1024
POLL_SECONDS = 0.5

LocalFile = Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="JSONL or a JSON array.")]
FileId = Annotated[str, typer.Argument(metavar="ID")]


@files.command("check")
def check(path: LocalFile, output: Format = "table") -> None:
    """Check a file as the server would, without one.

    Ends with status 1 if the file cannot be trained on; warnings are no obstacle.
    """
    report = check_here(path)
    if output == "json":
        print_json(report)
    else:
        print_report(str(path), report)
    raise typer.Exit(0 if report["ok"] else 1)


@files.command("upload")
def upload(
    path: LocalFile,
    purpose: Annotated[str, typer.Option(help="fine-tune, evals or user_data.")] = "fine-tune",
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the server's check of the rows.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the check.")] = 3600,
    part_bytes: Annotated[
        int, typer.Option(min=1, max=PART_BYTES, help="A larger file goes by parts of this size.")
    ] = PART_BYTES,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload a file and print its id.

    A large file goes by parts, several at once; a part whose connection breaks is sent again, and the whole is compared
    by its MD5. With --wait, ends with status 1 if the server finds that the file cannot be trained on.
    """
    with connect(url, api_key) as server:
        file = send(server, path, purpose=purpose, part_bytes=part_bytes)
        if wait:
            file = checked(server, file, timeout)
    if output == "json":
        print_json(file)
    else:
        say(f"{path.name}: {size(file['bytes'])}, {_state(file)}")
        typer.echo(file["id"])
    raise typer.Exit(1 if file["status"] == "error" else 0)


@files.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="Only those with this purpose.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    after: Annotated[str | None, typer.Option(help="Those behind this id: the next page.")] = None,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List your team's files, newest first."""
    asked = {"purpose": purpose, "after": after}
    with connect(url, api_key) as server:
        page = server.get("/files", limit=limit, **{name: value for name, value in asked.items() if value is not None})
    if output == "json":
        print_json(page)
        return
    drawn = table("id", "status", "size", "rows", "purpose", "name", "created")
    for file in page["data"]:
        rows = (file["validation"] or {}).get("rows")
        drawn.add_row(
            *(plain(file["id"]), coloured(file["status"]), plain(size(file["bytes"])), plain(rows)),
            *map(plain, (file["purpose"], file["filename"], moment(file["created_at"]))),
        )
    draw(drawn)
    tell_of_more(page)


@files.command("get")
def get(file_id: FileId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show one file: its size, its status and what the check said."""
    with connect(url, api_key) as server:
        file = server.get(_route(file_id))
    if output == "json":
        print_json(file)
        return
    known = {"id": file["id"], "name": file["filename"], "size": size(file["bytes"]), "purpose": file["purpose"]}
    known |= {"status": _state(file), "created": moment(file["created_at"]), "expires": moment(file["expires_at"])}
    draw(facts({**known, "sha256": file["sha256"]}))


@files.command("report")
def report(file_id: FileId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show what the server's check found, row by row."""
    with connect(url, api_key) as server:
        found = server.get(f"{_route(file_id)}/report")
    if output == "json":
        print_json(found)
        return
    print_report(file_id, found)


@files.command("download")
def download(
    file_id: FileId,
    out: Annotated[Path | None, typer.Option(help="Where to, else here by its own name.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download a file; one that was cut off is taken up where it stopped, and verified by its hash.

    Another file of that name is not overwritten.
    """
    from cli.download import Wanted, has_hash
    from cli.download import download as fetch

    with connect(url, api_key) as server:
        file = server.get(_route(file_id))
        name = file["filename"].replace("\\", "/").rpartition("/")[2]
        place = out / name if out and out.is_dir() else out or Path(name)
        if place.exists() and not (place.is_file() and has_hash(place, file["sha256"])):
            raise ShadowError(f"{place} exists already, with other content.", hint="Name another place with --out.")
        wanted = Wanted(file["id"], f"{_route(file_id)}/content", place.name, file["bytes"], file["sha256"])
        with progress_bar(name) as tell:
            fetch(server, [wanted], place.parent, on_progress=tell)
    typer.echo(str(place))


@files.command("delete")
def delete(file_id: FileId, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Delete a file, unless a live job reads it."""
    with connect(url, api_key) as server:
        removed = server.delete(_route(file_id))
    typer.echo(f"{removed['id']} is deleted.")


# --- what jobs use as well --------------------------------------------------------------------------------------------


def check_here(path: Path) -> dict[str, Any]:
    """The report of the service's own check."""
    from core.datasets import check_file

    with progress_bar(f"Checking {path.name}") as tell:
        return check_file(path, on_progress=tell or (lambda *_: None)).as_dict()


def send(server: Server, path: Path, *, purpose: str, part_bytes: int = PART_BYTES) -> dict[str, Any]:
    """The uploaded file."""
    from cli.upload import upload as send_file

    with progress_bar(f"Sending {path.name}") as tell:
        return send_file(server, path, purpose=purpose, part_bytes=part_bytes, on_progress=tell)


def checked(server: Server, file: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The file once the server has checked it."""
    end = time.monotonic() + timeout
    with spinner(f"The server checks {file['filename']}"):
        while file["status"] == "uploaded":
            if time.monotonic() > end:
                raise ShadowError(
                    f"The file {file['id']} is not checked after {timeout:g} s.",
                    hint="It waits for a worker of the queue `light`; is one running? Or wait longer with --timeout.",
                )
            time.sleep(POLL_SECONDS)
            file = server.get(_route(file["id"]))
    return file


def tell_of_more(page: dict[str, Any]) -> None:
    if page["has_more"]:
        say(f"There are more: --after {page['last_id']}")


def _route(file_id: str) -> str:
    return f"/files/{segment(file_id)}"


# --- printing ---------------------------------------------------------------------------------------------------------


def _state(file: dict[str, Any]) -> str:
    found = file["status_details"] or (file["validation"] or {}).get("summary")
    return f"{file['status']}: {found}" if found else str(file["status"])


def print_report(name: str, report: dict[str, Any]) -> None:
    draw(plain(name), coloured("ok" if report["ok"] else "refuse"))
    longest = report["longest_row"]
    rows = counted(report["rows"], "row") + (f", {report['bad_rows']:,} of them unusable" if report["bad_rows"] else "")
    draw(
        facts(
            {
                "  format": report["format"],
                "  rows": rows,
                "  characters": f"{report['characters']:,}, {report['trained_characters']:,} of them trained on",
                "  longest": f"row {longest['number']}, {longest['characters']:,} characters" if longest else None,
            }
        )
    )
    _print_problems("error", report["errors"], report["first_errors"])
    _print_problems("warn", report["warnings"], report["first_warnings"])


def _print_problems(level: str, counts: dict[str, int], first: list[dict[str, Any]]) -> None:
    if not counts:
        return
    drawn = grid()
    for problem in first:
        drawn.add_row("", coloured(level), plain(_where(problem)), plain(f"{problem['message']}. {problem['remedy']}."))
    draw(drawn)
    if (more := sum(counts.values()) - len(first)) > 0:
        listed = ", ".join(f"{code} {count:,}" for code, count in counts.items())
        draw(plain(f"  and {more:,} more; in all {listed}."))


def _where(problem: dict[str, Any]) -> str:
    place = [f"{problem['unit']} {problem['number']}"] if problem["number"] is not None else [problem["unit"]]
    return ", ".join([*place, *([problem["path"]] if problem["path"] else [])])
