"""`byeori preview` as it is run: on a terminal and into a pipe, as JSON and as a page."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import struct
import termios
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import forks
from byeori.cli import main
from byeori.commands import _rows
from byeori.data import template

SRC = Path(__file__).parents[2] / "src"
END = "<|endoftext|>"
MAIN = """
import datasets, sys
import forks
from byeori.cli import main
datasets.config.HF_DATASETS_CACHE = sys.argv[1] + "/cache"
sys.exit(main(sys.argv[2:]))
"""
PROMPT = template.parse(template.shipped()["title-ko"])


class Marks(HTMLParser):
    """What a card shows of its row, and what of that is marked."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.whole: list[str] = []
        self.marked: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(str(dict(attrs).get("class") or tag))
        if "card" in self.open[-1].split():
            self.whole.append("")
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open[:-1]

    def handle_data(self, data: str) -> None:
        if "text seen" in self.open:
            self.whole[-1] += data
            self.marked[-1] += data if "mark" in self.open else ""


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flags(model: Path, data: Path, *more: object) -> list[str]:
    return ["preview", *map(str, ("--base_model", model, "--data_path", data, "--cutoff_len", 512, *more))]


def run(arguments: list[str], folder: Path, *, stdout: bool) -> tuple[str, str]:
    """A process of its own whose errors go to a terminal, and its output too where asked for: (terminal, pipe).

    Nothing that is tokenized lies in the cache.
    """
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    added = {"TERM": "xterm-256color"}
    with (folder / "pipe").open("wb") as pipe:
        screen = there if stdout else pipe.fileno()
        process = forks.start("-c", MAIN, folder, *arguments, env=kept | added, stdio=(None, screen, there))
    os.close(there)
    shown = b""
    try:
        while part := os.read(here, 65536):
            shown += part
    except OSError:  # the other side is closed: Linux says so with an error
        pass
    os.close(here)
    assert process.wait(timeout=60) == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n"), (folder / "pipe").read_text(encoding="utf-8")


# ---- on the terminal ---------------------------------------------------------------------------------------------


def test_on_a_terminal_there_are_a_bar_and_colours(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    shown, _ = run(flags(tiny_model, title_rows), tmp_path, stdout=True)
    assert "\rTokenizing: 100%|" in shown
    assert "24/24" in shown
    for row in lines(title_rows)[:3]:
        assert f"\x1b[1;32m{row['title']}{END}\x1b[0m" in shown
    assert "▸" not in shown


def test_the_bar_does_not_get_into_a_pipe(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    shown, piped = run(flags(tiny_model, title_rows, "--json"), tmp_path, stdout=False)
    assert "\rTokenizing: 100%|" in shown
    assert json.loads(piped)["train_rows"] == 24


def test_in_a_pipe_there_are_neither(tiny_model: Path, title_rows: Path, tmp_path: Path) -> None:
    done = forks.run("-c", MAIN, tmp_path, *flags(tiny_model, title_rows))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    for row in lines(title_rows)[:3]:
        assert f"▸{row['title']}{END}◂" in done.stdout


def test_in_a_pipe_a_long_table_has_a_line(
    tiny_model: Path, title_rows: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_rows, "_LONG_TABLE", 23)
    assert main(flags(tiny_model, title_rows, "--json")) == 0
    assert capfd.readouterr().err == "Tokenizing 24 rows\n"
    monkeypatch.setattr(_rows, "_LONG_TABLE", 24)
    assert main(flags(tiny_model, title_rows, "--json")) == 0
    assert capfd.readouterr().err == ""


# ---- as JSON and as a page ---------------------------------------------------------------------------------------


def test_json_is_the_audit_and_nothing_else(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    assert main(flags(tiny_model, title_rows, "--json", "--val_set_size", 4)) == 0
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    titles = [len(tokenizer(row["title"])["input_ids"]) + 1 for row in lines(title_rows)]
    whole = [len(tokenizer(PROMPT.prompt(row))["input_ids"]) for row in lines(title_rows)]
    tokens = [a + b for a, b in zip(whole, titles, strict=True)]
    longest = found.pop("longest")
    assert [item["tokens"] for item in longest] == sorted(tokens, reverse=True)[:3]
    assert longest[0]["row"] == f"titles.jsonl line {tokens.index(max(tokens)) + 1}"
    assert 0 < found.pop("shared_prefix") < 1
    assert found == {
        "rows": 24,
        "train_rows": 20,
        "validation_rows": 4,
        "tokens": sum(tokens),
        "target_tokens": sum(titles),
        "mean_tokens": round(sum(tokens) / 24, 1),
        "shortened_rows": 0,
        "tokens_cut": 0,
        "dropped_rows": 0,
        "dropped": [],
        "too_long_rows": 0,
        "empty_prompts": 0,
        "first_empty_prompt": None,
        "empty_answers": 0,
        "duplicate_rows": 0,
        "rows_in_both_parts": 0,
        "turns_left_out": 0,
        "joined_rows": 0,
        "special_rows": 0,
        "special": [],
        "composed_rows": 0,
        "shared_prefix_rows": 20,
        "template": "title-ko",
        "special_tokens_in_text": "escape",
        "served": {
            "stop_token": END,
            "stop_token_trained": True,
            "stop_token_in_generation_config": False,
        },
    }


def test_the_page_marks_the_answers_of_the_rows_that_are_shown(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(flags(tiny_model, title_rows, "--rows", 5, "--html", page, "--json")) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["train_rows"] == 24
    assert captured.err == f"Preview in {page}\n"
    cards = page.read_text(encoding="utf-8").partition('<ol id="cards"')[2].partition("</ol>")[0]
    found = Marks(cards)
    first = lines(title_rows)[:5]
    assert found.marked == [row["title"] + END for row in first]
    assert found.whole == [PROMPT.prompt(row) + row["title"] + END for row in first]


def test_no_weights_are_needed(
    tiny_model: Path, title_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(flags(tiny_model, title_rows, "--json")) == 0
    expected = capfd.readouterr().out
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(flags(bare, title_rows, "--json")) == 0
    assert capfd.readouterr().out == expected


@pytest.mark.parametrize("ends", [True, False])
def test_the_stop_token_of_documents_is_that_of_their_last_pieces(
    tiny_model: Path, title_rows: Path, capfd: pytest.CaptureFixture[str], ends: bool
) -> None:
    given = ["--text_column", "document", "--cutoff_len", "16", "--add_eos_token", str(ends), "--json", "--rows", "1"]
    assert main(["preview", str(tiny_model), str(title_rows), *given]) == 0
    assert json.loads(capfd.readouterr().out)["served"]["stop_token_trained"] is ends


def test_a_row_whose_values_are_nested_too_deeply_is_named(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools: object = "x"
    for _ in range(900):
        tools = [tools]
    turns = [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "네"}]
    rows = [{"messages": turns}, {"messages": turns, "tools": tools}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = ["--base_model", str(tiny_model), "--data_path", str(tmp_path / "rows.jsonl"), "--chat_template", "chatml"]
    assert main(["preview", *words]) == 0
    assert "rows.jsonl line 2: a value is nested hundreds of times; remove it" in capsys.readouterr().out
