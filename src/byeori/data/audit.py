"""What is wrong with the rows, known before any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from byeori.data import tokenized
from byeori.errors import DataError
from byeori.support.text_files import one_line

if TYPE_CHECKING:
    from datasets import Dataset


def audit(train: Dataset, held_out: Dataset | None, name: Callable[[int], str]) -> dict[str, Any]:
    """Count over two tokenized tables (data/tokenized.py) what sentences() reports; the result is plain JSON.

    name: a row's name for the user ("news.jsonl line 12"), from its position.
    """
    tables = [table for table in (train, held_out) if table is not None]
    problems = [
        {"row": name(line["row"]), "reason": line["problem"], "too_long": line["too_long"]}
        for table in tables
        for line in _problems(_rows(table))
    ]
    good = [tokenized.usable(table) for table in tables]
    tokens = [tokenized.lengths(table) for table in good]
    counts = np.concatenate(tokens)
    rows = [_rows(table) for table in good]
    longest = [_longest_lines(table, count) for table, count in zip(good, tokens, strict=True)]
    shortened = np.concatenate([tokenized.column(table, "shortened").to_numpy() for table in rows])
    unasked = [number for table in rows for number in _marked(table, "no_prompt")]
    digests = [tokenized.column(table, "digest") for table in rows]
    special = [found for table in good for found in _special(table)]
    return {
        "rows": sum(len(tokenized.row_starts(table)) - 1 for table in tables),
        "train_rows": len(rows[0]),
        "validation_rows": len(rows[1]) if len(rows) > 1 else 0,
        "tokens": int(counts.sum(dtype=np.int64)),
        "target_tokens": sum(map(tokenized.target_tokens, good)),
        "longest": _longest(rows, longest, name),
        "mean_tokens": round(float(counts.mean()), 1) if len(counts) else 0.0,
        "shortened_rows": int(np.count_nonzero(shortened)),
        "tokens_cut": int(shortened.sum()),
        "dropped_rows": len(problems),
        # rows without a text or an answer come before those that are too long: they stop a run
        "dropped": sorted(problems, key=lambda problem: problem["too_long"]),
        "too_long_rows": sum(problem["too_long"] for problem in problems),
        "empty_prompts": len(unasked),
        "first_empty_prompt": name(min(unasked)) if unasked else None,
        "empty_answers": sum(problem["reason"].startswith("the answer, ") for problem in problems),
        "duplicate_rows": sum(len(digest) - len(digest.unique()) for digest in digests),
        "rows_in_both_parts": _in_both(*digests),
        "turns_left_out": sum(int(tokenized.column(table, "turns_left_out").to_numpy().sum()) for table in good),
        "joined_rows": sum(len(_marked(table, "joins")) for table in good),
        "special_rows": len(special),
        "special": [{"row": name(row), "token": token} for row, token in special[:3]],
        "composed_rows": sum(len(_marked(table, "composed")) for table in good),
    }


def _rows(table: Dataset) -> Dataset:
    """Return the first line of each row."""
    starts = tokenized.row_starts(table)
    return table if len(starts) == len(table) + 1 else table.select(starts[:-1])


def _longest_lines(table: Dataset, tokens: np.ndarray) -> np.ndarray:
    """Return the tokens of each row's longest example [rows]."""
    starts = tokenized.row_starts(table)[:-1]
    return np.maximum.reduceat(tokens, starts) if len(starts) else tokens


def _problems(table: Dataset) -> list[dict[str, Any]]:
    bad = np.flatnonzero(pc.not_equal(tokenized.column(table, "problem"), ""))
    return list(table.select(bad).select_columns(["row", "problem", "too_long"]))


def _marked(table: Dataset, name: str) -> list[int]:
    """Return the positions of the rows with an example of which a flag is true."""
    rows: list[int] = tokenized.column(table, "row").filter(tokenized.column(table, name)).unique().to_pylist()
    return rows


def _special(table: Dataset) -> list[tuple[int, str]]:
    """Return the rows whose text holds a control token: position and the first of them."""
    tokens = tokenized.column(table, "special")
    held = pc.not_equal(tokens, "")
    found = zip(tokenized.column(table, "row").filter(held).to_pylist(), tokens.filter(held).to_pylist(), strict=True)
    return sorted(dict(reversed(list(found))).items())


def _in_both(train: pa.ChunkedArray, held_out: pa.ChunkedArray | None = None) -> int:
    """Count the held-out rows that are also in the training part, by their digests."""
    if held_out is None:
        return 0
    return int(np.count_nonzero(pc.is_in(held_out, value_set=train.unique())))


def _longest(tables: list[Dataset], tokens: list[np.ndarray], name: Callable[[int], str]) -> list[dict[str, Any]]:
    every = []
    for table, counts in zip(tables, tokens, strict=True):
        rows = tokenized.column(table, "row").to_numpy()
        every += [(int(counts[i]), int(rows[i])) for i in np.lexsort((rows, counts))[-3:]]
    return [{"row": name(row), "tokens": count} for count, row in sorted(every, reverse=True)[:3]]


