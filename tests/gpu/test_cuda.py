"""What the rest of the suite shows on the CPU, on a GPU: exactness, adapters, log-probs, runs with the same bits."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
import zoo
from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import (
    cuda_attention,
    cuda_calls,
    dispatch,
    forest_attention,
    lora_linear,
    patch,
    rms_norm,
    switches,
)
from byeori.kernels.dropout import SeededDropout
from byeori.kernels.lm_head import Head, target_logprobs
from byeori.model import activation_offload, adapter, first_use, forward, wrap
from byeori.model.device_batch import place, windows
from runs import log, losses, settings, sha
from runs import sft as run_sft

GPU = torch.device("cuda")


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def loss_of(model: Any, examples: list[Example], *, share: bool = True) -> torch.Tensor:
    forest = forests.build(examples, share=share, min_shared=1)
    return -forward.forest_logprobs(model, forest).sum()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gemma2", "mistral", "gpt_oss", "granite"])
def test_float64_equals_single_sequences(kind: str) -> None:
    """The per-node path with PyTorch's own attention."""
    model, plain = (part.to(GPU) for part in zoo.tiny(kind))
    assert forward.use_forest_attention(model)
    with zoo.Wide():
        expected = plain_loss(plain, zoo.tree())
        loss = loss_of(model, zoo.tree())
        assert abs(loss.item() - expected.item()) / expected.item() < 1e-10
        assert zoo.worst(zoo.gradients(model, loss), zoo.gradients(plain, expected)) < 1e-10


def plain_loss(model: Any, examples: list[Example]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=GPU)
    for example in examples:
        ids = torch.tensor([list(example.token_ids)], device=GPU)
        logp = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
        at = torch.tensor([i for start, end in example.targets for i in range(start, end)], device=GPU)
        total = total - logp[at - 1, ids[0, at]].sum()
    return total


@pytest.fixture(scope="module")
def wide_model() -> Any:
    """Heads of 64, grouped, two layers; adapters everywhere; float32, random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=900,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.06,
    )
    forest_attention.register()
    base = LlamaForCausalLM(config).eval().to(GPU)
    model = adapter.attach(base, r=8, alpha=8, dropout=0.0, targets=["all-linear"], seed=1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    lora_linear.fuse(model)
    assert forward.use_forest_attention(model)
    return model


def long_rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(3, 900, (count,), generator=generator).tolist()

    prompt, stem = words(200), words(30)
    rows = [prompt + words(40), prompt + words(25), prompt + stem + words(20), prompt + stem + words(9), words(77)]
    return [Example(token_ids=row, targets=((len(row) - 7, len(row)),)) for row in rows]


def result(model: Any, *, share: bool) -> dict[str, torch.Tensor]:
    loss = loss_of(model, long_rows(), share=share)
    grads = zoo.gradients(model, loss)
    return {"loss": loss.detach().double()} | {name: grad.double() for name, grad in grads.items()}


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> list[float]:
    flat = [torch.cat([part[name].reshape(-1) for name in part if name != "loss"]) for part in (found, exact)]
    apart = [flat, [found["loss"], exact["loss"]]]
    return [float((left - right).norm() / right.norm()) for left, right in apart]


def test_shared_against_separate(wide_model: Any) -> None:
    """float32: 1e-5. bf16: no further from float32 than computing every row apart, but for the luck of rounding."""
    exact = result(wide_model, share=False)
    assert max(distance(result(wide_model, share=True), exact)) < 1e-5
    half = copy.deepcopy(wide_model).to(torch.bfloat16)
    for name, parameter in half.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    lora_linear.fuse(half)
    separate, shared = (distance(result(half, share=share), exact) for share in (False, True))
    assert shared[0] <= 1.1 * separate[0]
    assert shared[1] <= separate[1] + 2e-3


def test_what_is_kept_in_the_cpus_memory(wide_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as with the inputs of layers on the GPU, and the host waits for no copy."""
    monkeypatch.setattr(activation_offload, "LEAST", 1)
    found = []
    for kind in ("full", "offload"):
        model = copy.deepcopy(wide_model).to(torch.bfloat16)
        wrap.recompute_layers(model.get_base_model(), kind)
        for _ in range(2):  # the first pass asks the system for pinned memory
            found.append(result(model.train(), share=True))
    for name, exact in found[0].items():
        assert all(torch.equal(other[name], exact) for other in found[1:]), name
    batch = place(forests.build(long_rows()), GPU, windows(model.config))
    with no_waiting():
        (-forward.forest_logprobs(model, batch)).sum().backward()


