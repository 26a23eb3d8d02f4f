"""Compare the logits of a merged model with those of the adapter on its base, on prompts as in training.

    prompts ──> logits of base with adapter ─┐
       └──────> logits of the merged model ──┴─> largest and mean difference

All are computed in float32 by models whose weights are read while they run (streamed_model), so the check needs the
memory of the largest layer. The verdict depends on the difference from the adapter merged by PEFT and rounded like the
file: a merge is not wrong because its dtype is coarse. After training in 4 or 8 bit, the distance from the model that
was trained is measured too.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from byeori.errors import ConfigError, ModelError
from byeori.export import base_names, streamed_model
from byeori.export.adapter_changes import adapter_tensors
from byeori.export.base_names import parameter_names
from byeori.export.check_prompts import prompts
from byeori.export.merge_plan import MergedModel, Progress
from byeori.kernels import grouped_experts
from byeori.model import adapter as peft_adapter
from byeori.model import packed
from byeori.model.load import base_of
from byeori.model.opened import DTYPES, FLOATS, Source, read
from byeori.model.skeleton import layers_of
from byeori.support.text_files import one_line
from byeori.train import memory

TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2**-7, "bfloat16": 2**-4}
"""The largest difference of a logit that rounding may cause, as a share of the largest logit.

Rounding changes a weight by at most 2^-8 (bfloat16) or 2^-11 (float16) of its value, and layers add these errors up:
16 times that is allowed for one logit, once for their mean. In float32 only the order of the sums differs. Gemma 3 270M
with an adapter on every layer stays below a third of these in every dtype.
"""

DISTANCE_LIMIT = 0.25
"""How far a merged model may be from the one that was trained, as a share of the plain base's distance from it."""

_MOST_LOGITS = 1 << 24  # of one model: 64 MiB


def coarsest_dtype(model: MergedModel) -> str:
    """Return torch's name of the least precise dtype among the merged weights."""
    names = {code: name for name, code in FLOATS.items()}
    return max((names[item.dtype] for item in model.tensors if item.change), key=lambda name: TOLERANCE[name])


def compare(
    merged: Path, model: MergedModel, on_progress: Progress = lambda done, total: None
) -> tuple[dict[str, Any], str]:
    """Compare a merged model's folder with the adapter on its base, in float32; on a GPU if there is one.

    Returns what was measured, for merge_report.json, and in what they differ ("" if they do not).

    Raises:
        ModelError: if one of the models cannot be loaded. MemoryError: if the largest layer does not fit.
    """
    check = _Check(merged, model, on_progress)
    if (needed := check.needs()) > (free := memory.available_bytes(check.device)):
        raise MemoryError(f"the check needs {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free")
    expected, rounded, actual = check.adapted(model.plain), check.rounded(), check.merged()
    dtype = coarsest_dtype(model)
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
        "same_top_token": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "positions": len(expected),
        "prompts": len(check.rows),  # not their texts, which may be private, while the report is published
        "prompts_from": check.origin,
    }
    if model.vocabulary is None:
        plain = check.plain()
        measured["adapter_effect"] = (expected - plain).abs().max().item()
        if model.trained:
            measured |= _distances(check, actual, plain)
    return measured, "" if same else reason


