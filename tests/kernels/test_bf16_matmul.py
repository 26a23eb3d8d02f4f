"""Products of bfloat16 matrices in float32, against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from byeori.kernels import bf16_matmul
from byeori.plan import machines

ROUNDING = 2**-8  # bfloat16 keeps eight bits: half of the last one is 2^-9 of a number


def matrices(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).bfloat16()


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert ((found.double() - expected).abs() <= ROUNDING * expected.abs() + 1e-5).all()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_matmul, "_SIDE", 4)
    monkeypatch.setattr(bf16_matmul, "_STRIP", 2)
    monkeypatch.setattr(bf16_matmul, "_THIN", 6)


@pytest.mark.parametrize(("rows", "summed", "columns"), [(1, 3, 2), (9, 4, 5), (4, 11, 9), (3, 0, 2), (0, 2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_plain(rows: int, summed: int, columns: int, transposed: bool) -> None:
    left = matrices(rows, summed)
    right = matrices(columns, summed).T if transposed else matrices(summed, columns)
    expected = left.double() @ right.double()
    near(bf16_matmul._PRODUCTS["mm"](left, right), expected)
    out = torch.empty(columns, rows, dtype=torch.bfloat16).T
    assert bf16_matmul._PRODUCTS["mm.out"](left, right, out=out) is out
    near(out, expected)


@pytest.mark.parametrize("kept", [(7,), (5, 1), (5, 7)])
@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.25, 1), (2, 0.5), (1, 0)])
def test_added(kept: tuple[int, ...], alpha: float, beta: float) -> None:
    left, right, start = matrices(5, 6), matrices(6, 7), matrices(*kept)
    if beta == 0:
        start.fill_(torch.nan)  # is not looked at, as in PyTorch
    expected = alpha * (left.double() @ right.double()) + (beta * start.double() if beta else 0)
    near(bf16_matmul._PRODUCTS["addmm"](start, left, right, alpha=alpha, beta=beta), expected)
    here = start.expand(5, 7).clone()
    assert bf16_matmul._PRODUCTS["addmm_"](here, left, right, alpha=alpha, beta=beta) is here
    near(here, expected)
    out = torch.empty(5, 7, dtype=torch.bfloat16)
    near(bf16_matmul._PRODUCTS["addmm.out"](start, left, right, alpha=alpha, beta=beta, out=out), expected)


def test_several() -> None:
    left, right, start = matrices(3, 5, 6), matrices(3, 6, 7), matrices(7)
    expected = left.double() @ right.double()
    near(bf16_matmul._PRODUCTS["bmm"](left, right), expected)
    wide = torch.empty(3, 5, 9, dtype=torch.bfloat16)
    near(bf16_matmul._PRODUCTS["bmm.out"](left, right, out=wide[:, :, 1:8]), expected)
    near(bf16_matmul._PRODUCTS["baddbmm"](start, left, right, alpha=3), 3 * expected + start.double())
    here = start.expand(3, 5, 7).clone()
    near(bf16_matmul._PRODUCTS["baddbmm_"](here, left, right, beta=2), expected + 2 * start.double())
    for name, pair in {"mm": (left[0], left[0]), "bmm": (left[:2], right)}.items():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            bf16_matmul._PRODUCTS[name](*pair)


_INSTALLED = """
import warnings, torch
warnings.simplefilter("error")
from byeori.kernels import bf16_matmul as products
left, right = torch.randn(30, 50), torch.randn(50, 20)
exact, calls = left @ right, []
whole = products._multiply_one
products._multiply_one = lambda *args, **how: (calls.append(1), whole(*args, **how))[1]
x, layer = left.bfloat16().requires_grad_(), torch.nn.Linear(50, 20, dtype=torch.bfloat16)
outside = left.bfloat16() @ right.bfloat16()
with products.installed(), products.installed():
    assert torch.equal(left @ right, exact) and not calls
    layer(x).sum().backward()
    assert len(calls) == 3, calls
    assert (torch.matmul(x[None].expand(4, -1, -1), right.bfloat16().expand(4, -1, -1))).shape == (4, 30, 20)
    before = len(calls)
    one = layer(left[:1].bfloat16())  # a single row goes PyTorch's own way
    assert len(calls) == before
    assert torch.allclose(one, layer(left[:2].bfloat16())[:1], rtol=2**-6, atol=2**-6) and len(calls) == before + 1
    out = torch.empty(3, 3, dtype=torch.bfloat16)
    torch.mm(left[:3, :3].bfloat16(), right[:3, :3].bfloat16(), out=out)
    try:
        left @ right.bfloat16()
    except RuntimeError as error:
        assert "dtype" in str(error)
    else:
        raise SystemExit("types were mixed without a word")
