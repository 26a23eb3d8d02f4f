"""What is wrong with these rows, before a GPU is paid for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from byeori.data import cache
from byeori.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

# Rows named one by one in an audit; the others are counted.
NAMED = 20


def audit(train: Dataset, held_out: Dataset | None, name: Callable[[int], str]) -> dict[str, Any]:
    """Counts over two tokenized tables (data/cache.py), as plain JSON.

    name: how the user finds a row, from its position ("news.jsonl line 12").
    """
    tables = [table for table in (train, held_out) if table is not None]
    problems = [
        {"row": name(row), "reason": problem, "too_long": bool(long)}
        for table in tables
        for row, problem, long in zip(table["row"], table["problem"], table["too_long"], strict=True)
        if problem
    ]
    good = [cache.usable(table) for table in tables]
    tokens = [cache.lengths(table) for table in good]
    targets = [_target_counts(table) for table in good]
    return {
        "rows": sum(map(len, tables)),
        "train_rows": len(good[0]),
        "validation_rows": len(good[1]) if len(good) > 1 else 0,
        "tokens": int(sum(part.sum() for part in tokens)),
        "target_tokens": int(sum(part.sum() for part in targets)),
        "longest": _longest(good, tokens, name),
        "mean_tokens": round(float(np.concatenate(tokens).mean()), 1) if sum(map(len, tokens)) else 0.0,
        "shortened_rows": sum(int(np.count_nonzero(table["shortened"])) for table in good),
        "tokens_cut": int(sum(np.sum(table["shortened"], dtype=np.int64) for table in good)),
        "dropped_rows": len(problems),
        "dropped": problems[:NAMED],
        "too_long_rows": sum(problem["too_long"] for problem in problems),
        "empty_answers": sum("is empty" in problem["reason"] for problem in problems),
        "duplicate_rows": sum(len(table) - len(set(table["digest"])) for table in good),
        "rows_in_both_parts": len(set.intersection(*(set(table["digest"]) for table in good)))
        if len(good) > 1
        else 0,
        "straddling_tokens": int(sum(np.sum(table["straddles"], dtype=np.int64) for table in good)),
        "most_common_problem": next(iter(Counter(p["reason"] for p in problems)), None),
    }


def _target_counts(table: Dataset) -> np.ndarray:
    return np.array([sum(edges[1::2]) - sum(edges[::2]) for edges in table["targets"]], dtype=np.int64)


def _longest(
    tables: list[Dataset], tokens: list[np.ndarray], name: Callable[[int], str]
) -> list[dict[str, Any]]:
    every = [
        (int(count), row)
        for table, counts in zip(tables, tokens, strict=True)
        for count, row in zip(counts, table["row"], strict=True)
    ]
    return [{"row": name(row), "tokens": count} for count, row in sorted(every, reverse=True)[:3]]


def refuse_bad_rows(found: dict[str, Any], policy: str) -> None:
    """Stop where rows have no text or no answer and nobody asked to drop them; or where no row is left.

    Raises:
        DataError: names the first bad rows and what to do.
    """
    bad = [problem for problem in found["dropped"] if not problem["too_long"]]
    count = found["dropped_rows"] - found["too_long_rows"]
    if count and policy == "stop":
        named = "; ".join(f"{problem['row']}: {problem['reason']}" for problem in bad[:3])
        more = f" (and {count - 3} more)" if count > 3 else ""
        raise DataError(f"{named}{more}; mend the data, or drop such rows with --on_bad_rows drop")
    if not found["train_rows"]:
        reason = found["dropped"][0] if found["dropped"] else {"row": "the table", "reason": "holds no rows"}
        raise DataError(f"no row is left to train: {reason['row']}: {reason['reason']}")


def sentences(found: dict[str, Any], *, cutoff_len: int) -> list[str]:
    """The audit in words, one finding a line; findings that are zero are left out."""
    share = found["target_tokens"] / max(1, found["tokens"])
    lines = [
        f"{found['train_rows']:,} rows to train"
        + (f", {found['validation_rows']:,} held out" if found["validation_rows"] else "")
        + f"; {found['tokens']:,} tokens, {found['target_tokens']:,} of them trained ({share:.0%}); "
        f"longest {found['longest'][0]['tokens']:,}"
        if found["longest"]
        else "no rows"
    ]
    if found["shortened_rows"]:
        lines.append(
            f"{found['shortened_rows']:,} prompts shortened to cutoff_len {cutoff_len} "
            f"({found['tokens_cut']:,} tokens cut; answers are never cut)"
        )
    if found["dropped_rows"]:
        first = found["dropped"][0]
        lines.append(f"{found['dropped_rows']:,} rows dropped; first {first['row']}: {first['reason']}")
    if found["duplicate_rows"]:
        lines.append(f"{found['duplicate_rows']:,} rows repeat another row")
    if found["rows_in_both_parts"]:
        lines.append(f"{found['rows_in_both_parts']:,} rows stand in both parts once tokenized")
    if found["straddling_tokens"]:
        lines.append(
            f"{found['straddling_tokens']:,} tokens reach over the boundary between prompt and answer; they are trained, "
            "but a prompt alone is tokenized differently there: end the prompt with a line break"
        )
    if found.get("shared_prefix"):
        lines.append(f"{found['shared_prefix']:.0%} of the tokens are prefixes that rows share")
    return lines
