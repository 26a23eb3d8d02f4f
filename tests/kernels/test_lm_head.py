"""Log-probs at targets equal log_softmax of the whole matrix, value and gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from byeori.kernels import lm_head, native, patch, switches
from byeori.kernels.lm_head import Head, target_logprobs

WORDS, SIZE, COUNT = 23, 6, 11
CHUNKS = [4 * WORDS, 4 * WORDS * 3, 4 * WORDS * COUNT, 2**26, 1]  # 1, 3, all, all, and never less than one target


def linear(*, bias: bool, frozen: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(SIZE, WORDS, bias=bias, dtype=torch.float64).requires_grad_(not frozen)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(COUNT, SIZE, dtype=dtype) * 2
    ids = torch.randint(0, WORDS, (COUNT,))
    ids[3] = ids[4]  # the same word twice
    return hidden.requires_grad_(), ids


def whole(head: Head, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """One [targets, words] matrix, PyTorch's own log_softmax."""
    logits = head.module(hidden) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, dim=-1)[torch.arange(len(ids)), ids]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize(
    ("scale", "softcap", "bias"), list(itertools.product([1.0, 0.25], [None, 1.5], [False, True])), ids=str
)
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_equals_the_whole_matrix(
    chunk: int, rows: int, scale: float, softcap: float | None, bias: bool, frozen: bool
) -> None:
    head = Head(module=linear(bias=bias, frozen=frozen), scale=scale, softcap=softcap)
    hidden, ids = inputs()
    wanted = [hidden, *(p for p in head.module.parameters() if p.requires_grad)]
    weights = torch.linspace(-1, 2, COUNT, dtype=torch.float64)
    found = target_logprobs(head, hidden, ids, chunk_bytes=chunk, block_rows=rows)
    expected = whole(head, hidden, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    left = torch.autograd.grad((found * weights).sum(), wanted)
    right = torch.autograd.grad((expected * weights).sum(), wanted)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 2.0)])
