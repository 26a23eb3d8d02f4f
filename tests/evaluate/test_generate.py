"""Generation: the trained prompt, batches equal to single prompts, prompts from flags, files and tables."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
import forks
from byeori.artifacts import saved_model
from byeori.data import template
from byeori.evaluate import generate
from byeori.evaluate.generate import Sampling
from byeori.model import decode
from byeori.support import journal

GREEDY = Sampling(max_new_tokens=12)
TITLE_KO = template.shipped()["title-ko"]


def load(folder: Path) -> tuple[Any, Any]:
    saved = saved_model.find(str(folder))
    return saved_model.load_weights(saved, "float32", torch.device("cpu")), saved.tokenizer


@pytest.fixture(scope="module")
def plain(trained: Path, tiny_model: Path) -> Any:
    """The adapter by PEFT and transformers alone: a function of prompt text -> greedy answer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), trained).eval()

    def ask(prompt: str, tokens: int = 12) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    return ask


def prompt_of(document: str) -> str:
    return template.parse(TITLE_KO).prompt({"document": document})


def ask(folder: Path, **settings: Any) -> list[str]:
    return byeori.generate(**{"model": folder, "dtype": "float32", "max_new_tokens": 12, **settings})


def documents(path: Path) -> list[str]:
    return [json.loads(line)["document"] for line in path.read_text(encoding="utf-8").splitlines()]


# ---- one prompt --------------------------------------------------------------------------------------------------


def test_the_saved_template_is_the_default(trained: Path, plain: Any) -> None:
    assert ask(trained, columns={"document": "봄이 왔다"}) == [plain(prompt_of("봄이 왔다"))]


