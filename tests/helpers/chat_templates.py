"""Chat templates of the kinds that models come with."""

from __future__ import annotations

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ bos_token ~ '[INST] ' ~ message.content ~ ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' ~ message.content ~ ' ' ~ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant\nroles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# As Qwen 3: the last assistant turn has a thinking block, earlier ones lose theirs.
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek R1's: what stands before </think> is taken out of every answer.
CUTTING = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
# Ends a turn with a line break alone.
OPEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
