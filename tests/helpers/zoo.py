"""Tiny random models of many kinds, random trees of examples, and the plain computation that a forest must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.overrides import TorchFunctionMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from byeori.data.tokenize import Example
from byeori.kernels import forest_attention, lora_linear
from byeori.model import adapter

WORDS = 40
WINDOW = 4  # of sliding layers; shorter than the sequences
_SIZES: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2: dict[str, Any] = {"vocab_size": WORDS, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
_LAYERS = ["sliding_attention", "full_attention"]


class Wide(TorchFunctionMode):
    """Keeps float64 where transformers' layers cast to float32 (norms, softmax), so that differences are ours."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = tuple(torch.float64 if item is torch.float32 else item for item in args)
            kwargs = {name: torch.float64 if item is torch.float32 else item for name, item in kwargs.items()}
        return func(*args, **kwargs)


KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=8)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**_SIZES, head_dim=8, sliding_window=WINDOW, layer_types=_LAYERS, query_pre_attn_scalar=8)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_SIZES,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_LAYERS,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2, initializer_range=0.3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=WINDOW)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**_SIZES, logits_scaling=3.0, attention_multiplier=0.2, residual_multiplier=0.5)
    ),
    "hyperclovax": lambda: transformers.HyperCLOVAXForCausalLM(  # multiplies by what Granite divides by
        transformers.HyperCLOVAXConfig(**_SIZES, logits_scaling=3.0)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(  # heads whose values have another size than their keys
        DeepseekV3Config(
            **_SIZES | {"num_key_value_heads": 4},
            moe_intermediate_size=12,
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=6,
            v_head_dim=8,
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_SIZES,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=_LAYERS,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    ),
}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
DELTA: dict[str, Any] = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
# Layers with states that transformers' cache holds. Mamba 1 cannot start with a state: jamba and mamba.
HYBRIDS: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: transformers.Qwen3_5ForCausalLM(
        transformers.Qwen3_5TextConfig(
            **_SIZES,
            **DELTA,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 0],
            },
        )
    ),
    "qwen3_next": lambda: transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(**_SIZES, **DELTA, **_EXPERTS)
    ),
    "falcon_h1": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(**_SIZES, **_MAMBA, mamba_d_ssm=32, mamba_chunk_size=8)
    ),
    "lfm2": lambda: Lfm2ForCausalLM(Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"])),
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(
            **_SIZES, **_MAMBA, num_local_experts=0, mamba_chunk_size=8, layer_types=["mamba", "attention"]
        )
    ),
    "nemotron_h": lambda: transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(
            **_SIZES | {"num_hidden_layers": 3},
            head_dim=8,
            layers_block_type=["mamba", "attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=4,
            n_groups=1,
            chunk_size=8,
        )
    ),
    "jamba": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(
            **_SIZES, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4
        )
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=WORDS,
            hidden_size=16,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=8,
            state_size=4,
            n_groups=1,
            chunk_size=8,
            initializer_range=0.3,
        )
    ),
}
# Layers with states of their own: rows one at a time.
STATEFUL: dict[str, Callable[[], Any]] = {
    "rwkv": lambda: transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, context_length=64)
    ),
}
ALL = KINDS | HYBRIDS | STATEFUL
TARGETS = {
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt_oss": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
    "falcon_h1": ["in_proj", "q_proj", "v_proj", "gate_proj"],
    "nemotron_h": ["in_proj", "q_proj", "v_proj", "up_proj"],
    "rwkv": ["key", "value", "receptance"],
}


def tiny(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """(with byeori's fused adapter, the same with PEFT's own and eager attention); every adapter weight is random."""
    torch.manual_seed(0)
    base = ALL[kind]().to(dtype).eval()
    forest_attention.register()
    model = adapter.attach(base, r=3, alpha=5, dropout=0.0, targets=TARGETS.get(kind, ["all-linear"]), seed=1)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter)
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if kind in ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"):
        base.set_experts_implementation("eager")  # the grouped kernel knows no float64
    plain = copy.deepcopy(model)
    if kind not in ("mamba", "mamba2", "rwkv"):
        plain.get_base_model().set_attn_implementation("eager")
    lora_linear.fuse(model)
    return model, plain


def plain_loss(model: PeftModel, examples: list[Example]) -> torch.Tensor:
    """Sum of the negative log-likelihoods, one sequence at a time, the model's own logits, the whole vocabulary."""
    total = torch.zeros((), dtype=torch.float64)
    for example in examples:
        ids = torch.tensor([list(example.token_ids)])
        logp = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(dim=-1)
        for start, end in example.targets:
            for at in range(start, end):
                total = total - logp[at - 1, ids[0, at]]
    return total


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every adapter gradient by name."""
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of gradients, relative to the largest entry of each matrix.

    Matrices whose true gradient is zero (one token alone: softmax of one score) are measured by the largest of all.
    """
    assert found.keys() == expected.keys()
    largest = max(float(right.abs().max()) for right in expected.values() if right is not None)
    differences = []
    for name, right in expected.items():
        if right is None:
            assert found[name] is None
            continue
        scale = max(float(right.abs().max()), 1e-3 * largest)
        differences.append(float((found[name] - right).abs().max()) / scale)
    return max(differences)


def tree() -> list[Example]:
    """Nine examples: depth 4, a duplicate, a prefix of another, a stranger, spans in the middle."""
    generator = torch.Generator().manual_seed(3)

    def words(count: int) -> list[int]:
        return torch.randint(3, WORDS, (count,), generator=generator).tolist()

    head, mid, deep = words(5), words(4), words(3)
    rows = [head + mid + deep + words(4), head + mid + deep + words(2), head + mid + words(6), head + words(3)]
    rows += [rows[0], rows[2][:11], words(8), [*head[:2], *words(5)], head + mid + deep + words(1)]
    examples = [Example(token_ids=ids, targets=((len(ids) - 3, len(ids)),)) for ids in rows]
    several = Example(token_ids=rows[0], targets=((1, 2), (4, 7), (9, 10)))
    return [*examples, several]