def _distances(check: _Check, actual: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
    """How far the merged model and the plain base are from the model that was trained."""
    try:
        trained = check.adapted({**check.model.plain, **check.model.trained})
    except ConfigError as error:  # bitsandbytes is not installed here
        return {"distance_not_measured": str(error)}
    away = check.distance(plain, trained)
    return {
        "distance": check.distance(actual, trained),
        "plain_base_distance": away,
        "distance_limit": DISTANCE_LIMIT * away,
    }


def _needs_weight(layer: Any) -> bool:
    """Whether PEFT's layer computes with the base's weight, not only with its output: all but plain LoRA do."""
    variant = bool(getattr(layer, "lora_variant", None))
    return variant or not hasattr(layer, "lora_A") or hasattr(layer, "parameter_name")


def _nested(tuned: Any) -> set[int]:
    """Wrappers inside others, by id; these run for them."""
    return {id(each.base_layer) for each in tuned.modules() if hasattr(each, "parameter_name")}


def _is_real(weight: torch.Tensor | None) -> bool:
    return weight is not None and not weight.is_meta


class _Check:
    """One batch of prompts, and the logits of every model on it. passes: how many models there will be."""

    def __init__(self, folder: Path, model: MergedModel, on_progress: Progress) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.folder, self.model, self._on_progress = folder, model, on_progress
        self._passes = 3 + (model.vocabulary is None) * (1 + bool(model.trained))
        self._done = 0
        self.config = config = base_names.empty_model(folder).config.get_text_config()
        self.rows, self.origin = prompts(folder, config)
        # the last positions of every prompt, where the answer begins
        most = max(1, _MOST_LOGITS // config.vocab_size // len(self.rows))
        self.kept = [(row, place) for row, ids in enumerate(self.rows) for place in range(len(ids))[-most:]]

    def plain(self) -> torch.Tensor:
        """Return the logits of the base without the adapter."""
        return self._logits(self._base(self.model.plain))

    def adapted(self, sources: Mapping[str, Source]) -> torch.Tensor:
        """Return the logits of the adapter on a base, as PEFT computes them."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuned = self._tuned(sources)
        nested = _nested(tuned)
        for module in tuned.modules():
            if isinstance(module, BaseTunerLayer) and _needs_weight(module) and id(module) not in nested:
                module.register_forward_pre_hook(lambda layer, args: streamed_model.fill(layer, self.device))
                module.register_forward_hook(lambda layer, args, output: streamed_model.empty(layer))
        return self._logits(tuned)

    def rounded(self) -> torch.Tensor:
        """Return the logits of the adapter merged by PEFT, layer by layer, and rounded as in the merged file."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        tuned = self._tuned(self.model.plain)
        nested = _nested(tuned)
        dtypes = {
            item.change.fused.parameter if item.change.fused else item.parameter: DTYPES[item.dtype]
            for item in self.model.tensors
            if item.change
        }

        def merge(layer: Any, args: Any, *, name: str) -> None:
            base = layer.get_base_layer()
            layer.byeori_own = {short: weight for short, weight in base._parameters.items() if _is_real(weight)}
            for short, weight in layer.byeori_own.items():  # came with the adapter, and is needed again
                base._parameters[short] = torch.nn.Parameter(weight.clone(), requires_grad=False)
            streamed_model.fill(layer, self.device)
            for each in grouped_experts.wrappers(layer):
                each.merge()
            for short, parameter in base.named_parameters(recurse=False):
                kept = dtypes.get(f"{name}.{short}", parameter.dtype)
                parameter.data = parameter.data.to(kept).float()

        def unmerge(layer: Any, args: Any, output: Any) -> None:
            streamed_model.empty(layer)
            layer.get_base_layer()._parameters.update(layer.byeori_own)
            for each in grouped_experts.wrappers(layer):
                each.merged_adapters.clear()

        for path, module in tuned.named_modules():
            name = path.removeprefix("base_model.model.").removesuffix(".token_adapter")
            if isinstance(module, BaseTunerLayer) and id(module) not in nested:
                module.register_forward_pre_hook(partial(merge, name=name))
                module.register_forward_hook(unmerge)
            elif ".modules_to_save." in path:
                whole = name.partition(".modules_to_save.")[0]
                for short, parameter in module.named_parameters(recurse=False):
                    parameter.data = parameter.data.to(dtypes.get(f"{whole}.{short}", parameter.dtype)).float()
        return self._logits(tuned)

    def merged(self) -> torch.Tensor:
        """Return the logits of the merged model's files."""
        weights = packed.sources(self.folder)
        names = parameter_names(self.folder, sorted(weights))
        sources = weights | {parameter: weights[name] for parameter, name in names.stored.items()}
        return self._logits(streamed_model.streamed_model(self.folder, names, sources, device=self.device))

    def distance(self, logits: torch.Tensor, reference: torch.Tensor) -> float:
        """Return the mean absolute difference of the log-probs of the prompts' own tokens."""
        pairs = [
            (index, self.rows[row][place + 1])
            for index, (row, place) in enumerate(self.kept)
            if place + 1 < len(self.rows[row])
        ]
        if not pairs:
            return float((logits.log_softmax(-1) - reference.log_softmax(-1)).abs().mean())
        places, tokens = (torch.tensor(column) for column in zip(*pairs, strict=True))
        one, other = ((item[places, tokens] - item[places].logsumexp(-1)) for item in (logits, reference))
        return float((one - other).abs().mean())

    def _base(self, sources: Mapping[str, Source]) -> Any:
        model = self.model
        return streamed_model.streamed_model(
            model.base, model.names, sources, device=self.device, vocabulary=model.vocabulary
        )

    def _tuned(self, sources: Mapping[str, Source]) -> Any:
        """The base with the adapter on it, put there by PEFT."""
        with peft_adapter.without_bitsandbytes():
            from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
            from peft.tuners.tuners_utils import BaseTunerLayer

            base = self._base(sources)
            try:
                config = PeftConfig.from_pretrained(str(self.model.adapter))
                tuned = get_peft_model(base, config, low_cpu_mem_usage=True)
                for module in tuned.modules():
                    if isinstance(module, BaseTunerLayer):  # its base is on the meta device, where it should not go
                        module._move_adapter_to_device_of_base_layer = lambda *args, **kwargs: None
                tensors = {name: read(item) for name, item in adapter_tensors(self.model.adapter).items()}
                set_peft_model_state_dict(tuned, tensors, low_cpu_mem_usage=True)
            except Exception as error:  # PEFT raises a different class for each way in which an adapter can be wrong
                raise ModelError(f"PEFT cannot load {self.model.adapter}: {one_line(error)}") from None
        for parameter in tuned.parameters():
            if not parameter.is_meta:
                parameter.data = parameter.data.to(self.device, torch.float32)
        return tuned.eval()

    @torch.no_grad()
    def _logits(self, model: Any) -> torch.Tensor:
        """The logits [kept positions, vocabulary] on the CPU."""
        layers = layers_of(model) or [model]
        for layer in layers:
            layer.register_forward_hook(lambda *_: self._count(len(layers)))
        limited = "logits_to_keep" in signature(base_of(model).forward).parameters
        found = []
        for row, ids in enumerate(self.rows):
            keep = sum(at == row for at, _ in self.kept)
            given = {"input_ids": torch.tensor([ids], device=self.device), "use_cache": False}
            logits = model(**given, **({"logits_to_keep": keep} if limited else {})).logits
            found.append(logits[0, -keep:].float().cpu())
        del model
        gc.collect()  # PEFT's wrappers are cycles
        return torch.cat(found)

    def needs(self) -> int:
        """Return the bytes that the check will take: the largest layer, the logits of all models, and activations."""
        layer = streamed_model.largest(self._base(self.model.plain))
        wide = 64 * max(len(ids) for ids in self.rows) * self.config.hidden_size * 4
        return 2 * layer + (self._passes + 2) * len(self.kept) * self.config.vocab_size * 4 + wide

    def _count(self, layers: int) -> None:
        self._done += 1
        memory.give_back(self.device)  # weights that were read leave holes in the heap
        self._on_progress(self._done, self._passes * layers * len(self.rows))
