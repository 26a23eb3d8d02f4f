"""`byeori preview`: what the model will see, before any weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byeori.commands._rows import begin, load_table, prepare
from byeori.config import PreviewSettings
from byeori.data import audit, row_kinds, template, tokenized
from byeori.distributed.processes import init_processes
from byeori.evaluate import preview as previews
from byeori.support import atomic_files, console
from byeori.support.console import say


@console.quiet_libraries()
def preview(settings: PreviewSettings) -> dict[str, Any]:
    """Show what the model will see, before any weights are loaded; returns the audit."""
    settings, start = begin(settings)
    chosen = template.resolve(settings.template) if settings.template else None
    row_kind = row_kinds.of_table(load_table(settings).rows.column_names, chosen)
    prepared, how = prepare(settings, start, row_kind=row_kind, processes=init_processes())
    count = min(settings.rows * row_kind.examples, len(prepared.train))
    shown = [tokenized.example(prepared.train, index) for index in range(count)]
    names = [prepared.table.name(example.row) for example in shown]
    if row_kind.examples > 1:
        names = [f"{name}, {row_kind.sides[place % row_kind.examples]}" for place, name in enumerate(names)]
    pieces = [previews.pieces(example, how.tokenizer) for example in shown]
    findings = audit.sentences(prepared.audit, cutoff_len=settings.cutoff_len, policy=settings.on_bad_rows)
    words = [*prepared.notes, *findings]
    if settings.html:
        page = previews.page(list(zip(names, pieces, strict=True)), words, prepared.audit)
        atomic_files.write(Path(settings.html), page)
        say(f"Preview in {settings.html}")
    if settings.json_output:
        print(json.dumps(prepared.audit, ensure_ascii=False, indent=1))
    else:
        previews.show(list(zip(names, pieces, strict=True)), words, prepared.audit)
    return prepared.audit
