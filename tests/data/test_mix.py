"""Sources in shares: exact counts, no row twice, the same rows for the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from byeori.data import mix, places
from byeori.errors import DataError


@pytest.mark.parametrize(
    ("available", "weights", "counts"),
    [
        ((1000, 240), (0.7, 0.3), (560, 240)),
        ((1000, 240), (7, 3), (560, 240)),
        ((10, 10), (0.5, 0.5), (10, 10)),
        ((100, 7), (0.9, 0.1), (63, 7)),
        ((10, 10, 10), (1, 1, 2), (5, 5, 10)),
        ((1000, 1000, 1000), (1 / 3, 1 / 3, 1 / 3), (1000, 1000, 1000)),
        ((3, 1), (0.9, 0.1), (3, 0)),
    ],
)
def test_shares_of_rows(available: tuple[int, ...], weights: tuple[float, ...], counts: tuple[int, ...]) -> None:
    sizes = [np.full(count, 5) for count in available]
    chosen = mix.choose(sizes, weights, by="rows", seed=1)
    assert tuple(map(len, chosen)) == counts
    assert all(len(set(rows)) == len(rows) and list(rows) == sorted(rows) for rows in chosen)


def test_shares_of_trained_tokens() -> None:
    random = np.random.default_rng(0)
    sizes = [random.integers(1, 60, 4000), random.integers(200, 900, 300)]
    chosen = mix.choose(sizes, (0.7, 0.3), by="tokens", seed=3)
    tokens = [int(size[rows].sum()) for size, rows in zip(sizes, chosen, strict=True)]
    # no row more would bring a source nearer to its share
    total = min(sizes[0].sum() / 0.7, sizes[1].sum() / 0.3)
    assert abs(tokens[0] - 0.7 * total) <= 60 and abs(tokens[1] - 0.3 * total) <= 900
    assert abs(tokens[0] / sum(tokens) - 0.7) < 0.01


def test_the_seed_decides() -> None:
    sizes = [np.ones(50), np.ones(10)]
    first, again, other = (mix.choose(sizes, (1, 1), by="rows", seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0]) and list(first[1]) == list(range(10))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a.jsonl:0.7", ("a.jsonl", 0.7)),
        ("a.jsonl", ("a.jsonl", None)),
        ("user/name:3", ("user/name", 3.0)),
        ("s3://bucket/a.jsonl:.5", ("s3://bucket/a.jsonl", 0.5)),
        ("postgresql://host:5432", ("postgresql://host:5432", None)),
        ("postgresql://host:5432/db:2", ("postgresql://host:5432/db", 2.0)),
        ("a:b", ("a:b", None)),
    ],
)
def test_weights_behind_paths(path: str, parts: tuple[str, float | None]) -> None:
    assert places.split_weight(path) == parts


def test_weights_that_cannot_be(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c:0.5"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert places.split_weight(f"{tmp_path}/c:0.5") == (f"{tmp_path}/c:0.5", None)  # a file of this name
    for paths, words in (
        ([f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl"], "has no weight, and others have"),
        ([f"{tmp_path}/a.jsonl:0.5"], "no other data_path"),
        ([f"{tmp_path}/a.jsonl:0", f"{tmp_path}/b.jsonl:1"], "is 0"),
    ):
        with pytest.raises(DataError, match=words):
            places.check_paths(paths)
