import pytest
from transformers import AutoTokenizer

from lavis.config.recipe import recipe_from_dict
from lavis.core.types import Conversation, Message
from lavis.tokens.training import TokenizerTraining


def fit(**model):
    recipe = recipe_from_dict(
        {"model": {"arch": "byte_level_bpe", **model}, "datasets": {"shapes_text": {}}, "run": {}}
    )
    texts = ["A red circle on the left.", "左边有一个红色的圆形。", "red", "红色"]
    task = TokenizerTraining(recipe)
    return task, task.fit([Conversation((Message("user", (t,)),)) for t in texts * 5])


@pytest.mark.parametrize(
    "text", ["red", "A red circle", "红色的圆形", "<Img> x </Img> 有几个？", "naïve 🙂 \n  two  spaces"]
)
@pytest.mark.parametrize("prefix", [True, False])
def test_any_text_survives(tmp_path, text, prefix):
    task, tokenizer = fit(vocab_size=400, add_prefix_space=prefix, split_pattern="[一-鿿]")
    task.export(tokenizer, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.decode(again(text).input_ids) == text
    assert again(text).input_ids == tokenizer(text).input_ids


def test_control_tokens_and_the_first_word():
    _, tokenizer = fit(vocab_size=400, add_prefix_space=True)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>"]) == [
        0,
        1,
        2,
        3,
    ]
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
    assert tokenizer("red").input_ids[0] in tokenizer("A red circle").input_ids
    _, apart = fit(vocab_size=500, split_pattern="[一-鿿]")
    assert len(apart("红色").input_ids) >= 2
