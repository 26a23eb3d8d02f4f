"""TRL's SFTTrainer on prompt and completion columns, loss on the completion only.

Its defaults otherwise, and they matter: gradient checkpointing is on, the LM head is fused and chunked,
an example over max_length is cut at its end, and one without a target left is dropped.
"""

from __future__ import annotations

import common
from datasets import Dataset
from trl import SFTConfig, SFTTrainer


class RecordedTrainer(common.Recorded, SFTTrainer):
    """The SFTTrainer with a record of its steps."""


def main() -> None:
    """Train and write the record."""
    args = common.arguments("TRL's SFTTrainer with a PEFT adapter")
    trainer = RecordedTrainer(
        model=common.load_model(args),
        args=SFTConfig(**common.shared_settings(args), max_length=args.cutoff_len, completion_only_loss=True),
        train_dataset=Dataset.from_list(common.read_rows(args)),
        processing_class=common.load_tokenizer(args),
        peft_config=common.lora_config(args),
    )
    common.load_adapter(trainer.model, args.init)
    common.run(trainer, args, "trl")


if __name__ == "__main__":
    main()
