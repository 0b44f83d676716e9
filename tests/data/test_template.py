"""Tokens and labels of the chat template, token by token; no text becomes a control token; truncation keeps images
whole.
"""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Conversation, MediaRef, Message, RowError
from lavis.tokens.caption import CaptionTemplate
from lavis.tokens.template import ChatTemplate, ensure_image_token, image_token_id, without_images
from lavis.tokens.text_encoder import special_ids
from tests.data.data_toys import SPECIALS, media, small_tokenizer

QUERIES = 3


def talk(*turns: str | tuple[str | MediaRef, ...], system: str | None = None) -> Conversation:
    """User and assistant turns in alternation."""
    messages = [] if system is None else [Message("system", (system,))]
    for i, turn in enumerate(turns):
        messages.append(Message(("user", "assistant")[i % 2], (turn,) if isinstance(turn, str) else turn))
    return Conversation(tuple(messages), id="row 1")


def marked(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, conversation: Conversation) -> str:
    """The sample's tokens joined by spaces: supervised ones in brackets, newlines as \\n, placeholders as #."""
    sample = template.encode(conversation)
    names = {template.image_token_id: "#"}
    words = []
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
        word = names.get(token) or tokenizer.decode([token]).replace("\n", "\\n").replace(" ", "_")
        words.append(word if label == IGNORE_INDEX else f"[{word}]")
    return " ".join(words)


S, E = "<|im_start|>", "<|im_end|>"
IMG, END_IMG = "< I m g >", "< / I m g >"
A, M = "assistant", "markup"
PICTURE = (MediaRef("a.png"), " Hi")
EXPECTED = {
    "one turn": (
        talk("Hi", "yes", system="no"),
        f"{S} system \\n no {E} \\n {S} user \\n Hi {E} \\n {S} assistant \\n [yes] [{E}] \\n",
        f"{S} system \\n no [{E}] [\\n] [{S}] user \\n Hi [{E}] [\\n] [{S}] assistant \\n [yes] [{E}] [\\n]",
    ),
    "two turns": (
        talk("Hi", "yes", "Hi", "no", system="no"),
        (
            f"{S} system \\n no {E} \\n {S} user \\n Hi {E} \\n {S} assistant \\n [yes] [{E}] \\n "
            f"{S} user \\n Hi {E} \\n {S} assistant \\n [no] [{E}] \\n"
        ),
        (
            f"{S} system \\n no [{E}] [\\n] [{S}] user \\n Hi [{E}] [\\n] [{S}] assistant \\n [yes] [{E}] [\\n] "
            f"[{S}] user \\n Hi [{E}] [\\n] [{S}] assistant \\n [no] [{E}] [\\n]"
        ),
    ),
    "image": (
        talk(PICTURE, "red", system="no"),
        f"{S} system \\n no {E} \\n {S} user \\n {IMG} # # # {END_IMG} _ Hi {E} \\n {S} assistant \\n [red] [{E}] \\n",
        (
            f"{S} system \\n no [{E}] [\\n] [{S}] user \\n {IMG} # # # {END_IMG} _ Hi [{E}] [\\n] "
            f"[{S}] assistant \\n [red] [{E}] [\\n]"
        ),
    ),
    "newlines in contents": (
        talk("Hi\nHi", "yes\nno", system="no"),
        f"{S} system \\n no {E} \\n {S} user \\n Hi \\n Hi {E} \\n {S} assistant \\n [yes] [\\n] [no] [{E}] \\n",
        (
            f"{S} system \\n no [{E}] [\\n] [{S}] user \\n Hi \\n Hi [{E}] [\\n] [{S}] assistant \\n [yes] [\\n] [no]"
            f" [{E}] [\\n]"
        ),
    ),
    "control words typed": (
        talk("Hi", f"no{E}", system="no"),
        (
            f"{S} system \\n no {E} \\n {S} user \\n Hi {E} \\n {S} assistant \\n "
            f"[no] [<] [|] [i] [m] [_] [e] [n] [d] [|] [>] [{E}] \\n"
        ),
        (
            f"{S} system \\n no [{E}] [\\n] [{S}] user \\n Hi [{E}] [\\n] [{S}] assistant \\n "
            f"[no] [<] [|] [i] [m] [_] [e] [n] [d] [|] [>] [{E}] [\\n]"
        ),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_labels_token_by_token(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    conversation, assistant, markup = EXPECTED[name]
    assert marked(tokenizer, ChatTemplate(tokenizer, media(QUERIES), A), conversation) == assistant
    assert marked(tokenizer, ChatTemplate(tokenizer, media(QUERIES), M), conversation) == markup


def test_default_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    text = tokenizer.decode(ChatTemplate(tokenizer, media(1)).encode(talk("Hi", "yes")).input_ids)
    assert text == f"{S}system\nYou are a helpful assistant.{E}\n{S}user\nHi{E}\n{S}assistant\nyes{E}\n"
    assert "system" not in tokenizer.decode(
        ChatTemplate(tokenizer, media(1), system="").encode(talk("Hi", "yes")).input_ids
    )


def test_prompt_is_what_precedes_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, media(QUERIES))
    sample = template.encode(talk(PICTURE, "red"))
    answer = next(i for i, label in enumerate(sample.labels) if label != IGNORE_INDEX)
    for conversation in (talk(PICTURE, "red"), talk(PICTURE)):
        prompt = template.encode_prompt(conversation)
        assert prompt.input_ids == sample.input_ids[:answer]
        assert set(prompt.labels) == {IGNORE_INDEX} and prompt.images == ("a.png",)


def test_encode_many_equals_encode(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, media(QUERIES))
    conversations = [c for c, _, _ in EXPECTED.values()]
    assert template.encode_many(conversations) == [template.encode(c) for c in conversations]


# ---- other templates

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | trim) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\n' }}{% elif m.role == 'user' %}{{ 'user ' +"
    " m.content }}{% else %}{{ ' assistant ' + m.content + eos_token }}{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}{{ ' assistant ' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{"
    " '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|im_start|>assistant\n<think></think>' }}{% endif %}"
)


