"""What went wrong between this machine and the Hugging Face Hub, in one sentence, and what to try again.

The status that the Hub answered decides; if there is none, what happened on the way: a proxy's page instead of an
answer, a body that was cut short, a certificate that is not trusted, no connection, offline mode.
"""

from __future__ import annotations

import json
import logging
import re
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from byeori.support.console import Say, say

T = TypeVar("T")

_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_WAITS = (1, 2, 4)  # seconds, where the Hub does not ask for others
_LONGEST_WAIT = 120
_CLIENT = "huggingface_hub.utils._http"  # waits by itself in some calls, and logs it


def chain(error: BaseException) -> list[BaseException]:
    """Return an error and those behind it, first the one that was raised last."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def explanation(error: BaseException, name: str, *, write: bool = False, unreachable: str | None = None) -> str | None:
    """Return one sentence for an error of the Hub's client, or None if it is about something else.

    name: the repository. write: whether it was to be written. unreachable: the sentence if the Hub cannot be reached.
    """
    links = chain(error)
    response = _response(links)
    if response is not None:
        return _of_status(response, name, write, links)
    kinds = {kind.__name__ for link in links for kind in type(link).__mro__}
    text = " ".join(str(link) for link in links)
    if "OfflineModeIsEnabled" in kinds:
        return unreachable or f"HF_HUB_OFFLINE is set; unset it to {'publish' if write else f'download {name}'}"
    if is_untrusted(error):
        return (
            f"the Hub's certificate is not trusted ({_reason(links)}): a proxy may stand in between; set SSL_CERT_FILE "
            "to its certificate, and check this machine's clock"
        )
    if "FileMetadataError" in kinds or any(isinstance(link, json.JSONDecodeError) for link in links):
        return (
            f"something else answered in place of the Hub, with a page that is not of it (for {name}): a log-in page "
            "of this network, a proxy, or a wrong HF_ENDPOINT; open the address in a browser, and try again"
        )
    if any(sign in text for sign in ("Consistency check", "peer closed", "IncompleteRead", "incomplete chunked")):
        return f"the connection to the Hub broke off in the middle of {name}; try again, what was finished is kept"
    words = ("Connect", "Timeout", "Network", "Protocol", "ReadError", "WriteError", "ProxyError")
    if any(word in kind for kind in kinds for word in words):
        reason = (
            f"cannot reach the Hugging Face Hub ({_reason(links)}); check the network and HF_ENDPOINT, and try again"
        )
        return unreachable or reason
    return None


def is_untrusted(error: BaseException) -> bool:
    """Return whether a connection failed because of its certificate: somebody answered."""
    links = chain(error)
    return any(isinstance(link, ssl.SSLError) or "CERTIFICATE_VERIFY_FAILED" in str(link) for link in links)


def _of_status(response: Any, name: str, write: bool, links: list[BaseException]) -> str:
    status = response.status_code
    message = next((text for link in links if (text := getattr(link, "server_message", None))), None)
    if "html" in response.headers.get("content-type", ""):
        message = None  # of a proxy's error page
    detail = f" ({one(message)})" if message else ""
    if status == 401 and not write:
        return (
            f"the Hub asks for a log-in for {name}{detail}: it is private or gated, or the token is wrong; check the "
            "name, and log in with `hf auth login`"
        )
    if status == 401:
        return f"the Hub does not accept the token{detail}; log in again with `hf auth login`, or set HF_TOKEN"
    if status == 403 and write:
        return f"the token may not write to {name}{detail}; use one with write access to it"
    if status == 403:
        return f"the Hub refuses access to {name}{detail}; ask for access on its page, or use a token that has it"
    if status == 404:
        return f"the Hub has no {name} that this token may see{detail}; check the name and the token"
    if status == 407:
        return f"the proxy of this network asks for a log-in{detail}; set HTTPS_PROXY with user and password"
    if status in (413, 507):
        return f"the Hub has no room for {name} (HTTP {status}){detail}; check the storage of the account"
    if status == 429:
        wait = retry_after(response)
        when = f"in {_duration(wait)}" if wait else "later"
        return f"the Hub answers too many requests of this address or token (HTTP 429){detail}; try again {when}"
    if status == 451:
        return f"the Hub may not give out {name} here (HTTP 451){detail}; use another model"
    if status >= 500:
        return f"the Hub failed (HTTP {status}){detail}; try again later, https://status.huggingface.co says more"
    return f"the Hub rejected {name} (HTTP {status}){detail}; fix the cause and try again"


def _response(links: list[BaseException]) -> Any:
    """What the Hub answered, if it answered anything."""
    for link in links:
        response = getattr(link, "response", None)
        if isinstance(getattr(response, "status_code", None), int):
            return response
    return None


def retry_after(response: Any) -> int | None:
    """Return the seconds after which the Hub wants to be asked again, from its headers, or None."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal():
        return int(value)
    if value:
        try:
            return max(1, int((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()) + 1)
        except (ValueError, TypeError):
            return None
    limit = re.search(r"r=0;\s*t=(\d+)", response.headers.get("ratelimit", ""))
    return int(limit[1]) if limit else None


def retried(action: Callable[[], T], name: str, *, show: Say = say, sleep: Callable[[float], None] = time.sleep) -> T:
    """Return the action's result, trying again what is temporary, with a line that says so.

    Raises:
        Exception: whatever the action raised last; at once if it is not temporary, or the Hub asks to wait for long.
    """
    for wait in (*_WAITS, None):
        try:
            return action()
        except Exception as error:
            cause = _temporary(error)
            if wait is None or cause is None:
                raise
            reason, asked = cause
            wait = max(wait, asked or 0)
            if wait > _LONGEST_WAIT:
                raise
            show(f"{reason} for {name}; trying again in {wait} s")
        sleep(wait)
    raise AssertionError("unreachable")


def _temporary(error: Exception) -> tuple[str, int | None] | None:
    """What may pass by itself, and after how many seconds the Hub says that it does."""
    links = chain(error)
    response = _response(links)
    if response is not None:
        if response.status_code not in _TEMPORARY:
            return None
        return f"The Hub answered HTTP {response.status_code}", retry_after(response)
    kinds = {kind.__name__ for link in links for kind in type(link).__mro__}
    if "OfflineModeIsEnabled" in kinds or is_untrusted(error):
        return None
    text = " ".join(str(link) for link in links)
    broken = ("Consistency check", "peer closed", "IncompleteRead", "incomplete chunked", "Connection reset")
    if kinds & {"RemoteProtocolError", "ReadError", "WriteError", "ReadTimeout"} or any(s in text for s in broken):
        return "The connection to the Hub broke off", None
    return None


@contextmanager
def announced(name: str, show: Say = say) -> Iterator[None]:
    """Show a line where the Hub's client waits by itself before it tries again."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.match(r"(Retrying in|Rate limited)\D*([\d.]+)s", record.getMessage()):
                show(f"The Hub asks to wait for {name}; trying again in {float(found[2]):.0f} s")

    logger, handler = logging.getLogger(_CLIENT), Handler()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def one(text: object) -> str:
    """Return the first line of a message, at most 300 characters, without the token that a careless server repeats."""
    from huggingface_hub import get_token

    message = re.sub(r"hf_\w{8,}", "***", str(text))
    if token := get_token():
        message = message.replace(token, "***")
    lines = message.strip().splitlines()
    return lines[0][:300] if lines else type(text).__name__


def _reason(links: list[BaseException]) -> str:
    return one(next((link for link in reversed(links) if str(link).strip()), links[-1]))


def _duration(seconds: int) -> str:
    return f"{seconds} s" if seconds < 120 else f"{-(-seconds // 60)} minutes"
