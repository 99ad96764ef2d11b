"""`shadowft graft`: the grafting engine alone, from folders to a folder; no service, no database, no settings.

Torch and Rich's bar are imported when their turn comes: `--help` and a slip of the pen are answered at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli import graft_words as words
from cli.progress import progress_bar
from core.errors import InvalidInput, PairRefused, Unavailable

if TYPE_CHECKING:
    from worker.weights import Delta, DeltaResult, GraftResult, Provenance, Selection
    from worker.weights.graft import Plan

INTERRUPTED = 130

_ROLES = ("base", "tuned", "adapter", "delta", "instruct")
#: The option of a parameter that has another name.
_FLAGS = {"everything": "--all", "as_json": "--json"}
#: What goes with --verify, and what with --delta-out where no model is made.
_VERIFYING = frozenset({"verify", "everything", "as_json", *_ROLES})
_DELTA_ALONE = frozenset({"base", "tuned", "delta_out", "as_json"})
_WAYS = "Give --base and --tuned, or --adapter (with --base where it needs one), or --delta."
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: Where the Hub's client keeps a model: its name and its commit.
_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")

_SOURCES = "The change"
_MODELS = "The models"
_OPTIONS = "What is grafted"
_VERIFY = "Checking a result"
_RUNNING = "Running"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The command line, with `~` expanded."""

    #: The parameters that were given.
    given: frozenset[str]
    #: By role.
    sources: dict[str, Path]
    out: Path | None
    delta_out: Path | None
    verify: Path | None
    everything: bool
    scale: float
    scope: Literal["linear", "all"]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    output_dtype: Literal["auto", "bfloat16", "float32"]
    plan: bool
    report: bool
    hash_sources: bool
    threads: int | None
    as_json: bool


def _folder(text: str, panel: str) -> Any:
    return typer.Option(metavar="FOLDER", help=text, rich_help_panel=panel)


def _pattern(text: str) -> Any:
    return typer.Option(metavar="PATTERN", help=f"{text} May be repeated.", rich_help_panel=_OPTIONS)


def _switch(name: str, text: str, panel: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel)


def graft(
    ctx: typer.Context,
    base: Annotated[Path | None, _folder("What the tuning started from.", _SOURCES)] = None,
    tuned: Annotated[Path | None, _folder("What the tuning made of it.", _SOURCES)] = None,
    adapter: Annotated[
        Path | None,
        _folder("In place of those two: a PEFT adapter. DoRA and whole modules need --base beside it.", _SOURCES),
    ] = None,
    delta: Annotated[
        Path | None, _folder("In place of those two: their difference, as --delta-out wrote it.", _SOURCES)
    ] = None,
    instruct: Annotated[Path | None, _folder("What the change is added to.", _MODELS)] = None,
    out: Annotated[Path | None, _folder("The new model. The folder must not exist yet.", _MODELS)] = None,
    delta_out: Annotated[
        Path | None,
        _folder("In place of these two or beside them: keep tuned minus base here, for --delta.", _MODELS),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Factor of the change: any finite number.", rich_help_panel=_OPTIONS)
    ] = 1.0,
    scope: Annotated[
        Literal["linear", "all"],
        typer.Option(help="The language model's linear layers, or all that both have.", rich_help_panel=_OPTIONS),
    ] = "linear",
    include: Annotated[
        list[str] | None, _pattern("Only tensors whose name matches this shell pattern, such as '*.mlp.*'.")
    ] = None,
    exclude: Annotated[list[str] | None, _pattern("No tensors whose name matches; wins over --include.")] = None,
    output_dtype: Annotated[
        Literal["auto", "bfloat16", "float32"],
        typer.Option(help="How the new model is stored; auto: as --instruct is.", rich_help_panel=_OPTIONS),
    ] = "auto",
    verify: Annotated[
        Path | None,
        _folder(
            "Instead of grafting: check a grafted model's files, and make some of its tensors again. Where its sources "
            "lie is on record unless the model was published; --base, --tuned and so on overrule that.",
            _VERIFY,
        ),
    ] = None,
    everything: Annotated[bool, _switch("--all", "Make every tensor again.", _VERIFY)] = False,
    plan: Annotated[
        bool, _switch("--plan", "Say what would be done, or why it is refused; write nothing.", _RUNNING)
    ] = False,
    no_report: Annotated[
        bool,
        _switch("--no-report", "The weights alone, about a quarter faster: no fidelity figures, no hashes.", _RUNNING),
    ] = False,
    hash_sources: Annotated[
        bool, _switch("--hash-sources", "Record the sources' hashes too, which reads them once more.", _RUNNING)
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: one more than there are cores.", rich_help_panel=_RUNNING)
    ] = None,
    as_json: Annotated[bool, _switch("--json", "Print the result as JSON, with every figure.", _RUNNING)] = False,
) -> None:
    """Graft onto an instruct model what tuning changed: out = instruct + scale * (tuned - base).

    \b
    shadowft graft --base B --tuned T --instruct I --out O     from full tuning
    shadowft graft --adapter A --instruct I --out O            from a LoRA adapter
    shadowft graft --base B --tuned T --delta-out D            keep the difference
    shadowft graft --delta D --instruct I --out O              and graft it later
    shadowft graft --verify O --all                            check a result

    \b
    Folders in the Hugging Face layout go in and come out; pickles are not read.
    Models that do not fit are refused with every reason.
    Nothing stands at --out before all of it does.
    A graft that was stopped goes on when the same command is run again.
    """
    roles = zip(_ROLES, (base, tuned, adapter, delta, instruct), strict=True)
    wish = Wish(
        given=_given(ctx),
        sources={role: place for role, folder in roles if (place := _expanded(folder))},
        out=_expanded(out),
        delta_out=_expanded(delta_out),
        verify=_expanded(verify),
        everything=everything,
        scale=scale,
        scope=scope,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        output_dtype=output_dtype,
        plan=plan,
        report=not no_report,
        hash_sources=hash_sources,
        threads=threads,
        as_json=as_json,
    )
    with _told_in_words(wish):
        refuse_misfits(wish)
        refuse_places(wish)
        _run(wish)


