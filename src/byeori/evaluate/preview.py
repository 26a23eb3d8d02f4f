"""Preview of what the model will see: rows with the trained tokens marked, on the terminal or as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeVar

from byeori.batch import forest
from byeori.data.tokenize import Example
from byeori.evaluate.chart import histogram
from byeori.support import pages
from byeori.support.language import tr, translated
from byeori.support.text_files import redacted, visible

Piece = tuple[str, bool]
Flag = TypeVar("Flag")
T = TypeVar("T")

LISTED = 20  # dropped rows that are listed; further ones are counted


def shared_prefix(examples: Sequence[Example]) -> float:
    """Return the share of tokens in a prefix that an earlier example has too."""
    return forest.shared_fraction(examples)


def pieces(example: Example, tokenizer: Any) -> list[Piece]:
    """Return the text of an example as the model reads it, in runs of (text, trained)."""
    trained = _trained(example)
    return _runs(list(example.token_ids), [index in trained for index in range(len(example.token_ids))], tokenizer)


def _trained(example: Example) -> set[int]:
    return {index for start, end in example.targets for index in range(start, end)}


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
        console.print(visible(redacted(translated(line))), markup=False)


def _listed(audit: dict[str, Any]) -> list[str]:
    """Return a line for each row that the audit names."""
    lines = [f"long: {item['row']}, {item['tokens']:,} tokens" for item in audit["longest"]]
    lines += [f"dropped: {item['row']}: {item['reason']}" for item in audit["dropped"][:LISTED]]
    more = len(audit["dropped"]) - LISTED
    return [*lines, f"dropped: and {more:,} more, which preview --json lists"] if more > 0 else lines


# ---- the page --------------------------------------------------------------------------------------------------

_LINES, _COLUMNS = 3, 130  # of a row that are shown at once, so that three rows fit the first screen


def page(
    shown: Sequence[tuple[str, Example]],
    others: Sequence[Example],
    tokenizer: Any,
    notes: Sequence[str],
    audit: Mapping[str, Any],
    *,
    title: str,
    lengths: Mapping[str, Sequence[float]],
    cutoff_len: int,
) -> str:
    """Return the preview as one HTML page; text from the data is escaped.

    shown: names and examples. others: those that may share a prefix with them. lengths: tokens of all rows, by the
    class of their line: `of-base` all, `of-tuned` the trained ones. cutoff_len: drawn where a row comes near it.
    """
    bad = [(item["row"], translated(item["reason"])) for item in audit["dropped"]]
    longest = max(lengths["of-base"], default=0)
    return pages.render(
        "evaluate/preview.html.j2",
        script="evaluate/preview.js",
        title=title,
        facts=_facts(audit),
        rows=[_row(name, example, others, tokenizer) for name, example in shown],
        lengths=histogram(lengths, limit=cutoff_len if longest > cutoff_len / 4 else None),
        findings=[translated(line) for line in notes],
        bad=bad[:LISTED],
        more_bad=max(0, len(bad) - LISTED),
    )


def _facts(audit: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    held_out = tr("{count:,} held out", count=audit["validation_rows"]) if audit["validation_rows"] else ""
    share = audit["target_tokens"] / max(1, audit["tokens"])
    longest = audit["longest"][0]["tokens"] if audit["longest"] else 0
    return [
        (tr("Rows"), f"{audit['train_rows']:,}", held_out),
        (tr("Tokens"), f"{audit['tokens']:,}", tr("longest row {count:,}", count=longest)),
        (tr("Trained"), f"{share:.0%}", tr("{count:,} tokens", count=audit["target_tokens"])),
        (tr("Shared prefixes"), f"{audit.get('shared_prefix') or 0:.0%}", tr("computed once")),
        (tr("Not trained"), f"{len(audit['dropped']):,}", tr("rows")),
    ]


def _row(name: str, example: Example, others: Sequence[Example], tokenizer: Any) -> dict[str, Any]:
    trained, ids = _trained(example), list(example.token_ids)
    shared = max((_common(ids, other.token_ids) for other in others if other is not example), default=0)
    kinds = ["trained" if at in trained else "shared" if at < shared else "" for at in range(len(ids))]
    runs = _runs(ids, kinds, tokenizer)
    first = next((at for at, (_, kind) in enumerate(runs) if kind == "trained"), len(runs))
    parts = [part for part in (runs[:first], runs[first:]) if part]  # a long prompt must not hide what is trained
    return {
        "name": name,
        "parts": [(part, pages.is_longer([(text, False) for text, _ in part], _LINES, _COLUMNS)) for part in parts],
        "tokens": len(ids),
        "trained": len(trained),
        "shared": sum(kind == "shared" for kind in kinds),
    }


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two examples begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
