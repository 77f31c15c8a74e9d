"""The processor: placeholders for every budget, every kind of image file, and errors that say what was found."""

import base64
import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from delta_llava import DeltaLlavaProcessor


CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
    {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
]


def with_image(image):
    conversation = [{**turn, "content": [dict(part) for part in turn["content"]]} for turn in CHAT]
    conversation[0]["content"][0]["image"] = image
    return conversation


def placeholders(processor, inputs):
    return (torch.as_tensor(inputs["input_ids"]) == processor.image_token_id).sum(-1).tolist()


@pytest.mark.parametrize("budget", [1, 4, 9, 16, 36, 144])
def test_each_image_becomes_as_many_placeholders_as_its_budget(tiny_processor, noise, budget):
    processor = tiny_processor()
    inputs = processor(images=noise(1), text="a <image> b", num_visual_tokens=budget, return_tensors="pt")
    assert placeholders(processor, inputs) == [budget]
    assert inputs["num_visual_tokens"].dtype == torch.int64 and inputs["num_visual_tokens"].tolist() == [budget]
    assert processor.decode(inputs["input_ids"][0]) == "a " + "<image>" * budget + " b"


def test_one_budget_per_image_in_the_order_of_the_placeholders(tiny_processor, noise):
    processor = tiny_processor()
    first, second, third = noise(3)
    inputs = processor(
        images=[[first, second], [], [third]],
        text=["<image><image>", "nothing to see", "<image>"],
        num_visual_tokens=[9, 4, 36],
        padding=True,
        return_tensors="pt",
    )
    assert placeholders(processor, inputs) == [13, 0, 36]
    assert inputs["num_visual_tokens"].tolist() == [9, 4, 36]
    assert inputs["pixel_values"].shape == (3, 3, 48, 48)
    assert inputs["attention_mask"][0].tolist() == [0] * 23 + [1] * 13  # padded on the left


def test_text_alone_carries_no_image_inputs(tiny_processor):
    assert set(tiny_processor()(text="hello")) == {"input_ids", "attention_mask"}


def test_budget_through_the_chat_template(tiny_processor, noise):
    processor = tiny_processor()
    inputs = processor.apply_chat_template(
        with_image(noise(1)[0]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_visual_tokens": 16},
    )
    assert placeholders(processor, inputs) == [16]


@pytest.mark.parametrize(("template", "end"), [("vicuna-v1", "</s>"), ("chatml", "<|im_end|>"), ("plain", "\n")])
def test_generation_spans_cover_answers_with_their_end(tiny_processor, noise, template, end, templates):
    processor = tiny_processor()
    processor.chat_template = (templates / f"{template}.jinja").read_text()
    inputs = processor.apply_chat_template(
        with_image(noise(1)[0]),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    trained = processor.tokenizer.decode(inputs["input_ids"][inputs["assistant_masks"].bool()])
    space = " " if template == "vicuna-v1" else ""
    assert trained == f"{space}a circle{end}{space}red{end}"


def test_templates_render_what_their_models_were_trained_on(tiny_processor, templates):
    processor = tiny_processor()
    rendered = {}
    for name in ("vicuna-v1", "chatml", "plain"):
        processor.chat_template = (templates / f"{name}.jinja").read_text()
        rendered[name] = processor.apply_chat_template(CHAT)
    assert rendered["vicuna-v1"] == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful,"
        " detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: a circle</s>"
        "USER: Which colour? ASSISTANT: red</s>"
    )
    assert rendered["chatml"] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\na circle<|im_end|>\n"
        "<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    )
    assert rendered["plain"] == "<s><image>a circle\nred\n"
    processor.chat_template = (templates / "vicuna-v1.jinja").read_text()
    own = processor.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *CHAT[:1]], add_generation_prompt=True
    )
    assert own == "<s>Be brief. USER: <image>\nWhat is it? ASSISTANT:"
    with pytest.raises(Exception, match="message 1 has role tool"):
        processor.apply_chat_template([*CHAT[:1], {"role": "tool", "content": "4"}])


def saved(image, path):
    image.save(path)
    return str(path)


