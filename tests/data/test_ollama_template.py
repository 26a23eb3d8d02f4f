"""Ollama's TEMPLATE makes the prompt that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import chat_templates
import go_templates
from byeori.data import chat, ollama_template
from byeori.data.ollama_template import OllamaTemplate
from byeori.data.served_template import chat_template, keywords, request
from byeori.data.template import parse, resolve
from chats import shipped_templates
from tiny_models import byte_level_tokenizer

TEMPLATES = {
    "title": "본문:\n{document}\n\n제목:\n{title}",
    "block": "[[### System:\n{system}\n\n]]### Q: {question}\n[[Hint: {hint}\n]]### A: {answer}",
    "braces": '{{{{range .X}}}} {{ "a" }} {question}{{"""{answer}',
    "quotes": '"{question}"{answer}"',
    "both": "{{{question}}}[[ ({system})]]{answer}",
    "spaces": "  \n {question} \n\n{answer}",
}
TURNS = [
    [("user", "Why?")],
    [("user", " {{ .System }} \n")],
    [("system", 'Be "brief" {{x}}.'), ("user", "하나\n둘")],
    [("user", "1"), ("assistant", "2"), ("user", "3")],
    [("system", "S"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4\n"), ("user", "5")],
]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def ollama(compiled: OllamaTemplate, turns: list[dict[str, str]]) -> str:
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    return compiled.render(system, [turn for turn in turns if turn["role"] != "system"])


def jinja(text: str, **more: Any) -> Any:
    tokenizer = byte_level_tokenizer(bos_token="<|endoftext|>")
    tokenizer.chat_template = text

    def render(turns: list[dict[str, str]]) -> str:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **more)
        return str(rendered)

    return render


def chats() -> dict[str, str]:
    own = {name: chat._read(name) for name in chat.shipped()}
    kinds = {name: getattr(chat_templates, name) for name in ("CHATML", "LLAMA_2", "GEMMA", "THINKING", "OPEN")}
    return own | kinds | {f"model {name}": text for name, text in shipped_templates().items()}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_template_becomes_the_exported_chat_template(name: str) -> None:
    template = parse(TEMPLATES[name])
    compiled = ollama_template.of_template(template, "")
    render = jinja(chat_template(template, ""))
    assert compiled
    for turns in map(messages, TURNS):
        assert ollama(compiled, turns) == render(turns)


@pytest.mark.parametrize("name", ["chatml", "gemma", "llama3", "CHATML", "LLAMA_2", "GEMMA", "OPEN"])
def test_a_chat_template_becomes_what_it_writes(name: str) -> None:
    text = chats()[name]
    render = jinja(text)
    compiled = ollama_template.of_chat_template(render, text, "<|endoftext|>")
    assert compiled
    for turns in map(messages, TURNS):
        if turns[0]["role"] == "system" and "no system prompt" in str(compiled.notes):
            continue
        if any(turn["content"] != turn["content"].strip() for turn in turns) and "trim" in text:
            continue  # Go's templates cannot trim
        assert ollama(compiled, turns) == render(turns).removeprefix("<|endoftext|>")


def test_what_a_request_cannot_give_is_said() -> None:
    question = ollama_template.of_template(parse(TEMPLATES["block"]), "")
    assert question and question.notes == ("Ollama has no place for 'hint', which stays empty there",)
    assert ollama_template.of_template(parse("{context}\n{question}\n{answer}"), "") is None
    render = jinja(chat_templates.LLAMA_2)
    no_system = ollama_template.of_chat_template(render, chat_templates.LLAMA_2, "<|endoftext|>")
    assert no_system and "takes no system prompt" in no_system.notes[0]
    shouting = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert ollama_template.of_chat_template(jinja(shouting), shouting, "") is None


def test_bos_is_left_to_ollama() -> None:
    template = parse("<s>Q: {q}\nA: {a}")
    compiled = ollama_template.of_template(template, "<s>")
    assert compiled and "<s>" not in compiled.go and compiled.render("", messages([("user", "x")])) == "Q: x\nA:"


def test_request_fills_the_exported_chat_template() -> None:
    template = parse("[[{system}\n]]{context}|[[{if}|]]{question}: {answer}")
    row = {"system": "S", "context": "C", "if": "I", "question": "Q", "answer": "A"}
    for changes in ({}, {"system": ""}, {"if": None}, {"system": None, "if": "  "}):
        given = request(template, row | changes)
        render = jinja(chat_template(template, ""), **given["chat_template_kwargs"])
        assert render(given["messages"]) == template.prompt(row | changes)
    assert keywords(template) == ["context", "if_"]
    shipped = resolve("title-ko")
    assert shipped and request(shipped, {"document": "D"})["messages"] == [{"role": "user", "content": "D"}]


@pytest.mark.skipif(not go_templates.INSTALLED, reason="needs Go (Debian: golang-go)")
def test_go_renders_it_so(tmp_path: Path) -> None:
    """Every template, by Go's text/template: benchmarks/RESULTS.md has what a run on real models gave."""
    compiled = [ollama_template.of_template(parse(text), "") for text in TEMPLATES.values()]
    for name, text in chats().items():
        found = ollama_template.of_chat_template(jinja(text), text, "<|endoftext|>")
        compiled += [found] if found else []
        assert found or "model" in name or name == "THINKING", name
    items = [(item, messages(turns)) for item in compiled if item for turns in TURNS]
    rendered = go_templates.rendered(tmp_path, [(item.go, turns) for item, turns in items])
    for (item, turns), text in zip(items, rendered, strict=True):
        assert text == ollama(item, turns)
