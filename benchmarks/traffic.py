"""Bytes that a layer moves besides its matrix products and attention: `python benchmarks/traffic.py`.

A step is rehearsed without numbers, as `byeori plan` does it, and every operation counts what it reads and writes: on a
GPU that is the time that is not spent in products. What lies in a cache is not known here and counts as well. A layer
is the difference between models of three and of two layers.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import device_kind, dispatch, patch
from byeori.model import forward
from byeori.model.device_batch import place
from byeori.plan import rehearsal
from byeori.plan.meta_ops import tensors

AUTO = patch.parts(["auto"], torch.device("cuda"))
WAYS = {
    "layers as transformers has them": [],
    "norms fused, in PyTorch": ["norms"],
    "everything fused, in PyTorch": [part for part in AUTO if part != "kernels"],
    "everything fused, kernels in Triton (`--speed auto`)": AUTO,
}
SHAPES = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8},
}
# Arguments that a kernel reads or writes more than once.
AGAIN = {"glu_back": {2: 1}, "online_softmax": {0: 2}}
THIN = 64  # a product over or onto so few columns is an adapter's, and waits for memory


class Count(TorchDispatchMode):
    """Adds up bytes: `between`, of the adapters' products (`adapters`), and by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or "empty" in name or "flash" in name or name in ("detach", "_unsafe_view", "embedding"):
            return out
        read, written = list(tensors(args)), list(tensors(out))
        if name in ("mm", "addmm", "addmm_", "bmm"):
            *before, left, right = read[-3:]
            if min(*left.shape, *right.shape) > THIN:
                return out
            return self._add("adapters", [left, right, *before, *written], out)
        if name in ("copy_", "zero_", "fill_"):
            read = read[1:]
        elif not written or (name not in ("cat", "stack") and written[0] is read[0] and not name.endswith("_")):
            return out  # a cast that has nothing to do
        return self._add("between", read + written, out)

    def _add(self, kind: str, moved: list[torch.Tensor], out: Any) -> Any:
        self.bytes[kind] += sum(t.numel() * t.element_size() for t in moved)
        return out


@contextmanager
def counted_kernels(count: Count) -> Iterator[None]:
    """Kernels move what they are given, once."""

    def call(name: str, *given: Any) -> None:
        times = AGAIN.get(name, {})
        parts = [(t, times.get(at, 0) + 1) for at, t in enumerate(given) if isinstance(t, torch.Tensor)]
        count.bytes["between"] += sum(t.numel() * t.element_size() * n for t, n in parts)

    before, dispatch.call = dispatch.call, call
    try:
        yield
    finally:
        dispatch.call = before


def moved(shape: str, layers: int, chosen: list[str], tokens: int) -> Counter[str]:
    """Bytes of a forward and backward pass over one row of so many tokens."""
    from transformers import LlamaConfig, Qwen3Config

    kind = Qwen3Config if shape == "qwen3-8b" else LlamaConfig
    config = kind(**SHAPES[shape], head_dim=128, vocab_size=32000, num_hidden_layers=layers)
    adapter = rehearsal.Adapter(r=16, alpha=16, dropout=0.0, targets=("all-linear",))
    row = Example(token_ids=tuple(range(tokens)), targets=((1, tokens),))
    with device_kind.stand_for("cuda"):
        model = rehearsal.build(config, adapter, torch.bfloat16, layers=layers, fast_paths=chosen)
        forward.use_forest_attention(model)
        count = Count()
        batch = place(forests.build([row]), torch.device("meta"))
        with count, counted_kernels(count), forward.accelerated(model):
            forward.forest_logprobs(model, batch).sum().backward()
    return count.bytes


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="bytes that a layer moves besides products and attention")
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    print("| shape | layers | between products, GB | adapters' products, GB | at 3.35 TB/s, ms |")
    print("|---|---|---:|---:|---:|")
    for shape in SHAPES:
        for name, chosen in WAYS.items():
            low, high = (moved(shape, layers, chosen, args.tokens) for layers in (2, 3))
            between, thin = (high[kind] - low[kind] for kind in ("between", "adapters"))
            print(f"| {shape} | {name} | {between / 1e9:.2f} | {thin / 1e9:.2f} | {(between + thin) / 3.35e9:.2f} |")


if __name__ == "__main__":
    main()
