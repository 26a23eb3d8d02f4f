"""The screen to try a model: a worker that outlives the page, blind judgements, pairs for dpo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.datastructures import FormData
from starlette.testclient import TestClient

import byeori
from byeori.studio import jobs, questions, trying
from byeori.studio.workspace import Workspace
from studio_page import meant, studio, wait_for


@pytest.fixture
def page(trained: Path, tmp_path: Path) -> Iterator[TestClient]:
    shutil.copytree(trained, tmp_path / "tuned")
    with studio(tmp_path, models=(trained.parents[1],)) as client:
        yield client
        for job in jobs.every(client.app.state.workspace):
            jobs.stop(job)


def ask(client: TestClient, text: str, **more: str) -> questions.Question:
    answer = client.post("/try-ask", data={"run": "tuned", "column:document": text, "max_new_tokens": "8", **more})
    assert answer.status_code == 200 and 'role="alert"' not in answer.text, answer.text
    folder = questions.folder_of(client.app.state.workspace, "tuned")
    number = questions.every(folder)[-1].number
    return wait_for(lambda: next((q for q in questions.every(folder) if q.number == number and q.done), None))


def test_both_answer_as_generate_does(page: TestClient, tmp_path: Path) -> None:
    question = ask(page, "봄이 왔다")
    assert question.done and "error" not in question.done, question.done
    tuned = byeori.generate(model="tuned", columns={"document": "봄이 왔다"}, max_new_tokens=8)
    assert question.answer("tuned") == tuned[0]
    html = page.get("/try", params={"run": "tuned"}).text
    assert "봄이 왔다" in html and html.count('<p class="text"') == 2
    command, settings = meant(html)
    assert command == "chat" and settings.model == "tuned" and settings.base and settings.max_new_tokens == 8
    # one process answers all that follows, also for another server
    ask(page, "여름")
    with studio(tmp_path) as other:
        assert "여름" in other.get("/try", params={"run": "tuned"}).text
        ask(other, "가을")
    assert len(jobs.every(page.app.state.workspace)) == 1


def test_blind_answers_have_no_names_until_they_are_judged(page: TestClient, tmp_path: Path) -> None:
    question = ask(page, "봄", blind="on")
    live = page.get("/try-live", params={"run": "tuned"}).text
    assert "A is better" in live and "B is better" in live and ">base<" not in live and ">tuned<" not in live
    page.post("/try-judge", data={"run": "tuned", "number": str(question.number), "better": "1"})
    (line,) = [json.loads(text) for text in (tmp_path / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert line["better"] == question.sides[1] and line["blind"] and line["asked"] == {"document": "봄"}
    assert line["answers"] == {side: question.answer(side) for side in ("base", "tuned")}
    html = page.get("/try", params={"run": "tuned"}).text
    assert ">base<" in html and ">tuned<" in html and "Judged better:" in html and "of 1 times" in html
    html = page.get("/compare").text
    low, high = ("21", "100") if line["better"] == "tuned" else ("0", "79")  # Wilson, 1 or 0 of 1
    assert "Judged by people" in html and f"<small>{low} … {high}%</small>" in html


def test_a_pair_is_kept_for_dpo(page: TestClient, tmp_path: Path) -> None:
    question = ask(page, "봄")
    page.post(
        "/try-keep", data={"run": "tuned", "number": str(question.number), "better": "0", "written": "더 나은 답"}
    )
    line = json.loads((tmp_path / "pairs.jsonl").read_text(encoding="utf-8"))
    assert line == {"document": "봄", "chosen": "더 나은 답", "rejected": question.answer("base")}
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    page.post(
        "/try-keep", data={"run": "tuned", "number": str(question.number), "better": "1", "written": "더 나은 답"}
    )
    assert "1 pairs kept in pairs-2.jsonl" in page.get("/try", params={"run": "tuned"}).text  # other columns
    more = {"max_steps": 1, "batch_size": 1, "cutoff_len": 512}
    byeori.dpo(base_model="tuned", data_path="pairs-2.jsonl", output_dir="preferred", **more)
    assert (tmp_path / "preferred" / "adapter_model.safetensors").exists()


def test_the_interval_is_wilsons(tmp_path: Path) -> None:
    """Expected values: Wilson (1927), 7 of 10 at 95%, as statsmodels' proportion_confint gives it."""
    lines = [{"model": "m", "better": "tuned"}] * 7 + [{"model": "m", "better": "base"}] * 3 + [{"better": "tuned"}]
    lines += [{"model": "m", "better": "tie"}] * 5
    (tmp_path / "judgements.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = trying.counts(Workspace(tmp_path))["m"]
    assert (found["tuned"], found["base"], found["tie"], found["blind"]) == (7, 3, 5, 0)
    assert (round(found["low"], 4), round(found["high"], 4)) == (0.3968, 0.8922)


def test_an_empty_question_starts_nothing(page: TestClient) -> None:
    assert "document is empty" in page.post("/try-ask", data={"run": "tuned", "column:document": " "}).text
    assert "--temperature" in page.post("/try-ask", data={"run": "tuned", "temperature": "-1"}).text
    assert "is outside" in page.post("/try-ask", data={"run": "/etc"}).text
    assert not jobs.every(page.app.state.workspace)


def test_a_conversation_goes_on_and_begins_anew(tmp_path: Path) -> None:
    place = questions.folder_of(Workspace(tmp_path), "m")
    first = questions.ask(place, [{"role": "user", "content": "하나"}], {}, ["tuned"], blind=False)
    (place / f"{first.name}-tuned.txt").write_text("둘", encoding="utf-8")
    (place / f"{first.name}-done.json").write_text('{"tuned": {}}', encoding="utf-8")
    form = FormData([("column:message", "셋"), ("system", "짧게")])
    assert trying.messages_or_columns(place, None, form) == [
        {"role": "system", "content": "짧게"},
        {"role": "user", "content": "하나"},
        {"role": "assistant", "content": "둘"},
        {"role": "user", "content": "셋"},
    ]
    questions.start_anew(place)
    assert len(trying.messages_or_columns(place, None, form)) == 2
