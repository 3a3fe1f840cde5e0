"""Digests that name things for ever: blake2b over canonical JSON, in hex."""

import hashlib
import json
from typing import Any


def digest(value: Any, *, hex_characters: int) -> str:
    """Blake2b of `value` as canonical JSON (sorted keys, no spaces), `hex_characters` long.

    Floats are written by repr, the shortest text that reads back equal: the same number gives the same digest anywhere.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=hex_characters // 2).hexdigest()