def _given(ctx: typer.Context) -> frozenset[str]:
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return frozenset(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def _expanded(folder: Path | None) -> Path | None:
    """`--base=~/models` reaches us as it is: the shell expands `~` only where a word begins."""
    if folder is None:
        return None
    return Path(os.path.expanduser(folder))  # noqa: PTH111 - pathlib's own raises where there is no such user


# --- before anything is read ------------------------------------------------------------------------------------------


def refuse_misfits(wish: Wish) -> None:
    """InvalidInput: the options do not go together; it says which are to be given."""
    if wish.verify is not None:
        misfit = _verify_misfit(wish.given)
    else:
        misfit = _change_misfit(wish.given) or _model_misfit(wish) or _verify_only_misfit(wish.given)
    if misfit:
        raise InvalidInput(misfit)


def _verify_misfit(given: frozenset[str]) -> str | None:
    others = given - _VERIFYING
    if not others:
        return None
    return f"--verify reads from the folder how it was made and writes nothing; leave out {_flags(others)}."


def _verify_only_misfit(given: frozenset[str]) -> str | None:
    return (
        "--all goes with --verify; for every weight in the graft, give --scope all." if "everything" in given else None
    )


def _change_misfit(given: frozenset[str]) -> str | None:
    """Exactly one of three ways says what changed."""
    ways = [way for way in ("tuned", "adapter", "delta") if way in given]
    if len(ways) > 1:
        return f"{_flags(ways)} say the same in different ways, and one is enough. {_WAYS}"
    if not ways:
        return f"--base needs --tuned or --adapter beside it. {_WAYS}" if "base" in given else f"From what? {_WAYS}"
    if ways == ["tuned"] and "base" not in given:
        return "--tuned needs --base, the model that the tuning started from."
    if ways == ["delta"] and "base" in given:
        return "--delta is tuned minus base already; leave out --base."
    return None


def _model_misfit(wish: Wish) -> str | None:
    """Somewhere to write to, and all that it needs."""
    given = wish.given
    if wish.plan:
        return None if "instruct" in given else "--plan needs --instruct, the model to graft onto."
    if not given & {"instruct", "out", "delta_out"}:
        return "Onto what, and where to? Give --instruct and --out."
    if "instruct" in given and "out" not in given:
        return "--instruct needs --out, a new folder for the model."
    if "out" in given and "instruct" not in given:
        return "--out needs --instruct, the model to graft onto."
    return _delta_out_misfit(wish) if wish.delta_out else None


def _delta_out_misfit(wish: Wish) -> str | None:
    if "tuned" not in wish.given:
        return "--delta-out needs --base and --tuned, whose difference it keeps; an adapter or a delta is one already."
    if wish.out and wish.delta_out and (_lies_in(wish.out, wish.delta_out) or _lies_in(wish.delta_out, wish.out)):
        return "--out and --delta-out need a folder each, and neither inside the other."
    others = wish.given - _DELTA_ALONE
    if wish.out is None and others:
        return f"Without --out the whole difference is kept as it is; leave out {_flags(others)}, or give them later."
    return None


def _flags(names: Iterable[str]) -> str:
    flags = sorted(_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in names)
    return " and ".join([", ".join(flags[:-1]), flags[-1]] if flags[1:] else flags)


def refuse_places(wish: Wish) -> None:
    """InvalidInput: a source is no folder of this machine, or a result is there already or would lie in a source."""
    places = wish.sources | ({"verify": wish.verify} if wish.verify else {})
    for role, folder in places.items():
        if not folder.is_dir():
            raise _no_folder(f"--{role}", folder)
    for flag, result in (("--out", wish.out), ("--delta-out", wish.delta_out)):
        if result is not None:
            _refuse_result(flag, result, wish.sources)


def _refuse_result(flag: str, result: Path, sources: dict[str, Path]) -> None:
    if os.path.lexists(result):
        raise InvalidInput(f"{flag}: {result} exists already.", hint="Name a folder that does not exist yet.")
    role = next((role for role, folder in sources.items() if _lies_in(result, folder)), None)
    if role is not None:
        raise InvalidInput(f"{flag}: {result} lies inside --{role}, which is read.", hint="Write elsewhere.")


def _lies_in(place: Path, folder: Path) -> bool:
    """Or is it; neither need exist, and links are followed."""
    return Path(os.path.realpath(place)).is_relative_to(os.path.realpath(folder))


def _no_folder(flag: str, folder: Path) -> InvalidInput:
    if folder.exists():
        return InvalidInput(f"{flag}: {folder} is a file.", hint="Give the folder that holds the model.")
    if not _HUB_NAME.fullmatch(str(folder)):
        return InvalidInput(f"{flag}: there is no folder {folder}.")
    return InvalidInput(
        f"{flag}: there is no folder {folder} here, and models are read from folders only.",
        hint=f"If it is one of the Hub's, fetch it first: hf download {folder} --local-dir {folder.name}; "
        f"then give {flag} {folder.name}.",
    )


# --- what is done -----------------------------------------------------------------------------------------------------


def _run(wish: Wish) -> None:
    if wish.verify is not None:
        _verify(wish, wish.verify)
    elif wish.plan:
        _plan(wish)
    else:
        _make(wish)


def _make(wish: Wish) -> None:
    """The model, the delta, or both: then neither stands where the other one fails, for the delta is written first and
    gets its name last."""
    with ExitStack() as delta:
        if wish.out and wish.delta_out:
            with _planned(wish):  # a refusal should not come after the hours that the delta takes
                pass
        kept = _keep_delta(wish, wish.delta_out, delta) if wish.delta_out else None
        result = _graft(wish, wish.out) if wish.out else None
    places = " and ".join(str(place) for place in (wish.out, wish.delta_out) if place)
    with _printing(f"What was asked for is made and whole: {places}."):
        _tell_made(wish, result, kept)


def _tell_made(wish: Wish, result: GraftResult | None, kept: DeltaResult | None) -> None:
    if wish.as_json:
        both = (asdict(result) if result else {}) | ({"delta": asdict(kept)} if kept else {})
        _print_json(both if result else both["delta"])
    if result:
        _tell(wish, wish.out, words.of_graft(result))
    if kept:
        _tell(wish, wish.delta_out, words.of_delta(kept))


def _graft(wish: Wish, out: Path) -> GraftResult:
    with progress_bar("grafting") as tell:
        from worker.weights import LOW_FIDELITY, graft, remedy

        delta = _delta(wish.sources)
        result = graft(
            instruct=wish.sources["instruct"],
            delta=delta,
            out=out,
            scale=wish.scale,
            selection=_selection(wish),
            output_dtype=wish.output_dtype,
            provenance=_provenance(wish),
            threads=wish.threads,
            measure=wish.report,
            hashes=wish.report,
            hash_sources=wish.hash_sources,
            on_progress=tell,
        )
    if result.fidelity is not None and result.grafted == 0:
        _say("There was no change to add: the result is the instruct model as it was.")
    elif result.fidelity is not None and result.fidelity < LOW_FIDELITY:
        _say(f"Only {result.fidelity:.4f} of the change survives. {remedy(delta.kind, wish.output_dtype)}")
    return result


def _keep_delta(wish: Wish, out: Path, stack: ExitStack) -> DeltaResult:
    """It stands at `out` when the stack is left."""
    with progress_bar("keeping the delta") as tell:
        from worker.weights.save import saving_delta

        sources = {role: wish.sources[role] for role in ("base", "tuned")}
        saving = saving_delta(**sources, out=out, provenance=_provenance(wish), on_progress=tell)
        return stack.enter_context(saving)


def _plan(wish: Wish) -> None:
    with _planned(wish) as plan:
        found = _counted(plan)
    with _printing():
        if wish.as_json:
            _print_json(found)
        _tell(wish, "The graft fits; nothing was written.", words.of_plan(found))


def _planned(wish: Wish) -> AbstractContextManager[Plan]:
    from worker.weights.graft import Options, planned, refuse_scale

    refuse_scale(wish.scale)
    options = Options(scale=wish.scale, selection=_selection(wish), output_dtype=wish.output_dtype)
    return planned(wish.sources["instruct"], _delta(wish.sources), options)


def _verify(wish: Wish, folder: Path) -> None:
    with progress_bar("checking files", then="making tensors again") as tell:
        from worker.weights import verify

        found = verify(folder, sources=wish.sources, everything=wish.everything, on_progress=tell)
    with _printing():
        if wish.as_json:
            _print_json(asdict(found))
        _tell(wish, f"{folder} is {'not ' if found.problems else ''}as it was made.", words.of_verification(found))
    if found.unmade:
        _say(found.unmade)
    for problem in found.problems:
        _say(problem)
    if found.problems:
        raise typer.Exit(1)


def _counted(plan: Plan) -> dict[str, Any]:
    tensors, bound = len(plan.checkpoint.tensors), plan.bound
    return {
        "grafted": len(bound.grafted),
        "copied": tensors - len(bound.grafted),
        "discarded": len(bound.discarded),
        "common_rows": dict(bound.common_rows),
        "files": len(plan.shards),
        "bytes": sum(shard.bytes for shard in plan.shards),
        "remarks": list(bound.remarks),
    }


def _delta(sources: dict[str, Path]) -> Delta:
    from worker.weights import FullDelta, LoraDelta, SavedDelta

    if "delta" in sources:
        return SavedDelta(sources["delta"])
    if "adapter" in sources:
        return LoraDelta(sources["adapter"], sources.get("base"))
    return FullDelta(sources["base"], sources["tuned"])


def _selection(wish: Wish) -> Selection:
    from worker.weights import Selection

    return Selection(wish.scope, wish.include, wish.exclude)


def _provenance(wish: Wish) -> Provenance:
    """With the folders' places, where `--verify` looks for them; a folder in the Hub's cache tells its repository."""
    from worker.weights import Origin, Provenance

    snapshots = {role: _SNAPSHOT.search(folder.resolve().as_posix()) for role, folder in wish.sources.items()}
    names = {role: Origin(found[1].replace("--", "/"), found[2]) for role, found in snapshots.items() if found}
    return Provenance(names=names, keep_paths=True)


# --- how it is told ---------------------------------------------------------------------------------------------------


def _tell(wish: Wish, title: object, rows: words.Rows) -> None:
    if wish.as_json:
        return
    typer.echo(title)
    for label, value in rows:
        typer.echo(f"  {label:<10}{value}")


@contextmanager
def _printing(hint: str = "") -> Iterator[None]:
    """Unavailable: stdout is full, or nobody reads it any more."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more when it ends
        raise Unavailable(f"Standard output cannot be written ({error.strerror})", hint=hint) from error


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def _say(sentence: str) -> None:
    typer.echo(f"shadowft: {sentence}", err=True)


@contextmanager
def _told_in_words(wish: Wish) -> Iterator[None]:
    """Errors that `main` does not tell by itself; all others are sentences already."""
    try:
        yield
    except PairRefused as error:
        _say("these models cannot be grafted:")
        for reason in error.reasons:
            typer.echo(f"- {reason}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise InvalidInput(f"{place}{error.strerror}.") from error
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "numba"):
            raise
        raise InvalidInput(f"Grafting needs {error.name}.", hint="Install it: pip install 'shadowft[worker]'") from None
    except KeyboardInterrupt:
        _say(f"stopped. {_what_is_left(wish)}")
        raise typer.Exit(INTERRUPTED) from None


def _what_is_left(wish: Wish) -> str:
    places = [place for place in (wish.out, wish.delta_out) if place]
    if wish.delta_out and wish.out and wish.out.exists():
        return f"{wish.out} is whole; for the delta, give --base, --tuned and --delta-out alone."
    if any((place.parent / f".{place.name}.graft").exists() for place in places):
        return "The same command again goes on behind the files that are finished."
    return "Nothing was written."
