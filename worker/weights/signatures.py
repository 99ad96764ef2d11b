"""What loops there are, by the types of what they take: for `loops`, which makes them, and those who call them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

#: Rows and columns of a product that are made at once: what the registers hold.
ROWS, TILE = 8, 32


class Signature(NamedTuple):
    """A loop's C function. A letter is a type, as in Python's `struct`: H uint16, I uint32, q int64, f and d floats."""

    #: For each array that it takes the place of: the types that its elements may have.
    arrays: tuple[str, ...]
    #: The arguments behind the places.
    rest: str
    result: str = ""


LOOPS = {
    "difference": Signature(("Hf", "Hf", "f"), "qd"),
    "scaled": Signature(("Hf", "f"), "qd"),
    "add": Signature(("Hf", "f", "Hf"), "q", "I"),
    "store": Signature(("Hf", "Hf"), "q", "I"),
    "product": Signature(("f", "f", "f", "f", "f"), "qqqqdd"),
    "figures": Signature(("Hf", "f", "Hf", "Hf", "d"), "q"),
    "figures_alone": Signature(("Hf", "f", "Hf", "d"), "q"),
    "squares": Signature(("Hf",), "q", "d"),
    "distance": Signature(("Hf", "Hf", "d"), "q"),
    "add_squares": Signature(("f", "d"), "qqq"),
}


def variants(name: str, signature: Signature) -> Iterator[tuple[str, str]]:
    """A loop's functions, one for each choice of types: the symbol, such as `add_HfH`, and its arrays' letters."""
    for letters in map("".join, itertools.product(*signature.arrays)):
        yield f"{name}_{letters}", letters
