"""What a run trains, as far as a rehearsal has to know it: an adapter, or the model's own weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from byeori.kernels import lora_linear
from byeori.model import embedding_rows, full, lora_start
from byeori.model.adapter import PLAIN, Variant, attach, may_name_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """The LoRA settings that a rehearsal needs."""

    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    variant: Variant = PLAIN
    masters: None = None

    @property
    def differs_by_layer(self) -> bool:
        """Whether layers of the same kind are trained in different ways."""
        return self.variant.differs_by_layer or any(map(may_name_layers, self.targets))

    def put_on(self, base: Any) -> Any:
        """Return the model with its adapter."""
        embedding_rows.resize(base, self.variant.rows)
        model = attach(
            base,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            targets=list(self.targets),
            seed=0,
            variant=self.variant,
        )
        lora_start.begin(model, self.variant.init, self.variant.use_dora)
        lora_linear.fuse(model)
        return model


@dataclass(frozen=True, kw_only=True, slots=True)
class Full:
    """Full fine-tuning. layers: as layer_ranges.parse reads them, None for all. masters: float32 or stochastic.

    rows: that the embedding has at least.
    """

    layers: str | None
    masters: str
    rows: int | None = None

    @property
    def differs_by_layer(self) -> bool:
        """Whether some layers are frozen."""
        return self.layers is not None

    def put_on(self, base: Any) -> Any:
        """Return the model with the weights that are trained."""
        embedding_rows.resize(base, self.rows)
        return full.unfreeze(base, self.layers)