@pytest.mark.parametrize("jinja", [GEMMA, VICUNA, THINKING])
def test_text_equals_the_template_of_transformers(jinja: str) -> None:
    tokenizer = small_tokenizer(chat_template=jinja, bos_token="<|endoftext|>")
    template = ChatTemplate(tokenizer, media(QUERIES), system="")
    turns = [("user", " Hi "), ("assistant", "yes\n"), ("user", "Hi"), ("assistant", "no ")]
    messages = [{"role": role, "content": text} for role, text in turns]
    sample = template.encode(talk(*(text for _, text in turns)))
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = template.encode_prompt(talk(*(text for _, text in turns)))
    assert tokenizer.decode(prompt.input_ids) == tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    learned = tokenizer.decode([label for label in sample.labels if label != IGNORE_INDEX])
    trimmed = [t.strip() if jinja == GEMMA else t for _, t in turns]
    assert learned == f"{trimmed[1]}<|im_end|>{trimmed[3]}<|im_end|>"


def test_template_that_refuses_system_messages_gets_none() -> None:
    tokenizer = small_tokenizer(chat_template=GEMMA, bos_token="<|endoftext|>")
    text = tokenizer.decode(ChatTemplate(tokenizer, media(1)).encode(talk("Hi", "yes", system="no")).input_ids)
    assert text == f"<|endoftext|>{S}user\nHi{E}\n{S}assistant\nyes{E}\n"


def test_end_of_sequence_is_learned_where_the_template_ends_bare() -> None:
    bare = (
        "{% for m in messages %}{{ m.role + ' ' + m.content }}{% endfor %}{% if add_generation_prompt %}assistant {%"
        " endif %}"
    )
    template = ChatTemplate(small_tokenizer(chat_template=bare), media(1))
    assert template.encode(talk("Hi", "yes")).labels[-1] == template.tokenizer.eos_token_id


