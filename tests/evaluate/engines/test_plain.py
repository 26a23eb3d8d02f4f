"""The plain engine: batches equal to single prompts, ends of answers, penalties, seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from byeori.artifacts import saved_model
from byeori.data import template
from byeori.errors import ByeoriError
from byeori.evaluate.engines import plain
from byeori.evaluate.engines.base import Answer, Sampling
from byeori.model import forward

GREEDY = Sampling(max_new_tokens=12)
TITLE_KO = template.shipped()["title-ko"]


def load(folder: Path) -> tuple[Any, Any]:
    saved = saved_model.find(str(folder))
    return saved_model.load_weights(saved, "float32", torch.device("cpu")), saved.tokenizer


def answers(
    model: Any, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, suffix: str = "", **size: int
) -> list[Answer]:
    found: dict[int, Answer] = {}
    engine = plain.Plain(model, tokenizer, suffix, **size)
    engine.answers(dict(enumerate(prompts)), sampling, "tuned", lambda row, answer: found.update({row: answer}))
    return [found[row] for row in range(len(prompts))]


def prompt_of(document: str) -> str:
    return template.parse(TITLE_KO).prompt({"document": document})


def documents(path: Path) -> list[str]:
    return [json.loads(line)["document"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_batches_with_left_padding_equal_single_prompts(trained: Path, title_rows: Path) -> None:
    model, tokenizer = load(trained)
    prompts = [
        tokenizer(prompt_of(text[: 5 + 4 * index]))["input_ids"] for index, text in enumerate(documents(title_rows)[:8])
    ]
    assert len({len(prompt) for prompt in prompts}) > 4
    together = answers(model, tokenizer, prompts, GREEDY)
    alone = [answers(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("penalty", [1.3, 2.0])
def test_repetition_penalty_ignores_the_padding(trained: Path, title_rows: Path, penalty: float) -> None:
    model, tokenizer = load(trained)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sampling = Sampling(max_new_tokens=12, repetition_penalty=penalty)
    prompts = [
        tokenizer(prompt_of(text[: 5 + 8 * index]))["input_ids"] for index, text in enumerate(documents(title_rows)[:4])
    ]
    together = answers(model, tokenizer, prompts, sampling)
    assert together == [answers(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]


def test_repetition_penalty_equals_that_of_transformers(trained: Path) -> None:
    model, tokenizer = load(trained)
    ids = tokenizer(prompt_of("봄이 왔다"))["input_ids"]
    result = answers(model, tokenizer, [ids], Sampling(max_new_tokens=12, repetition_penalty=1.5))[0]
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert result.text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_sampling_is_reproducible_with_its_seed(trained: Path) -> None:
    model, tokenizer = load(trained)
    prompts = [tokenizer(prompt_of("봄"))["input_ids"]]

    def sample(seed: int) -> str:
        sampling = Sampling(max_new_tokens=24, temperature=1.5, top_p=0.95, top_k=50, seed=seed)
        return answers(model, tokenizer, prompts, sampling)[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_an_answer_ends_at_the_end_of_text(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    with torch.no_grad():  # a head that writes token 70 after anything, and the end of text after token 70
        model.lm_head.weight.zero_()
    calls = []

    def head(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        output[:] = 0
        output[..., 70 if len(calls) < 4 else tokenizer.eos_token_id] = 1
        return output

    model.lm_head.register_forward_hook(head)
    result = answers(model, tokenizer, [[5, 6]], GREEDY)[0]
    assert (result.stopped, result.tokens) == (True, 3)
    assert result.text == tokenizer.decode([70, 70, 70]).strip()


def test_an_answer_cut_at_the_limit_is_not_stopped(trained: Path) -> None:
    model, tokenizer = load(trained)
    result = answers(model, tokenizer, [tokenizer("봄")["input_ids"]], Sampling(max_new_tokens=1))[0]
    assert (result.stopped, result.tokens) == (False, 1)


def test_every_stop_token_of_the_model_counts(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    model.generation_config.eos_token_id = [1, 70]

    def head(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., 70] = 1e4
        return output

    model.lm_head.register_forward_hook(head)
    result = answers(model, tokenizer, [[5, 6]], GREEDY)[0]
    assert (result.stopped, result.tokens) == (True, 0)


def test_the_suffix_of_the_template_ends_an_answer(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    wanted = tokenizer("봄\n[END] 봄봄봄봄")["input_ids"]
    calls: list[int] = []

    def head(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[:] = 0
        output[..., wanted[min(len(calls), len(wanted) - 1)]] = 1
        calls.append(1)
        return output

    model.lm_head.register_forward_hook(head)
    result = answers(model, tokenizer, [[5, 6]], Sampling(max_new_tokens=40), suffix="\n[END]")[0]
    assert (result.text, result.stopped) == ("봄", True)
    assert len(calls) < 40


def test_answers_end_at_the_maximum_length(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    long = Sampling(max_new_tokens=100_000, max_length=512)
    result = answers(model, tokenizer, [[5] * 505], long)[0]
    assert result.tokens <= 7
    with pytest.raises(ByeoriError, match="leaves no room for an answer within the model's maximum length of 512"):
        answers(model, tokenizer, [[5] * 512], long)


def test_no_generation_with_forest_attention(trained: Path) -> None:
    model, tokenizer = load(trained)
    ids = tokenizer("봄이 왔다")["input_ids"]
    before = answers(model, tokenizer, [ids], GREEDY)
    assert forward.use_forest_attention(model)
    assert answers(model, tokenizer, [ids], GREEDY) == before


def test_batches_hold_prompts_of_similar_length() -> None:
    prompts = {row: [0] * length for row, length in enumerate((3, 9, 1, 7, 5))}
    assert plain.batches(prompts, GREEDY, 2, 1000) == [[1, 3], [4, 0], [2]]


def test_a_batch_is_filled_by_tokens() -> None:
    """12 new tokens each: 2 x (9 + 12) = 42 fit, 3 x 21 do not; a row over the limit is a batch of its own."""
    prompts = {row: [0] * length for row, length in enumerate((3, 9, 1, 7, 5, 60))}
    assert plain.batches(prompts, GREEDY, 8, 45) == [[5], [1, 3], [4, 0], [2]]


def test_batches_of_one_length_for_layers_that_carry_a_state() -> None:
    prompts = {row: [0] * length for row, length in enumerate((3, 9, 3, 9, 3, 1))}
    assert plain.batches(prompts, GREEDY, 2, 1000, padded=False) == [[1, 3], [0, 2], [4], [5]]
