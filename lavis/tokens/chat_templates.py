"""Chat templates that a recipe can name, for LLMs whose tokenizer brings none."""

from __future__ import annotations

from typing import NamedTuple


class NamedTemplate(NamedTuple):
    """A Jinja template, and the system message of conversations without one."""

    jinja: str
    system: str


CHAT_TEMPLATES: dict[str, NamedTemplate] = {
    # LLaVA-1.5's conversation "vicuna_v1", with which Vicuna 1.5 was made
    "vicuna": NamedTemplate(
        "{{ bos_token }}"
        "{% if messages[0]['role'] == 'system' %}"
        "{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}"
        "{% endif %}"
        "{% for m in messages %}"
        "{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    ),
}
"""Name in `model.chat_template` to the template."""
