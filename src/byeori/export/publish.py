"""A finished adapter or merged model, uploaded to the Hugging Face Hub in one commit.

    folder ── allow list ──> files, local paths in them reduced to names ── (dry run stops here) ──> one commit

What is not on the list never leaves the machine: checkpoints, optimizer states, logs, pickles, anything unknown. The
token comes from the login or HF_TOKEN, and is in no message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from byeori.artifacts.model_card import TOKENIZER_FILES, findings, is_generated, is_local_path, last_name, model_card
from byeori.errors import ByeoriError, HubError, ModelError
from byeori.model.fingerprint import INDEX, read_header, weight_files
from byeori.support.hub import human_size

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_MODEL = ("config.json", "generation_config.json")
_BESIDE = (
    *TOKENIZER_FILES,
    "chat_template.jinja",
    "template.txt",
    "byeori.yaml",
    "merge_report.json",
)
_WEIGHTS = r"adapter_config\.json|adapter_model\..*|(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?"
# Files of which every text may be a path, and those of which only these keys may be.
_PATHS_ANYWHERE = ("byeori.yaml", "merge_report.json", "metrics.json", "adapter_config.json")
_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")


@dataclass(frozen=True, kw_only=True)
class PublishResult:
    """What was uploaded, or would be. files: name -> bytes. url, commit: none for a dry run."""

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
    on_line: Callable[[str], None] = print,
) -> PublishResult:
    """Upload what `folder` holds to `repo_id`; with `dry_run` list it and show the card, without any network.

    Raises:
        ModelError: the folder holds no finished adapter or model, or a damaged one.
        HubError: no token, no such name, no right to write, the Hub out of reach, a public repository where a
            private one was asked for, or one with other weights in it.
    """
    _check_name(repo_id)
    found = findings(folder)
    files = collect(folder, repo_id, found)
    sizes = {name: item.stat().st_size if isinstance(item, Path) else len(item) for name, item in files.items()}
    card = _text(files["README.md"])
    width = max(map(len, sizes))
    for name, size in sizes.items():
        on_line(f"{name:<{width}}  {human_size(size):>9}")
    for note in _notes(folder, found):
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


def collect(folder: Path, repo_id: str, found: dict[str, Path] | None = None) -> dict[str, Path | bytes]:
    """Name in the repository -> file as it is, or the bytes of one whose local paths were reduced to names.

    found: `card.findings` of the folder, where they are known already.

    Raises:
        ModelError: the folder holds no finished adapter or model, or a damaged one.
    """
    found = found or findings(folder)
    files: dict[str, Path | bytes] = {}
    for path in (*_weights(folder), *(folder / name for name in _BESIDE), found["metrics.json"]):
        if path.is_file():
            files[path.name] = _without_paths(path)
    readme = folder / "README.md"
    if readme.is_file() and not is_generated(readme.read_text(encoding="utf-8", errors="replace")):
        files["README.md"] = readme
    else:
        files["README.md"] = model_card(folder, name=repo_id, found=found).encode()
    return files


def _weights(folder: Path) -> Iterator[Path]:
    """The files that make the folder an adapter or a model; each of them is whole."""
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give the folder of a finished adapter or merged model")
    if (folder / "adapter_config.json").is_file():
        if not (folder / _ADAPTER[1]).is_file():
            raise ModelError(f"{folder} is not a finished adapter: it has no {_ADAPTER[1]}; let the training end")
        read_header(folder / _ADAPTER[1])
        yield from (folder / name for name in _ADAPTER)
        return
    if _json(folder / "merge_report.json").get("verdict") == "different":
        raise ModelError(f"{folder} failed the check after merging and is not published; merge again")
    weights = weight_files(folder)
    for path in weights:
        if path.parent != folder:
            raise ModelError(f"{folder / INDEX} names {path}, which lies in another folder; merge again")
        read_header(path)
    yield from (folder / name for name in _MODEL)
    yield from weights
    yield folder / INDEX


def _without_paths(path: Path) -> Path | bytes:
    """The file, or new bytes for it where it names places on this machine."""
    if path.suffix not in (".json", ".yaml") or path.name in ("tokenizer.json", "vocab.json", INDEX):
        return path
    text = path.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError):
        raise ModelError(f"{path} is damaged; copy it again or delete it") from None
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
    """Every text that is a local path, at any depth, reduced to its last name."""
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item) for item in value]
    return last_name(value) if isinstance(value, str) and is_local_path(value) else value


def _notes(folder: Path, found: dict[str, Path]) -> Iterator[str]:
    """What a person should know before others use what is published."""
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    if isinstance(base, str) and (is_local_path(base) or Path(base).exists()):
        yield (
            f"Note: the adapter names its base by a local folder; it is published as {last_name(base)!r}, "
            "and others must know which model that is. Train from a Hub id, or publish the merged model."
        )
    report, metrics = _json(folder / "merge_report.json"), found["metrics.json"]
    if report and not metrics.is_file():
        adapter = last_name(str(report.get("adapter")))
        why = "it does not lie here as it was merged"
        if metrics.parent != folder:
            why = f"`byeori compare {adapter}` was not run"
        yield f"Note: the card has no numbers of the adapter {adapter}, for {why}."


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
        raise HubError(f"{repo_id!r} is no name for a repository; give user/name in letters, digits, '-', '_' and '.'")


def _upload(
    files: dict[str, Path | bytes], repo_id: str, *, private: bool, revision: str, message: str
) -> tuple[str, str]:
    """One commit with all files; returns the repository's address and the commit's id."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    token = get_token()
    if not token:
        raise HubError("there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        _check_repository(api.model_info(repo_id), set(files), repo_id, private=private)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=item) for name, item in files.items()]
        done = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except ByeoriError:
        raise
    except Exception as error:  # HTTP, network, OS and value errors; a traceback must not show headers
        raise HubError(_sentence(error, repo_id).replace(token, "***")) from None
    return str(url), done.oid


def _check_repository(info: Any, names: set[str], repo_id: str, *, private: bool) -> None:
    """Refuse a repository that shows more than it should, or whose older weights would be loaded instead of these."""
    if private and not info.private:
        raise HubError(f"{repo_id} exists and is public; make it private on the Hub, or publish under another name")
    there = {item.rfilename for item in info.siblings or []}
    older = sorted(name for name in there - names if re.fullmatch(_WEIGHTS, name))
    if older:
        raise HubError(
            f"{repo_id} holds {', '.join(older)} of another upload, which would be loaded in place of these weights or "
            "with them; delete them on the Hub, or publish under another name"
        )


def _sentence(error: Exception, repo_id: str) -> str:
    """One sentence for whatever the Hub's client raised, from the first error in the chain that tells something."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for item in chain:
        if isinstance(item, HfHubHTTPError) and item.response is not None:
            return _status_sentence(item.response.status_code, repo_id, item.server_message)
    if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
        return "the Hub is switched off by HF_HUB_OFFLINE; unset it to publish"
    names = " ".join(type(item).__name__ for item in chain)
    if any(word in names for word in ("Connect", "Timeout", "Network", "Protocol", "Read", "Write")):
        return f"the Hugging Face Hub is out of reach ({_first_line(chain[-1])}); check the network and try again"
    return f"{repo_id} could not be published: {_first_line(error)}"


def _status_sentence(status: int, repo_id: str, message: str | None) -> str:
    said = f" ({_first_line(message)})" if message else ""
    if status == 401:
        return f"the Hub does not accept the token{said}; log in again with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id}{said}; use one with write access to it"
    if status == 404:
        return f"the Hub has no {repo_id} that this token may see{said}; check the name and the token"
    if status >= 500:
        return f"the Hub has a fault (HTTP {status}){said}; try again later"
    return f"the Hub refuses {repo_id} (HTTP {status}){said}; change what it names and try again"


def _first_line(item: object) -> str:
    lines = str(item).strip().splitlines()
    return lines[0][:300] if lines else type(item).__name__
