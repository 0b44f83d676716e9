"""Rows that are continued together are those continued alone by transformers, whatever their lengths and ends."""

import pytest
import torch

from lavis.core.types import Batch
from lavis.generation.decoding import LocalDecoder, Row
from lavis.generation.sampling import Chooser
from lavis.generation.settings import GenerationSettings
from lavis.generation.whole import generate_whole
from lavis.models.attention import attends_only
from lavis.models.configs import VlmConfig
from lavis.models.vlm import Vlm
from tests.generation.test_engine import llm_of

STOPS = (*range(0, 1100, 9),)
"""So many that answers end at different lengths."""


def prompts():
    torch.manual_seed(1)
    lengths = (21, 3, 40, 21, 9)
    ids = torch.randint(1, 1100, (len(lengths), max(lengths)))
    return Batch(ids, ids, ids, lengths=lengths)


def alone(llm, batch, settings, **more):
    embeds = llm.get_input_embeddings()(batch.input_ids)
    rows = zip(embeds, batch.lengths, strict=True)
    return [generate_whole(llm, row[None, :n], [n], STOPS, 0, settings, **more)[0] for row, n in rows]


@pytest.mark.parametrize("penalty", [1.0, 1.7])
@pytest.mark.parametrize("name", ["qwen2", "llama", "sliding", "mamba", "longrope"])
def test_rows_together_are_rows_alone(name, penalty):
    model, batch = Vlm(VlmConfig(), llm_of(name)).eval(), prompts()
    model.llm_model.generation_config.repetition_penalty = penalty
    decoder = LocalDecoder(model)
    assert decoder.repetition_penalty == penalty
    settings = GenerationSettings(max_new_tokens=30, repetition_penalty=penalty)
    if not attends_only(model.llm_model):  # left to transformers, whose rows are padded
        batch = Batch(*[batch.input_ids[:1, :21]] * 3, lengths=(21,))
    answers = decoder.generate(batch, STOPS, 0, settings)
    assert answers == alone(model.llm_model, batch, settings)
    if name == "qwen2":
        assert len(set(map(len, answers))) > 2


def test_draws_do_not_depend_on_the_batch():
    model, batch = Vlm(VlmConfig(), llm_of("qwen2")).eval(), prompts()
    settings = GenerationSettings(max_new_tokens=30, do_sample=True, temperature=3.0)
    together = LocalDecoder(model).generate(batch, STOPS, 0, settings)
    first = Batch(*[batch.input_ids[:1, :21]] * 3, lengths=(21,))
    assert LocalDecoder(model).generate(first, STOPS, 0, settings)[0] == together[0]


def test_each_row_has_the_rest_of_the_window():
    llm = llm_of("qwen2").eval()
    llm.config.max_position_embeddings = 48
    answers = LocalDecoder(Vlm(VlmConfig(), llm)).generate(prompts(), (), 0, GenerationSettings(max_new_tokens=30))
    assert [len(ids) for ids in answers] == [27, 30, 8, 27, 30]


def test_a_row_takes_nothing_after_its_end():
    row = Row(Chooser(GenerationSettings(), 0, ()), 2, (7,))
    for token in (5, 6, 8):
        row.take(token)
    assert row.ids == [5, 6] and row.finish_reason == "length"
    row = Row(Chooser(GenerationSettings(), 0, ()), 2, (7,))
    row.take(7)
    assert row.ids == [] and row.finish_reason == "stop"
