"""ROUGE-L for Korean: by characters, and by morphemes, where 구청이 and 구청 differ by a particle alone."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

from byeori.errors import ConfigError
from byeori.evaluate.metrics import rouge_l_of


def rouge_l_morphemes(prediction: str, reference: str) -> float:
    """Return ROUGE-L over morphemes, 0 to 100, with the analysis of kiwipiepy; punctuation does not count.

    Of 구청이 발표했다 the morphemes are 구청, 이, 발표, 하, 었, 다.

    Raises:
        ConfigError: if kiwipiepy is not installed.
    """
    return rouge_l_of(_morphemes(prediction), _morphemes(reference), prediction, reference)


def _morphemes(text: str) -> list[str]:
    tokens: Any = _kiwi().tokenize(unicodedata.normalize("NFC", text))
    return [token.form.lower() for token in tokens if not token.tag.startswith(("SF", "SP", "SS", "SE", "SO", "SW"))]


@cache
def _kiwi() -> Any:
    try:
        from kiwipiepy import Kiwi
    except ImportError:
        raise ConfigError(
            "--metric rouge_l_morphemes needs kiwipiepy; install it with `pip install 'byeori[ko]'`"
        ) from None
    return Kiwi()
