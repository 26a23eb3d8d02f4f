"""The prompts on which models are compared: those of the training rows, if they are here.

saved template + training rows ──> token ids of prompts; without rows, of fixed texts in the template
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from byeori.artifacts import saved_model, tokenizer_files
from byeori.data import places, row_kinds, sources, tokenize
from byeori.data.row_kinds import RowKind
from byeori.data.tokenize import Encoding
from byeori.errors import ByeoriError, TemplateError

TEXTS = (
    "다음 글에 알맞은 제목을 지어 주세요: 마을 도서관 앞 건널목에 신호등이 없어 아이들이 위험하게 길을 건넙니다.",
    "Write a title for this text: There is no traffic light at the crossing in front of the village library.",
)
"""Fill the template if the training rows are not available."""

_PROMPTS = 2
_LONGEST_PROMPT = 256
_LONGEST_TEMPLATE = 1024  # for a template that is longer than a prompt should be
_ROWS_READ = 10


def prompts(merged: Path, config: Any) -> tuple[list[list[int]], str]:
    """Return the token ids of the prompts, and a description of their origin.

    merged: the folder of the merged model, with the adapter's tokenizer, template and settings. Its template is filled
    with rows it was trained on, if they are available, else with fixed texts. config: the model's text config.
    """
    longest = min(_LONGEST_PROMPT, getattr(config, "max_position_embeddings", None) or _LONGEST_PROMPT)
    if not tokenizer_files.there(merged):
        return [[byte % config.vocab_size for byte in text.encode()][:longest] for text in TEXTS], "bytes of texts"
    saved = saved_model.find(str(merged))
    plain = [saved.tokenizer(text)["input_ids"][:longest] for text in TEXTS]
    try:
        template = saved_model.template_of(saved, None)
        encoding = saved_model.encoding(saved, template)
    except TemplateError:  # neither a template nor a chat template
        return plain, "fixed texts without a template"
    place = "the saved template" if template else "the tokenizer's chat template"
    for cutoff_len in (longest, min(_LONGEST_TEMPLATE, saved.max_length or _LONGEST_TEMPLATE)):
        encoding = replace(encoding, cutoff_len=cutoff_len)
        trained = _trained_rows(saved.settings, encoding)
        for rows, origin in ((trained, "training rows"), (_texts(encoding), "fixed texts")):
            if ids := list(islice(_encoded(rows, encoding, row_kinds.recorded(saved.settings)), _PROMPTS)):
                return ids, f"{origin} in {place}"
    return plain, f"fixed texts, because {place} is too long"


def _trained_rows(settings: dict[str, Any], encoding: Encoding) -> Iterable[Mapping[str, Any]]:
    """Return the first rows of the run with these settings; none if its tables are not here any more."""
    paths = settings.get("data_path") or []
    if not places.are_local(paths):
        return []
    try:
        columns = encoding.template.columns if encoding.template else []
        return sources.load_recorded(settings, max_rows=_ROWS_READ).with_columns(columns, optional=columns).rows
    except (ByeoriError, KeyError):
        return []


def _texts(encoding: Encoding) -> Iterable[Mapping[str, Any]]:
    if encoding.template:
        return [dict.fromkeys(encoding.template.prompt_columns, text) for text in TEXTS]
    return [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]


def _encoded(rows: Iterable[Mapping[str, Any]], encoding: Encoding, row_kind: RowKind) -> Iterator[list[int]]:
    """Yield the token ids of the rows' prompts, skipping unusable rows. Fixed texts have no answers of the kind's."""
    for row in rows:
        kind = row_kind if set(row_kind.answer_columns) <= set(row) else row_kinds.ANSWER
        try:
            ids = tokenize.encode_prompt(kind.asked(row, encoding.template), encoding)
        except TemplateError:
            continue
        if ids:
            yield ids
