"""Loads gpu.cpp and lets torch.cuda speak of it. The suite runs tests/gpu on it (test_pretended_gpu.py); by hand:

    PYTHONPATH=tests/pretended python -m pytest -p pretended_gpu -m "not silicon" tests/gpu

Attention's kernel is the one that tests/helpers/written_out.py writes out, with what the real one demands of its
arguments. Where Triton is installed, its kernels run in its interpreter; in other tests than those of these kernels
kernels.c takes their place, in a tenth of the time. Nothing can be compiled for this GPU; tests that need a real one
are marked `silicon`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
MEMORY = 80 * 2**30
os.environ["BYEORI_TEST_GPUS"] = "0"
os.environ["TRITON_INTERPRET"] = "1"


def build(folder: Path) -> Path:
    """gpu.cpp as a library for the installed PyTorch; takes some 20 seconds, once."""
    source = HERE / "gpu.cpp"
    spec = find_spec("torch")
    assert spec
    assert spec.origin
    torch_folder = Path(spec.origin).parent
    of = f"{torch_folder} {version('torch')}"  # the library finds PyTorch's own by their place
    key = hashlib.sha256(source.read_bytes() + of.encode()).hexdigest()[:16]
    library = folder / f"pretended-gpu-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        include, lib = torch_folder / "include", torch_folder / "lib"
        places = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", f"-Wl,-rpath,{lib}"]
        options = ["-std=c++20", "-O1", "-shared", "-fPIC", *places, "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", str(source), *options, "-o", str(made)], check=True)
        made.replace(library)
    return library


def load() -> ctypes.CDLL:
    assert "torch" not in sys.modules, "PyTorch asks for its devices when it is imported, so this comes before it"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = ctypes.CDLL(str(build(home / "byeori")), mode=ctypes.RTLD_GLOBAL)
    library.gpu_allocated.restype = library.gpu_peak.restype = ctypes.c_long
    library.gpu_limit.argtypes = [ctypes.c_long]
    return library


GPU = load()
import torch  # noqa: E402


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _nothing(self, *args: Any) -> None:
        pass

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


class Stream(Event):
    device = torch.device("cuda", 0)
    wait_stream = wait_event = Event._nothing

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()


def set_sync_debug_mode(mode: str | int) -> None:
    GPU.gpu_no_waiting(int(mode in ("error", 2)))


def pretend() -> None:
    """torch.cuda of one GPU, an H100 in its sizes."""
    card = SimpleNamespace(
        total_memory=MEMORY, name="pretended", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20
    )
    said = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": card.name,
        "get_device_properties": card,
        **dict.fromkeys(("_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all")),
    }
    torch.cuda.default_generators = (torch.default_generator,)  # its random numbers are the CPU's
    for name, value in said.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    held = {"memory_allocated": GPU.gpu_allocated, "memory_reserved": GPU.gpu_allocated}
    held |= {"max_memory_allocated": GPU.gpu_peak, "max_memory_reserved": GPU.gpu_peak}
    held |= {"reset_peak_memory_stats": GPU.gpu_reset_peak}
    for name, ask in held.items():
        setattr(torch.cuda, name, lambda *args, ask=ask, **kwargs: ask())
    torch.cuda.mem_get_info = lambda *args: (MEMORY - GPU.gpu_allocated(), MEMORY)
    torch.cuda.set_per_process_memory_fraction = lambda part, *args: GPU.gpu_limit(int(part * MEMORY))
    torch.cuda.set_sync_debug_mode = set_sync_debug_mode
    stream = Stream()
    for name, what in {"Stream": Stream, "Event": Event}.items():
        setattr(torch.cuda, name, what)
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *args: stream)
    torch.cuda.stream = lambda stream: nullcontext()
    torch._C._cuda_getCurrentRawStream = lambda *args: 0
    torch.Tensor.record_stream = lambda *args: None
    _copies()
    for name, kernel in (("forward", _flash_forward), ("backward", _flash_backward)):
        KERNELS.impl(f"_flash_attention_{name}", kernel, "CUDA")


def _copies() -> None:
    """copy.deepcopy of tensors, which asks PyTorch for a storage that only real devices have."""
    before = torch.Tensor.__deepcopy__

    def deepcopy(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if not self.is_cuda or type(self) is not torch.Tensor:
            return before(self, memo)
        memo[id(self)] = out = self.detach().clone().requires_grad_(self.requires_grad)
        return out

    torch.Tensor.__deepcopy__ = deepcopy


KERNELS = torch.library.Library("aten", "IMPL")


def _call(states: list[torch.Tensor], sizes: tuple[Any, ...], left: int | None, right: int | None) -> Any:
    """What the kernel demands, and cuda_calls.Call of its arguments."""
    from byeori.kernels.cuda_calls import Call

    cu_q, cu_k, max_q, max_k, dropout, causal, *_ = sizes
    assert dropout == 0.0
    assert len({each.dtype for each in states}) == 1
    assert states[0].dtype in (torch.bfloat16, torch.float16)
    assert all(each.is_cuda and each.stride(-1) == 1 for each in (*states, cu_q, cu_k))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert right == (0 if causal or left != -1 else -1)
    cu_q, cu_k = cu_q.cpu(), cu_k.cpu()
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(states[0]), len(states[1]))
    ends = {"causal": right == 0, "window": None if left in (None, -1) else left + 1}
    rest = {"queries": slice(0, 0), "keys": slice(0, 0), "once": True}
    return Call(cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k, **ends, **rest)


def _flash_forward(*given: Any, scale: float, **window: int) -> tuple[torch.Tensor, ...]:
    from written_out import WRITTEN_OUT

    states, sizes = list(given[:3]), given[3:]
    with _host_may_wait():
        call = _call(states, sizes, window["window_size_left"], window["window_size_right"])
        out, lse = WRITTEN_OUT.forward(*(each.cpu().float() for each in states), call, scale)
        nothing = torch.empty(0, device=states[0].device)
        return out.to(states[0]), lse.to(nothing.device), nothing, nothing, nothing


def _flash_backward(*given: Any, scale: float, **window: int) -> tuple[torch.Tensor, ...]:
    from byeori.kernels import cuda_attention
    from written_out import WRITTEN_OUT

    grad, query, key, value, out, lse, *sizes = given
    assert lse.dtype == torch.float32
    assert lse.is_contiguous()
    scratch = cuda_attention.backward_scratch(query, key, len(sizes[0]) - 1)
    with _host_may_wait():
        call = _call(
            [query, key, value, out, grad], tuple(sizes), window["window_size_left"], window["window_size_right"]
        )
        wide = [each.cpu().float() for each in (grad, query, key, value, out, lse)]
        found = tuple(part.to(query) for part in WRITTEN_OUT.backward(*wide, call, scale))
    del scratch
    return found


def _interpreted() -> None:
    """Triton's interpreter on this GPU's tensors as they are, rounding to bfloat16 as a GPU does; it cuts off."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from byeori.kernels import triton_kernels

    before, run = interpreter.InterpreterBuilder.cast_impl, interpreter.GridExecutor.__call__

    def cast(self: Any, source: Any, kind: Any) -> Any:
        way, numbers = (source.dtype.scalar, kind.scalar), np.array(source.data)
        if way == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(numbers).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)
        if way == (tl.bfloat16, tl.float32):  # the same in a hundredth of the time
            return interpreter.TensorHandle((numbers.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return before(self, source, kind)

    def call(*given: Any, **named: Any) -> Any:
        with _host_may_wait():
            return run(*given, **named)

    interpreter.InterpreterBuilder.cast_impl = cast
    for name in ("create_fp_trunc", "create_fp_ext"):
        setattr(interpreter.InterpreterBuilder, name, cast)
    interpreter.GridExecutor.__call__ = call
    interpreter.GridExecutor._init_args_hst = lambda self, given, named: (given, named)
    interpreter.GridExecutor._restore_args_dev = lambda *given: None
    triton_kernels.TILE = 2**14  # programs run one after the other


@contextmanager
def _host_may_wait() -> Iterator[None]:
    """Inside a kernel that is written out: what it does is not what a GPU's does."""
    before = GPU.gpu_no_waiting(0)
    try:
        yield
    finally:
        GPU.gpu_no_waiting(before)


def pytest_runtest_setup(item: Any) -> None:
    """Tests of Triton's kernels have them interpreted; what kernels.c does not know is interpreted for others too."""
    from byeori.kernels import native, triton_kernels

    def call(name: str, *given: Any) -> None:
        first = next(each for each in given if isinstance(each, torch.Tensor))
        (TRITON if first.dtype not in native._SUFFIXES or native.problem() else native.call)(name, *given)

    triton_kernels.call = TRITON if item.path.name == "test_cuda_fused.py" else call


pretend()
if find_spec("triton"):
    _interpreted()
    from byeori.kernels import triton_kernels

    TRITON = triton_kernels.call
