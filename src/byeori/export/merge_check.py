"""Is the merged model the adapter on its base? Their logits, on prompts like those that the adapter was trained with.

    saved template + training rows ──> prompts ──> logits of base with adapter ─┐
                                          └──────> logits of the merged model ──┴─> largest and mean difference

Both are loaded in float32, one after the other. What decides is the difference from the adapter merged by PEFT and
rounded as the file is: a merge is not wrong because its type is coarse.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import saved_model
from byeori.artifacts.model_card import TOKENIZER_FILES
from byeori.data import row_kinds, sources, tokenize
from byeori.data.row_kinds import RowKind
from byeori.data.tokenize import Encoding
from byeori.errors import ByeoriError, ModelError, TemplateError
from byeori.support.text_files import one_line

TEXTS = (
    "다음 글에 알맞은 제목을 지어 주세요: 마을 도서관 앞 건널목에 신호등이 없어 아이들이 위험하게 길을 건넙니다.",
    "Write a title for this text: There is no traffic light at the crossing in front of the village library.",
)
"""What fills the template where the training rows are not here (any more)."""

TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2**-7, "bfloat16": 2**-4}
"""Largest difference of a logit that rounding may cause, as a share of the largest logit.

A weight is rounded by at most 2^-8 (bfloat16) or 2^-11 (float16) of itself, and layers add these errors up: 16 times
that is allowed for one logit, once for their mean. In float32 only the order of the sums differs. Gemma 3 270M with
an adapter on every layer stays below a third of these in every type.
"""

_PROMPTS = 2
_LONGEST_PROMPT = 256
_LONGEST_TEMPLATE = 1024  # for one whose own words are longer than a prompt should be
_ROWS_ASKED = 10


def compare(base: Path, adapter: Path, merged: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Logits of base with adapter, and of the merged model, both in float32; on the GPU where they fit.

    facts: dtype and parameters of the merged model. Returns what merge_report.json says of it.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    from peft import PeftModel

    from byeori.model.light import without_bitsandbytes
    from byeori.model.load import load_model

    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 5 * facts["parameters"]
    device = torch.device("cuda" if fits else "cpu")
    model = load_model(str(base), dtype=torch.float32, device=device)
    rows, origin = prompts(merged, model.config.get_text_config())
    try:
        with without_bitsandbytes(model):
            model = PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # PEFT raises a different kind for each way in which an adapter can be wrong
        raise ModelError(f"PEFT cannot load {adapter}: {one_line(error)}") from None
    wanted = _logits(model, rows)
    with model.disable_adapter():
        effect = (wanted - _logits(model, rows)).abs().max().item()
    rounded = _logits(model, rows) if _round(model, getattr(torch, facts["dtype"])) else wanted
    del model
    gc.collect()  # PEFT's wrappers are cycles; the second model must not stand beside the first
    got = _logits(load_model(str(merged), dtype=torch.float32, device=device), rows)
    difference, beyond = (got - wanted).abs(), (got - rounded).abs()
    largest = wanted.abs().max().item()
    tolerance = TOLERANCE[facts["dtype"]] * largest
    # a wrong scale moves every logit a little, rounding a few of them far; written so that NaN is different
    same = bool((beyond <= tolerance).all()) and beyond.mean().item() <= tolerance / 16
    return {
        "verdict": "equal" if same else "different",
        "max_abs_difference": difference.max().item(),
        "mean_abs_difference": difference.mean().item(),
        "beyond_rounding": beyond.max().item(),
        "mean_beyond_rounding": beyond.mean().item(),
        "max_logit": largest,
        "tolerance": tolerance,
        "adapter_effect": effect,
        "same_top_token": (got.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        "positions": len(wanted),
        "prompts": len(rows),  # their texts may be private, and the report is published
        "prompts_from": origin,
    }


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype) -> bool:
    """Merge the adapter by PEFT and round its weights as the file's are, so that rounding is no difference to the
    merged model; False, and nothing done, where a weight has two owners, which PEFT would change for both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    if any(owners[id(layer.weight)] > 1 for layer in layers):
        return False
    model.merge_adapter()
    for layer in layers:
        layer.weight.copy_(layer.weight.to(dtype))
    return True


# ---- prompts ---------------------------------------------------------------------------------------------------


def prompts(merged: Path, config: Any) -> tuple[list[list[int]], str]:
    """Token ids of the prompts, and where they are from in words.

    merged: the folder of the merged model, where the adapter's tokenizer, template and settings lie too. Its template
    is filled with rows that it was trained on, where they are here, else with fixed texts.
    """
    longest = min(_LONGEST_PROMPT, getattr(config, "max_position_embeddings", None) or _LONGEST_PROMPT)
    if not any((merged / name).is_file() for name in TOKENIZER_FILES):
        return [[byte % config.vocab_size for byte in text.encode()][:longest] for text in TEXTS], "bytes of texts"
    found = saved_model.find(str(merged))
    plain = [found.tokenizer(text)["input_ids"][:longest] for text in TEXTS]
    try:
        chosen = saved_model.template_of(found, None)
        how = saved_model.encoding(found, chosen)
    except TemplateError:  # neither a template nor a chat template
        return plain, "fixed texts without a template"
    where = "the saved template" if chosen else "the tokenizer's chat template"
    for cutoff_len in (longest, min(_LONGEST_TEMPLATE, found.positions or _LONGEST_TEMPLATE)):
        how = replace(how, cutoff_len=cutoff_len)
        for rows, origin in ((_trained_rows(found.settings), "training rows"), (_texts(how), "fixed texts")):
            if ids := list(islice(_encoded(rows, how, row_kinds.recorded(found.settings)), _PROMPTS)):
                return ids, f"{origin} in {where}"
    return plain, f"fixed texts, for {where} is too long"


def _trained_rows(run: dict[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The first rows of a run; none where its tables are not here (any more). run: its settings."""
    paths = run.get("data_path") or []
    if not sources.are_local(paths):
        return
    try:
        table = sources.load_rows(paths, split=run["dataset_split"], max_rows=_ROWS_ASKED)
    except (ByeoriError, KeyError):
        return
    yield from table.rows


def _texts(how: Encoding) -> Iterator[Mapping[str, Any]]:
    for text in TEXTS:
        if how.template:
            yield dict.fromkeys(how.template.prompt_columns, text)
        else:
            yield {"messages": [{"role": "user", "content": text}]}


def _encoded(rows: Iterator[Mapping[str, Any]], how: Encoding, row_kind: RowKind) -> Iterator[list[int]]:
    """Prompts as token ids; rows that make none are passed over, fixed texts have no answers of the kind's."""
    for row in rows:
        kind = row_kind if set(row_kind.answer_columns) <= set(row) else row_kinds.ANSWER
        try:
            ids = tokenize.encode_prompt(kind.asked(row, how.template), how)
        except TemplateError:
            continue
        if ids:
            yield ids


@torch.inference_mode()
def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """[positions of all prompts, words] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows])
