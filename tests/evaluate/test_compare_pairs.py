"""Preference pairs: how often, and by how much, each model prefers the chosen answer."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import byeori
from byeori.evaluate import metrics
from byeori.evaluate.verdict import verdict
from tiny_models import sample_rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [row | {"rejected": row["rejected"][:40]} for row in sample_rows("preference-ko.jsonl")[:8]]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def preferred(tiny_model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BYEORI_CACHE", str(folder / "cache"))
        byeori.dpo(
            base_model=tiny_model,
            data_path=pairs,
            output_dir=folder / "adapter",
            cutoff_len=512,
            max_steps=8,
            batch_size=8,
            learning_rate=5e-3,
            dtype="float32",
        )
    return folder / "adapter"


def logprob(model: Any, tokenizer: Any, row: dict[str, str], answer: str) -> float:
    """Return log p of an answer and the end-of-text token, by transformers' own forward pass."""
    prompt = f"### System:\n{row['system']}\n\n### User:\n{row['question']}\n\n### Assistant:\n"
    before, ids = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return float(logprobs[len(before) - 1 :].sum())


def test_accuracy_and_margin(preferred: Path, tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    result = byeori.compare(
        adapter=preferred, data_path=pairs, output_dir=tmp_path / "report", dtype="float32", max_new_tokens=4
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]

    def margins(model: Any) -> list[float]:
        return [logprob(model, tokenizer, r, r["chosen"]) - logprob(model, tokenizer, r, r["rejected"]) for r in rows]

    expected = {"base": margins(base), "tuned": margins(PeftModel.from_pretrained(base, preferred))}
    written = [json.loads(line) for line in result.rows.read_text(encoding="utf-8").splitlines()]
    for side, values in expected.items():
        assert [row[side]["preference_margin"] for row in written] == pytest.approx(values, rel=1e-4, abs=1e-2)
        share = 100 * sum(value > 0 for value in values) / len(values)
        assert result.metrics[side]["preference_accuracy"] == share
    assert result.metrics["difference"]["preference_margin"]["low"] > 0  # these pairs were trained
    assert set(rows[0]) | {"base_output", "tuned_output", "base", "tuned"} == set(written[0])
    page = result.report.read_text(encoding="utf-8")
    assert "Preference" in page and "Margin" in page and rows[0]["chosen"] in page
    assert "of the pairs (the base in" in result.verdict
    # the page leads with the preference, and shows both answers of the data beside both of the models
    page = result.report.read_text(encoding="utf-8")
    row = json.loads(pairs.read_text(encoding="utf-8").splitlines()[0])
    assert "points of preference accuracy" in page and "loss per pair" in page and "of the chosen answer" in page
    first = page[page.index('id="row-1"') :]
    assert re.findall(r'data-side="(\w+)"', first)[:4] == ["reference", "rejected", "base", "tuned"]
    assert html.escape(row["chosen"]) in page and html.escape(row["rejected"]) in page
    assert "KL to the reference model" in page and "longer answer in" in page


def test_the_verdict_claims_no_more_than_the_interval() -> None:
    sides: dict[str, dict[str, list[float | None]]] = {}
    for side, shift in (("base", 0.0), ("tuned", 0.1)):
        margins = [(-1.0) ** index * 5 + shift * (-1) ** (index // 2) for index in range(24)]
        sides[side] = {name: [1.0] * 24 for name in metrics.ROW_METRICS}
        sides[side] |= {"preference_margin": [*margins], "preference_accuracy": [100.0 * (m > 0) for m in margins]}
    words = verdict(metrics.summarise(sides["base"], sides["tuned"]))
    preference = "prefers the chosen answer in 50% of the pairs (the base in 50%)"
    assert f"{preference} over 24 rows: no clear difference, 0.0 points (95% interval " in words
    assert "; the margin between chosen and rejected did not clearly change. No clear difference in chrF" in words


def test_pairs_by_hand() -> None:
    assert metrics.score_pair(-3.0, -4.5) == {"preference_accuracy": 100.0, "preference_margin": 1.5}
    assert metrics.score_pair(-4.5, -4.5) == {"preference_accuracy": 0.0, "preference_margin": 0.0}
