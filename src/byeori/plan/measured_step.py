"""One training step under the tracker: the same code on the meta device (a rehearsal) and on a real one (the truth).

The peak is recorded by segment: forward, head, head back, back end.i and back start.i (the layers counted from either
end, back middle between them), optimizer. In each segment it is affine in the number of layers; their maximum is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from byeori.batch import forest as forests
from byeori.batch.forest import Forest
from byeori.data.tokenize import Example
from byeori.losses.base import Objective, Targets
from byeori.model import forward, full, load, skeleton
from byeori.plan.memory_tracker import Peak, Tracker
from byeori.train import optim
from byeori.train.masters import Masters


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What a step did. peaks: by segment. flops: of its last micro-batch; forward_flops: without its backward pass.

    tokens: unique tokens of that micro-batch. resident: bytes by part that stay between steps.
    """

    peaks: dict[str, Peak]
    flops: int
    forward_flops: int
    tokens: int
    resident: dict[str, int]


def make_masters(model: Any, kind: str | None = None) -> Masters:
    """Return what the run's optimizer works on. kind: see Masters."""
    return Masters([parameter for parameter in model.parameters() if parameter.requires_grad], kind)


def make_optimizer(
    model: Any, name: str = "adamw", momentum: float = 0.0, masters: Masters | None = None
) -> torch.optim.Optimizer:
    """Return the run's optimizer over what is trained, with the state that it has from the second step on.

    name, momentum: those of the settings. Pages of paged optimizers count where they are used, on the GPU.
    """
    masters = masters or make_masters(model)
    parameters = masters.parameters
    if parameters[0].is_meta and name == "adafactor":
        return MetaAdafactor(parameters, {})
    if parameters[0].is_meta and ("lion" in name or ("adamw" in name and name not in ("adamw", "schedule_free_adamw"))):
        return MetaBitsAndBytes(parameters, bits=8 if name.endswith("8bit") else 32, moments=1 if "lion" in name else 2)
    optimizer = optim.make(name, masters.held, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, momentum=momentum)
    for parameter in masters.with_gradients:
        parameter.grad = torch.zeros_like(parameter)
    masters.step(optimizer, 0)
    masters.zero_grad()
    return optimizer


