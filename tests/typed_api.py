"""The Python API as a type checker sees it: `make check` reads this file with mypy --strict; nothing runs it."""

from __future__ import annotations

from pathlib import Path

import byeori


def job(rows: Path, pairs: list[Path]) -> Path:
    planned = byeori.plan(base_model="m", data_path=rows, gpu=["H100"], explain=True)
    facts: dict[str, object] = planned.as_json()
    seen = byeori.preview(base_model="m", data_path=rows, rows=1)
    tokens: int = seen.tokens + seen.target_tokens
    trained = byeori.sft(
        base_model="m",
        data_path=[rows],
        output_dir=Path("out"),
        learning_rate=1e-4,
        lora_target_modules="gate_proj, up_proj",
        val_set_size=0.1,
        load_in_4bit="auto",
        gradient_checkpointing="full",
        max_steps=tokens + len(facts),
    )
    loss: float = trained.last_loss
    preferred = byeori.dpo(base_model=trained.output_dir, data_path=pairs, output_dir="dpo", loss="ipo", beta=loss)
    merged = byeori.merge(peft_model_path=preferred.output_dir, output_dir="merged", verify=False)
    answers: list[str] = byeori.generate(model=merged.output_dir, input_text="text", columns={"tone": "dry"})
    compared = byeori.compare(adapter=trained.output_dir, data_path=rows, output_dir="report")
    listed = byeori.publish(folder=merged.output_dir, repo_id=answers[0], dry_run=True)
    size: int = listed.files["config.json"]
    print(compared.verdict, size, byeori.demo_model(), byeori.demo().report)
    try:
        byeori.sft(base_model="m")  # type: ignore[call-arg]
        byeori.sft(base_model="m", data_path="r", output_dir="o", lr_scheduler="poly")  # type: ignore[arg-type]
        byeori.merge(peft_model_path="a", output_dir="o", verfy=True)  # type: ignore[call-arg]
    except byeori.ConfigError as error:
        print(error)
    return compared.report
