"""Damage for the fuzzer: of bytes, of text, of JSON values and of flags. Everything is drawn from one random.Random."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

WORDS = (
    "", " ", "\n", "\0", "\x1b[2J\x1b]0;x\x07", "\x9b31m", "\u202eabc", "\ufeff", "\ud800", "null", "true", "-1",
    "1e999", "NaN", "../../etc/passwd", "/dev/full", "/dev/zero", "~nobody/x", "a" * 5000, " " * 3000, "é" * 300,
    "{}", "{{", "{document}", "[[", "]]", "[[[[", "{{ 1 }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**10 }}", "<script>alert(1)</script>", "<|im_end|>", "</s>", "가" * 50, "\u1100\u1161" * 9, "*", "&a",
    "file:///etc/passwd", "https://me:secret-pw@127.0.0.1:9/x", "s3://x/y", "0", "1" * 400, "-0.0", "inf",
    "'", '"', "\\", "%s%n", "!!x", " " * 60_000, "\u0301" * 3000, "\U0010ffff\ufdfa\u0130", "\r\n", "a\nb", "\u200b",
    "-" * 9000, "[" * 9000, "{" * 9000, "(" * 9000, "0x1F", "1_000", "9" * 5000, "1e-400", "2001-99-99", "!", "**", "?",
    "{{ '%1000000000d' % 1 }}", "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "<!--" * 2000, "`" * 99,
    "9" * 140_000,
)  # fmt: skip
WRONG: tuple[Any, ...] = (
    None, True, 0, -1, 1, 1e308, float("nan"), 10**30, "", "x", "\x1b[31m", [], [None], {}, {"a": [{}]}, "a" * 5000,
)  # fmt: skip
_BOMB = {".gz": gzip.compress(b"a" * 2**26, 9), ".zst": zstandard.compress(b"a" * 2**26, 19)}
NUMBERS = (0, -1, 1, 2, 3, 1e308, -1e-320, 10**30, 2**31, 2**63, 2**64, 0.5, float("nan"), float("inf"), 7, 1000000)


def value(dice: random.Random, depth: int = 0) -> Any:
    """A JSON value that nobody expects."""
    kind = dice.randrange(9)
    if kind == 0:
        return dice.choice([None, True, False])
    if kind <= 2:
        return dice.choice(NUMBERS)
    if kind <= 5:
        return dice.choice(WORDS)
    if kind == 6 and depth < 2:
        return [value(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 7 and depth < 2:
        return {dice.choice(WORDS): value(dice, depth + 1) for _ in range(dice.randrange(4))}
    nested: Any = dice.choice(WORDS)
    for _ in range(dice.choice([3, 30, 300, 3000])):
        nested = [nested] if dice.random() < 0.5 else {"a": nested}
    return nested


def _places(loaded: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value, at most some thousands."""
    found: list[tuple[Any, Any]] = []
    left = [loaded]
    while left and len(found) < 3000:
        container = left.pop()
        pairs = list(container.items()) if isinstance(container, dict) else list(enumerate(container))
        found += [(container, key) for key, _ in pairs[:200]]
        left += [item for _, item in pairs[:200] if isinstance(item, (dict, list))]
    return found


def json_value(dice: random.Random, loaded: Any) -> Any:
    """Change some values of a loaded JSON file in place, and return it."""
    if not isinstance(loaded, (dict, list)) or dice.random() < 0.05:
        return value(dice)
    for _ in range(dice.choice([1, 1, 1, 2, 5])):
        places = _places(loaded)
        if not places:
            return value(dice)
        container, key = dice.choice(places)
        act = dice.randrange(6)
        if act == 0:
            del container[key]
        elif act == 1 and isinstance(container, dict):
            container[dice.choice(WORDS)] = container.pop(key)
        elif act == 2 and isinstance(container[key], (int, float)):
            container[key] = dice.choice([-1, 0, 2, 1000, 10**12]) * (container[key] or 1)
        elif act == 3 and isinstance(container[key], (list, str)):
            container[key] = container[key] * dice.choice([0, 2, 50])
        else:
            container[key] = value(dice)
    return loaded


def dumped(loaded: Any) -> bytes:
    """JSON text of anything, also as deep as Python's own writer refuses."""
    try:
        return json.dumps(loaded, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError):
        return b"[" * 5000 + b"]" * 5000


