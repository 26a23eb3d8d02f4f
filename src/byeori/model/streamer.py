"""Pass generated text on while the model still writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def text_streamer(tokenizer: Any, emit: Callable[[str], None], end: str = "") -> Any:
    """Return transformers' streamer for one prompt, passing each finished piece of the answer to `emit`.

    The pieces together are the answer without white space around it, and a line break. end: text that ends it.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """A TextStreamer that prints nothing itself."""

        text, shown = "", ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            whole, found, _ = self.text.partition(end) if end else (self.text, "", "")
            # what may be the beginning of the end waits for the next piece
            begun = [length for length in range(1, len(end)) if whole.endswith(end[:length])]
            waiting = max(begun, default=0) if not (found or stream_end) else 0
            ready = whole[: len(whole) - waiting].strip()
            emit(ready[len(self.shown) :] + ("\n" if stream_end else ""))
            self.shown = ready

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
