"""The real training step on the meta device: its peak by part and its operations, without weights and without a GPU.

A tall model is rehearsed at two smaller heights that end with the same kind of layer. In every segment of the step the
peak, its parts and the operations are affine in the number of layers, so both heights give the whole model exactly:

    value(L) = value(n) + (L - n) / p (value(n + p) - value(n))        p: the period of the kinds of layers

A model without a period, or a low one, is rehearsed whole.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.experimental import _config as fx_config

from byeori.data.tokenize import Example
from byeori.errors import ByeoriError, ModelError
from byeori.kernels import device_kind, last_layer, patch
from byeori.losses.base import Objective
from byeori.losses.sft import SFT
from byeori.model import activation_offload, forward, full, load, quantize, skeleton, wrap
from byeori.model.text_model import text_config
from byeori.plan import measured_step, meta_ops, meta_quantized
from byeori.plan.measured_step import Step
from byeori.plan.memory_tracker import Peak, Source
from byeori.plan.trained import Adapter, Full

PARTS = ("weights", "adapters", "masters", "gradients", "optimizer", "activations", "head", "workspace")
# The CUDA allocator hands out multiples of this (PyTorch, c10/cuda/CUDACachingAllocator, kMinBlockSize).
_CUDA_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What one step needs on one device; bytes unless said otherwise.

    peak: the most alive at once; parts: the same by part. segment: where in the step that is.
    flops: operations of one micro-batch, with recomputation; forward_flops: of its forward pass alone.
    tokens: its unique tokens. offloaded: bytes of activations that are copied to the CPU's memory.
    resident: what stays between steps, by part. layer: weights of the largest layer; outside: weights of no layer.
    layers: how many there are. quantized: how many weights are in 4 or 8 bit.
    whole: whether the weights themselves are trained, which sharding divides with all that belongs to them.
    sources: bytes and count of every (part, module, operation, shape) alive at the peak; only where asked for.
    """

    peak: int
    parts: dict[str, int]
    segment: str
    flops: int
    forward_flops: int
    tokens: int
    resident: dict[str, int]
    layer: int
    outside: int
    layers: int
    quantized: int
    offloaded: int = 0
    whole: bool = False
    sources: dict[Source, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Architecture:
    """A model's config and its layers. Their kinds repeat after `period` layers, from layer `first` on.

    weight_count: how many weights in all. quantizable: whether it has layers that 4 bit can hold. prunes: whether a run
    computes the last layer at predicting rows only, as far as a small copy of it shows.
    """

    config: Any
    weight_count: int
    quantizable: bool
    layers: int
    period: int
    first: int
    prunes: bool


def architecture(config: Any, bits: int | None = None) -> Architecture:
    """Inspect a config once, for any number of rehearsals. bits: 4 or 8 if the settings ask for quantized weights.

    Raises:
        ModelError: if no model can be made of it. ConfigError: if it has no layers to quantize to so many bits.
    """
    model = skeleton.frozen_model(config, torch.bfloat16, "meta")
    if bits:
        quantize.refuse_without_layers(model, bits)
    kinds = _kinds(config, model)
    period, first = _period(kinds)
    return Architecture(
        config=config,
        weight_count=sum(parameter.numel() for parameter in model.parameters()),
        quantizable=quantize.has_layers(model),
        layers=len(kinds),
        period=period,
        first=first,
        prunes=_prunes(config, min(len(kinds), first + period)),
    )


def _prunes(config: Any, layers: int) -> bool:
    """Whether the last layer's own check passes in a small copy with numbers; True where no such copy can be made."""
    one = Adapter(r=1, alpha=1.0, dropout=0.0, targets=("all-linear",))
    try:
        fast_paths = ("norms", "mlp", "heads", "last_layer")
        copied = build(skeleton.small(config, layers), one, torch.float32, fast_paths=fast_paths, device="cpu")
        return last_layer.is_pruned(skeleton.layers_of(copied)[-1])
    except Exception:  # a config may tie its sizes to each other in its own ways
        return True


def rehearse(
    architecture: Architecture,
    adapter: Adapter | Full,
    examples: Sequence[Example],
    *,
    dtype: torch.dtype,
    recompute: str = "none",
    bits: int | None = None,
    optim: str = "adamw",
    momentum: float = 0.0,
    objective: Objective = SFT,
    device: str = "cuda",
    capability: float = 8.0,
    accumulates: bool = False,
    share: bool = True,
    speed: Sequence[str] = ("auto",),
    explain: bool = False,
    every_layer: bool = False,
) -> Rehearsal:
    """Run one micro-batch of `examples` through the whole model, without numbers.

    bits: 4 or 8 for quantized weights. device: planned for, cpu or cuda. capability: of a GPU. every_layer: build all.
    accumulates: whether a step has several micro-batches. share: whether examples share prefixes. Raises a ModelError
    if no model can be made of this config, or its code needs numbers.
    """
    parts = patch.parts(list(speed), torch.device(device))
    fast_paths = tuple(part for part in parts if part != "last_layer" or architecture.prunes)
    layers, period = architecture.layers, math.lcm(architecture.period, 1 + (recompute == "selective"))
    tail = period + ("last_layer" in fast_paths)  # the last layer may be a kind of its own
    lowest, whole = architecture.first + period + tail, every_layer or adapter.differs_by_layer
    heights, periods = _heights(layers, lowest, period, whole=whole)

    def run(height: int, *, apart: bool) -> tuple[Step, dict[str, int]]:
        link = _MetaLink()
        with device_kind.stand_for(device, capability), _autocast_on_meta():
            with meta_ops.Remembering():
                model, *trained = _on_meta(architecture, adapter, dtype, height, bits, optim, momentum, fast_paths)
                wrap.recompute_layers(load.base_of(model), recompute, link)
            with _without_numbers(architecture.config), skeleton.masks_on_meta():
                forests = not apart and forward.use_forest_attention(model)
                if not forests:
                    forward.use_plain_attention(model)
                step = measured_step.run(
                    model,
                    trained[0],
                    examples,
                    masters=trained[1],
                    objective=objective,
                    ends=(architecture.first + period, tail),
                    block=_CUDA_BLOCK if device == "cuda" else 1,
                    accumulates=accumulates,
                    one_sequence=not forests,
                    share=share,
                    explain=explain,
                )
            return step, _sizes(model) | {"offloaded": link.copied}

    return _extend(_either(run, heights), periods, layers, isinstance(adapter, Full))


def _heights(layers: int, lowest: int, period: int, *, whole: bool) -> tuple[list[int], int]:
    """The heights to rehearse, which differ from the model by full periods, and by how many the lower one does."""
    low = lowest + (layers - lowest) % period
    if whole or 2 * low + period >= layers:
        return [layers], 0
    return [low, low + period], (layers - low) // period


def _either(run: Callable[..., tuple[Step, dict[str, int]]], heights: list[int]) -> list[tuple[Step, dict[str, int]]]:
    """On forests; row by row where the model's code does not run on them, as a run finds by trying."""
    try:
        return [run(height, apart=False) for height in heights]
    except ModelError:
        return [run(height, apart=True) for height in heights]


@contextmanager
def _without_numbers(config: Any) -> Iterator[None]:
    """Turn whatever a model's code raises, because tensors have no numbers, into a ModelError.

    What a mask selects counts as all of it: the most that a run can need.
    """
    try:
        with fx_config.patch(meta_nonzero_assume_all_nonzero=True):
            yield
    except ByeoriError:
        raise
    except Exception as error:  # any model's code
        logging.getLogger(__name__).debug("not without numbers", exc_info=error)
        raise ModelError(
            f"the model type {config.model_type} cannot be rehearsed without numbers: its code decides by values of "
            "tensors, or does not run on PyTorch's meta device; train without a plan, by settings of your own"
        ) from None


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """PEFT turns autocast off for the weights' device type; PyTorch has no autocast for meta, so use the CPU's."""
    before = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return before("cpu" if device_type == "meta" else device_type, *args, **kwargs)

    torch.autocast = autocast
    try:
        yield
    finally:
        torch.autocast = before


def build(
    config: Any,
    adapter: Adapter | Full,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
    recompute: str = "none",
    bits: int | None = None,
    fast_paths: Sequence[str] = (),
    device: str = "meta",
    quantize_layers: Callable[[Any, int], object] = meta_quantized.quantize_layers,
) -> Any:
    """Return the adapted model as a run makes it, with the given number of layers; empty on the meta device.

    recompute: none, selective or full. fast_paths: those of the setting `speed` that the run has.
    quantize_layers: puts the frozen layers into so many bits.

    Raises:
        ModelError: if transformers cannot make this model.
    """
    base = skeleton.frozen_model(config if layers is None else skeleton.with_layers(config, layers), dtype, device)
    if bits:
        quantize_layers(base, bits)
    model = adapter.put_on(base)
    wrap.recompute_layers(load.base_of(model), recompute)
    _fuse(model, list(fast_paths))
    return model.train()


@functools.lru_cache(maxsize=16)
def _on_meta(
    architecture: Architecture,
    adapter: Adapter | Full,
    dtype: torch.dtype,
    layers: int,
    bits: int | None,
    optim: str,
    momentum: float,
    fast_paths: tuple[str, ...],
) -> tuple[Any, Any, Any]:
    model = build(architecture.config, adapter, dtype, layers=layers, bits=bits, fast_paths=fast_paths)
    masters = measured_step.make_masters(model, adapter.masters)
    return model, measured_step.make_optimizer(model, optim, momentum, masters), masters


class _MetaLink(activation_offload.Link):
    """Copies nothing, and counts the bytes that a run would copy to the CPU's memory."""

    def __init__(self) -> None:
        self.copied = 0

    def accepts(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, torch.nn.Parameter) and tensor.nbytes >= activation_offload.LEAST

    def empty_like(self, like: torch.Tensor) -> torch.Tensor:
        self.copied += like.nbytes
        return torch.empty((), dtype=like.dtype, device="cpu").expand(like.shape)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        return None

    def wait(self, copied: Any) -> None:
        pass


def _fuse(model: Any, fast_paths: list[str]) -> None:
    """Fuse as a run does. Fusing norms looks at numbers: lend them some on the meta device, then take them back."""
    on_meta = next(model.parameters()).device.type == "meta"
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")] if on_meta else []
    for norm in norms:
        norm.to_empty(device="cpu", recurse=False)
        for parameter in norm.parameters(recurse=False):
            torch.nn.init.normal_(parameter)
    patch.fuse(model, fast_paths)
    for norm in norms:
        norm.to_empty(device="meta", recurse=False)
        for name, value in list(vars(norm).items()):
            if isinstance(value, torch.Tensor):
                setattr(norm, name, value.to("meta"))


def _kinds(config: Any, model: Any) -> list[Any]:
    """What tells the kind of every layer: its parameters' names and shapes, and its kind of attention."""
    text, layers = text_config(config), skeleton.layers_of(model)
    if len(layers) != text.num_hidden_layers:
        return list(range(text.num_hidden_layers))  # every layer of its own kind: rehearsed whole
    types = getattr(text, "layer_types", None) or []
    types = types if len(types) == len(layers) else [""] * len(layers)
    return [
        (kind, *[(name, tuple(value.shape)) for name, value in layer.named_parameters()])
        for layer, kind in zip(layers, types, strict=True)
    ]


def _period(kinds: list[Any]) -> tuple[int, int]:
    """(p, a): from layer a on, kinds repeat after p layers; the smallest a + p."""
    count = len(kinds)
    best = (count, 0)
    for period in range(1, count // 2 + 1):
        first = count - period
        while first > 0 and kinds[first - 1] == kinds[first - 1 + period]:
            first -= 1
        if first + period < sum(best):
            best = (period, first)
    return best


def _sizes(model: Any) -> dict[str, int]:
    """Bytes of the largest layer and of what is in none, and how many weights are in 4 bit."""

    whole = full.is_full(model)

    def frozen_bytes(module: Any) -> int:
        return sum(parameter.nbytes for parameter in module.parameters() if whole or not parameter.requires_grad)

    layers = [frozen_bytes(layer) for layer in skeleton.layers_of(model)]
    packed = [module for module in model.modules() if isinstance(module, meta_quantized.MetaQuantizedWeight)]
    return {
        "layer": max(layers, default=0),
        "outside": frozen_bytes(model) - sum(layers),
        "quantized": sum(module.weight_count for module in packed),
    }


def _extend(runs: list[tuple[Step, dict[str, int]]], periods: int, layers: int, whole: bool) -> Rehearsal:
    """From two heights to the whole: the first, and `periods` times the difference. One run stands for itself."""
    (low, low_sizes), (high, high_sizes) = runs[0], runs[-1]

    def extend(a: int, b: int) -> int:
        return a + periods * (b - a)

    def extend_all(a: Mapping[Any, int], b: Mapping[Any, int]) -> dict[Any, int]:
        return {key: extend(a.get(key, 0), b.get(key, 0)) for key in {**a, **b}}

    peaks = {
        name: Peak(
            total=extend(peak.total, high.peaks[name].total), parts=extend_all(peak.parts, high.peaks[name].parts)
        )
        for name, peak in low.peaks.items()
        if not (periods and name == "back middle")
    }
    segment = max(peaks, key=lambda name: peaks[name].total)
    (low_bytes, low_counts), (high_bytes, high_counts) = (step.peaks[segment].sources() for step in (low, high))
    counts = extend_all(low_counts, high_counts)
    return Rehearsal(
        peak=peaks[segment].total,
        parts={part: peaks[segment].parts.get(part, 0) for part in PARTS},
        segment=segment,
        flops=extend(low.flops, high.flops),
        forward_flops=extend(low.forward_flops, high.forward_flops),
        tokens=low.tokens,
        resident=extend_all(low.resident, high.resident),
        layers=layers,
        whole=whole,
        sources={source: (size, counts[source]) for source, size in extend_all(low_bytes, high_bytes).items()},
        **extend_all(low_sizes, high_sizes) | {"layer": high_sizes["layer"]},
    )
