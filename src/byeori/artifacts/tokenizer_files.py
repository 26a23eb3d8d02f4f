"""A tokenizer's files as they came, byte for byte; only the chat template of the run is added.

Tokenizers that are saved again break readers: transformers 4 cannot open what transformers 5 writes for some, and
llama.cpp's converter needs the `tokenizer.model` that is not written back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from byeori.artifacts import layout
from byeori.errors import ModelError
from byeori.support.foreign_files import json_file
from byeori.support.text_files import read_text

TOKENIZER_FILES = (
    "tokenizer.json",
    layout.TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "vocab.bpe",
    "bpe.codes",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
)
CHAT_TEMPLATE = "chat_template.jinja"
_OLD_CHAT_TEMPLATE = "chat_template.json"
_MORE_CHAT_TEMPLATES = "additional_chat_templates"
PATTERNS = (*TOKENIZER_FILES, CHAT_TEMPLATE, _OLD_CHAT_TEMPLATE, f"{_MORE_CHAT_TEMPLATES}/*.jinja")
_ANY_CLASS = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")
# the parts of tokenizer.json that decide which ids a text has
_DECIDING = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")


def there(folder: Path) -> bool:
    """Return whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def copy(source: Path, folder: Path, *, chat_template: Any, class_name: str | None = None) -> None:
    """Copy a tokenizer's files.

    chat_template: the one that `folder` will have, as transformers holds it: a text, texts by name, or None. Files
    that say the same already are copied too. class_name: of the loaded tokenizer, for a folder without the config.json
    that would tell transformers which class reads these files.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    changes: dict[str, Any] = {}
    if isinstance(chat_template, str) and chat_template != chat_template_of(source):
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        changes["chat_template"] = chat_template  # where it stands there too: llama.cpp's converter prefers it
    else:
        for name in (CHAT_TEMPLATE, _OLD_CHAT_TEMPLATE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if (source / _MORE_CHAT_TEMPLATES).is_dir():
            shutil.copytree(source / _MORE_CHAT_TEMPLATES, folder / _MORE_CHAT_TEMPLATES)
    config = _json(source / layout.TOKENIZER_CONFIG)
    changes = {name: value for name, value in changes.items() if name in config}
    if class_name and _bare(class_name) != _bare(config.get("tokenizer_class")):
        # a name that transformers 4 and 5 both know
        changes["tokenizer_class"] = "PreTrainedTokenizerFast" if _bare(class_name) == "any" else class_name
    if changes:
        text = json.dumps({**config, **changes}, indent=2, ensure_ascii=False)
        (folder / layout.TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def add(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add tokens to a loaded tokenizer: found in any text, whole, also inside words and beside spaces."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def write_added(folder: Path, tokens: Mapping[str, int]) -> None:
    """Write tokens that were added into the files of a tokenizer, and leave all else in them as it is.

    Raises:
        ModelError: if the tokenizer has no tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "--add_tokens needs a tokenizer with a tokenizer.json; save it once with transformers' save_pretrained"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    whole = _json(path)
    whole["added_tokens"] += [{"id": number, "content": token, **flags} for token, number in tokens.items()]
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    config = _json(folder / layout.TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(number): {"content": token} | flags for token, number in tokens.items()}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / layout.TOKENIZER_CONFIG).write_text(text + "\n", encoding="utf-8")


def chat_template_of(folder: Path) -> Any:
    """Return the chat template of a folder as transformers reads it: a text, texts by name, or None."""
    if (folder / _MORE_CHAT_TEMPLATES).is_dir():
        named = {path.stem: read_text(path, ModelError) for path in (folder / _MORE_CHAT_TEMPLATES).glob("*.jinja")}
        if (folder / CHAT_TEMPLATE).is_file():
            named["default"] = read_text(folder / CHAT_TEMPLATE, ModelError)
        return named
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE, ModelError)
    value = _json(folder / layout.TOKENIZER_CONFIG).get("chat_template")
    if value is None:
        value = _json(folder / _OLD_CHAT_TEMPLATE).get("chat_template")
    if isinstance(value, list):
        return {item["name"]: item["template"] for item in value}
    return value


def same_tokens(one: Path, other: Path) -> bool:
    """Return whether two folders' tokenizers give every text the same ids, as far as their tokenizer.json tells."""
    paths = [folder / "tokenizer.json" for folder in (one, other)]
    if not all(path.is_file() for path in paths):
        return False
    contents = [path.read_bytes() for path in paths]
    if contents[0] == contents[1]:
        return True
    first, second = (_json(path) for path in paths)
    return all(first.get(part) == second.get(part) for part in _DECIDING)


def _bare(name: object) -> str:
    """A class's name without `Fast`; `any` for the classes that only read tokenizer.json."""
    text = str(name).removesuffix("Fast")
    return "any" if text in _ANY_CLASS else text


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json_file(path, advice="copy or download it again")
    return value if isinstance(value, dict) else {}
