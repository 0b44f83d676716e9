"""Templates by name, and tokenizers that begin every text with a space."""

import string

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lavis.core.errors import ConfigError
from lavis.core.registries import MEDIA_FORMATS
from lavis.core.types import Conversation, MediaRef, Message
from lavis.tokens.chat_templates import CHAT_TEMPLATES, chat_template_named
from lavis.tokens.media import MediaSpec
from lavis.tokens.template import ChatTemplate

VICUNA = CHAT_TEMPLATES["vicuna"]
TEXTS = ("What is this? It is a red circle.\n", "USER: ASSISTANT: What colour is it? Red. Blue.")


def vicuna_tokenizer(image_token="<image>"):
    """A tokenizer of Llama's kind, where a space is part of the word it precedes, with Vicuna's template."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    alphabet = [*string.printable, *"和图里有什么？两个圆形。"]
    special = ["<unk>", "<s>", "</s>", *filter(None, [image_token])]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([*TEXTS, VICUNA.system] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.chat_template = chat_template_named("vicuna")
    return tokenizer


@pytest.fixture(scope="module")
def vicuna():
    return vicuna_tokenizer()


def conversation(*turns):
    roles = ("user", "assistant") * len(turns)
    return Conversation(tuple(Message(role, parts) for role, parts in zip(roles, turns, strict=False)))


def test_a_conversation_is_encoded_as_the_whole_string(vicuna):
    template = ChatTemplate(vicuna, None)
    assert template.system == VICUNA.system
    said = conversation(("What is this?",), ("It is a red circle.",), ("What colour?",))
    messages = [{"role": "system", "content": VICUNA.system}]
    messages += [{"role": m.role, "content": m.parts[0]} for m in said.messages]
    prompt = vicuna.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("</s>USER: What colour? ASSISTANT:")
    # <s> is a token that LLaVA's code puts before what it encodes
    expected = [1, *vicuna(prompt.removeprefix("<s>"), add_special_tokens=False)["input_ids"]]
    ours = list(template.encode_prompt(said).input_ids)
    assert ours == expected


def test_a_picture_is_followed_by_a_line_break_and_the_answer_is_learned(vicuna):
    """As LLaVA: `USER: ` and the picture, and the text behind it encoded by itself."""
    template = ChatTemplate(vicuna, MediaSpec(MEDIA_FORMATS.get("llava"), 3))
    sample = template.encode(conversation((MediaRef("a.png"), " What is this?"), ("It is a red circle.",)))

    def ids(text):
        return vicuna(text, add_special_tokens=False)["input_ids"]

    picture = [vicuna.convert_tokens_to_ids("<image>")] * 3
    question, answer = ids("\nWhat is this?"), ids("It is a red circle.")
    expected = [1, *ids(f"{VICUNA.system} USER: "), *picture, *question, *ids(" ASSISTANT:"), *answer, 2]
    assert list(sample.input_ids) == expected
    learned = [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label != -100]
    assert learned == [*answer, 2]


def test_names_of_templates():
    assert chat_template_named("{{ messages }}") == "{{ messages }}"
    with pytest.raises(ConfigError, match="Did you mean 'vicuna'"):
        chat_template_named("vikuna")
