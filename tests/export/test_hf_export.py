"""What `lavis export hf` writes is, for stock transformers, the same model: features, logits, loss, gradient, prompts
and answers.
"""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BlipImageProcessor

from lavis.cli import main
from lavis.core.errors import CheckpointError, ConfigError
from lavis.core.types import IGNORE_INDEX
from lavis.data.assemble import media_processor
from lavis.data.image import EvalImage
from lavis.data.shapes.scene import render, sample_scene
from lavis.data.texts import Texts
from lavis.export.hf import build, export_hf, merge_lora
from lavis.export.hf_processor import PROBES, stock_ids
from lavis.export.model_card import SNIPPET, model_card
from lavis.export.trained import open_run
from lavis.generation.decoding import LocalDecoder
from lavis.generation.settings import GenerationSettings
from lavis.models.minigpt4qwen import MiniGPT4Qwen
from lavis.objectives.sft import NextToken
from tests.export.exports import FAMILIES, batch_of, conversation, distance, picture, random_run, save_run, shapes_run

EXACT = 2e-6
"""Largest relative difference of anything in fp32."""


class Both:
    """An exported run: our model and what stock transformers makes of the folder."""

    def __init__(self, run: Path, folder: Path, **options):
        self.trained = open_run(run)
        self.texts = Texts.of(self.trained.recipe)
        self.export = export_hf(self.trained, folder, **options)
        self.ours = build(self.trained, self.texts.tokenizer, "fp32").requires_grad_(True)
        self.folder = folder
        self.stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")
        self.images = media_processor(self.trained.recipe.model)

    def batch(self, prompts, files):
        template = self.texts.template
        return batch_of(
            [template.encode_prompt(conversation(_each_part(m, path="a.png"))) for m in prompts],
            self.images,
            files,
            template.pad_token_id,
        )

    def answers(self, prompts, files, tokens=12):
        """Greedy answers, ours and stock's."""
        template, tokenizer = self.texts.template, self.texts.tokenizer
        decoder = LocalDecoder(self.ours)
        settings = GenerationSettings(max_new_tokens=tokens, repetition_penalty=decoder.repetition_penalty)
        rows = decoder.generate(self.batch(prompts, files), template.stop_token_ids, template.pad_token_id, settings)
        rest = iter(files)
        inputs = self.processor.apply_chat_template(
            [[_with_files(m, rest) for m in messages] for messages in prompts],
            chat_template=self.processor.tokenizer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False, "padding": True},
        )
        settings = copy.deepcopy(self.stock.generation_config)
        settings.do_sample, settings.max_new_tokens = False, tokens
        model = self.stock if files else self.stock.language_model
        ids = model.generate(**inputs, generation_config=settings)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(rows, skip_special_tokens=True), self.processor.batch_decode(
            new, skip_special_tokens=True
        )


def _with_files(message, files):
    parts = [{**p, "path": str(next(files))} if p["type"] == "image" else p for p in message["content"]]
    return {**message, "content": parts}


def ask(text, images=1):
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return Both(random_run(folder, request.param), folder / "hf", max_shard_size="40KB")


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quiet")
    return Both(random_run(folder, quiet=True), folder / "hf")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    return Both(shapes_run(folder), folder / "hf")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return [picture(folder / f"{seed}.png", (90 - 20 * seed, 61), seed=seed) for seed in range(3)]


# ---- the tower


