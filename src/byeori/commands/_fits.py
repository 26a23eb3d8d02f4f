"""Do the tokenized rows fit the model at hand? Found before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byeori.artifacts.saved_model import SavedModel
from byeori.artifacts.starting_model import StartingModel
from byeori.config import PreviewSettings, TrainSettings
from byeori.data import chat, tokenized
from byeori.data.template_facts import template_facts
from byeori.data.tokenize import Encoding, Example
from byeori.evaluate import stop_tokens
from byeori.model import embedding_rows, load
from byeori.model.fingerprint import Stored

if TYPE_CHECKING:
    from datasets import Dataset

_NAMED = 6  # tokens that a note lists


def check_embedding(
    settings: TrainSettings | PreviewSettings,
    start: StartingModel,
    tables: Sequence[Dataset],
    sample: Sequence[Example],
) -> list[str]:
    """Compare the tokens of the rows with the model's embedding; returns notes about rows of it without training.

    tables: all tokenized rows. sample: examples of the first of them.

    Raises:
        ModelError: if a token has no row in the embedding.
    """
    stored = embedding_rows.embeddings(start.folder) if start.folder else []
    rows = _embedding_rows(stored, start, start.adapter, trusted=settings.trust_remote_code is not None)
    rows = max(rows, len(start.tokenizer)) if settings.add_tokens else rows
    embedding_rows.check_ids({*map(tokenized.highest_token, tables)}, rows, start.tokenizer, start.base)
    added = sorted(start.tokenizer.added_tokens_decoder)
    used = {int(number) for example in sample for number in example.token_ids}.intersection(added)
    bad = sorted({number for matrix in stored for number in embedding_rows.untrained(matrix, used, added)})
    wanted = getattr(settings, "lora_target_modules", [])
    bad = [number for number in bad if str(number) not in getattr(settings, "trainable_token_indices", [])]
    if not bad or {"embed_tokens", "lm_head"} <= set(wanted):
        return []
    names = ", ".join(start.tokenizer.convert_ids_to_tokens(bad[:_NAMED])) + (", ..." if len(bad) > _NAMED else "")
    return [
        f"{start.base} was never trained on {names}, which the template writes: such rows of its embedding are zero or "
        "equal. Start from the instruction-tuned model, give a --chat_template whose tokens it knows, or train these "
        "rows with --trainable_token_indices"
    ]


def check_prompts(saved: SavedModel, tokenizer: Any, prompts: Iterable[Sequence[int]]) -> None:
    """Raise where a model that answers has no row of the embedding for a token of the prompts.

    Raises:
        ModelError: naming the first of them.
    """
    stored = embedding_rows.embeddings(Path(saved.base)) if Path(saved.base).is_dir() else []
    rows = _embedding_rows(stored, saved, saved, trusted=False)
    embedding_rows.check_ids({max(ids) for ids in prompts if ids}, rows, tokenizer, saved.name)


def _embedding_rows(
    stored: Sequence[Stored], start: StartingModel | SavedModel, adapter: SavedModel | None, *, trusted: bool
) -> int:
    """Return how many tokens a model knows: by its weights, else its config, and by an adapter that brings rows."""
    if stored:
        rows = stored[0].shape[0]
    else:
        config = load.load_config(start.base, revision=start.revision, trust_remote_code=trusted)
        rows = int(config.get_text_config().vocab_size)
    if adapter is None or not adapter.vocabulary:
        return rows
    return max(rows, adapter.vocabulary) if adapter.tokens else adapter.vocabulary


def served_facts(
    start: StartingModel, encoding: Encoding, shown: Sequence[Example]
) -> tuple[dict[str, Any], list[str]]:
    """Return what a server will make of the template, for --json and as sentences.

    shown: some examples, which say whether the token that ends an answer is trained.
    """
    tokenizer = encoding.tokenizer
    end = encoding.eos if encoding.eos is not None else chat.turn_end(tokenizer)
    known = stop_tokens.configured(start.folder) if start.folder else None
    pieces = any(example.piece for example in shown)  # of documents, whose last piece alone has the token
    trained = encoding.eos is not None if pieces else all(_ends_with(example, end) for example in shown)
    report: dict[str, Any] = {
        "stop_token": None if end is None else tokenizer.convert_ids_to_tokens(end),
        "stop_token_trained": end is not None and trained,
        "stop_token_in_generation_config": None if known is None else end in known,
    }
    lines = [_stop_sentence(report, known)]
    if encoding.template is None:
        facts = template_facts(tokenizer)
        report |= {"shows": facts.shown, "rewrites_history": facts.rewrites}
        lines += facts.sentences()
    return report, lines


def _ends_with(example: Example, end: int | None) -> bool:
    return example.token_ids[-1] == end and example.targets[-1][1] == len(example.token_ids)


def _stop_sentence(report: dict[str, Any], known: list[int] | None) -> str:
    end = report["stop_token"]
    if end is None or not report["stop_token_trained"]:
        return "No stop token is trained: the model does not learn where an answer ends"
    if known is None:
        return f"The stop token {end} is trained"
    there = report["stop_token_in_generation_config"]
    has = "has it" if there else f"does not have it (its eos_token_id is {known}); merge adds it"
    return f"The stop token {end} is trained, and generation_config.json {has}"
