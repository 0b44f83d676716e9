"""A trained LLaVA in a folder that stock transformers opens: the same logits; and it is read and asked here."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPModel

from lavis.config.recipe import recipe_from_dict
from lavis.core.errors import CheckpointError
from lavis.data.assemble import load_tokenizer, media_processor
from lavis.data.texts import Texts
from lavis.export.base import exporter_for
from lavis.export.hf import build, export_hf
from lavis.export.trained import open_run
from lavis.models.vlm import Vlm
from lavis.serve.load import load_chat
from lavis.tokens.template import image_token_id
from tests.export.exports import FAMILIES, SHAPES, batch_of, conversation, picture, randomize, save_run
from tests.models.test_llava import LLAMA, hub_folder, stock_llava
from tests.tokens.test_chat_templates import vicuna_tokenizer

CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
CLIP |= {"image_size": 56, "patch_size": 14}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def llava_run(folder, tokenizer=None, **changes):
    """A run folder with random values for connector, and adapters of tower and LLM; CLIP as it lies on the hub."""
    torch.manual_seed(3)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    clip = CLIPModel(CLIPConfig(vision_config=CLIP, text_config=TEXT | ids))
    randomize(clip.vision_model).zero_grad()
    clip.save_pretrained(folder / "clip")
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(SHAPES / "llm_a")
    llm = randomize(FAMILIES["llama"](len(tokenizer)))
    llm.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    lora = {"rank": 2, "dropout": 0.0}
    section = {
        "tower": {"name": "clip", "weights": str(folder / "clip"), "train": "lora", "lora": lora},
        "connector": {"name": "mlp"},
        "llm": {"weights": str(folder / "llm"), "train": "lora", "lora": lora},
        "media": {"format": "llava", "resize": "pad", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
        "max_length": 256,
    }
    data = {"train": [{"source": "shapes_instruction"}]}
    recipe = recipe_from_dict({"model": section | changes, "data": data, "run": {"task": "image_text_pretrain"}})
    model = Vlm.from_config(recipe.model)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return save_run(folder, recipe, {n: p for n, p in model.named_parameters() if p.requires_grad})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    trained = open_run(llava_run(folder))
    return trained, export_hf(trained, folder / "hf", max_shard_size="40KB")


def asked(text, *files):
    pictures = [{"type": "image", "path": str(file)} for file in files]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


@torch.no_grad()
def test_stock_transformers_gives_the_same_logits(exported, tmp_path):
    trained, export = exported
    assert export.differences == ()
    files = [picture(tmp_path / "wide.png", (90, 61)), picture(tmp_path / "high.png", (40, 77), seed=1)]
    texts = Texts.of(trained.recipe)
    ours = build(trained, texts.tokenizer, "fp32")
    stock = AutoModelForImageTextToText.from_pretrained(export.folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(export.folder, backend="pil")
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    for messages, shown in (
        (asked("How many circles?", files[0]), files[:1]),
        (asked("Which one is larger?", *files), files),
        (asked("Hello"), []),
    ):
        inputs = processor.apply_chat_template(
            messages,
            chat_template=processor.tokenizer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"add_special_tokens": False},
        )
        sample = texts.template.encode_prompt(conversation(messages))
        assert list(sample.input_ids) == inputs["input_ids"][0].tolist()
        batch = batch_of([sample], media_processor(trained.model), shown, texts.template.pad_token_id)
        if shown:
            torch.testing.assert_close(inputs["pixel_values"], batch.pixel_values, rtol=1e-5, atol=1e-5)
            inputs["pixel_values"] = batch.pixel_values
        logits = ours.llm_model.get_output_embeddings()(ours.hidden(batch))
        torch.testing.assert_close(stock(**inputs).logits, logits, rtol=1e-5, atol=1e-5)


def test_the_folder_is_asked_and_started_from(exported, tmp_path):
    trained, export = exported
    file = picture(tmp_path / "a.png")
    answers = []
    for named in ({"run": trained.run_folder}, {"checkpoint": export.folder}):
        chat = load_chat(**named, device="cpu", dtype="fp32")
        sample = chat.template.encode_prompt(conversation(asked("How many circles?", file)))
        pixels = torch.stack([chat.media.processor(Image.open(file))])
        with torch.no_grad():
            embeds = chat.model.embed_parts(torch.tensor([sample.input_ids]), pixels)
        answers.append((sample.input_ids, embeds))
    assert answers[0][0] == answers[1][0]
    torch.testing.assert_close(answers[0][1], answers[1][1], rtol=1e-5, atol=1e-5)
    again = Vlm.from_pretrained(export.folder)
    again.save_pretrained(tmp_path / "saved")
    for name, tensor in Vlm.from_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_the_card_and_the_settings_say_what_it_is(exported):
    _, export = exported
    card = (export.folder / "README.md").read_text()
    assert "LlavaForConditionalGeneration" in card and "tags: [llava]" in card and "language_model.generate" not in card
    config = json.loads((export.folder / "config.json").read_text())
    assert (config["vision_feature_layer"], config["vision_feature_select_strategy"]) == (-1, "default")
    assert (config["vision_config"]["num_hidden_layers"], config["image_seq_length"]) == (3, 16)
    assert "index" in "".join(file.name for file in export.files)  # shards


def test_what_the_class_cannot_be_is_said(tmp_path):
    trained = open_run(llava_run(tmp_path, connector={"name": "linear"}))
    with pytest.raises(CheckpointError, match=r"llava: its connector is not an mlp of depth 2\."):
        exporter_for("hf", trained.model)


def test_vicuna_s_tokenizer(tmp_path):
    """It has no token for pictures, and neither has the LLM a row: one is added, since stock transformers looks it up.
    What stands before and behind a picture is encoded apart, as LLaVA does it, and stock transformers is made to.
    """
    tokenizer = vicuna_tokenizer(image_token=None)
    trained = open_run(llava_run(tmp_path, tokenizer, chat_template="vicuna"))
    assert image_token_id(load_tokenizer(trained.model)) == len(tokenizer)
    export = export_hf(trained, tmp_path / "hf")
    stock = AutoModelForImageTextToText.from_pretrained(export.folder)
    assert stock.config.image_token_index == len(tokenizer) < stock.get_input_embeddings().weight.shape[0]
    assert export.differences == ()
    chat = load_chat(checkpoint=export.folder, device="cpu", dtype="fp32")
    assert chat.template.system.startswith("A chat between a curious human")


def test_a_folder_as_on_the_hub_is_asked(tmp_path):
    """llava-hf/llava-1.5-7b-hf: tensor names of before transformers 5, a central crop, a template that takes parts."""
    tokenizer = vicuna_tokenizer()
    tokenizer.chat_template = None
    text = LLAMA | {"vocab_size": len(tokenizer) + 64, "pad_token_id": 0}
    token = tokenizer.convert_tokens_to_ids("<image>")
    stock = stock_llava(text_config=text, image_token_index=token)
    hub_folder(stock, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pictures = {"size": {"shortest_edge": 56}, "do_center_crop": True, "image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    template = {"chat_template": "{% for m in messages %}{{ m.role.upper() }}{% endfor %}{{ 'ASSISTANT:' }}"}
    (tmp_path / "chat_template.json").write_text(json.dumps(template))
    chat = load_chat(checkpoint=tmp_path, device="cpu", dtype="fp32")
    image = chat.media.processor
    assert (image.image_size, image.resize, image.mean, image.std) == (56, "pad", (0.4,) * 3, (0.2,) * 3)
    file = picture(tmp_path / "a.png")
    sample = chat.template.encode_prompt(conversation(asked("What is this?", file)))
    assert tokenizer.decode(sample.input_ids[-6:]).endswith("What is this? ASSISTANT:")
    batch = batch_of([sample], image, [file], 0)
    with torch.no_grad():
        ours = chat.model.llm_model.get_output_embeddings()(chat.model.hidden(batch))
        theirs = stock(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
