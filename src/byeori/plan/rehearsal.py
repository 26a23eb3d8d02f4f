"""The real training step on the meta device: its peak by part and its operations, without weights and without a GPU.

A tall model is rehearsed at two smaller heights that end with the same kind of layer. In every segment of the step the
peak, its parts and the operations are affine in the number of layers, so both heights give the whole model exactly:

    value(L) = value(n) + (L - n) / p (value(n + p) - value(n))        p: the period of the kinds of layers

A model without a period, or a low one, is rehearsed whole.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from byeori.data.tokenize import Example
from byeori.errors import ByeoriError, ModelError
from byeori.kernels import device_kind, forest_attention, lora_linear, patch
from byeori.losses.base import Objective
from byeori.losses.sft import SFT
from byeori.model import forward, quantize, wrap
from byeori.model.adapter import attach
from byeori.plan import measured_step, meta_quantized
from byeori.plan import meta_ops as shapes
from byeori.plan.memory_tracker import Peak, Source
from byeori.support.text_files import one_line

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "head", "workspace")
# The CUDA allocator hands out multiples of this (PyTorch, c10/cuda/CUDACachingAllocator, kMinBlockSize).
_CUDA_BLOCK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The LoRA settings that a rehearsal needs."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What one step takes on one device, everything in bytes unless said otherwise.

    peak: the most alive at once; parts: the same by part. segment: where in the step that is.
    flops: operations of one micro-batch, with recomputation; forward_flops: of its forward pass alone.
    tokens: its unique tokens.
    resident: what stays between steps, by part. layer: the weights of the largest layer, outside: those of no layer.
    layers: how many there are. weight_count: numbers in the frozen matrices. opened: those kept in 4 bit.
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
    weight_count: int
    opened: int
    sources: dict[Source, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stage:
    """A model's config. layers: how many. Their kinds repeat after `period` layers, from layer `first` on.

    numbers: of all its weights. packable: whether it has layers that 4 bit can hold.
    """

    config: Any
    numbers: int
    packable: bool
    layers: int
    period: int
    first: int


def stage(config: Any, bits: int | None = None) -> Stage:
    """Look at a config once, for any number of rehearsals. bits: those that its weights are asked to be held in.

    Raises:
        ModelError: no model can be made of it. ConfigError: it has no layers to hold in so many bits.
    """
    whole = _base(config, torch.bfloat16, "meta")
    if bits:
        quantize.refuse_without_layers(whole, bits)
    kinds = _kinds(config, whole)
    period, first = _period(kinds)
    numbers = sum(parameter.numel() for parameter in whole.parameters())
    packable = bool(quantize.plain_layers(whole))
    return Stage(config=config, numbers=numbers, packable=packable, layers=len(kinds), period=period, first=first)


def rehearse(
    on: Stage,
    adapter: Adapter,
    examples: Sequence[Example],
    *,
    dtype: torch.dtype,
    recompute: str = "none",
    four_bit: bool = False,
    objective: Objective = SFT,
    device: str = "cuda",
    several: bool = False,
    wanted: Sequence[str] = ("auto",),
    explain: bool = False,
    whole: bool = False,
) -> Rehearsal:
    """One micro-batch of `examples` through the whole model.

    device: the kind that is planned for, cpu or cuda. several: the step has more micro-batches than one.
    wanted: the setting `speed`. whole: rehearse every layer, however many there are.

    Raises:
        ModelError: no model can be made of this config, or its code cannot run without numbers.
    """
    chosen = tuple(patch.parts(list(wanted), torch.device(device)))
    period = math.lcm(on.period, 2) if recompute == "selective" else on.period
    tail = period + ("last_layer" in chosen)  # the last layer may be a kind of its own
    low = _same_end(on.layers, period, on.first + period + tail)
    heights = [on.layers] if whole or 2 * low + period >= on.layers else [low, low + period]
    periods = (on.layers - heights[0]) // period if len(heights) == 2 else 0

    def run(height: int, at: str | None) -> tuple[measured_step.Step, dict[str, int]]:
        with device_kind.stand_for(device), _autocast_on_meta():
            with shapes.WithoutNumbers():
                model, optimizer = _on_meta(on, adapter, dtype, height, four_bit, chosen)
                wrap.recompute_layers(model.get_base_model(), recompute)
            how = {
                "objective": objective,
                "ends": (on.first + period, tail),
                "block": _CUDA_BLOCK if device == "cuda" else 1,
                "several": several,
                "plain": not forward.use_forest_attention(model),
            }
            return _run(model, optimizer, examples, how, at), _sizes(model)

    found = _extend([run(height, None) for height in heights], periods, on.layers)
    return _extend([run(height, found.segment) for height in heights], periods, on.layers) if explain else found


def _run(
    model: Any, optimizer: Any, examples: Sequence[Example], how: dict[str, Any], at: str | None
) -> measured_step.Step:
    """at: the segment whose peak is to be explained, which takes a second run."""
    try:
        found = measured_step.run(model, optimizer, examples, **how)
        return (
            found
            if at is None
            else measured_step.run(model, optimizer, examples, explain=(at, found.peaks[at].total), **how)
        )
    except ByeoriError:
        raise
    except Exception as error:  # whatever a model's code does with numbers that are not there
        kind, text = model.config.model_type, (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"a {kind} model cannot be rehearsed without numbers: {text}") from None


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """PEFT switches autocast off for the weights' kind of device; there is none for meta, so it is told the CPU."""
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
    adapter: Adapter,
    dtype: torch.dtype,
    *,
    layers: int | None = None,
    recompute: str = "none",
    four_bit: bool = False,
    chosen: Sequence[str] = (),
    device: str = "meta",
    pack: Callable[[Any], object] = meta_quantized.pack_layers,
) -> Any:
    """The adapted model as a run makes it, with the given number of layers; on the meta device its weights are empty.

    recompute: none, selective or full, as in the settings. chosen: the parts of speed.py that the run has. pack: what
    puts the frozen layers into 4 bit.

    Raises:
        ModelError: transformers cannot make this model.
    """
    from transformers.initialization import no_init_weights

    base = _base(config if layers is None else _with_layers(config, layers), dtype, device)
    if four_bit:
        pack(base)
    with no_init_weights() if device == "meta" else nullcontext():  # there are no first values to draw
        model = attach(
            base, r=adapter.r, alpha=adapter.alpha, dropout=adapter.dropout, targets=list(adapter.targets), seed=0
        )
    lora_linear.fuse(model)
    wrap.recompute_layers(model.get_base_model(), recompute)
    _fuse(model, list(chosen))
    return model.train()


