"""What training and preview begin with: rows split, tokenized and audited, as the command line asks for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import byeori
from byeori.cli import main
from byeori.data import template
from byeori.data.row_kinds import ANSWER, PREFERENCE
from tiny_models import byte_level_tokenizer, sample_rows, short_sft, tiny_llama

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
Previews = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    tokenizer = byte_level_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def preview(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Previews:
    """`byeori preview --json` of some rows; what it prints."""

    def run(rows: list[dict[str, Any]], *flags: object, model: Path = tiny_model) -> dict[str, Any]:
        path = write(tmp_path / "rows.jsonl", rows)
        given = ["--base_model", model, "--data_path", path, "--cutoff_len", 512, "--json", *flags]
        capfd.readouterr()
        assert main(["preview", *map(str, given)]) == 0
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found

    return run


def titles(count: int) -> list[dict[str, Any]]:
    return [{"document": f"본문 {n}", "title": f"제목 {n}"} for n in range(count)]


# ---- rows that are dropped ---------------------------------------------------------------------------------------


def test_the_screen_lists_some_dropped_rows_and_json_all(
    preview: Previews, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = titles(3) + [{"document": "본문", "title": ""}] * 1030
    every = [f"rows.jsonl line {number}" for number in range(4, 1034)]
    assert [item["row"] for item in preview(rows)["dropped"]] == every
    html = tmp_path / "page.html"
    given = ["--base_model", tiny_model, "--data_path", tmp_path / "rows.jsonl", "--cutoff_len", 512, "--html", html]
    assert main(["preview", *map(str, given)]) == 0
    screen = [line for line in capfd.readouterr().out.splitlines() if line.startswith("dropped: ")]
    assert screen == [
        *(f"dropped: {row}: the answer, column 'title', is empty" for row in every[:20]),
        "dropped: and 1,010 more, which preview --json lists",
    ]
    page = unescape(html.read_text(encoding="utf-8"))
    assert [row in page for row in every[:22]] == [True] * 20 + [False] * 2 and "1,010 more" in page


EMPTY = "the answer, column 'title', is empty"


@pytest.fixture
def answerless(tmp_path: Path) -> Path:
    """12 rows; lines 3, 6 and 9 have no answer, and line 11 no text."""
    rows: list[dict[str, Any]] = titles(12)
    for line, title in ((3, ""), (6, "  \n"), (9, "\u3000")):
        rows[line - 1]["title"] = title
    rows[10]["document"] = None
    return write(tmp_path / "rows.jsonl", rows)


def job(name: str, model: Path, data: Path, *flags: object) -> int:
    given = ["--base_model", model, "--data_path", data, "--cutoff_len", 512, "--dtype", "float32", "--max_steps", 1]
    return main([name, *map(str, [*given, *flags])])


def test_rows_without_an_answer_stop_training(
    tiny_model: Path, answerless: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert job("sft", tiny_model, answerless, "--output_dir", tmp_path / "out") == 2
    said = capfd.readouterr().err.splitlines()
    named = f"rows.jsonl line 3: {EMPTY}; rows.jsonl line 6: {EMPTY}; rows.jsonl line 9: {EMPTY} (and 1 more)"
    stops = "cannot be trained, and training will stop unless --on_bad_rows drop is given"
    assert f"4 rows (3 with an empty answer) {stops}: {named}" in said
    assert said[-1] == f"error: {named}; fix the data, or drop such rows with --on_bad_rows drop"
    assert not (tmp_path / "out").exists()


def test_rows_without_an_answer_are_dropped_counted_and_named(
    tiny_model: Path, answerless: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drop = ["--on_bad_rows", "drop"]
    assert job("sft", tiny_model, answerless, "--output_dir", tmp_path / "out", *drop) == 0
    said = capfd.readouterr().err
    named = f"rows.jsonl line 3: {EMPTY}; rows.jsonl line 6: {EMPTY}; rows.jsonl line 9: {EMPTY} (and 1 more)"
    assert f"\n4 rows (3 with an empty answer) dropped: {named}\n" in said
    assert "\n8 rows to train;" in said
    found = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert (found["train_rows"], found["dropped_rows"], found["empty_answers"]) == (8, 4, 3)
    assert [item["row"] for item in found["dropped"]] == [f"rows.jsonl line {line}" for line in (3, 6, 9, 11)]
    compared = ["compare", tmp_path / "out", "--data_path", answerless, "--output_dir", tmp_path / "report"]
    compared += ["--max_new_tokens", 2]
    assert main([*map(str, compared)]) == 2
    assert capfd.readouterr().err == f"error: {named}; fix the data, or drop such rows with --on_bad_rows drop\n"
    assert main([*map(str, compared), *drop]) == 0
    said = capfd.readouterr().err
    assert said.startswith(f"4 rows dropped: {named}\n")
    assert "\nComparing base and tuned on 8 rows\n" in said


def test_pairs_that_lack_an_answer(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [{"question": f"왜 {n}?", "chosen": f"그래서 {n}", "rejected": f"몰라 {n}"} for n in range(6)]
    pairs[1]["chosen"], pairs[4]["rejected"] = "", " "
    data = write(tmp_path / "pairs.jsonl", pairs)
    named = (
        "pairs.jsonl line 2: the answer, column 'chosen', is empty; "
        "pairs.jsonl line 5: the answer, column 'rejected', is empty"
    )
    assert job("dpo", tiny_model, data, "--output_dir", tmp_path / "out") == 2
    assert f"error: {named}; fix the data" in capfd.readouterr().err
    assert job("dpo", tiny_model, data, "--output_dir", tmp_path / "out", "--on_bad_rows", "drop") == 0
    said = capfd.readouterr().err
    assert f"\n2 rows (2 with an empty answer) dropped: {named}\n" in said
    assert "\n4 rows to train;" in said


# ---- what rows share ---------------------------------------------------------------------------------------------


def test_the_share_of_prefixes_says_of_how_many_rows(
    preview: Previews, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first 1,000 rows have a word each and share nothing; 1,000 copies behind them are not looked at."""
    alone = [{"document": f"{n * 7919 % 100_003} 본문", "title": f"{n}"} for n in range(1000)]
    flags = ["--template", "{document}\n{title}"]
    found = preview(alone + [{"document": "여러 번 " * 20, "title": "같다"}] * 1000, *flags)
    assert (found["shared_prefix_rows"], found["shared_prefix"], found["train_rows"]) == (1000, 0, 2000)
    found = preview([{"document": "여러 번 " * 20, "title": "같다"}] * 1001 + alone, *flags)
    assert found["shared_prefix"] > 0.99
    given = ["--base_model", tiny_model, "--data_path", tmp_path / "rows.jsonl", "--cutoff_len", 512, *flags]
    assert main(["preview", *map(str, given)]) == 0
    assert "\n100% of the tokens of the first 1,000 rows are in prefixes that rows share\n" in capfd.readouterr().out
    pairs = [
        {"question": f"{n} 봄은 언제 오나요? 봄 소식을 기다립니다.", "chosen": f"{n}", "rejected": "몰라"}
        for n in range(4)
    ]
    assert preview(pairs, "--template", "{question}\n{answer}")["shared_prefix_rows"] == 4


