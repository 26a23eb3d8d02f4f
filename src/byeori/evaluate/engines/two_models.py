"""A model that was trained in full beside the base that it began from: two models, one loaded at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence

from byeori.data.tokenize import Example
from byeori.evaluate.engines.base import Engine, OnAnswer, Prompts, Sampling, Side


class TwoModels:
    """openers: what loads each side."""

    def __init__(self, openers: Mapping[Side, Callable[[], Engine]]) -> None:
        self._openers = openers
        self._loaded: dict[Side, Engine] = {}

    def answers(self, prompts: Prompts, sampling: Sampling, side: Side, on_answer: OnAnswer) -> None:
        """See `Engine`."""
        if prompts:
            self._engine(side).answers(prompts, sampling, "tuned", on_answer)

    def logprobs(self, examples: Sequence[Example], side: Side) -> list[list[float]]:
        """See `Engine`."""
        return self._engine(side).logprobs(examples, "tuned")

    def _engine(self, side: Side) -> Engine:
        if side not in self._loaded:
            self._loaded.clear()
            gc.collect()
            self._loaded[side] = self._openers[side]()
        return self._loaded[side]