@functools.lru_cache(maxsize=16)
def _on_meta(
    on: Stage,
    adapter: Adapter,
    dtype: torch.dtype,
    layers: int,
    four_bit: bool,
    chosen: tuple[str, ...],
) -> tuple[Any, Any]:
    model = build(on.config, adapter, dtype, layers=layers, four_bit=four_bit, chosen=chosen)
    return model, measured_step.optimizer_of(model)


def _base(config: Any, dtype: torch.dtype, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    forest_attention.register()
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).requires_grad_(False)
    except Exception as error:  # a config can be wrong in as many ways as there are models
        text = one_line(error, 200)
        raise ModelError(f"no model can be made of this {config.model_type} config: {text}") from None


def _fuse(model: Any, chosen: list[str]) -> None:
    """Fusing norms looks at numbers: lend it some, then take them back to the meta device."""
    on_meta = next(model.parameters()).device.type == "meta"
    lent = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")] if on_meta else []
    for module in lent:
        module.to_empty(device="cpu", recurse=False)
        for parameter in module.parameters(recurse=False):
            torch.nn.init.normal_(parameter)
    patch.fuse(model, chosen)
    for module in lent:
        module.to_empty(device="meta", recurse=False)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor):
                setattr(module, name, value.to("meta"))


def _kinds(config: Any, whole: Any) -> list[Any]:
    """For every layer what tells its kind: its parameters' names and shapes, and its kind of attention."""
    text = config.get_text_config()
    layers = measured_step.layers_of(whole)
    named = getattr(text, "layer_types", None) or []
    if layers is None or len(layers) != text.num_hidden_layers:
        return list(range(text.num_hidden_layers))  # every layer of its own kind: rehearsed whole
    shapes = [tuple((name, tuple(value.shape)) for name, value in layer.named_parameters()) for layer in layers]
    return [(shape, named[index] if len(named) == len(shapes) else "") for index, shape in enumerate(shapes)]


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


def _same_end(count: int, period: int, least: int) -> int:
    """The smallest height >= least that differs from count by whole periods."""
    return least + (count - least) % period


def _with_layers(config: Any, count: int) -> Any:
    """The config with only its first layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, (list, tuple)) and len(value) == before:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


def _sizes(model: Any) -> dict[str, int]:
    """Bytes of the largest layer and of what lies in none; numbers in frozen matrices, and in those of 4 bit."""
    layers = list(measured_step.layers_of(model) or [])
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}

    def size(values: Any) -> int:
        return sum(p.numel() * p.element_size() for p in values if not p.requires_grad)

    per_layer = [size(layer.parameters()) for layer in layers]
    opened = sum(module.numbers for module in model.modules() if isinstance(module, meta_quantized.Packed))
    return {
        "layer": max(per_layer, default=0),
        "outside": size(frozen.values()) - sum(per_layer),
        "opened": opened,
        "weight_count": opened + sum(p.numel() for p in frozen.values() if p.dtype.is_floating_point),
    }


def _extend(runs: list[tuple[measured_step.Step, dict[str, int]]], periods: int, layers: int) -> Rehearsal:
    """From two heights to the whole; `periods` of the difference on top of the first. One run stands for itself."""
    (low, low_sizes), (high, high_sizes) = runs[0], runs[-1]

    def far(a: int, b: int) -> int:
        return a + periods * (b - a)

    def far_all(a: Any, b: Any) -> dict[Any, int]:
        return {key: far(a.get(key, 0), b.get(key, 0)) for key in {**a, **b}}

    peaks = (
        {
            name: Peak(
                total=far(low.peaks[name].total, high.peaks[name].total),
                parts=Counter(far_all(low.peaks[name].parts, high.peaks[name].parts)),
            )
            for name in low.peaks
            if name != "back middle"
        }
        if periods
        else low.peaks
    )
    name = max(peaks, key=lambda key: peaks[key].total)
    sources: dict[Source, tuple[int, int]] = {}
    first, last = low.peaks[name], high.peaks[name]
    if first.sources is not None and last.sources is not None and first.counts and last.counts:
        sizes, counts = far_all(first.sources, last.sources), far_all(first.counts, last.counts)
        sources = {key: (sizes[key], counts[key]) for key in sizes}
    sizes_of = {key: far(low_sizes[key], high_sizes[key]) for key in low_sizes} | {"layer": high_sizes["layer"]}
    return Rehearsal(
        peak=peaks[name].total,
        parts={part: peaks[name].parts.get(part, 0) for part in PARTS},
        segment=name,
        flops=far(low.flops, high.flops),
        forward_flops=far(low.forward_flops, high.forward_flops),
        tokens=low.tokens,
        resident=far_all(low.resident, high.resident),
        layers=layers,
        sources=sources,
        **sizes_of,
    )
