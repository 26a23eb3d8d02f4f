"""The embedded model, Gemma 3 270M: one forest against one sequence at a time, on the sample rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from byeori.batch import forest as forests
from byeori.data import template, tokenize
from byeori.data.tokenize import Example
from byeori.model import forward, load, lora
from conftest import sample_rows

pytestmark = pytest.mark.real
CPU = torch.device("cpu")


def examples(folder: Path) -> list[Example]:
    """Four rows of the samples."""
    tokenizer, _ = load.load_tokenizer(str(folder))
    how = tokenize.encoding(
        tokenizer, template.resolve("title-ko"), cutoff_len=512, add_eos_token=True, train_on_inputs=False
    )
    rows = [row | {"document": row["document"][:80]} for row in sample_rows("titles-ko-train.jsonl")[:4]]
    return [tokenize.encode_row(row, how) for row in rows]


def adapted(folder: Path, dtype: torch.dtype) -> Any:
    base = load.load_model(str(folder), dtype=dtype, device=CPU)
    model = lora.attach(base, r=8, alpha=16, dropout=0.0, targets=["all-linear"], seed=1)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start: A would have no gradient
            torch.nn.init.normal_(parameter, std=0.01)
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_float32_equals_the_plain_computation(embedded: Path) -> None:
    """Measured: loss equal to 2.6e-7, all gradients to 3.3e-6, the worst matrix to 7.7e-6 (norms of differences)."""
    rows, model = examples(embedded), adapted(embedded, torch.float32)
    plain = torch.zeros((), dtype=torch.float64)
    for example in rows:  # PEFT's own forward, all logits; the softmax over 262,144 words in float64
        ids = torch.tensor([list(example.token_ids)])
        labels = torch.full_like(ids, -100)
        for start, end in example.targets:
            labels[:, start:end] = ids[:, start:end]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
        loss.backward()
        plain += loss.detach()
    expected = gradients(model)

    lora.fuse(model)
    assert forward.use_forest_attention(model)
    forest = forests.build(rows)
    assert forest.unique_tokens < forest.separate_tokens
    loss = -forward.forest_logprobs(model, forest).sum()
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(plain.item(), rel=2e-6)
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
    squares = [float((found[name] - expected[name]).square().sum()) for name in expected]
    overall = (sum(squares) / sum(float(grad.square().sum()) for grad in expected.values())) ** 0.5
    print(f"loss {loss.item()} and {plain.item()}, gradient {overall:.2g}, worst matrix {worst:.2g}")
    assert overall < 3e-5
    assert worst < 1e-4


def test_bf16_passes_the_self_check(embedded: Path) -> None:
    rows, model = examples(embedded)[:2], adapted(embedded, torch.bfloat16)
    lora.fuse(model)
    assert forward.use_forest_attention(model)
    difference = forward.self_check(model, rows)
    print(f"mean relative difference {difference:.2g}")
    assert difference < 0.05
