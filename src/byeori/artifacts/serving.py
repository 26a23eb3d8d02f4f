"""How to run a model: the last section of the model card, with lines that work for this model.

vLLM's rules are those of its lora/peft_helper.py, lora/lora_model.py and config/lora.py (0.32); benchmarks/
served_exports.py compares them with vLLM itself.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from byeori.artifacts import layout, records, tokenizer_files
from byeori.data import served_template, template
from byeori.errors import ModelError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank."""

_VLLM_LACKS = {
    "use_dora": "it is a DoRA adapter",
    "lora_bias": "it has a bias in lora_B",
    "alora_invocation_tokens": "it is an activated LoRA",
    "layer_replication": "it replicates layers",
    "use_bdlora": "it is a block-diagonal LoRA",
    "use_qalora": "it is a QA-LoRA",
    "trainable_token_indices": "it trains tokens of the vocabulary",
    "target_parameters": "it adapts bare parameters",
}
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false")
_WORDS = ("lm_head", "embed_tokens", "wte", "embed_out", "word_embeddings", "embed_in", "output_layer")


def vllm_refuses(adapter: dict[str, Any]) -> str:
    """Return why vLLM does not serve an adapter with this adapter_config.json; "" if it does, or for no adapter."""
    for name, reason in _VLLM_LACKS.items():
        if adapter.get(name):
            return reason
    if saved := adapter.get("modules_to_save"):
        return f"it replaces whole layers ({', '.join(saved)})"
    if adapter.get("bias", "none") != "none":
        return "it trains biases"
    init = adapter.get("init_lora_weights", True)
    if str(init).lower() not in _INITS:
        return f"it was initialised with {init}, which changed its base"
    targets = adapter.get("target_modules") or []
    names = [str(name) for name in (targets if isinstance(targets, list) else [targets])]
    if found := [word for word in _WORDS if any(re.search(rf"\b{word}\b", name) for name in names)]:
        return f"it adapts {found[0]}, which vLLM does for few models"
    if _rank(adapter) > VLLM_RANKS[-1]:
        return f"its rank {_rank(adapter)} is above {VLLM_RANKS[-1]}"
    return ""


def vllm_rank(folder: Path) -> int:
    """Return the --max-lora-rank that the adapter in a folder needs."""
    return _fitting(records.adapter_config(folder))


def _rank(adapter: dict[str, Any]) -> int:
    ranks = [adapter.get("r"), *(adapter.get("rank_pattern") or {}).values()]
    return max((rank for rank in ranks if isinstance(rank, int)), default=16)


def _fitting(adapter: dict[str, Any]) -> int:
    return next((rank for rank in VLLM_RANKS if rank >= _rank(adapter)), VLLM_RANKS[-1])


# ---- the card's lines ----------------------------------------------------------------------------------------------


def usage(
    folder: Path,
    name: str,
    base: str,
    adapter: dict[str, Any],
    exported: dict[str, Any],
    config: dict[str, Any] | None = None,
) -> str:
    """Return the section. folder: of the model; name, base: as a reader finds them. exported: export_report.json.

    config: config.json of what transformers loads, the merged model or the adapter's base, if it is here.
    """
    request = _request(folder)
    if exported.get("format") in ("gguf", "ollama"):
        sections = [_llama_cpp(exported, request), _ollama(name, exported)]
    else:
        kind = _auto_class(config or {})
        sections = [
            _transformers(folder, name, base, adapter, request, kind),
            _vllm(folder, name, base, adapter, request),
        ]
        sections.append(_other_formats(name) if not exported else "")
    return "\n\n".join(["## How to use", *filter(None, sections)])


def _request(folder: Path) -> dict[str, Any] | None:
    """Return the body of a chat request that this model's prompt needs; None without a template."""
    path = folder / layout.TEMPLATE
    asked = [{"role": "user", "content": "..."}]
    if path.is_file():
        keywords = served_template.keywords(template.parse(path.read_text(encoding="utf-8"), path.name, lenient=True))
        return {"messages": asked} | ({"chat_template_kwargs": dict.fromkeys(keywords, "...")} if keywords else {})
    return {"messages": asked} if tokenizer_files.chat_template_of(folder) else None


