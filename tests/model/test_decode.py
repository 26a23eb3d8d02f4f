"""Decoding in a batch: equal to one row at a time, with rows that leave and a header computed once."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, GenerationConfig

import zoo
from byeori.model import decode

HEADER = [5, 9, 31, 7, 7, 12, 22, 8, 30, 11]  # longer than a sliding window of the zoo
STOPS = [2, 3, 4, 6]
GREEDY = decode.Choice()


def prompts(count: int, seed: int, header: list[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [header + [draw.randrange(5, zoo.WORDS) for _ in range(draw.randrange(1, 15))] for _ in range(count)]


def together(
    model: Any, given: list[list[int]], choice: decode.Choice = GREEDY, limits: list[int] | None = None, **more: Any
) -> list[list[int]]:
    """The new tokens of each prompt up to its stop token, decoded in one batch."""
    found: dict[int, list[int]] = {}
    more = {"rows": range(len(given)), "limits": limits or [12] * len(given)} | more
    decode.decode(
        model,
        given,
        choice,
        pad=0,
        stop_ids=STOPS,
        ended=lambda ids: bool(set(ids) & set(STOPS)),
        on_row=lambda index, ids: found.update({index: until_stop(ids)}),
        **more,
    )
    return [found[index] for index in range(len(given))]


def until_stop(ids: list[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids) if token in STOPS), len(ids))
    return ids[: end + 1]


def alone(model: Any, prompt: list[int], limit: int = 12) -> list[int]:
    """The same by transformers alone: one prompt, its own cache."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=STOPS,
        pad_token_id=0,
    )
    return until_stop(output[0, len(prompt) :].tolist())


def sizes(model: Any) -> list[tuple[int, int]]:
    """Record the rows and the columns of every forward pass from now on."""
    seen: list[tuple[int, int]] = []
    backbone = model.get_decoder()
    backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("kind", [*zoo.KINDS, *zoo.STATEFUL])
@pytest.mark.parametrize("header", [[], HEADER])
def test_a_batch_equals_one_row_at_a_time(kind: str, header: list[int]) -> None:
    torch.manual_seed(0)
    model = (zoo.KINDS | zoo.STATEFUL)[kind]().eval()
    given = prompts(9, seed=len(kind), header=header)
    assert decode.only_attention(model) == (kind in zoo.KINDS)
    if kind in zoo.STATEFUL:  # whose batches have prompts of one length
        given = [prompt[: len(header) + 1] for prompt in given][: 1 if kind == "rwkv" else None]  # see engines/plain.py
    shared = decode.prefill(model, header) if header else None
    assert together(model, given, header=shared) == [alone(model, prompt) for prompt in given]


def test_the_header_is_computed_once() -> None:
    model = zoo.KINDS["gemma3"]().eval()
    given = [[*HEADER, 13], [*HEADER, 14, 15, 16, 17]]
    expected = [alone(model, prompt) for prompt in given]
    assert decode.takes_padding(model, given[0], 0)
    seen = sizes(model)
    header = decode.prefill(model, HEADER)
    assert header is not None
    assert together(model, given, header=header) == expected
    assert seen[:3] == [(1, 10), (2, 4), (2, 1)]


def test_padding_longer_than_the_header() -> None:
    model = zoo.KINDS["mistral"]().eval()
    given = [[*HEADER[:2], 13], [*HEADER[:2], *range(8, 28)]]
    assert together(model, given, header=decode.prefill(model, HEADER[:2])) == [alone(model, item) for item in given]


def test_finished_rows_leave_the_batch() -> None:
    model = zoo.KINDS["llama"]().eval()
    given = prompts(12, seed=3, header=[])
    expected = [alone(model, prompt, 24) for prompt in given]
    assert decode.takes_padding(model, given[0], 0)
    seen = sizes(model)
    assert together(model, given, limits=[24] * 12) == expected
    rows = [count for count, _ in seen]
    assert rows == sorted(rows, reverse=True) and len(set(rows)) > 2
    longest = max(map(len, expected))
    assert sum(rows) < 0.75 * 12 * longest


def test_every_row_has_its_own_limit() -> None:
    model = zoo.KINDS["gpt2"]().eval()
    given = prompts(6, seed=1, header=[])
    limits = [1, 3, 12, 12, 7, 20]
    expected = [alone(model, prompt, limit) for prompt, limit in zip(given, limits, strict=True)]
    assert together(model, given, limits=limits) == expected


def test_a_row_draws_the_same_tokens_in_any_batch() -> None:
    model = zoo.KINDS["qwen3"]().eval()
    choice = decode.Choice(temperature=1.3, top_p=0.9, top_k=20, seed=5)
    given = prompts(8, seed=2, header=[])
    every = together(model, given, choice)
    assert together(model, given[3:5], choice, rows=[3, 4]) == every[3:5]
    assert together(model, [given[0]] * 8, choice) != [every[0]] * 8  # the rows differ in their numbers
    assert together(model, given, decode.Choice(temperature=1.3, seed=6)) != every


def test_the_frequencies_of_drawn_tokens_are_those_of_the_softmax() -> None:
    """4,000 rows of one prompt; a standard deviation is at most 0.008."""
    model = zoo.KINDS["llama"]().eval()
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    kept = logits.topk(6).indices
    expected = torch.zeros(zoo.WORDS).scatter(0, kept, (logits[kept] / 1.5).softmax(-1))
    drawn = together(model, [[5, 6, 7]] * 4000, decode.Choice(temperature=1.5, top_k=6), limits=[1] * 4000)
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=zoo.WORDS) / 4000
    assert float((counts - expected).abs().max()) < 0.035


def test_the_base_has_no_say_in_how_tokens_are_chosen() -> None:
    """BART's file forces a last token and asks for beams; others forbid or penalise tokens."""
    torch.manual_seed(0)
    model = zoo.KINDS["llama"]().eval()
    prompt = [5, 9, 3, 22]
    expected = together(model, [prompt])
    assert expected == [alone(model, prompt)]
    own = {"forced_eos_token_id": 7, "num_beams": 3, "repetition_penalty": 9.0, "suppress_tokens": expected[0][:1]}
    model.generation_config = GenerationConfig(**own)
    assert together(model, [prompt]) == expected
    assert model.generation_config.num_beams == 3


def test_positions_that_count_padding() -> None:
    """Learned positions from the first column on: rows of other lengths are decoded one at a time."""
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    model = BartForCausalLM(BartConfig(vocab_size=zoo.WORDS, max_position_embeddings=64, init_std=0.5, **sizes)).eval()
    model.generation_config = GenerationConfig()
    given = prompts(4, seed=4, header=[])
    assert not decode.takes_padding(model, given[0], 0)
    assert together(model, given) == [alone(model, prompt) for prompt in given]