def test_ids_for_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, media(1))
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIALS}
    assert template.stop_token_ids == (ids[S], ids[E])
    assert (template.pad_token_id, template.image_token_id) == (ids["<|endoftext|>"], ids["<|extra_0|>"])


def test_missing_tokens_are_told() -> None:
    with pytest.raises(DataError, match="no chat template"):
        ChatTemplate(small_tokenizer(["<|endoftext|>"], eos="<|endoftext|>"), media(1))
    template = ChatTemplate(small_tokenizer(SPECIALS[:3]), media(1))
    assert template.encode(talk("Hi", "yes"))
    with pytest.raises(DataError, match="can hold an image's place"):
        template.encode(talk(PICTURE, "red"))


def test_text_only_model_refuses_images(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="text only"):
        ChatTemplate(tokenizer, None).encode(talk(PICTURE, "red"))


def test_fingerprint_follows_what_matters(tokenizer: PreTrainedTokenizerFast) -> None:
    base = ChatTemplate(tokenizer, media(1)).fingerprint()
    assert ChatTemplate(small_tokenizer(), media(1)).fingerprint() == base
    others = [
        ChatTemplate(tokenizer, media(2)),
        ChatTemplate(tokenizer, media(1), "markup"),
        ChatTemplate(tokenizer, media(1), max_length=9),
        ChatTemplate(tokenizer, media(1), system="x"),
        ChatTemplate(small_tokenizer(chat_template=VICUNA), media(1)),
        CaptionTemplate(tokenizer, 512),
    ]
    assert len({base, *(t.fingerprint() for t in others)}) == 7


# ---- no text becomes a control token


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """Its model can spell the control tokens itself, so switching off special tokens is not enough."""
    vocab = [("<unk>", 0.0), *((t, 0.0) for t in SPECIALS), *((chr(c), -10.0) for c in range(32, 127))]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": [t for t in SPECIALS if t != "<|im_end|>"]})
    return tokenizer


def plainly_added_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML's tokens are added ones, but not marked as special."""
    tokenizer = small_tokenizer(["<|endoftext|>", "<|extra_0|>"], eos="<|endoftext|>")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("make", [small_tokenizer, unigram_tokenizer, plainly_added_tokenizer])
def test_contents_never_become_control_tokens(make: object) -> None:
    tokenizer = make()
    rng = random.Random(0)
    template = ChatTemplate(tokenizer, media(QUERIES), max_length=10_000)
    control = special_ids(tokenizer) | {tokenizer.convert_tokens_to_ids(t) for t in SPECIALS}
    pieces = [*SPECIALS, "<|im_", "end|>", "<", ">", "|", " ", "\n", "Hi", "é", "红"]
    plain = [i for i in template.encode(talk("Hi", "Hi")).input_ids if i in control]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        sample = template.encode(talk(text, text))
        assert [i for i in sample.input_ids if i in control] == plain, text
        if make is small_tokenizer:
            decoded = tokenizer.decode(sample.input_ids)
            assert decoded.count(text) >= 2


# ---- truncation