def test_gradcheck(scale: float, softcap: float | None) -> None:
    head = Head(module=linear(bias=True), scale=scale, softcap=softcap)
    hidden, ids = inputs()
    assert torch.autograd.gradcheck(lambda states: target_logprobs(head, states, ids, chunk_bytes=400), (hidden,))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_head_with_an_adapter(dropout: float) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = linear(bias=False)

    config = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=dropout, init_lora_weights=False)
    model = get_peft_model(Model(), config).double()  # type: ignore[arg-type]
    head = Head(module=model.get_submodule("base_model.model.lm_head"))
    hidden, ids = inputs()
    wanted = [hidden, *(p for p in model.parameters() if p.requires_grad)]
    assert len(wanted) == 3
    torch.manual_seed(5)
    found = target_logprobs(head, hidden, ids)
    left = torch.autograd.grad(found.sum(), wanted)
    torch.manual_seed(5)
    expected = whole(head, hidden, ids)
    right = torch.autograd.grad(expected.sum(), wanted)  # one chunk: the backward pass draws the forward's mask again
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_no_targets(frozen: bool) -> None:
    head = Head(module=linear(bias=False, frozen=frozen))
    found = target_logprobs(head, torch.zeros(0, SIZE, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    assert found.shape == (0,) and found.dtype == torch.float64


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_is_summed_in_float32(frozen: bool) -> None:
    head = Head(module=linear(bias=False, frozen=frozen).to(torch.bfloat16))
    hidden, ids = inputs(torch.bfloat16)
    found = target_logprobs(head, hidden, ids)
    assert found.dtype == torch.float32
    logits = head.module(hidden).float()
    torch.testing.assert_close(found, whole(Head(module=torch.nn.Identity()), logits, ids), rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(found.sum(), hidden)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_with_kernels_and_without(kernels: bool, scale: float, dtype: torch.dtype, limit: float) -> None:
    """Blocks of eight words, so that most targets lie in other blocks; against the whole matrix in float64."""
    module = linear(bias=True).to(dtype)
    rows, ids = inputs(dtype)
    exact = [states.detach().double() for states in (module.weight, module.bias, rows)]
    wide = linear(bias=True)
    wide.load_state_dict({"weight": exact[0], "bias": exact[1]})
    hidden = exact[2].requires_grad_()
    expected = whole(Head(module=wide, scale=scale), hidden, ids)
    with switches.using(switches.Switches(kernels=kernels)):
        found = target_logprobs(
            Head(module=module, scale=scale), rows, ids, block_rows=COUNT, block_bytes=4 * COUNT * 8
        )
    weights = torch.linspace(-1, 2, COUNT)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in ((found, expected), (rows.grad, hidden.grad)):
        assert one is not None
        assert other is not None
        assert float((one.double() - other).norm() / other.norm()) < limit


@pytest.fixture
def peaked() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A head of 8,192 words in bf16 whose probabilities fall by the word, as a tokenizer's sorted by frequency do."""
    torch.manual_seed(3)
    module = torch.nn.Linear(32, 8192, dtype=torch.bfloat16).requires_grad_(False)
    module.bias.copy_(-torch.arange(8192).log() * 2 - 1)
    module.bias[0] = 0
    hidden = torch.randn(64, 32, dtype=torch.bfloat16).requires_grad_()
    return module, hidden, torch.randint(0, 8192, (64,))


BLOCKS = {"block_rows": 64, "block_bytes": 4 * 64 * 2048}


def test_rare_words_change_a_gradient_less_than_rounding(
    peaked: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, hidden, ids = peaked
    taken = watched(monkeypatch)
    found = [gradient(module, hidden, ids, rare_words=on) for on in (True, False)]
    assert 0 < sum(taken) < 8192 / 2
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0)  # log-probs are of all words
    wide = torch.nn.Linear(32, 8192, dtype=torch.float64)
    wide.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    states = hidden.detach().double().requires_grad_()
    whole(Head(module=wide), states, ids).sum().backward()
    assert states.grad is not None
    left_out, all_words = (float((grad.double() - states.grad).norm() / states.grad.norm()) for _, grad in found)
    between = float((found[0][1] - found[1][1]).double().norm() / states.grad.norm())
    assert left_out < 1.1 * all_words
    assert between < all_words / 2


def test_no_target_loses_more_than_its_share(
    peaked: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all words are alike, each is rare and together they are everything: the guard keeps them."""
    module, hidden, ids = peaked
    module.bias.zero_()
    module.weight.zero_()
    module.weight[:, 0] = torch.linspace(0, 1, 8192)  # their mean is what is lost
    monkeypatch.setattr(lm_head, "RARE", 2.0**-10)
    (_, one), (_, other) = (gradient(module, hidden, ids, rare_words=on) for on in (True, False))
    assert float((one - other).double().norm(dim=1).max()) <= lm_head.LOST + 2**-8  # no word's vector is longer than 1


def test_the_setting_switches_it() -> None:
    for chosen in ([], ["rare_words"]):
        model = torch.nn.Module()
        patch.fuse(model, chosen)
        with patch.active(model, torch.float32, torch.device("cpu")):
            assert switches.current().rare_words is bool(chosen)
    assert switches.current().rare_words


def test_float32_leaves_no_word_out(
    peaked: tuple[torch.nn.Linear, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, hidden, ids = peaked
    taken = watched(monkeypatch)
    gradient(module.float(), hidden.detach().float().requires_grad_(), ids, rare_words=True)
    assert taken == []


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many words each block's product takes, where some are left out."""
    taken: list[int] = []
    call = native.call

    def note(name: str, *arguments: Any) -> None:
        call(name, *arguments)
        if name == "pick":
            taken.append(len(arguments[1]))

    monkeypatch.setattr(native, "call", note)
    return taken


def gradient(
    module: torch.nn.Linear, hidden: torch.Tensor, ids: torch.Tensor, *, rare_words: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the gradient of their sum."""
    with switches.using(switches.Switches(rare_words=rare_words)):
        found = target_logprobs(Head(module=module), hidden, ids, **BLOCKS)
        return found.detach(), torch.autograd.grad(found.sum(), hidden)[0]


def test_large_logits_stay_finite() -> None:
    module = linear(bias=False).requires_grad_(False)
    module.weight *= 1e4
    hidden, ids = inputs()
    found = target_logprobs(Head(module=module), hidden, ids)
    assert torch.isfinite(found).all() and torch.isfinite(torch.autograd.grad(found.sum(), hidden)[0]).all()


def test_nothing_of_vocabulary_size_is_kept() -> None:
    """What a frozen head saves for the backward pass is the hidden states and a number a target."""
    head, (hidden, ids) = Head(module=linear(bias=False)), inputs()
    saved: list[Any] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        target_logprobs(head, hidden, ids)
    assert (COUNT, WORDS) not in saved


def test_chunks_are_whole_tiles_of_rows() -> None:
    seen: list[int] = []

    class Watched(torch.nn.Linear):
        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            seen.append(len(rows))
            return super().forward(rows)

    head = Head(module=Watched(4, 10).requires_grad_(False))
    with torch.no_grad():
        for targets, rows in ((300, 150), (300, 127), (3, 150)):
            target_logprobs(
                head, torch.randn(targets, 4), torch.zeros(targets, dtype=torch.long), chunk_bytes=40 * rows
            )
    assert seen == [128, 128, 44, 127, 127, 46, 3]
