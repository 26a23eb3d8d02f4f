"""What needs no training: answers that a tuned model must beat before its gain means that it learned the task.

    items (input, reference, both models' answers) ── answers ──> one answer per row and baseline
    ── measure ──> mean scores, and the tuned model's lead over each with a 95% interval

Copies of the input, the answer that is most frequent in training, the tuned model's answer to another row (what style
alone scores), the base with training rows in its prompt, and the base's own answers cut to the length of the tuned
model's. Lead-n: Nallapati 2017; majority class: any textbook.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from byeori.evaluate import metrics
from byeori.evaluate.measures import Measure

_SENTENCE = re.compile(r".+?(?:[.!?。！？…](?=\s|$)|\n|$)", re.DOTALL)

FEW_SHOTS = "few_shots"
BASE_CUT = "base_cut"
COPIES = ("copy", "copy_sentence", "copy_start")
MOST_FREQUENT = "most_frequent"
OTHER_ROW = "other_row"
NAMES = (*COPIES, MOST_FREQUENT, OTHER_ROW, BASE_CUT, FEW_SHOTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """name: in metrics.json. about: the subject of a sentence. answers: one for each row."""

    name: str
    about: str
    answers: Sequence[str]


def of_items(items: Sequence[Mapping[str, Any]], trained: Sequence[str]) -> list[Baseline]:
    """Return the baselines that apply to the rows.

    items: with `inputs` (the texts of the prompt's columns), `reference`, both outputs and scores, and `few_shots`,
    the base's answer behind training rows, if it was asked for that.
    trained: the answers of the training rows; empty if they are not known.
    """
    longest = [max(item["inputs"], key=len, default="").strip() for item in items]
    length = round(median(len(item["reference"].strip()) for item in items))
    whole = longest, [first_sentence(text) for text in longest], [text[:length].strip() for text in longest]
    abouts = (
        "Copying the longest column of the input",
        "Copying the first sentence of the input",
        f"Copying the first {length} characters of the input",
    )
    found = [
        Baseline(name=name, about=about, answers=answers)
        for name, about, answers in zip(COPIES, abouts, whole, strict=True)
        if any(answers)
    ]
    if common := most_frequent(trained or [item["reference"] for item in items]):
        source = "training" if trained else "these rows"
        about = f"Always giving the most frequent answer in {source}"
        found.append(Baseline(name=MOST_FREQUENT, about=about, answers=[common] * len(items)))
    if len(items) > 1:
        about = "The tuned model's own answer to another row"
        found.append(Baseline(name=OTHER_ROW, about=about, answers=_of_other_rows(items)))
    if sum(item["base"]["stopped"] == 0 for item in items) * 2 >= len(items):
        cut = [item["base_output"][: len(item["tuned_output"])].strip() for item in items]
        about = "Cutting the base model's answers to the length of the tuned model's"
        found.append(Baseline(name=BASE_CUT, about=about, answers=cut))
    if FEW_SHOTS in items[0]:
        about = "The base model with training rows in its prompt"
        found.append(Baseline(name=FEW_SHOTS, about=about, answers=[item[FEW_SHOTS] for item in items]))
    return _distinct(found)


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop before a space, or the first line break.

    first_sentence("3.5% 올랐다. 그러나") == "3.5% 올랐다."
    """
    match = _SENTENCE.match(text.strip())
    return match[0].strip() if match else ""


def most_frequent(answers: Sequence[str]) -> str:
    """Return the answer that most rows have, "" if no two have the same."""
    counted = Counter(answer.strip() for answer in answers).most_common(1)
    return counted[0][0] if counted and counted[0][1] > 1 else ""


def _of_other_rows(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each row the tuned answer of another one, drawn so that sorted rows do not meet their own kind."""
    order = np.random.default_rng(0).permutation(len(items))
    other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    return [items[other[row]]["tuned_output"] for row in range(len(items))]


def _distinct(found: list[Baseline]) -> list[Baseline]:
    """Return the baselines without those whose answers are another's: a short input is one sentence."""
    return list({tuple(item.answers): item for item in reversed(found)}.values())[::-1]


def measure(
    items: Sequence[Mapping[str, Any]],
    found: Sequence[Baseline],
    measures: Sequence[Measure] = (),
) -> list[dict[str, Any]]:
    """Return the scores of each baseline, and the lead of the tuned model over it, as JSON data.

    [{"name": "copy_sentence", "about": "Copying the first sentence of the input", "scores": {"chrf": 19.4, ...},
      "lead": {"chrf": {"mean": -1.1, "low": -3.0, "high": 0.9}, ...}}]
    """
    tuned = _scores(items, [item["tuned_output"] for item in items], measures)
    results = []
    for baseline in found:
        scores = _scores(items, baseline.answers, measures)
        paired = metrics.summarise(scores, tuned, names=list(tuned))
        about = {"name": baseline.name, "about": baseline.about}
        results.append(about | {"scores": paired["base"], "lead": paired["difference"]})
    return results


def _scores(
    items: Sequence[Mapping[str, Any]], answers: Sequence[str], measures: Sequence[Measure]
) -> dict[str, Sequence[float]]:
    """Return the values of every measure that needs no more than an answer."""
    references = [item["reference"] for item in items]
    rows = [metrics.score_text(*pair) for pair in zip(answers, references, strict=True)]
    scores: dict[str, Sequence[float]] = {name: [row[name] for row in rows] for name in metrics.TEXT_METRICS}
    for measure in measures:
        if measure.over_all:
            scores[measure.name] = measure.over_all(references, answers).tolist()
        else:
            scores[measure.name] = [
                measure.of_row(item["row"], item["reference"], answer, named=f"row {index}")
                for index, (item, answer) in enumerate(zip(items, answers, strict=True), 1)
            ]
    return scores
