"""Do tokens and the embedding fit? Known from the headers of the weights and a few of their rows.

A tokenizer may have tokens that were added without resizing the embedding, and a base model tokens that it was never
trained on: Llama 3's <|start_header_id|> is zero in the base, tokens that were added later are all equal.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from byeori.errors import ByeoriError, ConfigError, ModelError
from byeori.model import load
from byeori.model.fingerprint import Stored, stored_tensors

_INPUT = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
_OUTPUT = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_WHOLE = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|lm_head|embed_out)"
    r"(\.modules_to_save(\.default)?|\.base_layer|\.token_adapter\.base_layer)*\.weight$"
)
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_SAMPLE = 256  # rows that say how long a trained row is
_SHORT, _NEAR = 1e-3, 1e-2  # of a trained row's length; of the longer row


def embeddings(folder: Path) -> list[Stored]:
    """Return the input embedding of a model's folder, and its output layer if that has weights of its own; or none."""
    try:
        tensors = stored_tensors(folder)
    except ByeoriError:  # whoever loads the weights says what is wrong with them
        return []
    found = [sorted(filter(pattern.search, tensors), key=len)[:1] for pattern in (_INPUT, _OUTPUT)]
    return [tensors[name] for names in found for name in names if len(tensors[name].shape) == 2]


def check_ids(used: Collection[int], rows: int, tokenizer: Any, name: str) -> None:
    """Raise where a token has no row in the embedding. rows: of the embedding of the model `name`.

    Raises:
        ModelError: naming the first of them.
    """
    beyond = sorted(number for number in used if number >= rows)
    if beyond:
        raise ModelError(
            f"the tokenizer makes token {beyond[0]} ({tokenizer.convert_ids_to_tokens(beyond[0])!r}) of the rows, and "
            f"the embedding of {name} has {rows} rows: resize it (model.resize_token_embeddings) and save the model, "
            "or use a tokenizer and a --chat_template without the added tokens"
        )


def untrained(stored: Stored, used: Collection[int], added: Sequence[int]) -> list[int]:
    """Return those of the used tokens whose rows were never trained: next to zero, or equal to that of another token.

    stored: an embedding [vocabulary, hidden]. added: the added tokens, which the used ones are compared with.
    """
    if stored.dtype not in _DTYPES:
        return []
    ids = sorted({number for number in (*used, *added[:_SAMPLE]) if number < stored.shape[0]})
    rows = read_rows(stored, ids)
    ordinary = np.linspace(0, stored.shape[0] - 1, min(_SAMPLE, stored.shape[0])).astype(int)
    length = np.median(np.linalg.norm(read_rows(stored, ordinary.tolist()), axis=1))
    lengths = np.linalg.norm(rows, axis=1)
    apart = lengths[:, None] ** 2 + lengths[None] ** 2 - 2 * rows @ rows.T  # squared; exact enough for _NEAR
    np.fill_diagonal(apart, np.inf)
    equal = (apart < (_NEAR * np.maximum(lengths[:, None], lengths[None])) ** 2).any(axis=1)
    bad = (lengths < _SHORT * length) | equal
    return [number for number, is_bad in zip(ids, bad, strict=True) if is_bad and number in used]


def read_rows(stored: Stored, ids: Sequence[int]) -> np.ndarray:
    """Return rows of a stored matrix as float32 [ids, columns]."""
    dtype, width = _DTYPES[stored.dtype], stored.shape[1]
    out = np.empty((len(ids), width), dtype=np.float32)
    with stored.path.open("rb") as file:
        for place, number in enumerate(ids):
            file.seek(stored.start + number * width * dtype.itemsize)
            row = np.frombuffer(file.read(width * dtype.itemsize), dtype=dtype)
            out[place] = (row.astype(np.uint32) << 16).view(np.float32) if stored.dtype == "BF16" else row
    return out


def is_embedding(name: str) -> bool:
    """Return whether a tensor of an adapter is a whole embedding or head."""
    return _WHOLE.search(name) is not None


def resize(causal: Any, rows: int | None, *, shrink: bool = False) -> None:
    """Give embedding and head so many rows, unless they have more; new ones are the mean of the others.

    shrink: take away surplus rows. rows: None is as many as there are.

    Raises:
        ConfigError: if the weights are sharded.
    """
    import torch
    from torch.distributed.tensor import DTensor

    weight = causal.get_input_embeddings().weight
    have = weight.shape[0]
    if rows is None or rows == have or (rows < have and not shrink):
        return
    if isinstance(weight, DTensor):
        raise ConfigError(f"the embedding needs {rows} rows, and sharded weights are not resized; use --parallel ddp")
    matrices = {id(each.weight): each for each in (causal.get_input_embeddings(), causal.get_output_embeddings())}
    means = [each.weight.detach().float().mean(dim=0) for each in matrices.values()]
    with load.quiet():
        causal.resize_token_embeddings(rows, mean_resizing=False)
    fresh = {id(each.weight): each for each in (causal.get_input_embeddings(), causal.get_output_embeddings())}
    with torch.no_grad():
        for each, mean in zip(fresh.values(), means, strict=True):
            each.weight[have:] = mean.to(each.weight.dtype)
            each.weight.requires_grad_(False)
