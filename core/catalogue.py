"""The catalogue: pairs that exist on the Hub, and what is known about each. `pairs.toml` says how it is written."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: `verified`: somebody looked it up, and `seen` says where. `memory`: nobody did.
Source = Literal["verified", "memory"]
CautionKind = Literal[
    "biases",
    "context",
    "dtype",
    "eos",
    "experts",
    "failure",
    "names",
    "rope",
    "sigma",
    "special_tokens",
    "stray_files",
    "template",
    "tied",
    "vocabulary",
]

_EVERY = ["*"]


@dataclass(frozen=True)
class Claim:
    text: str
    #: Where it was looked up; None: from memory.
    seen: str | None

    @property
    def source(self) -> Source:
        return "memory" if self.seen is None else "verified"


@dataclass(frozen=True)
class Caution(Claim):
    kind: CautionKind


@dataclass(frozen=True)
class CataloguePair:
    name: str
    family: str
    #: Hub repositories; `ids` claims that both exist and belong together.
    base: str
    instruct: str
    ids: Claim
    licence: Claim
    #: What to do to be let in; None: not known to be gated.
    gated: Claim | None
    cautions: tuple[Caution, ...]

    @property
    def claims(self) -> tuple[Claim, ...]:
        """Everything that is said about the pair, besides its ids."""
        return (self.licence, *([self.gated] if self.gated else []), *self.cautions)


class Counts(NamedTuple):
    verified: int
    memory: int


def read_catalogue(text: str) -> tuple[CataloguePair, ...]:
    """Raises pydantic's ValidationError where the text is not in the form that `pairs.toml` describes."""
    catalogue = _Catalogue.model_validate(tomllib.loads(text))
    return tuple(pair for family in catalogue.family for pair in family.expanded())


@cache
def catalogue_pairs() -> tuple[CataloguePair, ...]:
    return read_catalogue(Path(__file__).with_name("pairs.toml").read_text())


def catalogue_counts() -> dict[str, Counts]:
    """How many pairs and how many claims about them were verified, and how many are from memory."""
    pairs = catalogue_pairs()
    return {
        "pairs": _count(pair.ids for pair in pairs),
        "claims": _count(claim for pair in pairs for claim in pair.claims),
    }


def _count(claims: Iterable[Claim]) -> Counts:
    sources = [claim.source for claim in claims]
    return Counts(sources.count("verified"), sources.count("memory"))


# --- the file ---------------------------------------------------------------------------------------------------------


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _ClaimEntry(_Entry):
    text: str = Field(min_length=1)
    only: list[str] = _EVERY
    seen: str | None = Field(None, min_length=1)
    seen_for: list[str] = _EVERY

    @model_validator(mode="after")
    def _names_a_place(self) -> _ClaimEntry:
        if self.seen is None and self.seen_for != _EVERY:
            raise ValueError("seen_for needs a seen")
        return self

    def holds_for(self, name: str) -> bool:
        return _fits(name, self.only)

    def seen_of(self, name: str) -> str | None:
        return self.seen if _fits(name, self.seen_for) else None

    def about(self, name: str) -> Claim:
        return Claim(self.text, self.seen_of(name))


class _CautionEntry(_ClaimEntry):
    kind: CautionKind

    def about(self, name: str) -> Caution:
        return Caution(self.text, self.seen_of(name), self.kind)


class _PairsEntry(_Entry):
    name: str
    base: str
    instruct: str
    sizes: list[str]
    seen: str | None = Field(None, min_length=1)


class _Family(_Entry):
    name: str
    pairs: list[_PairsEntry]
    licence: list[_ClaimEntry]
    gated: list[_ClaimEntry] = []
    caution: list[_CautionEntry] = []

    def expanded(self) -> Iterator[CataloguePair]:
        for entry in self.pairs:
            for size in entry.sizes:
                yield self._pair(entry, size)

    def _pair(self, entry: _PairsEntry, size: str) -> CataloguePair:
        name = entry.name.format(size.lower())
        licence = _first(self.licence, name)
        if licence is None:
            raise ValueError(f"no licence of the family {self.name} holds for {name}")
        base, instruct = entry.base.format(size), entry.instruct.format(size)
        return CataloguePair(
            name=name,
            family=self.name,
            base=base,
            instruct=instruct,
            ids=Claim(f"{base} is the base of {instruct}", entry.seen),
            licence=licence,
            gated=_first(self.gated, name),
            cautions=tuple(caution.about(name) for caution in self.caution if caution.holds_for(name)),
        )


class _Catalogue(_Entry):
    family: list[_Family]


def _first(entries: Sequence[_ClaimEntry], name: str) -> Claim | None:
    return next((entry.about(name) for entry in entries if entry.holds_for(name)), None)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
