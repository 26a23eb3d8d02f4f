"""Segments -> Example. The only place that makes targets.

Prompt and answer are tokenized jointly; the trained tokens are found by character offsets. A token that spans the
boundary between prompt and answer contains characters of the answer, so it is trained, and it is counted
(`straddles`): at generation time the prompt alone is tokenized differently there.

    text     "### 제목:\\n봄소식"          answer = characters [8, 11)
    tokens   ### | ␣제목 | : | \\n | 봄 | 소식 | <eos>
    trained   0      0     0    0     1     1       1      -> targets [(4, 7)]

L: tokens of an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from byeori.data import chat, turns
from byeori.data.conversation import Turns, conversation
from byeori.data.template import Segment, Template
from byeori.data.turns import Turn
from byeori.errors import TemplateError, TooLongError

Spans = tuple[tuple[int, int], ...]
NO_TARGETS = "no token is left to train, because nothing comes before the answer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One tokenized row.

    token_ids: [L].
    targets: half-open token ranges [start, end) that are trained; token i is predicted from token i - 1, so no
        range starts at 0. Shifting happens here and nowhere else.
    row: 0-based position of the row in its source.
    shortened: tokens cut from the prompt to fit cutoff_len. straddles: tokens over the end of the prompt.
    reference: a reference model's log-prob of each trained token, in order; None without a reference model.
    turn: the message that is trained, 1-based; 0 for a row that is not a conversation.
    turns_left_out: trained turns of the row that are longer than cutoff_len; counted on its first example.
    """

    token_ids: Sequence[int]
    targets: Spans
    row: int = 0
    shortened: int = 0
    straddles: int = 0
    reference: Sequence[float] | None = None
    turn: int = 0
    turns_left_out: int = 0

    @property
    def target_count(self) -> int:
        """The number of trained tokens."""
        return sum(end - start for start, end in self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """What turns rows into token ids.

    tokenizer: a fast tokenizer of transformers. core: its `tokenizers.Tokenizer` without a post-processor, whose
        offsets are exact (the byte-level post-processor trims white space from both ends of a token's offsets).
    bos: the id added in front; None if this tokenizer uses none.
    eos: the id added after an answer; None if add_eos_token is off or the chat template ends a turn itself.
    cutoff_len: the maximum number of tokens of an example.
    train_turns: which assistant turns of a conversation are trained.
    """

    tokenizer: Any
    core: Any
    template: Template | None
    cutoff_len: int
    bos: int | None
    eos: int | None
    train_on_inputs: bool = False
    train_turns: Turns = "all"


def make_encoding(
    tokenizer: Any,
    template: Template | None,
    *,
    cutoff_len: int,
    add_eos_token: bool,
    train_on_inputs: bool,
    train_turns: Turns = "all",
) -> Encoding:
    """Return the encoding of a tokenizer and a template (None: the tokenizer's chat template).

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
    first = tokenizer("a")["input_ids"][:1]
    bos = first[0] if first and first[0] == tokenizer.bos_token_id else None
    eos = tokenizer.eos_token_id if add_eos_token and (template or chat.leaves_turns_open(tokenizer)) else None
    return Encoding(
        tokenizer=tokenizer,
        core=_core(tokenizer),
        template=template,
        cutoff_len=cutoff_len,
        bos=bos,
        eos=eos,
        train_on_inputs=train_on_inputs,
        train_turns=train_turns,
    )


def _core(tokenizer: Any) -> Any:
    """Return the tokenizer's engine for exact targets: nothing is added, cut, padded or trimmed."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.no_truncation()
    core.no_padding()
    core.post_processor = None
    core.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    return core


def encode_row(row: Mapping[str, object], encoding: Encoding) -> Example:
    """Return a row as an example of at most `cutoff_len` tokens.

    Raises:
        TemplateError: if a column is missing or not text, the answer is empty, or no token is left to train.
        TooLongError: if the row does not fit into cutoff_len.
    """
    example, _ = fit(row_segments(row, encoding), encoding, int(str(row.get("__row__", 0))))
    if not example.targets:  # one token, without a prompt or BOS to predict it from
        raise TemplateError(NO_TARGETS)
    return example


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
    found = [_encode_turn(turn, encoding, number) for turn in turns.turns(read, encoding.tokenizer)]
    fitting = [example for example in found if len(example.token_ids) <= encoding.cutoff_len]
    if not fitting:
        raise TooLongError(
            f"{len(found[0].token_ids)} tokens are more than cutoff_len {encoding.cutoff_len}, and there is no prompt "
            "column to shorten"
        )
    if encoding.train_on_inputs:
        fitting = [_with_prompt_trained(at, fitting) for at in range(len(fitting))]
    return [replace(fitting[0], turns_left_out=len(found) - len(fitting)), *fitting[1:]]


def _encode_turn(turn: Turn, encoding: Encoding, row: int) -> Example:
    """The prompt's tokens as a server has them, then the answer's."""
    prompt = encoding.core.encode(turn.prompt, add_special_tokens=False).ids
    both = encoding.core.encode(turn.prompt + turn.answer, add_special_tokens=False).ids
    # a token over the boundary is none that the model would write after this prompt
    fits = both[: len(prompt)] == prompt and len(both) > len(prompt)
    answer = both[len(prompt) :] if fits else encoding.core.encode(turn.answer, add_special_tokens=False).ids
    if encoding.eos is not None and answer[-1:] != [encoding.eos]:
        answer = [*answer, encoding.eos]
    ids = [*prompt, *answer]
    return Example(token_ids=ids, targets=((max(1, len(prompt)), len(ids)),), row=row, turn=turn.number)


def _with_prompt_trained(at: int, examples: list[Example]) -> Example:
    example = examples[at]
    before = examples[at - 1].token_ids if at else ()
    same = next((i for i, (a, b) in enumerate(zip(example.token_ids, before, strict=False)) if a != b), None)
    same = min(len(before), len(example.token_ids)) if same is None else same
    return replace(example, targets=((max(1, same), len(example.token_ids)),))


def row_segments(row: Mapping[str, object], encoding: Encoding, *, with_answer: bool = True) -> tuple[Segment, ...]:
    """The row's text by the template."""
    assert encoding.template is not None
    segments = encoding.template.segments(row, with_answer=with_answer)
    if with_answer and not any(s.column == encoding.template.answer_column and s.text.strip() for s in segments):
        raise TemplateError(f"the answer, column {encoding.template.answer_column!r}, is empty")
    return segments


def fit(segments: tuple[Segment, ...], encoding: Encoding, row: int = 0) -> tuple[Example, tuple[Segment, ...]]:
    """Tokenize jointly; if the row is over cutoff_len, cut the end of its longest prompt column, and nothing else.

    Returns the example and the segments that are left.

    Raises:
        TooLongError: if the row is longer than cutoff_len even without that column.
    """
    example, owner, starts = _encode_once(segments, encoding, row)
    whole = len(example.token_ids)
    if whole <= encoding.cutoff_len:
        return example, segments
    lengths = {
        index: (owner.count(index), len(segment.text))
        for index, segment in enumerate(segments)
        if segment.column and not segment.trained
    }
    if not lengths:
        raise TooLongError(
            f"{whole} tokens are more than cutoff_len {encoding.cutoff_len}, and there is no prompt column to shorten"
        )
    longest = max(lengths, key=lambda index: lengths[index])
    first = sum(len(segment.text) for segment in segments[:longest])
    text = segments[longest].text
    while (over := len(example.token_ids) - encoding.cutoff_len) > 0:
        if not text:
            raise TooLongError(
                f"{whole} tokens are more than cutoff_len {encoding.cutoff_len}, and without its longest prompt "
                f"column, {segments[longest].column!r}, they are still {len(example.token_ids)}"
            )
        inside = [index for index, segment in enumerate(owner) if segment == longest]
        end = starts[inside[-min(over, len(inside))]] - first if inside else len(text)
        text = text[: min(end, len(text) - 1)]  # at least one character is cut, or this would never end
        segments = (*segments[:longest], replace(segments[longest], text=text), *segments[longest + 1 :])
        example, owner, starts = _encode_once(segments, encoding, row)
    return replace(example, shortened=whole - len(example.token_ids)), segments


def _encode_once(segments: tuple[Segment, ...], encoding: Encoding, row: int) -> tuple[Example, list[int], list[int]]:
    """Return the example, and for each token the segment it starts in (-1: added here) and its first character."""
    if encoding.eos is not None and segments and not (segments[-1].trained or segments[-1].text.strip()):
        segments = segments[
            :-1
        ]  # a chat template's line break after the last turn, which the end-of-text token replaces
    ended = encoding.eos is not None and bool(segments) and segments[-1].trained
    text = "".join(segment.text for segment in segments)
    encoded = encoding.core.encode(text, add_special_tokens=False)
    ids, offsets = list(encoded.ids), _offsets(encoded.offsets, text)
    bounds, position = [], 0
    for segment in segments:
        bounds.append((position, position + len(segment.text)))
        position += len(segment.text)
    owner, trained, starts, straddles, at = [], [], [], 0, 0
    for start, end in offsets:
        while at + 1 < len(bounds) and start >= bounds[at][1]:
            at += 1
        flags = {segments[index].trained for index in _touched(bounds, at, end)}
        straddles += len(flags) > 1
        owner.append(at)
        starts.append(start)
        trained.append(True in flags)
    if encoding.bos is not None and ids[:1] != [encoding.bos]:
        ids, owner = [encoding.bos, *ids], [-1, *owner]
        trained, starts = [False, *trained], [0, *starts]
    if encoding.eos is not None and ended and ids[-1:] != [encoding.eos]:
        ids, owner = [*ids, encoding.eos], [*owner, -1]
        trained, starts = [*trained, True], [*starts, len(text)]
    elif ended:
        trained[-1] = True
    if encoding.train_on_inputs:
        trained = [True] * len(ids)
    return Example(token_ids=ids, targets=_spans(trained), row=row, straddles=straddles), owner, starts


def _offsets(offsets: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Return half-open character ranges of the tokens that include all characters composed into a token.

    A normalizer that composes (NFC: Qwen's) reports only the first of the characters that it made into one. Of tokens
    that start together one may end later than the others: the space that Llama 2 puts first has a token of its own.
    """
    out: list[tuple[int, int]] = []
    following, low_before, reach = len(text), len(text), 0
    for low, high in reversed(offsets):
        if low < low_before:
            following, low_before, reach = low_before, low, 0
        reach = max(reach, high)
        composed = reach < following and text[reach:following].strip()
        out.append((low, following if composed else high))
    return out[::-1]


def _touched(bounds: list[tuple[int, int]], at: int, high: int) -> list[int]:
    """Return the indices of the segments of a token that starts in segment `at` and ends before character `high`."""
    return [at, *takewhile(lambda index: bounds[index][0] < high, range(at + 1, len(bounds)))]


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
        text = turns.prompt(read, encoding.tokenizer)
        return list(encoding.core.encode(text, add_special_tokens=False).ids)
    bare = replace(encoding, eos=None, train_on_inputs=False)
    answer = row.get(encoding.template.answer_column)
    if not isinstance(answer, str) or not answer.strip():
        return list(fit(row_segments(row, encoding, with_answer=False), bare)[0].token_ids)
    _, segments = fit(row_segments(row, encoding), encoding)
    prompt = tuple(segment for segment in segments if not segment.trained)
    return list(_encode_once(prompt, bare, 0)[0].token_ids)