def raw(dice: random.Random, data: bytes) -> bytes:
    """Damage bytes: cut, flip, repeat, insert."""
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(len(changed) + 1)
        act = dice.randrange(7)
        if act == 0:
            del changed[at:]
        elif act == 1 and changed:
            for _ in range(dice.choice([1, 8])):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        elif act == 2:
            changed[at:at] = changed[at : at + dice.choice([1, 100, 5000])] * dice.choice([1, 20])
        elif act == 3:
            changed[at:at] = dice.choice(WORDS).encode("utf-8", "surrogatepass")
        elif act == 4:
            changed[at:at] = dice.randbytes(dice.choice([1, 3, 200]))
        elif act == 5:
            del changed[at : at + dice.choice([1, 10, 300])]
        else:
            changed[at:at] = dice.choice(
                [b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"\0" * 500, b"\r"]
            )
    return bytes(changed)


def text(dice: random.Random, given: str) -> str:
    """Damage text by words: insert, replace, swap."""
    parts = given.split(" ")
    for _ in range(dice.choice([1, 1, 2, 4])):
        at = dice.randrange(len(parts))
        if dice.random() < 0.5:
            parts[at] = dice.choice(WORDS)
        else:
            parts.insert(at, dice.choice(WORDS))
    return " ".join(parts)


def yaml_text(dice: random.Random, given: str) -> bytes:
    """Damage lines of YAML, or write what is dangerous to load."""
    nine = zip("abcdefgh", "bcdefghi", strict=True)
    laughs = "".join(f"{n}: &{n} [{','.join(f'*{p}' for _ in range(9))}]\n" for p, n in nine)
    bombs = (
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + laughs, "!!python/object/apply:os.system ['touch ran']\n", "? [a]\n: b\n",
        "- a\n- b\n", "a: &a\n  <<: *a\n", "\t- x", "a: b: c", "{" * 2000, "a: !!binary x\n", "a: 2001-99-99\n",
        "a: 1_000:99.5\n", "%YAML 9.9\n---\na: 1", "a: 0o9\n", "x: !!set {a, b}\n", "a: &a [*a]\n",
    )  # fmt: skip
    if dice.random() < 0.2:
        return (given + dice.choice(bombs)).encode() if dice.random() < 0.5 else dice.choice(bombs).encode()
    lines = given.splitlines() or [""]
    at = dice.randrange(len(lines))
    name, colon, _ = lines[at].partition(":")
    other = dumped(value(dice)).decode("utf-8", "surrogatepass") if dice.random() < 0.8 else dice.choice(WORDS)
    lines[at] = f"{name}{colon or ':'} {other}" if dice.random() < 0.9 else text(dice, lines[at])
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def archive(dice: random.Random, data: bytes) -> bytes:
    """Damage one file of a ZIP archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as given:
        members = {name: given.read(name) for name in given.namelist()}
    name = dice.choice(sorted(members))
    members[name] = raw(dice, members[name])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as changed:
        for name, content in members.items():
            changed.writestr(name, content)
    return made.getvalue()


def another_kind(dice: random.Random, path: Path) -> None:
    """Put something in a file's place that is no such file."""
    path.unlink()
    act = dice.randrange(8)
    if act == 0:
        path.mkdir()
    elif act == 1:
        os.mkfifo(path)
    elif act <= 4:
        path.symlink_to(
            dice.choice(["/dev/zero", "/dev/full", "/dev/null", path.name, "nowhere", "/proc/self/mem", "."])
        )
    elif act == 5:
        path.touch()
    elif act == 6:
        with path.open("wb") as file:
            file.truncate(dice.choice([1, 10**6, 10**9]))


def file(dice: random.Random, name: str, data: bytes) -> bytes:
    """Damage a file as its kind suggests."""
    pick: Callable[[], bytes] = lambda: raw(dice, data)  # noqa: E731
    if dice.random() < 0.25:
        return pick()
    if name.endswith((".gz", ".zst")):
        ending, compress = name[name.rindex(".") :], gzip.compress if name.endswith(".gz") else zstandard.compress
        if dice.random() < 0.1:
            return _BOMB[ending] * 30
        rows = gzip.decompress(data) if ending == ".gz" else zstandard.decompress(data)
        return compress(file(dice, name.removesuffix(ending), rows))
    if name.endswith(".xlsx"):
        return archive(dice, data)
    if name.endswith(".jsonl"):
        lines = data.decode().splitlines()
        at = dice.randrange(len(lines))
        lines[at] = dumped(json_value(dice, json.loads(lines[at]))).decode("utf-8", "surrogatepass")
        return "\n".join(lines).encode("utf-8", "surrogatepass")
    if name.endswith(".json"):
        return dumped(json_value(dice, json.loads(data)))
    if name.endswith(".yaml"):
        return yaml_text(dice, data.decode())
    if name.endswith((".txt", ".jinja", ".csv")):
        return text(dice, data.decode()).encode("utf-8", "surrogatepass")
    if name.endswith(".safetensors"):
        length = int.from_bytes(data[:8], "little")
        header = dumped(json_value(dice, json.loads(data[8 : 8 + length])))
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return pick()
