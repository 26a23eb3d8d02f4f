"""The tokens that end an answer.

A chat template may end a turn with another token than the tokenizer's end-of-text: base models such as Qwen's end a
text with <|endoftext|>, and their chat template ends a turn with <|im_end|>. A model trained on turns never writes the
former, so generation has to stop at the latter too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from byeori.data.chat import turn_end
from byeori.errors import ByeoriError
from byeori.model import load
from byeori.support.foreign_files import json_record

_CONFIG = "generation_config.json"
_Token = Annotated[int, Field(ge=-1, lt=1 << 31)]


@with_config(ConfigDict(extra="allow"))
class _Ends(TypedDict, total=False):
    eos_token_id: _Token | list[_Token] | None


def stop_ids(tokenizer: Any, configured: Any) -> list[int]:
    """Return every token that ends an answer. configured: a generation config's eos_token_id (one, a list or None)."""
    known = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, turn_end(tokenizer), *known] if token is not None})


def of_folder(tokenizer: Any, folder: Path) -> list[int]:
    """Return every token that ends an answer of the model in a folder."""
    generation, config = (generation_config(folder, name) for name in (_CONFIG, "config.json"))
    return stop_ids(tokenizer, generation.get("eos_token_id", config.get("eos_token_id")))


def record(folder: Path) -> None:
    """Add the stop tokens to the generation config of a model's folder, for other programs that generate with it."""
    try:
        tokenizer, _ = load.load_tokenizer(str(folder))
    except ByeoriError:  # a model without one
        return
    before = configured(folder)
    ids = stop_ids(tokenizer, before)
    if set(ids) - set(before):
        text = json.dumps({**generation_config(folder), "eos_token_id": ids}, indent=2, ensure_ascii=False)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def configured(folder: Path) -> list[int]:
    """Return the stop tokens in the generation config of a model's folder, or else in its config."""
    generation, config = (generation_config(folder, name) for name in (_CONFIG, "config.json"))
    ids = generation.get("eos_token_id", config.get("eos_token_id"))
    return [number for number in (ids if isinstance(ids, list) else [ids]) if number is not None]


def generation_config(folder: Path, name: str = _CONFIG) -> dict[str, Any]:
    """Return a model folder's generation config, or its config by that name; {} without one.

    Raises:
        ModelError: if it is damaged, or its eos_token_id is no token.
    """
    return dict(json_record(folder / name, _Ends)) if (folder / name).is_file() else {}
