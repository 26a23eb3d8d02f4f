"""A document of plain text -> pieces of at most cutoff_len tokens (continued pretraining).

    tokens    <bos> a b c d e <eos>     cutoff_len 4
    pieces    <bos> a b c | <bos> c d e | <bos> e <eos>
    trained         a b c |         d e |         <eos>

Every token is trained once: a piece begins with the last token of the piece before it, which its first trained token is
predicted from. Pieces are units of their own: a step may have some of a document.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace

from byeori.data.template import Template, parse
from byeori.data.tokenize import Encoding, Example, encode_row


def template_of(column: str) -> Template:
    """Return the template of a document: its text alone, all of which is trained.

    Raises:
        TemplateError: if the column's name has braces.
    """
    return parse(f"{{{column}}}", "text")


def encode_document(row: Mapping[str, object], encoding: Encoding) -> list[Example]:
    """Return the pieces of a document.

    Raises:
        TemplateError: if it is empty or not text.
    """
    whole = encode_row(row, replace(encoding, cutoff_len=sys.maxsize))
    ids, prefix, most = list(whole.token_ids), list(encoding.prefix), encoding.cutoff_len
    pieces = [replace(whole, token_ids=ids[:most], targets=((whole.targets[0][0], min(most, len(ids))),), piece=1)]
    at = most
    while at < len(ids):
        before = [*prefix, ids[at - 1]]
        piece = before + ids[at : at + most - len(before)]
        pieces.append(replace(whole, token_ids=piece, targets=((len(before), len(piece)),), piece=len(pieces) + 1))
        at += len(piece) - len(before)
    return pieces
