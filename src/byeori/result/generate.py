"""Answers from a model: batched with left padding, greedy or sampled, stopped at the end-of-text token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How answers are made; the settings of the same names."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """text: without special tokens. stopped: whether the model ended it by itself. tokens: how many it wrote."""

    text: str
    stopped: bool
    tokens: int


def batches(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Indices of prompts that are answered together: of similar length, longest first, so that padding is short."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's end-of-text and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, *ids] if token is not None})


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    *,
    suffix: str = "",
    stream: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer one batch of prompts (token ids).

    suffix: the template's words after the answer; the answer ends there too.
    stream: is given the text as it grows (one prompt only).
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    ends = stop_ids(model, tokenizer)
    torch.manual_seed(how.seed)
    sampled = (
        {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k} if how.temperature else {}
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=bool(how.temperature),
        max_new_tokens=how.max_new_tokens,
        repetition_penalty=how.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=pad,
        streamer=_streamer(tokenizer, stream) if stream else None,
        **({"stop_strings": [suffix], "tokenizer": tokenizer} if suffix.strip() else {}),
        **sampled,
    )
    return [_answer(tokenizer, row[width:].tolist(), ends, suffix) for row in output]


def _answer(tokenizer: Any, ids: list[int], ends: list[int], suffix: str) -> Answer:
    stop = next((index for index, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    stopped = stop is not None
    if suffix.strip() and suffix.strip() in text:
        text, stopped = text.split(suffix.strip())[0], True
    return Answer(text=text.strip(), stopped=stopped, tokens=len(kept))


def _streamer(tokenizer: Any, emit: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """transformers' streamer, with its text given to `emit`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text + ("\n" if stream_end else ""))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
