"""Random conversations and texts through real tokenizers: is every trained prompt, token for token, what is served?

    python benchmarks/served_prompts.py FOLDER[=TEMPLATE[=MODEL]] ... [--rows 500] [--vllm PYTHON] [--llama-cpp]

FOLDER holds tokenizer.json and tokenizer_config.json. TEMPLATE, a chat template that TRL ships, replaces its own.
Texts are cut in two at random places, also inside words, by the template {p}{a}; and every control token of the
tokenizer stands in a prompt and in an answer.

Conversations are compared with apply_chat_template of transformers. `--vllm` names the Python of an environment with
vLLM, whose own request pipeline renders the prompts as well (vllm_prompts.py); `--llama-cpp` (pip install
'byeori[gguf]') asks llama.cpp's server. Both get a random model of the type MODEL (qwen3, llama, gemma3_text).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from prompt_engines import Request, engines
from transformers import AutoTokenizer

from byeori.data.conversation import conversation
from byeori.data.template import SPACES, parse
from byeori.data.template_facts import template_facts
from byeori.data.tokenize import encode_row, encode_turns, make_encoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from chats import random_conversation, shipped_templates

SAMPLE = Path(__file__).resolve().parents[1] / "src" / "byeori" / "data" / "samples" / "titles-ko-train.jsonl"


def turns_of(tokenizer: Any, rows: int) -> tuple[list[Request], list[list[int]], list[str]]:
    """Return the requests that trained turns answer, the prompts they were trained with, and what is not shown."""
    encoding = make_encoding(tokenizer, None, cutoff_len=10**6, add_eos_token=True, train_on_inputs=False)
    shown = template_facts(tokenizer).shown
    requests, prompts = [], []
    for seed in range(rows):
        row = random_conversation(seed, system=shown["system"], tools=shown["tools"], reasoning=shown["reasoning"])
        read = conversation(row)
        for example in encode_turns(row, encoding):
            messages = list(read.messages[: example.turn - 1])
            requests.append({"messages": messages} | ({"tools": list(read.tools)} if read.tools else {}))
            prompts.append(list(example.token_ids[: example.targets[0][0]]))
    return requests, prompts, [name for name, there in shown.items() if not there]


def cut_texts(tokenizer: Any) -> str:
    """Cut documents in two, and describe what differs from the prompt alone, the text, and the text as one."""
    encoding = make_encoding(tokenizer, parse("{p}{a}"), cutoff_len=10**6, add_eos_token=False, train_on_inputs=False)
    draw, counts = random.Random(0), dict.fromkeys(("prompts differ", "answers differ", "join", "wrongly counted"), 0)
    texts = [json.loads(line)["document"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    for text in texts:
        at = draw.randrange(1, len(text) - 1)
        example = encode_row({"p": text[:at], "a": text[at:]}, encoding)
        start = example.targets[0][0]
        prompt = text[:at].rstrip(SPACES)
        joint = tokenizer(text)["input_ids"] != list(example.token_ids)
        counts["prompts differ"] += tokenizer(prompt)["input_ids"] != list(example.token_ids[:start])
        counts["answers differ"] += tokenizer.decode(example.token_ids[start:]) != text[len(prompt) :]
        counts["join"] += joint
        counts["wrongly counted"] += joint != example.joins
    return f"{len(texts)} texts cut in two: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def control_tokens(tokenizer: Any) -> str:
    """Put every control token into a prompt and an answer, and count the rows where one is more than text."""
    encoding = make_encoding(
        tokenizer, parse("{p}\n\n{a}"), cutoff_len=10**6, add_eos_token=False, train_on_inputs=False
    )
    tokens = sorted(encoding.encoder.controls)
    ids = set(tokenizer.convert_tokens_to_ids(tokens))
    wrong = 0
    for token in tokens:
        row = {"p": f"안녕 {token} 하세요 {token}{token}", "a": f"봄{token}"}
        found = encode_row(row, encoding).token_ids[len(encoding.prefix) :]
        wrong += bool(ids & set(found)) or tokenizer.decode(found) != f"{row['p']}\n\n{row['a']}"
    return f"{len(tokens)} control tokens as text: {wrong} wrong"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--llama-cpp", action="store_true")
    args = parser.parse_args()
    for item in args.tokenizers:
        folder, template, kind = (*item.split("="), "", "")[:3]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        print(f"{Path(folder).name}: {cut_texts(tokenizer)}; {control_tokens(tokenizer)}")
        if template:
            tokenizer.chat_template = shipped_templates()[template]
        if not tokenizer.chat_template or not args.rows:
            continue
        requests, prompts, missing = turns_of(tokenizer, args.rows)
        without = f" (without {', '.join(missing)})" if missing else ""
        print(f"{Path(folder).name} {template or 'own template'}: {len(prompts):,} turns{without}", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            for name, engine in engines(args, tokenizer, kind, Path(temporary)):
                found = zip(engine(requests), prompts, strict=True)
                differ = [pair for pair in found if list(pair[0]) != pair[1]]
                print(f"  {name}: {len(differ)} prompts differ", flush=True)
                for served, trained in differ[:1]:
                    print(f"    served  {tokenizer.decode(served)!r}\n    trained {tokenizer.decode(trained)!r}")


if __name__ == "__main__":
    main()