def test_the_answer_is_streamed_to_standard_output(
    trained: Path, plain: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(trained, columns={"document": "봄이 왔다"})
    shown = capsys.readouterr().out
    assert shown.strip() == plain(prompt_of("봄이 왔다"))
    assert shown.endswith("\n")


def test_text_is_streamed_while_the_model_generates(trained: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is passed on, and flushed, before the next ones are generated."""
    passes, seen = [], []

    class Screen(io.StringIO):
        def flush(self) -> None:
            if self.getvalue() not in ("", *(text for text, _ in seen)):
                seen.append((self.getvalue(), len(passes)))

    def count(module: Any, *given: Any) -> None:
        if type(module).__name__ == "LlamaForCausalLM":
            passes.append(1)

    monkeypatch.setattr(sys, "stdout", Screen())
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        answer = ask(trained, columns={"document": "봄이 왔다"}, max_new_tokens=40)[0]
    finally:
        hook.remove()
    assert len(seen) > 3
    texts, moments = zip(*seen, strict=True)
    assert all(after.startswith(before) for before, after in pairwise(texts)) and texts[-1].strip() == answer
    assert moments[0] < len(passes) / 2 and all(a <= b for a, b in pairwise(moments))
    assert answer == plain(prompt_of("봄이 왔다"), 40)


def test_a_column_from_a_file(trained: Path, plain: Any, tmp_path: Path) -> None:
    (tmp_path / "news.txt").write_text("\ufeff봄이 왔다\n", encoding="utf-8")
    assert ask(trained, columns={"document": f"@{tmp_path / 'news.txt'}"}) == [plain(prompt_of("봄이 왔다"))]


def test_a_column_from_standard_input(trained: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("봄이 왔다\n"))
    assert ask(trained) == [plain(prompt_of("봄이 왔다"))]


def test_nothing_on_standard_input(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(byeori.ConfigError, match="the column 'document' is missing"):
        ask(trained)


def test_several_missing_columns_are_named(tiny_model: Path) -> None:
    with pytest.raises(byeori.ConfigError, match="give --question TEXT, --topic TEXT"):
        ask(tiny_model, template="{question} {topic}\n{answer}")


def test_braces_in_a_value_stay(trained: Path, plain: Any) -> None:
    assert ask(trained, columns={"document": "{title} {봄}"}) == [plain(prompt_of("{title} {봄}"))]


def test_column_names_with_a_dash(tiny_model: Path) -> None:
    spec = "{news-text}\n{title}"
    assert ask(tiny_model, template=spec, columns={"news_text": "봄"}) == ask(
        tiny_model, template=spec, columns={"news-text": "봄"}
    )


@pytest.mark.parametrize("end", ["", "\n"])
def test_raw_is_used_unchanged(trained: Path, plain: Any, tmp_path: Path, end: str) -> None:
    prompt = prompt_of("봄이 왔다").rstrip() + end
    assert ask(trained, raw=prompt) == [plain(prompt)]
    (tmp_path / "prompt.txt").write_text(prompt, encoding="utf-8")
    assert ask(trained, raw=f"@{tmp_path / 'prompt.txt'}") == [plain(prompt)]


def test_raw_needs_no_template(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("봄이", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert ask(tiny_model, raw="봄이") == [text.strip()]


def test_a_base_model_with_a_template(tiny_model: Path) -> None:
    assert ask(tiny_model, template="title-ko", columns={"document": "봄"}) == ask(tiny_model, raw=prompt_of("봄"))


def test_a_merged_model_answers_as_its_adapter(trained: Path, merged: Path) -> None:
    assert ask(merged, columns={"document": "봄이 왔다"}) == ask(trained, columns={"document": "봄이 왔다"})


def test_a_given_template_overrides_the_saved_one(trained: Path, plain: Any) -> None:
    assert ask(trained, template="{document}\n{title}", columns={"document": "봄"}) == [plain("봄\n")]


def test_an_answer_to_a_file(trained: Path, plain: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask(trained, columns={"document": "봄"}, output=tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == plain(prompt_of("봄")) + "\n"
    assert capsys.readouterr().out == ""


def test_a_template_with_a_suffix_prints_only_the_answer(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ask(trained, template="{document}\n{title}\n[END]", columns={"document": "봄"})
    assert capsys.readouterr().out == result[0] + "\n"


# ---- a table -----------------------------------------------------------------------------------------------------


def test_rows_are_written_in_order_with_an_output(trained: Path, plain: Any, title_rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = ask(trained, data_path=title_rows, output=path, max_rows=10, generation_batch_size=3)
    written = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [json.loads(line) for line in title_rows.read_text(encoding="utf-8").splitlines()][:10]
    assert [{**row, "output": answer} for row, answer in zip(rows, answers, strict=True)] == written
    assert answers == [plain(prompt_of(row["document"])) for row in rows]


def test_rows_to_standard_output(trained: Path, title_rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ask(trained, data_path=title_rows, max_rows=3)
    assert [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()] == answers


def test_rows_need_no_answer(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("id,document\n007,봄이 왔다\n", encoding="utf-8")
    ask(trained, data_path=path, output=tmp_path / "a.jsonl")
    written = json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))
    assert list(written) == ["id", "document", "output"]
    assert written["id"] == "007"


def test_rows_without_the_templates_column(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"docment": "봄"}\n', encoding="utf-8")
    with pytest.raises(byeori.TemplateError, match=r"'document'.*did you mean docment\?"):
        ask(trained, data_path=path)


def test_rows_with_dates_can_be_written(trained: Path, tmp_path: Path) -> None:
    import datetime

    import datasets

    table = datasets.Dataset.from_list([{"document": "봄", "day": datetime.datetime(2024, 3, 1)}])
    table.to_parquet(tmp_path / "rows.parquet")
    ask(trained, data_path=tmp_path / "rows.parquet", output=tmp_path / "a.jsonl")
    assert json.loads((tmp_path / "a.jsonl").read_text(encoding="utf-8"))["day"].startswith("2024-03-01")


def test_long_prompts_are_shortened_and_not_their_headings(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"document": "봄 " * 2000}, ensure_ascii=False) + "\n", encoding="utf-8")
    result = saved_model.find(str(trained))
    assert ask(trained, data_path=path, max_new_tokens=12)
    how = saved_model.encoding(result, saved_model.template_of(result, None), cutoff_len=500)
    ids = generate.encode_prompts([{"document": "봄 " * 2000, "__row__": 0}], how, str)[0]
    assert len(ids) <= 500
    assert result.tokenizer.decode(ids).endswith("### 제목:\n")


def test_a_killed_run_continues_with_the_rows_that_are_missing(
    trained: Path, title_rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    settings = {"dtype": "float32", "max_new_tokens": 60, "temperature": 1.2, "generation_batch_size": 2}
    whole = ask(trained, data_path=title_rows, output=tmp_path / "whole.jsonl", **settings)
    program = ["-m", "byeori", "generate", str(trained), "--data-path", str(title_rows), "--output", str(path)]
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    process = forks.start(*program, *flags, env=dict(os.environ))
    wait_for(lambda: part.is_file() and part.read_bytes().count(b"\n") > 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = part.read_bytes().count(b"\n") - 1
    assert not path.exists() and 5 <= kept < 24
    with part.open("ab") as file:
        file.write(b'{"name": "tuned 23", "item": {"text": "torn')
    prompts: list[int] = []
    real = decode.decode

    def counted(model: Any, given: Any, *args: Any, **more: Any) -> None:
        prompts.extend(more["rows"])
        real(model, given, *args, **more)

    monkeypatch.setattr(decode, "decode", counted)
    assert ask(trained, data_path=title_rows, output=path, **settings) == whole
    assert len(prompts) == 24 - kept
    assert f"{kept} of 24 rows were answered before" in capfd.readouterr().err
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not part.exists()


def test_an_unfinished_run_with_other_settings_is_not_lost(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    path, part = tmp_path / "a.jsonl", tmp_path / "a.jsonl.part"
    with journal.unfinished(path, ["another run"], overwrite=None) as kept:
        kept.add("tuned 0", {})
        before = part.read_bytes()
    part.write_bytes(before)
    with pytest.raises(byeori.CheckpointError, match=r"another model, other rows or other settings.*--overwrite"):
        ask(trained, data_path=title_rows, output=path, max_rows=2)
    assert part.read_bytes() == before
    assert len(ask(trained, data_path=title_rows, output=path, max_rows=2, overwrite=True)) == 2
    assert not part.exists()


def test_a_file_is_replaced_only_when_asked(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("mine", encoding="utf-8")
    for source in ({"data_path": title_rows, "max_rows": 1}, {"columns": {"document": "봄"}}):
        with pytest.raises(byeori.CheckpointError, match=r"mine.jsonl exists already.*--overwrite"):
            ask(trained, output=path, **source)
        assert path.read_text(encoding="utf-8") == "mine"
    answers = ask(trained, output=path, data_path=title_rows, max_rows=1, overwrite=True)
    assert json.loads(path.read_text(encoding="utf-8"))["output"] == answers[0]


def test_prompts_without_room_are_reported_before_any_weights_are_loaded(
    trained: Path, title_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_model, "load_weights", None)
    with pytest.raises(byeori.TemplateError, match="the prompt is empty"):
        ask(trained, data_path=title_rows, template="{title}")


def wait_for(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def test_columns_of_the_rows_are_never_overwritten(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Alpaca's rows have their reference in a column `output`."""
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text(json.dumps({"document": "봄이 왔다.", "output": "mine"}) + "\n", encoding="utf-8")
    answers = ask(trained, data_path=rows, output=output)
    assert json.loads(output.read_text(encoding="utf-8")) == {
        "document": "봄이 왔다.",
        "output": "mine",
        "output_2": answers[0],
    }
    assert "answers are in the column 'output_2'" in capfd.readouterr().err


def test_every_batch_draws_its_own_samples(trained: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"document": "봄이 왔다."}) + "\n") * 6, encoding="utf-8")
    settings = {"data_path": rows, "temperature": 1.5, "generation_batch_size": 1}
    assert len(set(ask(trained, **settings))) > 3
    assert ask(trained, **settings) == ask(trained, **settings)
