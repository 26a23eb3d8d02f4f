"""Answers of the model that is being trained to a few rows that were held out, at each evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from byeori.data.tokenize import Encoding
from byeori.data.tokenized import Rows
from byeori.evaluate.engines.base import Answer, Sampling
from byeori.evaluate.engines.plain import Plain
from byeori.model import forward, load, wrap

_NEW_TOKENS = 96
_PROMPT = 1_000  # characters of a prompt that are kept, from its end


def sampler(
    model: Any, encoding: Encoding, rows: Rows, count: int, name: Callable[[int], str]
) -> Callable[[], list[dict[str, str]]]:
    """Return a function that answers the first `count` rows: [{"name", "prompt", "reference", "answer"}].

    Of a pair the chosen answer is the reference, of a conversation the last turn. name: what a person calls a row.
    """
    tokenizer, suffix = encoding.tokenizer, encoding.template.suffix if encoding.template else ""
    examples = [rows.unit(index)[0] for index in range(min(count, len(rows)))]
    prompts: dict[int, list[int]] = {}
    asked: list[dict[str, str]] = []
    sampling = Sampling(max_new_tokens=_NEW_TOKENS, max_length=load.positions_limit(model.config))
    for example in examples:
        start, end = example.targets[-1]
        ids = list(example.token_ids)
        if start == 0 or sampling.new_tokens(ids[:start]) < 1:  # a text without a prompt
            continue
        prompts[len(asked)] = ids[:start]
        asked.append(
            {
                "name": name(example.row),
                "prompt": tokenizer.decode(ids[:start])[-_PROMPT:],
                "reference": tokenizer.decode(ids[start:end], skip_special_tokens=True).strip(),
            }
        )

    @torch.no_grad()
    def answers() -> list[dict[str, str]]:
        found: dict[int, str] = {}

        def on_answer(row: int, answer: Answer) -> None:
            found[row] = answer.text

        training = model.training
        model.eval()
        with forward.plain_attention(model), wrap.uncompiled():
            Plain(model, tokenizer, suffix).answers(prompts, sampling, "tuned", on_answer)
        model.train(training)
        return [{**item, "answer": found.get(row, "")} for row, item in enumerate(asked)]

    return answers
