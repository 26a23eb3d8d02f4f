"""Answers by vLLM, in this process: the base, and the adapter beside it as a LoRA request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from byeori.data.tokenize import Example
from byeori.errors import ConfigError, ModelError
from byeori.evaluate.engines.base import Ending, OnAnswer, Prompts, Sampling, Side
from byeori.support.text_files import one_line

# Rows that are handed over together: enough to keep a GPU busy, few enough to be kept as they are finished.
_ROWS = 512


def installed() -> bool:
    """Return whether vLLM is installed beside byeori."""
    return find_spec("vllm") is not None


class VLLM:
    """vLLM with a model.

    adapter: its folder and the rank that vLLM is told, or None. context: tokens of a row. at_once: rows; None for
    vLLM's choice.
    """

    def __init__(
        self,
        base: Path,
        ending: Ending,
        *,
        adapter: tuple[Path, int] | None,
        dtype: str,
        context: int,
        at_once: int | None,
    ) -> None:
        """Load the model.

        Raises:
            ConfigError: if vLLM is not installed.
            ModelError: if vLLM cannot load the model.
        """
        if not installed():
            raise ConfigError("--engine vllm needs vLLM beside byeori; pip install vllm")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: no second import of everything
        import vllm
        from vllm.lora.request import LoRARequest

        more = {"enable_lora": True, "max_lora_rank": adapter[1]} if adapter else {}
        more |= {"max_num_seqs": at_once} if at_once else {}
        more |= {"enforce_eager": not torch.cuda.is_available()}  # on a CPU, compiling takes longer than it saves
        try:
            self._engine: Any = vllm.LLM(
                model=str(base), dtype=dtype, max_model_len=context, generation_config="vllm", **more
            )
        except Exception as error:  # vLLM raises its own words in many classes
            raise ModelError(f"vLLM cannot load {base}: {one_line(error, 300)}; try --engine transformers") from None
        self._parameters = vllm.SamplingParams
        self._adapter = LoRARequest("tuned", 1, str(adapter[0])) if adapter else None
        self._ending = ending

    def answers(self, prompts: Prompts, sampling: Sampling, side: Side, on_answer: OnAnswer) -> None:
        """See `Engine`. A row's random numbers depend on the seed and its number."""
        order = list(prompts)
        for rows in (order[start : start + _ROWS] for start in range(0, len(order), _ROWS)):
            parameters = [self._sampling(sampling, prompts[row], row) for row in rows]
            outputs = self._generate([prompts[row] for row in rows], parameters, side)
            for row, output in zip(rows, outputs, strict=True):
                found = output.outputs[0]
                on_answer(row, self._ending.answer(found.token_ids, stopped=found.finish_reason == "stop"))

    def logprobs(self, examples: Sequence[Example], side: Side) -> list[list[float]]:
        """See `Engine`."""
        parameters = self._parameters(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._generate([example.token_ids for example in examples], parameters, side)
        return [
            [
                float(output.prompt_logprobs[at][example.token_ids[at]].logprob)
                for start, end in example.targets
                for at in range(start, end)
            ]
            for example, output in zip(examples, outputs, strict=True)
        ]

    def _sampling(self, sampling: Sampling, prompt: Sequence[int], row: int) -> Any:
        suffix = self._ending.suffix.strip()
        return self._parameters(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.new_tokens(prompt),
            seed=sampling.seed * 1_000_003 + row if sampling.temperature else None,
            stop_token_ids=self._ending.stop_ids,
            stop=[suffix] if suffix else None,
            detokenize=bool(suffix),
        )

    def _generate(self, prompts: Sequence[Sequence[int]], parameters: Any, side: Side) -> list[Any]:
        inputs = [{"prompt_token_ids": list(ids)} for ids in prompts]
        lora = self._adapter if side == "tuned" else None
        outputs: list[Any] = self._engine.generate(inputs, parameters, lora_request=lora, use_tqdm=False)
        return outputs
