"""Many answers at once are the answers one by one; what fails or goes away harms no other."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lavis.core.errors import BusyError, ChatError
from lavis.generation.cache import GrowingLayer, PrefixStore, joined, row_of
from lavis.generation.engine import Engine
from lavis.generation.model import ChatModel, user_message
from lavis.generation.sampling import Chooser
from lavis.generation.settings import GenerationSettings
from lavis.generation.whole import generate_whole
from lavis.models.configs import VlmConfig
from lavis.models.llm import load_llm
from lavis.models.vlm import Vlm
from tests.serve.conftest import is_idle

QUESTIONS = (
    "What is in the picture?",
    "图里有什么？",
    "How many shapes are there?",
    "Is there a red circle on the left?",
)
LONG = GenerationSettings(max_new_tokens=40, do_sample=True, temperature=5.0, top_k=0)


def prompt_of(chat, question, *pictures):
    return chat.encode([user_message(question, pictures)], {p.key: p for p in pictures})


def mixed(chat, pictures, n=24):
    """Questions of several lengths about several pictures, greedy and drawn."""
    rng = random.Random(0)
    asked = []
    for i in range(n):
        question = QUESTIONS[i % 4] + " please" * rng.randrange(20)
        settings = GenerationSettings(
            max_new_tokens=rng.randrange(1, 30),
            do_sample=i % 3 == 0,
            temperature=3.0,
            repetition_penalty=1.3 if i % 5 == 0 else 1.0,
        )
        asked.append((prompt_of(chat, question, *pictures[i % 7 : i % 7 + i % 3]), settings, i))
    return asked


def test_many_at_once_are_one_by_one(chat, pictures):
    asked = mixed(chat, pictures)
    alone, together = Engine(chat, max_batch=1, store_bytes=0), Engine(chat, max_batch=8)
    expected = [list(alone.submit(prompt, settings, seed=seed)) for prompt, settings, seed in asked]
    depths, step = [], together._step
    together._step = lambda: depths.append(len(together._rows)) or step()
    answers = [together.submit(prompt, settings, seed=seed) for prompt, settings, seed in asked]
    for answer, ids in zip(answers, expected, strict=True):
        assert list(answer) == ids
    assert max(depths) > 3
    assert any(answer.cached_tokens for answer in answers)
    alone.close()
    together.close()


def test_greedy_and_beams_are_transformers_own(engine, pictures):
    chat = engine.chat
    for beams in (1, 3):
        prompt = prompt_of(chat, QUESTIONS[0], pictures[0])
        embeds = chat.embed(prompt.ids, [chat.model.encode_images(chat.pixels(pictures[0]))[0]])
        stops, pad = chat.template.stop_token_ids, chat.template.pad_token_id
        settings = GenerationSettings(max_new_tokens=20, num_beams=beams)
        (expected,) = generate_whole(chat.llm, embeds, [len(prompt)], stops, pad, settings)
        answer = engine.submit(prompt, settings)
        assert list(answer) == expected
        assert answer.finish_reason == "stop"


def llm_of(name):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1100,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    if name == "sliding":
        types = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3ForCausalLM(
            Gemma3TextConfig(**sizes, head_dim=12, sliding_window=16, layer_types=types, max_position_embeddings=512)
        )
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512))
    if name == "longrope":  # whose positions mean something else beside a long row
        rope = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 6,
            "long_factor": [4.0] * 6,
            "original_max_position_embeddings": 64,
        }
        return Phi3ForCausalLM(
            Phi3Config(
                **sizes,
                max_position_embeddings=512,
                original_max_position_embeddings=64,
                rope_parameters=rope,
                pad_token_id=0,
            )
        )
    if name == "mamba":
        return MambaForCausalLM(MambaConfig(vocab_size=1100, hidden_size=48, num_hidden_layers=2, state_size=4))
    return Qwen2ForCausalLM(Qwen2Config(**sizes, max_position_embeddings=512))


@pytest.mark.parametrize("name", ["qwen2", "llama", "sliding", "mamba", "longrope"])
def test_other_llms_over_turns_and_together(name, chat):
    """Also where attention slides over the last tokens alone, and where memory is no keys and values."""
    llm = llm_of(name).eval()
    llm.generation_config.pad_token_id = 0
    text = ChatModel(name, Vlm(VlmConfig(), llm), chat.tokenizer, None, torch.device("cpu"))
    engine = Engine(text, max_batch=4)
    settings = GenerationSettings(max_new_tokens=12)
    prompts = [prompt_of(text, "tell me " * (1 + 9 * i)) for i in range(4)]
    prompts += [
        text.encode([user_message("tell me "), *_said("it is red"), user_message("and " * n)], {}) for n in (1, 30)
    ]
    answers = [engine.submit(p, settings) for p in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        embeds = text.embed(prompt.ids, [])
        (expected,) = generate_whole(llm, embeds, [len(prompt)], text.template.stop_token_ids, 0, settings)
        assert list(answer) == expected
    engine.close()


def _said(text):
    from lavis.core.types import Message

    return [Message("assistant", (text,))]


def test_layers_on_several_devices(chat, pictures, tmp_path):
    """With a layer kept on disk: hooks bring each layer's weights and inputs together, as on several GPUs."""
    chat.llm.save_pretrained(tmp_path / "llm")
    places = {f"model.layers.{i}": "cpu" for i in range(chat.llm.config.num_hidden_layers)} | {"model.layers.1": "disk"}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    llm = load_llm(str(tmp_path / "llm"), device_map=places)
    assert {p.device.type for p in llm.parameters()} == {"cpu", "meta"}
    spread = Vlm(VlmConfig(), llm)
    engine = Engine(ChatModel("spread", spread, chat.tokenizer, None, torch.device("cpu")))
    whole = Engine(ChatModel("whole", Vlm(VlmConfig(), chat.llm), chat.tokenizer, None, torch.device("cpu")))
    prompts = [prompt_of(engine.chat, q) for q in QUESTIONS]
    assert [list(engine.submit(p)) for p in prompts] == [list(whole.submit(p)) for p in prompts]
    engine.close()
    whole.close()


