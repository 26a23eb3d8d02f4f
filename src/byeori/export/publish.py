"""Upload a finished adapter or merged model to the Hugging Face Hub in one commit.

    folder ── allow list ──> files, with local paths reduced to names ── (a dry run stops here) ──> one commit

Whatever is not on the list stays on the machine: checkpoints, optimizer states, logs, pickles, anything unknown. The
token comes from the login or HF_TOKEN, and appears in no message.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from byeori.artifacts import layout
from byeori.artifacts.model_card import findings, is_generated, is_local_path, last_name, model_card
from byeori.artifacts.tokenizer_files import TOKENIZER_FILES
from byeori.errors import ByeoriError, HubError, ModelError
from byeori.export.formats import format_of
from byeori.model.fingerprint import INDEX
from byeori.support import hub_errors
from byeori.support.foreign_files import json_file
from byeori.support.hub import human_size
from byeori.support.text_files import exists, visible
from byeori.support.yaml_files import yaml_mapping

_SIDE_FILES = (*TOKENIZER_FILES, "chat_template.jinja", layout.TEMPLATE, layout.SETTINGS, layout.MERGE_REPORT)
_WEIGHTS = r"adapter_config\.json|adapter_model\..*|(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?"
# In these files any text may be a local path; in other JSON files only the values of these keys.
_PATHS_ANYWHERE = (layout.SETTINGS, layout.MERGE_REPORT, layout.METRICS, layout.ADAPTER_CONFIG)
_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    """The result of an upload or dry run. files: name -> bytes. url, commit: None after a dry run."""

    repo_id: str
    files: dict[str, int]
    card: str
    private: bool
    dry_run: bool
    url: str | None
    commit: str | None


def publish(
    *,
    folder: Path,
    repo_id: str,
    private: bool,
    dry_run: bool,
    revision: str = "main",
    commit_message: str,
    on_line: Callable[[str], None] = lambda text: print(visible(text)),
) -> PublishResult:
    """Upload the model in `folder` to `repo_id`; with `dry_run` list the files and print the card, without a network.

    Raises:
        ModelError: if the folder holds no finished adapter or model, or a damaged one.
        HubError: if the name is invalid, the token is missing or may not write, the Hub cannot be reached, the
            repository is public although `private` is set, or it holds other weights.
    """
    _check_name(repo_id)
    evidence = findings(folder)
    files = collect(folder, repo_id, evidence)
    sizes = {name: item.stat().st_size if isinstance(item, Path) else len(item) for name, item in files.items()}
    card = _text(files[layout.CARD])
    width = max(map(len, sizes))
    for name, size in sizes.items():
        on_line(f"{name:<{width}}  {human_size(size):>9}")
    for note in _notes(folder, evidence):
        on_line(note)
    url, commit = None, None
    if dry_run:
        on_line(f"\nREADME.md:\n\n{card}")
        on_line(f"Nothing was uploaded (dry run); {len(files)} files would go to {repo_id} at {revision}.")
    else:
        url, commit = _upload(files, repo_id, private=private, revision=revision, message=commit_message)
        on_line(f"Published {len(files)} files: {url}")
    return PublishResult(
        repo_id=repo_id, files=sizes, card=card, private=private, dry_run=dry_run, url=url, commit=commit
    )


# ---- what is uploaded ------------------------------------------------------------------------------------------


def collect(folder: Path, repo_id: str, evidence: dict[str, Path] | None = None) -> dict[str, Path | bytes]:
    """Return name in the repository -> the file, or its bytes without local paths.

    evidence: `model_card.findings` of the folder, if already known.

    Raises:
        ModelError: if the folder holds no finished adapter or model, or a damaged one.
    """
    evidence = evidence or findings(folder)
    model_format = format_of(folder)
    if _json(folder / layout.MERGE_REPORT).get("verdict") == "different":
        raise ModelError(f"{folder} failed the check after merging and is not published; merge again")
    paths = [*model_format.files(folder), *(folder / name for name in _SIDE_FILES), evidence[layout.METRICS]]
    files = {path.name: _without_paths(path) for path in paths if _is_file(path)}
    readme = folder / layout.CARD
    if _is_file(readme) and not is_generated(readme.read_text(encoding="utf-8", errors="replace")):
        files[layout.CARD] = readme
    else:
        files[layout.CARD] = model_card(folder, name=repo_id, paths=evidence).encode()
    return files


def _is_file(path: Path) -> bool:
    """Return whether there is such a file.

    Raises:
        ModelError: if it is a link out of its folder, which could lead to anything.
    """
    leads_to = Path(os.path.realpath(path))  # of a loop, where `resolve` raises, a name in it
    if path.is_symlink() and not leads_to.is_relative_to(path.parent.resolve()):
        raise ModelError(f"{path} is a link out of its folder, which is not published; copy the file there instead")
    return path.is_file()


def _without_paths(path: Path) -> Path | bytes:
    """Return the file, or its content with local paths reduced to names if it has any."""
    if path.suffix not in (".json", ".yaml") or path.name in ("tokenizer.json", "vocab.json", INDEX):
        return path
    advice = "copy it again or delete it"
    is_yaml = path.suffix == ".yaml"
    value = yaml_mapping(path, what="settings", advice=advice) if is_yaml else json_file(path, advice=advice)
    if path.name in _PATHS_ANYWHERE:
        clean = _clean(value)
    elif isinstance(value, dict):
        clean = {key: _clean(item) if key in _PATH_KEYS else item for key, item in value.items()}
    else:
        return path
    if clean == value:
        return path
    if path.suffix == ".yaml":
        return bytes(yaml.safe_dump(clean, allow_unicode=True, sort_keys=False).encode())
    return (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


def _clean(value: Any) -> Any:
    """Reduce every text that is a local path, at any depth, to its last name."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return last_name(value) if isinstance(value, str) and is_local_path(value) else value


