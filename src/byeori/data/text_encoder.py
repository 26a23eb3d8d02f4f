"""Text -> token ids: a prompt as a server tokenizes it, the text that follows it, and values that stay text.

"### 답변:"   first text      ###, ␣답변, :       what the tokenizer makes of the prompt alone
" 봄"         following text  ␣봄                 no space of the tokenizer's own in front (Llama 2's ▁)
"a</s>"       a value         a, </, s, >         cut where it would become a control token
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from byeori.errors import ModelError
from byeori.support.text_files import one_line

Range = tuple[int, int]

# DeepSeek's <｜User｜> opens a turn though its tokenizer does not call it special
_CONTROL = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
# a template splits a content at these; they are read and written as reasoning
_REASONING = {"<think>", "</think>"}
_WINDOW = 32  # characters on either side of the end of a prompt that decide how it is tokenized there


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoder:
    """A tokenizer's engine without post-processor, truncation and padding.

    core: a `tokenizers.Tokenizer`, for a text that nothing precedes. following: for text after other text; the same
        object unless the tokenizer puts a space in front of a text.
    leads_after_added: whether text after an added token gets the space that a first text gets.
    added: ids of the added tokens. controls: the control tokens, special or named like <|im_end|>.
    pattern: finds candidates of them, which `controls` then knows. splits: whether no special token is ever parsed.
    digest: a hash of the tokenizer but for truncation and padding, which its users change.
    """

    core: Any
    following: Any
    leads_after_added: bool
    added: frozenset[int]
    controls: frozenset[str]
    pattern: re.Pattern[str]
    splits: bool = False
    digest: str = ""

    def ids(self, text: str, cuts: Sequence[int] = (), *, after: Sequence[int] = ()) -> list[int]:
        """Return the token ids of a text. after: the tokens before it. cuts: see `cuts`."""
        out: list[int] = []
        for low, high, core in self._parts(text, cuts, after):
            # without offsets, which take a third of the time
            out += core.encode_batch_fast([text[low:high]], add_special_tokens=False)[0].ids
        return out

    def ids_and_starts(self, text: str, cuts: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Return the token ids of a text, and for each the position of its first character."""
        ids, starts = [], []
        for low, high, core in self._parts(text, cuts, ()):
            encoded = core.encode(text[low:high], add_special_tokens=False)
            ids += encoded.ids
            starts += [low + start for start, _ in encoded.offsets]
        return ids, starts

    def _parts(self, text: str, cuts: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int, Any]]:
        """Yield the character ranges that are encoded apart, with the engine of each."""
        first = not after or (self.leads_after_added and after[-1] in self.added)
        for low, high in zip((0, *cuts), (*cuts, len(text)), strict=True):
            core = self.core if first and not low else self.following
            core.encode_special_tokens = self.splits  # not kept by a copy in another process
            yield low, high, core

    def find(self, text: str, start: int = 0) -> re.Match[str] | None:
        """Return the first control token in a text from a position on."""
        while (match := self.pattern.search(text, start)) and match.group() not in self.controls:
            start = match.start() + 1
        return match

    def cuts(self, text: str, values: Sequence[Range]) -> tuple[list[int], str]:
        """Return where to cut a text so that no control token is made of its values, and the first one found there.

        values: character ranges of the text that are values. A cut falls behind the token's first punctuation, where
        tokenizers split it anyway: `<|` `im` `_end` `|>`.
        """
        found: list[int] = []
        first, at = "", 0
        while match := self.find(text, at):
            if any(low < match.end() and match.start() < high for low, high in values):
                at = match.start() + cut_of(match.group())
                found.append(at)
                first = first or match.group()
            else:
                at = match.end()
        return found, first

    def joins(self, prompt: str, answer: str) -> bool:
        """Return whether prompt and answer have other tokens as one text than one after the other."""
        before, behind = prompt[-_WINDOW:], answer[:_WINDOW]
        if not before:
            return False
        ids = self.ids(before)
        return self.ids(before + behind) != [*ids, *self.ids(behind, after=ids)]