def test_a_failing_answer_harms_no_other(engine, pictures, monkeypatch):
    chat = engine.chat
    encode = chat.model.encode_images

    def broken(pixels):
        if torch.equal(pixels, chat.pixels(pictures[5])):
            raise RuntimeError("boom")
        return encode(pixels)

    monkeypatch.setattr(chat.model, "encode_images", broken)
    answers = [engine.submit(prompt_of(chat, QUESTIONS[0], pictures[i]), LONG, seed=i) for i in (3, 5, 4)]
    with pytest.raises(ChatError, match="RuntimeError"):
        list(answers[1])
    assert all(len(list(a)) > 0 for a in (answers[0], answers[2]))


def test_a_failing_step_ends_its_answers_and_the_engine_goes_on(engine, pictures, monkeypatch):
    answer = engine.submit(prompt_of(engine.chat, QUESTIONS[0], pictures[0]), LONG)
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(ChatError, match="MemoryError"):
        list(answer)
    monkeypatch.setattr(engine, "_step", step)
    assert list(engine.submit(prompt_of(engine.chat, QUESTIONS[0], pictures[0])))


def test_cancelled_answers_leave_at_once(engine, pictures):
    endless = GenerationSettings(max_new_tokens=900, do_sample=True, temperature=10.0, top_k=0)
    answers = [
        engine.submit(prompt_of(engine.chat, QUESTIONS[i % 4], pictures[i % 8]), endless, seed=i) for i in range(12)
    ]
    for answer in answers:
        answer.cancel()
    for answer in answers:
        list(answer)
    assert {a.finish_reason for a in answers} <= {"cancelled", "stop"}
    assert "cancelled" in {a.finish_reason for a in answers}
    assert is_idle(engine)


def test_a_row_that_fails_and_one_that_is_complete(engine, pictures, monkeypatch):
    """Logits that are no numbers fail their own row; an answer that is whole is not lost with the step in which it
    ended.
    """
    chat = engine.chat
    asked = [prompt_of(chat, q, pictures[0]) for q in QUESTIONS[:3]]
    expected = list(engine.submit(asked[0], GenerationSettings(max_new_tokens=4)))
    choose = Chooser.__call__
    monkeypatch.setattr(
        Chooser,
        "__call__",
        lambda self, logits: (
            choose(self, logits) if len(self.ids) < len(asked[1]) + 3 or self.generator is None else 1 / 0
        ),
    )
    broken = engine.submit(asked[1], LONG)
    others = [engine.submit(p, GenerationSettings(max_new_tokens=30)) for p in (asked[0], asked[2])]
    with pytest.raises(ChatError, match="ZeroDivisionError"):
        list(broken)
    assert list(others[0])[:4] == expected and list(others[1])
    monkeypatch.setattr(engine, "_release", lambda: any(row.answer.ended for row in engine._rows) and 1 / 0)
    whole = engine.submit(asked[0], GenerationSettings(max_new_tokens=4))
    assert list(whole) == expected and whole.finish_reason == "length" and whole.error is None