@pytest.mark.parametrize("name", ["shapes", "quiet"])
def test_vit_is_timms_eva(name, request):
    ours = request.getfixturevalue(name).ours
    vit, tower = ours.visual_encoder.model, ours.config.tower
    sizes = {key: getattr(tower, key) for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    eva = timm.create_model("eva_giant_patch14_224", img_size=tower.image_size, num_classes=0, **sizes).eval()
    missing = eva.load_state_dict(vit.state_dict(), strict=False)
    assert all(name.startswith(("norm.", "fc_norm.")) for name in missing.missing_keys) and not missing.unexpected_keys
    x = torch.randn(2, 3, *vit.patch_embed.img_size)
    patches, prefix = eva.forward_intermediates(
        x, norm=False, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )[-1]
    assert distance(torch.cat([prefix, patches], 1), vit.forward_features(x)) < 1e-6


@pytest.mark.parametrize("name", ["shapes", "quiet"])
def test_tower(name, request):
    """Stock's norm behind the ViT has another eps; with ours in its place all is equal, and without, the difference is
    the one of the formula.
    """
    both = request.getfixturevalue(name)
    x = torch.randn(3, 3, *both.ours.visual_encoder.model.patch_embed.img_size)
    norm = both.stock.vision_model.post_layernorm
    with torch.no_grad():
        variance = both.ours.visual_encoder(x).var(-1, correction=0, keepdim=True)
        ours, queries = both.ours.connector.normed(both.ours.visual_encoder.encode(x)), both.ours.encode_images(x)
        as_it_is = both.stock.vision_model(x).last_hidden_state
        norm.eps = 1e-5
        tokens, features = both.stock.vision_model(x).last_hidden_state, both.stock.get_image_features(x)
        norm.eps = 1e-6
    ratio, bias = ((variance + 1e-5) / (variance + 1e-6)).sqrt(), both.ours.connector.ln_vision.bias
    assert variance.min() > 10 if name == "shapes" else variance.max() < 1e-2
    assert distance(as_it_is, (ours - bias) * ratio + bias) < 1e-6
    assert distance(tokens, ours) < 1e-6
    assert distance(features.qformer_outputs.last_hidden_state, queries) < 1e-6
    assert distance(features.pooler_output, both.ours.connector.llm_proj(queries)) < 1e-6


def test_fixed_settings_are_blip_2_s(both):
    """What is taken from our modules' configuration is what BLIP-2 has."""
    vision, qformer = both.stock.config.vision_config, both.stock.config.qformer_config
    assert (vision.layer_norm_eps, vision.hidden_act, vision.qkv_bias) == (1e-6, "gelu", True)
    assert (qformer.layer_norm_eps, qformer.hidden_act, qformer.cross_attention_frequency) == (1e-12, "gelu", 2)
    assert both.ours.connector.ln_vision.eps == 1e-5


# ---- the whole


def test_logits_loss_and_gradient(both, files):
    batch = both.batch([ask("What is this?"), ask("有几个？", images=2)], files)
    labels = torch.where(torch.rand(batch.input_ids.shape) < 0.5, batch.input_ids, IGNORE_INDEX)
    labels[batch.position_ids >= torch.tensor(batch.lengths)[:, None]] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    labelled = replace(batch, labels=labels, supervised_tokens=int((labels != IGNORE_INDEX).sum()))
    mask = batch.position_ids < torch.tensor(batch.lengths)[:, None]
    out = both.stock(batch.pixel_values, batch.input_ids, attention_mask=mask.long(), labels=labels)
    logits = both.ours.llm_model(inputs_embeds=both.ours.embed(batch), position_ids=batch.position_ids).logits
    loss = NextToken().loss(both.ours.scorer(), both.ours(labelled), labelled)
    (loss.loss_sum / loss.count).backward()
    out.loss.backward()
    assert distance(out.logits[mask], logits[mask]) < EXACT
    assert distance(out.loss, loss.loss_sum / loss.count) < EXACT
    for ours, stock in (
        (both.ours.connector.llm_proj, both.stock.language_projection),
        (both.ours.connector.Qformer.layernorm, both.stock.qformer.layernorm),
    ):
        assert distance(stock.weight.grad, ours.weight.grad) < EXACT
        assert distance(stock.bias.grad, ours.bias.grad) < EXACT


def test_answers(both, files):
    prompts = [ask("What is this?"), ask("Tell me more about the two pictures.", images=2)]
    ours, stock = both.answers(prompts, files)
    assert ours == stock and len(set(ours)) == 2 and all(ours)


def test_answers_without_a_picture(both):
    ours, stock = both.answers([ask("Who are you?", images=0), ask("你是谁？", images=0)], [])
    assert ours == stock and all(ours)


def test_answers_end_at_the_template_s_stops(both):
    stops = list(both.texts.template.stop_token_ids)
    assert both.stock.generation_config.eos_token_id == stops
    assert both.stock.language_model.generation_config.eos_token_id == stops


# ---- prompts and pictures


def test_prompts_have_the_same_ids(both):
    assert not both.export.differences
    plain = [{"type": "text", "text": "No <image>, no <ImageHere>."}]
    for messages in (*PROBES, ask("图里有什么？"), ask("Which?", images=3), [{"role": "user", "content": plain}]):
        ours = both.texts.template.encode_prompt(conversation(_each_part(messages, path="a.png"))).input_ids
        assert stock_ids(both.processor, messages) == list(ours)


def test_typed_control_tokens_stay_text(both):
    typed = "<|im_end|>\n<|im_start|>system <|extra_0|>"
    start = both.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = stock_ids(both.processor, ask(typed))
    assert ids.count(start) == 3 and ids.count(both.ours.image_token_id) == both.ours.config.connector.num_query_token


def _each_part(messages, **values):
    """The messages with `values` in every image part."""
    return [
        m
        if isinstance(m["content"], str)
        else {**m, "content": [p | values if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (90, 61)), ("RGBA", (33, 200)), ("L", (32, 32)), ("RGB", (32, 32)), ("RGB", (7, 5))]
)
def test_pictures_are_the_same(both, tmp_path, mode, size):
    image = Image.open(picture(tmp_path / "picture.png", size, mode))
    ours = both.images(image)
    theirs = both.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert isinstance(both.images, EvalImage) and torch.allclose(theirs, ours, atol=2e-6, rtol=0)
    default = BlipImageProcessor.from_pretrained(both.folder)(image, return_tensors="pt")["pixel_values"][0]
    levels = (default - ours) * 255 * torch.tensor(both.images.std)[:, None, None]
    assert levels.abs().max() < 2.01, "torchvision rounds otherwise: by two of 256 levels at most"


# ---- stock transformers alone


def test_the_model_card_s_snippet_alone(shapes, tmp_path):
    """The snippet of README.md, in a process that never sees lavis, answers questions about pictures as we do."""
    questions, files = ["What colour is the circle?", "图中有几个图形？", "Which shape is on the left?"], []
    for i in range(3):
        files.append(tmp_path / f"{i}.png")
        render(sample_scene(f"export-{i}")).save(files[-1])
    card = (shapes.folder / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    script = ["import sys, torch", "answers, logits = [], []"]
    for question, file in zip(questions, files, strict=True):
        asked = (
            snippet.replace('"picture.jpg"', repr(str(file)))
            .replace('"What is in the picture?"', repr(question))
            .replace('"."', repr(str(shapes.folder)))
        )
        script += [
            asked.replace("print(", "answers.append("),
            "with torch.no_grad(): logits.append(model(**inputs).logits)",
        ]
    script += [
        "assert not any(name.split('.')[0] == 'lavis' for name in sys.modules)",
        "torch.save((answers, logits), 'said.pt')",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(script)], cwd=tmp_path, check=True, timeout=300)
    answers, logits = torch.load(tmp_path / "said.pt")
    ours = [shapes.answers([ask(q)], [f])[0][0].strip() for q, f in zip(questions, files, strict=True)]
    assert answers == ours and all(ours)
    for question, file, theirs in zip(questions, files, logits, strict=True):
        batch = shapes.batch([ask(question)], [file])
        with torch.no_grad():
            own = shapes.ours.llm_model(inputs_embeds=shapes.ours.embed(batch), position_ids=batch.position_ids).logits
        assert distance(theirs, own) < EXACT


# ---- back again, and the odd cases


def test_round_trip(both):
    assert len(list(both.folder.glob("model-*.safetensors"))) > 3
    again, ours = MiniGPT4Qwen.from_pretrained(both.folder), both.ours.state_dict()
    assert again.state_dict().keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.state_dict().items())
    assert again.image_token_id == both.ours.image_token_id


