"""What an optimizer works on where a model's own weights are trained: small updates are lost in bfloat16.

    float32      a copy of every trained weight in float32, which collects the gradients of all micro-batches; after a
                 step the model gets it rounded (Micikevicius et al., arXiv:1710.03740)
    stochastic   no copy: a step is computed in float32, some tensors at a time, and rounded up or down at random, so
                 that the mean is exact (Gupta et al., arXiv:1502.02551)

Parameters in float32, such as those of adapters, are what the optimizer works on themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from byeori.distributed.processes import local
from byeori.train import optim

MASTER = "master"
_AT_ONCE = 1 << 26  # numbers whose stochastic step is computed together


class Masters:
    """held: what the optimizer works on, one for each of the model's trained parameters, in their order.

    kind: float32 or stochastic for weights in bfloat16; None if they are trained as they are.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], kind: str | None = None) -> None:
        self.parameters = parameters
        narrow = {id(p) for p in parameters if p.dtype.itemsize < 4 and kind in ("float32", "stochastic")}
        self.copied = [id(p) in narrow and kind == "float32" for p in parameters]
        self.rounded = [id(p) in narrow and kind == "stochastic" for p in parameters]
        self.held = [self._held(i) for i in range(len(parameters))]
        for parameter, held, copied in zip(parameters, self.held, self.copied, strict=True):
            if copied:
                parameter.register_post_accumulate_grad_hook(_collect(held))

    def _held(self, index: int) -> torch.nn.Parameter:
        parameter = self.parameters[index]
        if self.copied[index]:
            return torch.nn.Parameter(parameter.detach().float())
        if local(parameter) is not parameter and not self.rounded[index]:
            return torch.nn.Parameter(local(parameter).detach())  # the same memory
        if self.rounded[index]:  # filled while it makes a step; its shape decides about weight decay
            return torch.nn.Parameter(local(parameter).detach().new_empty([0] * parameter.dim(), dtype=torch.float32))
        return parameter

    @property
    def with_gradients(self) -> list[torch.nn.Parameter]:
        """The parameters whose gradients are there after a backward pass."""
        return [h if c else p for p, h, c in zip(self.parameters, self.held, self.copied, strict=True)]

    @property
    def sharded(self) -> bool:
        """Whether each process holds its own rows of what is trained."""
        return any(local(parameter) is not parameter for parameter in self.parameters)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self.parameters, *self.held):
            parameter.grad = None

    @torch.no_grad()
    def step(self, optimizer: Any, seed: int) -> None:
        """Make the optimizer's step, and give the model its weights. seed: of the rounding."""
        if not any(self.rounded):
            for parameter, held, copied in zip(self.parameters, self.held, self.copied, strict=True):
                if not copied and parameter.grad is not None:
                    held.grad = local(parameter.grad)
            optimizer.step()
            self.give()
            return
        device = self.parameters[0].device
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)
        for part in self._parts():
            for parameter, held in part:
                held.data, held.grad = local(parameter).float(), local(parameter.grad).float()
                parameter.grad = None
            optimizer.step()
            for parameter, held in part:
                local(parameter).copy_(rounded(held.data, parameter.dtype, generator))
                held.data, held.grad = held.new_empty([0] * held.dim()), None

    def _parts(self) -> Iterator[list[tuple[torch.nn.Parameter, torch.nn.Parameter]]]:
        """The parameters with a gradient and their stand-ins, so many as are computed together."""
        part: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        for pair in zip(self.parameters, self.held, strict=True):
            if pair[0].grad is None:
                continue
            part.append(pair)
            if sum(parameter.numel() for parameter, _ in part) >= _AT_ONCE:
                yield part
                part = []
        if part:
            yield part

    @contextmanager
    def filled(self, held: torch.nn.Parameter, parameter: torch.nn.Parameter) -> Iterator[None]:
        """Give a stand-in its shape inside: optimizers of bitsandbytes make their states of it."""
        empty = held.data
        if not any(held.shape):
            held.data = local(parameter).detach().float()
        try:
            yield
        finally:
            held.data = empty

    @contextmanager
    def averaged(self, optimizer: Any) -> Iterator[None]:
        """Give the model the weights to evaluate and to save inside (optim.averaged)."""
        with optim.averaged(optimizer):
            if optim.averages(optimizer):
                self.give()
            yield
        if optim.averages(optimizer):
            self.give()

    def finish(self, optimizer: Any) -> None:
        """Give the model the weights to save, for good."""
        if optim.averages(optimizer):
            optimizer.eval()
            self.give()

    @torch.no_grad()
    def take(self) -> None:
        """Begin with the model's weights as they are now."""
        for parameter, held, copied in zip(self.parameters, self.held, self.copied, strict=True):
            if copied:
                held.copy_(parameter)

    @torch.no_grad()
    def give(self) -> None:
        """Give the model the rounded copies."""
        for parameter, held, copied in zip(self.parameters, self.held, self.copied, strict=True):
            if copied:
                parameter.copy_(held)


def _collect(held: torch.nn.Parameter) -> Any:
    def collect(parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None:
            held.grad = parameter.grad.float() if held.grad is None else held.grad.add_(parameter.grad)
            parameter.grad = None

    return collect


def rounded(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return float32 values in bfloat16, up or down with the probability that makes their mean exact.

    The lower 16 bits of a float32 are what bfloat16 leaves out: adding 16 random bits carries with that probability.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)
