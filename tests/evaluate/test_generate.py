"""Generation: the trained prompt, batches equal to single prompts, prompts from flags, files and tables."""

from __future__ import annotations

import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import byeori
from byeori.artifacts import saved_model
from byeori.data import template
from byeori.errors import ByeoriError
from byeori.evaluate import generate
from byeori.evaluate.generate import Sampling
from byeori.model import forward

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


# ---- the core ----------------------------------------------------------------------------------------------------


def test_batches_with_left_padding_equal_single_prompts(trained: Path, title_rows: Path) -> None:
    model, tokenizer = load(trained)
    prompts = [
        tokenizer(prompt_of(text[: 5 + 4 * index]))["input_ids"] for index, text in enumerate(documents(title_rows)[:8])
    ]
    assert len({len(prompt) for prompt in prompts}) > 4
    together = generate.answer(model, tokenizer, prompts, GREEDY)
    alone = [generate.answer(model, tokenizer, [prompt], GREEDY)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("penalty", [1.3, 2.0])
def test_repetition_penalty_ignores_the_padding(trained: Path, title_rows: Path, penalty: float) -> None:
    model, tokenizer = load(trained)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    sampling = Sampling(max_new_tokens=12, repetition_penalty=penalty)
    prompts = [
        tokenizer(prompt_of(text[: 5 + 8 * index]))["input_ids"] for index, text in enumerate(documents(title_rows)[:4])
    ]
    together = generate.answer(model, tokenizer, prompts, sampling)
    assert together == [generate.answer(model, tokenizer, [prompt], sampling)[0] for prompt in prompts]


def test_repetition_penalty_equals_that_of_transformers(trained: Path) -> None:
    model, tokenizer = load(trained)
    ids = tokenizer(prompt_of("봄이 왔다"))["input_ids"]
    result = generate.answer(model, tokenizer, [ids], Sampling(max_new_tokens=12, repetition_penalty=1.5))[0]
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    assert result.text == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def test_sampling_is_reproducible_with_its_seed(trained: Path) -> None:
    model, tokenizer = load(trained)
    prompts = [tokenizer(prompt_of("봄"))["input_ids"]]

    def sample(seed: int) -> str:
        sampling = Sampling(max_new_tokens=24, temperature=1.5, top_p=0.95, top_k=50, seed=seed)
        return generate.answer(model, tokenizer, prompts, sampling)[0].text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_an_answer_ends_at_the_end_of_text(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    with torch.no_grad():  # a head that writes token 70 after anything, and the end of text after token 70
        model.lm_head.weight.zero_()
    calls = []

    def head(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        output[:] = 0
        output[..., 70 if len(calls) < 4 else tokenizer.eos_token_id] = 1
        return output

    model.lm_head.register_forward_hook(head)
    result = generate.answer(model, tokenizer, [[5, 6]], GREEDY)[0]
    assert (result.stopped, result.tokens) == (True, 3)
    assert result.text == tokenizer.decode([70, 70, 70]).strip()


def test_an_answer_cut_at_the_limit_is_not_stopped(trained: Path) -> None:
    model, tokenizer = load(trained)
    result = generate.answer(model, tokenizer, [tokenizer("봄")["input_ids"]], Sampling(max_new_tokens=1))[0]
    assert (result.stopped, result.tokens) == (False, 1)


def test_every_stop_token_of_the_model_counts(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    model.generation_config.eos_token_id = [1, 70]

    def head(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., 70] = 1e4
        return output

    model.lm_head.register_forward_hook(head)
    result = generate.answer(model, tokenizer, [[5, 6]], GREEDY)[0]
    assert (result.stopped, result.tokens) == (True, 0)


def test_the_suffix_of_the_template_ends_an_answer(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    wanted = tokenizer("봄\n[END] 봄봄봄봄")["input_ids"]
    calls: list[int] = []

    def head(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output[:] = 0
        output[..., wanted[min(len(calls), len(wanted) - 1)]] = 1
        calls.append(1)
        return output

    model.lm_head.register_forward_hook(head)
    result = generate.answer(model, tokenizer, [[5, 6]], Sampling(max_new_tokens=40), suffix="\n[END]")[0]
    assert (result.text, result.stopped) == ("봄", True)
    assert len(calls) < 40


def test_answers_end_at_the_maximum_length(tiny_model: Path) -> None:
    model, tokenizer = load(tiny_model)
    long = Sampling(max_new_tokens=100_000, max_length=512)
    result = generate.answer(model, tokenizer, [[5] * 505], long)[0]
    assert result.tokens <= 7
    with pytest.raises(ByeoriError, match="leaves no room for an answer within the model's maximum length of 512"):
        generate.answer(model, tokenizer, [[5] * 512], long)


def test_no_generation_with_forest_attention(trained: Path) -> None:
    model, tokenizer = load(trained)
    ids = tokenizer("봄이 왔다")["input_ids"]
    before = generate.answer(model, tokenizer, [ids], GREEDY)
    assert forward.use_forest_attention(model)
    with pytest.raises(RuntimeError, match="without a layout"):
        generate.answer(model, tokenizer, [ids], GREEDY)
    forward.use_plain_attention(model)
    assert generate.answer(model, tokenizer, [ids], GREEDY) == before


def test_batches_hold_prompts_of_similar_length() -> None:
    assert generate.batches([[0] * n for n in (3, 9, 1, 7, 5)], 2) == [[1, 3], [4, 0], [2]]


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


def test_finished_batches_survive_an_interrupt(
    trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, count = tmp_path / "a.jsonl", generate.answer, []

    def answer(*args: Any, **kwargs: Any) -> Any:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(generate, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        ask(trained, data_path=title_rows, output=path, generation_batch_size=4)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 8
    assert all(row["output"] is not None and row["document"] in documents(title_rows) for row in rows)


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