def test_cancelled_questions_give_their_places_back(chat):
    engine = Engine(chat, max_batch=1, max_waiting=2)
    release = threading.Event()
    engine.submit(prompt_of(chat, QUESTIONS[0]), sink=lambda token: release.wait())
    time.sleep(0.2)
    waiting = [engine.submit(prompt_of(chat, QUESTIONS[0])) for _ in range(2)]
    for answer in waiting:
        answer.cancel()
    after = engine.submit(prompt_of(chat, QUESTIONS[0]))
    assert [list(a) for a in waiting] == [[], []]
    release.set()
    assert list(after)
    engine.close()


def test_closing_ends_an_answer_that_transformers_makes(chat):
    text = ChatModel("mamba", Vlm(VlmConfig(), llm_of("mamba").eval()), chat.tokenizer, None, torch.device("cpu"))
    vars(text)["stop_token_ids"] = frozenset([1099])
    engine = Engine(text)
    answer = engine.submit(prompt_of(text, "tell me"), GenerationSettings(max_new_tokens=30_000))
    time.sleep(1)
    engine.close()
    assert answer.finish_reason == "cancelled" and 0 < len(answer.ids) < 30_000


def test_too_long_too_many_and_closed(chat, pictures):
    engine = Engine(chat, max_batch=1, max_waiting=2)
    with pytest.raises(ChatError, match="reads at most 1024"):
        engine.submit(prompt_of(chat, "word " * 2000))
    slow = threading.Event()
    first = engine.submit(prompt_of(chat, QUESTIONS[0]), sink=lambda token: slow.wait())
    time.sleep(0.2)
    engine.submit(prompt_of(chat, QUESTIONS[0]))
    waiting = engine.submit(prompt_of(chat, QUESTIONS[0]))
    with pytest.raises(BusyError, match="try again"):
        engine.submit(prompt_of(chat, QUESTIONS[0]))
    closing = threading.Thread(target=engine.close)
    closing.start()
    slow.set()
    closing.join()
    assert list(waiting) == [] and waiting.finish_reason == "cancelled"
    assert first.finish_reason is not None
    with pytest.raises(ChatError, match="closed"):
        engine.submit(prompt_of(chat, QUESTIONS[0]))


def test_the_window_ends_an_answer(engine):
    prompt = prompt_of(engine.chat, "word " * 245)
    vars(engine.chat)["stop_token_ids"] = frozenset()
    try:
        answer = engine.submit(prompt, GenerationSettings(max_new_tokens=900))
        ids = list(answer)
    finally:
        del vars(engine.chat)["stop_token_ids"]
    assert answer.finish_reason == "length"
    assert len(prompt) + len(ids) == engine.chat.window


def test_text_models_refuse_pictures(chat, pictures):
    text = ChatModel("text", Vlm(VlmConfig(), chat.llm), chat.tokenizer, None, torch.device("cpu"))
    with pytest.raises(ChatError, match="reads text only"):
        prompt_of(text, "What is it?", pictures[0])


# ---- keys and values


def layers(rows, tokens, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(rows, 2, tokens, 4), torch.randn(rows, 2, tokens, 4)) for _ in range(2)]


def test_a_growing_layer_is_what_was_written(tmp_path):
    pieces = [torch.randn(1, 2, n, 4) for n in (5, 1, 70, 1, 300)]
    layer, begun = GrowingLayer(), GrowingLayer(pieces[0], pieces[0])
    for i, piece in enumerate(pieces):
        keys, values = layer.update(piece, -piece)
        assert torch.equal(keys, torch.cat(pieces[: i + 1], -2)) and torch.equal(values, -keys)
        if i:
            assert torch.equal(begun.update(piece, piece)[0], keys)
    assert pieces[0].shape == (1, 2, 5, 4)  # what it was given is as it was


def test_rows_are_joined_and_parted():
    a, b = layers(1, 3), layers(1, 7, seed=1)
    both = joined([a, b])
    for row, (part, length) in enumerate(((a, 3), (b, 7))):
        for pair, expected in zip(row_of(both, row, length), part, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(pair, expected, strict=True))


def test_the_store_keeps_what_was_used_last():
    one = layers(1, 10)
    size = sum(t.nbytes for pair in one for t in pair)
    store = PrefixStore(2 * size)
    a, b, c = (tuple(f"{name}{i}" for i in range(10)) for name in "abc")
    store.put(a, layers(1, 10))
    store.put(b, layers(1, 10))
    assert store.longest([*a, "x"])[0] == 10
    store.put(c, layers(1, 10))
    assert [store.longest([*keys, "x"])[0] for keys in (a, b, c)] == [10, 0, 10]
    n, found = store.longest(a)
    assert n == 9 and found[0][0].shape[-2] == 9  # the last token is always read
    store.put((*a, "x"), layers(1, 11))
    assert len(store) == 1  # what it goes on from is dropped, and two are too large
    assert store.num_bytes <= 2 * size
