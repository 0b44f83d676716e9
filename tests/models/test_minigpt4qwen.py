import torch

from lavis.generation.decoding import LocalDecoder
from lavis.generation.settings import GenerationSettings
from lavis.models import scoring
from tests.models.conftest import IMAGE_ID, VOCAB, batch_of, loss_of, pack, small_model


def loss_and_gradient(model, batch):
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), model.connector.llm_proj.weight.grad.clone()


def test_loss_is_the_llms_own_loss_over_supervised_tokens(model):
    batch = batch_of([15, 15], [1, 2])
    embeds = model.embed(batch)
    expected = model.llm_model(inputs_embeds=embeds, labels=batch.labels).loss * batch.supervised_tokens
    torch.testing.assert_close(loss_of(model, batch), expected, rtol=1e-5, atol=1e-4)


def test_packed_equals_padded(model):
    batch = batch_of([18, 11, 9], [1, 2, 0])
    loss, gradient = loss_and_gradient(model, batch)
    packed_loss, packed_gradient = loss_and_gradient(model, pack(batch, 48))
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_packed_samples_do_not_see_each_other(model):
    batch = batch_of([18, 11], [1, 1])
    other = batch_of([18, 11], [1, 1], seed=1)
    ids = torch.cat([other.input_ids[:1], batch.input_ids[1:]])
    labels = batch.labels.clone()
    labels[0] = -100  # only the second sample counts
    changed = pack(batch_like(batch, ids, labels), 32)
    same = pack(batch_like(batch, batch.input_ids, labels), 32)
    torch.testing.assert_close(loss_of(model, changed), loss_of(model, same), rtol=1e-6, atol=0)


def batch_like(batch, ids, labels):
    import dataclasses

    return dataclasses.replace(batch, input_ids=ids, labels=labels)


def test_cached_features_equal_live_images(model):
    import dataclasses

    batch = batch_of([18, 15], [1, 2])
    features = model.encode_images(batch.pixel_values)
    cached = dataclasses.replace(batch, pixel_values=None, features=features)
    live, gradient = loss_and_gradient(model, batch)
    loss, cached_gradient = loss_and_gradient(model, cached)
    torch.testing.assert_close(loss, live, rtol=1e-6, atol=0)
    torch.testing.assert_close(cached_gradient, gradient, rtol=1e-5, atol=1e-6)


def test_only_the_projection_is_trained_and_frozen_parts_build_no_graph(model):
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["llm_proj.weight", "llm_proj.bias"]
    batch = batch_of([15], [1])
    assert not model.encode_images(batch.pixel_values).requires_grad
    assert not (model.visual_encoder.training or model.connector.Qformer.training or model.llm_model.training)
    loss_and_gradient(model, batch)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("llm_proj"))


def test_each_part_can_be_trained():
    model = small_model(freeze_vit=False, freeze_qformer=False, freeze_queries=False, freeze_llm=False)
    loss_of(model, batch_of([15], [1])).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == []
    assert model.visual_encoder.training and model.connector.Qformer.training and model.llm_model.training


def test_lora_trains_adapters_alone():
    model = small_model(get_lora=True, lora_parts=["llm", "qformer"], freeze_proj=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    assert {n.split(".")[0] for n in trained} == {"llm_model", "Qformer"}
    loss_of(model, batch_of([15], [1])).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_recomputing_activations_changes_nothing():
    batch = batch_of([18, 15], [1, 1])
    plain, gradient = loss_and_gradient(small_model(), batch)
    again, recomputed = loss_and_gradient(small_model(llm_grad_checkpoint=True), batch)
    torch.testing.assert_close(again, plain)
    torch.testing.assert_close(recomputed, gradient)


def test_chunked_logits_equal_whole_ones(model, monkeypatch):
    batch = batch_of([30, 27], [1, 2])
    whole, gradient = loss_and_gradient(model, batch)
    monkeypatch.setattr(scoring, "LOGITS_CHUNK_BYTES", 4 * VOCAB * 3)  # three positions at a time
    chunked, chunked_gradient = loss_and_gradient(model, batch)
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=0)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_answers_do_not_depend_on_the_batch_and_equal_transformers_generate(model):
    model.eval()
    batch = batch_of([21, 9, 14], [2, 0, 1])
    together = LocalDecoder(model).generate(batch, [5], 0, GenerationSettings(max_new_tokens=8))
    embeds = model.embed(batch)
    for row, length in enumerate(batch.lengths):
        alone = model.llm_model.generate(
            inputs_embeds=embeds[row : row + 1, :length],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=[5],
            pad_token_id=0,
        )[0].tolist()
        assert together[row] == (alone[: alone.index(5)] if 5 in alone else alone)


def test_placeholders_get_the_projected_vectors_in_reading_order(model):
    batch = batch_of([18, 12], [2, 1])
    embeds = model.embed(batch)
    vectors = model.connector.llm_proj(model.encode_images(batch.pixel_values)).flatten(0, 1)
    torch.testing.assert_close(embeds[batch.input_ids == IMAGE_ID], vectors)