@pytest.fixture
def accelerated(wide_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("BYEORI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(activation_offload, "LEAST", 1)
    model = copy.deepcopy(wide_model).to(torch.bfloat16)
    lora_linear.fuse(model)
    wrap.recompute_layers(model.get_base_model(), "offload")
    patch.fuse(model.get_base_model(), patch.parts(["auto"], GPU))
    return model


def test_what_works_here_is_kept(accelerated: Any) -> None:
    used = patch.in_use(accelerated.get_base_model())
    assert {"flash", "offload", "lora"} <= set(used)
    assert first_use.give_up_broken(accelerated, long_rows()) == []
    assert patch.in_use(accelerated.get_base_model()) == used


@pytest.mark.parametrize("fault", ["raises", "wrong"])
@pytest.mark.parametrize("part", ["flash", "cascade", "offload", "kernels"])
def test_what_fails_on_its_first_use_is_given_up(
    part: str, fault: str, accelerated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention, the merging of its cascade, copies of activations, a fused kernel: broken one at a time."""
    base = accelerated.get_base_model()
    if part == "kernels" and not dispatch.has_triton():
        pytest.skip("needs Triton")
    owner, name = {
        "flash": (cuda_attention, "_flash_backward"),
        "cascade": (cuda_attention, "_merge"),
        "offload": (activation_offload.Link, "copy"),
        "kernels": (dispatch, "call"),
    }[part]
    right = getattr(owner, name)

    def broken(*given: Any, **named: Any) -> Any:
        if part == "offload" and not switches.current().offload:
            return right(*given, **named)
        if fault == "raises":
            raise RuntimeError("CUDA error: invalid configuration argument")
        result = right(*given, **named)
        if part == "flash":
            return tuple(1.5 * each for each in result)
        with torch.no_grad():  # what it wrote: the first of its tensors, or the last
            written = [each for each in given if isinstance(each, torch.Tensor)]
            written[0 if part == "cascade" or given[0] == "online_softmax" else -1].mul_(1.5)
        return result

    if part == "flash":
        monkeypatch.setattr(
            cuda_attention, "FLASH", cuda_attention.Kernel(forward=cuda_attention.FLASH.forward, backward=broken)
        )
    else:
        monkeypatch.setattr(owner, name, broken)
    (line,) = first_use.give_up_broken(accelerated, long_rows())
    gone = "flash" if part == "cascade" else part
    assert f"({gone}) " in line and ("invalid configuration" if fault == "raises" else "gives other") in line
    assert gone not in patch.in_use(base) and first_use.give_up_broken(accelerated, long_rows()) == []


@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_pinned_copies_that_fail(fault: str, accelerated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: torch.Tensor) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros_like(self)

    expected = first_use.compute(accelerated, [long_rows()], plain=False).logprobs
    monkeypatch.setattr(torch.Tensor, "pin_memory", broken)
    cuda_calls.pinning_problem.cache_clear()
    try:
        base = accelerated.get_base_model()
        notes = [note for note in patch.notes(base, [], torch.bfloat16, GPU) if "pinned" in note]
        assert len(notes) == 1 and ("out of memory" if fault == "raises" else "other numbers arrive") in notes[0]
        assert torch.equal(first_use.compute(accelerated, [long_rows()], plain=False).logprobs, expected)
    finally:
        cuda_calls.pinning_problem.cache_clear()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.silicon)])
def test_nobody_waits_between_forward_and_backward(wide_model: Any, compiled: bool) -> None:
    model = copy.deepcopy(wide_model).to(torch.bfloat16)
    lora_linear.fuse(model)
    if compiled:
        wrap.compile_layers(model.get_base_model())
    else:
        rms_norm.fuse_norms(model.get_base_model())
    forest = forests.build(long_rows())
    for _ in range(2):  # the first pass compiles and fills caches
        (-forward.forest_logprobs(model, place(forest, GPU, windows(model.config)))).sum().backward()
    with no_waiting():
        batch = place(forest, GPU, windows(model.config))
        (-forward.forest_logprobs(model, batch)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [False, True])
def test_fused_adapter(dtype: torch.dtype, dropout: bool) -> None:
    """Against float64, and in bf16 no further from it than the formula written out in bf16."""
    torch.manual_seed(0)
    sizes = {"x": (300, 256), "w": (384, 256), "bias": (384,), "a": (8, 256), "b": (384, 8), "g": (300, 384)}
    parts = {name: torch.randn(size, device=GPU, dtype=torch.float64) * 0.1 for name, size in sizes.items()}
    parts = {name: part.to(dtype).double() for name, part in parts.items()}
    drop = SeededDropout(0.1, 4) if dropout else None
    keep = drop.apply(torch.ones(300, 256, device=GPU, dtype=torch.float64)) if drop else None

    def written(kind: torch.dtype) -> list[torch.Tensor]:
        x, w, bias, a, b, g = (parts[name].to(kind).requires_grad_(name in "xab") for name in sizes)
        seen = x if keep is None else x * keep.to(kind)
        y = x @ w.t() + bias + 2.0 * (seen @ a.t()) @ b.t()
        return [part.double() for part in (y, *torch.autograd.grad(y, (x, a, b), g))]

    x, w, bias, a, b, g = (parts[name].to(dtype).requires_grad_(name in "xab") for name in sizes)
    y = lora_linear._FusedLora.apply(x, w, bias, a, b, 2.0, drop, None)
    found = [part.double() for part in (y, *torch.autograd.grad(y, (x, a, b), g))]
    for ours, theirs, exact in zip(found, written(dtype), written(torch.float64), strict=True):
        ours, theirs, exact = ours.detach(), theirs.detach(), exact.detach()
        scale = exact.norm()
        assert float((ours - exact).norm() / scale) <= max(1e-5, 1.25 * float((theirs - exact).norm() / scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_in_chunks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False, device=GPU, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(100, 64, device=GPU, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 5000, (100,), device=GPU)
    found = target_logprobs(Head(module=head), hidden, ids, chunk_bytes=4 * 5000 * 17)
    wide = hidden.detach().double().requires_grad_()
    exact = (wide @ head.weight.double().t()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), exact, rtol=limit, atol=limit)
    grads = torch.autograd.grad(found.sum(), hidden)[0], torch.autograd.grad(exact.sum(), wide)[0]
    assert float((grads[0].double() - grads[1]).norm() / grads[1].norm()) < limit


@pytest.mark.silicon
def test_the_head_never_holds_a_matrix_of_all_logits() -> None:
    """4,096 targets and 128,256 words are 2.1 GB in float32; less than a fifth of that is taken beside the weights."""
    head = torch.nn.Linear(512, 128_256, bias=False, device=GPU, dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(4096, 512, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(0, 128_256, (4096,), device=GPU)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    target_logprobs(Head(module=head), hidden, ids).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.4e9


SHAPE = ["hidden_size=256", "intermediate_size=688", "num_hidden_layers=6", "num_attention_heads=4", "vocab_size=8000"]


@pytest.mark.parametrize(("objective", "recompute"), [("sft", "none"), ("dpo", "selective"), ("sft", "full")])
def test_a_step_allocates_what_the_plan_says(objective: str, recompute: str) -> None:
    how: dict[str, Any] = {
        "gpu": "H100",
        "cutoff_len": 512,
        "micro_batch_tokens": 1024,
        "compile": "off",
        "dtype": "bfloat16",
    }
    how["gradient_checkpointing"] = recompute
    for _ in range(2 if torch.version.cuda else 1):  # the libraries of products keep the working memory they once took
        found = byeori.plan(shape=SHAPE, objective=objective, calibrate=True, **how).calibration
    assert found["device"] == "cuda"
    assert abs(found["error"]) < 0.02


RUN: dict[str, Any] = {"dtype": "bfloat16", "save_steps": 5, "lora_dropout": 0.1}


def test_runs_and_resumed_runs_have_the_same_bits(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    run_sft(tiny_model, title_rows, whole, **RUN)
    run_sft(tiny_model, title_rows, again, **RUN)
    assert sha(whole / "adapter_model.safetensors") == sha(again / "adapter_model.safetensors")
    assert losses(whole) == losses(again)
    run_sft(tiny_model, title_rows, again, **RUN, resume_from_checkpoint=str(again / "checkpoint-5"))
    assert sha(whole / "adapter_model.safetensors") == sha(again / "adapter_model.safetensors")


@pytest.mark.skipif(torch.version.cuda is not None, reason="a GPU's allocator takes more at once than these rows need")
def test_what_does_not_fit_is_computed_in_halves(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    gc.collect()
    others = torch.cuda.memory_allocated()  # what other tests hold
    run_sft(tiny_model, title_rows, tmp_path / "whole", max_steps=3)
    gc.collect()
    room = others + 0.7 * (log(tmp_path / "whole")[0]["peak_memory_bytes"] - others)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        run_sft(tiny_model, title_rows, tmp_path / "halves", max_steps=3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    lines = log(tmp_path / "halves")
    assert [line["micro_batches_halved"] for line in lines] == [1, 1, 1]
    assert max(line["peak_memory_bytes"] for line in lines) <= room
    for ours, theirs in zip(losses(tmp_path / "halves"), losses(tmp_path / "whole"), strict=True):
        assert abs(ours - theirs) / theirs < 1e-5


def test_float32_on_the_gpu_trains_as_on_the_cpu(
    tiny_model: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sft(tiny_model, title_rows, tmp_path / "gpu", max_steps=6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run_sft(tiny_model, title_rows, tmp_path / "cpu", max_steps=6)
    for ours, theirs in zip(losses(tmp_path / "gpu"), losses(tmp_path / "cpu"), strict=True):
        assert abs(ours - theirs) / theirs < 1e-4


def test_preferences(tiny_model: Path, tmp_path: Path) -> None:
    """Twice the same bits, the reference included."""
    import json

    rows = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Count to {n}: ", "chosen": "1 " * n, "rejected": "x " * n} for n in range(1, 13)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        byeori.dpo(**settings(tiny_model, rows, folder, dtype="bfloat16", max_steps=4))
    assert sha(folders[0] / "adapter_model.safetensors") == sha(folders[1] / "adapter_model.safetensors")
