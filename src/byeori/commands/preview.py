"""`byeori preview`: what the model will see, before any weights are loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.artifacts.model_card import public_name
from byeori.commands._fits import served_facts
from byeori.commands._rows import begin, load_table, prepare
from byeori.config import PreviewSettings
from byeori.data import audit, row_kinds, template, tokenized
from byeori.data.tokenize import Encoding, Example
from byeori.distributed.processes import init_processes
from byeori.evaluate import preview as previews
from byeori.model import load
from byeori.model.trial import sharing_note
from byeori.support import atomic_files, console
from byeori.support.console import say
from byeori.support.language import tr

_OTHERS = 2_000  # examples that the page compares and counts trained tokens of
_FACTS = ("rows", "train_rows", "validation_rows", "tokens", "target_tokens", "template")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewResult:
    """What training would see.

    rows: usable rows. tokens, target_tokens: of all of them, and those that are trained. shared_prefix: fraction of the
    tokens in prefixes that examples share. notes: what the command printed above the rows. audit: what --json prints.
    """

    rows: int
    train_rows: int
    validation_rows: int
    tokens: int
    target_tokens: int
    shared_prefix: float
    template: str
    notes: tuple[str, ...]
    audit: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return what --json prints."""
        return self.audit


def _as_json(name: str, example: Example, encoding: Encoding) -> dict[str, Any]:
    """Return one shown example for scripts; docs/chats.md says what the fields mean."""
    return {
        "name": name,
        "row": example.row,
        "message": example.turn or None,
        "token_ids": list(example.token_ids),
        "texts": [encoding.tokenizer.decode([token]) for token in example.token_ids],
        "trained": [list(span) for span in example.targets],
    }


@console.quiet_libraries()
def preview(settings: PreviewSettings) -> PreviewResult:
    """Show the tokens that training will see. No weights are loaded.

    Raises:
        ByeoriError: if a row, the template or the tokenizer is wrong.
    """
    settings, start = begin(settings)
    chosen = template.resolve(settings.template) if settings.template else None
    row_kind = row_kinds.for_text(
        row_kinds.of_table(load_table(settings).rows.column_names, chosen), settings.text_column
    )
    prepared, how = prepare(settings, start, row_kind=row_kind, processes=init_processes())
    starts = tokenized.row_starts(prepared.train)
    count = starts[min(settings.rows, len(starts) - 1)]
    shown = [tokenized.example(prepared.train, line) for line in range(count)]
    names = [prepared.table.name(example.row) for example in shown]
    if row_kind.examples > 1:
        names = [f"{name}, {row_kind.sides[place % row_kind.examples]}" for place, name in enumerate(names)]
    elif any(example.turn for example in shown):
        names = [f"{name}, message {example.turn}" for name, example in zip(names, shown, strict=True)]
    elif any(example.piece for example in shown):
        names = [f"{name}, piece {example.piece}" for name, example in zip(names, shown, strict=True)]
    pieces = [previews.pieces(example, how.tokenizer) for example in shown]
    findings = audit.sentences(prepared.audit, cutoff_len=settings.cutoff_len, policy=settings.on_bad_rows)
    served, facts = served_facts(start, how, shown)
    trusted = settings.trust_remote_code is not None
    shares = sharing_note(load.load_config(start.base, revision=start.revision, trust_remote_code=trusted))
    words = [*prepared.notes, *facts, *findings, *([shares] if shares else [])]
    if settings.html:
        rows = tokenized.Rows(table=prepared.train)
        others = [tokenized.example(prepared.train, line) for line in range(min(len(prepared.train), _OTHERS))]
        targets = [sum(end - start for start, end in example.targets) for example in others]
        page = previews.page(
            list(zip(names, others[:count] if count <= _OTHERS else shown, strict=True)),
            others,
            how.tokenizer,
            words,
            prepared.audit,
            title=tr("What {model} will see", model=public_name(str(settings.base_model))),
            lengths={"of-base": rows.lengths().tolist(), "of-tuned": targets},
            cutoff_len=settings.cutoff_len,
        )
        atomic_files.write(Path(settings.html), page)
        say(f"Preview in {settings.html}")
    if settings.json_output:
        examples = [_as_json(*pair, how) for pair in zip(names, shown, strict=True)]
        report = prepared.audit | {"served": served} | ({"examples": examples} if settings.tokens else {})
        print(json.dumps(report, ensure_ascii=False, indent=1))
    else:
        previews.show(list(zip(names, pieces, strict=True)), words, prepared.audit)
    return PreviewResult(
        notes=tuple(words),
        audit=prepared.audit,
        shared_prefix=prepared.audit.get("shared_prefix", 0.0),
        **{name: prepared.audit[name] for name in _FACTS},
    )
