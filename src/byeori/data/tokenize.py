"""Segments -> Example. The only place that makes targets.

Prompt and answer are tokenized jointly; the trained tokens are found by character offsets. A token that reaches over
the boundary between prompt and answer carries characters of the answer, so it is trained, and it is counted
(`straddles`): at generation time the prompt alone is tokenized differently there.

    text     "### 제목:\\n봄소식"          answer = characters [8, 11)
    tokens   ### | ␣제목 | : | \\n | 봄 | 소식 | <eos>
    trained   0      0     0    0     1     1       1      -> targets [(4, 7)]

L: tokens of an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from byeori.data.template import Segment, Template
from byeori.errors import TemplateError, TooLongError

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenized row.

    token_ids: [L].
    targets: half-open token ranges [start, end) that are trained; token i is predicted from token i - 1, so no
        range starts at 0. Shifting happens here and nowhere else.
    row: 0-based position of the row in its source.
    shortened: tokens that the prompt lost to fit cutoff_len. straddles: tokens over the prompt's end.
    """

    token_ids: Sequence[int]
    targets: Spans
    row: int = 0
    shortened: int = 0
    straddles: int = 0

    @property
    def target_count(self) -> int:
        """How many tokens are trained."""
        return sum(end - start for start, end in self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How rows become token ids.

    tokenizer: a fast tokenizer of transformers. bos: the id put in front (None: this tokenizer uses none).
    eos: the id put behind an answer (None: add_eos_token is off). cutoff_len: most tokens of an example.
    """

    tokenizer: Any
    template: Template | None
    cutoff_len: int
    bos: int | None
    eos: int | None
    train_on_inputs: bool = False


def encoding(
    tokenizer: Any, template: Template | None, *, cutoff_len: int, add_eos_token: bool, train_on_inputs: bool
) -> Encoding:
    """Find out what this tokenizer puts in front of a text, once.

    Raises:
        TemplateError: the tokenizer gives no character offsets, or has no end-of-text token to add.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which exact targets need; "
            "convert it to a fast tokenizer (tokenizer.json)"
        )
    if template is None and not tokenizer.chat_template:
        raise TemplateError(
            "the template is `chat`, but this tokenizer has no chat template; choose another template"
        )
    first = tokenizer("a")["input_ids"][:1]
    bos = first[0] if first and first[0] == tokenizer.bos_token_id else None
    eos = tokenizer.eos_token_id if add_eos_token and template is not None else None
    return Encoding(
        tokenizer=tokenizer,
        template=template,
        cutoff_len=cutoff_len,
        bos=bos,
        eos=eos,
        train_on_inputs=train_on_inputs,
    )


def encode_row(row: Mapping[str, object], how: Encoding) -> Example:
    """One row as an example of at most `cutoff_len` tokens.

    Raises:
        TemplateError: a column is missing or no text, or the answer is empty.
        TooLongError: the row does not fit into cutoff_len.
    """
    return encode_segments(row_segments(row, how), how, row=int(str(row.get("__row__", 0))))


def row_segments(
    row: Mapping[str, object], how: Encoding, *, with_answer: bool = True
) -> tuple[Segment, ...]:
    """The row's text, by the template or by the tokenizer's chat template."""
    if how.template is None:
        return chat_segments(row, how.tokenizer, with_answer=with_answer)
    segments = how.template.segments(row, with_answer=with_answer)
    if with_answer and not any(s.column == how.template.answer_column and s.text.strip() for s in segments):
        raise TemplateError(f"the answer, column {how.template.answer_column!r}, is empty")
    return segments


def encode_segments(segments: tuple[Segment, ...], how: Encoding, *, row: int = 0) -> Example:
    """Tokenize jointly; shorten the longest prompt column until the whole fits.

    Raises:
        TooLongError: the answer and the fixed words alone are longer than cutoff_len.
    """
    return _fit(segments, how, row)[0]


def _fit(segments: tuple[Segment, ...], how: Encoding, row: int) -> tuple[Example, tuple[Segment, ...]]:
    original, lost = segments, 0
    while True:
        example, owner, starts = _encode_once(segments, how, row)
        over = len(example.token_ids) - how.cutoff_len
        if over <= 0:
            return replace(example, shortened=lost), segments
        lengths = {
            index: sum(o == index for o in owner)
            for index, s in enumerate(segments)
            if s.column and not s.trained
        }
        longest = max(lengths, key=lambda index: lengths[index], default=-1)
        if longest < 0 or lengths[longest] == 0:
            whole = len(_encode_once(original, how, row)[0].token_ids)
            raise TooLongError(
                f"{whole} tokens, and still {len(example.token_ids)} without its longest prompt column, "
                f"are more than cutoff_len {how.cutoff_len}"
            )
        cut = min(over, lengths[longest])
        tokens = [index for index, o in enumerate(owner) if o == longest]
        first = sum(len(s.text) for s in segments[:longest])
        kept = segments[longest].text[: max(0, starts[tokens[-cut]] - first)]
        if len(kept) == len(segments[longest].text):  # a cut inside one character: drop the character
            kept = kept[:-1]
        lost += cut
        segments = (*segments[:longest], replace(segments[longest], text=kept), *segments[longest + 1 :])


