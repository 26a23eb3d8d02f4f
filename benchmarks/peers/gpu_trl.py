"""TRL's SFTTrainer and DPOTrainer on the same rows, with what makes them fast: packing, Liger, no recomputation.

The rows are token ids already; the tokenizer is a stand-in that only pads. Needs trl, and liger-kernel on a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from typing import Any

import gpu_common as common

MICRO_BATCH = 4


def tokenizer_of(words: int) -> Any:
    """A tokenizer of numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *map(str, range(3, words))]
    core = Tokenizer(models.WordLevel({name: word for word, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def clock(record: common.Record, work: common.Workload, rows: list[dict[str, list[int]]]) -> Any:
    """A callback that writes down a step's seconds and counts."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Waits for the GPU at both ends of a step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """Before the first micro-batch."""
            common.wait()
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            """After the optimizer."""
            common.wait()
            record.seconds.append(time.perf_counter() - self.began)
            if not work.packed:
                part = rows[(state.global_step - 1) * work.rows : state.global_step * work.rows]
                common.count_rows(record, part)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            """The first step's number."""
            name = "logps/chosen" if work.pairs else "loss"
            if record.first is None and name in logs:
                record.first = logs[name]

    return Clock()


def shared(args: Any, work: common.Workload, folder: str) -> dict[str, Any]:
    """Settings of both trainers."""
    gpu = common.device().type == "cuda"
    liger = gpu and importlib.util.find_spec("liger_kernel") is not None
    size = 1 if work.packed else (MICRO_BATCH // 2 if work.pairs else MICRO_BATCH)
    step_rows = args.packed_rows if work.packed else work.rows
    return {
        "output_dir": folder,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": max(1, step_rows // size),
        "max_steps": args.steps,
        "learning_rate": common.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": gpu,
        "use_cpu": not gpu,
        "gradient_checkpointing": False,
        "use_liger_kernel": liger,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": gpu,
        "dataset_num_proc": None,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }


def trainer_of(args: Any, work: common.Workload, rows: list[dict[str, list[int]]], folder: str) -> Any:
    """The trainer, its model and its rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    if work.bits == 4:
        raise RuntimeError("TRL quantises while it loads; these weights are random")
    flash = importlib.util.find_spec("flash_attn") is not None and common.device().type == "cuda"
    model = common.model_of(args.shape, args.small, attention="flash_attention_2" if flash else "sdpa")
    tokenizer = tokenizer_of(model.config.vocab_size)
    peft = LoraConfig(r=common.RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = shared(args, work, folder)
    if work.pairs:
        lines = [{name: " ".join(map(str, ids)) for name, ids in row.items()} for row in rows]
        lines = [{**line, "chosen": " " + line["chosen"], "rejected": " " + line["rejected"]} for line in lines]
        return DPOTrainer(
            model=model,
            args=DPOConfig(**settings, max_length=work.prompt + work.answer + 1, beta=0.1),
            train_dataset=Dataset.from_list(lines),
            processing_class=tokenizer,
            peft_config=peft,
        )
    lines = [
        {
            "input_ids": row["prompt"] + row["completion"],
            "completion_mask": [0] * len(row["prompt"]) + [1] * len(row["completion"]),
        }
        for row in rows
    ]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings, max_length=work.tokens, packing=work.packed, completion_only_loss=True),
        train_dataset=Dataset.from_list(lines),
        processing_class=tokenizer,
        peft_config=peft,
    )


def main() -> None:
    """Measure and write."""
    args = common.arguments("trl")
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed here")

    def run(work: common.Workload) -> common.Record:
        record = common.Record(contender="trl", workload=work.name)
        rows = common.rows_of(work, args.steps, common.config_of(args.shape, args.small).vocab_size)
        whole = sum(len(row["prompt"]) + len(row["completion"]) for row in rows) if work.packed else 0
        args.packed_rows = max(1, whole // work.tokens // args.steps)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(args, work, rows, folder)
            trainer.add_callback(clock(record, work, rows))
            trainer.train()
            if work.packed:  # how many tokens lie in a step is known after packing alone
                lengths = [[len(ids) for ids in part] for part in packed_steps(trainer, args)]
                for step in lengths:
                    record.tokens.append(sum(step))
                    record.computed.append(sum(step))
                    record.targets.append(sum(step))
                    record.pairs.append(0)
        if work.packed or work.pairs:  # packing orders rows anew; DPOTrainer ends every answer with a token of its own
            record.first = None
        record.peak_bytes = common.peak()
        liger = trainer.args.use_liger_kernel
        record.note = f"{'Liger' if liger else 'no Liger'}, {trainer.model.config._attn_implementation}"
        del trainer
        return record

    common.run_all("trl", args, run)


def packed_steps(trainer: Any, args: Any) -> list[list[list[int]]]:
    """The packed rows of each step."""
    rows = trainer.train_dataset["input_ids"]
    return [rows[at * args.packed_rows : (at + 1) * args.packed_rows] for at in range(args.steps)]


if __name__ == "__main__":
    main()
