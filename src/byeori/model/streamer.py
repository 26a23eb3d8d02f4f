"""Pass generated text on while the model still writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def text_streamer(tokenizer: Any, emit: Callable[[str], None]) -> Any:
    """Return transformers' streamer for one prompt, passing each finished piece of the answer to `emit`."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """A TextStreamer that prints nothing itself."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text + ("\n" if stream_end else ""))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