def _encode_once(
    segments: tuple[Segment, ...], how: Encoding, row: int
) -> tuple[Example, list[int], list[int]]:
    """The example, and for each token the segment it starts in (-1: added by us) and its first character."""
    text = "".join(segment.text for segment in segments)
    encoded = how.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    bounds, position = [], 0
    for segment in segments:
        bounds.append((position, position + len(segment.text)))
        position += len(segment.text)
    owner, trained, starts, straddles, previous, at = [], [], [], 0, 0, 0
    for low, high in offsets:
        start = min(low, previous)  # byte-level tokenizers trim a token's own leading space from its offset
        while at + 1 < len(bounds) and start >= bounds[at][1]:
            at += 1
        touched = _touched(bounds, at, start, high)
        flags = {segments[index].trained for index in touched}
        straddles += len(flags) > 1
        owner.append(at)
        starts.append(start)
        trained.append(True in flags)
        previous = max(previous, high)
    if how.bos is not None and ids[:1] != [how.bos]:
        ids, owner = [how.bos, *ids], [-1, *owner]
        trained, starts = [False, *trained], [0, *starts]
    if how.eos is not None and ids[-1:] != [how.eos]:
        ids, owner = [*ids, how.eos], [*owner, -1]
        trained, starts = [*trained, True], [*starts, len(text)]
    elif how.eos is not None:
        trained[-1] = True
    if how.train_on_inputs:
        trained = [True] * len(ids)
    return Example(token_ids=ids, targets=_spans(trained), row=row, straddles=straddles), owner, starts


def _touched(bounds: list[tuple[int, int]], at: int, start: int, high: int) -> list[int]:
    """Indices of the segments that the characters [start, high) reach into; an empty token belongs to `at`."""
    touched = [at]
    for index in range(at + 1, len(bounds)):
        if bounds[index][0] >= high:
            break
        touched.append(index)
    return touched


def _spans(trained: list[bool]) -> Spans:
    spans: list[tuple[int, int]] = []
    for index, flag in enumerate(trained):
        if not flag or index == 0:  # nothing predicts the first token
            continue
        if spans and spans[-1][1] == index:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return tuple(spans)


def encode_prompt(row: Mapping[str, object], how: Encoding) -> list[int]:
    """The token ids that the model is given before it answers.

    A row that has its answer gets the prompt that it was trained with, shortened as far as it was there.

    Raises:
        TemplateError: as `encode_row`, except that the answer may be missing.
    """
    bare = replace(how, eos=None, train_on_inputs=False)
    if how.template is None or not row.get(how.template.answer_column):
        return list(encode_segments(row_segments(row, how, with_answer=False), bare).token_ids)
    _, segments = _fit(row_segments(row, how), how, 0)
    prompt = tuple(segment for segment in segments if not segment.trained)
    return list(_encode_once(prompt, bare, 0)[0].token_ids)


def chat_segments(
    row: Mapping[str, object], tokenizer: Any, *, with_answer: bool = True
) -> tuple[Segment, ...]:
    """Rows with `messages`: the tokenizer's chat template, every assistant turn trained, nothing else.

    Raises:
        TemplateError: no messages, no assistant turn, or a chat template that rewrites earlier turns.
    """
    messages = _messages(row)
    if not with_answer:
        if messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return (Segment(text=_render(tokenizer, messages, generation=True), trained=False),)
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        raise TemplateError("no assistant turn in `messages`, so there is nothing to train")
    full, done = _render(tokenizer, messages, generation=False), 0
    segments: list[Segment] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], generation=True)
        after = _render(tokenizer, messages[: index + 1], generation=False)
        if not (full.startswith(after.rstrip()) and after.startswith(before)):
            raise TemplateError(
                f"the tokenizer's chat template rewrites earlier turns (message {index + 1}); use a row a turn"
            )
        segments.append(Segment(text=full[done : len(before)], trained=False))
        segments.append(Segment(text=full[len(before) : len(after.rstrip())], trained=True))
        done = len(after.rstrip())
    segments.append(Segment(text=full[done:], trained=False))
    return tuple(segment for segment in segments if segment.text)


def _messages(row: Mapping[str, object]) -> list[dict[str, str]]:
    """`messages` (role, content) or ShareGPT's `conversations` (from, value)."""
    turns = row.get("messages") or row.get("conversations")
    if not isinstance(turns, (list, tuple)) or not turns:
        raise TemplateError("the column `messages` is empty or no list of turns")
    names = {"human": "user", "gpt": "assistant"}
    out = []
    for turn in turns:
        role = turn.get("role") or turn.get("from")
        content = turn.get("content") if "content" in turn else turn.get("value")
        if not isinstance(role, str) or not isinstance(content, str):
            raise TemplateError("a turn in `messages` has no role or no text content")
        out.append({"role": names.get(role, role), "content": content})
    return out


def _render(tokenizer: Any, messages: list[dict[str, str]], *, generation: bool) -> str:
    from jinja2 import TemplateError as JinjaError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation))
    except JinjaError as error:
        raise TemplateError(f"the tokenizer's chat template refuses these messages: {error}") from None