def refuse_bad_rows(counts: dict[str, Any], policy: str) -> None:
    """Raise if rows lack a text or an answer and `policy` is stop, or if no row is left.

    Raises:
        DataError: with the first bad rows and what to do.
    """
    bad = [problem for problem in counts["dropped"] if not problem["too_long"]]
    if bad and policy == "stop":
        raise DataError(f"{named(bad)}; fix the data, or drop such rows with --on_bad_rows drop")
    if not counts["train_rows"]:
        reason = counts["dropped"][0] if counts["dropped"] else {"row": "the table", "reason": "has no rows"}
        raise DataError(f"no row is left to train: {reason['row']}: {reason['reason']}")


def named(problems: list[dict[str, Any]]) -> str:
    """Return the first bad rows with what is wrong with them, and how many more there are."""
    first = "; ".join(f"{problem['row']}: {problem['reason']}" for problem in problems[:3])
    return f"{first} (and {len(problems) - 3:,} more)" if len(problems) > 3 else first


def sentences(counts: dict[str, Any], *, cutoff_len: int, policy: str) -> list[str]:
    """Return the audit as sentences, without counts that are zero.

    policy: what is done with rows without a text or an answer, stop or drop.
    """
    lines = [_size(counts)]
    if count := counts["shortened_rows"]:
        lines.append(
            f"{_number(count, 'prompt')} shortened to cutoff_len {cutoff_len} "
            f"({_number(counts['tokens_cut'], 'token')} cut; answers are never cut)"
        )
    if count := counts["turns_left_out"]:
        which = f"longer than cutoff_len {cutoff_len} left out"
        lines.append(f"{_number(count, 'turn')} {which}; the other turns of their rows are trained")
    lines += left_out(counts, policy)
    if count := counts["empty_prompts"]:
        verb = "has" if count == 1 else "have"
        lines.append(f"{_number(count, 'row')} {verb} an empty prompt; first {counts['first_empty_prompt']}")
    if count := counts["duplicate_rows"]:
        lines.append(f"{_number(count, 'row')} {'is a copy' if count == 1 else 'are copies'} of another row")
    if count := counts["rows_in_both_parts"]:
        verb = "has" if count == 1 else "have"
        lines.append(f"{_number(count, 'held-out row')} {verb} the same tokens as a training row")
    lines += _text_sentences(counts)
    if unread := counts.get("unread_columns"):
        names = ", ".join(f"{name} ({reason})" if reason else name for name, reason in unread.items())
        lines.append(one_line(f"columns that nothing reads: {names}", 1000))
    if counts.get("shared_prefix"):
        sampled = counts["shared_prefix_rows"]
        where = f" of the first {sampled:,} rows" if sampled < counts["train_rows"] else ""
        lines.append(f"{counts['shared_prefix']:.0%} of the tokens{where} are in prefixes that rows share")
    return lines


def _text_sentences(counts: dict[str, Any]) -> list[str]:
    """Return sentences about text that has other tokens than it might."""
    lines = []
    if count := counts["joined_rows"]:
        lines.append(
            f"{_number(count, 'prompt')} would end with other tokens if prompt and answer were tokenized as one text; "
            "the prompt is tokenized alone, as it is served"
        )
    if count := counts["special_rows"]:
        verb = "holds" if count == 1 else "hold"
        where = ", ".join(f"{found['token']} in {found['row']}" for found in counts["special"])
        becomes = (
            "it becomes the token, because special_tokens_in_text is keep"
            if counts["special_tokens_in_text"] == "keep"
            else "it stays text, though most servers make the token of it, as --special_tokens_in_text keep does"
        )
        lines.append(f"{_number(count, 'row')} {verb} the text of a control token ({where}): {becomes}")
    if count := counts["composed_rows"]:
        verb = "holds" if count == 1 else "hold"
        lines.append(f"{_number(count, 'row')} {verb} Hangul in letters (NFD), which was composed to syllables (NFC)")
    return lines


def left_out(counts: dict[str, Any], policy: str) -> list[str]:
    """Return sentences about the rows that are not trained: without a text or an answer, then too long."""
    lines = []
    stops = "cannot be trained, and training will stop unless --on_bad_rows drop is given"
    empty = f" ({counts['empty_answers']:,} with an empty answer)" if counts["empty_answers"] else ""
    for too_long, verb in ((False, f"{empty} {stops if policy == 'stop' else 'dropped'}"), (True, " dropped")):
        if bad := [problem for problem in counts["dropped"] if problem["too_long"] == too_long]:
            lines.append(f"{_number(len(bad), 'row')}{verb}: {named(bad)}")
    return lines


def _size(counts: dict[str, Any]) -> str:
    if not counts["longest"]:
        return "no row to train"
    held_out = f", {counts['validation_rows']:,} held out" if counts["validation_rows"] else ""
    share = counts["target_tokens"] / max(1, counts["tokens"])
    return (
        f"{_number(counts['train_rows'], 'row')} to train{held_out}; {_number(counts['tokens'], 'token')}, "
        f"{counts['target_tokens']:,} of them trained ({share:.0%}); longest {counts['longest'][0]['tokens']:,}"
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
