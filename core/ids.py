"""Ids that sort by the time they were made, so that a page's cursor stays stable under inserts."""

from __future__ import annotations

import secrets
import threading
import time

#: Crockford's base 32 in lower case: no letters that are taken for digits.
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """`prefix`, then 48 bits of milliseconds and 80 random bits as 26 characters; later than any that this process has
    made."""
    global _last
    with _lock:
        number = _last = max(time.time_ns() // 1_000_000 << 80 | secrets.randbits(80), _last + 1)
    return prefix + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
