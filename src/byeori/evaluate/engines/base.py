"""What every engine is given and gives back: prompts and answers as token ids, log-probs of given answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from byeori.data.tokenize import Example
from byeori.errors import TemplateError

Side = Literal["base", "tuned"]
"""Which of the models in an engine answers: with the adapter off or on. A model without an adapter is `tuned`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling parameters, under the names of their settings, and the model's limit. temperature 0: greedy decoding.

    max_length: of prompt and answer in tokens; None for no limit.
    """

    max_new_tokens: int
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42

    def new_tokens(self, prompt: Sequence[int]) -> int:
        """Return how many tokens an answer to this prompt may have."""
        limit = self.max_new_tokens if self.max_length is None else self.max_length - len(prompt)
        return min(self.max_new_tokens, limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer. text: without special tokens. stopped: ended by the model, not by a limit. tokens: generated."""

    text: str
    stopped: bool
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """What ends an answer, and how its tokens become text; the same for every engine.

    stop_ids: tokens. suffix: the template's text after the answer, "" for none.
    """

    tokenizer: Any
    stop_ids: list[int]
    suffix: str = ""

    def answer(self, ids: Sequence[int], *, stopped: bool = False) -> Answer:
        """Return the answer in the tokens that an engine generated, which may go on after its end.

        stopped: whether the engine says that it ended there.
        """
        stop = next((index for index, token in enumerate(ids) if token in self.stop_ids), None)
        text = self.tokenizer.decode(ids[:stop], skip_special_tokens=True)
        stopped = stopped or stop is not None
        if (suffix := self.suffix.strip()) and suffix in text:
            text, stopped = text.split(suffix)[0], True
        return Answer(text=text.strip(), stopped=stopped, tokens=len(ids[:stop]))


Prompts = Mapping[int, Sequence[int]]
"""Rows -> token ids of their prompts, in any order."""
OnAnswer = Callable[[int, Answer], None]
"""What is called with each row and its answer when it is finished."""


class Engine(Protocol):
    """A model, with an adapter that can be switched off, somewhere it can generate."""

    def answers(self, prompts: Prompts, sampling: Sampling, side: Side, on_answer: OnAnswer) -> None:
        """Answer prompts, in any order."""

    def logprobs(self, examples: Sequence[Example], side: Side) -> list[list[float]]:
        """Return the log-probs of the trained tokens of each example."""


def check_prompts(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise unless every prompt can be answered.

    Raises:
        TemplateError: if a prompt is empty or leaves no room for an answer.
    """
    if not all(prompts):
        raise TemplateError("the prompt is empty; give it some text")
    longest = max(prompts, key=len)
    if sampling.new_tokens(longest) < 1:
        raise TemplateError(
            f"a prompt of {len(longest)} tokens leaves no room for an answer within the model's maximum length of "
            f"{sampling.max_length}; shorten it"
        )