def test_images_of_every_mode_look_alike(tiny_processor, tmp_path):
    """Grey levels kept in other modes and files come out as the grey levels that they are, within one of 255."""
    processor = tiny_processor()
    grey = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    sixteen = Image.fromarray((np.asarray(grey).astype(np.uint16)) * 257)
    variants = {
        "RGB": grey.convert("RGB"),
        "L": grey,
        "RGBA": grey.convert("RGBA"),
        "LA": grey.convert("LA"),
        "palette": saved(grey.convert("P"), tmp_path / "palette.png"),
        "CMYK": saved(grey.convert("CMYK"), tmp_path / "cmyk.jpg"),
        "16-bit": sixteen,
        "16-bit PNG": saved(sixteen, tmp_path / "sixteen.png"),
        "32-bit integers": sixteen.convert("I"),
        "GIF": saved(grey, tmp_path / "named.jpg.gif"),
    }
    one_level = 1 / 255 / min(processor.image_processor.image_std)
    expected = processor(images=variants["RGB"], text="<image>", return_tensors="pt")["pixel_values"]
    for name, image in variants.items():
        pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
        tolerance = 6 * one_level if name == "CMYK" else 1.01 * one_level  # JPEG loses some
        assert (pixels - expected).abs().max() <= tolerance, name


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "I;16"])
def test_one_pixel_is_an_image(tiny_processor, tiny_model, mode):
    inputs = tiny_processor()(images=Image.new(mode, (1, 1)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert tiny_model()(**inputs).logits.isfinite().all()


def test_files_urls_and_base64_are_the_same_image(tiny_processor, noise, tmp_path, httpserver_url):
    image = noise(1)[0]
    path = saved(image, tmp_path / "image.png")
    data = base64.b64encode((tmp_path / "image.png").read_bytes()).decode()
    url = httpserver_url(tmp_path)
    processor = tiny_processor()
    expected = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    for source in (path, data, f"data:image/png;base64,{data}", f"{url}/image.png"):
        pixels = processor(images=source, text="<image>", return_tensors="pt")["pixel_values"]
        assert torch.equal(pixels, expected), source[:40]
    with pytest.raises(ValueError, match=r"Cannot read image http.*/missing\.png: .*404"):
        processor(images=f"{url}/missing.png", text="<image>")


def test_a_photo_lies_as_its_camera_was_held(tiny_processor, noise, tmp_path):
    image = noise(1, size=(40, 80))[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    image.save(tmp_path / "photo.png", exif=exif)
    processor = tiny_processor()
    pixels = processor(images=str(tmp_path / "photo.png"), text="<image>", return_tensors="pt")["pixel_values"]
    upright = processor(images=image.rotate(-90, expand=True), text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, upright)


def test_an_unreadable_image_is_named(tiny_processor, noise, tmp_path):
    processor = tiny_processor()
    whole = io.BytesIO()
    noise(1)[0].save(whole, "JPEG")
    (tmp_path / "truncated.jpg").write_bytes(whole.getvalue()[:-700])
    (tmp_path / "text.png").write_text("not an image")
    for name in ("truncated.jpg", "text.png", "missing.png", "."):
        with pytest.raises(ValueError, match=f"Cannot read image {tmp_path / name}: "):
            processor(images=str(tmp_path / name), text="<image>")
    with pytest.raises(ValueError, match=r"Cannot read image .*truncated\.jpg"):
        processor(images=Image.open(tmp_path / "truncated.jpg"), text="<image>")
    with pytest.raises(ValueError, match="floating point values"):
        processor(images=Image.new("F", (4, 4)), text="<image>")
    with pytest.raises(ValueError, match=r"its values span -5\.\.-5; 16 bits hold 0\.\.65535"):
        processor(images=Image.new("I", (4, 4), -5), text="<image>")


def test_a_decompression_bomb_is_refused(tiny_processor, tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"bomb\.png: .*decompression bomb"):
        warnings.simplefilter("ignore")
        tiny_processor()(images=str(tmp_path / "bomb.png"), text="<image>")


def test_texts_and_images_that_do_not_fit_are_refused(tiny_processor, noise):
    processor = tiny_processor()
    with pytest.raises(ValueError, match="texts hold 2 and come with 1 images"):
        processor(images=noise(1), text="<image> <image>")
    with pytest.raises(ValueError, match="texts hold 1 and come with 2 images"):
        processor(images=noise(2), text="<image>")
    with pytest.raises(ValueError, match="texts hold 1 and come with 0 images"):
        processor(text="<image>")
    first, second = noise(2)
    with pytest.raises(ValueError, match="text 0 holds 2 and comes with 1 images"):
        processor(images=[[first], [second]], text=["<image><image>", "none"])


def test_budgets_that_do_not_fit_are_refused(tiny_processor, tiny_tokenizer, noise):
    processor = tiny_processor()
    for budget in (64, 0, -4, 5):
        with pytest.raises(ValueError, match=rf"num_visual_tokens={budget} .* one of \[1, 4, 9, 16, 36, 144\]"):
            processor(images=noise(1), text="<image>", num_visual_tokens=budget)
    with pytest.raises(ValueError, match="names 3 budgets, but there are 2 images"):
        processor(images=noise(2), text="<image><image>", num_visual_tokens=[4, 4, 4])
    with pytest.raises(ValueError, match=r"num_visual_tokens=7 must be a square"):
        tiny_processor(num_visual_tokens=7, patch_grid_size=None)
    with pytest.raises(ValueError, match=r"splits '<image>' into \d+ tokens"):
        DeltaLlavaProcessor(processor.image_processor, tiny_tokenizer(image_token=None))


def test_what_servers_ask(tiny_processor, noise):
    processor = tiny_processor()
    counted = processor._get_num_multimodal_tokens(image_sizes=[(60, 70), (10, 10)], num_visual_tokens=[9, 4])
    assert (counted.num_image_tokens, counted.num_image_patches) == ([9, 4], [1, 1])
    assert processor._get_num_multimodal_tokens(image_sizes=[(60, 70)]).num_image_tokens == [36]
    inputs = processor(images=noise(1), text="a <image>", return_text_replacement_offsets=True, num_visual_tokens=4)
    (offset,) = inputs["text_replacement_offsets"][0]
    assert offset["replacement"] == "<image>" * 4 and offset["span"] == (2, 9) and offset["new_span"] == (2, 30)
    assert set(processor(images=noise(1), text="<image>")) == set(processor.model_input_names)


def test_a_saved_budget_is_the_processor_s_alone(tiny_processor, noise, tmp_path):
    tiny_processor().save_pretrained(tmp_path / "first")
    DeltaLlavaProcessor.from_pretrained(tmp_path / "first", num_visual_tokens=4).save_pretrained(tmp_path / "second")
    assert "num_visual_tokens" not in (tmp_path / "second/tokenizer_config.json").read_text()
    processor = DeltaLlavaProcessor.from_pretrained(tmp_path / "second")
    assert processor.num_visual_tokens == 4
    processor.num_visual_tokens = 16
    assert processor(images=noise(1), text="<image>")["num_visual_tokens"] == [16]
