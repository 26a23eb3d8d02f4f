"""Segments -> Example. The only place that makes targets.

The prompt's tokens are those of its text alone, as a server has them; the answer's tokens follow. No token reaches
over the end of the prompt, also where one text of both would have such a token (`joins` counts these).

    text     "### 제목:\\n" + "봄소식"
    tokens   ### | ␣제목 | : | \\n | 봄 | 소식 | <eos>
    trained   0      0     0    0     1     1       1      -> targets [(4, 7)]

L: tokens of an example.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from itertools import accumulate, pairwise
from typing import Any, Literal

from byeori.data import chat, text_values, turns
from byeori.data import template as template_text
from byeori.data.conversation import Conversation, Turns, conversation
from byeori.data.template import SPACES, Segment, Template
from byeori.data.text_encoder import TextEncoder, text_encoder
from byeori.data.text_values import Marks
from byeori.data.turns import Turn
from byeori.errors import TemplateError, TooLongError

Spans = tuple[tuple[int, int], ...]
SpecialTokensInText = Literal["keep", "escape"]
NO_TARGETS = "no token is left to train, because nothing comes before the answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenized row.

    token_ids: [L].
    targets: half-open token ranges [start, end) that are trained; token i is predicted from token i - 1, so no
        range starts at 0. Shifting happens here and nowhere else.
    row: 0-based position of the row in its source.
    shortened: tokens cut from the prompt to fit cutoff_len.
    joins: whether prompt and answer would have other tokens as one text.
    special: the first control token in the row's text (`<|im_end|>`), "" if there is none.
    reference: a reference model's log-prob of each trained token, in order; None without a reference model.
    turn: the message that is trained, 1-based; 0 for a row that is not a conversation.
    turns_left_out: trained turns of the row that are longer than cutoff_len; counted on its first example.
    piece: number of a piece of a document, 1-based, which is a unit of its own; 0 for other rows.
    """

    token_ids: Sequence[int]
    targets: Spans
    row: int = 0
    shortened: int = 0
    joins: bool = False
    special: str = ""
    reference: Sequence[float] | None = None
    turn: int = 0
    turns_left_out: int = 0
    piece: int = 0

    @property
    def target_count(self) -> int:
        """The number of trained tokens."""
        return sum(end - start for start, end in self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """What turns rows into token ids.

    tokenizer: a fast tokenizer of transformers. encoder: its engine (text_encoder.py).
    prefix: the ids that its post-processor puts in front of a text, such as BOS.
    eos: the id added after an answer; None if add_eos_token is off or the chat template ends a turn itself.
    cutoff_len: the maximum number of tokens of an example.
    train_turns: which assistant turns of a conversation are trained.
    special_tokens_in_text: what a control token in a row's text becomes: its text (escape) or the token (keep).
    day: what the chat template writes as today in what is trained; None if it writes no date.
    """

    tokenizer: Any
    encoder: TextEncoder
    template: Template | None
    cutoff_len: int
    prefix: tuple[int, ...]
    eos: int | None
    train_on_inputs: bool = False
    train_turns: Turns = "all"
    special_tokens_in_text: SpecialTokensInText = "escape"
    day: datetime | None = None


def make_encoding(
    tokenizer: Any,
    template: Template | None,
    *,
    cutoff_len: int,
    add_eos_token: bool,
    train_on_inputs: bool,
    train_turns: Turns = "all",
    special_tokens_in_text: SpecialTokensInText = "escape",
    day: datetime | None = None,
) -> Encoding:
    """Return the encoding of a tokenizer and a template (None: the tokenizer's chat template).

    day: what a chat template writes as today, so that a run that is resumed tomorrow trains the same rows; today by
        default.

    Raises:
        TemplateError: if the tokenizer gives no character offsets, or has no chat template and needs one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TemplateError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which exact targets need; convert "
            "it to a fast tokenizer (tokenizer.json)"
        )
    if template is None and not tokenizer.chat_template:
        raise TemplateError(
            "the template is `chat`, but this tokenizer has no chat template; choose another template, or give one "
            f"with --chat_template: a Jinja file, or {', '.join(chat.shipped())}"
        )
    eos = tokenizer.eos_token_id if add_eos_token and (template or chat.leaves_turns_open(tokenizer)) else None
    dated = template is None and "strftime_now" in str(tokenizer.chat_template)
    return Encoding(
        tokenizer=tokenizer,
        encoder=text_encoder(tokenizer),
        template=template,
        cutoff_len=cutoff_len,
        prefix=_prefix(tokenizer),
        eos=eos,
        train_on_inputs=train_on_inputs,
        train_turns=train_turns,
        special_tokens_in_text=special_tokens_in_text,
        day=(day or datetime.fromordinal(date.today().toordinal())) if dated else None,
    )


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return what the post-processor puts in front of a text; what it puts behind belongs to no prompt."""
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return tuple(whole[:at])


# ---- a template ----------------------------------------------------------------------------------------------------


def encode_row(row: Mapping[str, object], encoding: Encoding) -> Example:
    """Return a row as an example of at most `cutoff_len` tokens.

    Raises:
        TemplateError: if a column is missing or not text, the answer is empty, or no token is left to train.
        TooLongError: if the row does not fit into cutoff_len.
    """
    return encode_rows([row], encoding)[0]


def encode_rows(rows: Sequence[Mapping[str, object]], encoding: Encoding) -> list[Example]:
    """Return the examples of rows that differ in their answer only (a pair): all have the same prompt tokens.

    Raises:
        TemplateError: as `encode_row`.
    """
    filled = [row_segments(row, encoding) for row in rows]
    prompt, ids, cut, answers = _tokenize(filled, encoding)
    examples = []
    for text, ending in answers:
        token_ids = [*ids, *ending]
        start = 1 if encoding.train_on_inputs else max(1, len(ids))
        if start >= len(token_ids):  # one token, without a prompt or BOS to predict it from
            raise TemplateError(NO_TARGETS)
        examples.append(
            Example(
                token_ids=token_ids,
                targets=((start, len(token_ids)),),
                row=int(str(rows[0].get("__row__", 0))),
                shortened=cut,
                joins=encoding.encoder.joins(prompt.text, text.text),
                special=prompt.special or text.special,
            )
        )
    return examples


def row_segments(row: Mapping[str, object], encoding: Encoding, *, with_answer: bool = True) -> tuple[Segment, ...]:
    """The row's text by the template."""
    assert encoding.template is not None
    segments = encoding.template.segments(row, with_answer=with_answer)
    if with_answer and not any(s.column == encoding.template.answer_column and s.text.strip() for s in segments):
        raise TemplateError(f"the answer, column {encoding.template.answer_column!r}, is empty")
    return segments


@dataclass(frozen=True, kw_only=True, slots=True)
class _Text:
    """Segments as one text, and its tokens. cuts: see TextEncoder.cuts. special: the first control token in a value."""

    segments: Sequence[Segment]
    text: str
    cuts: Sequence[int]
    special: str

    @classmethod
    def of(cls, segments: Sequence[Segment], encoding: Encoding) -> _Text:
        text = "".join(segment.text for segment in segments)
        values = [bounds for segment, bounds in zip(segments, _bounds(segments), strict=True) if segment.column]
        cuts, special = encoding.encoder.cuts(text, values)
        kept = encoding.special_tokens_in_text == "keep"
        return cls(segments=segments, text=text, cuts=() if kept else cuts, special=special)


def _bounds(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Return the character range of each segment in their text."""
    ends = list(accumulate((len(segment.text) for segment in segments), initial=0))
    return list(pairwise(ends))


def _tokenize(
    filled: Sequence[Sequence[Segment]], encoding: Encoding
) -> tuple[_Text, list[int], int, list[tuple[_Text, list[int]]]]:
    """Return the prompt, its tokens within cutoff_len, how many were cut, and each answer with its tokens."""
    prompt = _Text.of([segment for segment in filled[0] if not segment.trained], encoding)
    before = encoding.encoder.ids(prompt.text, prompt.cuts)
    answers = []
    for segments in filled:
        answer = _Text.of([segment for segment in segments if segment.trained], encoding)
        ids = encoding.encoder.ids(answer.text, answer.cuts, after=before) if answer.text else []
        answers.append((answer, _with_eos(ids, encoding.eos)))
    ids = _with_prefix(before, encoding.prefix)
    room = encoding.cutoff_len - max(len(ids) for _, ids in answers)
    fitting = ids if len(ids) <= room else _shortened(prompt, len(ids), room, encoding)
    return prompt, fitting, len(ids) - len(fitting), answers


def _with_prefix(ids: list[int], prefix: Sequence[int]) -> list[int]:
    """Return tokens with the tokenizer's prefix in front, once: a template may begin with it."""
    same = next((at for at, (a, b) in enumerate(zip(prefix, ids, strict=False)) if a != b), min(len(prefix), len(ids)))
    return [*prefix, *ids[same:]]


def _with_eos(ids: list[int], eos: int | None) -> list[int]:
    return ids if not ids or eos is None or ids[-1] == eos else [*ids, eos]


def _shortened(prompt: _Text, whole: int, room: int, encoding: Encoding) -> list[int]:
    """Return the tokens of a prompt whose longest column is cut at its end, and nothing else, until they fit.

    whole: tokens of the prompt. room: how many there may be.

    Raises:
        TooLongError: if they are more even without that column.
    """
    segments, bounds = list(prompt.segments), _bounds(prompt.segments)
    ids, starts = encoding.encoder.ids_and_starts(prompt.text, prompt.cuts)
    columns = [at for at, segment in enumerate(segments) if segment.column]
    total = f"{whole + encoding.cutoff_len - room} tokens are more than cutoff_len {encoding.cutoff_len}"
    if not columns:
        raise TooLongError(f"{total}, and there is no prompt column to shorten")
    longest = max(columns, key=lambda at: (_within(starts, bounds[at]), len(segments[at].text)))
    ids, low, text = _with_prefix(ids, encoding.prefix), bounds[longest][0], segments[longest].text
    while (over := len(ids) - room) > 0:
        if not text:
            raise TooLongError(
                f"{total}, and without its longest prompt column, {segments[longest].column!r}, they are still "
                f"{len(ids) + encoding.cutoff_len - room}"
            )
        inside = starts[bisect_left(starts, low) : bisect_left(starts, low + len(text))]
        end = inside[-min(over, len(inside))] - low if inside else len(text)
        # at least one character is cut, or this would never end; and no prompt ends with a space
        text = text[: min(end, len(text) - 1)].rstrip(SPACES)
        segments[longest] = replace(segments[longest], text=text)
        prompt = _Text.of(segments, encoding)
        ids, starts = encoding.encoder.ids_and_starts(prompt.text, prompt.cuts)
        ids = _with_prefix(ids, encoding.prefix)
    return ids


def _within(starts: Sequence[int], bounds: tuple[int, int]) -> int:
    """Return how many tokens start in a range of characters."""
    return bisect_left(starts, bounds[1]) - bisect_left(starts, bounds[0])


# ---- chats ---------------------------------------------------------------------------------------------------------


def encode_turns(row: Mapping[str, object], encoding: Encoding) -> list[Example]:
    """One example for each trained turn of a conversation, by the tokenizer's chat template.

    A turn longer than cutoff_len is left out; `turns_left_out` of the row's first example counts them. Under
    train_on_inputs a token that an earlier turn has trained is not trained again.

    Raises:
        TemplateError: as `conversation` and `turns`; or no assistant turn is trained, or the last answer is empty.
        TooLongError: no turn fits into cutoff_len.
    """
    read = conversation(row, train_turns=encoding.train_turns)
    if read.ends_empty:
        raise TemplateError("the answer, the last assistant turn in `messages`, is empty")
    if not read.trained:
        roles = ", ".join(dict.fromkeys(message["role"] for message in read.messages))
        raise TemplateError(f"no turn in `messages` is an assistant's that is trained (its roles: {roles})")
    number = int(str(row.get("__row__", 0)))
    read, marks = _marked(read, encoding)
    trained = turns.turns(read, encoding.tokenizer, encoding.day)
    found = [_encode_turn(turn, marks, encoding, number) for turn in trained]
    fitting = [example for example in found if len(example.token_ids) <= encoding.cutoff_len]
    if not fitting:
        raise TooLongError(
            f"{len(found[0].token_ids)} tokens are more than cutoff_len {encoding.cutoff_len}, and there is no prompt "
            "column to shorten"
        )
    if encoding.train_on_inputs:
        fitting = [_with_prompt_trained(at, fitting) for at in range(len(fitting))]
    return [replace(fitting[0], turns_left_out=len(found) - len(fitting)), *fitting[1:]]


def _marked(read: Conversation, encoding: Encoding) -> tuple[Conversation, Marks]:
    """Return a conversation whose values have marks instead of control tokens, unless those are kept."""
    (messages, tools), marks = text_values.marked((read.messages, read.tools), encoding.encoder)
    if encoding.special_tokens_in_text == "escape" and marks.first:
        read = replace(read, messages=tuple(messages), tools=tuple(tools))
    return read, marks


def _encode_turn(turn: Turn, marks: Marks, encoding: Encoding, row: int) -> Example:
    """The prompt's tokens as a server has them, then the answer's."""
    prompt, cuts = marks.unmarked(turn.prompt)
    ids = encoding.encoder.ids(prompt, cuts)
    answer, cuts = marks.unmarked(turn.answer)
    whole = [*ids, *_with_eos(encoding.encoder.ids(answer, cuts, after=ids), encoding.eos)]
    return Example(
        token_ids=whole,
        targets=((max(1, len(ids)), len(whole)),),
        row=row,
        joins=encoding.encoder.joins(prompt, answer),
        special=marks.first,
        turn=turn.number,
    )


def _with_prompt_trained(at: int, examples: list[Example]) -> Example:
    example = examples[at]
    before = examples[at - 1].token_ids if at else ()
    same = next((i for i, (a, b) in enumerate(zip(example.token_ids, before, strict=False)) if a != b), None)
    same = min(len(before), len(example.token_ids)) if same is None else same
    return replace(example, targets=((max(1, same), len(example.token_ids)),))


# ---- prompts -------------------------------------------------------------------------------------------------------


def encode_prompt(row: Mapping[str, object], encoding: Encoding) -> list[int]:
    """Return the token ids that the model is given before it answers.

    A row with an answer gets the prompt that it was trained with, shortened if it was shortened there. An answer that
    is empty or not text counts as missing.

    Raises:
        TemplateError: as `encode_row`, except that the answer may be missing.
    """
    if encoding.template is None:
        read = conversation(row)
        if read.messages[-1]["role"] == "assistant":
            read = replace(read, messages=read.messages[:-1])
        read, marks = _marked(read, encoding)
        text, cuts = marks.unmarked(turns.prompt(read, encoding.tokenizer))
        return encoding.encoder.ids(text, cuts)
    answer = template_text.as_text(row.get(encoding.template.answer_column))
    answered = isinstance(answer, str) and bool(answer.strip())
    return _tokenize([row_segments(row, encoding, with_answer=answered)], encoding)[1]


def encode_text(text: str, encoding: Encoding) -> list[int]:
    """Return the token ids of a finished prompt."""
    return _with_prefix(encoding.encoder.ids(text), encoding.prefix)
