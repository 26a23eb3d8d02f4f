"""How often a 95% interval of `byeori compare` contains the truth: 2,000 draws of 40 and of 400 rows.

    python benchmarks/coverage.py [DRAWS]

The differences are those of real measures: answers made from the sample titles (words left out, another title, the
first sentence of the text) scored by chrF, ROUGE-L, exact match, length and macro F1, and for comparison normal,
exponential, gamma, log-normal and Laplace ones. The truth is the mean over the whole population. Beside it stands what
the percentiles of a paired bootstrap (300 resamples) contain.
"""

from __future__ import annotations

import json
import sys
from importlib import resources

import numpy as np

from byeori.evaluate import baselines, labels, metrics
from byeori.evaluate.intervals import paired_interval

_POPULATION = 100_000


def populations(generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Return differences [population] by name."""
    path = resources.files("byeori.data") / "samples" / "titles-ko-train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    titles = [row["title"] for row in rows]
    scored = []
    for row in rows:
        words = row["title"].split()
        kept = [word for word in words if generator.random() < 0.7] or words[:1]
        tuned = row["title"] if generator.random() < 0.1 else " ".join(kept)
        if generator.random() < 0.2:
            tuned = str(generator.choice(titles))
        base = baselines.first_sentence(row["document"])[:60]
        pair = [metrics.score_row(text, row["title"], stopped=True, loss=0.0) for text in (base, tuned)]
        scored.append({name: pair[1][name] - pair[0][name] for name in pair[0]})
    found = {name: np.array([row[name] for row in scored]) for name in ("chrf", "rouge_l", "exact", "length")}
    for better, worse in ((0.3, 0.1), (0.1, 0.05), (0.05, 0.05)):
        shares = [worse, 1 - better - worse, better]
        found[f"right or wrong, {better:.0%} and {worse:.0%} change"] = generator.choice(
            [-100.0, 0.0, 100.0], _POPULATION, p=shares
        )
    return found | {
        "normal": generator.normal(5, 10, _POPULATION),
        "exponential": generator.exponential(1, _POPULATION),
        "gamma 0.5": generator.gamma(0.5, 1, _POPULATION),
        "Laplace": generator.laplace(1, 3, _POPULATION),
        "log-normal": generator.lognormal(1, 1, _POPULATION),
    }


def percentiles(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    means = values[generator.integers(values.size, size=(300, values.size))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def f1_coverage(generator: np.random.Generator, rows: int, draws: int) -> float:
    """Return how many percent of the intervals for a difference of macro F1 contain the truth."""
    names = np.array(["a", "b", "c"])
    right = {"base": (0.6, 0.5, 0.4), "tuned": (0.8, 0.7, 0.5)}

    def answers(truth: np.ndarray, side: str) -> np.ndarray:
        hit = generator.random(truth.size) < np.array(right[side])[truth]
        return np.where(hit, truth, (truth + generator.integers(1, 3, truth.size)) % 3)

    def values(truth: np.ndarray, side: str) -> np.ndarray:
        return labels.macro_f1(names[truth].tolist(), names[answers(truth, side)].tolist())

    whole = generator.choice(3, size=200_000, p=[0.5, 0.3, 0.2])
    expected = values(whole, "tuned").mean() - values(whole, "base").mean()
    inside = 0
    for _ in range(draws):
        truth = generator.choice(3, size=rows, p=[0.5, 0.3, 0.2])
        interval = paired_interval(values(truth, "tuned") - values(truth, "base"))
        inside += interval.low <= expected <= interval.high
    return 100 * inside / draws


def main(draws: int = 2000) -> None:
    generator = np.random.default_rng(2026)
    print(f"{'differences':40} rows  interval  bootstrap percentiles")
    for name, population in populations(generator).items():
        truth = population.mean()
        for rows in (40, 400):
            inside = np.zeros(2)
            for _ in range(draws):
                values = generator.choice(population, rows)
                _, low, high = paired_interval(values)
                other = percentiles(values, generator)
                inside += [low <= truth <= high, other[0] <= truth <= other[1]]
            print(f"{name:40} {rows:4}  {100 * inside[0] / draws:7.1f}%  {100 * inside[1] / draws:7.1f}%", flush=True)
    for rows in (40, 400):
        print(f"{'macro F1':40} {rows:4}  {f1_coverage(generator, rows, draws):7.1f}%", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
