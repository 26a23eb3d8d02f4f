"""A model as a judge: which of two answers is better, asked in both orders at any OpenAI-compatible endpoint.

    items ── prompt with the answers as A and B, and as B and A ──> A, B or a tie ──> 100, 50 or 0 for each model

A model that prefers whatever comes first agrees with itself in neither order, so a row counts as won only if both
orders say so; everything else is a tie, and how often the orders agree is reported. Answers are kept by content: asking
the same again costs nothing. The key comes from the environment (BYEORI_JUDGE_KEY, or OPENAI_API_KEY).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support import atomic_files
from byeori.support.text_files import one_line, read_text, redacted

PROMPT = """You compare two answers to the same request.

Request:
{prompt}

Reference answer:
{reference}

Answer A:
{first}

Answer B:
{second}

Which answer is better: more correct, complete and to the point? Reply with one letter: A, B, or T for a tie."""

KEYS = ("BYEORI_JUDGE_KEY", "OPENAI_API_KEY")

_FIELD = re.compile(r"\{(prompt|reference|first|second)\}")
# capitals, and no "isn't": in a sentence `a` is an article
_VERDICT = re.compile(r"(?<![A-Za-z])(?<![A-Za-z]['’])(A|B|T|(?i:tie))(?![A-Za-z])")
_LETTER = re.compile(r"\W*[abt]\W*")
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_WAITS = (1.0, 2.0, 4.0)
_AT_ONCE = 8
_TIMEOUT = 120
_MOST = 16 << 20  # bytes of a completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """url: up to /v1. prompt: with {prompt}, {reference}, {first} and {second}. cache: folder of its answers.

    price: dollars per million tokens of prompts and of completions.
    """

    url: str
    model: str
    prompt: str
    cache: Path
    price: tuple[float, float] | None = None

    def ask(self, text: str) -> dict[str, Any]:
        """Return {"text", "prompt_tokens", "completion_tokens", "cost", "cached"} of one question.

        cost: in dollars, None unless the endpoint names it, as OpenRouter does.

        Raises:
            ConfigError: if the endpoint cannot be reached, refuses, or answers something else than a completion.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        key = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        path = self.cache / f"{key}.json"
        with suppress(OSError, ValueError, TypeError, KeyError):  # damaged: it is asked again
            kept = json.loads(path.read_text(encoding="utf-8"))
            counts = {name: int(kept[name]) for name in ("prompt_tokens", "completion_tokens")}
            return {"text": str(kept["text"]), **counts, "cost": None, "cached": True}
        answer = _posted(f"{self.url.rstrip('/')}/chat/completions", body)
        try:
            usage = answer.get("usage") or {}
            found = {
                "text": str(answer["choices"][0]["message"]["content"]),
                "prompt_tokens": int(usage.get("prompt_tokens") or 0),
                "completion_tokens": int(usage.get("completion_tokens") or 0),
                "cost": None if usage.get("cost") is None else float(usage["cost"]),
            }
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError):
            shown = one_line(json.dumps(answer, ensure_ascii=False), 120)
            raise ConfigError(
                f"--judge {redacted(self.url)} answered no completion ({shown}); check the address"
            ) from None
        self.cache.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, json.dumps(found, ensure_ascii=False))
        return found | {"cached": False}


def read_prompt(path: str | None) -> str:
    """Return the prompt in a file; None for the built-in one.

    Raises:
        ConfigError: if it cannot be read, or does not name both answers.
    """
    if path is None:
        return PROMPT
    try:
        text = read_text(Path(path), ConfigError)
    except OSError as error:
        raise ConfigError(f"--judge_prompt {path} cannot be read: {error.strerror}") from None
    if not {"first", "second"} <= set(_FIELD.findall(text)):
        raise ConfigError(f"--judge_prompt {path} needs {{first}} and {{second}}, where the answers are written")
    return text


