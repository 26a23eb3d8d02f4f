"""Comparison: base and tuned from one model equal two separate models; the contents of the three files."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import byeori
from byeori.artifacts import layout
from byeori.data import template
from byeori.errors import CheckpointError
from byeori.evaluate import metrics
from byeori.model import forward
from byeori.support import atomic_files, journal
from tiny_models import short_sft

NAMES = set(metrics.ROW_METRICS)


def run(adapter: Path, rows: Path, output: Path, **settings: Any) -> Any:
    common = {"dtype": "float32", "max_new_tokens": 10, "max_rows": 6, "generation_batch_size": 4}
    common |= {"few_shots": 0}
    return byeori.compare(**{"adapter": adapter, "data_path": rows, "output_dir": output, **common, **settings})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def compared(trained: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One comparison, for the tests that only read it."""
    return run(trained, title_rows, tmp_path_factory.mktemp("compared") / "report")


def test_near_copies_of_training_rows_are_said_and_can_be_filtered(
    trained: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows with other white space and one more word, one as it was trained, one with another number, one new."""
    seen = [row["document"] for row in lines(title_rows)]
    new = ["처음 보는 글이며 어디에도 없다. " * 3] * 2
    texts = [seen[0].replace(" ", "  ") + "!", seen[1] + " 끝", seen[2], seen[3] + " 2031", *new]
    answers = ["가", "나", lines(title_rows)[2]["title"], "라", "마", "바"]
    rows = [{"document": text, "title": answer} for text, answer in zip(texts, answers, strict=True)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    result = run(trained, path, tmp_path / "report")
    found = {item["name"]: item for item in result.metrics["findings"]}
    assert found["trained_on"]["rows"] == [2] and found["near_copies"]["rows"] == [0, 1]
    said = "2 of the 6 rows are near copies of training rows, which may give answers away."
    assert found["near_copies"]["sentence"].startswith(said) and said in result.verdict
    page = (tmp_path / "report" / layout.REPORT).read_text(encoding="utf-8")
    assert re.search(r'data-filter="leaked"|value="leaked"', page) and "leaked from training" in page


def alone(model: Any, tokenizer: Any, row: dict[str, str]) -> tuple[str, float]:
    """Greedy answer and loss per answer token, by transformers' own forward pass over one row."""
    prompt = template.parse(template.shipped()["title-ko"]).prompt(row)
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        whole = tokenizer(prompt + row["title"], return_tensors="pt", return_offsets_mapping=True)
        offsets = whole.pop("offset_mapping")[0]
        tokens = torch.cat([whole["input_ids"][0], torch.tensor([tokenizer.eos_token_id])])
        labels = torch.where(offsets[:, 1] > len(prompt), whole["input_ids"][0], -100)
        labels = torch.cat([labels, torch.tensor([tokenizer.eos_token_id])])
        loss = model(input_ids=tokens[None], labels=labels[None]).loss.item()
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return answer, loss


def test_both_sides_equal_separate_models(compared: Any, trained: Path, tiny_model: Path, title_rows: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = lines(title_rows)[:6]
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    expected = {"base": [alone(base, tokenizer, row) for row in rows]}
    tuned = PeftModel.from_pretrained(base, trained).eval()
    expected["tuned"] = [alone(tuned, tokenizer, row) for row in rows]
    written = lines(compared.rows)
    for side in ("base", "tuned"):
        assert [row[f"{side}_output"] for row in written] == [answer for answer, _ in expected[side]]
        assert [row[side]["loss"] for row in written] == pytest.approx([loss for _, loss in expected[side]], rel=1e-4)
    assert [row["base_output"] for row in written] != [row["tuned_output"] for row in written]


def test_the_base_is_loaded_once(
    trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy for the base's answers would double the memory."""
    made: list[str] = []
    real = transformers.PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(kind: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(kind.__name__)
        return real(kind, name, *args, **kwargs)

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    adapter = shutil.copytree(trained, tmp_path / "adapter")  # which keeps the numbers of its own comparison
    run(adapter, title_rows, tmp_path / "report", max_rows=2)
    assert made == ["LlamaForCausalLM"]


def test_rows_jsonl_holds_the_rows_in_order_and_both_answers(compared: Any, title_rows: Path) -> None:
    for row, given in zip(lines(compared.rows), lines(title_rows)[:6], strict=True):
        assert list(row) == ["document", "title", "base_output", "tuned_output", "base", "tuned"]
        assert {name: row[name] for name in given} == given
        assert set(row["base"]) == set(row["tuned"]) == NAMES


def test_contents_of_metrics_json(compared: Any) -> None:
    result = json.loads((compared.report.parent / "metrics.json").read_text(encoding="utf-8"))
    assert result == compared.metrics
    assert set(result["base"]) == set(result["tuned"]) == set(result["difference"]) == NAMES
    for name in NAMES:
        interval = result["difference"][name]
        assert set(interval) == {"mean", "low", "high"}
        assert interval["low"] <= interval["mean"] <= interval["high"]
        assert interval["mean"] == pytest.approx(result["tuned"][name] - result["base"][name])


def test_metrics_are_the_means_of_the_rows(compared: Any) -> None:
    written = lines(compared.rows)
    for side in ("base", "tuned"):
        for name in NAMES:
            mean = sum(row[side][name] for row in written) / len(written)
            assert compared.metrics[side][name] == pytest.approx(mean)
        texts = [(row[f"{side}_output"], row["title"]) for row in written]
        assert [row[side]["chrf"] for row in written] == pytest.approx([metrics.chrf(*pair) for pair in texts])


def test_the_folder_holds_three_files_and_the_adapter_its_metrics(compared: Any, trained: Path) -> None:
    assert {path.name for path in compared.report.parent.iterdir()} == {"report.html", "rows.jsonl", "metrics.json"}
    assert json.loads((trained / "metrics.json").read_text(encoding="utf-8")) == compared.metrics


def test_the_verdict_is_on_the_page(compared: Any) -> None:
    page = compared.report.read_text(encoding="utf-8")
    assert compared.verdict[:40] in page
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S*", "", page)


def shown_prompt(page: str) -> str:
    """Return the text of the page's second <pre>, without markup."""
    result = re.findall(r"<pre[^>]*>\n(.*?)</pre>", page, re.DOTALL)[1]
    return html.unescape(re.sub(r"</?span[^>]*>", "", result))


def test_the_first_rows_prompt_is_on_the_page(trained: Path, title_rows: Path, compared: Any, tmp_path: Path) -> None:
    document = lines(title_rows)[0]["document"]
    title_ko = template.parse(template.shipped()["title-ko"])
    assert shown_prompt(compared.report.read_text(encoding="utf-8")) == title_ko.prompt({"document": document})
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    cut = run(adapter, title_rows, tmp_path / "cut", max_rows=1, cutoff_len=150).report.read_text(encoding="utf-8")
    shorter = [title_ko.prompt({"document": document[:end]}) for end in range(1, len(document))]
    assert shown_prompt(cut) in shorter  # as the models were given it


def test_special_tokens_are_visible_in_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    shutil.copytree(tiny_model, model)
    turn = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    asked = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (model / "chat_template.jinja").write_text(turn + asked, encoding="utf-8")
    turns = [{"role": "user", "content": "왜 <b>?"}, {"role": "assistant", "content": "그냥"}]
    rows.write_text(json.dumps({"messages": turns}, ensure_ascii=False) + "\n", encoding="utf-8")
    byeori.sft(base_model=model, data_path=rows, output_dir=tmp_path / "adapter", max_steps=1, dtype="float32")
    page = run(tmp_path / "adapter", rows, tmp_path / "report").report.read_text(encoding="utf-8")
    assert shown_prompt(page) == "<|im_start|>user\n왜 <b>?<|im_end|><|im_start|>assistant\n"
    assert page.count('<span class="special">&lt;|im_start|&gt;</span>') == 1  # the second stands with <|im_end|>
    assert page.count('<span class="special">&lt;|im_end|&gt;&lt;|im_start|&gt;</span>') == 1


def test_scripts_in_the_data_are_escaped(trained: Path, tmp_path: Path) -> None:
    attack = "<script>alert('봄')</script>"
    row = {"document": f"봄 {attack}", "title": f"{attack} 봄", "note": attack}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    result = run(trained, tmp_path / "rows.jsonl", tmp_path / "o")
    page = result.report.read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert lines(result.rows)[0]["document"] == row["document"]


def test_bad_rows_can_be_dropped(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    text = title_rows.read_text(encoding="utf-8").splitlines()[:3]
    text[1:1] = ['{"document": "봄", "title": ""}', '{"document": null, "title": "봄"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(text) + "\n", encoding="utf-8")
    result = run(trained, tmp_path / "rows.jsonl", tmp_path / "o", on_bad_rows="drop")
    assert [row["title"] for row in lines(result.rows)] == [json.loads(text[i])["title"] for i in (0, 3, 4)]
    with pytest.raises(byeori.DataError, match="line 2: the answer"):
        run(trained, tmp_path / "rows.jsonl", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_table_of_bad_rows_only(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"document": "봄", "title": ""}\n', encoding="utf-8")
    with pytest.raises(byeori.DataError, match=r"no row of .* can be compared"):
        run(trained, tmp_path / "rows.jsonl", tmp_path / "o", on_bad_rows="drop")


def test_results_are_overwritten_only_when_asked(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    result = run(trained, title_rows, tmp_path / "o", max_rows=2)
    before = result.report.read_bytes()
    with pytest.raises(byeori.CheckpointError, match="holds results already"):
        run(trained, title_rows, tmp_path / "o", max_rows=3)
    assert result.report.read_bytes() == before
    run(trained, title_rows, tmp_path / "o", max_rows=3, overwrite_output_dir=True)
    assert len(lines(result.rows)) == 3


@pytest.mark.parametrize("at", [3, 8, 15, 23])
def test_an_interrupted_comparison_continues(
    trained: Path, title_rows: Path, compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Of 24 items: the loss and the answer of both models for 6 rows."""
    real, names = journal.Journal.add, []

    def add(self: Any, name: str, item: Any) -> None:
        real(self, name, item)
        names.append(name)
        if len(names) == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "add", add)
        run(trained, title_rows, tmp_path / "o")
    assert [path.name for path in (tmp_path / "o").iterdir()] == [f"{layout.ROWS}.part"]
    first = set(names)
    names.clear()
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", lambda self, name, item: (names.append(name), real(self, name, item)))
        result = run(trained, title_rows, tmp_path / "o")
    assert not first & set(names) and len(first) + len(names) == 24
    assert lines(result.rows) == lines(compared.rows)
    assert result.metrics == compared.metrics


def test_earlier_results_stay_until_there_are_new_ones(
    trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(trained, title_rows, tmp_path / "o", max_rows=2)
    before = {path.name: path.read_bytes() for path in result.report.parent.iterdir()}

    def add(self: Any, name: str, item: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(journal.Journal, "add", add)
    with pytest.raises(KeyboardInterrupt):
        run(trained, title_rows, tmp_path / "o", max_rows=3, overwrite_output_dir=True)
    assert {path.name: path.read_bytes() for path in result.report.parent.iterdir() if path.suffix != ".part"} == before


def test_prompts_are_shortened_as_in_training(trained: Path, tmp_path: Path) -> None:
    row = {"document": "봄 " * 2000, "title": "봄소식"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert len(lines(run(trained, tmp_path / "rows.jsonl", tmp_path / "o", cutoff_len=100).rows)) == 1


def test_a_wrong_setting_leaves_no_output_folder(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    with pytest.raises(byeori.ConfigError):
        run(trained, title_rows, tmp_path / "o", few_shots=-1)
    with pytest.raises(byeori.TemplateError):
        run(trained, title_rows, tmp_path / "o", template="{docment}\n{title}")
    assert not (tmp_path / "o").exists()


def test_rows_of_the_training_data_are_counted(
    trained: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    """Held-out rows of the same table are not counted, and neither is a row with another answer."""
    assert "6 of the 6 rows were trained on" in run(trained, title_rows, tmp_path / "all").verdict
    short_sft(tiny_model, title_rows, tmp_path / "adapter", val_set_size=5)
    result = run(tmp_path / "adapter", title_rows, tmp_path / "held-out", max_rows=24)
    assert "19 of the 24 rows were trained on" in result.verdict
    assert "19 of the 24 rows were trained on" in result.report.read_text(encoding="utf-8")
    rows = [{**row, "title": "다른 제목", "id": 1} for row in lines(title_rows)[:3]] + [lines(title_rows)[3]]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert "1 of the 4 rows was trained on" in run(trained, mixed, tmp_path / "mixed").verdict


def test_the_base_is_shown_training_rows_that_are_not_compared(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    result = run(trained, title_rows, tmp_path / "report", few_shots=2, max_new_tokens=4)
    shots = {line["name"]: line for line in result.metrics["baselines"]}["few_shots"]
    assert shots["about"] == "The base model with training rows in its prompt"
    assert 0 <= shots["scores"]["chrf"] <= 100
    assert shots["about"] in result.report.read_text(encoding="utf-8")
    whole = run(trained, title_rows, tmp_path / "whole", few_shots=2, max_rows=24, max_new_tokens=4)
    assert "few_shots" not in {line["name"] for line in whole.metrics["baselines"]}  # every training row is compared


def test_a_missing_training_table_is_not_read(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(trained, adapter)
    settings = (adapter / "byeori.yaml").read_text(encoding="utf-8")
    (adapter / "byeori.yaml").write_text(settings.replace(str(title_rows), "/nowhere.jsonl"), encoding="utf-8")
    said = run(adapter, title_rows, tmp_path / "report", max_rows=2).verdict
    assert said.endswith("The training rows are not here, so whether these rows were trained on is not known.")


def test_an_adapter_with_nan_is_an_error_with_its_name(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(trained, tmp_path / "adapter")
    weights = load_file(adapter / layout.ADAPTER)
    name = sorted(weights)[1]
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / layout.ADAPTER, metadata={"format": "pt"})
    with pytest.raises(byeori.ModelError, match=f"the adapter .*adapter is broken: {re.escape(name)} holds NaN"):
        run(adapter, title_rows, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_row_whose_loss_is_nan_is_an_error_with_its_name(
    trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = forward.forest_logprobs
    calls: list[int] = []

    def logprobs(*arguments: Any, **given: Any) -> Any:
        calls.append(1)
        return real(*arguments, **given) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(forward, "forest_logprobs", logprobs)
    with pytest.raises(byeori.ModelError, match=r"tuned model gives the reference of titles.jsonl line 3 a log-prob"):
        run(trained, title_rows, tmp_path / "report")


def test_a_read_only_adapter_does_not_prevent_the_verdict(
    trained: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its folder may belong to another user or be on a read-only disk: the report is complete, with a note."""
    real = atomic_files.write

    def write(path: Path, text: str) -> None:
        if path.parent == trained:
            raise CheckpointError(f"{path} could not be written (Permission denied)")
        real(path, text)

    monkeypatch.setattr(atomic_files, "write", write)
    result = run(trained, title_rows, tmp_path / "report", max_rows=2)
    assert result.report.is_file() and result.verdict
    printed = " ".join(capfd.readouterr().err.split())
    assert "model card will not have these numbers" in printed and result.verdict in printed
