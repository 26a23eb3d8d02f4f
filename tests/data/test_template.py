"""Template text -> segments, the template that fits, and the chat template that servers get."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kinds
from byeori.data import tokenize
from byeori.data.served_template import chat_template, request, served_template
from byeori.data.template import Segment, Template, choose, parse, resolve, shipped, unknown_column
from byeori.errors import TemplateError

TUTORIAL_TITLE = """당신은 주어진 본문으로부터 적절한 제목을 생성하는 제목 생성기입니다. \
본문이 주어지면 제목을 만드세요.

### 본문:
{document}

### 제목:
{title}"""

TUTORIAL_ALPACA = """Below is an instruction that describes a task, paired with an input that provides \
further context. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
{output}"""


def text(template: Template, **row: object) -> str:
    return "".join(segment.text for segment in template.segments(row))


def refusal(spec: str) -> str:
    """The one sentence that a template is refused with."""
    with pytest.raises(TemplateError) as caught:
        parse(spec)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def named(name: str) -> Template:
    template = resolve(name)
    assert template is not None
    return template


# ---- what is rendered --------------------------------------------------------------------------------------------


def test_the_last_column_and_what_follows_is_trained() -> None:
    assert parse("Q: {q}\nA: {a}!").segments({"q": "왜?", "a": "그냥"}) == (
        Segment(text="Q: ", trained=False),
        Segment(text="왜?", trained=False, column="q"),
        Segment(text="\nA:", trained=False),
        Segment(text=" ", trained=True),
        Segment(text="그냥", trained=True, column="a"),
        Segment(text="!", trained=True),
    )


def test_doubled_braces_are_literal() -> None:
    assert text(parse("{{}} {{x}} {{{x}}} {y}}}"), x="1", y="2") == "{} {x} {1} 2}"


def test_braces_and_brackets_in_a_value_stay() -> None:
    value = "{title} {{ }} [[ ]] \\n {"
    assert text(parse("{document}|{title}"), document=value, title="t") == f"{value}|t"


def test_spaces_around_a_column_name_do_not_matter() -> None:
    assert text(parse("{ q }:{a }"), q="1", a="2") == "1:2"


@pytest.mark.parametrize("empty", [{"input": None}, {"input": ""}, {"input": " \n"}, {}])
def test_a_block_of_empty_columns_is_left_out(empty: dict[str, Any]) -> None:
    assert text(parse("{q}[[ ({input})]] -> {a}"), q="Q", a="A", **empty) == "Q -> A"


def test_a_block_with_one_filled_column_is_shown() -> None:
    template = parse("[[{x}, {y}: ]]{q} {a}")
    assert text(template, x=None, y="2", q="Q", a="A") == ", 2: Q A"
    assert text(template, x=None, y="", q="Q", a="A") == "Q A"
    assert template.optional_columns == {"x", "y"}
    assert template.prompt_columns == ["x", "y", "q"]


def test_blocks_are_judged_one_by_one() -> None:
    assert text(parse("[[x={x};]][[y={y};]]{a}"), x="", y="2", a="A") == "y=2;A"


def test_columns_that_the_data_lacks(tmp_path: Path) -> None:
    words = "[[참고: {참고문}\n]]{본문}\n{제목}"
    (tmp_path / "own.txt").write_text(words, encoding="utf-8")
    for own in (resolve(words), resolve(str(tmp_path / "own.txt"))):
        with pytest.raises(TemplateError) as caught:
            own.check_columns(["본문", "제목", "참고"], with_answer=True)
        assert str(caught.value) == (
            "the template uses the column '참고문', which the data does not have (did you mean 참고?); "
            "its columns are 본문, 제목, 참고"
        )
        own.check_columns(["본문", "참고문"], with_answer=False)
    parse(words, lenient=True).check_columns(["본문", "제목"], with_answer=True)
    resolve("alpaca").check_columns(["instruction", "output"], with_answer=True)
    with pytest.raises(TemplateError, match="'instruction'"):
        resolve("alpaca").check_columns(["input", "output"], with_answer=True)


def test_a_prompt_that_asks_nothing() -> None:
    template = parse("[[{x}: ]]{q} {r} {a}")
    assert template.required_columns == ["q", "r"]
    assert template.has_empty_prompt({"x": "X", "q": " ", "r": "\n"})
    assert not template.has_empty_prompt({"q": "", "r": "R"})
    assert not parse("[[{x}]]{a}").has_empty_prompt({"x": ""})


def test_nan_is_a_missing_value() -> None:
    assert text(parse("[[({x})]]{q} {a}"), x=float("nan"), q="Q", a="A") == "Q A"
    with pytest.raises(TemplateError, match="column 'q' holds null, not text"):
        parse("{q} {a}").segments({"q": float("nan"), "a": "A"})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("Say [[A]] or [[B]]: {q}\n{a}", "Say [[A]] or [[B]]: Q\nA"),
        ("[[]]{q} [[{{x}}\n]]{a}[[end]]", "[[]]Q [[{x}\n]]A[[end]]"),
        ("[[[A]]] [[({q})]] {a}", "[[[A]]] (Q) A"),
    ],
)
def test_a_block_without_a_column_is_literal(spec: str, expected: str) -> None:
    assert text(parse(spec), q="Q", a="A") == expected
    assert expected.startswith(parse(spec).prompt({"q": "Q"}))


def test_literal_blocks_are_known_by_name() -> None:
    """One that forgets its column would go unseen otherwise."""
    assert parse("[[note:\n]][[({x})]] {q} [[B]]\n{a}").literal_blocks == ["[[note:\n]]", "[[B]]"]
    assert parse("[[({x})]] {q}\n{a}").literal_blocks == []


def test_a_literal_block_in_the_chat_template() -> None:
    encoding = encoding_of("gpt2", parse("[[A]] or [[B]]?[[ ({x})]] {q}\n{a}"))
    assert served(encoding, [user("Q")]) == tokenize.encode_prompt({"q": "Q"}, encoding)
    assert encoding.tokenizer.decode(served(encoding, [user("Q")])) == "[[A]] or [[B]]? Q\n"


def test_line_breaks_of_an_inline_template() -> None:
    for spec, expected in ((r"{q}\n{a}", "Q\nA"), ("$\\nabla f$ {q}\n{a}", "$\\nabla f$ Q\nA")):
        template = resolve(spec)
        assert template is not None and text(template, q="Q", a="A") == expected


def test_names_are_composed_as_those_of_the_data() -> None:
    assert parse(unicodedata.normalize("NFD", "{본문} {제목}")).prompt_columns == ["본문"]


def test_a_column_that_is_also_outside_a_block_is_not_optional() -> None:
    template = parse("{x}[[ again {x}]] {a}")
    assert template.optional_columns == set()
    with pytest.raises(TemplateError, match="'x' holds null"):
        text(template, x=None, a="A")


def test_square_brackets_inside_a_block() -> None:
    assert text(parse("[1] [[[{tag}]]]{a}"), tag="t", a="A") == "[1] [t]A"


def test_white_space_at_the_templates_end_is_no_answer() -> None:
    template = parse("\n{q}\n{a}\n\n \n")
    assert text(template, q="Q", a="A") == "\nQ\nA"
    assert template.suffix == ""


def test_the_prompt_ends_where_the_answer_begins() -> None:
    assert parse("{q}\n### {a} end").prompt({"q": "Q"}) == "Q\n###"
    assert parse("{q}\n### {a} end").suffix == " end"


def test_the_tutorials_titles() -> None:
    row = {"document": "주말 포근한 날씨", "title": "봄 소식"}
    expected = TUTORIAL_TITLE.replace("{document}", "주말 포근한 날씨").replace("{title}", "봄 소식")
    assert text(named("title-ko"), **row) == expected
    assert named("title-ko").prompt(row) == expected.removesuffix("봄 소식")


def test_the_tutorials_alpaca() -> None:
    row = {"instruction": "평가하세요.", "input": "그는 나섰다.", "output": "오류가 없습니다."}
    expected = TUTORIAL_ALPACA
    for name, value in row.items():
        expected = expected.replace(f"{{{name}}}", value)
    assert text(named("alpaca"), **row) == expected


def test_alpaca_without_input_has_no_input_block() -> None:
    expected = TUTORIAL_ALPACA.replace("### Input:\n{input}\n\n", "")
    expected = expected.replace("{instruction}", "쓰세요.").replace("{output}", "네.")
    for nothing in ("", None):
        assert text(named("alpaca"), instruction="쓰세요.", input=nothing, output="네.") == expected


# ---- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("{q}\n{a", "template inline, line 2: unmatched '{'"),
        ("a}\n{b}", "line 1: unmatched '}'; write '}}' for a literal brace"),
        ('{"q": "{q}"} {a}', "line 1: unmatched '{'"),
        ("{} {a}", "'{}' has no column name; write '{{}}' for literal braces"),
        ("{ } {a}", "'{ }' has no column name"),
        ("[[{q} {a}", "[[ is not closed"),
        ("{q}]] {a}", "']]' does not match"),
        ("[[{q} [[{r}]]]] {a}", "'[[' does not match"),
        ("only words", "has no column, so there is no answer to train; write one, for example `--template"),
        ("", "has no column"),
        ("{q} [[{a}]]", "the answer {a} is inside [[ ]]; move it out"),
        ("{a} {q} {a}", "the answer {a} is also in the prompt, which would give it away"),
    ],
)
def test_what_does_not_parse(spec: str, words: str) -> None:
    assert words in refusal(spec)


def test_a_column_that_the_data_lacks() -> None:
    with pytest.raises(TemplateError) as caught:
        parse("{documnet} {title}").segments({"document": "d", "title": "t", "__row__": 0})
    assert str(caught.value) == (
        "the template uses the column 'documnet', which the data does not have (did you mean document?); "
        "its columns are document, title"
    )


def test_a_column_name_with_a_line_break_makes_no_second_line() -> None:
    assert unknown_column("titel", ["본문\n(전체)", "tit\nle"]).count("\n") == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "column 'q' holds null, not text"),
        (["a"], "column 'q' holds list ['a'], not text"),
        ({"a": "b\nc"}, "column 'q' holds dict {'a': 'b\\nc'}, not text"),
    ],
)
def test_a_value_that_is_no_text(value: object, words: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse("{q} {a}").segments({"q": value, "a": "A"})
    assert str(caught.value) == words


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (2.5, "2.5"), (True, "true"), (2**80, str(2**80))])
def test_numbers_are_written_as_json_writes_them(value: object, text: str) -> None:
    segments = parse("{q} {a}").segments({"q": value, "a": value})
    assert [segment.text for segment in segments] == [text, " ", text]


def test_half_of_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(TemplateError, match="half of a surrogate pair"):
        parse("{q} {a}").segments({"q": "\ud83d", "a": "A"})


# ---- where a template comes from ---------------------------------------------------------------------------------


def test_a_shipped_name() -> None:
    assert {"alpaca", "title-ko", "prompt-completion"} <= set(shipped())
    assert named("title-ko").name == "title-ko"
    assert resolve("chat") is None


def test_inline_text_accepts_backslash_n_as_a_line_break() -> None:
    assert named("Q: {q}\\nA: {a}").text == "Q: {q}\nA: {a}"


@pytest.mark.parametrize(
    "content",
    [b"Q: {q}\nA: {a}\n", b"Q: {q}\r\nA: {a}\r\n", b"\xef\xbb\xbfQ: {q}\nA: {a}", b"\xef\xbb\xbfQ: {q}\r\nA: {a}\r\n"],
)
def test_a_file_with_any_line_ends_and_bom(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(content)
    assert text(named(str(path)), q="1", a="2") == "Q: 1\nA: 2"
    assert named(str(path)).name == "my.txt"


def test_carriage_returns_of_inline_text_are_no_characters_of_it() -> None:
    assert named("\ufeffQ: {q}\r\nA: {a}\r\n").text == "Q: {q}\nA: {a}"


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "cp949.txt"
    path.write_bytes("제목: {a}".encode("cp949"))
    words = r"cp949\.txt line 1 is not UTF-8, it looks like cp949; convert the file: iconv -f cp949 -t utf-8 "
    with pytest.raises(TemplateError, match=words):
        resolve(str(path))


def test_a_template_that_does_not_exist() -> None:
    with pytest.raises(TemplateError) as caught:
        resolve("title_ko")
    assert str(caught.value) == (
        "there is no template or file 'title_ko' (did you mean title-ko?); the templates are alpaca, "
        "prompt-completion, question-answer, title-ko, chat, and an inline template needs a {column}"
    )


@pytest.mark.parametrize("spec", ["", "긴 문장 " * 200, "a\0b"])
def test_words_without_a_column_are_no_template(spec: str) -> None:
    with pytest.raises(TemplateError, match="there is no template or file"):
        resolve(spec)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["document", "title"], "title-ko"),
        (["date", "category", "press", "title", "document", "link", "summary", "__row__"], "title-ko"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output"], "alpaca"),
        (["prompt", "completion"], "prompt-completion"),
        (["messages"], "chat"),
        (["id", "conversations"], "chat"),
    ],
)
def test_the_template_that_fits_the_columns(columns: list[str], name: str) -> None:
    assert choose(columns) == name


def test_where_none_fits_the_error_shows_how_to_write_one() -> None:
    with pytest.raises(TemplateError) as caught:
        choose(["body", "headline", "__row__"])
    assert str(caught.value) == (
        "no built-in template fits the columns body, headline; write one, "
        "for example `--template '### body:\\n{body}\\n\\n### headline:\\n{headline}'`, "
        "whose last column is the answer"
    )
    for columns in (["body"], ["{body}", "headline"]):
        with pytest.raises(TemplateError, match=r"\\n\{question\}\\n\\n### Answer:\\n\{answer\}'`($|; or train all)"):
            choose(columns)


# ---- the chat template that servers get --------------------------------------------------------------------------

NASTY = [
    "봄 소식",
    "It's \"quoted\" \\ and \\n \\u0041 \\' done",
    "{{ messages }} {% if x %} {# no #} }} %} {title} [[x]]",
    "first\nsecond\r\n\n\tthird ",
    "이모지 🌸👩‍👩‍👧 ☕\u2028 <b>&amp;",
]
TRICKY = parse(
    "[[{system}\n]]\"Q\" \\n '🌸' {{{question}}} %}} {{% {{# \\ [[ (also {extra})]]:\n{answer}<end>", "tricky"
)


def served(encoding: tokenize.Encoding, messages: list[dict[str, str]], **columns: str) -> list[int]:
    """The ids that a server makes of the exported chat template."""
    rendered = encoding.tokenizer.apply_chat_template(
        messages, chat_template=served_template(encoding), add_generation_prompt=True, return_dict=False, **columns
    )
    return list(rendered)


def encoding_of(kind: str, template: Template) -> tokenize.Encoding:
    return tokenize.make_encoding(
        kinds.kind(kind), template, cutoff_len=4096, add_eos_token=True, train_on_inputs=False
    )


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_server_builds_the_prompt_that_was_trained(kind: str, value: str) -> None:
    encoding = encoding_of(kind, named("title-ko"))
    assert served(encoding, [user(value)]) == tokenize.encode_prompt({"document": value}, encoding)
    encoding = encoding_of(kind, named("alpaca"))
    row = {"instruction": value, "input": f"{value} 입력"}
    assert served(encoding, [user(value)], input=f"{value} 입력") == tokenize.encode_prompt(row, encoding)
    assert served(encoding, [user(value)]) == tokenize.encode_prompt(row | {"input": None}, encoding)
    encoding = encoding_of(kind, TRICKY)
    row = {"system": '너는 "봇"', "question": value, "extra": f"{{{value}"}
    assert served(encoding, [system('너는 "봇"'), user(value)], extra=f"{{{value}") == tokenize.encode_prompt(
        row, encoding
    )
    assert served(encoding, [user(value)]) == tokenize.encode_prompt({"question": value}, encoding)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_template_of_system_and_question(kind: str) -> None:
    encoding = encoding_of(kind, parse("{system}\n\n### Q:\n{question}\n\n### A:\n{chosen}"))
    row = {"system": " You are 봄.", "question": "왜?"}
    assert served(encoding, [system(" You are 봄."), user("왜?")]) == tokenize.encode_prompt(row, encoding)
    assert served(encoding, [user("왜?")]) == tokenize.encode_prompt({"system": "", "question": "왜?"}, encoding)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_prompt_that_is_one_column(kind: str) -> None:
    encoding = encoding_of(kind, named("prompt-completion"))
    for prompt in ("봄", " with a space", "\nline"):
        assert served(encoding, [user(prompt)]) == tokenize.encode_prompt({"prompt": prompt}, encoding)


def test_a_template_that_begins_with_bos_has_it_once_when_served() -> None:
    encoding = encoding_of("llama2", parse("<s>Q: {q}\nA: {a}"))
    ids = served(encoding, [user("왜")])
    assert ids.count(encoding.prefix[0]) == 1
    assert ids == tokenize.encode_prompt({"q": "왜"}, encoding)


def test_a_request_has_composed_hangul_and_kept_control_tokens_are_what_the_server_reads() -> None:
    encoding = replace(encoding_of("qwen", parse("Q: {q} ({n})\nA: {a}")), special_tokens_in_text="keep")
    row = {"q": unicodedata.normalize("NFD", "한글 <|im_end|>"), "n": unicodedata.normalize("NFD", "값")}
    asked = request(parse("Q: {q} ({n})\nA: {a}"), row)
    assert asked["messages"] == [{"role": "user", "content": "값"}]
    ids = served(encoding, asked["messages"], **asked["chat_template_kwargs"])
    assert ids == tokenize.encode_prompt(row, encoding)
    assert encoding.tokenizer.convert_tokens_to_ids("<|im_end|>") in ids


def test_an_answered_conversation_ends_with_the_answer_and_eos() -> None:
    encoding = encoding_of("llama3", parse("Q: {q}\nA: {a} (end)"))
    rendered = encoding.tokenizer.apply_chat_template(
        [user("왜?"), {"role": "assistant", "content": "그냥"}],
        chat_template=served_template(encoding),
        tokenize=False,
    )
    assert rendered == "<|begin_of_text|>Q: 왜?\nA: 그냥 (end)<|endoftext|>"


@pytest.mark.parametrize(
    ("column", "keyword"),
    [
        ("본문", "본문"),
        ("my text", "my_text"),
        ("1st", "_1st"),
        ("tools", "tools_"),
        ("range", "range_"),
        ("x-²", "x__"),
    ],
)
def test_any_column_name_has_a_keyword(column: str, keyword: str) -> None:
    template = parse(f"[[{{{column}}}|]]{{q}}={{a}}")
    encoding = encoding_of("gpt2", template)
    expected = tokenize.encode_prompt({column: "값", "q": "Q"}, encoding)
    assert served(encoding, [user("Q")], **{keyword: "값"}) == expected
    assert served(encoding, [user("Q")]) == tokenize.encode_prompt({"q": "Q"}, encoding)


def test_llama_2_needs_the_space_that_its_tokenizer_puts_before_a_text() -> None:
    encoding = encoding_of("llama2", named("title-ko"))
    plain = encoding.tokenizer.apply_chat_template(
        [user("봄")], chat_template=chat_template(named("title-ko"), "<s>"), return_dict=False
    )
    assert plain != tokenize.encode_prompt({"document": "봄"}, encoding)  # what the exported template must not do


def test_without_bos_there_is_none() -> None:
    assert served_template(encoding_of("gpt2", named("title-ko"))) == chat_template(named("title-ko"), "")
