"""Several sources in shares: `a.jsonl:0.7 b.jsonl:0.3` is the largest mix of 70% and 30% that repeats no row.

    a.jsonl 1,000 rows, b.jsonl 240     by rows     560 of a.jsonl, 240 of b.jsonl
                                        by tokens   as many as make 70% and 30% of the trained tokens

Which rows of a source are in the mix depends on the seed alone, so that a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from byeori.data import tokenized
from byeori.data.sources import Table
from byeori.errors import DataError

By = Literal["rows", "tokens"]


def choose(sizes: Sequence[np.ndarray], weights: Sequence[float], *, by: By, seed: int) -> list[np.ndarray]:
    """Return the positions of the rows of each source that are in the mix, in order.

    sizes: the trained tokens of each row, for each source [rows]. weights: of each source; only their ratio counts.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    orders = [np.random.default_rng((seed, source)).permutation(len(size)) for source, size in enumerate(sizes)]
    if by == "rows":
        counts = _whole(shares, np.array([len(size) for size in sizes]))
        return [np.sort(order[:count]) for order, count in zip(orders, counts, strict=True)]
    total = min(size.sum() / share for size, share in zip(sizes, shares, strict=True))
    chosen = []
    for size, order, share in zip(sizes, orders, shares, strict=True):
        reached = np.cumsum(size[order])
        count = int(np.abs(reached - share * total).argmin()) + 1  # the row that comes nearest to the share
        chosen.append(np.sort(order[:count]))
    return chosen


def _whole(shares: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Return how many rows of each source make the largest mix in these shares, by the largest remainder."""
    total = int(np.floor((available / shares).min() + 1e-9))
    counts = np.floor(shares * total + 1e-9).astype(np.int64)
    order = np.argsort(counts - shares * total, kind="stable")
    for source in order[: total - counts.sum()]:
        counts[source] += counts[source] < available[source]
    return counts


def mixed(rows: Any, table: Table, *, by: By, seed: int) -> tuple[Any, list[dict[str, Any]]]:
    """Return a tokenized table without the rows that are not in the mix, and what the audit says of each source.

    Rows that cannot be trained stay: the audit names them.

    Raises:
        DataError: if no row of a source can be trained.
    """
    good = tokenized.usable(rows)
    starts = tokenized.row_starts(good)
    tokens = np.add.reduceat(np.diff(tokenized.target_offsets(good)), starts[:-1]) if len(good) else np.zeros(0, int)
    source_rows = tokenized.column(good, "row").to_numpy()[starts[:-1]]
    ends = np.cumsum([count for _, count, _ in table.sources])
    source_of = np.searchsorted(ends, source_rows, side="right")
    members = [np.flatnonzero(source_of == number) for number in range(len(table.sources))]
    for (path, _, _), own in zip(table.sources, members, strict=True):
        if not len(own):
            raise DataError(f"no row of {path} can be trained, so it cannot be mixed; fix its rows or leave it out")
    weights = [weight or 1.0 for _, _, weight in table.sources]
    chosen = choose([tokens[own] for own in members], weights, by=by, seed=seed)
    kept = np.sort(np.concatenate([own[positions] for own, positions in zip(members, chosen, strict=True)]))
    lines = np.concatenate([np.arange(starts[unit], starts[unit + 1]) for unit in kept])
    sizes = [int(tokens[own[positions]].sum()) for own, positions in zip(members, chosen, strict=True)]
    report = [
        {"path": path, "weight": weight, "rows": len(positions), "of": len(own), "target_tokens": size}
        for (path, _, weight), own, positions, size in zip(table.sources, members, chosen, sizes, strict=True)
    ]
    usable_lines = np.flatnonzero(np.asarray(tokenized.column(rows, "problem")) == "")
    bad = np.setdiff1d(np.arange(len(rows)), usable_lines)
    return rows.select(np.sort(np.concatenate([usable_lines[lines], bad]))), report


def sentence(by: By, report: Sequence[dict[str, Any]]) -> str:
    """Return what is mixed, for the user."""
    key = "rows" if by == "rows" else "target_tokens"
    total = sum(source[key] for source in report)
    parts = [
        f"{source['path']} {source['rows']:,} of {source['of']:,} rows ({source[key] / total:.1%})" for source in report
    ]
    return f"mixed by {'rows' if by == 'rows' else 'trained tokens'}: {', '.join(parts)}"