def _notes(folder: Path, evidence: dict[str, Path]) -> Iterator[str]:
    """Yield what to know before others use the published model."""
    base = _json(folder / layout.ADAPTER_CONFIG).get("base_model_name_or_path")
    if isinstance(base, str) and (is_local_path(base) or exists(base)):
        yield (
            f"Note: the adapter's base is a local folder, published as {last_name(base)!r}, so others cannot tell "
            "which model it is. Train from a Hub id, or publish the merged model."
        )
    report, metrics = _json(folder / layout.MERGE_REPORT), evidence[layout.METRICS]
    if report and not exists(str(metrics)):
        adapter = last_name(str(report.get("adapter")))
        reason = "it is no longer here as it was merged"
        if metrics.parent != folder:
            reason = f"`byeori compare {adapter}` was not run"
        yield f"Note: the card has no metrics of the adapter {adapter}, because {reason}."


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json_file(path)
    except ByeoriError:
        return {}
    return value if isinstance(value, dict) else {}


def _text(item: Path | bytes) -> str:
    return (item.read_bytes() if isinstance(item, Path) else item).decode("utf-8", errors="replace")


# ---- the Hub ---------------------------------------------------------------------------------------------------


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        valid = False
    else:
        valid = repo_id.count("/") == 1
    if not valid:
        raise HubError(f"{repo_id!r} is not a repository name; use user/name with letters, digits, '-', '_' and '.'")


def _upload(
    files: dict[str, Path | bytes], repo_id: str, *, private: bool, revision: str, message: str
) -> tuple[str, str]:
    """Upload all files in one commit; returns the repository's URL and the commit's id."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if not token:
        raise HubError("no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    retried = partial(hub_errors.retried, name=repo_id)
    try:
        with hub_errors.announced(repo_id):
            url = retried(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True))
            _check_repository(retried(lambda: api.model_info(repo_id)), set(files), repo_id, private=private)
            if revision != "main":
                retried(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=item) for name, item in files.items()]
            for operation in operations:  # the Hub keeps each, so that another attempt goes on after the last one
                retried(partial(api.preupload_lfs_files, repo_id, [operation], revision=revision))
            done = retried(lambda: api.create_commit(repo_id, operations, commit_message=message, revision=revision))
    except ByeoriError:
        raise
    except Exception as error:  # HTTP, network, OS and value errors; a traceback could show headers
        sentence = hub_errors.explanation(error, repo_id, write=True)
        sentence = sentence or f"{repo_id} could not be published: {hub_errors.one(error)}"
        raise HubError(sentence.replace(token, "***")) from None
    return str(url), done.oid


def _check_repository(info: Any, names: set[str], repo_id: str, *, private: bool) -> None:
    """Raise if the repository is public but should be private, or holds weights that would be loaded instead."""
    if private and not info.private:
        raise HubError(f"{repo_id} exists and is public; make it private on the Hub, or publish under another name")
    existing = {item.rfilename for item in info.siblings or []}
    older = sorted(name for name in existing - names if re.fullmatch(_WEIGHTS, name))
    if older:
        raise HubError(
            f"{repo_id} holds {', '.join(older)} of another upload, which would be loaded instead of these weights or "
            "with them; delete them on the Hub, or publish under another name"
        )
