"""The tokenizer of first-generation Qwen against tiktoken, on a small vocabulary of its kind."""

import base64
import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from lavis.core.errors import DataError
from lavis.core.types import Conversation, MediaRef, Message
from lavis.data.assemble import load_tokenizer
from lavis.tokens.qwen1 import qwen1_tokenizer
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media
from tests.models.conftest import model_config
from tests.models.qwen1_reference import CONFIG, write_vocabulary

ROOT = Path(__file__).resolve().parents[2]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
CORPUS = [p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / "README.zh.md", ROOT / "docs" / "log.md")]
ODD = [
    "'s",
    "'LL",
    "'ſ",
    "\r\n",
    "\n\n",
    "  ",
    "\t",
    "\u3000",
    "\x85",
    "é",
    "e\u0301",
    "각",
    "\u1100\u1161",
    "한",
    "①",
    "½",
    "🎉",
    "👨‍👩‍👧",
]
ODD += ["，", "。", "\u200b", "İ", "ß", "Å", "\u212b", *SPECIAL[:4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen-1 folder whose vocabulary was learned from this repository's pages."""
    learned = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learned.train_from_iterator(CORPUS, trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    tokens = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    merged = [bytes(byte_of[c] for c in token) for token, _ in tokens if len(token) > 1]
    path = tmp_path_factory.mktemp("qwen1")
    write_vocabulary(path, merged)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return qwen1_tokenizer(folder)


@pytest.fixture(scope="module")
def reference(folder):
    """tiktoken as Qwen uses it: composed characters, then its own pattern."""
    tiktoken = pytest.importorskip("tiktoken")
    from lavis.tokens.qwen1 import read_ranks

    ranks = read_ranks(folder / "qwen.tiktoken")
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")


def random_texts(count):
    """Runs of English and Chinese words, odd characters and anything from two blocks of Unicode."""
    rng = random.Random(0)
    words = [word for text in CORPUS for word in text.split()]
    blocks = [range(32, 0x2FF), range(0x4E00, 0x9FFF)]
    pieces = [
        lambda: rng.choice(words),
        lambda: rng.choice(ODD),
        lambda: " ",
        lambda: chr(rng.choice(rng.choice(blocks))),
    ]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randrange(1, 15))) for _ in range(count)]


def test_every_id_is_tiktokens(tokenizer, reference):
    texts = random_texts(5000)
    assert tokenizer(texts)["input_ids"] == [reference(text) for text in texts]


def test_every_character_is_cut_as_tiktoken_does(tokenizer, reference):
    characters = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x10000), *range(0x1D000, 0x20000, 3))]
    texts = [f"a{c}b1 {c}{c}'{c} " for c in characters]
    wrong = [
        c
        for c, ids in zip(characters, tokenizer(texts)["input_ids"], strict=True)
        if ids != reference(f"a{c}b1 {c}{c}'{c} ")
    ]
    assert wrong == []


def test_text_survives_the_round_trip(tokenizer):
    for text in random_texts(200):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_vocabulary_in_qwens_order(tokenizer):
    start = len(tokenizer) - 208
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(start, start + 208))
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert all(tokenizer.added_tokens_decoder[i].special for i in range(start, start + 208))


def test_the_published_vocabulary_puts_endoftext_at_151643(tmp_path):
    rng = random.Random(0)
    merges = {bytes(pair): None for pair in itertools.product(range(256), repeat=2)}
    while len(merges) < 151643 - 256:
        merges[rng.randbytes(3)] = None
    write_vocabulary(tmp_path, merges)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert qwen1_tokenizer(tmp_path).convert_tokens_to_ids(tokens) == [151643, 151644, 151645, 151646, 151850]


def test_a_chat_is_chatml_with_the_default_system_message(tokenizer):
    user = {"role": "user", "content": "hi"}
    text = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == begin + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert (
        tokenizer.apply_chat_template([{"role": "system", "content": "S"}, user], tokenize=False).count("system") == 1
    )


def test_recipes_get_it_and_a_users_control_tokens_stay_text(folder, reference):
    tokenizer = load_tokenizer(model_config(llm_model=str(folder)))
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.is_fast
    template = ChatTemplate(tokenizer, media(3))
    question = Message("user", (MediaRef("a.png"), " What?<|im_end|>"))
    ids = template.encode_prompt(Conversation((question,), "1")).input_ids
    header, end = reference("<|im_start|>user\n"), reference("<|im_end|>\n<|im_start|>assistant\n")
    system = reference("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    image = [tokenizer.convert_tokens_to_ids("<|extra_0|>")] * 3
    assert ids[: len(system)] == tuple(system) and ids[-len(end) :] == tuple(end)
    assert ids[len(system) : len(system) + len(header)] == tuple(header)
    assert tuple(image) in [ids[i : i + 3] for i in range(len(ids))] and ids.count(tokenizer.eos_token_id) == 2
    assert template.stop_token_ids == tuple(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))


def test_a_saved_one_is_the_same_also_beside_a_qwen2_config(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (again.eos_token_id, again.pad_token_id, again.chat_template) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.chat_template,
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist: a first-generation Qwen folder needs its vocabulary"),
        (b"IQ== 0\nIg==\n", "line 2 is no base64 token with its number"),
        (b"IQ== 0\n!! 1\n", "line 2 is no base64 token with its number"),
        (b"".join(base64.b64encode(bytes([b])) + b" %d\n" % (b + (b > 99)) for b in range(256)), "is incomplete"),
        (b"IQ== 0\nIg== 1\n", "is incomplete"),
    ],
)
def test_damaged_vocabularies_are_told(tmp_path, content, message):
    if content:
        (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=message):
        qwen1_tokenizer(tmp_path)
