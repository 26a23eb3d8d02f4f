"""Settings of the adapter that a run trains."""

from __future__ import annotations

from byeori.config.base import ESSENTIAL, LORA, Names, Settings, setting


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
    neftune_noise_alpha: float = setting(
        "NEFTune noise on the embeddings (arXiv:2310.05914). 0 is off.", 0.0, LORA, ge=0
    )
