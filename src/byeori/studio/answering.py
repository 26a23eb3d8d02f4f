"""The process that keeps a model loaded and answers the questions in a folder: `python -m byeori.studio.answering`.

It is started by the page and outlives it. It ends after a while without questions, or by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from byeori.artifacts import saved_model
from byeori.data.tokenize import Encoding, encode_prompt
from byeori.distributed.processes import init_processes
from byeori.errors import ByeoriError
from byeori.evaluate.engines.base import Answer, Sampling, Side
from byeori.evaluate.engines.plain import Plain
from byeori.studio import questions
from byeori.studio.questions import Question
from byeori.support import atomic_files, console
from byeori.support.console import say
from byeori.support.language import tr, translated
from byeori.support.text_files import sentence

_IDLE = 900.0  # seconds without a question, after which the memory is given back
READY = "ready"  # a file that is there while the model is loaded


@console.quiet_libraries()
def serve(model: str, folder: Path, *, idle: float = _IDLE) -> None:
    """Load a model and answer until nothing has been asked for `idle` seconds."""
    saved = saved_model.find(model)
    chosen = saved_model.template_of(saved, None)
    encoding = saved_model.encoding(saved, chosen)
    say(f"Loading {model}")
    weights = saved_model.load_weights(saved, "auto", init_processes().device)
    engine = Plain(weights, saved.tokenizer, chosen.suffix if chosen else "")
    say("Ready")
    (folder / READY).touch()
    last = time.monotonic()
    try:
        while time.monotonic() - last < idle:
            waiting = [question for question in questions.every(folder) if question.done is None]
            for question in waiting:
                _answer(question, engine, encoding, saved.max_length)
                last = time.monotonic()
            if not waiting:
                time.sleep(0.05)
    finally:
        (folder / READY).unlink(missing_ok=True)


def _answer(question: Question, engine: Plain, encoding: Encoding, max_length: int | None) -> None:
    """Answer one question, writing each piece as it comes."""
    found: dict[str, Any] = {}
    try:
        row = question.asked if isinstance(question.asked, dict) else {"messages": question.asked}
        prompt = encode_prompt(row, encoding)
        sampling = Sampling(max_length=max_length, **question.sampling)
        for side in question.sides:
            began = time.monotonic()
            answer = _stream(engine, prompt, sampling, side, question.folder / f"{question.name}-{side}.txt")
            facts = {"tokens": answer.tokens, "stopped": answer.stopped}
            found[side] = facts | {"seconds": round(time.monotonic() - began, 2)}
    except ByeoriError as error:
        found["error"] = sentence(error)
    atomic_files.write(question.folder / f"{question.name}-done.json", json.dumps(found))


def _stream(engine: Plain, prompt: list[int], sampling: Sampling, side: Side, path: Path) -> Answer:
    """Return the answer of one side; its text is in the file while it is generated, piece by piece."""
    answers: dict[int, Answer] = {}
    with path.open("w", encoding="utf-8") as file:

        def emit(text: str) -> None:
            file.write(text)
            file.flush()

        engine.answers({0: prompt}, sampling, side, answers.__setitem__, emit)
    atomic_files.write(path, answers[0].text)
    return answers[0]


if __name__ == "__main__":
    try:
        serve(sys.argv[1], Path(sys.argv[2]))
    except ByeoriError as problem:
        print(f"{tr('error: ')}{translated(sentence(problem))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
