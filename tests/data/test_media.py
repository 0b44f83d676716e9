"""Media formats: the same rows in the text of two models, and spans whose length depends on the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from lavis.config.schema import DataEntry
from lavis.core.errors import DataError
from lavis.core.types import IGNORE_INDEX, Conversation, MediaRef, MediaSpan, Message
from lavis.data.dialects import detect, to_conversation
from lavis.data.image import EvalImage
from lavis.data.loader import ImageFolder, load_batch
from lavis.data.prepare import prepare
from lavis.data.sources import FileSource
from lavis.tokens.template import ChatTemplate
from tests.data.data_toys import media

ROWS = {
    "minigpt4qwen": {"image": "a.png", "instruction": "<Img><ImageHere></Img> Hi", "output": "no"},
    "llava": {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nHi"}, {"from": "gpt", "value": "no"}],
    },
    "messages": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "Hi"}]},
            {"role": "assistant", "content": "no"},
        ]
    },
}
TEXT = {"minigpt4qwen": "<Img>###</Img> Hi", "llava": "###\nHi"}


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("dialect", ROWS)
def test_a_row_of_any_dialect_is_written_in_the_models_format(
    tokenizer: PreTrainedTokenizerFast, dialect: str, name: str
) -> None:
    row = ROWS[dialect]
    assert detect(row) == dialect
    conversation = to_conversation(row, dialect, where="row")
    sample = ChatTemplate(tokenizer, media(3, name), system="").encode(conversation)
    text = tokenizer.decode(sample.input_ids).replace("<|extra_0|>", "#")
    assert text == f"<|im_start|>user\n{TEXT[name]}<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
    (span,) = sample.media
    assert set(sample.input_ids[span.start : span.start + span.length]) == {
        tokenizer.convert_tokens_to_ids("<|extra_0|>")
    }
    assert (span.ref.path, span.length, span.tiles) == ("a.png", 3, 1)


@pytest.mark.parametrize("name", TEXT)
def test_text_before_between_and_behind_pictures(name: str) -> None:
    a, b = MediaRef("a"), MediaRef("b")
    written = media(1, name).format.write(["look ", a, b, " then", "  two"])
    expected = {
        "minigpt4qwen": ["look <Img>", a, "</Img><Img>", b, "</Img> then  two"],
        "llava": ["look ", a, b, "\nthen  two"],
    }
    assert written == expected[name]


def test_what_a_user_writes_is_no_markup() -> None:
    """`<Img>` around words is text; around the tag, with or without spaces, it is the format's."""
    row = {"image": "a", "instruction": "<Img> <ImageHere> </Img> see <Img> x </Img>", "output": "y"}
    assert to_conversation(row, "minigpt4qwen", where="").messages[0].parts == (MediaRef("a"), " see <Img> x </Img>")


def test_the_format_and_the_tiling_are_in_the_fingerprint(tokenizer: PreTrainedTokenizerFast) -> None:
    specs = [
        media(2),
        media(2, "llava"),
        media(2, processor=EvalImage(8)),
        media(2, processor=EvalImage(8, tiling="tiles")),
        media(2, processor=EvalImage(8, tiling="tiles", max_tiles=3)),
        media(2, processor=EvalImage(9, tiling="tiles")),
        media(2, processor=EvalImage(8, tiling="anyres")),
    ]
    prints = [ChatTemplate(tokenizer, spec).fingerprint() for spec in specs]
    assert prints[0] == prints[2] and len(set(prints)) == len(specs) - 1


# ---- spans of a length that depends on the picture

SIZES = {"wide.png": (40, 10), "square.png": (16, 16), "turned.jpg": (10, 40)}
"""After their orientation."""


@pytest.fixture
def pictures(cache: Path) -> Path:
    folder = cache / "pictures"
    folder.mkdir()
    for name in ("wide.png", "square.png"):
        Image.effect_noise(SIZES[name], 60).convert("RGB").save(folder / name)
    turned = Image.effect_noise((40, 10), 60).convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "broken.png").write_text("no picture")
    return folder


def tiled(cache: Path, tokenizer: PreTrainedTokenizerFast, processor: EvalImage, max_length: int = 200):
    rows = [{"image": name, "instruction": "Hi", "output": "no"} for name in [*SIZES, "broken.png"]]
    rows.append({"image": ["wide.png", "square.png"], "instruction": "<ImageHere> Hi <ImageHere>", "output": "yes"})
    (cache / "rows.json").write_text(json.dumps(rows))
    source = FileSource(DataEntry(path="rows.json", images="pictures"), "data.train.0", "train")
    return prepare(source, ChatTemplate(tokenizer, media(2, processor=processor), max_length=max_length))


