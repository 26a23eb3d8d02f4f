"""Whether rows and model fit is said before weights are loaded: by preview, and by training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from byeori.cli import main
from byeori.commands.preview import preview
from byeori.config import PreviewSettings, check
from chat_templates import CHATML, GEMMA, THINKING
from tiny_models import byte_level_tokenizer, tiny_llama

TALK = {
    "messages": [
        {"role": "user", "content": "왜?"},
        {"role": "assistant", "content": "그냥."},
        {"role": "user", "content": "네?"},
        {"role": "assistant", "content": "봄이라서."},
    ]
}


def folder(path: Path, chat: str, *, added: str = "", zero: tuple[str, ...] = (), **changes: Any) -> Path:
    tokenizer = byte_level_tokenizer(chat_template=chat)
    model = tiny_llama(len(tokenizer), **changes)
    if added:
        tokenizer.add_special_tokens({"additional_special_tokens": [added]})
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(zero))] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "rows.jsonl").write_text(json.dumps(TALK, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def notes(path: Path) -> tuple[str, ...]:
    return preview(check(PreviewSettings, {"base_model": str(path), "data_path": str(path / "rows.jsonl")})).notes


def test_a_token_without_a_row_stops_before_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path, CHATML.replace("<|im_start|>", "<|new|>"), added="<|new|>")
    rows = str(path / "rows.jsonl")
    for command, *flags in (
        ["preview", rows],
        ["sft", rows, "--output_dir", str(tmp_path / "out")],
        ["generate", "--data_path", rows],
        ["generate", "왜?"],
    ):
        assert main([command, str(path), *flags]) == 2
        said = capsys.readouterr().err
        assert "('<|new|>') of the rows, and the embedding of" in said and "Loading" not in said


def test_tokens_that_the_base_was_never_trained_on(tmp_path: Path) -> None:
    path = folder(tmp_path, CHATML, zero=("<|im_start|>", "<|im_end|>"))
    (said,) = (note for note in notes(path) if "was never trained on" in note)
    assert said.startswith(f"{path} was never trained on <|im_start|>, <|im_end|>, which the template writes")
    assert not any("was never trained on" in note for note in notes(folder(tmp_path / "trained", CHATML)))


@pytest.mark.parametrize(
    ("chat", "eos", "stop", "history"),
    [
        (CHATML, 2, "The stop token <|im_end|> is trained, and generation_config.json has it", "keeps"),
        (CHATML, 0, "The stop token <|im_end|> is trained, and generation_config.json does not have it", "keeps"),
        (THINKING, 0, "The stop token <|im_end|> is trained", "rewrites"),
        (GEMMA, 0, "The stop token <|endoftext|> is trained, and generation_config.json has it", "keeps"),
    ],
)
def test_what_a_server_will_make_of_the_template(
    chat: str, eos: int, stop: str, history: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder(tmp_path, chat, eos_token_id=eos)
    said = notes(path)
    assert any(note.startswith(stop) for note in said)
    assert any(note.startswith(f"The chat template {history} earlier answers") for note in said)
    capsys.readouterr()
    assert main(["preview", str(path), str(path / "rows.jsonl"), "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["served"]
    assert served["rewrites_history"] == (history == "rewrites") and served["stop_token_trained"]
