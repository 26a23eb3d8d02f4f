"""The workloads, and the files of rows that are made for a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import ROOT

TEMPLATES = ROOT / "src" / "byeori" / "data" / "templates"
TITLES = TEMPLATES / "title-ko.txt"
PROMPTS = TEMPLATES / "prompt-completion.txt"
PAIRS = TEMPLATES / "question-answer.txt"
# Few-shot examples of titles, in the words of the template `title-ko`.
_TASK = "당신은 주어진 본문으로부터 적절한 제목을 생성하는 제목 생성기입니다. 본문이 주어지면 제목을 만드세요.\n\n"
_SHOT = "### 본문:\n{document}\n\n### 제목:\n"
HEADER_TOKENS, HEADER_ROWS = 1000, 80


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The first `rows` rows of a file.

    command: of byeori, sft or dpo. cutoff_len: unless the command line names another. shares: rows have prefixes in
    common, so byeori is measured without sharing as well. few_shot: rows are made from the file's, with one header.
    """

    name: str
    file: str
    rows: int
    about: str
    command: str = "sft"
    template: Path = TITLES
    cutoff_len: int = 1024
    shares: bool = False
    few_shot: bool = False


WORKLOADS = {
    work.name: work
    for work in (
        Workload(name="W1", file="ko_petitions_title.jsonl", rows=200, about="titles of petitions"),
        Workload(name="W2", file="ko_debian_title.jsonl", rows=300, about="titles of package descriptions"),
        Workload(
            name="W3",
            file="ko_preference.jsonl",
            rows=800,
            about="DPO, short prompts",
            command="dpo",
            template=PAIRS,
            cutoff_len=2048,
            shares=True,
        ),
        Workload(
            name="W4",
            file="en_preference_long.jsonl",
            rows=300,
            about="DPO, long prompts",
            command="dpo",
            template=PAIRS,
            cutoff_len=2048,
            shares=True,
        ),
        Workload(
            name="W5",
            file="ko_debian_title.jsonl",
            rows=200,
            about=f"titles of package descriptions, all behind one few-shot header of {HEADER_TOKENS:,} tokens",
            template=PROMPTS,
            cutoff_len=2048,
            shares=True,
            few_shot=True,
        ),
    )
}


def few_shot_rows(model: Path, source: Path, count: int, target: Path) -> str:
    """Write `count` rows of a prompt and a completion; every prompt begins with the same worked examples.

    The examples are those of the file's first HEADER_ROWS rows that fit HEADER_TOKENS; the rows are those that follow.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows, header, shots = _rows(source), _TASK, 0
    for row in rows[:HEADER_ROWS]:
        longer = header + _SHOT.format(**row) + row["title"] + "\n\n"
        if len(tokenizer(longer)["input_ids"]) <= HEADER_TOKENS:
            header, shots = longer, shots + 1
    made = [
        {"prompt": header + _SHOT.format(**row), "completion": row["title"]}
        for row in rows[HEADER_ROWS : HEADER_ROWS + count]
    ]
    _write(target, made)
    tokens = len(tokenizer(header)["input_ids"])
    return f"{len(made)} rows behind one header of {tokens:,} tokens, {shots} worked examples"


def short_rows(model: Path, work: Workload, source: Path, count: int, cutoff_len: int, target: Path) -> str:
    """Write `count` rows that nobody has to cut, and whose prompt alone is tokenized as within the whole.

    The second condition is the plain method's assumption; where it fails it trains on other labels.
    """
    from transformers import AutoTokenizer

    tokenizer, texts = AutoTokenizer.from_pretrained(model), _texts(work)
    kept, too_long, unlike = [], 0, 0
    for row in _rows(source)[: work.rows]:
        head, answers = texts(row)
        prompt = tokenizer(head)["input_ids"]
        wholes = [tokenizer(head + answer)["input_ids"] for answer in answers]
        fits = max(map(len, wholes)) + 1 <= cutoff_len
        like = all(whole[: len(prompt)] == prompt for whole in wholes)
        too_long, unlike = too_long + (not fits), unlike + (not like)
        if fits and like:
            kept.append(row)
    if len(kept) < count:
        raise SystemExit(f"of the first {work.rows} rows of {source} {len(kept)} fit {cutoff_len} tokens, not {count}")
    _write(target, kept[:count])
    return f"the first {count} of {len(kept)} rows that fit ({too_long} too long, {unlike} unlike their prompt)"


def _texts(work: Workload) -> Callable[[dict[str, Any]], tuple[str, list[str]]]:
    """What gives a row's prompt and its answers, by plain replacement: independent of byeori's own template."""
    if work.command == "dpo":

        def pair(row: dict[str, Any]) -> tuple[str, list[str]]:
            system = f"### System:\n{row['system']}\n\n" if row.get("system") else ""
            head = f"{system}### User:\n{row['question']}\n\n### Assistant:\n"
            return head, [row["chosen"], row["rejected"]]

        return pair
    if work.few_shot:
        return lambda row: (row["prompt"], [row["completion"]])
    head = TITLES.read_text(encoding="utf-8").rstrip().removesuffix("{title}")
    return lambda row: (head.replace("{document}", row["document"]), [row["title"]])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