class MetaBitsAndBytes(torch.optim.Optimizer):
    """The states of bitsandbytes' AdamW or Lion by their sizes: 8 bit with a scale for 256 numbers, or 32 bit.

    Tensors of fewer than 4,096 numbers stay in 32 bit; each in 8 bit has its own two tables of 256 values.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], bits: int, moments: int = 2) -> None:
        super().__init__(parameters, {})
        for parameter in parameters:
            like = {"device": parameter.device}
            small = bits == 32 or parameter.numel() < 4096
            kind, scales = (torch.float32, 0) if small else (torch.uint8, -(-parameter.numel() // 256))
            for moment in range(1, moments + 1):
                state = self.state[parameter]
                state[f"state{moment}"] = torch.empty(parameter.shape, dtype=kind, **like)
                if scales:
                    state[f"absmax{moment}"] = torch.empty(scales, dtype=torch.float32, **like)
                    state[f"qmap{moment}"] = torch.empty(256, dtype=torch.float32, **like)

    def step(self, closure: Any = None) -> None:
        """Allocate nothing: one kernel updates a tensor in place."""


class MetaAdafactor(torch.optim.Optimizer):
    """The states of PyTorch's Adafactor by their sizes, since its steps read norms: a row and a column of a matrix."""

    def __init__(self, parameters: list[torch.nn.Parameter], defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        for parameter in parameters:
            shape, matrix = list(parameter.shape), parameter.dim() > 1
            sizes = [[*shape[:-1], 1], [*shape[:-2], 1, shape[-1]]] if matrix else [shape]
            self.state[parameter] = {
                f"variance{number}": torch.empty(size, device=parameter.device) for number, size in enumerate(sizes)
            } | {"step": torch.tensor(0.0)}

    def step(self, closure: Any = None) -> None:
        """Allocate what updates one tensor after the other."""
        for parameter in self.state:
            estimate = torch.empty_like(parameter)
            torch.empty_like(parameter)
            del estimate


def run(
    model: Any,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    *,
    objective: Objective,
    ends: tuple[int, int],
    block: int = 1,
    accumulates: bool = False,
    one_sequence: bool = False,
    share: bool = True,
    explain: bool = False,
    masters: Masters | None = None,
) -> Step:
    """Run one whole step over a micro-batch, with the optimizer's state of a second step.

    model: with its adapters, training. optimizer: of `make_optimizer`. ends: how many of the first and of the last
    layers have a segment of their own. accumulates: the step has micro-batches before this one, whose gradients exist.
    one_sequence: without forest attention. share: whether examples share their prefixes. block, explain: see Tracker.
    """
    masters = masters or make_masters(model)
    parameters = masters.with_gradients
    tracker = Tracker(block=block, explain=explain)
    batch = forests.build(list(examples), share=share)
    with tracker, _segments(model, masters, tracker, ends):
        _assign_existing(tracker, model, masters)
        tracker.assign("optimizer", _states(optimizer))
        resident = dict(tracker.parts)
        if accumulates:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
                tracker.assign("gradients", [parameter.grad])
        tracker.peaks.clear()
        with forward.accelerated(model):
            forward_flops = _forward_backward(tracker, model, batch, objective, one_sequence)
        flops = tracker.flops
        tracker.part = "workspace"
        tracker.enter("optimizer")
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        masters.step(optimizer, 0)
    masters.zero_grad()
    return Step(
        peaks=tracker.peaks, flops=flops, forward_flops=forward_flops, tokens=batch.unique_tokens, resident=resident
    )


def _assign_existing(tracker: Tracker, model: Any, masters: Masters) -> None:
    adapters = set() if full.is_full(model) else {id(parameter) for parameter in masters.parameters}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tracker.assign("adapters" if id(tensor) in adapters else "weights", [tensor], module=_general(name))
    tracker.assign("masters", [held for held, copied in zip(masters.held, masters.copied, strict=True) if copied])
    for name, module in model.named_modules():  # tensors that fused functions hold as plain attributes
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                tracker.assign("weights", [value], module=_general(f"{name}.{key}"))


def _states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _forward_backward(tracker: Tracker, model: Any, batch: Forest, objective: Objective, one_sequence: bool) -> int:
    """Returns the operations of the forward pass."""
    before = tracker.flops
    tracker.part = "activations"
    tracker.enter("forward")
    logprobs = forward.forest_logprobs(model, batch, plain=one_sequence)
    targets = Targets(
        weights=torch.from_numpy(batch.target_weight).to(logprobs),
        owner=torch.from_numpy(batch.target_owner).to(logprobs.device),
        examples=len(batch.rows),
        reference=torch.zeros_like(logprobs, requires_grad=False) if objective.reference else None,
    )
    total = objective.sums(logprobs, targets).total
    forward_flops = tracker.flops - before
    tracker.enter("head back")
    total.backward()
    tracker.flops -= before
    return forward_flops


@contextmanager
def _segments(model: Any, masters: Masters, tracker: Tracker, ends: tuple[int, int]) -> Iterator[None]:
    """Hooks that tell the tracker which segment and part it is in."""
    backbone, _ = load.parts(model)
    layers = skeleton.layers_of(model)

    def after_backbone(module: Any, args: Any, output: Any) -> None:
        tracker.part = "head"
        tracker.enter("head")

    def after_layer(segment: str) -> Callable[..., None]:
        def gradient_arrived(gradient: torch.Tensor) -> None:
            tracker.part = "workspace"
            tracker.enter(segment)

        def after(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, (tuple, list)) else output
            if hidden.requires_grad and tracker.segment == "forward":
                hidden.register_hook(gradient_arrived)

        return after

    held = {id(parameter): each for parameter, each in zip(masters.parameters, masters.held, strict=True)}

    def accumulated(parameter: torch.Tensor) -> None:
        grads = [each.grad for each in (parameter, held[id(parameter)])]
        tracker.assign("gradients", [grad for grad in grads if grad is not None])

    with ExitStack() as stack:
        handles = [backbone.register_forward_hook(after_backbone)]
        for index, layer in enumerate(layers):
            handles.append(layer.register_forward_hook(after_layer(_segment(index, len(layers), ends))))
        handles += [parameter.register_post_accumulate_grad_hook(accumulated) for parameter in masters.parameters]
        for handle in handles:
            stack.callback(handle.remove)
        if tracker.explain:
            stack.enter_context(_modules(model, tracker))
        yield


def _segment(index: int, count: int, ends: tuple[int, int]) -> str:
    if count - index <= ends[1]:
        return f"back end.{count - index}"
    return f"back start.{index}" if index < ends[0] else "back middle"


@contextmanager
def _modules(model: Any, tracker: Tracker) -> Iterator[None]:
    """Inside it the tracker knows which module runs."""
    outer: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def enter(module: Any, args: Any, name: str = _general(name)) -> None:
                outer.append(tracker.module)
                tracker.module = name

            def leave(module: Any, args: Any, output: Any) -> None:
                tracker.module = outer.pop() if outer else ""

            for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                stack.callback(handle.remove)
        yield


def _general(name: str) -> str:
    """`base_model.model.model.layers.3.mlp` -> `layers.*.mlp`."""
    parts = [part for part in name.split(".") if part not in ("base_model", "model", "default", "base_layer")]
    return ".".join("*" if part.isdigit() else part for part in parts)
