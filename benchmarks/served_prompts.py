"""Random conversations and texts through real tokenizers: is every trained prompt, token for token, what is served?

    python benchmarks/served_prompts.py FOLDER[=TEMPLATE] ... [--rows 500]

FOLDER holds tokenizer.json and tokenizer_config.json. TEMPLATE, a chat template that TRL ships, replaces its own.
Texts are cut in two at random places, also inside words, by the template {p}{a}; and every control token of the
tokenizer stands in a prompt and in an answer.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from byeori.data.conversation import conversation
from byeori.data.template import SPACES, parse
from byeori.data.template_facts import template_facts
from byeori.data.tokenize import encode_row, encode_turns, make_encoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from chats import random_conversation, shipped_templates

SAMPLE = Path(__file__).resolve().parents[1] / "src" / "byeori" / "data" / "samples" / "titles-ko-train.jsonl"


def count(tokenizer: Any, rows: int) -> tuple[int, int, list[str]]:
    """Return the turns of random rows, those whose prompt differs, and what the template does not show."""
    encoding = make_encoding(tokenizer, None, cutoff_len=10**6, add_eos_token=True, train_on_inputs=False)
    shown = template_facts(tokenizer).shown
    turns = differ = 0
    for seed in range(rows):
        row = random_conversation(seed, system=shown["system"], tools=shown["tools"], reasoning=shown["reasoning"])
        read = conversation(row)
        for example in encode_turns(row, encoding):
            served = tokenizer.apply_chat_template(
                list(read.messages[: example.turn - 1]),
                tools=list(read.tools) or None,
                add_generation_prompt=True,
                return_dict=False,
            )
            turns += 1
            differ += list(example.token_ids[: example.targets[0][0]]) != list(served)
    return turns, differ, [name for name, there in shown.items() if not there]


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
    args = parser.parse_args()
    for item in args.tokenizers:
        folder, _, template = item.partition("=")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        print(f"{Path(folder).name}: {cut_texts(tokenizer)}; {control_tokens(tokenizer)}")
        if template:
            tokenizer.chat_template = shipped_templates()[template]
        if not tokenizer.chat_template or not args.rows:
            continue
        turns, differ, missing = count(tokenizer, args.rows)
        without = f" (without {', '.join(missing)})" if missing else ""
        print(f"{Path(folder).name} {template or 'own template'}: {turns:,} turns, {differ} prompts differ{without}")


if __name__ == "__main__":
    main()
