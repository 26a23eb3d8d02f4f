"""The screen to try a model: base and tuned answer side by side, judged blind if wanted, kept as pairs for DPO."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from byeori import config
from byeori.artifacts import layout
from byeori.data import template as templates
from byeori.data.template import Template
from byeori.errors import ConfigError
from byeori.evaluate.chat import pair
from byeori.evaluate.engines.base import Side
from byeori.evaluate.generate import json_line
from byeori.studio import answering, jobs, pages, questions, settings_text
from byeori.studio.jobs import Job
from byeori.studio.questions import Question
from byeori.studio.workspace import Workspace
from byeori.support import atomic_files
from byeori.support.foreign_files import json_lines
from byeori.support.text_files import read_text

SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
_JUDGEMENTS, _PAIRS = "judgements.jsonl", "pairs.jsonl"
_CHOICES = ("base", "tuned", "tie")


def screen(request: Request, error: str = "") -> Response:
    """Show the conversation with a model."""
    space = pages.workspace(request)
    models = [name for name in space.model_folders() if not _is_result(space, name)]
    name = request.query_params.get("run") or space.draft("try").get("model") or (models[0] if models else "")
    folder = _folder(space, name) if name else None
    template = _template(folder) if folder else None
    draft = space.draft("try")
    values = {key: draft[key] for key in SAMPLING if key in draft}
    fields = settings_text.fields(config.ChatSettings, values)
    return pages.render(
        request,
        "try.html",
        here="try",
        error=error,
        models=models,
        name=name,
        columns=template.prompt_columns if template else ["message"],
        optional=template.optional_columns if template else set(),
        is_chat=template is None,
        draft=draft,
        kind=config.ChatSettings,
        fields=[field for group in fields.values() for field in group if field["name"] in SAMPLING],
        live=_live(space, name) if name else None,
        counts=counts(space).get(name),
        pairs=_pairs(space),
        copies=pages.copies(
            "chat", config.ChatSettings, {"model": name, "base": bool(folder and _is_adapter(folder)) or None} | values
        ),
    )


def _is_result(space: Workspace, name: str) -> bool:
    return name.startswith("checkpoint-") or (space.folder / name / layout.EXPORT_REPORT).is_file()


def _folder(space: Workspace, name: str) -> Path:
    folder = space.inside(name, models=True)
    if not any((folder / file).is_file() for file in (layout.ADAPTER_CONFIG, layout.CONFIG)):
        raise ConfigError(f"there is no model in {name}; a run has one when it is finished")
    return folder


def _is_adapter(folder: Path) -> bool:
    return (folder / layout.ADAPTER_CONFIG).is_file()


def _template(folder: Path) -> Template | None:
    path = folder / layout.TEMPLATE
    if not path.is_file():
        return None
    text = read_text(path, ConfigError)
    return None if text.strip() == templates.CHAT else templates.parse(text, path.name)


def _live(space: Workspace, name: str) -> dict[str, Any]:
    """Return the conversation and the state of the process that answers."""
    folder = questions.folder_of(space, name)
    current = questions.conversation(folder)
    asked = [question for question in questions.every(folder) if question.conversation == current]
    job = _worker(space, name)
    state = job.state if job else "off"
    ready = state == "running" and (folder / answering.READY).exists()
    waiting = any(question.done is None for question in asked)
    shown = [_shown(question) for question in asked[-30:]]
    error = job.error() if job and waiting and state in ("failed", "killed") else ""
    loading = state == "running" and not ready
    return {
        "state": "ready" if ready else "loading" if loading else "off",
        "moving": loading or (waiting and not error and state == "running"),
        "turns": shown,
        "error": error,
        "version": f"{state}-{ready}-{sum(len(side['text']) for turn in shown for side in turn['sides'])}-"
        f"{sum(turn['finished'] for turn in shown)}-{len(shown)}-{''.join(turn['judged'] for turn in shown)}",
    }


def _shown(question: Question) -> dict[str, Any]:
    done = question.done
    hidden = question.blind and not question.judged and len(question.sides) > 1
    asked = question.asked.items() if isinstance(question.asked, dict) else [("message", question.asked[-1]["content"])]
    return {
        "number": question.number,
        "asked": list(asked),
        "hidden": hidden,
        "judged": question.judged,
        "finished": done is not None,
        "error": (done or {}).get("error", ""),
        "sides": [
            {
                "name": "AB"[place] if hidden else side,
                "side": place,
                "text": question.answer(side),
                "facts": (done or {}).get(side) if not hidden else None,
            }
            for place, side in enumerate(question.sides)
        ],
    }


def _worker(space: Workspace, name: str) -> Job | None:
    return jobs.latest(space, "try", output=name)


def counts(space: Workspace) -> dict[str, dict[str, Any]]:
    """Return for each model how often it was judged better than its base, with Wilson's 95% interval of that share.

    Ties are counted, and left out of the share.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in _lines(space.folder / _JUDGEMENTS):
        if line.get("better") in _CHOICES:
            one = found.setdefault(str(line.get("model")), {"base": 0, "tuned": 0, "tie": 0, "blind": 0})
            one[line["better"]] += 1
            one["blind"] += bool(line.get("blind"))
    for one in found.values():
        if count := one["base"] + one["tuned"]:
            z, share = 1.959964, one["tuned"] / count
            middle = (share + z * z / (2 * count)) / (1 + z * z / count)
            half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
            one |= {"share": share, "low": middle - half, "high": middle + half}
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return list(json_lines(path))
    except OSError:
        return []


