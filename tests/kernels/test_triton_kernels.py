"""Triton's kernels compiled for GPUs that are not here: they fit the registers, and memory moves 16 bytes at a time.

What they compute shows tests/gpu/test_cuda_fused.py.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from byeori.kernels import dispatch, native, triton_kernels

# T4; A100; H100 and H200; B200
CAPABILITIES = [75, 80, 90, 100]
STORES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
TOKENS, HEADS, SIZE = 4000, 32, 128


def launches(dtype: torch.dtype, wide: int, words: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of every kernel, as layers of an 8B model give them."""

    def states(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def sums(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    x, r, head = states(TOKENS, wide), sums(TOKENS, 1), states(TOKENS, HEADS, SIZE)
    turn, scale = states(TOKENS, SIZE), sums(SIZE)
    ids = torch.empty(TOKENS, dtype=torch.long, device="meta")
    sizes = (TOKENS, HEADS, SIZE)
    return {
        "norm": (x, sums(wide), 1e-6, x, r, TOKENS, wide),
        "norm_back": (x, x, sums(wide), r, x, TOKENS, wide),
        "dropout": (x, x, 1.05, 12_345, 3_277, TOKENS, wide),
        "glu": (x, x, x, 1.5, 0.07, TOKENS, wide),
        "glu_back": (x, x, x, x, x, 1.5, 0.07, TOKENS, wide),
        "rope": (head, turn, turn, scale, 1e-6, head, sums(TOKENS, HEADS, 1), *sizes),
        "rope_back": (head, head, turn, turn, scale, sums(TOKENS, HEADS, 1), head, *sizes),
        "online_softmax": (states(TOKENS, words), ids, r, r, r, r, 0.7, TOKENS, words),
    }


def compiled(kernel: Any, given: tuple[Any, ...], named: dict[str, Any], capability: int) -> Any:
    """A launch's kernel, specialised as Triton does it: to what 16 divides, to ones, to what is not given."""
    values = dict(zip(kernel.arg_names, given, strict=False)) | {
        n: v for n, v in named.items() if n in kernel.arg_names
    }
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = STORES[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
        if isinstance(value, torch.Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": named["num_warps"]}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assembled(ptx: str, folder: Path, capability: int) -> str:
    """What the assembler says of a kernel."""
    (folder / "kernel.ptx").write_text(ptx, encoding="utf-8")
    tool = get_ptxas(capability).path
    name = re.search(r"\.target (\w+)", ptx)
    assert name
    command = [tool, "-v", f"--gpu-name={name[1]}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        pytest.param(dtype, capability, marks=[pytest.mark.slow] * ((dtype, capability) != (torch.bfloat16, 90)))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for capability in CAPABILITIES
    ],
)
def test_kernels_fit_the_registers(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[Any] = []

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append(compiled(kernel, given, named, capability))

    monkeypatch.setattr(JITFunction, "run", run)
    for name, given in launches(dtype, 4096, 128_256).items():
        triton_kernels.call(name, *given)
        ptx = found.pop().asm["ptx"]
        said = assembled(ptx, tmp_path, capability)
        spilled = [int(each) for each in re.findall(r"(\d+) bytes spill", said)]
        assert len(spilled) == 2, said
        assert sum(spilled) <= 4, (name, said)  # one number, of a whole row's: norm_back in float32 on an H100
        moves = re.findall(r"(?:ld|st)\.global[\w.:]*", ptx)
        at_once = [move for move in moves if re.search(r"v4\.b32|v2\.b64|v8\.b32|v4\.b64", move)]
        assert len(at_once) >= 3, (name, moves)
        assert len(moves) - len(at_once) <= 9, (name, moves)  # one number for a row, a few for a row of words


def test_a_references_name_knows_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """training.py: log-probs that were computed with other kernels are not taken for those of a run's first step."""
    before, read = dispatch.sources(), Path.read_bytes
    assert dispatch.sources() == before
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b" " * (self.name == "triton_kernels.py"))
    changed = dispatch.sources()
    monkeypatch.setattr(native, "sources", lambda: "other")
    assert len({before, changed, dispatch.sources()}) == 3