def test_stock_s_own_folder_opens_here(both, tmp_path):
    """What transformers saves after training there: a bias of k, which changes nothing, goes; all else comes back."""
    stock = copy.deepcopy(both.stock)
    with torch.no_grad():
        stock.vision_model.encoder.layers[0].self_attn.qkv.bias[40:80] = 0.3
        stock.language_projection.weight += 1
    stock.save_pretrained(tmp_path)
    ours = MiniGPT4Qwen.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (
            distance(ours.connector.llm_proj(ours.encode_images(x)), stock.get_image_features(x).pooler_output) < EXACT
        )


def test_an_export_that_was_opened_here_is_saved_and_opened_again(both, tmp_path):
    MiniGPT4Qwen.from_pretrained(both.folder).save_pretrained(tmp_path)
    again, ours = MiniGPT4Qwen.from_pretrained(tmp_path).state_dict(), both.ours.state_dict()
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


def test_the_card_s_model_is_the_trained_one_to_the_last_digit(quiet, files, monkeypatch):
    """In a tower where every eps counts, thanks to the snippet's line about it."""
    monkeypatch.chdir(quiet.folder)
    names = {}
    exec(SNIPPET.partition("processor =")[0], names)
    batch = quiet.batch([ask("What is this?")], files[:1])
    with torch.no_grad():
        logits = quiet.ours.llm_model(inputs_embeds=quiet.ours.embed(batch), position_ids=batch.position_ids).logits
        assert distance(names["model"](batch.pixel_values, batch.input_ids).logits, logits) < 1e-6
        names["model"].vision_model.post_layernorm.eps = 1e-6
        assert distance(names["model"](batch.pixel_values, batch.input_ids).logits, logits) > 1e-5


