"""`shadowft jobs`: fine-tuning jobs of a server, from the estimate to the downloaded model."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.files import checked, tell_of_more
from cli.http import DEFAULT_URL, ApiKey, Format, Server, Transient, Url, connect, patiently, segment
from cli.job_request import Body, asks_for_a_job, file_ids, pairs_of, with_files_sent
from cli.printing import (
    coloured,
    console,
    counted,
    draw,
    duration,
    facts,
    findings,
    moment,
    plain,
    print_json,
    say,
    size,
    table,
)
from cli.progress import progress_bar
from core.errors import ShadowError

jobs = typer.Typer(
    no_args_is_help=True,
    help="Estimate, create, watch, pause and cancel fine-tuning jobs, and download what they made.",
    epilog="Exit status: 0 done (of a watched job: succeeded); 1 refused, failed or cancelled; 2 a mistake in the "
    "options; 130 interrupted, which leaves a job running.",
)

#: The SDK's patience: a lost answer is asked for again, and the key sees to it that one job is made.
CREATE_SECONDS = 5.0
CHECK_SECONDS = 3600.0

JobId = Annotated[str, typer.Argument(metavar="ID")]
KINDS = ("model", "adapter", "delta", "report", "metrics", "card")


@jobs.command("create")
@asks_for_a_job
def create(
    body: Body,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="A text of yours: the command given again with it makes no second job.")
    ] = None,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Submit a job and print its id, or follow it with --watch.

    A training file of this machine is checked and uploaded first. A request whose answer is lost is sent again and
    makes no second job. With --watch, ends with status 0 if the job succeeded and 1 if it failed or was cancelled;
    Ctrl-C leaves it running.
    """
    key = idempotency_key or secrets.token_hex(16)
    with connect(url, api_key) as server:
        whole = with_files_sent(server, body)
        job = patiently(lambda: server.post("/fine_tuning/jobs", whole, key=key), seconds=CREATE_SECONDS)
        if watch:
            raise typer.Exit(_watched(server, job["id"], output))
    if output == "json":
        print_json(job)
        return
    say(f"Follow it: shadowft jobs watch {job['id']}{_where(url)}")
    typer.echo(job["id"])


@jobs.command("watch")
def watch(job_id: JobId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Follow a job to its end: events, progress, and the comparison of the models.

    Ends with status 0 if it succeeded and 1 if it failed or was cancelled; Ctrl-C leaves it running.
    """
    with connect(url, api_key) as server:
        raise typer.Exit(_watched(server, job_id, output))


@jobs.command("estimate")
@asks_for_a_job
def estimate(body: Body, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Tell what a job would take: tokens, steps, memory, disk, time, and whether a worker can hold it.

    Takes the options of `create`; no job is made, but a training file of this machine is uploaded. Ends with status 1
    if the job would be refused.
    """
    with connect(url, api_key) as server:
        whole = with_files_sent(server, body)
        for file_id in file_ids(whole):
            checked(server, server.get(f"/files/{segment(file_id)}"), CHECK_SECONDS)
        found = server.post("/fine_tuning/jobs/estimate", whole)
    if output == "json":
        print_json(found)
    else:
        _print_estimate(found)
    raise typer.Exit(1 if found["verdict"] == "refuse" else 0)


@jobs.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only jobs with this; may be repeated.")
    ] = None,
    after: Annotated[str | None, typer.Option(help="Those behind this id: the next page.")] = None,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """List your team's jobs, newest first."""
    query: dict[str, str | int] = {f"metadata[{k}]": v for k, v in pairs_of(metadata, "--metadata").items()}
    if after is not None:
        query["after"] = after
    with connect(url, api_key) as server:
        page = server.get("/fine_tuning/jobs", limit=limit, **query)
    if output == "json":
        print_json(page)
        return
    drawn = table("id", "status", "phase", "model", "suffix", "created", "result")
    for job in page["data"]:
        result = job["fine_tuned_model"] or (job["error"] or {}).get("message") or job["waiting_for"]
        drawn.add_row(
            *(plain(job["id"]), coloured(job["status"])),
            *map(plain, (job["phase"], job["model"], job["user_provided_suffix"], moment(job["created_at"]), result)),
        )
    draw(drawn)
    tell_of_more(page)


