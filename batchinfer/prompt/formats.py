"""Chat formats by name, for models that bring no chat template: base models, fine-tuned ones whose
template was lost.

The texts never change: an output may have been begun with them. Must not know: tokenizers, rows.
"""

from __future__ import annotations

from dataclasses import dataclass

_NOT_SYSTEM_ALONE = (
    "{% if messages and messages | rejectattr('role', 'equalto', 'system') | list | length == 0 %}"
    "{{ raise_exception('this chat format has no place for a system message without a message of "
    "the user') }}{% endif %}"
)
# Where a format has no place for a system message, it is before the first user's.
_SYSTEM_FIRST = (
    _NOT_SYSTEM_ALONE + "{% set system = messages[0].content + '\\n\\n' "
    "if messages and messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% set content = (system if loop.first else '') + message.content %}"
)
_ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) "
    "or message.role not in ('user', 'assistant') %}"
    "{{ raise_exception('this chat format takes a system message at most once, first, and then "
    "user and assistant in turn') }}{% endif %}"
)
_KNOWN_ROLES = (
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('this chat format has no role ' + message.role) }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """A chat template, Jinja2, and the tokens that it is written with: where the vocabulary lacks
    one, the model sees letters in its place.
    """

    template: str
    marks: tuple[str, ...] = ()


_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_LLAMA2 = (
    _NOT_SYSTEM_ALONE + "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' "
    "if messages and messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}" + _ALTERNATE +
    "{% if message.role == 'user' %}{{ bos_token }}[INST] "
    "{{ (system if loop.first else '') + message.content | trim }} [/INST]"
    "{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
_MISTRAL = (
    "{{ bos_token }}" + _SYSTEM_FIRST + _ALTERNATE +
    "{% if message.role == 'user' %}[INST] {{ content }}[/INST]"
    "{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)  # fmt: skip
_GEMMA = (
    "{{ bos_token }}" + _SYSTEM_FIRST + _ALTERNATE +
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{{ content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)  # fmt: skip
_PHI3 = (
    "{% for message in messages %}" + _KNOWN_ROLES +
    "<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)  # fmt: skip
_ZEPHYR = (
    "{% for message in messages %}" + _KNOWN_ROLES +
    "<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)  # fmt: skip
_VICUNA = (
    "{{ bos_token }}{% for message in messages %}" + _KNOWN_ROLES +
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}USER: {{ message.content }}\n"
    "{% else %}ASSISTANT: {{ message.content }}{{ eos_token }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)  # fmt: skip
_ALPACA = (
    "{{ bos_token }}{% for message in messages %}" + _KNOWN_ROLES +
    "{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% elif message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% else %}### Response:\n{{ message.content }}{{ eos_token }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)  # fmt: skip

FORMATS: dict[str, ChatFormat] = {
    "alpaca": ChatFormat(_ALPACA),
    "chatml": ChatFormat(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "gemma": ChatFormat(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "llama2": ChatFormat(_LLAMA2),
    "llama3": ChatFormat(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": ChatFormat(_MISTRAL, ("[INST]", "[/INST]")),
    "phi3": ChatFormat(_PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    "vicuna": ChatFormat(_VICUNA),
    "zephyr": ChatFormat(_ZEPHYR),
}