before = len(calls)
assert torch.equal(left.bfloat16() @ right.bfloat16(), outside) and len(calls) == before  # PyTorch's own again
by_hand = torch.ones(30, 20, dtype=torch.double) @ layer.weight.double()
assert torch.allclose(x.grad.double(), by_hand, rtol=2**-8, atol=1e-6)
"""


def test_installed_inside_a_context_only() -> None:
    """Only bfloat16's products change, in the forward and the backward pass, and only inside; nothing is printed."""
    done = subprocess.run([sys.executable, "-c", _INSTALLED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("dtype", "device", "units", "used"),
    [
        (torch.bfloat16, "cpu", False, True),
        (torch.bfloat16, "cpu", True, False),
        (torch.float32, "cpu", False, False),
        (torch.bfloat16, "cuda", False, False),
    ],
)
def test_only_where_they_are_slow(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, device: str, units: bool, used: bool
) -> None:
    monkeypatch.setattr(bf16_matmul, "units", lambda: units)
    before = dict(os.environ)
    with bf16_matmul.prepared(dtype, torch.device(device)):
        installed = bf16_matmul._installed
    assert (bf16_matmul.workspace_bytes(dtype, torch.device(device)) > 0, installed) == (used, used)
    assert not bf16_matmul._installed
    assert dict(os.environ) == before


_MAKE = """
import torch
from byeori.kernels import bf16_matmul

for length in [*range(8, 148), 8]:  # convolutions go through oneDNN on every processor
    with bf16_matmul.prepared(torch.float32, torch.device("cpu")):
        torch.nn.functional.conv2d(torch.ones(4, 16, length, 40), torch.ones(16, 16, 3, 3))
"""


@pytest.mark.parametrize(("given", "made"), [(None, 2), ("1024", 1)])
def test_the_code_of_few_products_is_kept(given: str | None, made: int) -> None:
    """The first shape's is made once more after 140 others, unless the user keeps more."""
    around = {**os.environ, "ONEDNN_VERBOSE": "2"}
    around.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    around |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": given} if given else {}
    out = subprocess.run([sys.executable, "-c", _MAKE], env=around, capture_output=True, text=True, check=True).stdout
    lines = [line for line in out.splitlines() if "create:cache_miss" in line and ",convolution," in line]
    assert len(lines) == 139 + made


_HOLD = """
import ctypes, torch
from byeori.kernels import bf16_matmul
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "a b c d e f g used i j".split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap
left, right = torch.ones(4096, 64, dtype=torch.bfloat16), torch.ones(64, 128, dtype=torch.bfloat16)
with bf16_matmul.prepared(torch.bfloat16, torch.device("cpu")):
    torch.mm(left[:8], right)
before = mallinfo().used
for rows in range(16, 4096, 8):
    torch.mm(left[:rows], right)
print(mallinfo().used - before)
"""


def test_measuring_the_processor_first_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first product reads how many are cached; afterwards the environment is as before."""
    seen = []
    for name in bf16_matmul._CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def clock() -> float:
        seen.append([os.environ[name] for name in bf16_matmul._CACHE_VARIABLES])
        return float(len(seen))

    monkeypatch.setattr(machines.time, "perf_counter", clock)
    machines.measured_peak(torch.float32, 8)
    assert seen[0] == ["128", "128"]
    assert not set(bf16_matmul._CACHE_VARIABLES) & set(os.environ)


@pytest.mark.skipif(not bf16_matmul.units(), reason="these products go through oneDNN only where it has units for them")
def test_products_of_ever_new_shapes_take_no_more_than_is_counted() -> None:
    around = {name: value for name, value in os.environ.items() if name not in bf16_matmul._CACHE_VARIABLES}
    out = subprocess.run([sys.executable, "-c", _HOLD], env=around, capture_output=True, text=True, check=True).stdout
    assert 0 < int(out) < bf16_matmul.code_bytes(torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "units", "taken"),
    [(torch.float32, True, 0), (torch.bfloat16, False, 0), (torch.bfloat16, True, 79_360_000)],
)
def test_kept_code_is_counted(dtype: torch.dtype, units: bool, taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_matmul, "units", lambda: units)
    assert bf16_matmul.code_bytes(dtype) == taken
