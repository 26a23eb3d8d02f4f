"""Which tokens end an answer.

A chat template may end a turn with another token than the tokenizer's end-of-text: base models of the Qwen kind end a
text with <|endoftext|>, and their chat template ends a turn with <|im_end|>. Who was trained on turns never writes the
former, so whoever generates has to know the latter too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byeori.data.chat import turn_end
from byeori.errors import ByeoriError

_CONFIG = "generation_config.json"


def stop_ids(tokenizer: Any, configured: Any) -> list[int]:
    """Every token that ends an answer. configured: eos_token_id of a generation config: one, several, or None."""
    known = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in [tokenizer.eos_token_id, turn_end(tokenizer), *known] if token is not None})


def record(folder: Path) -> None:
    """Name the tokens in the generation config of a model's folder, for everybody else who generates with it."""
    from byeori.model.load import load_tokenizer

    try:
        tokenizer, _ = load_tokenizer(str(folder))
    except ByeoriError:  # a model without one
        return
    kept, config = (_read(folder / name) for name in (_CONFIG, "config.json"))
    before = kept.get("eos_token_id", config.get("eos_token_id"))
    ends = stop_ids(tokenizer, before)
    if set(ends) - set(before if isinstance(before, list) else [before]):
        text = json.dumps({**kept, "eos_token_id": ends}, indent=2, ensure_ascii=False)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
