import torch

from lavis.core.dist import World
from lavis.core.types import Batch
from lavis.models.blip2_qformer import Blip2QFormer
from lavis.objectives.blip2_stage1 import Blip2Stage1
from lavis.objectives.learner import Learner
from tests.models.conftest import model_config, randomize, tower_settings


def stage1(**changes):
    torch.manual_seed(0)
    trained = {"freeze_vit": False, "freeze_qformer": False, "freeze_queries": False, "embed_dim": 24}
    return randomize(Blip2QFormer(model_config("blip2_qformer", **tower_settings(**trained | changes)), 60, 0)).eval()


def captions(rows=3, length=9, pad=2):
    torch.manual_seed(1)
    ids = torch.randint(1, 60, (rows, length))
    ids[-1, length - pad :] = 0
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, 0] = -100
    return Batch(ids, labels, torch.arange(length).expand(rows, length), torch.randn(rows, 3, 32, 32), num_samples=rows)


def learned(model, batch):
    return Learner(model, Blip2Stage1(), World(0, 0, 1, torch.device("cpu")))(batch)


def test_queries_cannot_see_the_text_and_text_cannot_see_its_future():
    model, batch = stage1(), captions()
    tokens = model.image_tokens(batch.pixel_values)
    queries, logits = model.read_along(batch.input_ids, tokens)
    alone = model.encode_images(batch.pixel_values)
    torch.testing.assert_close(queries, alone, rtol=1e-5, atol=1e-5)
    other = captions()
    other.input_ids[:, -1] = 7  # the last input token is no context of any prediction
    _, same = model.read_along(other.input_ids, tokens)
    torch.testing.assert_close(same, logits)
    other.input_ids[:, 3] = 7
    _, changed = model.read_along(other.input_ids, tokens)
    assert not torch.allclose(changed, logits)
    torch.testing.assert_close(changed[:, :3], logits[:, :3])


def test_padding_changes_no_loss():
    model, batch = stage1(), captions()
    longer = Batch(
        torch.nn.functional.pad(batch.input_ids, (0, 4)),
        torch.nn.functional.pad(batch.labels, (0, 4), value=-100),
        torch.arange(13).expand(3, 13),
        batch.pixel_values,
        num_samples=3,
    )
    torch.manual_seed(0)
    short = learned(model, batch)
    torch.manual_seed(0)
    long = learned(model, longer)
    torch.testing.assert_close(short.loss_sum, long.loss_sum, rtol=1e-5, atol=1e-5)


def test_every_parameter_learns_and_one_image_alone_is_no_error():
    model = stage1().train()
    out = learned(model, captions())
    out.loss_sum.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert out.count == 3 and set(out.parts) == {"itc", "itm", "itg"}
    assert torch.isfinite(learned(model, captions(rows=1)).loss_sum)


def test_similarity_finds_the_caption_after_a_few_steps():
    model, batch = stage1().train(), captions(rows=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        learned(model, batch).loss_sum.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        similarity = model.similarity(batch.input_ids, model.encode_images(batch.pixel_values))
    assert similarity.argmax(1).tolist() == [0, 1, 2, 3]