def test_spans_follow_the_size_and_a_picture_without_one_is_dropped(
    cache: Path, pictures: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    processor = EvalImage(8, tiling="tiles", max_tiles=4)
    table = tiled(cache, tokenizer, processor)
    tiles = {name: processor.num_tiles(size) for name, size in SIZES.items()}
    assert tiles == {"wide.png": 5, "square.png": 5, "turned.jpg": 5} and processor.num_tiles((8, 8)) == 1
    assert [[s.length for s in table.sample(i).media] for i in range(4)] == [[10], [10], [10], [10, 10]]
    assert table.num_tiles.tolist() == [5, 5, 5, 10]
    assert "an image's size cannot be read" in table.report.dropped
    assert table.conversation(0).media == (MediaRef("wide.png", (40, 10)),)


@pytest.mark.parametrize("tiling", ["tiles", "anyres"])
def test_a_batch_has_all_tiles_in_reading_order(
    cache: Path, pictures: Path, tokenizer: PreTrainedTokenizerFast, tiling: str
) -> None:
    processor = EvalImage(8, tiling=tiling, max_tiles=3)
    table = tiled(cache, tokenizer, processor)
    images = ImageFolder(processor)
    samples = [table.sample(i) for i in range(len(table))]
    batch = load_batch([[s] for s in samples], images, 0)
    each = [processor.tiles(Image.open(s.ref.path)) for sample in samples for s in sample.media]
    assert batch.tiles == tuple(len(tiles) for tiles in each) and batch.bad_images == 0
    assert torch.equal(batch.pixel_values, torch.cat(each))
    placeholders = (batch.input_ids == tokenizer.convert_tokens_to_ids("<|extra_0|>")).sum()
    assert placeholders == 2 * sum(batch.tiles)
    whole = load_batch([samples[:2], samples[2:]], images, 0, pack_length=400)
    assert torch.equal(whole.pixel_values, batch.pixel_values)


def test_a_picture_that_changed_is_blank_with_the_tiles_it_had(
    cache: Path, pictures: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    processor = EvalImage(8, tiling="tiles", max_tiles=4)
    table = tiled(cache, tokenizer, processor)
    Image.new("RGB", (8, 8)).save(pictures / "wide.png")
    batch = load_batch([[table.sample(0)], [table.sample(1)]], ImageFolder(processor), 0)
    assert (batch.tiles, batch.bad_images) == ((5, 5), 1)
    assert not batch.pixel_values[:5].any() and batch.pixel_values[5:].any()
    assert "1 tiles, not 5" in caplog.text


def test_truncation_never_cuts_a_span_of_any_length(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = EvalImage(8, tiling="tiles", max_tiles=4)
    spec = media(2, processor=processor)
    turns = [Message("user", (MediaRef(str(i), (8 * (i + 1), 8)), " Hi")) for i in range(4)]
    messages = [m for turn in turns for m in (turn, Message("assistant", ("yes",)))]
    conversation = Conversation(tuple(messages), "row")
    whole = ChatTemplate(tokenizer, spec, max_length=1000).encode(conversation)
    assert [span.length for span in whole.media] == [2, 6, 8, 10]
    learned = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    for length in range(learned + 1, len(whole) + 1):
        sample = ChatTemplate(tokenizer, spec, max_length=length).encode(conversation)
        assert sample.input_ids == whole.input_ids[: len(sample)]
        places = [
            i for i, token in enumerate(sample.input_ids) if token == tokenizer.convert_tokens_to_ids("<|extra_0|>")
        ]
        assert places == [i for s in sample.media for i in range(s.start, s.start + s.length)]
        assert sample.media == whole.media[: len(sample.media)]


def test_an_unknown_size_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(tokenizer, media(2, processor=EvalImage(8, tiling="anyres")))
    with pytest.raises(DataError, match="depends on its size"):
        template.encode_prompt(Conversation((Message("user", (MediaRef("a"), " Hi")),)))


def test_captions_have_their_picture_beside_them(tokenizer: PreTrainedTokenizerFast) -> None:
    from lavis.tokens.caption import CaptionTemplate

    sample = CaptionTemplate(tokenizer, 32).encode(to_conversation(ROWS["llava"], "llava", where="row"))
    assert sample.media == (MediaSpan(MediaRef("a.png"), 0, 0),)
    assert sample.labels[0] == IGNORE_INDEX and sample.supervised_tokens == len(sample) - 1
