"""RoPE scaling: a model whose config.json stretches its positions, so that longer rows fit.

    linear    positions divided by the factor                           Chen et al., arXiv:2306.15595
    dynamic   the base frequency grows with a row's length              (NTK-aware)
    yarn      high frequencies stay, low ones are divided               Peng et al., arXiv:2309.00071
    llama3    the same between two bounds, as Llama 3.1 has it

What is computed is transformers' own: it reads the config. A scaled model is a folder in the cache with its config.json
beside links to the base's other files, so that whatever loads the base (training, merging, llama.cpp's converter, vLLM)
sees the same positions.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byeori.errors import ConfigError
from byeori.support import atomic_files
from byeori.support.cache_folder import cache_folder
from byeori.support.foreign_files import json_file

_CONFIG, _ORIGIN = "config.json", ".base"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """kind: linear, dynamic, yarn or llama3. factor: how much longer; None for as much as `length` tokens need."""

    kind: str
    factor: float | None
    length: int


def of_settings(settings: Mapping[str, Any]) -> Rope | None:
    """Return the scaling of a run's settings, as it has them or byeori.yaml records them; None for none."""
    if not settings.get("rope_scaling"):
        return None
    factor = settings.get("rope_factor")
    return Rope(kind=settings["rope_scaling"], factor=factor, length=int(settings.get("cutoff_len") or 0))


def scaled(config: dict[str, Any], rope: Rope, name: str) -> dict[str, Any]:
    """Return a model's config.json with its positions scaled. name: of the model, for errors.

    Raises:
        ConfigError: if it has no rotary positions, is scaled already, or is long enough as it is.
    """
    found = copy.deepcopy(config)
    text = next((found[key] for key in ("text_config", "llm_config") if isinstance(found.get(key), dict)), found)
    limit = text.get("max_position_embeddings")
    own = text.get("rope_parameters")
    nested = isinstance(own, dict) and isinstance(own.get("full_attention"), dict)  # one for each kind of attention
    before = own["full_attention"] if nested and own else own or text.get("rope_scaling") or {}
    kind = before.get("rope_type", before.get("type", "default"))
    if not isinstance(limit, int) or not (own or "rope_theta" in text or "rope_scaling" in text):
        raise ConfigError(f"--rope_scaling {rope.kind}: {name} has no rotary positions to scale; leave it out")
    if kind != "default":
        raise ConfigError(f"--rope_scaling {rope.kind}: {name} is scaled already ({kind}); leave it out")
    factor = rope.factor or rope.length / limit
    if factor <= 1:
        raise ConfigError(
            f"--rope_scaling {rope.kind}: {name} has {limit} positions and cutoff_len is {rope.length}; leave it out, "
            "or give a longer --cutoff_len"
        )
    values: dict[str, Any] = {"rope_type": rope.kind, "factor": float(factor)}
    if rope.kind in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = limit
    if rope.kind == "llama3":
        values |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if own:
        before.update(values)
    else:
        text["rope_scaling"] = values
    if rope.kind != "dynamic":  # which reads the original limit here
        text["max_position_embeddings"] = round(limit * factor)
    return found


def view(base: Path, rope: Rope | None, name: str) -> Path:
    """Return the folder of the base with its positions scaled: links to its files, and a config.json of its own.

    base: its folder. name: what the user calls it. Without a scaling that is the base itself.

    Raises:
        ConfigError: see `scaled`.
    """
    if rope is None:
        return base
    config = scaled(json_file(base / _CONFIG), rope, name)
    parts = json.dumps([name, str(base.resolve()), config], sort_keys=True)
    folder = cache_folder() / "rope" / hashlib.sha256(parts.encode()).hexdigest()[:16] / base.name
    if not (folder / _CONFIG).is_file() or any(not path.exists() for path in folder.iterdir()):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_files.disk_errors(folder), atomic_files.new_folder(folder) as temporary:
            for path in base.iterdir():
                if path.name not in (_CONFIG, _ORIGIN):
                    (temporary / path.name).symlink_to(path.absolute(), target_is_directory=path.is_dir())
            (temporary / _ORIGIN).write_text(name, encoding="utf-8")
            (temporary / _CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def origin(base: str) -> str:
    """Return what the user calls a base that may be a scaled view of it."""
    note = Path(base) / _ORIGIN
    return note.read_text(encoding="utf-8") if cache_folder() in note.parents and note.is_file() else base
