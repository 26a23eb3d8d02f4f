"""Pieces of documents: nothing is lost, no token is trained twice, and each is predicted from the token before it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from byeori.data import documents, tokenize
from byeori.errors import TemplateError
from tiny_models import byte_level_tokenizer


def encoding_of(cutoff_len: int, *, bos: bool, eos: bool = True) -> tokenize.Encoding:
    tokenizer: Any = byte_level_tokenizer()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
        )
    return tokenize.make_encoding(
        tokenizer,
        documents.template_of("글"),
        cutoff_len=cutoff_len,
        add_eos_token=eos,
        train_on_inputs=False,
    )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_every_token_is_trained_once(bos: bool, eos: bool) -> None:
    draw = random.Random(4)
    for _ in range(60):
        cutoff = draw.randint(8, 40)
        text = "".join(draw.choice("가나 다라\n마바사abc .") for _ in range(draw.randint(1, 400))) + "."
        encoding = encoding_of(cutoff, bos=bos, eos=eos)
        pieces = documents.encode_document({"글": text, "__row__": 5}, encoding)
        plain = encoding.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = [*encoding.prefix, *plain, *([encoding.eos] if eos else [])]
        trained = [token for piece in pieces for a, b in piece.targets for token in piece.token_ids[a:b]]
        assert trained == whole[1:]  # but the very first, which nothing comes before
        assert all(len(piece.token_ids) <= cutoff for piece in pieces)
        assert [piece.piece for piece in pieces] == list(range(1, len(pieces) + 1))
        place = 1
        for piece in pieces:
            assert tuple(piece.token_ids[: len(encoding.prefix)]) == encoding.prefix
            ((start, end),) = piece.targets
            assert piece.token_ids[start - 1] == whole[place - 1]  # what its first token is predicted from
            place += end - start


def test_a_short_document_is_one_piece_and_an_empty_one_none() -> None:
    encoding = encoding_of(64, bos=False)
    assert len(documents.encode_document({"글": "짧은 글"}, encoding)) == 1
    for value in ("", "  \n", None, ["x"]):
        with pytest.raises(TemplateError):
            documents.encode_document({"글": value}, encoding)