def judge_items(
    items: Sequence[dict[str, Any]], judge: Judge, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Put the measure `judge` into both sides of every item, and return what was asked, as JSON data.

    A tie is 50 for both; a row whose verdict cannot be read in one of the orders is a tie as well, and is counted.
    """
    questions = [
        _filled(judge.prompt, item, *order) for item in items for order in (("base", "tuned"), ("tuned", "base"))
    ]
    done, lock = 0, threading.Lock()

    def ask(text: str) -> dict[str, Any]:
        nonlocal done
        found = judge.ask(text)
        with lock:
            done += 1
            on_progress(done, len(questions))
        return found

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = list(pool.map(ask, questions))
    counts = {"wins": 0, "ties": 0, "losses": 0, "unreadable": 0, "agreed": 0}
    for row, item in enumerate(items):
        first, second = (verdict_in(answer["text"]) for answer in answers[2 * row : 2 * row + 2])
        swapped = {"A": "B", "B": "A"}.get(second or "", second)  # as if base had been A again
        counts["unreadable"] += first is None or second is None
        counts["agreed"] += first is not None and first == swapped
        won = {("B", "B"): 100.0, ("A", "A"): 0.0}.get((first or "", swapped or ""), 50.0)
        counts[{100.0: "wins", 50.0: "ties", 0.0: "losses"}[won]] += 1
        item["tuned"]["judge"], item["base"]["judge"] = won, 100.0 - won
    paid = [answer for answer in answers if not answer["cached"]]
    tokens = {name: sum(answer[name] for answer in paid) for name in ("prompt_tokens", "completion_tokens")}
    found = {"model": judge.model, **counts, "requests": len(paid), "cached": len(answers) - len(paid), **tokens}
    if judge.price:
        found["cost"] = sum(count * price for count, price in zip(tokens.values(), judge.price, strict=True)) / 1e6
    elif paid and all(answer["cost"] is not None for answer in paid):
        found["cost"] = sum(answer["cost"] for answer in paid)
    return found


def verdict_in(text: str) -> str | None:
    """Return A, B or T, the last that stands alone in a judge's answer; None if there is none.

    verdict_in("B, because it is a shorter one") == "B"; small letters count if they are the whole answer.
    """
    found = _VERDICT.findall(text.upper() if _LETTER.fullmatch(text) else text)
    return found[-1][0].upper() if found else None


def sentence(judged: Mapping[str, Any], rows: int) -> str:
    """Return what the judge said, and what it cost."""
    tokens = judged["prompt_tokens"] + judged["completion_tokens"]
    money = f", ${judged['cost']:.4g}" if "cost" in judged else ""
    return (
        f"{judged['model']} preferred the tuned model in {judged['wins']:,} of the {rows:,} rows, the base in "
        f"{judged['losses']:,}, and neither in {judged['ties']:,}; its two orders agreed in "
        f"{100 * judged['agreed'] / rows:.0f}% ({judged['requests']:,} requests, {tokens:,} tokens{money})."
    )


def _filled(prompt: str, item: Mapping[str, Any], first: str, second: str) -> str:
    values = {name: item[name] for name in ("prompt", "reference")}
    values |= {"first": item[f"{first}_output"], "second": item[f"{second}_output"]}
    return _FIELD.sub(lambda match: str(values[match[1]]), prompt)


def _posted(url: str, body: Mapping[str, Any]) -> Any:
    """Return the JSON that the endpoint answers; what is temporary is tried again.

    Raises:
        ConfigError: if it does not answer, or refuses.
    """
    shown = redacted(url)
    key = next((value for name in KEYS if (value := os.environ.get(name, "").strip())), None)
    if key and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"the judge's key in {' or '.join(KEYS)} holds characters that no key has; copy it again")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for wait in (*_WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                return json.loads(response.read(_MOST))
        except urllib.error.HTTPError as error:
            reason, asked = f"{error.code} {error.reason}", error.headers.get("Retry-After", "")
            said = one_line(error.read(2000).decode("utf-8", "replace"), 160)
            if wait is None or error.code not in _TEMPORARY:
                advice = f"; set {KEYS[0]} to your key" if error.code in (401, 403) else ""
                raise ConfigError(f"--judge {shown} answered {reason}: {said}{advice}") from None
            wait = max(wait, float(asked)) if asked.isdecimal() and float(asked) <= _TIMEOUT else wait
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:  # no connection, HTTP, JSON
            if wait is None:
                raise ConfigError(
                    f"--judge {shown} does not answer ({one_line(str(error), 160)}); check the address"
                ) from None
        time.sleep(wait)
    raise AssertionError("unreachable")
