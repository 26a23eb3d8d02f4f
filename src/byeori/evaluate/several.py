"""Several runs at once: each against base and against each other, corrected for how many comparisons there are.

    values of the rows, by model ── every pair of models ── difference, p ── Holm, Bonferroni ──> pairs of metrics.json

With three runs there are six comparisons, and without a correction one in five such families claims a difference that
is not there. For each measure, p-values are corrected by Holm's method, whose 0.05 holds for all comparisons together
and which decides what is called better; intervals are those of the level 1 - 0.05 / comparisons (Bonferroni), which
hold together in 95 of 100 families. Being simultaneous, they are the wider statement of the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import PurePath
from typing import Any

import numpy as np

from byeori.evaluate import metrics, verdict
from byeori.evaluate.intervals import Interval, holm, p_value
from byeori.evaluate.metrics import FEWEST_ROWS, difference_of
from byeori.evaluate.verdict import SMALL_SAMPLE
from byeori.support import pages
from byeori.support.language import tr, translated
from byeori.support.pages import number

Values = Mapping[str, Sequence[float | None]]
"""Of the rows, by metric."""

BASE = "base"
LEVEL = 0.05


def names(adapters: Sequence[str], combine: str | None = None) -> list[str]:
    """Return what the runs are called: the last name of each path, with a number where two are equal."""
    found: list[str] = []
    for adapter in [*adapters, *([combine] if combine else [])]:
        name = PurePath(adapter.rstrip("/")).name or "run"
        name = f"{name}-run" if name == BASE else name
        number = 2
        unique = name
        while unique in found:
            unique, number = f"{name}-{number}", number + 1
        found.append(unique)
    return found


def pairs_of(base: Mapping[str, Values], tuned: Mapping[str, Values]) -> list[dict[str, Any]]:
    """Return every run against base, then against every later run, with the differences of all metrics, second - first.

    base, tuned: values of the rows by run and metric; runs whose templates differ ask the base differently. What all
    runs have is compared. Each difference is {"mean", "low", "high", "p", "p_holm"}; low and high are those of the
    Bonferroni level, and all are None if nothing was measured.
    """
    common = [name for name in next(iter(tuned.values())) if all(name in values for values in tuned.values())]
    sides = [(BASE, run, base[run], tuned[run]) for run in tuned]
    sides += [(first, second, tuned[first], tuned[second]) for first, second in combinations(tuned, 2)]
    confidence = 1 - LEVEL / len(sides)
    found = []
    for first, second, before, after in sides:
        whole = metrics.summarise(before, after, names=common, confidence=confidence)
        found.append({"first": first, "second": second, "difference": whole["difference"]})
    for name in common:
        p_values = [
            p_value(np.array(after[name], dtype=np.float64) - np.array(before[name], dtype=np.float64))
            for _, _, before, after in sides
        ]
        for pair, p, corrected in zip(found, p_values, holm(p_values), strict=True):
            measured = pair["difference"][name]["mean"] is not None
            pair["difference"][name] |= {"p": p if measured else None, "p_holm": corrected if measured else None}
    return found


def sign_of(pair: Mapping[str, Any], name: str) -> int:
    """Return 1 if the second model is better, -1 if the first one is, 0 unless the corrected p-value says so."""
    difference = pair["difference"][name]
    if difference["mean"] is None or difference["p_holm"] >= LEVEL:
        return 0
    return 1 if difference["mean"] > 0 else -1


def word_of(pair: Mapping[str, Any], name: str, rows: int, doubted: Sequence[str] = ()) -> str:
    """Return better, worse, unclear or too few rows: what can be claimed of the second model.

    Of a run that is doubted, and better by its score, the score is said and no more.
    """
    if pair["difference"][name]["mean"] is None:
        return tr("not measured")
    if rows < FEWEST_ROWS:
        return tr("too few rows")
    sign = sign_of(pair, name)
    if sign and pair["second" if sign > 0 else "first"] in doubted:
        return tr("higher score") if sign > 0 else tr("lower score")
    return (tr("unclear"), tr("better"), tr("worse"))[sign]


def sentence(result: Mapping[str, Any]) -> str:
    """Return the conclusion about all runs: which are better than base and than each other, in the first measure."""
    heading, name = result["heading"], result["measure"]
    rows, pairs = result["rows"], result["pairs"]
    if rows < FEWEST_ROWS:
        return f"Too few rows to tell {len(result['runs'])} runs apart: {rows}."
    said, doubted = [], doubted_runs(result)
    for pair in pairs:
        sign = sign_of(pair, name)
        if sign:
            change, p = pair["difference"][name]["mean"], pair["difference"][name]["p_holm"]
            better, worse = (pair["second"], pair["first"])[::sign]
            if better in doubted:
                said.append(
                    f"In {heading}, {better} scores higher than {worse} by {abs(change):.1f} (corrected p {_p(p)})."
                )
            else:
                said.append(
                    f"In {heading}, {better} is better than {worse} by {abs(change):.1f} (corrected p {_p(p)})."
                )
    if not said:
        said = [f"No clear difference in {heading} between base and the {len(result['runs'])} runs."]
    if doubted:
        said.insert(0, f"The score of {', '.join(doubted)} is no proof that the task was learned; the report says why.")
    if rows < SMALL_SAMPLE:
        said.append(f"With fewer than {SMALL_SAMPLE} rows this is a hint.")
    return " ".join(said)


def doubted_runs(result: Mapping[str, Any]) -> list[str]:
    """Return the runs of which a finding undermines a gain."""
    return [run for run, of_run in result["runs"].items() if any(it["undermines"] for it in of_run["findings"])]


def lead_of(of_run: Mapping[str, Any]) -> tuple[str, str]:
    """Return heading and name of the measure that decides. of_run: the numbers of the comparison of one run."""
    if difference_of(of_run, "preference_accuracy") is not None:
        return "preference accuracy", "preference_accuracy"
    return verdict.primary(of_run)


def table(result: Mapping[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Return a line for each pair: which two, the difference, its interval, the corrected p-value and a word."""
    name, lines = result["measure"], []
    for pair in result["pairs"]:
        change = difference_of(pair, name) or Interval(float("nan"), float("nan"), float("nan"))
        p = pair["difference"][name]["p_holm"]
        low, high = (number(value, 1, signed=True) for value in (change.low, change.high))
        lines.append(
            (
                tr("{second} against {first}", second=pair["second"], first=pair["first"]),
                number(change.mean, 1, signed=True),
                tr("{low} to {high}", low=low, high=high),
                pages.DASH if p is None else _p(p),
                word_of(pair, name, result["rows"], doubted_runs(result)),
            )
        )
    return lines