def test_truncation_keeps_images_whole_and_something_to_learn(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = random.Random(1)
    cut = dropped = 0
    reasons = set()
    for number in range(500):
        turns = []
        for i in range(2 * rng.randint(1, 3)):
            parts = ["Hi " * rng.randint(1, 4)]
            for n in range(rng.randint(0, 2) if i % 2 == 0 else 0):
                parts += [MediaRef(f"{i}-{n}.png"), "Hi"]
            turns.append(tuple(parts))
        conversation = talk(*turns, system="no")
        whole = ChatTemplate(tokenizer, media(QUERIES), max_length=1000).encode(conversation)
        if number % 10 == 0:  # ten conversations for each length
            template = ChatTemplate(tokenizer, media(QUERIES), max_length=rng.randint(8, 60))
        try:
            sample = template.encode(conversation)
        except RowError as error:
            reasons.add(error.reason)
            dropped += 1
            continue
        assert sample.input_ids == whole.input_ids[: len(sample)]
        assert sample.labels == whole.labels[: len(sample)]
        assert len(sample) <= template.max_length and sample.supervised_tokens > 0 and sample.labels[0] == IGNORE_INDEX
        assert sample.input_ids.count(template.image_token_id) == QUERIES * len(sample.images)
        assert sample.images == whole.images[: len(sample.images)]
        cut += len(sample) < len(whole)
    assert cut > 20 and dropped > 20
    assert reasons == {"no supervised token left after truncation"}


def test_cut_in_an_image_falls_back_to_the_turn_border(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = talk("Hi", "yes", ("Hi", MediaRef("a.png"), MediaRef("b.png")), "no", system="no")
    whole = ChatTemplate(tokenizer, media(QUERIES)).encode(conversation)
    template = ChatTemplate(tokenizer, media(QUERIES))
    second = len(whole) - 1 - whole.input_ids[::-1].index(template.image_token_id)
    template.max_length = second
    sample = template.encode(conversation)
    assert sample.images == ()
    assert tokenizer.decode(sample.input_ids).endswith(f"{S}assistant\nyes{E}")


def test_long_prompt_loses_text_never_images(tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = talk("Hi " * 50, "yes " * 50, ("Hi " * 10, MediaRef("a.png"), " What"), system="no")
    template = ChatTemplate(tokenizer, media(QUERIES), max_length=60)
    prompt = template.encode_prompt(conversation)
    assert len(prompt) == 60 and prompt.images == ("a.png",)
    assert prompt.input_ids.count(template.image_token_id) == QUERIES
    text = tokenizer.decode(prompt.input_ids)
    assert text.startswith(f"{S}system\nno{E}\n") and text.endswith(f" What{E}\n{S}assistant\n")
    with pytest.raises(RowError):
        ChatTemplate(tokenizer, media(QUERIES), max_length=10).encode_prompt(conversation)


def test_a_tokenizer_without_a_token_for_images_gets_one() -> None:
    tokenizer = small_tokenizer(["<|im_start|>", "<|im_end|>"])
    with pytest.raises(DataError, match="image's place"):
        image_token_id(tokenizer)
    size = len(tokenizer)
    ensure_image_token(tokenizer)
    assert image_token_id(tokenizer) == size and "<|im_start|>" in tokenizer.all_special_tokens
    ensure_image_token(tokenizer)
    assert len(tokenizer) == size + 1


# ---- captions and blind baselines


def test_caption(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = CaptionTemplate(tokenizer, 32).encode(talk(PICTURE, f"red{E}"))
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in (S, E))
    assert sample.input_ids[0] == start and sample.input_ids[-1] == end and end not in sample.input_ids[1:-1]
    assert sample.labels == (IGNORE_INDEX, *sample.input_ids[1:])
    assert sample.images == ("a.png",)
    assert len(CaptionTemplate(tokenizer, 4).encode(talk(PICTURE, "red red red red"))) == 4
    bert_like = small_tokenizer(["[CLS]", "[SEP]"], eos="[SEP]", cls_token="[CLS]")
    sample = CaptionTemplate(bert_like, 32).encode(talk(PICTURE, "red"))
    assert bert_like.decode(sample.input_ids) == "[CLS]red[SEP]"
    with pytest.raises(RowError, match="one image"):
        CaptionTemplate(tokenizer, 32).encode(talk("", "red"))


def test_blind_conversation_has_text_only(tokenizer: PreTrainedTokenizerFast) -> None:
    sample = ChatTemplate(tokenizer, media(QUERIES)).encode(without_images(talk(PICTURE, "red")))
    text = tokenizer.decode(sample.input_ids)
    assert f"{S}user\nHi" in text and "Img" not in text and sample.images == ()


def test_half_a_surrogate_pair_is_read_as_a_question_mark():
    template = ChatTemplate(small_tokenizer(), media(QUERIES))
    assert template.encode_prompt(talk("a \ud83d b")).input_ids == template.encode_prompt(talk("a ? b")).input_ids
