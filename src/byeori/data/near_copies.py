"""Texts that are nearly the same, by the runs of 5 characters that they share.

    texts ── counted grams ──> each one's own grams ── MinHash, bands ──> candidates ── Jaccard ──> pairs

MinHash only finds candidates (Broder 1997; bands as in Leskovec, Rajaraman and Ullman, chapter 3): which of them are
near copies is decided by their exact similarity, the share of their grams that both have. Time grows with the
characters, memory with 200 bytes a row.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

import numpy as np

SIMILAR = 0.8
"""Share of common grams from which texts are near copies."""

_GRAM = 5  # characters
_MOST_GRAMS = 4096  # of a text; of longer ones those with the lowest hashes, so that equal passages keep equal grams
_COUNTERS = 2**22
_SHARE = 10  # what more than a tenth of the texts hold is boilerplate
_FEWEST = 10
_BANDS, _ROWS = 24, 5  # finds a pair of similarity 0.8 with 99.99%, one of 0.5 with 53%
_LINKS = 8  # candidates of a text in one band
_DIMENSIONS = 512  # of a vector
_BLOCK = 256

OnProgress = Callable[[int, int], None]


def plain(text: str) -> str:
    """Return what is compared of a text: without spaces and case, in one form."""
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def key(*texts: str) -> bytes:
    """Return 16 bytes that texts share if they are equal but for spaces, case and Unicode form."""
    return hashlib.blake2b("\0".join(map(plain, texts)).encode("utf-8", "replace"), digest_size=16).digest()


def grams(text: str) -> np.ndarray:
    """Return the different hashes of a text's grams [grams], uint64 in order; of a shorter text, the one of all."""
    codes = np.frombuffer(plain(text).encode("utf-32-le", "replace"), dtype=np.uint32).astype(np.uint64)
    size = min(_GRAM, len(codes))
    if size == 0:
        return codes
    hashes = np.full(len(codes) - size + 1, size, dtype=np.uint64)
    for at in range(size):
        hashes = hashes * np.uint64(0x100000001B3) + codes[at : len(codes) - size + 1 + at]
    return np.unique(_mixed(hashes))[:_MOST_GRAMS]


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets of grams."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / max(1, len(one) + len(other) - both)


