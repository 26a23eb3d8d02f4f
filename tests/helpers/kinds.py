"""Tokenizers of the kinds that models come with, built in the process, and what their tokens stand for in bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SAMPLES = Path(__file__).parents[2] / "src" / "byeori" / "data" / "samples"
_WORDS = [
    "### Instruction:\nTitle: the spring of words\n\n### Response:\nthe answer",
    "### 본문:\n봄 소식  이  왔다\n\n### 제목:\n봄 소식",
    "a  b   c\t\t d \n\n\n e\t  f\t   g",
]
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _corpus() -> tuple[str, ...]:
    lines = (_SAMPLES / "titles-ko-train.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple([json.loads(line)["title"] for line in lines] + _WORDS * 20)


def _with_bos(bos: str, number: int) -> Any:
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)])


def byte_level(bos: str | None = None, *, gpt4: bool = False, nfc: bool = False, chat: str | None = None) -> Any:
    """GPT-2's kind; with `gpt4` splitting as Llama 3 and Qwen do."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC() if nfc else None
    split = pre_tokenizers.Split(Regex(_GPT4), "isolated")
    core.pre_tokenizer = (
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if gpt4
        else pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(), trainer)
    trim = processors.ByteLevel(trim_offsets=True)
    core.post_processor = processors.Sequence([trim, _with_bos(bos, core.token_to_id(bos))]) if bos else trim
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token="<|endoftext|>", chat_template=chat)


def sentencepiece(
    bos: str = "<s>", eos: str = "</s>", *, space: str = "first", extra: tuple[str, ...] = (), chat: str | None = None
) -> Any:
    """BPE with ▁ for spaces and bytes for rare characters.

    space: `first` is Llama 2's Metaspace, `legacy` its older normalizer; `none` is Gemma's, which puts no ▁ in front.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    if space == "first":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [normalizers.Prepend("▁")] if space == "legacy" else []
        core.normalizer = normalizers.Sequence([*prepend, replace])
    special = ["<unk>", bos, eos, *extra]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, limit_alphabet=220, show_progress=False)
    core.train_from_iterator(_corpus(), trainer)
    learned = json.loads(core.to_str())["model"]
    vocabulary = learned["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    merges = [tuple(pair) for pair in learned["merges"]]
    core.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    strip = [] if space == "none" else [decoders.Strip(" ", left=1)]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    core.post_processor = _with_bos(bos, core.token_to_id(bos))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token="<unk>", chat_template=chat
    )


KINDS: dict[str, Callable[[], Any]] = {
    "gpt2": byte_level,
    "gpt2-bos": lambda: byte_level("<|startoftext|>"),
    "qwen": lambda: byte_level(gpt4=True, nfc=True),
    "llama3": lambda: byte_level("<|begin_of_text|>", gpt4=True),
    "llama2": sentencepiece,
    "llama2-legacy": lambda: sentencepiece(space="legacy"),
    "gemma": lambda: sentencepiece("<bos>", "<eos>", space="none", extra=("<start_of_turn>", "<end_of_turn>")),
}


@cache
def kind(name: str) -> Any:
    """One of KINDS, built once."""
    return KINDS[name]()


_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def token_bytes(tokenizer: Any, number: int) -> bytes:
    """The bytes that a token stands for, from its name alone."""
    name = tokenizer.convert_ids_to_tokens(int(number))
    if name in tokenizer.get_added_vocab():
        return str(name).encode()
    if "<0x00>" not in tokenizer.get_vocab():
        return bytes(_BYTE_OF[character] for character in name)
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    return bytes([int(found[1], 16)]) if found else name.replace("▁", " ").encode()