# ---- what a person does ----------------------------------------------------------------------------------------------


@pages.action(screen)
def ask(request: Request, form: FormData) -> Response:
    """Ask a question; the process that answers is started if there is none."""
    space = pages.workspace(request)
    name = str(form.get("run", ""))
    folder = _folder(space, name)
    template = _template(folder)
    draft = {key: value for key, value in space.draft("try").items() if key not in (*SAMPLING, "blind")}
    draft |= {
        key: value for key, value in settings_text.from_form(config.ChatSettings, dict(form)).items() if key in SAMPLING
    }
    checked = config.check(config.ChatSettings, {"model": name} | {key: draft[key] for key in SAMPLING if key in draft})
    sampling = {key: getattr(checked, key) for key in SAMPLING}
    place = questions.folder_of(space, name)
    asked = messages_or_columns(place, template, form)
    space.save_draft("try", draft | {"model": name, "blind": bool(form.get("blind"))})
    _start(space, name, place)
    sides: list[Side] = ["base", "tuned"] if _is_adapter(folder) else ["tuned"]
    questions.ask(place, asked, sampling, sides, blind=bool(form.get("blind")))
    return pages.go(pages.address("try", run=name))


def messages_or_columns(
    place: Path, template: Template | None, form: FormData
) -> dict[str, str] | list[dict[str, str]]:
    """Return the columns of a question, or the messages up to it."""
    columns = template.prompt_columns if template else ["message"]
    values = {name: str(form.get(f"column:{name}", "")).replace("\r\n", "\n") for name in columns}
    optional = template.optional_columns if template else set()
    if empty := [name for name, value in values.items() if not value.strip() and name not in optional]:
        raise ConfigError(f"{empty[0]} is empty; write what the model shall answer")
    if template:
        return values
    system = str(form.get("system", "")).strip()
    messages = [{"role": "system", "content": system}] if system else []
    current = questions.conversation(place)
    for question in (item for item in questions.every(place) if item.conversation == current):
        if question.done and not question.done.get("error") and isinstance(question.asked, list):
            said = question.answer(question.judged if question.judged in question.sides else "tuned")
            messages += [question.asked[-1], {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": values["message"]}]


def _start(space: Workspace, name: str, place: Path) -> None:
    """Start the process that answers for a model, and end that of another: two models may not fit into memory."""
    for job in jobs.every(space):
        if job.command == "try" and job.state == "running":
            if job.output == name:
                return
            jobs.stop(job)
    (place / answering.READY).unlink(missing_ok=True)
    jobs.worker(space, "byeori.studio.answering", name, str(place), command="try", output=name)


@pages.action(screen)
def load(request: Request, form: FormData) -> Response:
    """Choose a model and load it."""
    space = pages.workspace(request)
    name = str(form.get("run", ""))
    _folder(space, name)
    space.change_draft("try", model=name)
    _start(space, name, questions.folder_of(space, name))
    return pages.go(pages.address("try", run=name))


@pages.action(screen)
def unload(request: Request, form: FormData) -> Response:
    """End the process, which gives its memory back."""
    space = pages.workspace(request)
    name = str(form.get("run", ""))
    if (job := _worker(space, name)) and job.state == "running":
        jobs.stop(job)
    return pages.go(pages.address("try", run=name))


@pages.action(screen)
def anew(request: Request, form: FormData) -> Response:
    """Begin another conversation."""
    space = pages.workspace(request)
    name = str(form.get("run", ""))
    _folder(space, name)
    questions.start_anew(questions.folder_of(space, name))
    return pages.go(pages.address("try", run=name))


@pages.action(screen)
def judge(request: Request, form: FormData) -> Response:
    """Write down which answer is better, and show whose it is."""
    space = pages.workspace(request)
    name, question = _question(space, form)
    place = str(form.get("better", ""))
    better = question.sides[int(place)] if place in ("0", "1") and len(question.sides) == 2 else place
    if better not in _CHOICES:
        raise ConfigError("give a thumb to one of the two answers, or to neither")
    line = {
        "model": name,
        "better": better,
        "blind": question.blind,
        "asked": question.asked,
        "answers": {side: question.answer(side) for side in question.sides},
        "sampling": question.sampling,
        "time": round(time.time()),
    }
    _append(space.folder / _JUDGEMENTS, line)
    replace(question, judged=better).write()
    return pages.go(pages.address("try", run=name))


@pages.action(screen)
def keep(request: Request, form: FormData) -> Response:
    """Keep a pair for `byeori dpo`: one of the answers as the better one, or one that is written."""
    space = pages.workspace(request)
    name, question = _question(space, form)
    place = str(form.get("better", ""))
    if place not in [str(at) for at in range(len(question.sides))]:
        raise ConfigError("choose the answer of the pair")
    picked = question.answer(question.sides[int(place)])
    written = str(form.get("written", "")).replace("\r\n", "\n").strip()
    others = [question.answer(side) for at, side in enumerate(question.sides) if str(at) != place]
    if not written and not others:
        raise ConfigError("there is one answer only; write a better one")
    found = pair(question.asked, written, picked) if written else pair(question.asked, picked, others[0])
    _append(_file_for(space, found), found)
    return pages.go(pages.address("try", run=name))


def _pairs(space: Workspace) -> dict[str, int]:
    """Return how many pairs each file of them has."""
    paths = [space.folder / _PAIRS, *sorted(space.folder.glob("pairs-[0-9]*.jsonl"))]
    return {path.name: len(lines) for path in paths if (lines := _lines(path))}


def _file_for(space: Workspace, pair: dict[str, Any]) -> Path:
    """Return pairs.jsonl, or another one if that has rows of other columns, since dpo reads one kind."""
    for number in itertools.count(1):
        path = space.folder / (f"pairs-{number}.jsonl" if number > 1 else _PAIRS)
        lines = _lines(path)
        if not path.exists() or (lines and set(lines[-1]) == set(pair)):
            break
    return path


def _question(space: Workspace, form: FormData) -> tuple[str, Question]:
    name, number = str(form.get("run", "")), str(form.get("number", ""))
    _folder(space, name)
    for question in questions.every(questions.folder_of(space, name)):
        if str(question.number) == number and question.done:
            return name, question
    raise ConfigError("this question has no answer yet")


def _append(path: Path, line: dict[str, Any]) -> None:
    with atomic_files.disk_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json_line(line))


def live(request: Request) -> Response:
    """The conversation while it is answered; nothing if nothing is new."""
    space = pages.workspace(request)
    name = request.query_params.get("run", "")
    _folder(space, name)
    found = _live(space, name)
    if request.query_params.get("seen") == found["version"]:
        return Response(status_code=204)
    return pages.render(request, "try_live.html", live=found, name=name)


routes = [
    Route("/try", pages.view(screen)),
    Route("/try-live", pages.view(live)),
    Route("/try-ask", ask, methods=["POST"]),
    Route("/try-load", load, methods=["POST"]),
    Route("/try-unload", unload, methods=["POST"]),
    Route("/try-new", anew, methods=["POST"]),
    Route("/try-judge", judge, methods=["POST"]),
    Route("/try-keep", keep, methods=["POST"]),
]
