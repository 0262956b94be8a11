"""LiveCodeBench's hidden tests as they are released: JSON, or base64 of a zlib stream of a pickled JSON text.

Of pickle only what writes a text or bytes down is understood; there is no way from here to a class or a function.
"""

import base64
import binascii
import json
import struct
import zlib
from typing import Any

_MOST_BYTES = 1 << 29
# Opcodes of the pickle protocols 2 to 5: those of a text or bytes and of their memory, with the struct of the length.
_STRINGS = {b"X": ("<I", str), b"\x8c": ("<B", str), b"\x8d": ("<Q", str), b"B": ("<I", bytes), b"C": ("<B", bytes),
            b"\x8e": ("<Q", bytes)}  # fmt: skip
_SKIPPED = {b"\x80": 1, b"\x95": 8, b"\x94": 0, b"q": 1, b"r": 4}


def hidden_tests(packed: str) -> Any:
    """The tests that a text holds.

    Args:
        packed: of the field private_test_cases.

    Raises:
        ValueError: it is in neither form, unpacks to over 512 MiB, or holds anything but a text.

    Source: LiveCodeBench, lcb_runner/benchmarks/code_generation.py.
    """
    if packed.lstrip()[:1] in ("[", "{"):
        return _json(packed)
    try:
        raw = base64.b64decode(packed, validate=True)
        stream = zlib.decompressobj()
        pickled = stream.decompress(raw, _MOST_BYTES)
    except (binascii.Error, zlib.error, ValueError) as problem:
        raise ValueError(f"neither JSON nor base64 of a zlib stream ({problem})") from None
    if stream.unconsumed_tail:
        raise ValueError(f"unpacks to over {_MOST_BYTES} bytes")
    found = pickled_text(pickled)
    return _json(found if isinstance(found, str) else found.decode("utf-8", "strict"))


def pickled_text(data: bytes) -> str | bytes:
    """The one text, or bytes, that a pickle holds.

    Raises:
        ValueError: it holds anything else, or more than one value.
    """
    place, found = 0, None
    while place < len(data):
        code, place = data[place : place + 1], place + 1
        if code == b"." and found is not None:
            return found
        if code in _SKIPPED:
            place += _SKIPPED[code]
        elif code in _STRINGS and found is None:
            form, kind = _STRINGS[code]
            end = place + struct.calcsize(form)
            if end > len(data):
                break
            (length,) = struct.unpack(form, data[place:end])
            place = end + length
            if place > len(data):
                break
            found = data[end:place] if kind is bytes else data[end:place].decode("utf-8", "surrogatepass")
        else:
            raise ValueError(f"a pickle with the opcode {code!r}, wanted one of a text alone")
    raise ValueError("a pickle that is cut off")


def _json(found: str) -> Any:
    try:
        return json.loads(found)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"no JSON ({problem})") from None
