"""Model pairs: the registered ones beside the catalogue's, and how a request's `model` names one.

A pair is a base and an instruct checkpoint of one lineage. The catalogue (core.catalogue) knows Hub repositories; an
admin registers further ones, local folders under the model roots among them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.catalogue import CataloguePair, catalogue_pairs
from core.checkpoints import is_small_file, read_checkpoint
from core.errors import Conflict, InvalidInput, NotFound, clean
from core.graft_plan import Selection, plan_graft
from core.ids import new_id
from core.job_spec import ModelSource, PairSource
from core.models import Pair

_ID_PREFIX = "pair-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: What stands behind `/v1/pairs/` and is no pair.
_ROUTES = frozenset({"check"})
#: The Hub's own rule for `owner/name`.
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
#: A branch, a tag, a commit or `refs/pr/1`. The Hub's client makes a file name of it.
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
#: The one folder inside a model's that transformers looks into.
_TEMPLATES_FOLDER = "additional_chat_templates"


@dataclass(frozen=True)
class KnownPair:
    """A pair with its place in the list."""

    id: str
    source: PairSource
    #: None for the catalogue's.
    created_at: datetime | None
    #: What the catalogue says; None for a registered pair.
    about: CataloguePair | None


@cache
def catalogue() -> tuple[KnownPair, ...]:
    return tuple(_catalogued(pair) for pair in catalogue_pairs())


def _catalogued(pair: CataloguePair) -> KnownPair:
    source = PairSource(
        name=pair.name,
        base=ModelSource(kind="hub", location=pair.base),
        instruct=ModelSource(kind="hub", location=pair.instruct),
    )
    return KnownPair(id=f"{_ID_PREFIX}{pair.name}", source=source, created_at=None, about=pair)


def known_pairs(session: Session) -> list[KnownPair]:
    """The registered pairs, newest first, then the catalogue."""
    rows = session.scalars(select(Pair).order_by(Pair.id.desc()))
    return [*(_registered(row) for row in rows), *catalogue()]


def _registered(row: Pair) -> KnownPair:
    source = PairSource(
        name=row.name, base=ModelSource.model_validate(row.base), instruct=ModelSource.model_validate(row.instruct)
    )
    return KnownPair(id=row.id, source=source, created_at=row.created_at, about=None)


# --- naming one -------------------------------------------------------------------------------------------------------


def find_pair(session: Session, model: str) -> PairSource:
    """The pair that a request's `model` means: a pair's name, or an instruct or base id of one pair only.

    Raises NotFound with the nearest known names, InvalidInput where an id belongs to several pairs.
    """
    known = [pair.source for pair in known_pairs(session)]
    for matches in (
        [pair for pair in known if pair.name == model],
        [pair for pair in known if pair.instruct.location == model],
        [pair for pair in known if pair.base.location == model],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise _ambiguous(model, matches)
    names = [name for pair in known for name in (pair.name, pair.instruct.location)]
    raise NotFound(
        f"There is no model pair for {model[:200]!r}.{_nearest(model, names)} GET /v1/pairs lists the pairs; POST "
        "/v1/pairs adds one.",
        code="model_not_found",
        param="model",
    )


def get_pair(session: Session, key: str) -> KnownPair:
    """The pair of this id or name. Raises NotFound with the nearest ones."""
    known = known_pairs(session)
    for pair in known:
        if key in {pair.id, pair.source.name}:
            return pair
    names = [name for pair in known for name in (pair.source.name, pair.id, pair.source.instruct.location)]
    raise NotFound(
        f"There is no model pair {key[:200]!r}.{_nearest(key, names)} GET /v1/pairs lists the pairs.",
        code="pair_not_found",
    )


def _ambiguous(model: str, matches: Sequence[PairSource]) -> InvalidInput:
    names = ", ".join(pair.name for pair in matches)
    return InvalidInput(f"The model {model!r} belongs to several pairs: {names}. Name one of them.", param="model")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


# --- adding and removing ----------------------------------------------------------------------------------------------


def checked_pair(*, name: str, base: ModelSource, instruct: ModelSource, roots: Sequence[Path]) -> PairSource:
    """A pair as it may be registered: local folders are resolved, lie under `roots`, and fit each other by their
    headers. Reading these takes a while, so this is done before any transaction.

    Raises InvalidInput, PairRefused with every reason, Unavailable where the disk fails.
    """
    _check_name(name)
    base, instruct = checked_source(base, roots, param="base"), checked_source(instruct, roots, param="instruct")
    if base.location == instruct.location:
        raise InvalidInput("Base and instruct are the same model; a pair needs both.", param="instruct")
    if base.kind == instruct.kind == "local":
        plan_graft(
            read_checkpoint(Path(instruct.location)),
            read_checkpoint(Path(base.location)),
            selection=Selection(scope="linear"),
        )
    return PairSource(name=name, base=base, instruct=instruct)


def register(session: Session, pair: PairSource) -> KnownPair:
    """Keep a pair that `checked_pair` gave. Raises Conflict for a name that is taken."""
    folded = pair.name.lower()
    if folded in {known.source.name.lower() for known in known_pairs(session)}:
        raise _taken(pair.name)
    row = Pair(
        id=new_id(_ID_PREFIX),
        name=pair.name,
        folded_name=folded,
        base=pair.base.model_dump(),
        instruct=pair.instruct.model_dump(),
    )
    session.add(row)
    try:
        session.flush()
    except IntegrityError as error:  # somebody registered the same name at the same moment
        raise _taken(pair.name) from error
    return _registered(row)


def remove(session: Session, key: str) -> KnownPair:
    """Forget a registered pair, by id or name. Jobs that were created with it keep what they were given.

    Raises NotFound, Conflict for a pair of the catalogue.
    """
    pair = get_pair(session, key)
    if pair.about is not None:
        raise Conflict(
            f"{pair.source.name!r} belongs to the catalogue, which comes with the service and is not changed.",
            code="pair_of_the_catalogue",
            hint="Only registered pairs can be deleted.",
        )
    session.execute(delete(Pair).where(Pair.id == pair.id))
    return pair


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"The pair name {name!r} is not usable: take 1 to 64 letters, digits, '.', '_' or '-'.",
            param="name",
        )
    if name.casefold() in _ROUTES or name.casefold().startswith(_ID_PREFIX):
        raise InvalidInput(
            f"The pair name {name!r} would be taken for something else: ids begin with '{_ID_PREFIX}', and 'check' is "
            "a route. Choose another.",
            param="name",
        )


def _taken(name: str) -> Conflict:
    return Conflict(
        f"There is already a pair named {name!r} (capital letters make no difference).",
        code="pair_exists",
        param="name",
    )


# --- where a model may come from --------------------------------------------------------------------------------------


def model_source(location: str, revision: str | None) -> ModelSource:
    """A folder if `location` says so by its form (`/…`, `./…`), else a Hub repository. The disk is not asked: a folder
    that happens to be named like a repository must not stand in for it."""
    is_folder = location.startswith(("/", "./", "../"))
    return ModelSource(kind="local" if is_folder else "hub", location=location, revision=revision)


def checked_source(source: ModelSource, roots: Sequence[Path], *, param: str = "model") -> ModelSource:
    """The source in the form in which it may be read: a repository's name of the right form, or a resolved folder.

    A folder must lie under one of `roots` (which are resolved themselves), and so must every file in it that anybody
    opens: safetensors and text, plain files or links to such. Since links can be exchanged at any time, this is asked
    when a pair is registered, and again whenever a folder is about to be read. Raises InvalidInput.
    """
    if source.kind == "hub":
        _check_repository(source, param)
        return source
    if source.revision is not None:
        raise InvalidInput("A local folder has no revision; leave it out.", param=f"{param}_revision")
    folder = _checked_folder(source.location, roots, param)
    for file in _files_to_open(folder):
        _check_file(file, roots, param)
    return ModelSource(kind="local", location=str(folder))


def _check_repository(source: ModelSource, param: str) -> None:
    name, revision = source.location, source.revision
    if not _REPOSITORY.fullmatch(name) or len(name) > 96 or "--" in name or ".." in name or name.endswith(".git"):
        raise InvalidInput(
            f"{name[:200]!r} is neither a Hub repository (owner/name) nor an absolute folder of the server.",
            param=param,
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or len(revision) > 100):
        raise InvalidInput(
            f"{revision[:200]!r} is not a revision of a Hub repository: name a branch, a tag or a commit.",
            param=f"{param}_revision",
        )


def _checked_folder(location: str, roots: Sequence[Path], param: str) -> Path:
    if not roots:
        raise InvalidInput(
            f"This server takes no local folders, and {location!r} is one. Its operator lists in SHADOWFT_MODEL_ROOTS "
            "the folders from which models may be taken.",
            param=param,
        )
    folder = Path(os.path.realpath(location))
    if not _is_inside(folder, roots):
        raise InvalidInput(
            f"The folder {location!r} lies outside the model roots of this server. Its operator lists them in "
            "SHADOWFT_MODEL_ROOTS.",
            param=param,
        )
    if not os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise InvalidInput(f"There is no folder {location!r} on the server.", param=param)
    _check_text(folder, param)
    return folder


def _check_text(path: Path, param: str) -> None:
    """The name is kept, shown and published, which one whose bytes are no UTF-8 cannot be."""
    if clean(str(path)) != str(path):
        raise InvalidInput(f"The name {str(path)!r} is not UTF-8.", param=param, hint="Rename it.")


def _files_to_open(folder: Path) -> Iterator[Path]:
    """What our code and transformers read of a model's folder."""
    for name in _names(folder):
        if name.endswith(".safetensors") or is_small_file(name):
            yield folder / name
    templates = folder / _TEMPLATES_FOLDER
    if templates.is_dir():
        yield from (templates / name for name in _names(templates))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _check_file(file: Path, roots: Sequence[Path], param: str) -> None:
    _check_text(file, param)
    try:
        target = Path(os.path.realpath(file, strict=True))
        mode = target.lstat().st_mode
    except OSError as error:
        raise _unreadable(file, error) from error
    if stat.S_ISDIR(mode):  # nobody opens one; `licenses` may well be a folder
        return
    where = f"{file.parent.name}/{file.name}"
    if not _is_inside(target, roots):
        raise InvalidInput(
            f"{where} is a link to a place outside the model roots of this server.",
            param=param,
            hint="Put a copy of the file there, or have the operator list that place in SHADOWFT_MODEL_ROOTS.",
        )
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise InvalidInput(f"{where} is not a plain file.", param=param, hint="Put a copy of the file there.")


def _is_inside(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _unreadable(path: Path, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"{path.parent.name}/{path.name} cannot be read ({error.strerror or error}).",
        code="unreadable_checkpoint",
        hint="Make it readable for this user, or copy the folder again, whole.",
    )
