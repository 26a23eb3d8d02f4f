"""Answers of vLLM, for the check of an export; run by the Python of an environment with vLLM, without byeori.

python vllm_answers.py GIVEN.json FOUND.json     {"model", "tokenizer", "adapter", "rank", "requests", ...} -> rows
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def answers(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the prompt's and the answer's ids of each chat request, greedily."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.platforms import current_platform

    adapter = given["adapter"]
    more = {"enable_lora": True, "max_lora_rank": given["rank"]} if adapter else {}
    engine = LLM(
        model=given["model"],
        tokenizer=given["tokenizer"],
        dtype=given["dtype"],
        max_model_len=given["context"],
        max_num_seqs=1,
        # of the memory of a machine that does other work as well; CPUs reserve VLLM_CPU_KVCACHE_SPACE
        gpu_memory_utilization=0.3 if current_platform.is_cpu() else 0.8,
        enforce_eager=True,
        seed=0,
        **more,
    )
    greedy = SamplingParams(
        temperature=0.0, max_tokens=given["max_new_tokens"], stop_token_ids=given["stop_ids"], repetition_penalty=1.0
    )
    lora = LoRARequest("tuned", 1, adapter) if adapter else None
    found = []
    for request in given["requests"]:
        kwargs = request.get("chat_template_kwargs") or None
        output = engine.chat(
            request["messages"],
            greedy,
            lora_request=lora,
            tools=request.get("tools"),
            chat_template_kwargs=kwargs,
            use_tqdm=False,
        )[0]
        ids = [int(token) for token in output.outputs[0].token_ids]
        found.append({"prompt": [int(token) for token in output.prompt_token_ids], "answer": ids})
    return found


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(answers(settings)), encoding="utf-8")
