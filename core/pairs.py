"""Model pairs: the catalogue, the registered ones, and how a request's `model` names one.

A pair is a base and an instruct checkpoint of one lineage. The catalogue (pairs.toml) knows Hub repositories; an admin
registers further ones, local folders under the model roots among them.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from core.checkpoints import read_checkpoint
from core.errors import Conflict, InvalidInput, NotFound
from core.graft_plan import Selection, plan_graft
from core.ids import new_id
from core.job_spec import ModelSource, PairSource
from core.models import Pair

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
#: The Hub's own rule for `owner/name`.
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class KnownPair:
    """A pair with its place in the list. `created_at` is None for the catalogue's."""

    id: str
    source: PairSource
    created_at: datetime | None


@cache
def catalogue() -> tuple[KnownPair, ...]:
    families = tomllib.loads(Path(__file__).with_name("pairs.toml").read_text())["family"]
    return tuple(
        _catalogued(f"{family['name']}-{size}".lower(), family["base"].format(size), family["instruct"].format(size))
        for family in families
        for size in family["sizes"]
    )


def _catalogued(name: str, base: str, instruct: str) -> KnownPair:
    source = PairSource(
        name=name,
        base=ModelSource(kind="hub", location=base),
        instruct=ModelSource(kind="hub", location=instruct),
    )
    return KnownPair(id=f"pair-{name}", source=source, created_at=None)


def known_pairs(session: Session) -> list[KnownPair]:
    """The registered pairs, newest first, then the catalogue."""
    rows = session.scalars(select(Pair).order_by(Pair.id.desc()))
    return [*(_registered(row) for row in rows), *catalogue()]


def _registered(row: Pair) -> KnownPair:
    source = PairSource(
        name=row.name, base=ModelSource.model_validate(row.base), instruct=ModelSource.model_validate(row.instruct)
    )
    return KnownPair(id=row.id, source=source, created_at=row.created_at)


def find_pair(session: Session, model: str) -> PairSource:
    """The pair that a request's `model` means: a pair's name, an instruct id, or a base id of one pair only.

    Raises NotFound with the nearest known names, InvalidInput where a base belongs to several pairs.
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
    raise _unknown(model, known)


def _ambiguous(model: str, matches: Sequence[PairSource]) -> InvalidInput:
    names = ", ".join(pair.name for pair in matches)
    return InvalidInput(f"The model {model!r} belongs to several pairs: {names}. Name one of them.", param="model")


def _unknown(model: str, known: Sequence[PairSource]) -> NotFound:
    names = [name for pair in known for name in (pair.name, pair.instruct.location)]
    near = get_close_matches(model, names, n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
    return NotFound(
        f"There is no model pair for {model[:200]!r}.{meant} GET /v1/pairs lists the pairs; POST /v1/pairs adds one.",
        code="model_not_found",
        param="model",
    )


def register(
    session: Session, *, name: str, base: ModelSource, instruct: ModelSource, roots: Sequence[Path]
) -> KnownPair:
    """Keep a new pair. Local folders are resolved, must lie under `roots`, and must fit each other by their headers.

    Raises InvalidInput, Conflict for a name that is taken, PairRefused with every reason.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"The pair name {name!r} is not usable: take 1 to 64 letters, digits, '.', '_' or '-'.",
            param="name",
        )
    if name in {pair.source.name for pair in known_pairs(session)}:
        raise _taken(name)
    base, instruct = _checked(base, roots, "base"), _checked(instruct, roots, "instruct")
    if base.location == instruct.location:
        raise InvalidInput("Base and instruct are the same model; a pair needs both.", param="instruct")
    if base.kind == instruct.kind == "local":
        plan_graft(
            read_checkpoint(Path(instruct.location)),
            read_checkpoint(Path(base.location)),
            selection=Selection(scope="linear"),
        )
    row = Pair(id=new_id("pair-"), name=name, base=base.model_dump(), instruct=instruct.model_dump())
    session.add(row)
    try:
        session.flush()
    except IntegrityError as error:  # somebody registered the same name at the same moment
        raise _taken(name) from error
    return _registered(row)


def _taken(name: str) -> Conflict:
    return Conflict(f"There is already a pair named {name!r}.", code="pair_exists", param="name")


def model_source(location: str, revision: str | None) -> ModelSource:
    """A folder if `location` says so by its form (`/…`, `./…`), else a Hub repository. The disk is not asked: a folder
    that happens to be named like a repository must not stand in for it."""
    is_folder = location.startswith(("/", "./", "../"))
    return ModelSource(kind="local" if is_folder else "hub", location=location, revision=revision)


def _checked(source: ModelSource, roots: Sequence[Path], param: str) -> ModelSource:
    return _checked_folder(source, roots, param) if source.kind == "local" else _checked_repository(source, param)


def _checked_folder(source: ModelSource, roots: Sequence[Path], param: str) -> ModelSource:
    if source.revision is not None:
        raise InvalidInput("A local folder has no revision; leave it out.", param=f"{param}_revision")
    folder = Path(source.location).resolve()
    if not any(folder.is_relative_to(root) for root in roots):
        raise InvalidInput(
            f"The folder {source.location!r} lies outside the model roots of this server. Its operator lists them in "
            "SHADOWFT_MODEL_ROOTS.",
            param=param,
        )
    if not folder.is_dir():
        raise InvalidInput(f"There is no folder {source.location!r} on the server.", param=param)
    return ModelSource(kind="local", location=str(folder))


def _checked_repository(source: ModelSource, param: str) -> ModelSource:
    name = source.location
    if not _REPOSITORY.fullmatch(name) or len(name) > 96 or "--" in name or ".." in name or name.endswith(".git"):
        raise InvalidInput(
            f"{name[:200]!r} is neither a Hub repository (owner/name) nor an absolute folder of the server.",
            param=param,
        )
    return source
