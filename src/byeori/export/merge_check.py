"""Compare the logits of a merged model with those of the adapter on its base, on prompts as in training.

    saved template + training rows ──> prompts ──> logits of base with adapter ─┐
                                          └──────> logits of the merged model ──┴─> largest and mean difference

Both are loaded in float32, one after the other. The verdict depends on the difference from the adapter merged by PEFT
and rounded like the file: a merge is not wrong because its dtype is coarse.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from byeori.artifacts import saved_model, tokenizer_files
from byeori.data import row_kinds, sources, tokenize
from byeori.data.row_kinds import RowKind
from byeori.data.tokenize import Encoding
from byeori.errors import ByeoriError, ModelError, TemplateError
from byeori.export.merge_plan import FLOATS, MergedModel
from byeori.model.adapter import load_adapter
from byeori.model.load import load_model
from byeori.support.text_files import one_line

TEXTS = (
    "다음 글에 알맞은 제목을 지어 주세요: 마을 도서관 앞 건널목에 신호등이 없어 아이들이 위험하게 길을 건넙니다.",
    "Write a title for this text: There is no traffic light at the crossing in front of the village library.",
)
"""Fill the template if the training rows are not available."""

TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2**-7, "bfloat16": 2**-4}
"""The largest difference of a logit that rounding may cause, as a share of the largest logit.

Rounding changes a weight by at most 2^-8 (bfloat16) or 2^-11 (float16) of its value, and layers add these errors up:
16 times that is allowed for one logit, once for their mean. In float32 only the order of the sums differs. Gemma 3 270M
with an adapter on every layer stays below a third of these in every dtype.
"""

_PROMPTS = 2
_LONGEST_PROMPT = 256
_LONGEST_TEMPLATE = 1024  # for a template that is longer than a prompt should be
_ROWS_READ = 10


def coarsest_dtype(model: MergedModel) -> str:
    """Return torch's name of the least precise dtype among the merged weights."""
    names = {code: name for name, code in FLOATS.items()}
    return max((names[item.dtype] for item in model.tensors if item.change), key=lambda name: TOLERANCE[name])


def compare(merged: Path, model: MergedModel) -> tuple[dict[str, Any], str]:
    """Compare a merged model's folder with the adapter on its base, in float32; on the GPU if they fit.

    Returns what was measured, for merge_report.json, and in what they differ ("" if they do not).

    Raises:
        ModelError: if one of the models cannot be loaded.
    """
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 5 * model.parameters
    device = torch.device("cuda" if fits else "cpu")
    tuned = load_model(str(model.base), dtype=torch.float32, device=device)
    rows, origin = prompts(merged, tuned.config.get_text_config())
    try:
        tuned = load_adapter(tuned, model.adapter)[0].eval()
    except Exception as error:  # PEFT raises a different class for each way in which an adapter can be wrong
        raise ModelError(f"PEFT cannot load {model.adapter}: {one_line(error)}") from None
    expected = _logits(tuned, rows)
    with tuned.disable_adapter():
        effect = (expected - _logits(tuned, rows)).abs().max().item()
    dtype = coarsest_dtype(model)
    rounded = _logits(tuned, rows) if _merge_and_round(tuned, getattr(torch, dtype)) else expected
    del tuned
    gc.collect()  # PEFT's wrappers are cycles; free the first model before loading the second
    actual = _logits(load_model(str(merged), dtype=torch.float32, device=device), rows)
    difference, beyond = (actual - expected).abs(), (actual - rounded).abs()
    largest = expected.abs().max().item()
    tolerance = TOLERANCE[dtype] * largest
    most, mean = beyond.max().item(), beyond.mean().item()
    # a wrong scale moves every logit a little, rounding a few of them far; NaN compares as different
    same = most <= tolerance and mean <= tolerance / 16
    reason = (
        f"beyond rounding, logits differ by up to {most:.3g} and by {mean:.3g} on average "
        f"({tolerance:.3g} and {tolerance / 16:.3g} are allowed in {dtype})"
    )
    measured = {
        "max_abs_difference": difference.max().item(),
        "mean_abs_difference": difference.mean().item(),
        "beyond_rounding": most,
        "mean_beyond_rounding": mean,
        "max_logit": largest,
        "tolerance": tolerance,
        "adapter_effect": effect,
        "same_top_token": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "positions": len(expected),
        "prompts": len(rows),  # not their texts, which may be private, while the report is published
        "prompts_from": origin,
    }
    return measured, "" if same else reason


@torch.no_grad()
def _merge_and_round(model: Any, dtype: torch.dtype) -> bool:
    """Merge the adapter with PEFT and round the weights to `dtype`, as in the merged file.

    Returns False, with nothing done, if a weight has two owners: PEFT would change it for both.
    """
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
        for rows, origin in ((_trained_rows(saved.settings), "training rows"), (_texts(encoding), "fixed texts")):
            if ids := list(islice(_encoded(rows, encoding, row_kinds.recorded(saved.settings)), _PROMPTS)):
                return ids, f"{origin} in {place}"
    return plain, f"fixed texts, because {place} is too long"


def _trained_rows(settings: dict[str, Any]) -> Iterable[Mapping[str, Any]]:
    """Return the first rows of the run with these settings; none if its tables are not here any more."""
    paths = settings.get("data_path") or []
    if not sources.are_local(paths):
        return []
    try:
        return sources.load_rows(paths, split=settings["dataset_split"], max_rows=_ROWS_READ).rows
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


@torch.inference_mode()
def _logits(model: Any, rows: list[list[int]]) -> torch.Tensor:
    """Return the logits [positions of all prompts, vocabulary] on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([model(torch.tensor([row], device=device)).logits[0].float().cpu() for row in rows])