def cut_of(token: str) -> int:
    """Return the position in a control token's text at which it is cut to be text."""
    return next((at for at, character in enumerate(token) if at and character.isalnum()), 1)


def text_encoder(tokenizer: Any) -> TextEncoder:
    """Return the encoder of a fast tokenizer of transformers."""
    text = tokenizer.backend_tokenizer.to_str()
    core = _core(tokenizer.backend_tokenizer, text)
    following = _following(core)
    added = tokenizer.added_tokens_decoder
    controls = {
        token.content
        for token in added.values()
        if (token.special or _CONTROL.fullmatch(token.content)) and token.content not in _REASONING
    }
    return TextEncoder(
        core=core,
        following=following,
        leads_after_added=following is not core and _leads_after_added(core, following, added),
        added=frozenset(added),
        controls=frozenset(controls),
        pattern=_pattern(controls),
        splits=bool(getattr(tokenizer, "split_special_tokens", False)),
        digest=hashlib.sha256(text[text.index('"added_tokens"') :].encode()).hexdigest(),
    )


def _core(engine: Any, text: str) -> Any:
    """Return an engine without post-processor, truncation and padding. text: the given engine as JSON.

    It shares the vocabulary of the given one. Rebuilding Gemma's would cost as much as tokenizing thousands of rows.
    """
    from tokenizers import Tokenizer

    core, added = Tokenizer(engine.model), sorted(engine.get_added_tokens_decoder().items())
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        if (part := getattr(engine, name)) is not None:
            setattr(core, name, part)
    for special, tokens in groupby(added, lambda item: item[1].special):
        (core.add_special_tokens if special else core.add_tokens)([token for _, token in tokens])
    if core.get_added_tokens_decoder() == dict(added):
        return core
    try:  # added tokens with gaps between their ids
        core = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more specific
        raise ModelError(f"the tokenizer.json of the model is damaged ({one_line(error)}); copy it again") from None
    core.no_truncation()
    core.no_padding()
    core.post_processor = None
    return core


def _following(core: Any) -> Any:
    """Return the engine that puts no space in front of a text; `core` itself if it puts none."""
    names = ("normalizer", "pre_tokenizer")
    parts = {name: getattr(core, name) for name in names}
    states = {name: json.loads(part.__getstate__()) for name, part in parts.items() if part is not None}
    bare = {name: _without_lead(state) for name, state in states.items()}
    if bare == states:
        return core
    return type(core).from_str(json.dumps(json.loads(core.to_str()) | bare))


def _without_lead(part: Any) -> Any:
    """Return a normalizer or a pre-tokenizer that puts no space in front of a text."""
    out = dict(part)
    for name in ("normalizers", "pretokenizers"):
        if name in out:
            out[name] = [_without_lead(item) for item in out[name] if item.get("type") != "Prepend"]
    if out.get("type") == "Prepend":
        return None
    if out.get("type") == "Metaspace":
        out["prepend_scheme"] = "never"
    if out.get("add_prefix_space"):
        out["add_prefix_space"] = False
    return out


def _leads_after_added(core: Any, following: Any, added: Mapping[int, Any]) -> bool:
    """Return whether the tokenizer puts its space after added tokens too, as Llama 2's older form does."""
    for number, token in added.items():
        ids = core.encode(f"{token.content}a", add_special_tokens=False).ids
        if ids[:1] == [number]:
            rest = ids[1:]
            return bool(rest == core.encode("a", add_special_tokens=False).ids) and bool(
                rest != following.encode("a", add_special_tokens=False).ids
            )
    return False


def _pattern(controls: set[str]) -> re.Pattern[str]:
    """Return a pattern of all control tokens; of those that only differ in a number (there are thousands) one form."""
    forms = {re.sub(r"[0-9]+", "[0-9]+", re.escape(token)) for token in controls}
    return re.compile("|".join(sorted(forms, key=len, reverse=True)) or r"(?!)")
