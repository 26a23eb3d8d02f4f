"""Prompts -> the tokens of their answers, by transformers' `generate`, in a batch that finished rows leave.

    header ── computed once ──┐
    prompts ── left-padded ───┴─> generate ── a quarter has finished ──> they leave the batch
                                     ^                                    │
                                     └──── the others, with their cache ──┘

Answers do not depend on the batch beyond rounding: every row draws its own random numbers, and padding is neither seen
nor penalised. B: rows of the batch, W: its width in tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from byeori.model import load
from byeori.model.forward import compute_device
from byeori.model.text_model import text_config

# The share of a batch that has to finish before it is made smaller, which copies the cache of the others.
_LEAVE = 4
# Kinds of layers that keep the keys and values of every token and nothing else.
_ATTENTION = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How the next token is chosen. temperature 0: the likeliest one. seed: of the numbers that each row draws."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """Tokens with which every prompt begins, and the keys and values of each layer for them, [heads, tokens, width]."""

    ids: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choice: Choice,
    *,
    rows: Sequence[int],
    limits: Sequence[int],
    pad: int,
    on_row: Callable[[int, list[int]], None],
    **options: Any,
) -> None:
    """Generate the answers of prompts; see `_decode`. Of a model that padding changes, one at a time."""
    options["pad"] = pad
    if len(set(map(len, prompts))) > 1 and not takes_padding(model, prompts[0], pad):
        for index, prompt in enumerate(prompts):

            def on_one(_: int, tokens: list[int], index: int = index) -> None:
                on_row(index, tokens)

            _decode(model, [prompt], choice, rows=[rows[index]], limits=[limits[index]], on_row=on_one, **options)
        return
    _decode(model, prompts, choice, rows=rows, limits=limits, on_row=on_row, **options)


@torch.no_grad()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choice: Choice,
    *,
    rows: Sequence[int],
    limits: Sequence[int],
    pad: int,
    stop_ids: Sequence[int],
    ended: Callable[[list[int]], bool],
    stop_strings: tuple[Any, str] | None = None,
    header: Header | None = None,
    streamer: Any = None,
    on_row: Callable[[int, list[int]], None],
) -> None:
    """Generate the answers of one batch of prompts (token ids, none empty), with the model as it is.

    rows: the number of each prompt, which enters its random numbers. limits: the most new tokens of each prompt.
    ended: whether new tokens are a whole answer. stop_strings: tokenizer and text that ends an answer too. on_row:
    called with the index of a prompt and its new tokens when it has finished; what follows a stop token has no meaning.
    """
    device = compute_device(model)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    cache = _header_cache(header, [width - len(prompt) for prompt in prompts]) if header else None
    left = list(range(len(prompts)))
    shrinks = only_attention(model)
    while left:
        leaving = -(-len(left) // _LEAVE) if shrinks else len(left)
        with _without_defaults(load.base_of(model)):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(limits[index] for index in left) - (ids.shape[1] - width),
                logits_processor=_processors(choice, mask, [rows[index] for index in left], width),
                stopping_criteria=[_Leave(leaving, width, stop_ids, stop_strings)],
                eos_token_id=list(stop_ids) or None,
                pad_token_id=pad,
                streamer=streamer,
                return_dict_in_generate=True,
                **({"past_key_values": cache} if cache is not None else {}),
            )
        ids, cache = output.sequences, output.get("past_key_values")
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        new = ids[:, width:].tolist()
        staying = [at for at, tokens in enumerate(new) if len(tokens) < limits[left[at]] and not ended(tokens)]
        for at in sorted(set(range(len(left))) - set(staying)):
            on_row(left[at], new[at])
        left = [left[at] for at in staying]
        if left:
            index = torch.tensor(staying, device=device)
            ids, mask = ids[index], mask[index]
            cache.reorder_cache(index)


@torch.no_grad()
def takes_padding(model: Any, prompt: Sequence[int], pad: int) -> bool:
    """Return whether a prompt's logits stay what they are behind padding: tried once.

    States of RWKV take it in; BART's decoders count positions from the first column; GIT shifts the mask.
    """
    causal = load.base_of(model)
    if not hasattr(causal, "byeori_takes_padding"):
        device, found = compute_device(model), []
        for width in (0, 3):
            ids = torch.tensor([[pad] * width + list(prompt[:4])], device=device)
            mask = torch.ones_like(ids)
            mask[:, :width] = 0
            with _without_defaults(causal):
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=2,
                    pad_token_id=pad,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            found.append(torch.cat(output.logits).float())
        plain, padded = found
        most = 1e-3 if load.compute_dtype(model) == torch.float32 else 0.1
        causal.byeori_takes_padding = float((padded - plain).norm()) <= most * float(plain.norm())
    return bool(causal.byeori_takes_padding)


@contextmanager
def _without_defaults(causal: Any) -> Iterator[None]:
    """Have `generate` choose the likeliest token inside: no beams, no forced or forbidden tokens of the base's file."""
    from transformers import GenerationConfig

    own, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        yield
    finally:
        causal.generation_config = own