def _auto_class(config: dict[str, Any]) -> str:
    """The auto class that loads a model: another one for checkpoints with an image tower."""
    classes = config.get("architectures")
    classes = classes if isinstance(classes, list) else []
    if "model_type" not in config or any(str(name).endswith("ForCausalLM") for name in classes):
        return "AutoModelForCausalLM"
    from byeori.model.text_model import auto_class

    try:
        return str(auto_class(SimpleNamespace(**config | {"architectures": classes})).__name__)
    except ModelError:  # of a newer transformers
        return "AutoModelForCausalLM"


def _transformers(folder: Path, model: str, base_model: str, adapter: dict[str, Any], request: Any, kind: str) -> str:
    name, base = json.dumps(model, ensure_ascii=False), json.dumps(base_model, ensure_ascii=False)
    imports = [f"from transformers import {kind}, AutoTokenizer", ""]
    lines = [*imports, f'model = {kind}.from_pretrained({base if adapter else name}, dtype="auto")']
    if adapter:
        lines = ["from peft import PeftModel", *lines, f"model = PeftModel.from_pretrained(model, {name})"]
    words = name if tokenizer_files.there(folder) or not adapter else base
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({words})")
    if request:
        keywords = "".join(f', {key}="..."' for key in request.get("chat_template_kwargs", {}))
        lines += [
            'messages = [{"role": "user", "content": "..."}]',
            "inputs = tokenizer.apply_chat_template(",
            f'    messages{keywords}, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("...", return_tensors="pt")')
    lines += [
        "output = model.generate(**inputs, max_new_tokens=128, do_sample=False)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return fenced("\n".join(lines), "python")


def _vllm(folder: Path, name: str, base: str, adapter: dict[str, Any], request: Any) -> str:
    if reason := vllm_refuses(adapter):
        return f"vLLM does not serve this adapter, because {reason}; merge it first (`byeori merge`)."
    serve, served = f"vllm serve {shlex.quote(name)}", name
    if adapter:
        own = f"--tokenizer {shlex.quote(name)} " if tokenizer_files.there(folder) else ""
        ends = f"--generation-config {shlex.quote(name)} " if (folder / "generation_config.json").is_file() else ""
        lora = f"--enable-lora --max-lora-rank {_fitting(adapter)} --lora-modules {shlex.quote(f'tuned={name}')}"
        serve, served = f"vllm serve {shlex.quote(base)} {own}{ends}{lora}", "tuned"
    return _commands("With vLLM", serve, _curl(8000, served, request))


def _llama_cpp(exported: dict[str, Any], request: Any) -> str:
    weights = [name for name in exported["files"] if name.endswith(".gguf")]
    lora = f" --lora {shlex.quote(weights[1])}" if len(weights) > 1 else ""
    serve = f"llama-server -m {shlex.quote(weights[0])}{lora} --jinja --port 8080"
    return _commands("With llama.cpp", serve, _curl(8080, "model", request))


def _ollama(name: str, exported: dict[str, Any]) -> str:
    if exported["format"] != "ollama":
        return ""
    own = shlex.quote(name.rpartition("/")[2].lower())
    return _commands("With Ollama", f"ollama create {own} -f Modelfile", f'ollama run {own} "..."')


def _other_formats(name: str) -> str:
    lines = [f"byeori export {shlex.quote(name)} --format {kind} --output_dir {kind}" for kind in ("gguf", "ollama")]
    return _commands("For llama.cpp and Ollama", *lines)


def _commands(title: str, *lines: str) -> str:
    code = "\n".join(lines)
    return f"{title}:\n\n{fenced(code, 'bash')}"


def _curl(port: int, served: str, request: Any) -> str:
    body = {"model": served, **(request or {"prompt": "..."}), "max_tokens": 128, "temperature": 0}
    place = "chat/completions" if request else "completions"
    text = json.dumps(body, ensure_ascii=False)
    return f"curl localhost:{port}/v1/{place} -H 'Content-Type: application/json' \\\n  -d {shlex.quote(text)}"


def fenced(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
