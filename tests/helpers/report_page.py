"""A small report, and its page as an HTML parser reads it."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

from byeori.evaluate.metrics import ROW_METRICS, score_row, summarise
from byeori.evaluate.report import render_report
from byeori.evaluate.verdict import verdict

PROMPT = "제목을 만드세요.\n\n### 본문:\n{document}\n\n### 제목:\n{title}\n"


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, str] = {}
        self._open: str = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open in ("script", "style"):
            self.raw[self._open] = self.raw.get(self._open, "") + data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def item(document: str, reference: str, base: str, tuned: str, **more: Any) -> dict[str, Any]:
    made = {
        "row": {"document": document, "title": reference, "id": 7},
        "prompt": f"### 본문:\n{document}",
        "reference": reference,
        "base_output": base,
        "tuned_output": tuned,
        "base": score_row(base, reference, stopped=False, loss=3.0),
        "tuned": score_row(tuned, reference, stopped=True, loss=2.0),
    }
    return made | more


def metrics_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    sides = [{name: [row[key].get(name) for row in rows] for name in ROW_METRICS} for key in ("base", "tuned")]
    return summarise(*sides)


def page(rows: list[dict[str, Any]], **more: Any) -> str:
    metrics = metrics_of(rows) | {"findings": more.pop("found", [])}
    arguments: dict[str, Any] = {
        "title": "제목 생성기",
        "rows": rows,
        "metrics": metrics,
        "verdict": verdict(metrics),
        "settings": {"lora_r": 16, "target_modules": ["q_proj", "v_proj"], "eval_steps": None},
        "prompt": PROMPT,
        "given": [("<bos>", True), ("### 본문:\n서울시가 예산안을 발표했다.\n\n### 제목:\n", False)],
        "log": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}],
        "facts": {"Base": "tiny", "Tuned": "out/adapter"},
    }
    return render_report(**(arguments | more))


ROWS = [
    item("서울시가 예산안을 발표했다.", "서울시 예산안 발표", "예산", "서울시 예산안 발표"),
    item("박물관이 야간 개장을 한다.", "박물관 야간 개장", "박물관 야간 개장", "야간"),
]
