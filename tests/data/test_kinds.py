"""Rows of other kinds than conversations: documents in blocks, pairs of answers, prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry
from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Conversation, Document, MediaRef, Message, Pair, RowError
from lavis.data.dialects import detect, to_example
from lavis.data.loader import collate
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.data.table import PreparedTable
from lavis.tokens.document import DocumentTemplate
from lavis.tokens.pairs import PairTemplate, PromptTemplate
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media, small_tokenizer


def table_of(cache: Path, rows: list[Any], kind: str, template: Any) -> PreparedTable:
    (cache / "rows.json").write_text(json.dumps(rows))
    return prepare(FileSource(DataEntry(path="rows.json", kind=kind), "data.train.0", "train"), template)


# ---- documents


def documents(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    words = ["Hi", "yes", " ", "red", "<|im_end|>", "\n", "红"]
    return [{"id": f"d{i}", "text": "x" + "".join(rng.choices(words, k=rng.randint(1, 30)))} for i in range(count)]


@pytest.mark.parametrize("length", [8, 16, 1000])
def test_blocks_hold_every_token_once(cache: Path, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    rows = documents(40)
    template = DocumentTemplate(tokenizer, length)
    table = table_of(cache, rows, "document", template)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    endless = DocumentTemplate(tokenizer, 10**6)
    whole = [token for row in rows for block, _ in endless.blocks([Document(row["text"])]) for token in block.input_ids]
    samples = [table.sample(i) for i in range(len(table))]
    assert [token for s in samples for token in s.input_ids] == whole
    assert whole.count(end) == len(rows) == table.report.kept
    assert {len(s) for s in samples[:-1]} <= {length} and 0 < len(samples[-1]) <= length
    for sample in samples:
        assert sum(sample.parts) == len(sample) and not sample.media
        starts = [sum(sample.parts[:i]) for i in range(len(sample.parts))]
        expected = [IGNORE_INDEX if i in starts else token for i, token in enumerate(sample.input_ids)]
        assert list(sample.labels) == expected
    assert table.supervised_tokens.sum() == len(whole) - sum(len(s.parts) for s in samples)


def test_text_of_documents_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ((block, names),) = DocumentTemplate(tokenizer, 100).blocks([Document("no<|im_end|><|endoftext|>", "a")])
    control = {tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
    assert [t for t in block.input_ids if t in control] == [template_end(tokenizer)] and names == ["a"]


def template_end(tokenizer: PreTrainedTokenizerFast) -> int:
    return DocumentTemplate(tokenizer, 8).end_token_id


def test_positions_restart_with_each_document(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = [b for b, _ in DocumentTemplate(tokenizer, 6).blocks([Document("Hi"), Document("red Hi"), Document("no")])]
    assert [b.parts for b in blocks] == [(2, 4), (2,)]
    plain = collate([[b] for b in blocks], {}, 0, None)
    assert plain.position_ids.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    packed = collate([blocks], {}, 0, 10)
    assert packed.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 0, 1]]
    assert packed.supervised_tokens == plain.supervised_tokens == sum(b.supervised_tokens for b in blocks)


def test_documents_of_a_block_do_not_see_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    """The loss of a block is the sum of the losses of its documents, each by itself."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lavis.models.llm import hidden_states

    torch.manual_seed(0)
    llm = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1)
    ).eval()  # fmt: skip

    def loss(texts: list[str], pack: int | None) -> float:
        blocks = [b for b, _ in DocumentTemplate(tokenizer, 64).blocks(map(Document, texts))]
        batch = collate([blocks], {}, 0, pack)
        embeds = llm.get_input_embeddings()(batch.input_ids)
        with torch.no_grad():
            logits = llm.lm_head(hidden_states(llm, embeds, batch.position_ids))
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"))

    texts = ["Hi red yes", "no", "What red Hi no yes"]
    apart = sum(loss([text], None) for text in texts)
    assert loss(texts, None) == pytest.approx(apart, rel=1e-5)
    assert loss(texts, 80) == pytest.approx(apart, rel=1e-5)


