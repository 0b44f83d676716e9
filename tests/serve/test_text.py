"""Streamed pieces are the text; nothing is shown that is taken back."""

from __future__ import annotations

import random

import pytest

from lavis.serve.text import TextStream

TEXTS = (
    "Two red circles.",
    "  上面有两个红色的圆形。\n左边有三个 😀 星形  ",
    "a\n\nb   c\n",
    "naïve café — “quoted” 🇨🇳👩‍👩‍👧",
    "",
    "   ",
    "�?�",
)


def stream(tokenizer, ids, stop=()):
    s = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(s.add(token))
        if s.stopped:
            break
    return s, [*pieces, s.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text(chat, text):
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    s, pieces = stream(chat.tokenizer, ids)
    assert "".join(pieces) == s.text == chat.tokenizer.decode(ids).strip()
    assert not any("�" in p for p in pieces) or "�" in text


def test_random_tokens(chat):
    """Also bytes that make no character."""
    rng = random.Random(0)
    for _ in range(60):
        ids = [rng.randrange(len(chat.tokenizer)) for _ in range(rng.randrange(1, 60))]
        _, pieces = stream(chat.tokenizer, ids)
        whole = chat.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert whole.startswith("".join(pieces[:-1]).rstrip("�")) or "�" in whole
        if "�" not in whole:
            assert "".join(pieces) == whole


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("circles",), "Two red"),
        (("red c",), "Two"),
        (("Two",), ""),
        (("xyz", "."), "Two red circles"),
        (("cx", "d cir"), "Two re"),
        (("  ",), "Two red circles."),
    ],
)
def test_stop_texts_end_it_wherever_the_tokens_are_cut(chat, stop, left):
    s, pieces = stream(chat.tokenizer, chat.tokenizer("Two red circles.", add_special_tokens=False)["input_ids"], stop)
    assert "".join(pieces) == left
    assert s.stopped == (left != "Two red circles.")


def test_a_long_answer_costs_no_more_a_token(chat):
    calls = []

    class Counted:
        def decode(self, ids, **kwargs):
            calls.append(len(ids))
            return chat.tokenizer.decode(ids, **kwargs)

    ids = chat.tokenizer("Two red circles and three blue squares. " * 200, add_special_tokens=False)["input_ids"]
    s = TextStream(Counted())
    for token in ids:
        s.add(token)
    assert max(calls) < 20
