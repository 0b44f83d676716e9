"""Chat templates that a recipe can name, for LLMs whose tokenizer brings none."""

from __future__ import annotations

from typing import NamedTuple

from lavis.core.errors import ConfigError, did_you_mean
from lavis.tokens.layout import CHATML

SYSTEM = "You are a helpful assistant."
"""System message of conversations without one, where a template takes one."""


class NamedTemplate(NamedTuple):
    """A Jinja template, and the system message of conversations without one."""

    jinja: str
    system: str


CHAT_TEMPLATES: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(CHATML, SYSTEM),
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


def chat_template_named(template: str) -> str:
    """The Jinja template of that name; a template itself is returned as it is. Raises ConfigError for another word."""
    if template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[template].jinja
    if "{" not in template:
        hint = did_you_mean(template, CHAT_TEMPLATES)
        raise ConfigError(
            f"model.chat_template {template!r} is neither a template in Jinja nor the name of one:"
            f" {', '.join(CHAT_TEMPLATES)}.{hint}"
        )
    return template


def system_of(jinja: str) -> str:
    """The system message that a template was made for."""
    return next((named.system for named in CHAT_TEMPLATES.values() if named.jinja == jinja), SYSTEM)
