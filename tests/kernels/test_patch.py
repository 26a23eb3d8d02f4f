"""Every part of --speed against the models' own code in float64, and the C kernels against PyTorch's operations."""

from __future__ import annotations

import functools

import pytest
import torch

import kernel_cases
import zoo
from byeori.batch import forest as forests
from byeori.config import SPEED, SftSettings, check
from byeori.data.tokenize import Example
from byeori.errors import ConfigError
from byeori.kernels import (
    cpu_attention,
    forest_attention,
    gated_mlp,
    last_layer,
    lora_linear,
    native,
    patch,
    qkv_rope,
    switches,
)
from byeori.kernels import dispatch as kernels
from byeori.model import adapter, forward

CPU = torch.device("cpu")
# what is found in each kind: (gated layers, attention modules, the last layer), of two layers
FOUND = {
    "llama": (2, 2, True),
    "qwen3": (2, 2, True),
    "gemma3": (2, 2, True),
    "gemma2": (2, 2, True),
    "gpt2": (0, 0, False),
    "mistral": (2, 2, True),
    "phi": (0, 0, False),
    "mixtral": (0, 2, True),  # experts
    "cohere": (2, 0, False),  # turns neighbours, not halves
    "granite": (2, 2, True),
    "hyperclovax": (2, 2, True),
    "deepseek_v3": (2, 0, False),  # one dense layer, one shared expert
    "gpt_oss": (0, 0, False),
}


