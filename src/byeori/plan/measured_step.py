"""One training step under the tracker: the same code on the meta device (a rehearsal) and on a real one (the truth).

The peak is kept by segment: forward, head, head back, back end.i and back start.i (the layers counted from either end,
back middle between them), optimizer. In each segment it is affine in the number of layers, which their maximum is not.
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
from byeori.model import forward, load
from byeori.plan.memory_tracker import Peak, Tracker
from byeori.train import optim


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


def layers_of(model: Any) -> Any:
    """The decoder's layers, a ModuleList; None where the model keeps them under no usual name."""
    backbone, _ = load.parts(model)
    for holder in (backbone, getattr(backbone, "language_model", None), getattr(backbone, "decoder", None)):
        for name in ("layers", "h", "blocks"):
            if isinstance(found := getattr(holder, name, None), torch.nn.ModuleList):
                return found
    return None


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """The run's optimizer over the adapters, with the state that it has from the second step on."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optim.make("adamw", parameters, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def run(
    model: Any,
    optimizer: torch.optim.Optimizer,
    examples: Sequence[Example],
    *,
    objective: Objective,
    ends: tuple[int, int],
    block: int = 1,
    several: bool = False,
    plain: bool = False,
    explain: tuple[str, int] | None = None,
) -> Step:
    """One whole step over a micro-batch, with the optimizer's state already there, as from the second step on.

    model: with its adapters, training. optimizer: of `optimizer_of`. ends: how many of the first and of the last
    layers have a segment of their own. several: the step has micro-batches before this one, whose gradients are there.
    plain: one sequence, without forest attention. explain: see Tracker.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tracker = Tracker(block=block, explain=explain)
    batch = forests.build(list(examples))
    with tracker, _segments(model, parameters, tracker, ends, explained=explain is not None):
        _name_what_is_there(tracker, model, parameters)
        tracker.own("optimizer", _states(optimizer))
        resident = dict(tracker.parts)
        if several:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
                tracker.own("gradients", [parameter.grad])
        tracker.peaks.clear()
        forward_flops = _forward_backward(tracker, model, batch, objective, plain)
        flops = tracker.flops
        tracker.part = "workspace"
        tracker.enter("optimizer")
        torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(
        peaks=tracker.peaks,
        flops=flops,
        forward_flops=forward_flops,
        tokens=batch.unique_tokens,
        resident=resident,
    )


def _name_what_is_there(tracker: Tracker, model: Any, parameters: list[torch.nn.Parameter]) -> None:
    mine = {id(parameter) for parameter in parameters}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tracker.own("adapters" if id(tensor) in mine else "weights", [tensor], where=_general(name))
    for name, module in model.named_modules():  # what fused functions keep beside parameters
        for key, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                tracker.own("weights", [value], where=_general(f"{name}.{key}"))


def _states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _forward_backward(tracker: Tracker, model: Any, batch: Forest, objective: Objective, plain: bool) -> int:
    """Returns the operations of the forward pass."""
    before = tracker.flops
    tracker.part = "activations"
    tracker.enter("forward")
    logprobs = forward.forest_logprobs(model, batch, plain=plain)
    targets = Targets(
        weights=torch.from_numpy(batch.target_weight).to(logprobs),
        owner=torch.from_numpy(batch.target_owner).to(logprobs.device),
        examples=len(batch.rows),
        reference=torch.zeros_like(logprobs, requires_grad=False) if objective.reference else None,
    )
    total = objective.sums(logprobs, targets).total
    found = tracker.flops - before
    tracker.enter("head back")
    total.backward()
    tracker.flops -= before
    return found


@contextmanager
def _segments(
    model: Any, parameters: list[torch.nn.Parameter], tracker: Tracker, ends: tuple[int, int], *, explained: bool
) -> Iterator[None]:
    """Hooks that tell the tracker which segment and part it is in."""
    backbone, _ = load.parts(model)
    layers = layers_of(model) or []
    with ExitStack() as stack:

        def hook(handle: Any) -> None:
            stack.callback(handle.remove)

        def after_backbone(module: Any, args: Any, output: Any) -> None:
            tracker.part = "head"
            tracker.enter("head")

        def after_layer(name: str) -> Callable[..., None]:
            def entered(gradient: torch.Tensor) -> None:
                tracker.part = "workspace"
                tracker.enter(name)

            def after(module: Any, args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad and tracker.segment == "forward":
                    hidden.register_hook(entered)

            return after

        def arrived(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                tracker.own("gradients", [parameter.grad])

        hook(backbone.register_forward_hook(after_backbone))
        for index, layer in enumerate(layers):
            hook(layer.register_forward_hook(after_layer(_place(index, len(layers), ends))))
        for parameter in parameters:
            hook(parameter.register_post_accumulate_grad_hook(arrived))
        if explained:
            stack.enter_context(_named(model, tracker))
        yield


def _place(index: int, count: int, ends: tuple[int, int]) -> str:
    if count - index <= ends[1]:
        return f"back end.{count - index}"
    return f"back start.{index}" if index < ends[0] else "back middle"


@contextmanager
def _named(model: Any, tracker: Tracker) -> Iterator[None]:
    """While open, the tracker knows which module runs."""
    before: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():

            def into(module: Any, args: Any, name: str = _general(name)) -> None:
                before.append(tracker.where)
                tracker.where = name

            def out(module: Any, args: Any, output: Any) -> None:
                tracker.where = before.pop() if before else ""

            for handle in (module.register_forward_pre_hook(into), module.register_forward_hook(out)):
                stack.callback(handle.remove)
        yield


def _general(name: str) -> str:
    """`base_model.model.model.layers.3.mlp` -> `layers.*.mlp`."""
    parts = [part for part in name.split(".") if part not in ("base_model", "model", "default", "base_layer")]
    return ".".join("*" if part.isdigit() else part for part in parts)
