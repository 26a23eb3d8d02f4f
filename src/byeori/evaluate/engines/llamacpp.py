"""Answers by llama.cpp's server, several at once; the adapter is switched off by its scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from byeori.data.tokenize import Example
from byeori.evaluate.engines.base import Answer, Ending, Engine, OnAnswer, Prompts, Sampling, Side


class Server(Protocol):
    """A llama.cpp server. parallel: how many requests it works on at once."""

    parallel: int

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the reply to a request."""


class LlamaCpp:
    """llama.cpp with a model. losses: opens the engine for log-probs of given answers, which llama.cpp keeps back."""

    def __init__(self, server: Server, ending: Ending, *, has_adapter: bool, losses: Callable[[], Engine]) -> None:
        self._server, self._ending, self._has_adapter, self._losses = server, ending, has_adapter, losses

    def answers(self, prompts: Prompts, sampling: Sampling, side: Side, on_answer: OnAnswer) -> None:
        """See `Engine`. A row's random numbers depend on the seed and its number."""
        with ThreadPoolExecutor(self._server.parallel) as pool:
            try:
                waiting = {pool.submit(self._ask, row, ids, sampling, side): row for row, ids in prompts.items()}
                for done in as_completed(waiting):
                    on_answer(waiting[done], done.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def logprobs(self, examples: Sequence[Example], side: Side) -> list[list[float]]:
        """See `Engine`."""
        return self._losses().logprobs(examples, side)

    def _ask(self, row: int, prompt: Sequence[int], sampling: Sampling, side: Side) -> Answer:
        suffix, new_tokens = self._ending.suffix.strip(), sampling.new_tokens(prompt)
        body = {
            "prompt": list(prompt),
            "n_predict": new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repeat_penalty": sampling.repetition_penalty,
            "repeat_last_n": len(prompt) + new_tokens,  # all
            "samplers": ["penalties", "temperature", "top_k", "top_p"],  # in transformers' order
            "seed": (sampling.seed * 1_000_003 + row) % 2**32,
            "return_tokens": True,
            "stop": [suffix] if suffix else [],
            "cache_prompt": True,
        }
        if self._has_adapter:
            body["lora"] = [{"id": 0, "scale": 1.0 if side == "tuned" else 0.0}]
        found = self._server.post("/completion", body)
        return self._ending.answer(found["tokens"], stopped=found["stop_type"] in ("eos", "word"))
