"""`byeori publish`: upload a finished adapter or merged model to the Hub."""

from __future__ import annotations

from pathlib import Path

from byeori.config import PublishSettings
from byeori.export import publish as publishing


def publish(settings: PublishSettings) -> publishing.PublishResult:
    """Upload a finished adapter or merged model to the Hub."""
    return publishing.publish(
        folder=Path(settings.folder),
        repo_id=settings.repo_id,
        private=settings.private,
        dry_run=settings.dry_run,
        revision=settings.revision,
        commit_message=settings.commit_message,
    )
