"""Tokens without a row in the embedding, and rows that were never trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from byeori.errors import ModelError
from byeori.model import embedding_rows
from tiny_models import byte_level_tokenizer, tiny_llama


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_read_without_the_model(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    tiny_llama(600, tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    found = embedding_rows.embeddings(tmp_path)
    names = ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]
    assert [stored.shape for stored in found] == [(600, 32)] * len(names)
    for stored, name in zip(found, names, strict=True):
        ids = [599, 0, 77]
        assert torch.equal(torch.from_numpy(embedding_rows.read_rows(stored, ids)), whole[name][ids].float())


def test_a_folder_without_weights_has_none(tmp_path: Path) -> None:
    assert embedding_rows.embeddings(tmp_path) == []


def test_rows_that_were_never_trained(tmp_path: Path) -> None:
    model = tiny_llama(600)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        mean = rows.mean(0)
        rows[10] = 0
        rows[11] = rows[300] * 1e-5  # as Llama 3's base has its header tokens
        rows[12] = rows[13] = mean  # as a resized embedding has them
        rows[14] = mean + 1e-4 * mean.norm() * torch.randn(32) / 32**0.5
        rows[15] = rows[300] * 1.5
    model.save_pretrained(tmp_path)
    stored, head = embedding_rows.embeddings(tmp_path)
    added = list(range(10, 20))
    assert embedding_rows.untrained(stored, set(added), added) == [10, 11, 12, 13, 14]
    assert embedding_rows.untrained(stored, {12, 15, 16}, added) == [12]  # equal to one that the rows do not have
    assert embedding_rows.untrained(head, set(added), added) == []


def test_a_token_beyond_the_embedding() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    number = tokenizer.convert_tokens_to_ids("<|new|>")
    embedding_rows.check_ids({number - 1}, number, tokenizer, "base")
    with pytest.raises(ModelError) as caught:
        embedding_rows.check_ids({1, number}, number, tokenizer, "base")
    assert str(caught.value).startswith(
        f"the tokenizer makes token {number} ('<|new|>') of the rows, and the embedding of base has {number} rows: "
        "resize it (model.resize_token_embeddings)"
    )
