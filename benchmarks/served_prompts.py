"""Random conversations through real tokenizers: is every trained prompt, token for token, what transformers serves?

    python benchmarks/served_prompts.py FOLDER[=TEMPLATE] ... [--rows 500]

FOLDER holds tokenizer.json and tokenizer_config.json. TEMPLATE, a chat template that TRL ships, replaces its own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from byeori.data.conversation import conversation
from byeori.data.template_facts import template_facts
from byeori.data.tokenize import encode_turns, make_encoding

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from chats import random_conversation, shipped_templates


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="+")
    parser.add_argument("--rows", type=int, default=500)
    args = parser.parse_args()
    for item in args.tokenizers:
        folder, _, template = item.partition("=")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if template:
            tokenizer.chat_template = shipped_templates()[template]
        turns, differ, missing = count(tokenizer, args.rows)
        without = f" (without {', '.join(missing)})" if missing else ""
        print(f"{Path(folder).name} {template or 'own template'}: {turns:,} turns, {differ} prompts differ{without}")


if __name__ == "__main__":
    main()
