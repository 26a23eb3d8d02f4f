"""`byeori preview`: what the model will see, before any weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byeori.artifacts.starting_model import begin
from byeori.commands._rows import group_of, load_table, prepare
from byeori.config import PreviewSettings
from byeori.data import audit, preference, template, tokenized
from byeori.distributed import processes as parallel
from byeori.evaluate import preview as previews
from byeori.support import atomic_files, console
from byeori.support.console import say


def preview(settings: PreviewSettings) -> dict[str, Any]:
    """Show what the model will see, before any weights are loaded; returns the audit."""
    console.quiet_libraries()
    settings, start = begin(settings)
    chosen = template.resolve(settings.template) if settings.template else None
    group = group_of(load_table(settings).rows.column_names, chosen)
    prepared, how = prepare(settings, start, group=group, processes=parallel.start())
    shown = [
        tokenized.example(prepared.train, index) for index in range(min(settings.rows * group, len(prepared.train)))
    ]
    names = [prepared.table.name(example.row) for example in shown]
    if group == 2:
        names = [f"{name}, {preference.SIDES[place % 2]}" for place, name in enumerate(names)]
    pieces = [previews.pieces(example, how.tokenizer) for example in shown]
    findings = audit.sentences(prepared.found, cutoff_len=settings.cutoff_len, policy=settings.on_bad_rows)
    words = [*prepared.notes, *findings]
    if settings.html:
        page = previews.page(list(zip(names, pieces, strict=True)), words, prepared.found)
        atomic_files.write(Path(settings.html), page)
        say(f"Preview in {settings.html}")
    if settings.json_output:
        print(json.dumps(prepared.found, ensure_ascii=False, indent=1))
    else:
        previews.show(list(zip(names, pieces, strict=True)), words, prepared.found)
    return prepared.found
