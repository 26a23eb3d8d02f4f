"""Settings of what is trained: an adapter, or the model's own weights."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from byeori.config.adapters import LoraSettings
from byeori.config.base import ESSENTIAL, MEMORY, OPTIMISATION, OptionalText, Settings, setting
from byeori.support import layer_ranges

_FULL_ONLY = {"train_layers", "master_weights"}
_LORA_ONLY = {*LoraSettings.model_fields} - {"neftune_noise_alpha"}


class FullSettings(Settings):
    """Full fine-tuning. full_rate: the default learning rate of full fine-tuning."""

    full_rate: ClassVar[float | None] = None

    finetune: Literal["lora", "full"] = setting(
        "What to train. full trains the model's own weights instead of a LoRA adapter; the result is a whole model.",
        "lora",
        ESSENTIAL,
    )
    train_layers: OptionalText = setting(
        "Layers that finetune full trains, such as last:8, first:4 or 0-3,20-23; everything else stays frozen. "
        "none trains the whole model.",
        None,
        OPTIMISATION,
    )
    master_weights: Literal["float32", "stochastic"] = setting(
        "How finetune full adds small updates to bfloat16 weights. float32 keeps a copy of them in float32, stochastic "
        "rounds at random and takes no memory.",
        "float32",
        MEMORY,
    )

    @property
    def without_effect(self) -> set[str]:
        """Settings of the other kind of training, which must not be given and are not recorded."""
        if self.finetune == "lora":
            return _FULL_ONLY
        # rows of new tokens are among those that are trained
        return _LORA_ONLY - ({"trainable_token_indices"} if getattr(self, "add_tokens", None) else set())

    @model_validator(mode="before")
    @classmethod
    def _rate_of_full(cls, values: Any) -> Any:
        full = isinstance(values, dict) and values.get("finetune") == "full" and cls.full_rate is not None
        return {"learning_rate": cls.full_rate} | values if full else values

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        given = [name for name in type(self).model_fields if name in self.model_fields_set and getattr(self, name)]
        idle = [name for name in given if name in self.without_effect]
        if self.finetune == "lora":
            if "train_layers" in idle:
                raise ValueError("train_layers needs finetune full; layers_to_transform is for an adapter")
            if idle:
                raise ValueError(f"{idle[0]} needs finetune full")
            return self
        if self.train_layers is not None:
            layer_ranges.parse(self.train_layers)
        if getattr(self, "add_tokens", None) and self.train_layers is not None:
            raise ValueError("add_tokens adds rows to the embedding, which train_layers leaves frozen; leave one out")
        others = [name for name in given if name in ("load_in_8bit", "cpu_offload")]
        others += ["load_in_4bit"] if getattr(self, "load_in_4bit", None) is True else []
        if refused := idle + others:
            raise ValueError(f"{refused[0]} does not apply to finetune full, which trains the weights; leave it out")
        if getattr(self, "dtype", None) == "float16":
            raise ValueError("finetune full needs dtype bfloat16 or float32; gradients overflow in float16")
        if self.master_weights == "stochastic" and str(getattr(self, "optim", "")).startswith("schedule_free"):
            raise ValueError("a schedule_free optimizer averages small changes, which needs master_weights float32")
        return self