# ---- the split ---------------------------------------------------------------------------------------------------


def with_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"id": number, "url": f"https://example.org/{number}"} for number, row in enumerate(rows)]


def talk(number: int) -> dict[str, Any]:
    turns = [("user", f"물음 {number}"), ("assistant", f"대답 {number}")]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("seed", range(4))
def test_copies_with_another_id_are_held_out_together(preview: Previews, seed: int) -> None:
    """Of 8 rows, 5 stand twice: 6 held out are the 3 single ones and one pair, and one row too few."""
    rows = with_id(titles(8) + titles(5))
    found = preview(rows, "--val_set_size", 6, "--seed", seed)
    assert found["rows_in_both_parts"] == 0
    assert (found["train_rows"], found["validation_rows"]) == (8, 5)


def test_fewer_held_out_than_asked_for_is_said(
    preview: Previews, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    preview(with_id(titles(8) + titles(5)))  # writes the rows
    given = ["preview", "--base_model", tiny_model, "--data_path", tmp_path / "rows.jsonl", "--cutoff_len", 512]
    for size, said in ((6, True), (5, False), (0, False)):
        assert main([*map(str, given), "--val_set_size", str(size)]) == 0
        line = "5 of the 6 rows that val_set_size asks for are held out: copies of a row stay together"
        assert (line in capfd.readouterr().out) == said


def test_copies_of_conversations_and_of_pairs_are_held_out_together(
    preview: Previews, chat_model: Path, tmp_path: Path
) -> None:
    talks = with_id([talk(number) for number in (*range(8), *range(5))])
    found = preview(talks, "--val_set_size", 6, model=chat_model)
    assert (found["template"], found["rows_in_both_parts"], found["validation_rows"]) == ("chat", 0, 5)
    pairs = [{"question": f"왜 {n}?", "chosen": f"그래서 {n}", "rejected": f"몰라 {n}"} for n in (*range(8), *range(5))]
    for model in (None, "chat"):
        flags = ["--val_set_size", 6] + (["--template", model] if model else [])
        found = preview(with_id(pairs), *flags, model=chat_model)
        assert (found["rows_in_both_parts"], found["validation_rows"]) == (0, 5)


def test_the_columns_that_become_tokens() -> None:
    columns = ["url", "title", "document", "chosen", "rejected", "prompt", "messages", "system", "__row__"]
    title = template.parse("[[{section}\n]]{document}\n{title}")
    assert ANSWER.columns_read(columns, title) == ["title", "document"]
    assert PREFERENCE.columns_read(columns, template.parse("{prompt}\n{answer}")) == ["chosen", "rejected", "prompt"]
    assert ANSWER.columns_read(columns, None) == ["messages", "system"]
    assert ANSWER.columns_read(["prompt", "completion", "id"], None) == ["prompt", "completion"]
    assert PREFERENCE.columns_read(columns, None) == ["chosen", "rejected", "messages", "system"]
    assert PREFERENCE.columns_read(["chosen", "rejected", "prompt", "id"], None) == ["chosen", "rejected", "prompt"]


def test_compare_knows_the_rows_of_a_run_that_held_some_out(tiny_model: Path, tmp_path: Path) -> None:
    """Its split is made again from the columns that it read; ids differ in the table that is compared."""
    rows = [{"document": row["document"][:40], "title": row["title"]} for row in sample_rows("titles-ko-train.jsonl")]
    path = write(tmp_path / "rows.jsonl", with_id(rows[:8] + rows[:5]))
    short_sft(tiny_model, path, tmp_path / "adapter", val_set_size=6)
    found = byeori.compare(
        adapter=tmp_path / "adapter",
        data_path=write(tmp_path / "others.jsonl", [row | {"id": "x"} for row in rows[:8]]),
        output_dir=tmp_path / "report",
        max_new_tokens=2,
    )
    assert "4 of the 8 rows were trained on" in found.verdict


def test_chat_without_messages_is_one_sentence(
    tiny_model: Path, chat_model: Path, title_rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--base_model", str(chat_model), "--data_path", str(title_rows), "--template", "chat"]
    assert main(["preview", *given, "--val_set_size", "2"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "error: the template `chat` reads the column `messages` (or `conversations`), and the columns are document, "
        "title; choose another template"
    )


def test_a_chat_run_saves_its_chat_template_and_trains_the_turns_it_names(
    chat_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """--chat_template and its variables lie in the adapter's tokenizer, so that generate and servers use them."""
    from transformers import AutoTokenizer

    talk = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
        {"role": "assistant", "content": "A2"},
    ]
    rows = write(tmp_path / "chats.jsonl", [{"messages": talk}] * 4)
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ mood }}" + CHAT + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", encoding="utf-8"
    )
    given = ["--base_model", str(chat_model), "--data_path", str(rows), "--chat_template", str(template)]
    given += ["--chat_template_kwargs", '{"mood": "calm"}']
    capfd.readouterr()
    assert main(["preview", *given, "--json", "--tokens", "--rows", "1"]) == 0
    first, second = json.loads(capfd.readouterr().out)["examples"]
    assert (first["row"], first["message"], second["message"]) == (0, 2, 4)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    for example, count in ((first, 1), (second, 3)):
        ((start, end),) = example["trained"]
        served = tokenizer.apply_chat_template(
            talk[:count],
            chat_template=template.read_text(encoding="utf-8"),
            add_generation_prompt=True,
            mood="calm",
            return_dict=False,
        )
        assert example["token_ids"][:start] == list(served)
        assert end == len(example["token_ids"]) == len(example["texts"])
    assert main(["preview", *given, "--json", "--tokens", "--rows", "1", "--train_turns", "last"]) == 0
    (last,) = json.loads(capfd.readouterr().out)["examples"]
    assert last["token_ids"] == second["token_ids"]
    given += ["--output_dir", str(tmp_path / "adapter"), "--max_steps", "1", "--dtype", "float32"]
    assert main(["sft", *given]) == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    served = saved.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert served == "calm<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
