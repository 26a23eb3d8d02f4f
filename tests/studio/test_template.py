"""The screen of the template: a row as training will see it, while the template is typed."""

from __future__ import annotations

import json
import shutil
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import byeori
from studio_page import meant, studio


def marked(html: str) -> tuple[str, str]:
    """The prompt and the trained text of the first example on the page."""
    import re

    body = html.split('<pre class="tokens"')[1].split(">", 1)[1].split("</pre>")[0]
    trained = "".join(re.findall(r"<mark>(.*?)</mark>", body, re.DOTALL))
    plain = re.sub(r"</?span>", "", re.sub(r"<mark>.*?</mark>", "", body, flags=re.DOTALL))
    return unescape(plain), unescape(trained)


def test_the_row_is_the_one_of_preview(page: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, trained = marked(page.get("/template").text)
    byeori.preview(base_model="model", data_path="rows.jsonl", json_output=True, tokens=True, rows=1)
    example = json.loads(capsys.readouterr().out)["examples"][0]
    (start, end) = example["trained"][0]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("model")
    assert trained == tokenizer.decode(example["token_ids"][start:end])
    assert prompt == tokenizer.decode(example["token_ids"][:start])
    assert f"{start} tokens of prompt, {end - start} trained" in page.get("/template").text


def test_what_is_typed_is_shown_and_kept(page: TestClient) -> None:
    text = "요약: {document}\r\n제목:\r\n{title}"
    html = page.post("/template-live", data={"text": text, "row": "3", "cutoff_len": "300"}).text
    prompt, trained = marked(html)
    assert prompt.startswith("요약: ") and prompt.endswith("\n제목:\n") and trained.endswith("<|endoftext|>")
    draft = page.app.state.workspace.draft("train")
    assert draft["template"] == "요약: {document}\n제목:\n{title}" and draft["cutoff_len"] == 300
    assert "요약: {document}" in unescape(page.get("/template").text)  # a refresh
    command, settings = meant(page.get("/template").text)
    assert command == "preview" and settings.template == draft["template"] and settings.cutoff_len == 300
    assert 'hx-swap-oob="true"' in html and "요약: {document}" in unescape(html)  # as a command too


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{document", "unmatched"),
        ("{nothing}\n{title}", "'nothing'"),
        ("{document}\n{title}\n{document}", "also in the prompt"),
        ("no column", "there is no template"),
    ],
)
def test_mistakes_are_said_while_they_are_typed(text: str, said: str, page: TestClient) -> None:
    html = unescape(page.post("/template-live", data={"text": text, "row": "1"}).text)
    assert said in html and 'class="error"' in html
    assert text in unescape(page.get("/template").text)


@pytest.mark.parametrize(("name", "value"), [("cutoff_len", "7"), ("cutoff_len", "many"), ("train_turns", "none")])
def test_wrong_settings_are_said(name: str, value: str, page: TestClient) -> None:
    assert f"--{name}" in page.post("/template-live", data={"text": "{document}{title}", name: value}).text


def test_a_template_of_the_package_keeps_its_name(page: TestClient) -> None:
    page.post("/template-start", data={"name": "title-ko"})
    assert page.app.state.workspace.draft("train")["template"] == "title-ko"
    from byeori.data import template

    page.post("/template-live", data={"text": template.shipped()["title-ko"], "row": "1"})
    assert page.app.state.workspace.draft("train")["template"] == "title-ko"


def test_without_a_model_the_text_is_shown(title_rows: Path, tmp_path: Path) -> None:
    shutil.copy(title_rows, tmp_path / "rows.jsonl")
    with studio(tmp_path) as client:
        client.post("/data-choose", data={"path": "rows.jsonl"})
        html = client.get("/template").text
        assert "<mark>" in html and "Choose a model to see tokens." in html


def test_every_turn_of_a_conversation(page: TestClient, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "하나"}, {"role": "assistant", "content": "둘"}] * 2
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    page.post("/data-choose", data={"path": "chat.jsonl"})
    html = page.post("/template-live", data={"text": "", "row": "1", "chat_template": "chatml"}).text
    assert html.count("<h3>message ") == 2
    prompt, trained = marked(html)
    assert prompt.endswith("<|im_start|>assistant\n") and trained.startswith("둘<|im_end|>")


def test_a_model_outside_is_refused(page: TestClient, tiny_model: Path) -> None:
    assert "is outside" in page.post("/template-model", data={"other": str(tiny_model)}).text
    with studio(page.app.state.workspace.folder, models=(tiny_model.parent,)) as client:
        client.post("/template-model", data={"other": str(tiny_model)})
        assert client.app.state.workspace.draft("train")["base_model"] == str(tiny_model)
