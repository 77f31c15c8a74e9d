"""The processor: placeholders for every budget, every kind of image file, and errors that say what was found."""

import base64
import io
import os
import struct
import sys
import time
import zlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import datasets
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import transformers
from clients import encoded, photograph
from PIL import Image, ImageOps
from transformers import SiglipImageProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from delta_llava import DeltaLlavaProcessor, processing_delta_llava
from delta_llava.configuration_delta_llava import auto_visual_tokens, share_visual_tokens
from delta_llava.processing_delta_llava import DeltaLlavaProcessorKwargs, open_image


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


def test_images_of_every_mode_look_alike(tmp_path):
    """Grey levels kept in other modes and files come out as the grey levels that they are, within one of 255."""
    grey = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    variants = {
        "RGB": grey.convert("RGB"),
        "RGBA": grey.convert("RGBA"),
        "LA": grey.convert("LA"),
        "palette": saved(grey.convert("P"), tmp_path / "palette.png"),
        "CMYK": saved(grey.convert("CMYK"), tmp_path / "cmyk.jpg"),
        "GIF": saved(grey, tmp_path / "named.jpg.gif"),
    }
    for name, image in variants.items():
        difference = np.asarray(open_image(image)).astype(int) - np.asarray(grey)[..., None]
        assert np.abs(difference).max() <= (6 if name == "CMYK" else 1), name  # JPEG loses some


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "I;16"])
def test_one_pixel_is_an_image(tiny_processor, tiny_model, mode):
    inputs = tiny_processor()(images=Image.new(mode, (1, 1)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert tiny_model()(**inputs).logits.isfinite().all()


def test_an_image_is_the_same_however_it_is_given(tiny_processor, noise, tmp_path, httpserver_url, monkeypatch):
    image = noise(1)[0]
    path = saved(image, tmp_path / "image.png")
    content = Path(path).read_bytes()
    data = base64.b64encode(content).decode()
    url = httpserver_url(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # says nothing of other addresses
    pixels = np.asarray(image)
    sources = {
        "path": path,
        "pathlib": Path(path),
        "bytes": content,
        "base64": data,
        "base64 in lines": base64.encodebytes(content).decode(),
        "base64 for URLs": base64.urlsafe_b64encode(content).decode().rstrip("="),
        "data URL": f"data:image/png;base64,{data}",
        "URL": f"{url}/image.png",
        "array": pixels,
        "channels first": torch.tensor(pixels).permute(2, 0, 1),
        "floats up to 1": torch.tensor(pixels).permute(2, 0, 1) / 255,
        "floats up to 255": pixels.astype(np.float64),
        "64-bit integers": pixels.astype(np.int64),
        "half floats": (torch.tensor(pixels).permute(2, 0, 1) / 255).half(),
    }
    processor = tiny_processor()
    expected = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    for name, source in sources.items():
        for images in (source, [source], [[source]]):
            found = processor(images=images, text="<image>", return_tensors="pt")["pixel_values"]
            assert torch.equal(found, expected), name
    batch = processor(images=np.stack([pixels] * 2), text="<image><image>", return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat([expected] * 2))
    tiny = base64.b64encode(encoded(Image.new("L", (1, 1), 7), "GIF")).decode()
    assert len(tiny) < 64 and open_image(tiny).getpixel((0, 0)) == (7, 7, 7)
    with pytest.raises(ValueError, match=r"Cannot read image http.*/missing\.png: .*404"):
        processor(images=f"{url}/missing.png", text="<image>")


def test_scaled_arrays_pass_as_the_call_says(tiny_processor, noise):
    processor, pixels = tiny_processor(), np.asarray(noise(1, size=(48, 48))[0]).transpose(2, 0, 1)
    expected = processor(images=pixels, text="<image>", return_tensors="pt")["pixel_values"]
    scaled = {"images": pixels / np.float32(255), "text": "<image>", "return_tensors": "pt"}
    for options in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
        assert (processor(**scaled, **options)["pixel_values"] - expected).abs().max() < 0.02


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_a_photo_lies_as_its_camera_was_held(noise, tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"
    path.write_bytes(
        encoded(noise(1, size=(4, 8))[0], format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))
    )
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    sources = [path, path.read_bytes(), Image.open(path), Image.open(path).convert("RGB"), upright, open_image(path)]
    for source in sources:
        assert open_image(source).size == upright.size
        assert open_image(source).tobytes() == upright.tobytes()


def test_broken_exif_turns_nothing(noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(noise(1, size=(40, 80))[0], "JPEG", exif=exif)
    assert open_image(photo).size == (40, 80)
    assert open_image(photo.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")).size == (
        80,
        40,
    )


GREY = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)


def png(rows, width, height, bits=8, is_interlaced=0):
    """A PNG of RGB colours, with rows as many as there are."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, is_interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def deep_png(value):
    return png([struct.pack(">6H", *[value] * 6)] * 2, 2, 2, bits=16)


def test_deep_values_are_scaled_by_the_bits_that_hold_them():
    deep = {
        bits: Image.fromarray((GREY.astype(np.uint32) * (2**bits - 1) // 255).astype(np.uint16))
        for bits in (10, 12, 14, 16)
    }
    sources = [encoded(image, format) for image in deep.values() for format in ("PNG", "TIFF")]
    sources += [*deep.values(), *map(np.asarray, deep.values()), deep[12].convert("I")]
    sources.append(Image.frombytes("I;16B", (64, 48), (GREY.astype(">u2") * 257).tobytes()))
    floats = Image.fromarray(GREY.astype(np.float32) / 255)
    sources += [floats, encoded(floats, "TIFF"), Image.fromarray(GREY.astype(np.float32)), GREY / 255 + 1e-5]
    for source in sources:
        assert np.abs(np.asarray(open_image(source)).astype(int) - GREY[..., None]).max() <= 1
    assert open_image(np.array([[False, True]])).tobytes() == bytes([0] * 3 + [255] * 3)
    assert open_image(deep_png(40_000)).getpixel((0, 0)) == (156,) * 3


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (Image.new("I", (4, 4), -5), r"values span -5\.\.-5; integers must lie in 0\.\.65535"),
        (Image.new("I", (4, 4), 70_000), r"values span 70000\.\.70000"),
        (Image.new("F", (4, 4), 300), r"values span 300\.\.300; floats must span 0\.\.1 or 0\.\.255"),
        (torch.full((3, 4, 4), -2.0), r"of shape \(3, 4, 4\) and type torch\.float32: its values span -2\.\.-2"),
        (np.full((5, 5, 3), np.nan), r"values span nan\.\.nan"),
        (np.full((5, 5, 3), np.inf), r"values span inf\.\.inf"),
        (np.full((5, 5), None), "values are of type object"),
        (np.zeros((5, 0, 3), np.uint8), "it has 0 x 5 pixels"),
        (np.zeros((5, 6, 7), np.uint8), "channel"),
        (np.zeros(5), "dimensions height, width"),
        (deep_png(4000), "16-bit colours reach 4095 of 65535"),
        (Image.open(io.BytesIO(deep_png(4000))), "16-bit colours reach 4095 of 65535"),
        (None, "its type is NoneType: give a path"),
        (3, "its type is int: give a path"),
        (b"", "it is no image of the formats"),
        ("", "no such file"),
        ("photos/cat", "no such file"),
        ("a\0.png", "no such file"),
        ("data:image/png;base64,!", "its base64 is broken"),
        (encoded(Image.new("RGB", (4, 4)), "TGA"), "it is no image of the formats"),  # without a signature
    ],
)
def test_what_is_no_image_is_refused_with_what_was_found(source, found):
    with pytest.raises(ValueError, match=f"Cannot read image .*{found}"):
        open_image(source)


def test_transparency_is_white_and_of_an_animation_the_first_frame_is_seen():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.info["transparency"] = 0
    cleared = [
        clear,
        clear.convert("RGBa"),
        clear.convert("LA"),
        encoded(clear),
        encoded(palette, "GIF", transparency=0),
    ]
    for image in (*cleared, palette, np.asarray(clear), encoded(Image.new("1", (2, 2)), transparency=0)):
        assert open_image(image).getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for format in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        red, _, blue = open_image(encoded(frames[0], format, save_all=True, append_images=frames[1:])).getpixel((8, 8))
        assert red > 250 and blue < 5


JPEG_OPTIONS = [
    {},
    {"quality": 100},
    {"optimize": True},
    {"progressive": True},
    {"restart_marker_rows": 1},
    {"progressive": True, "restart_marker_blocks": 5},
]


@pytest.mark.parametrize("options", JPEG_OPTIONS, ids=str)
def test_a_sound_jpeg_is_seen_as_pillow_sees_it(options):
    sources = [photograph(), photograph((17, 23)), Image.new("L", (300, 200), 255), Image.new("CMYK", (1, 1)), GREY]
    for source in sources:
        data = encoded(source if isinstance(source, Image.Image) else Image.fromarray(source), "JPEG", **options)
        for stray in (b"", b"after the image", bytes(5000), data):
            assert open_image(data + stray).tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()
        stray = data[:-2] + bytes(8) + data[-2:]  # as cameras leave it
        assert open_image(stray).tobytes() == open_image(data).tobytes()


@pytest.mark.parametrize("options", [*JPEG_OPTIONS, {"quality": 92, "subsampling": 0}], ids=str)
@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"", b"no"], ids=["zeros", "ones", "left out", "text"])
def test_a_jpeg_with_a_hole_or_without_its_tail_is_refused(options, filling, noise):
    data = encoded(photograph(), "JPEG", **options)
    start = data.index(b"\xff\xda") + 200
    damaged = [data[:start] + (filling * 400)[:400] + data[start + 400 :]]
    for whole in (data, encoded(*noise(1, size=(160, 200)), "JPEG", **options)):
        for length in (2, 10, *(int(len(whole) * part) for part in (0.01, 0.03, 0.2, 0.5))):
            for tail in ((filling * length)[:length], filling * len(whole), whole[-2 * length : -length]):
                damaged += [whole[:-length] + tail, whole[:-length] + tail + whole]  # alone, and before another image
    for file in damaged:
        with pytest.raises(ValueError, match=r"Cannot read image .*(damaged|broken data|truncated)"):
            open_image(file)


def test_a_png_with_a_zeroed_tail_or_without_all_rows_is_refused():
    data = encoded(photograph())
    assert open_image(data).tobytes() == photograph().tobytes()
    assert open_image(data + bytes(99)).tobytes() == photograph().tobytes()
    for num_bytes in (1, 4, 8, 12, 100, 5000, len(data) // 2):
        for tail in (b"", bytes(num_bytes)):
            with pytest.raises(ValueError, match=r"damaged|broken|truncated|unrecognized"):
                open_image(data[:-num_bytes] + tail)
    with pytest.raises(ValueError, match=r"Cannot read image .*truncated"):
        open_image(Image.open(io.BytesIO(data[:-5000])))
    assert open_image(png([bytes(30)] * 10, 10, 10)).size == (10, 10)
    for num_rows, is_interlaced in ((5, 0), (9, 0), (5, 1)):
        with pytest.raises(ValueError, match=r"rows of its pixels are missing|truncated"):
            open_image(png([bytes(30)] * num_rows, 10, 10, is_interlaced=is_interlaced))


@pytest.mark.parametrize("size", [(1, 65_500), (201, 1), (16_385, 100)])
def test_a_shape_whose_square_would_fill_the_memory_is_refused(size):
    image = Image.new("L", size)
    for source in (image, encoded(image, "JPEG"), encoded(image), np.zeros(size[::-1], np.uint8)):
        with pytest.raises(ValueError, match=rf"it has {size[0]} x {size[1]} pixels: a side has at most 16384"):
            open_image(source)
    assert open_image(Image.new("L", (200, 1))).size == (200, 1)


def test_what_has_no_end_or_starts_a_program_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match=f"Cannot read image {path}: it is not a regular file"):
            open_image(path)
    (tmp_path / "page.eps").write_bytes(encoded(Image.new("RGB", (4, 4)), "EPS"))
    for source in (tmp_path / "page.eps", Image.open(tmp_path / "page.eps")):
        with pytest.raises(ValueError, match=r"formats? .*AVIF, BMP, GIF"):
            open_image(source)
    scan = encoded(photograph((16, 16)), "JPEG", progressive=True)
    start, end = scan.rindex(b"\xff\xda"), len(scan) - 2
    with pytest.raises(ValueError, match="more than 200 scans"):
        open_image(scan[:start] + scan[start:end] * 201 + scan[end:])


class Endless(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/silence":
            time.sleep(2)
        elif self.path == "/header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            self.drip()
        self.send_response(302 if self.path == "/redirects" else 200)
        if self.path == "/redirects":
            self.send_header("Location", "/redirects")
        elif self.path == "/gzip":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if self.path == "/drops":
            self.drip()
        elif self.path == "/flood":
            self.drip(length=2**20, pause=0)

    def drip(self, length=1, pause=0.05):
        while True:
            self.wfile.write(b"x" * length)
            self.wfile.flush()
            time.sleep(pause)

    def log_message(self, *args):
        pass


def test_an_address_without_an_end_is_given_up(http_server, monkeypatch):
    monkeypatch.setattr(processing_delta_llava, "FETCH_SECONDS", 1.5)
    monkeypatch.setattr(processing_delta_llava, "MAX_IMAGE_BYTES", 2**24)
    port = http_server(Endless).server_port
    for path, reason in {
        "redirects": "redirects",
        "silence": "timed out",
        "header": "no whole answer within 1.5 s",
        "drops": "no whole answer within 1.5 s",
        "flood": "it has more than 16777216 bytes",
        "gzip": r"the server sends it compressed \(gzip\), which was not requested",
    }.items():
        with pytest.raises(ValueError, match=rf"Cannot read image http.*/{path}: .*{reason}"):
            open_image(f"http://127.0.0.1:{port}/{path}")


def test_texts_and_images_that_do_not_fit_are_refused(tiny_processor, noise):
    first, second = noise(2)
    for images, text, found in (
        (first, "<image> <image>", "texts hold 2 and come with 1 images"),
        ([first, second], "<image>", "texts hold 1 and come with 2 images"),
        (None, "<image>", "texts hold 1 and come with 0 images"),
        ([[first], [second]], ["<image><image>", "none"], "text 0 holds 2 and comes with 1 images"),
    ):
        with pytest.raises(ValueError, match=found):
            tiny_processor()(images=images, text=text)


def test_budgets_that_do_not_fit_are_refused(tiny_processor, tiny_tokenizer, noise):
    processor = tiny_processor()
    for budget in (64, 0, -4, 5):
        with pytest.raises(ValueError, match=rf"num_visual_tokens={budget} .* one of \[1, 4, 9, 16, 36, 144\]"):
            processor(images=noise(1), text="<image>", num_visual_tokens=budget)
    with pytest.raises(ValueError, match="names 3 budgets, but there are 2 images"):
        processor(images=noise(2), text="<image><image>", num_visual_tokens=[4, 4, 4])
    for budget in (7, 10**400 + 1):
        with pytest.raises(ValueError, match=rf"num_visual_tokens={budget} must be a square"):
            tiny_processor(num_visual_tokens=budget, patch_grid_size=None)
    with pytest.raises(ValueError, match=r"splits '<image>' into \d+ tokens"):
        DeltaLlavaProcessor(processor.image_processor, tiny_tokenizer(image_token=None))


def test_budgets_of_every_integer_kind_are_taken_and_others_refused_by_name(tiny_processor, noise):
    processor = tiny_processor()
    for budget in (4, np.int64(4), torch.tensor(4), [4], (4,), np.array([4]), torch.tensor([4]), [torch.tensor(4)]):
        for options in ({"num_visual_tokens": budget}, {"images_kwargs": {"num_visual_tokens": budget}}):
            assert processor(images=noise(1), text="<image>", **options)["num_visual_tokens"] == [4]
        assert processor._get_num_multimodal_tokens(
            image_sizes=[(9, 9)], num_visual_tokens=budget
        ).num_image_tokens == [4]
    for budget in (True, 4.0, "4", "Auto", [True], [4.0], ["auto", "4"], torch.tensor([[4]]), torch.tensor(4.0), {4}):
        with pytest.raises(ValueError, match=r"num_visual_tokens=.* must be an integer or 'auto', or a list"):
            processor(images=noise(1), text="<image>", num_visual_tokens=budget)
    with pytest.raises(ValueError, match="num_visual_tokens=True must be an integer"):
        tiny_processor(num_visual_tokens=True)
    with pytest.raises(ValueError, match="names 1 budgets, but there are 0 images"):
        processor(text="no image", num_visual_tokens=[4])


@pytest.mark.parametrize(
    ("longer_side", "patch_size", "budgets", "default", "expected"),
    [
        (14, 14, [144, 1, 36], 144, 1),
        (15, 14, [144, 1, 36], 144, 36),
        (1, 14, [36, 144], 144, 36),
        (16_384, 14, [1, 144, 576], 144, 144),  # no more than the default
        (16_384, 14, [1, 144], 144, 144),  # none is as large as it needs
        (20, 14, [1, 36, 144], 16, 16),  # nor is any that the default allows
    ],
)
def test_auto_is_the_smallest_trained_budget_for_the_patches_of_the_image_itself(
    longer_side, patch_size, budgets, default, expected
):
    assert auto_visual_tokens(longer_side, patch_size, budgets, default) == expected


def test_auto_looks_at_the_picture_as_it_was_opened(tiny_processor, noise, tmp_path):
    processor = tiny_processor(num_visual_tokens=144)  # patches of 4 pixels
    sizes = {(4, 3): 1, (5, 8): 4, (9, 2): 9, (13, 16): 16, (17, 5): 36, (24, 24): 36, (25, 1): 144, (300, 40): 144}
    images, expected = [Image.new("RGB", size) for size in sizes], list(sizes.values())
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = encoded(Image.new("RGB", (16, 4)), "JPEG", exif=exif)
    scaled = np.zeros((3, 7, 11), np.float32)
    given = [
        (images, expected, {}),
        ([saved(image, tmp_path / f"{number}.png") for number, image in enumerate(images)], expected, {}),
        ([np.asarray(image) for image in images], expected, {}),
        ([photo, encoded(images[0])], [16, 1], {}),
        (scaled, [9], {"do_rescale": False}),
        (scaled.transpose(1, 2, 0), [9], {"do_rescale": False}),
        (images[0], [1], {"size": {"shortest_edge": 48}}),
    ]
    for sources, budgets, options in given:
        text = "<image>" * len(budgets)
        for named in ({"num_visual_tokens": "auto"}, {"images_kwargs": {"num_visual_tokens": np.str_("auto")}}):
            inputs = processor(images=sources, text=text, return_tensors="pt", **named, **options)
            assert inputs["num_visual_tokens"].dtype == torch.int64
            assert inputs["num_visual_tokens"].tolist() == budgets and placeholders(processor, inputs) == [sum(budgets)]
    planned = processor._get_num_multimodal_tokens(
        image_sizes=[(image.height, image.width) for image in images], num_visual_tokens="auto"
    )
    assert (planned.num_image_tokens, planned.num_image_patches) == (expected, [1] * len(images))
    mixed = ["auto", 9, "auto"]
    assert processor(images=images[:3], text="<image>" * 3, num_visual_tokens=mixed)["num_visual_tokens"] == [1, 9, 9]
    assert set(processor(text="hi", num_visual_tokens="auto")) == {"input_ids", "attention_mask"}
    for default in (1, 16, 36):
        processor.num_visual_tokens = default
        inputs = processor(images=images, text="<image>" * len(images), num_visual_tokens="auto")
        assert inputs["num_visual_tokens"] == [min(budget, default) for budget in expected]


def test_auto_chooses_among_the_trained_budgets_which_are_saved(tiny_processor, tmp_path):
    sizes = [(4, 4), (8, 8), (12, 12), (48, 48)]

    def chosen(processor):
        return processor._get_num_multimodal_tokens(image_sizes=sizes, num_visual_tokens="auto").num_image_tokens

    assert chosen(tiny_processor()) == [1, 4, 9, 36]  # as of a release that did not save them
    tiny_processor(visual_token_budgets=[36, 4]).save_pretrained(tmp_path / "first")
    DeltaLlavaProcessor.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert chosen(DeltaLlavaProcessor.from_pretrained(tmp_path / "second")) == [4, 4, 36, 36]
    other = DeltaLlavaProcessor.from_pretrained(tmp_path / "second", visual_token_budgets=[9, 36])
    other.save_pretrained(tmp_path / "third")
    assert chosen(DeltaLlavaProcessor.from_pretrained(tmp_path / "third")) == [9, 9, 9, 36]
    # Not the tokenizer's, to which from_pretrained passes it too
    fourth = DeltaLlavaProcessor.from_pretrained(tmp_path / "third", num_visual_tokens=4)
    fourth.save_pretrained(tmp_path / "fourth")
    assert "visual_token" not in (tmp_path / "fourth/tokenizer_config.json").read_text()
    assert DeltaLlavaProcessor.from_pretrained(tmp_path / "fourth").num_visual_tokens == 4
    with pytest.raises(ValueError, match=r"num_visual_tokens=5 .* one of \[1, 4, 9, 16, 36, 144\]"):
        tiny_processor(visual_token_budgets=[4, 5])
    with pytest.raises(ValueError, match="num_visual_tokens='auto' must be an integer here"):
        tiny_processor(num_visual_tokens="auto")
    with pytest.raises(ValueError, match="needs a processor that knows its patch_grid_size"):
        chosen(tiny_processor(patch_grid_size=None))


def test_patches_of_a_grid_that_leaves_a_rest_are_whole_pixels(tiny_processor):
    processor = tiny_processor(num_visual_tokens=81, patch_grid_size=27)
    processor.image_processor = SiglipImageProcessor(size={"height": 384, "width": 384})  # patches of 14 pixels
    sizes = [(14, 14), (15, 9), (42, 14), (43, 1), (126, 3), (9999, 9999)]
    planned = processor._get_num_multimodal_tokens(image_sizes=sizes, num_visual_tokens="auto")
    assert planned.num_image_tokens == [1, 9, 9, 81, 81, 81]


def test_a_total_is_shared_evenly_and_its_rest_goes_to_the_first_images():
    budgets = [1, 4, 9, 16, 36, 144]
    for total, num_images, expected in [
        (576, 1, [144]),
        (576, 4, [144] * 4),
        (575, 4, [144] * 3 + [36]),
        (576, 5, [144] * 3 + [36] * 2),
        (576, 16, [36] * 16),
        (576, 17, [36] * 15 + [16] * 2),
        (10, 10, [1] * 10),
        (15, 10, [4] + [1] * 9),
        (0, 0, []),
    ]:
        assert share_visual_tokens(total, num_images, budgets) == expected
    # Where the second step is cheaper than the first, one image may take both
    assert share_visual_tokens(65 + 1 + 1, 2, [81, 1, 64]) == [64, 1]
    assert share_visual_tokens(82, 2, [81, 1, 64]) == [81, 1]
    with pytest.raises(ValueError, match=r"total_visual_tokens=7 is too few for 2 images: 4, .* makes 8"):
        share_visual_tokens(7, 2, [36, 4])


def test_each_row_s_images_share_the_total(tiny_processor, noise):
    processor = tiny_processor(visual_token_budgets=[1, 4, 9, 16, 36, 144])
    images, texts = noise(4), ["<image><image><image>", "none", "<image>"]
    rows = [images[:3], [], images[3:]]
    for total in (40, np.int64(40), torch.tensor(40)):
        for named in ({"total_visual_tokens": total}, {"images_kwargs": {"total_visual_tokens": total}}):
            for given in (rows, images):
                inputs = processor(images=given, text=texts, padding=True, return_tensors="pt", **named)
                assert inputs["num_visual_tokens"].tolist() == [16, 9, 9, 36]
                assert placeholders(processor, inputs) == [34, 0, 36]
    for row in (None, [], [[]]):
        assert set(processor(images=row, text=["hi"], total_visual_tokens=4)) == {"input_ids", "attention_mask"}
    assert processor(images=[rows[0]], total_visual_tokens=40)["num_visual_tokens"] == [16, 9, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_visual_tokens": 7}, "Row 1: total_visual_tokens=7 is too few for 2 images: 4, the smallest budget"),
        ({"total_visual_tokens": -1}, "Row 0: total_visual_tokens=-1 is too few for 1 images"),
        ({"total_visual_tokens": True}, "total_visual_tokens=True must be an integer"),
        ({"total_visual_tokens": "auto"}, "total_visual_tokens='auto' must be an integer"),
        ({"total_visual_tokens": [8]}, r"total_visual_tokens=\[8\] must be an integer"),
        ({"total_visual_tokens": 8, "num_visual_tokens": 4}, "total_visual_tokens=8 and num_visual_tokens exclude"),
        (
            {"images_kwargs": {"total_visual_tokens": 8}, "num_visual_tokens": "auto"},
            "total_visual_tokens=8 and num_visual_tokens exclude",
        ),
        (
            {"images_kwargs": {"total_visual_tokens": 8}, "total_visual_tokens": 8},
            "names total_visual_tokens twice, 8 and in images_kwargs 8",
        ),
        ({"total_visual_tokens": 8, "text": None}, "is shared by the images of each text: give the text"),
        ({"total_visual_tokens": 8, "text": ["<image>", "<image>"]}, "texts hold 2 and come with 3 images"),
    ],
)
def test_a_total_that_cannot_be_shared_is_refused(tiny_processor, noise, options, message):
    processor = tiny_processor(visual_token_budgets=[4, 36])
    with pytest.raises(ValueError, match=message):
        processor(**{"images": noise(3), "text": ["<image>", "<image><image>"], **options})


def test_an_argument_that_nobody_knows_is_refused(tiny_processor, noise):
    processor, image = tiny_processor(), noise(1)[0]
    for options in ({"num_visual_token": 4}, {"images_kwargs": {"num_visual_token": 4}}):
        with pytest.raises(TypeError, match=r"no argument num_visual_token; did you mean num_visual_tokens\?"):
            processor(images=image, text="<image>", **options)
        with pytest.raises(TypeError, match="no argument num_visual_token"):
            processor.apply_chat_template(with_image(image), tokenize=True, processor_kwargs=options)
        with pytest.raises(TypeError, match="no argument num_visual_token"):
            processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], **options)
    for part in ("videos", "audio"):
        with pytest.raises(ValueError, match="takes images and text, neither videos nor audio"):
            processor(text="hi", **{part: [np.zeros(5)]})
    # vLLM reads there what a request may set, and transformers' common tests what the processor takes
    hints = get_type_hints(DeltaLlavaProcessor.__call__)
    assert hints.keys() == {"images", "text", "kwargs", "return"}
    assert hints["kwargs"].__args__ == (DeltaLlavaProcessorKwargs,)


@pytest.mark.parametrize(
    ("named", "budget"),
    [({"num_visual_tokens": 16}, 16), ({"num_visual_tokens": "auto"}, 9), ({"total_visual_tokens": 20}, 16)],
)
def test_a_chat_takes_a_budget_beside_other_arguments(tiny_processor, noise, named, budget):
    processor, chat = tiny_processor(), with_image(noise(1, size=(9, 12))[0])
    for options in ({"processor_kwargs": named}, named):
        inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, padding=True, **options)
        assert inputs["num_visual_tokens"] == placeholders(processor, inputs) == [budget]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "video", "video": "a.mp4"}], "Part 0 of message 0 is .*'video'"),
        ([{"type": "text", "text": "Hear:"}, {"type": "audio", "audio": "a.wav"}], "Part 1 of message 0 is .*'audio'"),
        ([{"type": "input_text", "text": "What?"}], "Part 0 of message 0 is .*'input_text'"),
        ([{"text": "What?"}], "Part 0 of message 0 is"),
        (["What?"], "Part 0 of message 0 is What"),
        ([{"type": "text", "content": "What?"}], "is a text without text"),
        ({"type": "text", "text": "What?"}, "Message 0 has dict content"),
    ],
)
def test_a_part_that_a_template_would_leave_out_is_an_error(tiny_processor, content, found):
    processor = tiny_processor()
    for chat in ([{"role": "user", "content": content}], [[{"role": "user", "content": content}]]):
        for tokenize in (False, True):
            with pytest.raises(ValueError, match=found):
                processor.apply_chat_template(chat, tokenize=tokenize)


@pytest.mark.parametrize("name", ["vicuna-v1", "chatml"])
def test_a_template_alone_leaves_no_part_out(tiny_tokenizer, templates, name):
    chat = [{"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(Exception, match="A part of a message is of type video"):
        tiny_tokenizer().apply_chat_template(chat, chat_template=(templates / f"{name}.jinja").read_text())


def test_a_chat_rendered_first_begins_with_one_bos(tiny_processor, noise):
    processor = tiny_processor()
    processor.tokenizer.add_bos_token = True
    assert processor.tokenizer("hi")["input_ids"][0] == processor.tokenizer.bos_token_id
    image = noise(1)[0]
    expected = processor.apply_chat_template(with_image(image), tokenize=True, return_dict=True)["input_ids"]
    rendered = processor.apply_chat_template(with_image(image))
    assert processor(images=image, text=rendered)["input_ids"] == expected
    assert processor(images=[[image], [image]], text=[rendered] * 2)["input_ids"] == expected * 2
    bos = [processor.tokenizer.bos_token_id]
    assert processor(images=image, text=rendered, add_special_tokens=True)["input_ids"][0][:2] == bos * 2
    assert processor(text="hi")["input_ids"][0][:1] == bos
    with pytest.raises(ValueError, match="Text 0 begins with <s> and text 1 does not"):
        processor(text=["<s>hi", "hi"])


def test_rows_without_images_alone_are_text(tiny_processor):
    processor = tiny_processor()
    for images, text in ((None, "hi"), ([], "hi"), ([[]], ["hi"]), ([[], []], ["hi", "ho"]), ((), "hi")):
        assert set(processor(images=images, text=text, num_visual_tokens=4)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="texts hold 1 and come with 0 images"):
        processor(images=[[], []], text=["hi", "<image>"])


@pytest.mark.skipif(
    "sanitize_control_tokens" not in transformers.processing_utils.TextKwargs.__annotations__, reason="new"
)
def test_a_user_s_text_may_say_image(tiny_processor, noise):
    processor = tiny_processor()
    chat = with_image(noise(1)[0])
    chat[2]["content"][0]["text"] = "What does <image> mean, and </s>?"
    with pytest.raises(ValueError, match="text 0 holds 2 and comes with 1 images"):
        processor.apply_chat_template(chat, tokenize=True)
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, sanitize_control_tokens=True)
    assert placeholders(processor, inputs) == [36]
    assert "What does <image> mean, and </s>?" in processor.decode(inputs["input_ids"][0])


def test_a_processor_of_remote_code_works_in_other_processes(checkpoint):
    remote = get_class_from_dynamic_module("processing_delta_llava.DeltaLlavaProcessor", checkpoint)
    assert remote.__module__.startswith("transformers_modules.")
    processor = remote.from_pretrained(checkpoint)
    rows = datasets.Dataset.from_dict({"text": ["a <image>", "b <image>"]})
    image = Image.new("RGB", (8, 8))

    def count(row):
        return {"length": len(processor(images=image, text=row["text"], num_visual_tokens=4)["input_ids"][0])}

    assert rows.map(count, num_proc=2)["length"] == [6, 6]


def test_what_servers_ask(tiny_processor, noise):
    processor = tiny_processor()
    counted = processor._get_num_multimodal_tokens(image_sizes=[(60, 70), (10, 10)], num_visual_tokens=[9, 4])
    assert (counted.num_image_tokens, counted.num_image_patches) == ([9, 4], [1, 1])
    with pytest.raises(ValueError, match="image_sizes do not say which share one: give num_visual_tokens"):
        processor._get_num_multimodal_tokens(image_sizes=[(9, 9)], total_visual_tokens=576)
    assert processor._get_num_multimodal_tokens(image_sizes=[(60, 70)]).num_image_tokens == [36]
    inputs = processor(images=noise(1), text="a <image>", return_text_replacement_offsets=True, num_visual_tokens=4)
    (offset,) = inputs["text_replacement_offsets"][0]
    assert offset["replacement"] == "<image>" * 4 and offset["span"] == (2, 9) and offset["new_span"] == (2, 30)
    assert set(processor(images=noise(1), text="<image>")) == set(processor.model_input_names)


def test_vllm_without_our_plug_in_gets_no_list_of_budgets(tiny_processor, noise, monkeypatch):
    processor, images = tiny_processor(), {"images": noise(2), "text": "<image><image>"}
    asked = {**images, "return_text_replacement_offsets": True}  # as vLLM asks
    assert processor(**asked, num_visual_tokens=[9, 4])["num_visual_tokens"] == [9, 4]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    for named in ({"num_visual_tokens": (9, 9)}, {"images_kwargs": {"num_visual_tokens": [9, 4]}}):
        with pytest.raises(ValueError, match="Give an integer for all, or install the package delta-llava beside vLLM"):
            processor(**asked, **named)
    assert processor(**asked, num_visual_tokens=4)["num_visual_tokens"] == [4, 4]
    assert processor(**images, num_visual_tokens=[9, 4])["num_visual_tokens"] == [9, 4]
