"""`byeori merge`: write an adapter into its base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from byeori.config import MergeSettings
from byeori.export import merge as merging
from byeori.export.merge_plan import Progress
from byeori.support import console
from byeori.support.console import say


@console.quiet_libraries()
def merge(settings: MergeSettings) -> merging.MergeResult:
    """Merge an adapter into its base, as a model of its own."""
    result = merging.merge(
        adapter=settings.peft_model_path,
        base=settings.base_model_name_or_path,
        output_dir=Path(settings.output_dir),
        dtype=settings.dtype,
        onto=settings.onto,
        verify=settings.verify,
        overwrite=settings.overwrite_output_dir,
        phase=_phase,
    )
    for note in result.notes:
        say(note)
    say(f"Merged model in {settings.output_dir}")
    return result


@contextmanager
def _phase(name: str) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere the name, and a line for every quarter."""
    told = 0

    def line(done: int, total: int) -> None:
        nonlocal told
        if done * 4 // total > told and done < total:
            told = done * 4 // total
            say(f"{name} {done}/{total}")

    if not console.moving():
        say(name)
        yield line
        return
    with console.progress(name) as on_progress:
        yield on_progress