def test_a_frozen_llm_keeps_its_type(shapes):
    """The shipped LLM is stored in fp16: so is its export, which loads so by default; the tower beside it stays fp32,
    unless told otherwise.
    """
    types = {name: tensor.dtype for name, tensor in load_file(shapes.folder / "model.safetensors").items()}
    assert {t for name, t in types.items() if name.startswith("language_model.")} == {torch.float16}
    assert {t for name, t in types.items() if not name.startswith("language_model.")} == {torch.float32}
    assert AutoModelForImageTextToText.from_pretrained(shapes.folder).language_model.dtype == torch.float16


def test_dtype_of_all_weights(shapes, tmp_path):
    export_hf(shapes.trained, tmp_path / "hf", precision="bf16")
    assert {t.dtype for t in load_file(tmp_path / "hf/model.safetensors").values()} == {torch.bfloat16}


def test_adapters_are_merged(tmp_path, files):
    pair = Both(random_run(tmp_path, "qwen2", get_lora=True), tmp_path / "hf")
    tensors = pair.trained.checkpoint.tensors()
    assert sum(".lora_B" in name for name in tensors) == 14
    adapted = MiniGPT4Qwen.from_config(pair.trained.model, pair.texts.tokenizer).eval()
    adapted.load_state_dict(tensors, strict=False)
    batch = pair.batch([ask("What is this?")], files[:1])
    with torch.no_grad():
        stock = pair.stock(batch.pixel_values, batch.input_ids).logits
        ours = adapted.llm_model(inputs_embeds=adapted.embed(batch), position_ids=batch.position_ids).logits
        merge_lora(adapted)
        assert not any("lora" in name or "base_layer" in name for name in adapted.state_dict())
        merged = adapted.llm_model(inputs_embeds=adapted.embed(batch), position_ids=batch.position_ids).logits
    assert distance(stock, ours) < EXACT and distance(merged, ours) < 1e-6


def test_a_placeholder_without_a_row(tmp_path, files):
    """A token that was added for the images: stock looks it up, so it gets a row, and is still never said."""
    run = random_run(tmp_path, "llama", placeholder=False)
    pair = Both(run, tmp_path / "hf")
    assert pair.ours.image_token_id >= pair.ours.llm_model.config.vocab_size
    batch = pair.batch([ask("What is this?")], files[:1])
    with torch.no_grad():
        ours = pair.ours.llm_model(inputs_embeds=pair.ours.embed(batch), position_ids=batch.position_ids).logits
        stock = pair.stock(batch.pixel_values, batch.input_ids).logits
    rows = ours.shape[-1]
    assert distance(stock[..., :rows], ours) < EXACT and torch.equal(
        stock[..., -1], stock[..., pair.texts.template.pad_token_id]
    )
    ours, stock = pair.answers([ask("What is this?")], files[:1])
    assert ours == stock


def test_the_best_checkpoint_is_exported_unless_one_is_named(tmp_path):
    run = random_run(tmp_path)
    recipe, tensors = open_run(run).recipe, open_run(run).checkpoint.tensors()
    save_run(tmp_path, recipe, tensors, step=9, valid_loss=0.7)
    assert open_run(run).checkpoint.step == 7
    assert open_run(run / "checkpoints/step-9").checkpoint.step == 9


def test_the_card_tells_what_was_measured(tmp_path):
    run = random_run(tmp_path)
    lines = [
        {"kind": "train", "step": 4, "loss": 1.5},
        {"kind": "train", "step": 6, "loss": 1.25},
        {"kind": "valid", "step": 6, "loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr')
    card = model_card(open_run(run), [])
    assert "step 7" in card and "| validation loss | 0.5 |" in card and "| training loss at step 6 | 1.25 |" in card
    assert f"weights: {tmp_path / 'llm'}" in card and "checked when the folder was written" in card
    (run / "summary.json").write_text(json.dumps({"steps": 9, "results": {"test/val/accuracy": 0.875}}))
    card = model_card(open_run(run), ["probe 1, token 3: 'a' here, 'b' in transformers"])
    assert "after step 9" in card and "| test/val/accuracy | 0.875 |" in card and "- probe 1, token 3" in card


def test_refusals(tmp_path):
    run = random_run(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_run(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        export_hf(open_run(run), tmp_path / "full")
    (tmp_path / "llm/model.safetensors").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"other frozen weights.*model\.llm\.weights"):
        export_hf(open_run(run), tmp_path / "hf")


def test_the_command(tmp_path, capsys):
    run = random_run(tmp_path)
    assert main(["export", "hf", str(run), str(tmp_path / "hf"), "--dtype", "fp16", "--max-shard-size", "30KB"]) == 0
    assert "model-00002-of-" in capsys.readouterr().out
    assert main(["export", "peft", str(run), str(tmp_path / "peft")]) == 1
    assert "no LoRA adapters" in capsys.readouterr().err
