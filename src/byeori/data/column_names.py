"""What the names of a table's columns say: which is asked, which answered, which only about the row.

Question, Complex_CoT, Response  ->  --columns question=Question reasoning=Complex_CoT answer=Response
id, article, highlights          ->  --template '### article:\\n{article}\\n\\n### highlights:\\n{highlights}'
"""

from __future__ import annotations

import re
from collections.abc import Sequence

EXAMPLE = "write one, for example `--template '### Question:\\n{question}\\n\\n### Answer:\\n{answer}'`"
"""How to write a template, where the columns say nothing."""

_ABOVE = ("context", "passage", "system", "document", "article", "dialogue", "text", "본문", "문서", "지문", "맥락")
_ASKED = ("instruction", "question", "prompt", "query", "problem", "input", "source", "질문", "지시", "문제", "입력")
_REASONED = (
    "reasoning",
    "reasoning_content",
    "thinking",
    "complex_cot",
    "cot",
    "chain_of_thought",
    "rationale",
    "추론",
)
_ANSWERED = (
    *("answer", "response", "output", "completion", "solution", "target", "answers", "summary", "highlights", "title"),
    *("content", "label", "답변", "응답", "정답", "답", "출력", "요약", "제목"),
)
_ABOUT = re.compile(
    r"(.*_)?(id|idx|index|uid|uuid|url|source|type|category|topic|score|language|lang|date|timestamp|name|role|turn)s?"
)


def example_for(columns: Sequence[str]) -> str:
    """Show how to name the columns, or how to write a template, by what they seem to hold."""
    if len(columns) < 2 or not all(re.fullmatch(r"[\w .-]+", name) for name in columns):
        return EXAMPLE
    reasoned, asked, answered = (_first(columns, words) for words in (_REASONED, _ASKED, _ANSWERED))
    if reasoned and asked and answered:
        pairs = {"question": asked, "reasoning": reasoned, "answer": answered}
        named = " ".join(f"{new}={_quoted(old)}" for new, old in pairs.items())
        return f"say which is which with `--columns {named}`"
    telling = [name for name in columns if not _ABOUT.fullmatch(name.lower())] or list(columns)
    answer = answered or telling[-1]
    above = [name for name in columns if name.lower() in (*_ABOVE, *_ASKED) and name != answer and name in telling]
    prompt = above or [name for name in (*telling, *columns) if name != answer][:1]
    text = "\\n\\n".join(f"### {name}:\\n{{{name}}}" for name in [*prompt, answer])
    return f"write one, for example `--template '{text}'`, whose last column is the answer"


def _first(columns: Sequence[str], words: Sequence[str]) -> str | None:
    known = {name.lower(): name for name in reversed(columns)}
    return next((known[word] for word in words if word in known), None)


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name
