"""Answers by transformers' own generation, in this process: the engine that is always there.

prompts ── longest first, as many as fit into batch_tokens ──> batches ── model/decode.py ──> answers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.evaluate import stop_tokens
from byeori.evaluate.engines.base import Ending, OnAnswer, Prompts, Sampling, Side, check_prompts
from byeori.model import decode, forward
from byeori.model.streamer import text_streamer

# A header shorter than this costs more to copy into every batch than to compute there.
_HEADER = 16


class Plain:
    """A loaded model. batch_size: most rows of a batch; batch_tokens: of its prompts and the answers to come."""

    def __init__(
        self, model: Any, tokenizer: Any, suffix: str = "", *, batch_size: int = 8, batch_tokens: int = 16_384
    ) -> None:
        configured = getattr(model.generation_config, "eos_token_id", None)
        self.model = model
        self.ending = Ending(tokenizer=tokenizer, stop_ids=stop_tokens.stop_ids(tokenizer, configured), suffix=suffix)
        mixes_rows = model.config.model_type == "rwkv"  # transformers' code mixes the states of a batch's rows
        self.batch_size, self.batch_tokens = 1 if mixes_rows else batch_size, batch_tokens
        forward.use_plain_attention(model)

    def answers(
        self,
        prompts: Prompts,
        sampling: Sampling,
        side: Side,
        on_answer: OnAnswer,
        stream: Callable[[str], None] | None = None,
    ) -> None:
        """See `Engine`. stream: called with each new piece of text (one prompt only).

        Raises:
            TemplateError: if a prompt is empty or leaves no room for an answer.
        """
        if not prompts:
            return
        check_prompts(list(prompts.values()), sampling)
        tokenizer = self.ending.tokenizer
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        choice = decode.Choice(**{name: getattr(sampling, name) for name in names})
        with self._side(side), forward.accelerated(self.model):
            header = self._header(list(prompts.values()))
            padded = decode.only_attention(self.model)
            for rows in batches(prompts, sampling, self.batch_size, self.batch_tokens, padded=padded):

                def finished(index: int, ids: list[int], rows: list[int] = rows) -> None:
                    on_answer(rows[index], self.ending.answer(ids))

                decode.decode(
                    self.model,
                    [prompts[row] for row in rows],
                    choice,
                    rows=rows,
                    limits=[sampling.new_tokens(prompts[row]) for row in rows],
                    pad=tokenizer.pad_token_id,
                    stop_ids=self.ending.stop_ids,
                    ended=lambda ids: self.ending.answer(ids).stopped,
                    stop_strings=(tokenizer, self.ending.suffix) if self.ending.suffix.strip() else None,
                    header=header,
                    streamer=text_streamer(tokenizer, stream, self.ending.suffix.strip()) if stream else None,
                    on_row=finished,
                )

    def _header(self, prompts: list[Sequence[int]]) -> decode.Header | None:
        """Compute what all prompts begin with, if it is worth it."""
        first, last = (list(prompt)[:-1] for prompt in (min(prompts, key=list), max(prompts, key=list)))
        shared = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))]
        worth = len(prompts) > 1 and len(shared) >= _HEADER
        return decode.prefill(self.model, shared) if worth else None

    @torch.no_grad()
    def logprobs(self, examples: Sequence[Example], side: Side) -> list[list[float]]:
        """See `Engine`."""
        with self._side(side):
            return [
                forward.forest_logprobs(self.model, forests.build([example]), plain=True).tolist()
                for example in examples
            ]

    @contextmanager
    def _side(self, side: Side) -> Iterator[None]:
        if side == "tuned":
            yield
            return
        with self.model.disable_adapter():
            yield


def batches(
    prompts: Prompts,
    sampling: Sampling,
    batch_size: int,
    batch_tokens: int,
    *,
    padded: bool = True,
) -> list[list[int]]:
    """Group rows of similar length, longest first, to keep the padding short.

    A batch has at most batch_size rows, and at most batch_tokens tokens with the longest answers that it may get; one
    row is a batch in any case. padded: whether prompts of a batch may differ in length.
    """
    order = sorted(prompts, key=lambda row: -len(prompts[row]))
    found: list[list[int]] = []
    for row in order:
        if found and len(found[-1]) < batch_size:
            longest = len(prompts[found[-1][0]])
            fits = (len(found[-1]) + 1) * (longest + sampling.max_new_tokens) <= batch_tokens
            if fits and (padded or len(prompts[row]) == longest):
                found[-1].append(row)
                continue
        found.append([row])
    return found