class Corpus:
    """What many texts have in common: how many of them hold each gram (rare grams may share a counter)."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._counts = np.zeros(_COUNTERS, dtype=np.uint32)
        self._texts = 0
        for text in texts:
            self._counts[grams(text) % np.uint64(_COUNTERS)] += np.uint32(1)
            self._texts += 1

    def own(self, text: str) -> np.ndarray:
        """Return a text's grams without boilerplate, such as an instruction that most rows begin with."""
        found = grams(text)
        rare = self._count(found) <= max(_FEWEST, self._texts // _SHARE)
        return found[rare] if rare.any() else found

    def vector(self, text: str) -> np.ndarray:
        """Return [512] float32 of length 1: its grams, rare ones weighing more, hashed to signed dimensions."""
        found = grams(text)
        weights = np.log((1 + self._texts) / np.maximum(1, self._count(found)))
        signs = np.where(found >> np.uint64(63), 1.0, -1.0)
        places = ((found >> np.uint64(32)) % np.uint64(_DIMENSIONS)).astype(np.int64)
        made = np.bincount(places, weights * signs, minlength=_DIMENSIONS).astype(np.float32)
        return made / max(float(np.linalg.norm(made)), 1e-9)

    def _count(self, found: np.ndarray) -> np.ndarray:
        return self._counts[found % np.uint64(_COUNTERS)]


def pairs(
    texts: Sequence[str], others: Sequence[str] | None = None, on_progress: OnProgress = lambda done, total: None
) -> list[tuple[int, int, float]]:
    """Return near copies as (i, j, similarity): texts i < j, or the text i and the other j.

    Of texts with very many near copies each has at least 8 of them. on_progress: gets (texts read, total).
    """
    every = [*texts, *(others or ())]
    corpus = Corpus(every)
    bands = np.zeros((len(every), _BANDS), dtype=np.uint64)
    for row, text in enumerate(every):
        bands[row] = _bands(corpus.own(text))
        on_progress(row + 1, len(every))
    own = functools.lru_cache(maxsize=4096)(lambda row: corpus.own(every[row]))
    first = 0 if others is None else len(texts)
    found = []
    for code in _candidates(bands[: len(texts)] if first else bands, bands[first:] if first else None).tolist():
        i, j = divmod(code, len(every))
        if (share := similarity(own(i), own(first + j))) >= SIMILAR:
            found.append((i, j, share))
    return found


def nearest(texts: Sequence[str], wanted: Sequence[int], among: Sequence[int], count: int) -> list[np.ndarray]:
    """Return for each wanted text the `count` texts of `among` that share most with it, itself left out."""
    corpus = Corpus(texts[row] for row in among)
    pool, places = np.stack([corpus.vector(texts[row]) for row in among]), np.asarray(among)
    found = []
    for start in range(0, len(wanted), _BLOCK):
        rows = wanted[start : start + _BLOCK]
        shares = np.stack([corpus.vector(texts[row]) for row in rows]) @ pool.T
        for row, share in zip(rows, shares, strict=True):
            share[places == row] = -np.inf
            best = np.argsort(-share, kind="stable")[:count]
            found.append(places[best[np.isfinite(share[best])]])
    return found


def different_answers(
    texts: Sequence[str], answers: Sequence[str], on_progress: OnProgress = lambda done, total: None
) -> list[tuple[int, int, float]]:
    """Return near copies among texts whose answers are none, as (row, row, similarity): the most different first.

    Texts with different numbers ask different things and are not compared. Equal rows count once.
    """
    once: dict[bytes, int] = {}
    for row, (text, answer) in enumerate(zip(texts, answers, strict=True)):
        once.setdefault(key(text, answer), row)
    rows = list(once.values())
    found = []
    for i, j, share in pairs([texts[row] for row in rows], on_progress=on_progress):
        a, b = rows[i], rows[j]
        alike = similarity(grams(answers[a]), grams(answers[b])) if plain(answers[a]) != plain(answers[b]) else 1.0
        if alike < SIMILAR and same_numbers(texts[a], texts[b]):
            found.append((alike, -share, a, b))
    return [(a, b, -share) for _, share, a, b in sorted(found)]


def same_numbers(one: str, other: str) -> bool:
    """Return whether two texts have the same numbers; others ask different things, however alike they look."""
    return re.findall(r"\d+", one) == re.findall(r"\d+", other)


def _candidates(bands: np.ndarray, others: np.ndarray | None) -> np.ndarray:
    """Return i * rows + j of texts that agree in a band, once each and in order; rows: of both together."""
    count = len(bands) + (0 if others is None else len(others))
    codes = np.zeros(0, dtype=np.int64)
    for band in range(_BANDS):
        order = np.argsort(bands[:, band], kind="stable")
        values = bands[order, band]
        new = []
        if others is None:
            for step in range(1, min(_LINKS + 1, len(values))):
                same = values[step:] == values[:-step]
                new.append(order[:-step][same] * count + order[step:][same])
        else:
            start = np.searchsorted(values, others[:, band])
            for step in range(_LINKS):
                there = start + step < len(values)
                there[there] = values[start[there] + step] == others[there, band]
                new.append(order[start[there] + step] * count + np.flatnonzero(there))
        codes = np.unique(np.concatenate([codes, *new]))
    return codes


@functools.cache
def _functions() -> tuple[np.ndarray, np.ndarray]:
    """The factors and summands of the hash functions [functions], the same in every process."""
    numbers = np.random.default_rng(20).integers(0, 2**63, size=(2, _BANDS * _ROWS), dtype=np.uint64)
    return numbers[0] * np.uint64(2) + np.uint64(1), numbers[1]


def _bands(found: np.ndarray) -> np.ndarray:
    """Return [bands] uint64 of a set of grams: two texts agree in a band with similarity to the power of 5."""
    if not len(found):
        return np.arange(_BANDS, dtype=np.uint64)
    factors, summands = _functions()
    lowest = ((found[:, None] * factors + summands) >> np.uint64(32)).min(axis=0).reshape(_BANDS, _ROWS)
    made = np.arange(1, _BANDS + 1, dtype=np.uint64)
    for column in range(_ROWS):
        made = _mixed(made ^ lowest[:, column]) * np.uint64(0x9E3779B97F4A7C15)
    return made


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
