"""Tiny configurations of every architecture: a config class's default values made small by their names."""

from __future__ import annotations

import re
from typing import Any

WORDS = 128
# the first pattern that a whole name matches gives the most that its value may be
_MOST = [
    (re.compile(pattern), most)
    for pattern, most in [
        (r"(padded_|text_|unpadded_)?vocab_size|vocab_size_per_layer_input|n_vocab", WORDS),
        (r"num_hidden_layers|n_layers?|num_layers|(de|en)coder_layers|depth|num_blocks|vision_layers", 2),
        (r".*num_(key_value|kv)_heads|n_kv_heads|linear_num_key_heads|n_kv_groups|num_query_groups", 2),
        (r".*num_attention_heads|n_heads?|(de|en)coder_attention_heads|mamba_n(um)?_heads|.*num_heads|.*_n_heads", 4),
        (r"linear_num_value_heads|attention_heads|rotary_dim|qk_rope_head_dim", 4),
        (r"qk_nope_head_dim", 6),
        (r"qk_head_dim", 10),
        (r"v_head_dim|.*lora_rank|.*time_step_rank|dt_rank", 8),
        (r".*head_dim|.*head_size|mamba_d_head|d_kv|kv_channels|query_pre_attn_scalar", 16),
        (r".*moe.*(intermediate|ffn_hidden)_size|.*expert.*_size|shared_intermediate_size|moe_latent_size", 16),
        (
            r".*intermediate_size.*|.*ffn_(dim|size)|n_inner|d_ff|.*ffn_hidden_size|.*mlp_(dim|hidden_size)|block_ff_dim",
            48,
        ),
        (r".*hidden_(size|dim)|d_model|n_embd|word_embed_proj_dim|.*embed(ding)?_(dim|size)|lru_width|d_embed", 32),
        (r"dim|.*proj(ection)?_dim|conv_dim|block_dim|dim_model|hidden_size_per_layer_input", 32),
        (r"num_(local_|routed_|moe_)?experts|n_routed_experts|(moe|ffn)_num_experts", 4),
        (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_selected_experts", 2),
        (r"(mamba_)?n_groups?|topk_group|num_expert_group", 1),
        (r".*max_position_embeddings|n_positions|max_seq(uence)?_len(gth)?|n_ctx|seq_length|context_length", 256),
        (r".*sliding_window|.*attention_window_size|attention_chunk_size|local_attention|window_size|patch_size", 8),
        (r"n_words", WORDS),
        (r"emb_dim|base_channels|codebook_size|num_embeddings", 32),
        (r"(mamba_d_|ssm_)?state(_size)?", 4),
        (r".*chunk_size|image_size", 16),
        (r"index_topk", 256),
    ]
]
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_KINDS = ("layer_types", "layers_block_type", "block_types")
_NEVER = ("transformers_version", "model_type", "architectures", "dtype", "torch_dtype")
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_BY_KIND = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
# what a published model of this type sets and the class's default values leave open, or what sizes hang on each other
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"rope_parameters": _BY_KIND},
    "cohere_compass_text": {"rope_parameters": _BY_KIND},
    "deepseek_ocr2_text": _EXPERTS | {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": _EXPERTS,
    "dots1": _EXPERTS,
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6}},
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "glm5_next": {"num_key_value_heads": 4},
    "glm5_next_text": {"num_key_value_heads": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ministral": {"head_dim": 8},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "moshi": {"sliding_window": 256},  # as long as its positions
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 5},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "step3p5": {"sliding_window": 8},
    "xlnet": {"d_head": 8},
    "xlstm": {"autocast_kernel_dtype": "float32"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_dt_rank": 4},
    "zamba2": {
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
    },
}
# kinds of layers where the first two of the default values are not one of each
KINDS = {
    "gemma3n_text": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "zamba": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "zamba2": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}


def shrunk(config: Any) -> Any:
    """Return a configuration of the same class with small sizes: one layer of each kind, at least two."""
    given = config.to_dict()
    before = next((count for name in _LAYERS if isinstance(count := given.get(name), int)), 0)
    kinds = next((list(k) for name in _KINDS if len(k := given.get(name) or ()) == before), [])
    kinds = KINDS.get(config.model_type, kinds)
    layers = next((n for n in range(2, len(kinds) + 1) if set(kinds[:n]) == set(kinds)), 2)
    layers = len(kinds) if config.model_type in KINDS else layers
    values: dict[str, Any] = {}
    for name, value in given.items():
        own = value if name in _LAYERS or not isinstance(value, dict) else getattr(config, name, value)
        values[name] = shrunk(own).to_dict() if hasattr(own, "model_type") else _value(name, value, before, layers)
        if name in _KINDS and config.model_type in KINDS:
            values[name] = kinds
    if values.get("kv_lora_rank") and values.get("qk_rope_head_dim"):  # latent attention: a key for every query head
        values["num_key_value_heads"] = values["num_attention_heads"]
        values["head_dim"] = values["qk_rope_head_dim"]
    _shrink_rope(values)
    values |= EXCEPTIONS.get(config.model_type, {})
    return type(config)(**{name: value for name, value in values.items() if name not in _NEVER})


def _value(name: str, value: Any, before: int, layers: int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if name == "per_layer_config":  # layer -> what is another size there
        return {
            layer: {key: 2 * _value(key, each, 0, 2) if isinstance(each, int) else each for key, each in sizes.items()}
            for layer, sizes in value.items()
            if int(layer) < layers
        }
    if isinstance(value, int) and re.fullmatch(r".*(token_id|token_index|_id)", name):
        return {"pad": 0, "bos": 1, "eos": 2}.get(name.split("_")[0], 3 + sum(map(ord, name)) % 20)
    if isinstance(value, int) and name in _LAYERS:
        return layers
    if isinstance(value, int) and value > 0:
        return min(value, next((most for pattern, most in _MOST if pattern.fullmatch(name)), value))
    if isinstance(value, list) and before and len(value) == before:
        return [_value(name, each, 0, 2) if isinstance(each, int) else each for each in value[:layers]]
    if isinstance(value, list) and name.endswith("token_id"):
        return 2
    return [each for each in value if each < layers] if name.endswith("layer_ids") and value else value


def _shrink_rope(values: dict[str, Any]) -> None:
    """Plain rotation with the sections that the size of a head allows; one setting, or one for each kind of layer."""
    rope = values.get("rope_parameters") or values.get("rope_scaling")
    if not isinstance(rope, dict):
        return
    size = values.get("head_dim") or values.get("hidden_size", 32) // (values.get("num_attention_heads") or 4)
    kept = ("partial_rotary_factor", "mrope_interleaved", "llama_4_scaling_beta", "original_max_position_embeddings")

    def plain(rope: dict[str, Any]) -> dict[str, Any]:
        made = {"rope_type": "default", "rope_theta": rope.get("rope_theta") or 1e4}
        made |= {name: rope[name] for name in kept if name in rope}
        half = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
        return made | {"mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}

    if any(isinstance(each, dict) for each in rope.values()):  # None: these layers do not rotate
        values["rope_parameters"] = {name: each and plain(each) for name, each in rope.items()}
    else:
        values["rope_parameters"] = plain(rope)
    values.pop("rope_scaling", None)
