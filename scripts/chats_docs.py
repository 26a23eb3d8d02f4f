"""The table in docs/chats.md and docs/chats.ko.md, made by training's own code: `python scripts/chats_docs.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "tests")]

from byeori.data.template_facts import template_facts  # noqa: E402
from chats import shipped_templates  # noqa: E402
from tiny_models import byte_level_tokenizer  # noqa: E402

BEGIN, END = "<!-- table: scripts/chats_docs.py -->", "<!-- end of the table -->"
_HEADS = {
    "en": ("template", "one turn", "several turns", "system", "reasoning", "tools", "history"),
    "ko": ("템플릿", "한 턴", "여러 턴", "시스템", "추론", "도구", "이전 턴"),
}
_CELLS = {
    "en": {True: "yes", False: "refused", "kept": "kept", "rewritten": "rewritten"},
    "ko": {True: "가능", False: "거절", "kept": "그대로", "rewritten": "다시 씀"},
}


def table(language: str) -> str:
    """Return the table: what each shipped template of TRL's shows of a conversation, and what it does to history."""
    tokenizer, cells = byte_level_tokenizer(bos_token="<s>"), _CELLS[language]
    heads = _HEADS[language]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, text in shipped_templates().items():
        tokenizer.chat_template = text
        facts = template_facts(tokenizer)
        history = "rewritten" if facts.rewrites else "kept"
        lines.append(
            "| " + " | ".join([f"`{name}`", *(cells[there] for there in facts.shown.values()), cells[history]]) + " |"
        )
    return "\n".join(lines)


def page(language: str) -> Path:
    return ROOT / "docs" / ("chats.md" if language == "en" else "chats.ko.md")


def filled(language: str) -> str:
    """Return the page with its table as it should be."""
    before, _, rest = page(language).read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table(language)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for each in _HEADS:
        page(each).write_text(filled(each), encoding="utf-8")