@jobs.command("get")
def get(job_id: JobId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show one job."""
    with connect(url, api_key) as server:
        job = server.get(_route(job_id))
    if output == "json":
        print_json(job)
        return
    _print_job(job)


@jobs.command("events")
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job's last event.")] = False,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Print a job's events, oldest first; as JSON, one object a line."""
    import threading

    from cli.events import follow_events, past_events
    from cli.watch import print_event

    out = console()
    with connect(url, api_key) as server:
        found = follow_events(server, job_id, threading.Event()) if follow else past_events(server, job_id)
        for event in found:
            if output == "json":
                typer.echo(json.dumps(event, ensure_ascii=False))
            else:
                print_event(out, event)


@jobs.command("cancel")
def cancel(job_id: JobId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Cancel a job. A running one ends once its worker has stopped the training."""
    with connect(url, api_key) as server:
        job = server.post(f"{_route(job_id)}/cancel", {})
    if output == "json":
        print_json(job)
        return
    typer.echo(f"{job['id']} is {'cancelled' if job['status'] == 'cancelled' else 'being cancelled'}.")


@jobs.command("pause")
def pause(job_id: JobId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Pause a job. A running one saves its training's state first, and goes on from there once it is resumed."""
    _act(job_id, "pause", "is being paused.", output, url, api_key)


@jobs.command("resume")
def resume(job_id: JobId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Let a paused job go on."""
    _act(job_id, "resume", "goes on.", output, url, api_key)


def _act(job_id: str, verb: str, done: str, output: str, url: str, api_key: str | None) -> None:
    with connect(url, api_key) as server:
        job = server.post(f"{_route(job_id)}/{verb}", {})
    if output == "json":
        print_json(job)
        return
    typer.echo(f"{job['id']} is paused." if job["status"] == "paused" else f"{job['id']} {done}")


@jobs.command("retry")
def retry(
    job_id: JobId,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the new job to its end.")] = False,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Run a job again that failed or was cancelled, as a new one that goes on from what the old one saved."""
    with connect(url, api_key) as server:
        job = server.post(f"{_route(job_id)}/retry", {})
        if watch:
            say(f"{job['id']} runs {job_id} again.")
            raise typer.Exit(_watched(server, job["id"], output))
    if output == "json":
        print_json(job)
        return
    typer.echo(job["id"])


@jobs.command("checkpoints")
def checkpoints(job_id: JobId, output: Format = "table", url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """List the states at the ends of epochs that can be grafted, newest first."""
    with connect(url, api_key) as server:
        page = server.get(f"{_route(job_id)}/checkpoints", limit=100)
    if output == "json":
        print_json(page)
        return
    drawn = table("step", "train loss", "validation loss", "id", "name")
    for one in page["data"]:
        losses = (one["metrics"].get(name) for name in ("train_loss", "full_valid_loss"))
        shown = ("" if loss is None else f"{loss:.3f}" for loss in losses)
        drawn.add_row(*map(plain, (one["step_number"], *shown, one["id"], one["fine_tuned_model_checkpoint"])))
    draw(drawn)


@jobs.command("download")
def download(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option(help="The folder, else one with the job's id.")] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help=f"Only files of this kind: {', '.join(KINDS)}; may be repeated.")
    ] = None,
    output: Format = "table",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Download what a job published, and verify every file by its SHA-256.

    Give the command again after an interruption: whole files are kept, cut ones are taken up where they stopped, and
    damaged or changed ones are fetched anew.
    """
    from cli.download import Wanted
    from cli.download import download as fetch

    if unknown := set(kind or ()) - set(KINDS):
        raise typer.BadParameter(f"--kind {min(unknown)!r} is none of {', '.join(KINDS)}.")
    folder = out or Path(job_id.replace("/", "_"))
    with connect(url, api_key) as server:
        found = list(server.every(f"{_route(job_id)}/artifacts"))
        chosen = [one for one in found if not kind or one["kind"] in kind]
        if not chosen:
            raise _nothing_there(server.get(_route(job_id)), {one["kind"] for one in found})
        wanted = [
            Wanted(one["id"], f"/artifacts/{segment(one['id'])}/content", one["path"], one["bytes"], one["sha256"])
            for one in chosen
        ]
        with progress_bar(counted(len(wanted), "file")) as tell:
            done = fetch(server, wanted, folder, on_progress=tell)
    if output == "json":
        print_json(chosen)
        return
    kept = f" {counted(done.kept, 'file')} were there already." if done.kept else ""
    typer.echo(f"{counted(done.fetched, 'file')}, {size(done.bytes)}, verified, in {folder}.{kept}")


def _nothing_there(job: dict[str, Any], kinds: set[str]) -> ShadowError:
    if kinds:
        return ShadowError(f"The job {job['id']} has published no such files; it has {', '.join(sorted(kinds))}.")
    return ShadowError(
        f"The job {job['id']} has no files to download: its status is '{job['status']}'.",
        hint="Files are there from a job's success until its model is deleted.",
    )


def _route(job_id: str) -> str:
    return f"/fine_tuning/jobs/{segment(job_id)}"


def _where(url: str) -> str:
    """What to add to a command so that it asks the same server."""
    return "" if url == os.environ.get("SHADOWFT_URL", DEFAULT_URL) else f" --url {url}"


# --- watching ---------------------------------------------------------------------------------------------------------


def _watched(server: Server, job_id: str, output: str) -> int:
    from cli.watch import Silent, failure, print_end, shown
    from cli.watch import watch as follow

    goes_on = (
        f"The job goes on. Come back: shadowft jobs watch {job_id}{_where(server.url)}; "
        f"cancel it: shadowft jobs cancel {job_id}{_where(server.url)}"
    )
    try:
        if output == "json":
            job = follow(server, job_id, Silent())
        else:
            with shown() as view:
                job = follow(server, job_id, view)
    except KeyboardInterrupt:
        say(goes_on)
        return 130
    except Transient as error:
        raise ShadowError(error.message, hint=goes_on) from None
    if output == "json":
        print_json(job)
    elif job["status"] == "succeeded":
        print_end(server, job)
        say(f"Get it: shadowft jobs download {job_id}{_where(server.url)}")
    if job["status"] != "succeeded":
        raise failure(job)
    return 0


# --- printing ---------------------------------------------------------------------------------------------------------


def _print_job(job: dict[str, Any]) -> None:
    progress, error = job["progress"], job["error"]
    shadow = job["shadow"]
    known = {
        "id": job["id"],
        "status": f"{job['status']}, {job['phase']}" if job["phase"] else job["status"],
        "waits for": job["waiting_for"],
        "error": f"{error['message']} {error['hint']}" if error else None,
        "progress": f"step {progress['step']} of {progress['total_steps']}" if progress else None,
        "model": f"{job['model']} (pair {job['pair']})",
        "result": job["fine_tuned_model"],
        "training": job["training_file"],
        "validation": job["validation_file"],
        "method": _words({"strategy": shadow.get("strategy"), **shadow.get("tuning", {}), **job["hyperparameters"]}),
        "graft": _words(shadow["graft"]),
        "seed": str(job["seed"]),
        "metadata": _words(job["metadata"] or {}),
        "created": moment(job["created_at"]),
        "finished": moment(job["finished_at"]),
        "expected": moment(job["estimated_finish"]),
    }
    draw(facts(known))
    if job["pair_check"] and job["pair_check"]["findings"]:
        draw(findings(job["pair_check"]["findings"]))


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, [], {}))


def _print_estimate(found: dict[str, Any]) -> None:
    tokens, seconds, disk, memory = (found[name] for name in ("tokens", "seconds", "disk_bytes", "memory_bytes"))
    each = f"{tokens['low']:,}" if tokens["low"] == tokens["high"] else f"{tokens['low']:,} to {tokens['high']:,}"
    known = {
        "pair": found["pair"],
        "rows": f"{found['rows']:,}, and {found['rows_held_out']:,} to compare the models on",
        "tokens": f"{each} an epoch ({tokens['source'].replace('_', ' ')})",
        "steps": f"{found['steps']:,}",
        "memory": ", ".join(f"{size(count)} on {device}" for device, count in memory.items()) if memory else None,
        "disk": _disk(disk) if disk else None,
        "time": _span(seconds) if seconds else found["seconds_unknown"],
        "fits": {True: "yes", False: "no", None: "not known"}[found["fits"]],
    }
    draw(plain(found["model"]), coloured(found["verdict"]))
    draw(facts({f"  {label}": value for label, value in known.items()}))
    if found["findings"]:
        draw(findings(found["findings"]))


def _disk(disk: dict[str, int]) -> str:
    return (
        f"{size(disk['download'])} to fetch, {size(disk['workspace'])} while it runs, {size(disk['artifacts'])} kept "
        f"({size(disk['free'])} free)"
    )


def _span(seconds: dict[str, Any]) -> str:
    return f"{duration(seconds['low'])} to {duration(seconds['high'])} on {seconds['device']}"
