"""Small models with every dimension different, so that a mix-up of two shows."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lavis.config.compat import translate
from lavis.config.init import Init
from lavis.config.typed import read_dataclass
from lavis.core.dist import World
from lavis.core.registries import MODEL_CONFIGS
from lavis.core.types import IGNORE_INDEX, Batch
from lavis.models.initial import load_initial
from lavis.models.vlm import Vlm
from lavis.objectives.learner import Learner
from lavis.objectives.sft import NextToken

IMAGE_ID, VOCAB = 299, 300


def tower_settings(**changes):
    settings = {
        "vit": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4},
        "qformer": {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 56},
        "image_size": 32,
        "num_query_token": 4,
    }
    return settings | changes


def model_config(arch="minigpt4qwen", **settings):
    """The section of a model in the flat spelling, which is short, as the parts it means."""
    translated, problems = translate([{"model": {"arch": arch, **settings}}]), []
    values = translated.layers[0]["model"]
    config = read_dataclass(MODEL_CONFIGS.get(values["arch"]), values, "model", problems)
    assert not problems and not translated.wrong, (problems, translated.wrong)
    return config


def start_from(model, file):
    """Load the trained parts in `file`; what is frozen is taken to be there already."""
    frozen = {name for name, _ in model.state_dict().items()} - {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    return load_initial(model.state_dict(), Init(str(file)), model.visual_encoder, frozen)


def small_llm():
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=72,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def randomize(model):
    """Give every tensor non-trivial values (norm weights, biases and zero-initialised parts too)."""
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def small_model(**changes):
    torch.manual_seed(0)
    config = model_config(**tower_settings(**changes))
    model = Vlm(config, small_llm(), IMAGE_ID)
    model.add_adapters()
    return randomize(model).train()


def loss_of(model, batch):
    """The summed next-token loss of `model` on `batch`."""
    return Learner(model, NextToken(), World(0, 0, 1, torch.device("cpu")))(batch).loss_sum


def batch_of(lengths, images, seed=0):
    """A padded batch; row i has lengths[i] tokens, of which 2..

    are images[i] spans of 4 placeholders; the last third is supervised.
    """
    torch.manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, (length, n) in enumerate(zip(lengths, images, strict=True)):
        ids[row, :length] = torch.randint(1, IMAGE_ID, (length,))
        ids[row, 2 : 2 + 4 * n] = IMAGE_ID
        start = length - length // 3
        labels[row, start:length] = ids[row, start:length]
    pixels = torch.randn(sum(images), 3, 32, 32) if sum(images) else None
    positions = torch.arange(width).expand(len(lengths), width)
    return Batch(
        ids,
        labels,
        positions,
        pixels,
        supervised_tokens=int((labels != IGNORE_INDEX).sum()),
        lengths=tuple(lengths),
        num_samples=len(lengths),
    )


def pack(batch, total):
    """The rows of a padded batch in one row of `total` positions, its padding a run of its own."""
    pieces = [(batch.input_ids[i, :n], batch.labels[i, :n], torch.arange(n)) for i, n in enumerate(batch.lengths)]
    rest = total - sum(batch.lengths)
    pieces.append((torch.zeros(rest, dtype=torch.long), torch.full((rest,), IGNORE_INDEX), torch.arange(rest)))
    ids, labels, positions = (torch.cat(column)[None] for column in zip(*pieces, strict=True))
    return Batch(
        ids,
        labels,
        positions,
        batch.pixel_values,
        supervised_tokens=batch.supervised_tokens,
        lengths=(sum(batch.lengths),),
    )


@pytest.fixture
def model():
    return small_model()
