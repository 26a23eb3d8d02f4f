"""Preview of what the model will see: rows with the trained tokens marked, on the terminal or as an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import takewhile
from typing import Any, TypeVar

from byeori.batch import forest
from byeori.data.tokenize import Example
from byeori.support.text_files import redacted, visible

Piece = tuple[str, bool]
T = TypeVar("T")

LISTED = 20  # dropped rows that are listed; further ones are counted


def shared_prefix(examples: Sequence[Example]) -> float:
    """Return the share of tokens in a prefix that an earlier example has too."""
    return forest.shared_fraction(examples)


def pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """Return the text of an example as the model reads it, in runs of (text, trained)."""
    trained = {index for start, end in example.targets for index in range(start, end)}
    return _runs(list(example.token_ids), [index in trained for index in range(len(example.token_ids))], tokenizer)


def with_special(ids: Sequence[int], tokenizer: Any) -> list[Piece]:
    """Return the text of a prompt as the model reads it, in runs of (text, special tokens)."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return _runs(list(ids), [token in special for token in ids], tokenizer)


def tokens(example: Example, tokenizer: Any) -> list[Piece]:
    """Return the text of an example as the model reads it, in tokens of (text, trained). The text of a token whose
    bytes end within a character is "", and the one that completes it has the character."""
    trained = {index for start, end in example.targets for index in range(start, end)}
    each = _runs(list(example.token_ids), list(range(len(example.token_ids))), tokenizer)
    return [(text, index in trained) for text, index in each]


def _runs(ids: list[int], flags: list[T], tokenizer: Any) -> list[tuple[str, T]]:
    """Return the text of the tokens, split where the flag changes."""
    ends = [index for index in range(1, len(ids) + 1) if index == len(ids) or flags[index] != flags[index - 1]]

    def text(end: int) -> str:
        return str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    runs: list[tuple[str, T]] = []
    whole, done = text(len(ids)), 0
    for end in ends:  # decodes prefixes: a run decoded alone would lose its leading space and split characters
        same = takewhile(lambda pair: pair[0] == pair[1], zip(whole, text(end), strict=False))
        stop = max(done, sum(1 for _ in same))
        runs.append((whole[done:stop], flags[end - 1]))
        done = stop
    return runs


def show(rows: list[tuple[str, list[Piece]]], notes: list[str], audit: dict[str, Any]) -> None:
    """Print the rows, trained tokens in green (between ▸ ◂ without colours), and the findings of the audit."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    colourless = console.color_system is None or console.no_color
    for name, parts in rows:
        console.rule(Text(visible(name)), align="left")
        text = Text()
        for part, trained in ((visible(part), trained) for part, trained in parts):
            text.append(f"▸{part}◂" if trained and colourless else part, style="bold green" if trained else "dim")
        console.print(text)
    console.rule("findings", align="left")
    for line in [*notes, *_listed(audit)]:
        console.print(visible(redacted(line)), markup=False)


def _listed(audit: dict[str, Any]) -> list[str]:
    """Return a line for each row that the audit names."""
    lines = [f"long: {item['row']}, {item['tokens']:,} tokens" for item in audit["longest"]]
    lines += [f"dropped: {item['row']}: {item['reason']}" for item in audit["dropped"][:LISTED]]
    more = len(audit["dropped"]) - LISTED
    return [*lines, f"dropped: and {more:,} more, which preview --json lists"] if more > 0 else lines


_STYLE = """
:root { color-scheme: light dark; font-family: system-ui, "Pretendard", "Noto Sans KR", sans-serif; }
body { max-width: 56rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.6; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem; border: 1px solid #8886; border-radius: .5rem; }
mark { background: #7bd88f66; color: inherit; border-radius: .2rem; }
"""


def page(rows: list[tuple[str, list[Piece]]], notes: list[str], audit: dict[str, Any]) -> str:
    """Return the preview as one HTML page; text from the data is escaped."""
    blocks = []
    for name, parts in rows:
        body = "".join(f"<mark>{escape(part)}</mark>" if trained else escape(part) for part, trained in parts)
        blocks.append(f"<h2>{escape(name)}</h2>\n<pre>\n{body}</pre>")
    findings = "\n".join(f"<li>{escape(line)}</li>" for line in [*notes, *_listed(audit)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>byeori preview</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>What the model will see</h1>\n"
        f"<p>Trained tokens are <mark>marked</mark>.</p>\n<ul>{findings}</ul>\n{''.join(blocks)}\n</body></html>\n"
    )
