"""TRL's DPOTrainer on prompt, chosen and rejected columns; the reference is the model with its adapter off.

`padding_free` is not tried: TRL 1.16 says that it is "temporarily unavailable" and pads all the same. An example over
max_length loses the end of its answer, and a pair whose prompt alone is as long is dropped.
"""

from __future__ import annotations

import time
from typing import Any

import common
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


class RecordedTrainer(common.Recorded, DPOTrainer):
    """The DPOTrainer with a record of its steps, and of the time for precomputing the reference."""

    reference_seconds = 0.0

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
        began = time.perf_counter()
        found = super()._precompute_ref_logps(*args, **kwargs)
        self.reference_seconds += time.perf_counter() - began
        return found


def main() -> None:
    """Train and write the record."""
    args = common.arguments("TRL's DPOTrainer with a PEFT adapter")
    trainer = RecordedTrainer(
        model=common.load_model(args),
        args=DPOConfig(
            **common.shared_settings(args),
            max_length=args.cutoff_len,
            beta=args.beta,
            precompute_ref_log_probs=args.precompute_ref == "on",
        ),
        train_dataset=Dataset.from_list(common.read_pairs(args)),
        processing_class=common.load_tokenizer(args),
        peft_config=common.lora_config(args),
    )
    common.load_adapter(trainer.model, args.init)
    common.run(trainer, args, "trl")


if __name__ == "__main__":
    main()
