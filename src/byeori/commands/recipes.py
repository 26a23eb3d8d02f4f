"""Every job under its command's name; merge and publish are wired here. Settings objects stop here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byeori.commands._rows import preview
from byeori.commands.generate import CompareResult, compare, generate
from byeori.commands.train import TrainResult, dpo, sft
from byeori.config import MergeSettings, PublishSettings
from byeori.export import merge as merging
from byeori.export import publish as publishing
from byeori.model import demo_model as embedded
from byeori.support import console
from byeori.support.console import say


def merge(settings: MergeSettings) -> Any:
    """Write an adapter into its base; returns what merge_report.json holds."""
    console.quiet_libraries()
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not console.moving()) as progress:
        task = progress.add_task("Merging", total=None)

        def on_progress(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total)

        result = merging.merge(
            adapter=settings.peft_model_path,
            base=settings.base_model_name_or_path,
            output_dir=Path(settings.output_dir),
            dtype=settings.dtype,
            verify=settings.verify,
            overwrite=settings.overwrite_output_dir,
            on_progress=on_progress,
        )
    say(f"Merged model in {settings.output_dir}")
    return result


def publish(settings: PublishSettings) -> Any:
    """Upload a finished adapter or merged model to the Hub."""
    return publishing.publish(
        folder=Path(settings.folder),
        repo_id=settings.repo_id,
        private=settings.private,
        dry_run=settings.dry_run,
        revision=settings.revision,
        commit_message=settings.commit_message,
        on_line=print,
    )


def demo_model() -> Path:
    """The folder of the embedded model."""
    console.quiet_libraries()
    return embedded.embedded_model(say)


__all__ = [
    "CompareResult",
    "TrainResult",
    "compare",
    "demo_model",
    "dpo",
    "generate",
    "merge",
    "preview",
    "publish",
    "sft",
]
