"""Attention that chooses its keys by scores (DeepSeek V3.2): prefixes are shared, each path chooses its own keys."""

from __future__ import annotations

import pytest
import torch
import transformers

from byeori.batch import forest as forests
from byeori.data.tokenize import Example
from byeori.kernels import forest_attention
from byeori.model import adapter, forward, text_model
from shrunk import shrunk


def rows() -> list[Example]:
    """A tree of four rows, longer than the number of keys that are chosen."""
    generator = torch.Generator().manual_seed(3)
    a, b, c, d, e = (torch.randint(30, 120, (n,), generator=generator).tolist() for n in (24, 12, 9, 15, 30))
    ids = [a + b + c, a + b + d, a + d, e]
    return [Example(token_ids=row, targets=((len(row) - 6, len(row)),)) for row in ids]


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_equal_to_rows_alone(kind: str) -> None:
    torch.manual_seed(0)
    forest_attention.register()
    config = shrunk(transformers.CONFIG_MAPPING[kind]())
    config.index_topk, config.index_n_heads = 8, 32  # few heads score many keys zero, and ties are broken by place
    base = text_model.auto_class(config).from_config(config).eval().requires_grad_(False)
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model = adapter.attach(base, r=3, alpha=6, dropout=0.0, targets=["all-linear"], seed=1).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert forward.choose(model, rows()) is None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = forward.forest_logprobs(model, forests.build(rows(), min_shared=4))
    assert forests.build(rows(), min_shared=4).unique_tokens < sum(len(row.token_ids) for row in rows())
    found = torch.autograd.grad(-shared.sum(), trained, allow_unused=True)
    apart = torch.zeros(())
    for row in rows():
        logp = model(input_ids=torch.tensor([list(row.token_ids)]), use_cache=False).logits[0].log_softmax(-1)
        (start, end), *_ = row.targets
        apart = apart - sum(logp[at - 1, row.token_ids[at]] for at in range(start, end))
    assert float(-shared.sum()) == pytest.approx(float(apart), rel=1e-5)
    expected = torch.autograd.grad(apart, trained, allow_unused=True)
    pairs = [(one, other) for one, other in zip(found, expected, strict=True) if other is not None]
    difference = sum(float((one - other).square().sum()) for one, other in pairs) ** 0.5
    assert difference < 1e-5 * sum(float(other.square().sum()) for _, other in pairs) ** 0.5
