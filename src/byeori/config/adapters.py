"""Settings of the adapter that a run trains."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from byeori.config.base import (
    ESSENTIAL,
    LORA,
    OPTIMISATION,
    Names,
    OptionalFloat,
    Settings,
    Tokens,
    parse_names,
    setting,
)
from byeori.support.suggestions import nearest

INITS = ("default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", "eva", "loftq")


def _init(name: str) -> str:
    name = name.strip().lower()
    if name in INITS or re.fullmatch(r"pissa_niter_\d{1,3}", name):
        return name
    raise ValueError(f"{name!r} is none of {', '.join(INITS)}{nearest(name, list(INITS))}")


def _numbers(value: object) -> object:
    """`"q_proj=32, v_proj=8"` or `["q_proj=32", "v_proj=8"]` -> `{"q_proj": "32", "v_proj": "8"}`."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if words is None or words == "none" or words == ["none"]:
        return {}
    if not isinstance(words, (list, tuple)):
        return value
    pairs = [str(word).strip(",").rpartition("=") for word in words]
    if not all(name and number for name, _, number in pairs):
        raise ValueError("give NAME=NUMBER, such as q_proj=32")
    return {name: number for name, _, number in pairs}


def _layers(value: object) -> object:
    """`"0-3, 8"` -> `["0", "1", "2", "3", "8"]`; other values are left to pydantic."""
    words = parse_names(value) if isinstance(value, (str, list, tuple)) else value
    if not isinstance(words, (list, tuple)):
        return value
    numbers: list[object] = []
    for word in words:
        first, dash, last = str(word).partition("-")
        if dash and first.isdecimal() and last.isdecimal():
            numbers += range(int(first), int(last) + 1)
        else:
            numbers.append(word)
    return [] if numbers == ["none"] else numbers


_Positive = Annotated[float, Field(gt=0, le=1e6)]
Ranks = Annotated[dict[str, Annotated[int, Field(ge=1, le=4096)]], BeforeValidator(_numbers), "NAME=RANK"]
Alphas = Annotated[dict[str, _Positive], BeforeValidator(_numbers), "NAME=ALPHA"]
Layers = Annotated[list[Annotated[int, Field(ge=0, le=10_000)]], BeforeValidator(_layers), "N"]
Init = Annotated[str, AfterValidator(_init), "NAME"]


class LoraSettings(Settings):
    """The adapter (LoRA, Hu et al. 2021, arXiv:2106.09685)."""

    lora_r: int = setting("Rank of the adapter.", 16, ESSENTIAL, ge=1, le=4096)
    lora_alpha: float = setting(
        "Scale of the adapter. Its output is multiplied by lora_alpha / lora_r.", 16, LORA, gt=0
    )
    lora_dropout: float = setting("Dropout on the adapter's input.", 0.0, LORA, ge=0, lt=1)
    lora_target_modules: Names = setting(
        "Layers to adapt: endings of their names, or all-linear.", ["all-linear"], LORA, min_length=1
    )
    lora_target_parameters: Names = setting(
        "Bare parameters to adapt as well, by the endings of their names: those of experts, such as "
        "`experts.gate_up_proj experts.down_proj`. A run on a model with experts names them.",
        [],
        LORA,
    )
    lora_init: Init = setting(
        f"How the adapter's weights start: {', '.join(INITS)}. They are PEFT's init_lora_weights; pissa_niter_N stands "
        "for any N. pissa and olora start from the base's own weights, loftq from what 4 or 8 bit lose of them, and "
        "their adapter is saved as plain LoRA of twice the rank; eva starts from what the first rows give the layers.",
        "default",
        LORA,
    )
    use_rslora: bool = setting(
        "Multiply the adapter's output by lora_alpha / sqrt(lora_r) (rsLoRA, arXiv:2312.03732).", False, LORA
    )
    use_dora: bool = setting("Train the length of every weight row apart (DoRA, arXiv:2402.09353).", False, LORA)
    lora_bias: bool = setting("Give B a bias.", False, LORA)
    rank_pattern: Ranks = setting(
        "Other ranks for some layers, such as `q_proj=32 down_proj=8`. A name is an ending of layers' names or a "
        "regular expression, as in PEFT.",
        {},
        LORA,
    )
    alpha_pattern: Alphas = setting("Other values of lora_alpha for some layers, as in rank_pattern.", {}, LORA)
    layers_to_transform: Layers = setting("Numbers of the layers to adapt, such as `0-3 8`. none is all.", [], LORA)
    modules_to_save: Names = setting(
        "Modules to train whole beside the adapter, such as `embed_tokens lm_head`.", [], LORA
    )
    trainable_token_indices: Tokens = setting(
        "Tokens whose rows of the embedding and the head are trained, by their text or their ids.", [], LORA
    )
    loraplus_lr_ratio: float = setting(
        "Learning rate of B over that of A (LoRA+, arXiv:2402.12354). 16 is usual.", 1.0, LORA, gt=0, le=1000
    )
    embedding_learning_rate: OptionalFloat = setting(
        "Peak learning rate of what is trained of embedding and head. none is learning_rate.", None, LORA, gt=0, le=10
    )
    neftune_noise_alpha: float = setting(
        "NEFTune noise on the embeddings (arXiv:2310.05914). 0 is off.", 0.0, OPTIMISATION, ge=0, le=1e6
    )

    @model_validator(mode="after")
    def _variants_fit(self) -> Self:
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias and use_dora are both set; DoRA has no bias, choose one of them")
        if self.lora_bias and self.lora_init != "default":
            raise ValueError(f"lora_bias does not go with lora_init {self.lora_init}; leave one of them out")
        if self.lora_target_parameters and (self.lora_dropout or self.lora_bias or self.use_dora):
            raise ValueError(
                "lora_target_parameters does not go with lora_dropout, lora_bias or use_dora; leave them out"
            )
        if self.use_dora and self.lora_init in ("mica", "loftq"):
            raise ValueError(f"use_dora does not go with lora_init {self.lora_init}; leave one of them out")
        odd = next((rank for rank in (self.lora_r, *self.rank_pattern.values()) if rank % 2), None)
        if self.lora_init == "orthogonal" and odd is not None:
            raise ValueError(f"lora_init orthogonal needs even ranks, not {odd}")
        return self