@torch.no_grad()
def prefill(model: Any, ids: Sequence[int]) -> Header | None:
    """Return a header's keys and values; None if the model keeps more than these of a token, or in another form."""
    from transformers import DynamicCache

    if not only_attention(model):
        return None
    device = compute_device(model)
    cache = DynamicCache()
    model(input_ids=torch.tensor([list(ids)], device=device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    whole = [type(layer).__name__ == "DynamicLayer" and layer.get_seq_length() == len(ids) for layer in cache.layers]
    if not whole or not all(whole):
        return None
    layers: Any = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
    return Header(ids=tuple(ids), layers=tuple(layers))


def only_attention(model: Any) -> bool:
    """Return whether every layer is plain attention, whose cache can be cut to some rows and begin with a header.

    Other layers, which carry a state, may take padding for text: their batches need prompts of one length.
    """
    causal = load.base_of(model)
    kinds = set(getattr(text_config(causal.config), "layer_types", None) or ())
    return not getattr(causal, "_is_stateful", False) and not kinds - _ATTENTION


def _header_cache(header: Header, padding: list[int]) -> Any:
    """Return a cache of the first columns of a batch: each row's padding, then as much of the header as still fits.

    A row's tokens stay next to each other, as sliding windows count columns; what does not fit is computed again, in
    the columns where shorter rows would otherwise have padding.
    """
    from transformers import DynamicCache

    device = header.layers[0][0].device
    columns = torch.arange(len(header.ids), device=device)
    source = (columns - torch.tensor(padding, device=device)[:, None]).clamp(min=0)  # [B, header]; padding is masked
    return DynamicCache([tuple(part[:, source].transpose(0, 1) for part in layer) for layer in header.layers])


# ---- what generate calls at every token ---------------------------------------------------------------------------


def _Leave(count: int, width: int, stop_ids: Sequence[int], stop_strings: tuple[Any, str] | None) -> Any:
    """Return a criterion that ends a call of generate once `count` rows have finished."""
    from transformers import StoppingCriteria, StopStringCriteria

    class Leave(StoppingCriteria):
        """Counts the rows that have finished."""

        def __init__(self) -> None:
            self.text = StopStringCriteria(stop_strings[0], [stop_strings[1]]) if stop_strings else None
            self.done: torch.Tensor | None = None

        def __call__(self, input_ids: torch.Tensor, scores: Any, **given: Any) -> torch.Tensor:
            now = torch.isin(input_ids[:, -1], torch.tensor(list(stop_ids), device=input_ids.device))
            if self.text is not None:
                now = now | self.text(input_ids, scores)
            self.done = now if self.done is None else self.done | now
            return torch.full_like(self.done, True) if int(self.done.sum()) >= count else self.done

    return Leave()


def _processors(choice: Choice, mask: torch.Tensor, rows: Sequence[int], width: int) -> list[Any]:
    """Return what turns the logits of a step into a choice: the repetition penalty, then a drawn token."""
    chosen: list[Any] = []
    if choice.repetition_penalty != 1.0:
        chosen.append(_repetition_penalty(choice.repetition_penalty, mask))
    if choice.temperature:
        chosen.append(_draw(choice, rows, width))
    return chosen


def _repetition_penalty(penalty: float, mask: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return transformers' repetition penalty, applied to real tokens only (Keskar et al. 2019, CTRL).

    The padding is often the end-of-text token as well, which must not be penalised because a prompt was padded.
    """

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        real = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1).bool()
        ids = torch.where(real, ids, ids[:, mask.shape[1] - 1 :][:, :1])
        seen = scores.gather(1, ids)
        return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))

    return process


def _draw(choice: Choice, rows: Sequence[int], width: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return transformers' warpers followed by a draw: the inverse of the distribution at a number of the row's own.

    The number depends on the seed, the row and the place in its answer, and on no other row.
    """
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: list[Any] = [TemperatureLogitsWarper(float(choice.temperature))]
    if choice.top_k:
        warpers.append(TopKLogitsWarper(choice.top_k))
    if choice.top_p < 1:
        warpers.append(TopPLogitsWarper(choice.top_p))

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warper in warpers:
            scores = warper(ids, scores)
        sums = scores.double().softmax(dim=-1).cumsum(dim=-1)  # [B, vocabulary]
        place = ids.shape[1] - width
        drawn = [random.Random(f"{choice.seed} {row} {place}").random() for row in rows]
        numbers = torch.tensor(drawn, dtype=sums.dtype, device=sums.device)[:, None]
        token = torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    return process