@pytest.fixture(autouse=True)
def _short_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prune the last layer of short examples too."""
    monkeypatch.setattr(last_layer, "_AT_MOST_ONE_IN", 1)


@functools.cache
def expected(kind: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    _, plain = zoo.tiny(kind, dtype)
    with zoo.Wide():
        loss = zoo.plain_loss(plain, zoo.tree())
        return loss.item(), zoo.gradients(plain, loss)


def difference(kind: str, dtype: torch.dtype, parts: list[str]) -> tuple[float, float]:
    """Relative differences of the loss and of the worst gradient from the plain computation."""
    model, _ = zoo.tiny(kind, dtype)
    forward.use_forest_attention(model)
    patch.fuse(model, parts)
    loss, gradients = expected(kind, dtype)
    with zoo.Wide(), forward.accelerated(model):
        found = -forward.forest_logprobs(model, forests.build(zoo.tree(), min_shared=1)).sum()
        return abs(found.item() - loss) / abs(loss), zoo.worst(zoo.gradients(model, found), gradients)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_everything_at_once_equals_the_models_own_code(kind: str) -> None:
    loss, gradient = difference(kind, torch.float64, list(SPEED))
    assert loss < 1e-10
    assert gradient < 1e-10


@pytest.mark.parametrize("parts", [[], ["attention"], ["norms"], ["mlp"], ["heads"], ["heads", "last_layer"]], ids=str)
def test_each_part_alone(parts: list[str]) -> None:
    loss, gradient = difference("gemma3", torch.float64, parts)
    assert loss < 1e-10
    assert gradient < 1e-10


@pytest.mark.parametrize("parts", [list(SPEED), [part for part in SPEED if part != "kernels"]], ids=["C", "PyTorch"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gemma2", "mistral", "mixtral"])
def test_float32(kind: str, parts: list[str]) -> None:
    loss, gradient = difference(kind, torch.float32, parts)
    assert loss < 1e-5
    assert gradient < 1e-4


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_what_is_found_and_what_is_left_alone(kind: str) -> None:
    model, _ = zoo.tiny(kind)
    names = model.state_dict().keys()
    assert (gated_mlp.fuse_mlps(model), qkv_rope.fuse_attention(model), last_layer.prune(model)) == FOUND[kind]
    assert model.state_dict().keys() == names


def test_the_last_layer_computes_few_rows() -> None:
    model, _ = zoo.tiny("llama")
    forward.use_forest_attention(model)
    assert qkv_rope.fuse_attention(model) == 2
    assert last_layer.prune(model)
    seen: list[int] = []
    base = model.get_base_model().model
    for layer in base.layers:
        layer.mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    forest = forests.build([Example(token_ids=list(range(3, 23)), targets=((17, 20),))])
    forward.forest_logprobs(model, forest)
    assert seen == [19, 3]


@pytest.mark.parametrize("training", [True, False])
def test_with_dropout_the_last_layer_computes_few_rows_too(training: bool) -> None:
    forest_attention.register()
    base = zoo.KINDS["llama"]().double()
    model = adapter.attach(base, r=3, alpha=5, dropout=0.5, targets=["all-linear"], seed=1).train()
    lora_linear.fuse(model)
    assert forward.use_forest_attention(model)
    patch.fuse(model.get_base_model(), list(SPEED))
    assert model.get_base_model().training
    seen: list[int] = []
    model.get_base_model().model.layers[-1].mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[1]))
    forest = forests.build([Example(token_ids=list(range(3, 23)), targets=((17, 20),))])
    forward.forest_logprobs(model.train(training), forest)
    assert seen == [3]


def test_rows_of_a_forest() -> None:
    """Two branches behind 0..3; rows 2 (in the trunk), 4, 5 (first branch) and 8 (second) predict something."""
    nodes = ((0, 4, ((0, 4),)), (4, 7, ((0, 7),)), (7, 9, ((0, 4), (7, 9))))
    whole = forest_attention.Layout(nodes=nodes, rows=torch.tensor([2, 4, 5, 8]), row_numbers=[2, 4, 5, 8])
    found = forest_attention.of_rows(whole, torch.zeros(9, 2))
    assert found.nodes == ((0, 1, ((0, 3),)), (1, 3, ((0, 6),)), (3, 4, ((0, 4), (7, 9))))


def test_blocks_meet_only_the_keys_in_their_window() -> None:
    block = cpu_attention._Block
    assert list(cpu_attention._blocks(0, 300, ((0, 300),), (300, 300), 100)) == [
        block(slice(0, 128), slice(0, 128), 0, 128),
        block(slice(128, 256), slice(0, 256), 128, 128),
        block(slice(256, 300), slice(128, 300), 128, 44),
    ]
    branch = cpu_attention._blocks(500, 650, ((0, 150), (500, 650)), (650, 300), None)  # its path is 150 longer than it
    assert list(branch) == [
        block(slice(500, 628), slice(0, 256), 150, 106),
        block(slice(606, 650), slice(0, 300), 256, 44),
    ]


def test_blocks_are_filled_up_to_few_shapes() -> None:
    """Rows to multiples of 32, keys to multiples of 64, as far as there are any."""
    found = [
        next(cpu_attention._blocks(0, end, ((0, end),), (400, 400), None)) for end in (1, 31, 32, 33, 64, 65, 96, 127)
    ]
    assert {(block.rows.stop, block.keys.stop) for block in found} == {(32, 64), (64, 64), (96, 128), (128, 128)}
    assert [block.count for block in found] == [1, 31, 32, 33, 64, 65, 96, 127]
    (short,) = cpu_attention._blocks(0, 40, ((0, 40),), (50, 45), None)
    assert (short.rows, short.keys) == (slice(0, 50), slice(0, 45))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_long_branches_against_one_masked_softmax(window: int | None, dtype: torch.dtype) -> None:
    """A trunk of 200 tokens and two branches of 150: blocks end inside all of them."""
    torch.manual_seed(0)
    nodes = ((0, 200, ((0, 200),)), (200, 350, ((0, 350),)), (350, 500, ((0, 200), (350, 500))))
    states = [torch.randn(1, count, 500, 16, dtype=torch.float64) for count in (4, 2, 2)]
    grad = torch.randn(1, 500, 4, 16, dtype=torch.float64)
    states, grad = [part.to(dtype).double() for part in states], grad.to(dtype).double()
    place = torch.cat([torch.arange(350), torch.arange(200, 350)])
    visible = place[:, None] >= place[None, :]
    visible[350:, 200:350] = visible[200:350, 350:] = False
    if window is not None:
        visible &= place[:, None] - place[None, :] < window
    query, key, value = (part.clone().requires_grad_() for part in states)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.25
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    right = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    right.backward(grad)
    ours = [part.to(dtype).requires_grad_() for part in states]
    found = cpu_attention.attend(*ours, nodes, window, 0.25)
    found.backward(grad.to(dtype))
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(
        [found, *(part.grad for part in ours)], [right, query.grad, key.grad, value.grad], strict=True
    ):
        assert float((one - other).detach().norm() / other.detach().norm()) < limit


def test_scores_round_less_around_the_mean_key() -> None:
    """Keys that lie far from 0 but near each other: bf16 scores of them would differ by rounding alone."""
    torch.manual_seed(0)
    nodes = ((0, 60, ((0, 60),)),)
    query, key, value = (torch.randn(1, 1, 60, 64).to(torch.bfloat16) for _ in range(3))
    far = key + 32
    wide = [part.double() for part in (query, far, value)]
    right = cpu_attention.attend(*wide, nodes, None, 1.0)
    found = cpu_attention.attend(query, far, value, nodes, None, 1.0)
    plain = (query @ far.mT).float().masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf).softmax(-1)
    naive = (plain.to(value.dtype) @ value).transpose(1, 2)
    assert (found - right).norm() < 0.1 * (naive - right).norm()


@pytest.mark.parametrize("kernels", [False, True])
def test_large_scores_are_as_exact_as_small_ones(kernels: bool) -> None:
    """Scores near 100,000, as a run that diverges has them, in float32: weights depend on differences alone."""
    torch.manual_seed(0)
    scores = (1e5 + 8 * torch.randn(2, 60, 60)).float()
    weights, grad = scores.clone(), torch.randn(2, 60, 60)
    wide = (scores.double() * 0.3).masked_fill(torch.ones(60, 60).triu(1).bool(), -torch.inf).requires_grad_()
    right = wide.softmax(-1)
    (to_scores,) = torch.autograd.grad(right, wide, grad.double())
    block = cpu_attention._Block(slice(0, 60), slice(0, 60), 0, 60)
    with switches.using(switches.Switches(kernels=kernels)):
        sums = cpu_attention._softmax(weights, block, 0.3, None)
        assert float((weights - right).abs().max()) < 1e-6
        again = scores.clone()
        cpu_attention._softmax_back(again, grad, sums, block, 0.3, None)
    assert torch.equal(again, weights)
    assert float((grad - 0.3 * to_scores).norm() / to_scores.norm()) < 1e-6


@kernel_cases.needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [2, 18, 256])
def test_kernels(dtype: torch.dtype, size: int) -> None:
    kernel_cases.check(dtype, size, torch.device("cpu"))


@kernel_cases.needs_compiler
def test_a_nan_goes_through_every_kernel() -> None:
    kernel_cases.check_nan(torch.device("cpu"))
    scores = torch.ones(2, 4)
    scores[0, 1] = torch.nan
    native.call("softmax", scores, torch.ones(2, 2), 1.0, 2, 4, 2, 2, 1, 2, 4)
    assert scores[0].isnan().any()
    assert not scores[1].isnan().any()


def test_nothing_that_is_kept_is_written_over() -> None:
    """A second backward pass over the same graph gives the same."""
    model, _ = zoo.tiny("gemma3", torch.float32)
    forward.use_forest_attention(model)
    patch.fuse(model, list(SPEED))
    loss = -forward.forest_logprobs(model, forests.build(zoo.tree(), min_shared=1)).sum()
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, parameters, allow_unused=True)
    for left, right in zip(first, second, strict=True):
        assert left is None or torch.equal(left, right)


def test_dropout_and_a_switched_off_adapter() -> None:
    model, plain = zoo.tiny("llama")
    forward.use_forest_attention(model)
    patch.fuse(model, list(SPEED))
    forest = forests.build(zoo.tree(), min_shared=1)
    with zoo.Wide(), torch.no_grad():
        adapted = forward.forest_logprobs(model, forest)
        with model.disable_adapter(), plain.disable_adapter():
            bare = forward.forest_logprobs(model, forest)
            assert abs(bare.sum() + zoo.plain_loss(plain, zoo.tree())) < 1e-9
        assert not torch.allclose(bare, adapted)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.5)
        model.train()
        assert not torch.allclose(forward.forest_logprobs(model, forest), forward.forest_logprobs(model, forest))
        model.eval()
        torch.testing.assert_close(forward.forest_logprobs(model, forest), adapted)


def test_without_a_compiler_pytorch_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    native._built.cache_clear()
    try:
        assert not native.supports(torch.zeros(2))
    finally:
        native._built.cache_clear()


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"base_model": "m", "data_path": "d", "output_dir": "o"}
    assert patch.parts(check(SftSettings, needed).speed, CPU) == list(SPEED)
    on_a_gpu = ["kernels", "norms", "mlp", "heads", "last_layer"]
    assert patch.parts(["auto"], torch.device("cuda")) == on_a_gpu
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert patch.parts(["auto"], torch.device("cuda")) == on_a_gpu  # of a plan, which is made elsewhere
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert patch.parts(["auto"], torch.device("cuda")) == ["norms"]
    assert patch.parts(check(SftSettings, needed | {"speed": "off"}).speed, CPU) == []
    assert patch.parts(check(SftSettings, needed | {"speed": "mlp, norms"}).speed, CPU) == ["mlp", "norms"]
    with pytest.raises(ConfigError, match="--speed: unknown 'flash'; give auto, off, or some of attention, "):
        check(SftSettings, needed | {"speed": "mlp,flash"})
