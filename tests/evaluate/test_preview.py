"""The preview marks what is trained, and text from the data stays text."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from byeori.data.template import parse
from byeori.data.tokenize import Example, encode_row, make_encoding
from byeori.evaluate.preview import page, pieces, shared_prefix, show

FOUND: dict[str, Any] = {
    "longest": [{"row": "a<b>.jsonl line 3", "tokens": 1234}],
    "dropped": [{"row": "line 7", "reason": "the answer, column '<i>', is empty", "too_long": False}],
}


def byte_tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def example_of(template: str, **row: str) -> tuple[Example, Any]:
    tokenizer = byte_tokenizer()
    encoding = make_encoding(tokenizer, parse(template), cutoff_len=200, add_eos_token=True, train_on_inputs=False)
    return encode_row(row, encoding), tokenizer


def test_runs_of_trained_and_other_text() -> None:
    example, tokenizer = example_of("Q: {q}\nA:\n{a}", q="왜 🌸?", a="그냥  봄")
    assert pieces(example, tokenizer) == [("Q: 왜 🌸?\nA:\n", False), ("그냥  봄<|endoftext|>", True)]


def test_several_trained_turns() -> None:
    tokenizer = byte_tokenizer()
    example = Example(token_ids=tokenizer("a b c d")["input_ids"], targets=((1, 3), (6, 7)))
    assert pieces(example, tokenizer) == [("a", False), (" b", True), (" c ", False), ("d", True)]


def test_half_a_character_goes_to_the_run_that_completes_it() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("x 🌸 y")["input_ids"]
    for start in range(1, len(ids)):
        runs = pieces(Example(token_ids=ids, targets=((start, len(ids)),)), tokenizer)
        assert "".join(text for text, _ in runs) == "x 🌸 y"
        assert "\ufffd" not in runs[0][0]


def test_spaces_that_a_decoder_strips_at_the_start_stay_inside_the_text() -> None:
    vocabulary = {token: number for number, token in enumerate(["<unk>", "▁", "a", "b", "▁a", "▁b"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    example = Example(token_ids=tokenizer("a b a")["input_ids"], targets=((1, 2),))
    assert pieces(example, tokenizer) == [("a", False), (" b", True), (" a", False)]


def preview_of(example: Example, tokenizer: Any, name: str = "line 1", notes: tuple[str, ...] = (), **more: Any) -> str:
    audit = {"longest": [], "dropped": [], "train_rows": 3, "validation_rows": 0, "tokens": 100, "target_tokens": 25}
    lengths = {"of-base": [len(example.token_ids)], "of-tuned": [3]}
    others = more.pop("others", [])
    return page([(name, example)], others, tokenizer, notes, audit | more, title="<i>", lengths=lengths, cutoff_len=50)


def test_the_page_escapes_what_comes_from_the_data() -> None:
    example, tokenizer = example_of("\n{q}\n{a}", q='<script>alert(1)</script> & "x"', a="</pre><script>2</script>")
    html = preview_of(example, tokenizer, "<b>rows</b>.jsonl line 1", ("<script>3</script>",), **FOUND)
    assert html.count("<script") == 1  # the page's own
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;x&#34;" in html
    assert "&lt;b&gt;rows&lt;/b&gt;.jsonl line 1</b>" in html and "&lt;script&gt;3" in html
    assert "longest row 1,234" in html
    assert "line 7</th><td>the answer, column &#39;&lt;i&gt;&#39;, is empty" in html


def test_the_page_marks_what_is_trained_and_shades_what_rows_share() -> None:
    example, tokenizer = example_of("Q: {q}\n{a}", q="왜", a="그냥")
    other, _ = example_of("Q: {q}\n{a}", q="왕", a="응")
    html = preview_of(example, tokenizer, others=[example, other])
    block = re.search(r'<ol id="cards".*</ol>', html, re.DOTALL)
    assert block is not None
    assert "<mark>그냥&lt;|endoftext|&gt;</mark>" in block[0]
    # of 왜 (EC 99 9C) and 왕 (EC 99 95) two bytes are alike; the character goes to the run that completes it
    assert '<span class="shared">Q: </span>왜\n' in block[0]
    assert "5 shared" in block[0] and "<b>25%</b>" not in html and "25%" in html
    assert 'class="limit"' in html  # a row comes near cutoff_len


def test_trained_text_is_marked_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    example, tokenizer = example_of("Q: {q}\nA:\n{a}", q="[bold]왜[/bold]", a="그냥")
    show([("rows.jsonl line 1", pieces(example, tokenizer))], ["1 row [red]to train"], FOUND)
    out = capsys.readouterr().out
    assert "Q: [bold]왜[/bold]\nA:\n▸그냥<|endoftext|>◂\n" in out
    assert "rows.jsonl line 1" in out
    assert "1 row [red]to train\n" in out
    assert "long: a<b>.jsonl line 3, 1,234 tokens\n" in out
    assert "dropped: line 7: the answer" in out


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("environment", [{}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_terminal_without_colours_marks_it_too(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    example, tokenizer = example_of("Q: {q}\nA:\n{a}", q="왜", a="그냥")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    show([("line 1", pieces(example, tokenizer))], [], {"longest": [], "dropped": []})
    out = terminal.getvalue()
    assert ("▸그냥<|endoftext|>◂" in out) == bool(environment)
    assert ("\x1b[1;32m그냥<|endoftext|>\x1b[0m" in out) == (not environment)


def test_control_characters_of_a_row_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show([("line\x1b 1", [("a\x1b[31mred\x07\tb\n\x9b31m", False)])], [], {"longest": [], "dropped": []})
    out = capsys.readouterr().out
    assert "a␛[31mred␇" in out
    assert "␦31m" in out
    assert "\x1b" not in out and "\x9b" not in out


def test_the_share_of_prefixes() -> None:
    # inputs of 41 tokens each (the last token is only predicted) that share their first 40
    rows = [Example(token_ids=[*range(40), last, 9], targets=((40, 42),)) for last in (50, 51)]
    assert shared_prefix(rows) == pytest.approx(40 / 82)
    assert shared_prefix(rows[:1]) == 0
