"""What a model answers: greedily, to the last question of each conversation."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lavis.core.types import Conversation, Sample
from lavis.data.loader import ImageSource, load_batch
from lavis.data.texts import Texts
from lavis.generation.settings import LIMITS, GenerationSettings
from lavis.objectives.learner import Learner
from lavis.tokens.template import ChatTemplate

LONGEST_ANSWER = int(LIMITS["max_new_tokens"][1])


@dataclass(frozen=True)
class Answer:
    """One question and what came back.

    `images` are the paths the model saw; `expected` is empty for a free question.
    """

    id: str
    kind: str
    lang: str
    images: tuple[str, ...]
    question: str
    expected: str
    answer: str

    @property
    def correct(self) -> bool:
        """Whether the answer equals the expected one but for case, white space and final punctuation."""
        return normalize(self.answer) == normalize(self.expected)


def write_answers(file: Path, answers: Iterable[Answer]) -> None:
    """One JSON object a line: the answer's fields and whether it is correct."""
    rows = (json.dumps({**asdict(a), "correct": a.correct}, ensure_ascii=False) + "\n" for a in answers)
    file.write_text("".join(rows), encoding="utf-8")


def read_answers(file: Path) -> list[Answer]:
    """What `write_answers` wrote."""
    return [_read_answer(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _read_answer(row: dict[str, Any]) -> Answer:
    values: dict[str, Any] = {k: tuple(v) if k == "images" else v for k, v in row.items() if k != "correct"}
    return Answer(**values)


def normalize(text: str) -> str:
    """Text as it is compared: Unicode NFKC, lower case, white space folded, without final punctuation."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).rstrip(".!。?,; ")


class Answerer:
    """Answers conversations with a model, in batches of like length, each rank its share."""

    def __init__(self, learner: Learner, texts: Texts, images: ImageSource) -> None:
        assert isinstance(texts.template, ChatTemplate)
        self.learner, self.world, self.images = learner, learner.world, images
        self.tokenizer, self.template = texts.tokenizer, texts.template

    def answer(self, conversations: Iterable[Conversation], *, batch_size: int, max_new_tokens: int) -> list[Answer]:
        """Greedy answers to the last question of each conversation, in the given order, the same on every rank."""
        numbered = list(enumerate(conversations))
        mine = [(i, c, self.template.encode_prompt(c)) for i, c in numbered[self.world.rank :: self.world.size]]
        mine.sort(key=lambda item: len(item[2]))
        training = self.learner.training
        self.learner.eval()
        answers: dict[int, Answer] = {}
        most = -(-len(numbered) // self.world.size) if self.learner.in_step else len(mine)
        for start in range(0, most, batch_size):
            # keeps the others company
            chunk = (
                mine[start : start + batch_size]
                or mine[:1]
                or [(0, numbered[0][1], self.template.encode_prompt(numbered[0][1]))]
            )
            texts = self._generate([sample for _, _, sample in chunk], max_new_tokens)
            answers |= {i: _answer(c, text) for (i, c, _), text in zip(chunk, texts, strict=True)}
        self.learner.train(training)
        merged = {
            i: Answer(**a)
            for part in self.world.gather({i: asdict(a) for i, a in answers.items()})
            for i, a in part.items()
        }
        return [merged[i] for i, _ in numbered]

    def _generate(self, samples: list[Sample], max_new_tokens: int) -> list[str]:
        batch = load_batch([[s] for s in samples], self.images, self.template.pad_token_id)
        batch, decoder = self.learner.ready(batch), self.learner.decoder()
        settings = GenerationSettings(
            max_new_tokens=min(max_new_tokens, LONGEST_ANSWER), repetition_penalty=decoder.repetition_penalty
        )
        rows = decoder.generate(batch, self.template.stop_token_ids, self.template.pad_token_id, settings)
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _answer(conversation: Conversation, text: str) -> Answer:
    turns = conversation.messages
    expected = turns[-1].text if turns[-1].role == "assistant" else ""
    question = next(m for m in reversed(turns) if m.role == "user")
    return Answer(
        id=conversation.id,
        kind=conversation.kind,
        lang=conversation.lang,
        images=conversation.images,
        question=question.words.strip(),
        expected=expected,
        answer=text,
    )
