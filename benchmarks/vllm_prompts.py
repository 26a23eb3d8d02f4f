"""Token ids of chat requests as vLLM serves them; served_prompts.py runs it in vLLM's environment.

    python vllm_prompts.py FOLDER REQUESTS      REQUESTS: a line of JSON each, {"messages": [...], "tools": [...]}

The code is that of `vllm launch render`: requests are parsed, rendered and tokenized, and no weights are loaded. Prints
a line of JSON with the token ids of each request.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from vllm.config import DeviceConfig, ModelConfig, VllmConfig
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer


async def main() -> None:
    """Answer every request with its token ids."""
    model = ModelConfig(model=sys.argv[1], dtype="float32")
    renderer = renderer_from_config(VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu")))
    online = OnlineRenderer(
        model, renderer, request_logger=None, chat_template=None, chat_template_content_format="auto"
    )
    for line in Path(sys.argv[2]).read_text(encoding="utf-8").splitlines():
        # "none" forbids calls in the answer; the tools stay in the prompt
        request = ChatCompletionRequest(model="m", **json.loads(line), tool_choice="none")
        rendered = await online.render_chat(request)
        assert isinstance(rendered, tuple), rendered
        (prompt,) = rendered[1]
        print(json.dumps(list(prompt["prompt_token_ids"])))


asyncio.run(main())
