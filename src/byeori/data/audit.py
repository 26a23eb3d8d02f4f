"""What is wrong with these rows, before a GPU is paid for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from byeori.data import tokenized
from byeori.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def audit(train: Dataset, held_out: Dataset | None, name: Callable[[int], str], *, per_row: int = 1) -> dict[str, Any]:
    """Counts over two tokenized tables (data/tokenized.py), as plain JSON.

    name: how the user finds a row, from its position ("news.jsonl line 12"). per_row: lines of a row.
    """
    tables = [table for table in (train, held_out) if table is not None]
    problems = [
        {"row": name(line["row"]), "reason": line["problem"], "too_long": line["too_long"]}
        for table in tables
        for line in _problems(_rows(table, per_row))
    ]
    good = [tokenized.usable(table) for table in tables]
    tokens = [tokenized.lengths(table) for table in good]
    counts = np.concatenate(tokens)
    rows = [_rows(table, per_row) for table in good]
    shortened = np.concatenate([tokenized.column(table, "shortened").to_numpy() for table in rows])
    unasked = [number for table in rows for number in _without_prompt(table)]
    digests = [tokenized.column(table, "digest") for table in rows]
    return {
        "rows": sum(len(table) // per_row for table in tables),
        "train_rows": len(rows[0]),
        "validation_rows": len(rows[1]) if len(rows) > 1 else 0,
        "tokens": int(counts.sum(dtype=np.int64)),
        "target_tokens": sum(map(tokenized.target_tokens, good)),
        "longest": _longest(rows, [count.reshape(-1, per_row).max(axis=1) for count in tokens], name),
        "mean_tokens": round(float(counts.mean()), 1) if len(counts) else 0.0,
        "shortened_rows": int(np.count_nonzero(shortened)),
        "tokens_cut": int(shortened.sum()),
        "dropped_rows": len(problems),
        # rows without a text or an answer before those that are too long: they stop a run
        "dropped": sorted(problems, key=lambda problem: problem["too_long"]),
        "too_long_rows": sum(problem["too_long"] for problem in problems),
        "empty_prompts": len(unasked),
        "first_empty_prompt": name(min(unasked)) if unasked else None,
        "empty_answers": sum(problem["reason"].startswith("the answer, ") for problem in problems),
        "duplicate_rows": sum(len(digest) - len(digest.unique()) for digest in digests),
        "rows_in_both_parts": _in_both(*digests),
        "straddling_tokens": sum(int(tokenized.column(table, "straddles").to_numpy().sum()) for table in good),
    }


def _rows(table: Dataset, per_row: int) -> Dataset:
    """The first line of each row."""
    return table if per_row == 1 else table.select(np.arange(0, len(table), per_row))


def _problems(table: Dataset) -> list[dict[str, Any]]:
    bad = np.flatnonzero(pc.not_equal(tokenized.column(table, "problem"), ""))
    return list(table.select(bad).select_columns(["row", "problem", "too_long"]))


def _without_prompt(table: Dataset) -> list[int]:
    """Positions of the rows whose prompt is empty."""
    found: list[int] = tokenized.column(table, "row").filter(tokenized.column(table, "no_prompt")).to_pylist()
    return found


def _in_both(train: pa.ChunkedArray, held_out: pa.ChunkedArray | None = None) -> int:
    """Held-out rows that stand in the training part too, by their digests."""
    if held_out is None:
        return 0
    return int(np.count_nonzero(pc.is_in(held_out, value_set=train.unique())))


def _longest(tables: list[Dataset], tokens: list[np.ndarray], name: Callable[[int], str]) -> list[dict[str, Any]]:
    every = []
    for table, counts in zip(tables, tokens, strict=True):
        rows = tokenized.column(table, "row").to_numpy()
        every += [(int(counts[i]), int(rows[i])) for i in np.lexsort((rows, counts))[-3:]]
    return [{"row": name(row), "tokens": count} for count, row in sorted(every, reverse=True)[:3]]


def refuse_bad_rows(found: dict[str, Any], policy: str) -> None:
    """Stop where rows have no text or no answer and nobody asked to drop them; or where no row is left.

    Raises:
        DataError: names the first bad rows and what to do.
    """
    bad = [problem for problem in found["dropped"] if not problem["too_long"]]
    if bad and policy == "stop":
        raise DataError(f"{named(bad)}; mend the data, or drop such rows with --on_bad_rows drop")
    if not found["train_rows"]:
        reason = found["dropped"][0] if found["dropped"] else {"row": "the table", "reason": "holds no rows"}
        raise DataError(f"no row is left to train: {reason['row']}: {reason['reason']}")


def named(problems: list[dict[str, Any]]) -> str:
    """The first bad rows with what is wrong with them, and how many more there are."""
    first = "; ".join(f"{problem['row']}: {problem['reason']}" for problem in problems[:3])
    return f"{first} (and {len(problems) - 3:,} more)" if len(problems) > 3 else first


def sentences(found: dict[str, Any], *, cutoff_len: int, policy: str) -> list[str]:
    """The audit in words, one finding a line; findings that are zero are left out.

    policy: what becomes of rows without a text or an answer, stop or drop.
    """
    lines = [_size(found)]
    if count := found["shortened_rows"]:
        lines.append(
            f"{_number(count, 'prompt')} shortened to cutoff_len {cutoff_len} "
            f"({_number(found['tokens_cut'], 'token')} cut; answers are never cut)"
        )
    lines += left_out(found, policy)
    if count := found["empty_prompts"]:
        lines.append(
            f"{_number(count, 'row')} {'has' if count == 1 else 'have'} nothing in the columns of the prompt; "
            f"first {found['first_empty_prompt']}"
        )
    if count := found["duplicate_rows"]:
        lines.append(f"{_number(count, 'row')} {'repeats' if count == 1 else 'repeat'} another row")
    if count := found["rows_in_both_parts"]:
        lines.append(
            f"{_number(count, 'held-out row')} {'stands' if count == 1 else 'stand'} in the training part too, "
            "once tokenized"
        )
    if count := found["straddling_tokens"]:
        reach, they = ("reaches", "it is") if count == 1 else ("reach", "they are")
        lines.append(
            f"{_number(count, 'token')} {reach} over the boundary between prompt and answer; {they} trained, but a "
            "prompt alone is tokenized differently there: end the prompt with a line break"
        )
    if found.get("shared_prefix"):
        met = found["shared_prefix_rows"]
        where = f" of the first {met:,} rows" if met < found["train_rows"] else ""
        lines.append(f"{found['shared_prefix']:.0%} of the tokens{where} are prefixes that rows share")
    return lines


def left_out(found: dict[str, Any], policy: str) -> list[str]:
    """The rows that are not trained, in words: those without a text or an answer, then those that are too long."""
    lines = []
    stops = "cannot be trained, and training stops there unless --on_bad_rows drop is given"
    empty = f" ({found['empty_answers']:,} with an empty answer)" if found["empty_answers"] else ""
    for too_long, words in ((False, f"{empty} {stops if policy == 'stop' else 'dropped'}"), (True, " dropped")):
        if bad := [problem for problem in found["dropped"] if problem["too_long"] == too_long]:
            lines.append(f"{_number(len(bad), 'row')}{words}: {named(bad)}")
    return lines


def _size(found: dict[str, Any]) -> str:
    if not found["longest"]:
        return "no row to train"
    held_out = f", {found['validation_rows']:,} held out" if found["validation_rows"] else ""
    share = found["target_tokens"] / max(1, found["tokens"])
    return (
        f"{_number(found['train_rows'], 'row')} to train{held_out}; {_number(found['tokens'], 'token')}, "
        f"{found['target_tokens']:,} of them trained ({share:.0%}); longest {found['longest'][0]['tokens']:,}"
    )


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
