"""`byeori chat`: through a pipe and at a terminal; streaming, several turns, Ctrl-C, the base, pairs."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

import byeori
from byeori.commands.chat import _chosen
from byeori.errors import ByeoriError
from tiny_models import byte_level_tokenizer, tiny_llama


def talk(model: Path, lines: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    byeori.chat(**{"model": model, "dtype": "float32", "max_new_tokens": 12, **settings})


def answers(model: Path, documents: list[str]) -> list[str]:
    given = {"model": model, "dtype": "float32", "max_new_tokens": 12}
    return [byeori.generate(**given, columns={"document": document})[0] for document in documents]


@pytest.fixture
def chatty(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template."""
    import shutil

    folder = shutil.copytree(tiny_model, tmp_path / "chatty")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    return folder


def test_a_pipe_gives_one_answer_a_line(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(trained, ["봄이 왔다.", "가을이 왔다."])
    capsys.readouterr()
    talk(trained, "봄이 왔다.\n가을이 왔다.", monkeypatch)
    shown = capsys.readouterr()
    assert shown.out.splitlines() == expected
    assert shown.err == ""


def test_several_lines_between_quotes(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(trained, ["봄이\n왔다."])
    capsys.readouterr()
    talk(trained, '"""봄이\n왔다.\n"""\n', monkeypatch)
    assert capsys.readouterr().out.splitlines() == expected


def test_base_and_tuned_answer_with_one_model(
    trained: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = answers(trained, ["봄이 왔다."])[0]
    given = {"model": tiny_model, "dtype": "float32", "max_new_tokens": 12, "template": "title-ko"}
    base = byeori.generate(**given, columns={"document": "봄이 왔다."})[0]
    capsys.readouterr()
    pairs = tmp_path / "pairs.jsonl"
    talk(trained, "봄이 왔다.\n/save 2\n/save 1\n/save 3\n", monkeypatch, base=True, pairs=pairs)
    shown = capsys.readouterr()
    assert shown.out == f"[1] base: {base}\n[2] tuned: {tuned}\n"
    assert [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()] == [
        {"document": "봄이 왔다.", "chosen": tuned, "rejected": base},
        {"document": "봄이 왔다.", "chosen": base, "rejected": tuned},
    ]
    assert "error: there are 2 answers; give two of them" in shown.err


def test_a_better_answer_may_be_typed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = tmp_path / "pairs.jsonl"
    talk(trained, "봄이 왔다.\n/save\n더 나은 제목\n", monkeypatch, pairs=pairs)
    assert json.loads(pairs.read_text(encoding="utf-8"))["chosen"] == "더 나은 제목"


def test_turns_follow_each_other(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(chatty, "하나\n둘\n/new\n둘\n", monkeypatch, system="셋")
    first, second, alone = capsys.readouterr().out.splitlines()
    prompt = "<|im_start|>system\n셋<|im_end|>\n<|im_start|>user\n하나<|im_end|>\n"
    rest = f"<|im_start|>assistant\n{first}<|im_end|>\n<|im_start|>user\n둘<|im_end|>\n<|im_start|>assistant\n"
    assert byeori.generate(model=chatty, dtype="float32", max_new_tokens=12, raw=prompt + rest) == [second]
    assert alone != second


def test_retry_draws_other_numbers(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk(trained, "봄\n/retry\n/retry\n", monkeypatch, temperature=1.5)
    first, _, rest = capsys.readouterr().out.partition("[2] tuned: ")
    second, _, third = rest.partition("[3] tuned: ")
    assert third and len({text.strip() for text in (first, second, third)}) == 3
    talk(trained, "봄\n/retry\n", monkeypatch)
    assert "without a temperature the answer would be the same" in capsys.readouterr().err


def test_what_is_refused(trained: Path, merged: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    with pytest.raises(byeori.ConfigError, match="is a whole model"):
        talk(merged, "", monkeypatch, base=True)
    with pytest.raises(byeori.ConfigError, match="--system is for chat templates"):
        talk(trained, "", monkeypatch, system="x")
    talk(trained, "/nothing\n/save\n/retry\n/etc/passwd\n", monkeypatch)
    shown = capfd.readouterr()
    assert "There is no command /nothing" in shown.err and "nothing has been answered yet" in shown.err
    assert len(shown.out.splitlines()) == 1  # the path is a text like any other


@pytest.mark.parametrize(("numbers", "count", "found"), [("2", 2, (1, 0)), ("1", 2, (0, 1)), ("3 1", 3, (2, 0))])
def test_which_answers_make_a_pair(numbers: str, count: int, found: tuple[int, int]) -> None:
    assert _chosen(numbers, count) == found
    for wrong in ("0", "4 1", "x", "1 2 3", "1", "\N{SUPERSCRIPT TWO} 1", "9" * 5000 + " 1"):
        with pytest.raises(ByeoriError, match=r"there (is|are) \d answers?;"):
            _chosen(wrong, 3)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model whose answers take minutes: its end-of-text token is never among the 50 most likely ones."""
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer), max_position_embeddings=100_000)
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    return tmp_path / "endless"


def test_a_session_at_a_terminal(endless: Path, tmp_path: Path) -> None:
    """Ctrl-C stops an answer and keeps the session; Korean can be typed, erased and sent; Ctrl-D ends."""
    flags = [str(endless), "--dtype", "float32", "--max_new_tokens", "90000", "--pairs", str(tmp_path / "pairs.jsonl")]
    flags += ["--template", "title-ko", "--temperature", "5", "--top_k", "50"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    shell = pexpect.spawn(
        sys.executable,
        ["-P", "-m", "byeori", "chat", *flags],
        env=environment,
        encoding="utf-8",
        timeout=120,
        dimensions=(24, 100),
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the suite runs in the background
    )
    shell.expect("Ctrl-D ends")
    shell.expect("document> ")
    shell.send("봄이 왔나\x7f다.\r")
    shell.expect("\r\n")
    shell.expect("[가-힣]{2}")  # the answer has begun: what the line editor sends has no Korean
    shell.sendintr()
    shell.expect(r"\[stopped\]")
    shell.expect("document> ")
    shell.sendintr()
    shell.expect("Ctrl-D or /exit ends")
    shell.expect("document> ")
    shell.send("/save\r")
    shell.expect("better answer> ")
    shell.send("더 나은 제목\r")
    shell.expect("Kept in")
    shell.expect("document> ")
    shell.sendeof()
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 0
    pair = json.loads((tmp_path / "pairs.jsonl").read_text(encoding="utf-8"))
    assert pair["document"] == "봄이 왔다." and pair["chosen"] == "더 나은 제목" and pair["rejected"]
