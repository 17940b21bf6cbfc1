"""Ways to damage a JSON value, bytes, a safetensors header and a line; each by one seed."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

#: What stands where something else is meant.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3.5, 10**12, 10**30, 10**400, -0.0, 1e308, "", "x", "nan"),
    *("\0", "../x", "/etc/hostname", ".", "٣", "9" * 5000, "x" * 5000, float("nan"), float("inf")),
    *([], {}, [None], [[]], {"x": None}, [1, 2, 3], ["a"] * 300),
)

#: Texts that are no JSON, or hardly.
TEXTS = (
    *("", "{", "[", "null", "3", '"x"', "[]", "{}", "NaN", "[" * 2000 + "]" * 2000, "\ufeff{}"),
    *('{"a":' * 2000 + "1" + "}" * 2000, "9" * 5000, "\0", "{} {}", '{"a": Infinity}'),
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value."""
    found = [path] if path else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            found += nodes(inner, (*path, key))
    return found


def json_damaged(value: Any, draw: random.Random) -> Any:
    """One to three parts replaced, removed or renamed."""
    value = deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        paths = nodes(value)
        if not paths:
            return value
        *way, last = draw.choice(paths)
        holder = value
        for key in way:
            holder = holder[key]
        match draw.randrange(4):
            case 0:
                del holder[last]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(("x", "", f"{last}x", "moe_top_k"))] = holder.pop(last)
            case _:
                holder[last] = deepcopy(draw.choice(ODD))
    return value


def text_damaged(text: str, draw: random.Random) -> bytes:
    """JSON or TOML whose value, letters or bytes are wrong."""
    match draw.randrange(4):
        case 0:
            return draw.choice(TEXTS).encode()
        case 1:
            return bytes_damaged(text.encode(), draw)
        case _:
            try:
                return json.dumps(json_damaged(json.loads(text), draw)).encode()
            except ValueError:  # it is no JSON, or has a number that no text may have
                return bytes_damaged(text.encode(), draw)


def bytes_damaged(data: bytes, draw: random.Random) -> bytes:
    """Bits flipped, a part cut out, zeroed, doubled, or noise put in."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(changed) + 1)
        end = min(len(changed), start + draw.choice((1, 7, 64, 1000)))
        match draw.randrange(6):
            case 0 if changed:
                changed[start % len(changed)] ^= 1 << draw.randrange(8)
            case 1:
                del changed[start:]
            case 2:
                del changed[start:end]
            case 3:
                changed[start:end] = bytes(end - start)
            case 4:
                changed[start:start] = changed[start:end]
            case _:
                changed[start:end] = draw.randbytes(end - start)
    return bytes(changed)


def safetensors_damaged(data: bytes, draw: random.Random) -> bytes:
    """Bytes, the header's length, or the header's JSON are wrong."""
    length = int.from_bytes(data[:8], "little")
    match draw.randrange(3):
        case 0:
            return bytes_damaged(data, draw)
        case 1:
            other = draw.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
            return other.to_bytes(8, "little") + data[8:]
        case _:
            header = text_damaged(data[8 : 8 + length].decode(), draw)
            return len(header).to_bytes(8, "little") + header + data[8 + length :]


def line_damaged(line: str, draw: random.Random) -> str:
    """A case line with keys, values or letters changed."""
    parts = line.split(",")
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(parts))
        key, _, value = parts[at].partition("=")
        odd = _text(draw.choice(("1e12", "f0." * 3000, "0x10", "1_0", "3/" * 50, *ODD)))
        match draw.randrange(5):
            case 0:
                parts[at] = odd
            case 1:
                parts[at] = f"{odd}={value}"
            case 2:
                parts.append(parts[at])
            case _:
                parts[at] = f"{key}={odd}"
    return ",".join(parts)


def _text(value: object) -> str:
    return str(value)[:6000]
