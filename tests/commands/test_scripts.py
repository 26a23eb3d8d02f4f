"""The tutorial's command lines, as they are printed there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import forks
from tiny_models import byte_level_tokenizer, sample_rows, tiny_llama

ROOT = Path(__file__).parents[2]
SFT = """\
torchrun --nproc_per_node=2 --master_port={port} {scripts}/sft-trainer.py \\
    --base_model {model} \\
    --data-path {rows} \\
    --output_dir ./title-generator \\
    --batch_size 8 \\
    --micro_batch_size {micro} \\
    --num_epochs 3 \\
    --learning_rate 1e-5 \\
    --cutoff_len 2048 \\
    --val_set_size 0 \\
    --lora_r 16 \\
    --lora_alpha 16 \\
    --lora_dropout 0.05 \\
    --lora_target_modules '[gate_proj, down_proj, up_proj]' \\
    --train_on_inputs False \\
    --add_eos_token True \\
    --group_by_length False \\
    --lr_scheduler 'linear' \\
    --warmup_steps 100
"""
MERGE = """\
python {scripts}/merge.py \\
    --base_model_name_or_path {model} \\
    --peft_model_path ./title-generator/checkpoint-9 \\
    --output_dir ./output_dir
"""
DPO = """\
python {scripts}/dpo-trainer.py \\
    --base_model {model} \\
    --data-path {rows} \\
    --output_dir ./lora \\
    --num_epochs 3 \\
    --batch_size 16 \\
    --micro_batch_size 2 \\
    --learning_rate 1e-5 \\
    --lora_r 16 \\
    --lora_alpha 16 \\
    --lora_dropout 0.05 \\
    --lora_target_modules [{first}"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", {down}, {last}] \\
    --lr_scheduler 'linear' \\
    --warmup_ratio 0.1 \\
    --cutoff_len 4096 \\
"""


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for the tutorial's cutoff_len of 2048."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def shell(line: str, folder: Path, **names: object) -> subprocess.CompletedProcess[str]:
    filled = line.format(port=free_port(), scripts=ROOT / "scripts", **names)
    place = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", filled], cwd=folder, env=place, capture_output=True, text=True, check=False, timeout=200
    )


WORDS = """\
#!/bin/sh
printf '%s\\0' "$0" "$@" > words
"""


def forked(line: str, folder: Path, **names: object) -> subprocess.CompletedProcess[str]:
    """The same, with the words that the shell makes of the line handed to a fork."""
    for name in ("python", "torchrun"):
        (folder / name).write_text(WORDS)
        (folder / name).chmod(0o755)
    filled = f"PATH=.:$PATH\n{line.format(port=free_port(), scripts=ROOT / 'scripts', **names)}"
    subprocess.run(["bash", "-c", filled], cwd=folder, check=True)
    program, *words = (folder / "words").read_text().rstrip("\0").split("\0")
    if program.endswith("torchrun"):
        assert words.pop(0) == "--nproc_per_node=2" and words.pop(0).startswith("--master_port=")
    return forks.run(*words, cwd=folder, processes=2 * program.endswith("torchrun"))


@pytest.fixture(scope="module")
def job(roomy_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which both commands were run, one after the other."""
    folder = tmp_path_factory.mktemp("tutorial")
    done = shell(SFT, folder, model=roomy_model, rows=title_rows, micro=1)
    assert done.returncode == 0, done.stderr
    (folder / "sft.txt").write_text(done.stderr, encoding="utf-8")
    done = forked(MERGE, folder, model=roomy_model)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_training_line_trains(job: Path) -> None:
    log = [json.loads(line) for line in (job / "title-generator" / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 10))  # 24 rows, 3 times, 8 at once
    assert {path.name for path in (job / "title-generator").glob("checkpoint-*")} == {
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint-9",
    }
    config = json.loads((job / "title-generator" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"gate_proj", "down_proj", "up_proj"}
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 16, 0.05)


def test_the_template_is_found_by_the_columns_and_named(job: Path) -> None:
    said = (job / "sft.txt").read_text(encoding="utf-8")
    assert said.count("Template title-ko") == 1, "one process speaks"
    assert said.count("Done: 9 steps") == 1


def test_the_merged_folder_answers_with_plain_transformers(job: Path) -> None:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    input_text = (job / "output_dir" / "template.txt").read_text(encoding="utf-8")
    input_text = input_text.replace("{document}", "봄이 왔다").partition("{title}")[0]
    assert input_text.endswith("### 제목:\n")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(job / "output_dir")
    tokenizer = AutoTokenizer.from_pretrained(job / "output_dir")

    model.eval()
    inputs = tokenizer(input_text, return_tensors="pt")
    model = nn.DataParallel(model)
    model.to(device)

    eos_token_id = tokenizer.eos_token_id

    with torch.no_grad():
        outputs = model.module.generate(
            input_ids=inputs["input_ids"].to(device), max_new_tokens=16, eos_token_id=eos_token_id
        )
        text = tokenizer.batch_decode(outputs.detach().cpu().numpy(), skip_special_tokens=True)[0]
    assert text.startswith(input_text)
    assert len(text) > len(input_text)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The sentences of ours; torchrun's own banner is its own affair."""
    assert done.returncode != 0
    assert done.stderr.count("Traceback") == 1
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": "none.jsonl"}, "there is no file none.jsonl"),  # the first process alone finds out
        ({"model": "./none"}, "there is no folder ./none"),
        ({"micro": 8}, "batch_size 8 is not a multiple of micro_batch_size 8 x 2 processes"),  # every process does
    ],
)
def test_under_torchrun_one_process_says_one_sentence(
    roomy_model: Path, title_rows: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    names: dict[str, object] = {"model": roomy_model, "rows": title_rows, "micro": 1}
    done = forked(SFT, tmp_path, **{**names, **changes})
    assert len(errors(done)) == 1, done.stderr
    assert words in errors(done)[0]
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "title-generator").exists()


@pytest.mark.parametrize("script", ["sft-trainer.py", "merge.py"])
def test_scripts_fail_with_a_sentence(script: str, tmp_path: Path) -> None:
    done = shell(f"python {{scripts}}/{script} --learning-rat 1e-5", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no flag --learning_rat")
    assert done.stderr.rstrip().endswith(f"see {script} --help")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "asked", "flag"),
    [
        ("sft-trainer.py", "--help", "--learning_rate"),
        ("sft-trainer.py", "--help-all", "--lora_target_modules"),
        ("merge.py", "--help-all", "--verify"),
    ],
)
def test_scripts_have_help(script: str, asked: str, flag: str, tmp_path: Path) -> None:
    done = shell(f"python {{scripts}}/{script} {asked}", tmp_path)
    assert done.returncode == 0
    assert f"usage: {script}" in done.stdout
    assert flag in done.stdout


@pytest.mark.parametrize(
    "first", ["", pytest.param('"embed_tokens", ', marks=pytest.mark.slow)], ids=["lm_head", "embed_tokens"]
)
def test_the_preference_line_trains(first: str, roomy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows("preference-ko.jsonl")[:32]),
        encoding="utf-8",
    )
    done = forked(
        DPO, tmp_path, model=roomy_model, rows="pairs.jsonl", first=first, down='"down_proj"', last='"lm_head"'
    )
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (tmp_path / "lora" / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 7))  # 32 pairs, 3 times, 16 at once
    assert abs(log[0]["loss"] - 0.6931) < 1e-3
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 8 + bool(first) and "lm_head" in config["target_modules"]
    assert "Template question-answer" in done.stderr