def test_a_tokenizer_begins_documents_as_it_begins_texts() -> None:
    tokenizer = small_tokenizer(["<|endoftext|>", "<s>"], eos="<|endoftext|>", bos_token="<s>")
    assert DocumentTemplate(tokenizer, 8)._begin == ()  # it adds none of its own accord
    no_end = small_tokenizer(["<|im_start|>"], eos="<|im_start|>")
    no_end.eos_token = None
    with pytest.raises(DataError, match="no token that ends a document"):
        DocumentTemplate(no_end, 8)


# ---- pairs

PROMPT = (Message("user", (MediaRef("a.png"), " What?")),)
PAIR = Pair(
    Conversation((*PROMPT, Message("assistant", ("red",))), "row"),
    Conversation((*PROMPT, Message("assistant", ("no",))), "row"),
)
PAIRS = {
    "texts": {"images": ["a.png"], "prompt": "<image>What?", "chosen": "red", "rejected": "no"},
    "messages": {
        "image": "a.png",
        "prompt": [{"role": "user", "content": "<image>\nWhat?"}],
        "chosen": [{"role": "assistant", "content": "red"}],
        "rejected": {"role": "assistant", "content": "no"},
    },
    "whole dialogues": {
        "image": "a.png",
        "chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "red"}],
        "rejected": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "no"}],
    },
    "sharegpt": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "red"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "alpaca": {"image": "a.png", "instruction": "What?", "input": "", "chosen": "red", "rejected": "no"},
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_every_spelling(name: str) -> None:
    row = PAIRS[name]
    assert detect(row) == "preference"
    assert to_example(row, "preference", where="row") == PAIR


def test_answers_to_different_prompts_are_no_pair() -> None:
    row = {
        **PAIRS["whole dialogues"],
        "rejected": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "x"}],
    }
    with pytest.raises(RowError, match="different prompts"):
        to_example(row, "preference", where="row")
    with pytest.raises(RowError, match="'chosen' does not end with an answer"):
        to_example(
            {"prompt": "x", "chosen": {"role": "user", "content": "x"}, "rejected": "y"}, "preference", where="row"
        )


def test_a_table_of_pairs_holds_both_and_supervises_the_last_answer(
    cache: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    row = {"prompt": [*earlier, {"role": "user", "content": "What?"}], "chosen": "red red", "rejected": "no"}
    chat = ChatTemplate(tokenizer, media(2), max_length=100)
    table = table_of(cache, [row, PAIRS["texts"], {"prompt": "x"}], "pair", PairTemplate(chat))
    assert len(table) == 2 and table.report.num_dropped == 1
    chosen, rejected = table.pair(0)
    prompt = chat.encode_prompt(table.conversation(0))
    answers = [tokenizer.decode([t for t in s.labels if t != IGNORE_INDEX]) for s in (chosen, rejected)]
    assert answers == ["red red<|im_end|>", "no<|im_end|>"]
    assert chosen.input_ids[: len(prompt)] == rejected.input_ids[: len(prompt)] == prompt.input_ids
    assert table.lengths[0] == len(chosen) + len(rejected)
    assert [s.media[0].length for s in table.pair(1)] == [2, 2]


# ---- prompts and wrong kinds


def test_prompts_are_kept_with_their_answer(cache: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "What?"}, {"prompt": "What?", "answer": 7}, {"instruction": "What?", "output": "red"}]
    chat = ChatTemplate(tokenizer, None)
    table = table_of(cache, rows, "prompt", PromptTemplate(chat))
    assert len({table.sample(i).input_ids for i in range(3)}) == 1 and table.supervised_tokens.tolist() == [0, 0, 0]
    assert tokenizer.decode(table.sample(0).input_ids).endswith("What?<|im_end|>\n<|im_start|>assistant\n")
    assert [table.conversation(i).messages[-1].text for i in range(3)] == ["What?", "7", "red"]


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("conversation", {"text": "x"}),
        ("conversation", {"prompt": "x", "chosen": "a", "rejected": "b"}),
        ("pair", {"instruction": "x", "output": "y"}),
        ("document", {"instruction": "x", "output": "y"}),
    ],
)
def test_a_row_of_another_kind_says_which(cache: Path, kind: str, row: dict[str, Any]) -> None:
    (cache / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(RowError, match=rf"the row is a \w+, not a {kind}.*Set data\.train\.0\.kind"):
        list(FileSource(DataEntry(path="rows.json", kind=kind), "data.train.0", "train").examples())