def printed(result: Mapping[str, Any]) -> list[str]:
    """Return the table of pairs as lines of a terminal, in columns."""
    head = (translated(result["heading"]), tr("difference"), tr("simultaneous interval"), tr("corrected p"), "")
    lines = [head, *table(result)]
    widths = [max(map(pages.width, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cell + " " * (width - pages.width(cell)) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return ["  ".join(line).rstrip() for line in padded]


def means(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return each run with the means of the deciding measure: of its base, and its own."""
    name = result["measure"]
    return [(run, *(number(it[side].get(name), 1) for side in ("base", "tuned"))) for run, it in result["runs"].items()]


def page(result: Mapping[str, Any], *, said: str, rows: str, facts: Mapping[str, str]) -> str:
    """Return the page over the reports of the runs, which lie in folders beside it, as one HTML string."""
    return pages.render(
        "evaluate/several.html.j2",
        title=tr("{count} runs on {rows}", count=len(result["runs"]), rows=rows),
        facts=facts,
        said=said,
        heading=translated(result["heading"]),
        means=means(result),
        lines=table(result),
    )


def for_gate(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of all runs as those of one comparison, with names such as `run2.chrf`.

    The interval of a run is that of its comparison with base, corrected; that of general rows is its own.
    """
    found: dict[str, Any] = {"rows": result["rows"], "base": {}, "tuned": {}, "difference": {}, "findings": []}
    leads: dict[str, dict[str, Any]] = {}
    against_base = {pair["second"]: pair["difference"] for pair in result["pairs"] if pair["first"] == BASE}
    for run, of_run in result["runs"].items():
        found["findings"] += of_run["findings"]
        for rival in of_run["baselines"]:
            by_run = {f"{run}.{name}": interval for name, interval in rival["lead"].items()}
            leads[rival["name"]] = leads.get(rival["name"], {}) | by_run
        retention = of_run.get("retention") or {}
        for part in ("base", "tuned", "difference"):
            own = of_run[part] if part != "difference" else of_run[part] | against_base[run]
            general = {f"retention.{name}": value for name, value in (retention.get(part) or {}).items()}
            found[part] |= {f"{run}.{name}": value for name, value in (own | general).items()}
    return found | {"baselines": [{"name": name, "lead": lead} for name, lead in leads.items()]}


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
