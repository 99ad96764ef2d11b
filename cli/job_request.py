"""From the options of `shadowft jobs create` and `estimate` to the body of the request.

Both commands take the same options: `asks_for_a_job` gives them to a function, once.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.files import check_here, send
from cli.http import Server
from cli.printing import say
from core.errors import InvalidInput, ShadowError

Body = dict[str, Any]


def request_body(
    model: Annotated[str | None, typer.Option(help="A pair's name, an instruct or a base id.")] = None,
    training_file: Annotated[
        str | None, typer.Option(help="A file's id, or a file of this machine, which is checked and uploaded.")
    ] = None,
    validation_file: Annotated[
        str | None, typer.Option(help="The same: rows to measure on, instead of held-out ones.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Becomes part of the model's name.")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Your own; may be repeated.")] = None,
    epochs: Annotated[int | None, typer.Option(help="How often the rows are gone through.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    learning_rate_multiplier: Annotated[float | None, typer.Option(help="Of the learning rate.")] = None,
    strategy: Annotated[
        Literal["shadow", "direct"] | None, typer.Option(help="Tune base and graft, or tune instruct itself.")
    ] = None,
    tuning: Annotated[Literal["lora", "full"] | None, typer.Option(help="What is trained.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; what is longer is cut.")] = None,
    scale: Annotated[float | None, typer.Option(help="Of the graft.")] = None,
    scope: Annotated[Literal["linear", "all"] | None, typer.Option(help="Which tensors are grafted.")] = None,
    scales: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Further scales to graft and measure: 0.5,0.75")
    ] = None,
    probe: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Rows that show what the tuning damaged; may be repeated."),
    ] = None,
    publish_delta: Annotated[
        bool, typer.Option("--publish-delta", help="Full tuning: publish what was learned, to graft it again.")
    ] = False,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="BODY.json", help="The whole body, - for stdin; options come on top of it."),
    ] = None,
) -> Body:
    """The body as `POST /v1/fine_tuning/jobs` takes it, but for files of this machine."""
    hyperparameters = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
    }
    method = {"type": "supervised", "supervised": {"hyperparameters": _given(hyperparameters)}}
    shadow = {
        "strategy": strategy,
        "tuning": _given({"type": tuning, "learning_rate": learning_rate, "rank": rank, "max_length": max_length}),
        "graft": _given({"scale": scale, "scope": scope}),
        "evaluation": _given({"scales": _numbers(scales), "probes": pairs_of(probe, "--probe")}),
        "publish": {"delta": True} if publish_delta else {},
    }
    options = {
        "model": model,
        "training_file": training_file,
        "validation_file": validation_file,
        "suffix": suffix,
        "seed": seed,
        "metadata": pairs_of(metadata, "--metadata"),
        "method": method if _given(hyperparameters) else {},
        "shadow": _given(shadow),
    }
    body = _merged(_read(json_file) if json_file else {}, _given(options))
    if not body.get("model") or not body.get("training_file"):
        raise typer.BadParameter("Name --model and --training-file, or give a whole body with --json.")
    return body


def asks_for_a_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `request_body`, in front of its own; it gets the body as its first argument."""
    asked = inspect.signature(request_body, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters
    merged = {**asked, **{name: parameter for name, parameter in own.items() if name != "body"}}

    @functools.wraps(command)
    def run(**options: Any) -> None:
        body = request_body(**{name: options.pop(name) for name in asked})
        command(body, **options)

    run.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in merged.items()}
    return run


def with_files_sent(server: Server, body: Body) -> Body:
    """The body with ids where it names files of this machine. Each is checked before it is sent; one that the server
    has already is not sent again."""
    files = {name: body[name] for name in ("training_file", "validation_file") if body.get(name)}
    sent = {name: _sent(server, value) for name, value in files.items()}
    probes = {name: _sent(server, value) for name, value in _probes(body).items()}
    return _merged({**body, **sent}, {"shadow": {"evaluation": {"probes": probes}}} if probes else {})


def file_ids(body: Body) -> list[str]:
    """Every file that a job of this body reads."""
    return [body[name] for name in ("training_file", "validation_file") if body.get(name)] + [*_probes(body).values()]


def _probes(body: Body) -> dict[str, str]:
    probes: dict[str, str] = body.get("shadow", {}).get("evaluation", {}).get("probes", {})
    return probes


def _sent(server: Server, value: str) -> str:
    path = Path(value)
    if not path.is_file():
        if value.startswith("file-"):
            return value
        raise InvalidInput(f"There is no file {value!r} here, and it is no file's id, either.")
    report = check_here(path)
    if not report["ok"]:
        raise InvalidInput(
            f"{path}: {report['summary'].rstrip('.')}.", hint=f"`shadowft files check {path}` shows all of it."
        )
    file = _sent_before(server, path) or send(server, path, purpose="fine-tune")
    say(f"{path.name} is {file['id']}: {report['summary']}")
    file_id: str = file["id"]
    return file_id


def _sent_before(server: Server, path: Path) -> dict[str, Any] | None:
    """A file of the same bytes, which stays."""
    from cli.download import has_hash

    files = server.get("/files", purpose="fine-tune", limit=10_000)["data"]
    stays = (file for file in files if file["status"] != "error" and file["expires_at"] is None)
    bytes_here = path.stat().st_size
    return next((file for file in stays if file["bytes"] == bytes_here and has_hash(path, file["sha256"])), None)


def _read(name: str) -> Body:
    try:
        body = json.loads(sys.stdin.read() if name == "-" else Path(name).read_text("utf-8"))
    except OSError as error:
        raise ShadowError(f"{name} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise InvalidInput(f"{name} is no JSON: {error}.") from None
    if not isinstance(body, dict):
        raise InvalidInput(f"{name} holds no JSON object.")
    return body


def _merged(below: Body, above: Body) -> Body:
    merged = dict(below)
    for name, value in above.items():
        beneath = merged.get(name)
        merged[name] = _merged(beneath, value) if isinstance(value, dict) and isinstance(beneath, dict) else value
    return merged


def _given(options: Body) -> Body:
    return {name: value for name, value in options.items() if value is not None and value != {}}


def pairs_of(words: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals:
            raise typer.BadParameter(f"{option} {word!r} has no `=`; it reads NAME=VALUE.")
        pairs[name] = value
    return pairs


def _numbers(words: str | None) -> list[float] | None:
    try:
        return [float(word) for word in words.split(",")] if words else None
    except ValueError:
        raise typer.BadParameter(f"--scales {words!r} is no list of numbers; it reads 0.5,0.75.") from None
