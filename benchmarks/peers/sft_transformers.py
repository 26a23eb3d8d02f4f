"""The tutorial's own method, after alpaca-lora's finetune.py: transformers' Trainer with a PEFT adapter.

Kept from it: the prompt is tokenized a second time and as many labels become -100; the end of an
over-long list of tokens is cut (and the answer with it); padding on the left, to a multiple of 8, up to
the longest of the micro-batch. Not kept: 8-bit weights, which need a GPU (and gradient checkpointing,
which comes with them and would be slower and smaller); bf16 in place of fp16. Weights are bf16, the
adapter is float32 (PEFT's default), autocast is on.
"""

from __future__ import annotations

from typing import Any

import common
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed


class RecordedTrainer(common.Recorded, Trainer):
    """The Trainer with a record of its steps."""


def tokenize(text: str, tokenizer: Any, cutoff_len: int, *, add_eos: bool) -> dict[str, list[int]]:
    """alpaca-lora's `tokenize`: cut at the end, then the end-of-text token if there is room for it."""
    found = tokenizer(text, truncation=True, max_length=cutoff_len, padding=False)
    ids, mask = list(found["input_ids"]), list(found["attention_mask"])
    if add_eos and ids[-1] != tokenizer.eos_token_id and len(ids) < cutoff_len:
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, 1]
    return {"input_ids": ids, "attention_mask": mask}


def example(row: dict[str, str], tokenizer: Any, cutoff_len: int) -> dict[str, list[int]]:
    """alpaca-lora's `generate_and_tokenize_prompt`: labels of the prompt's token count are -100."""
    found = tokenize(row["prompt"] + row["completion"], tokenizer, cutoff_len, add_eos=True)
    prompt = len(tokenize(row["prompt"], tokenizer, cutoff_len, add_eos=False)["input_ids"])
    found["labels"] = [-100] * prompt + found["input_ids"][prompt:]
    return found


def main() -> None:
    """Train and write the record."""
    from datasets import Dataset
    from peft import get_peft_model

    args = common.arguments("transformers' Trainer and a PEFT adapter, as alpaca-lora's script does it")
    tokenizer = common.load_tokenizer(args)
    tokenizer.padding_side = "left"
    examples = [example(row, tokenizer, args.cutoff_len) for row in common.read_rows(args)]
    base = common.load_model(args)
    set_seed(args.seed)
    model = get_peft_model(base, common.lora_config(args))
    common.load_adapter(model, args.init)
    model.config.use_cache = False
    trainer = RecordedTrainer(
        model=model,
        args=TrainingArguments(**common.shared_settings(args), optim="adamw_torch"),
        train_dataset=Dataset.from_list(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, padding=True),
    )
    common.run(trainer, args, "transformers")


if __name__ == "__main__":
    main()
