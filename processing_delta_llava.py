"""Processor of Delta-LLaVA: images to pixels, and each `<image>` in a text to as many tokens as its image's budget."""

from .configuration_delta_llava import (  # first: it refuses older releases
    AUTO_MAP,
    DeltaLlavaConfig,
    auto_visual_tokens,
    budget_of_each_image,
    query_grid_size,
    share_visual_tokens,
    valid_visual_token_counts,
)


# isort: split

import base64
import binascii
import difflib
import importlib
import inspect
import os
import re
import stat
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import count, zip_longest
from math import isqrt
from typing import Any, Literal, is_typeddict
from urllib.parse import unquote_to_bytes

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import (
    ChannelDimension,
    get_image_size,
    infer_channel_dimension_format,
    make_flat_list_of_images,
)
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, Unpack


# Those that are known by their first bytes, need no other program, and are decoded in C
IMAGE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MAX_IMAGE_BYTES = 2**28
MAX_IMAGE_SIDE = 2**14  # padded to a square, 768 MiB
MAX_ASPECT_RATIO = 200
FETCH_SECONDS = 60.0
MAX_REDIRECTS = 5


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):
    """
    num_visual_tokens (`int`, `"auto"` or a `list` of both, *optional*):
        The budget of all images of the call, or of each in the order of their placeholders. Numpy integers, tuples and
        tensors work too. See "How a budget is decided" in `configuration_delta_llava.py`.
    total_visual_tokens (`int`, *optional*):
        Instead, tokens for all images of a text together.
    """

    num_visual_tokens: int | Literal["auto"] | list[int | Literal["auto"]] | None
    total_visual_tokens: int | None


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DeltaLlavaImagesKwargs

    _defaults = {}  # older releases read it


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Joins an image processor and a tokenizer.

    A call returns, beside what those two return, `num_visual_tokens` (int64, `(num_images,)`): the budgets, which go
    to the model with `pixel_values`. Texts are padded on the left, as generation needs.

    Args:
        image_processor (`BaseImageProcessor`): Makes `(num_images, 3, height, width)` pixels of the tower's size.
        tokenizer (`PreTrainedTokenizerBase`): Knows `<image>` as one token.
        num_visual_tokens (`int`, *optional*, defaults to 144):
            Default budget of an image, and the most that `"auto"` gives it.
        patch_grid_size (`int`, *optional*):
            Side of the tower's patch grid, so that a budget which it does not allow is already refused here. `"auto"`
            needs it.
        chat_template (`str`, *optional*): Jinja template of a conversation.
        visual_token_budgets (`list[int]`, *optional*):
            Budgets that the checkpoint was trained for, from which `"auto"` and `total_visual_tokens` choose. By
            default those that the grid allows, up to `num_visual_tokens`.

    Raises:
        ValueError: For a budget that the grid does not allow, or a tokenizer that does not know `<image>`. A call:
            for an image that [`open_image`] refuses, for placeholders and images, or budgets and images, that do not
            match, for a `total_visual_tokens` that is too few for a row's images or comes beside `num_visual_tokens`,
            and for parts of a chat that are neither text nor image.
        TypeError: A call, for an argument that neither the processor nor one of its parts knows.

    Example:

    ```python
    >>> inputs = processor(images=[first, second], text="<image>\n<image>\nWhat differs?", num_visual_tokens=[144, 16])
    ```"""

    valid_processor_kwargs = DeltaLlavaProcessorKwargs
    image_token = "<image>"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_visual_tokens: int = 144,
        patch_grid_size: int | None = None,
        chat_template: str | None = None,
        visual_token_budgets: list[int] | None = None,
        **kwargs,
    ):
        self.patch_grid_size = patch_grid_size
        if isinstance(num_visual_tokens, str):
            raise ValueError(f"num_visual_tokens={num_visual_tokens!r} must be an integer here: 'auto' is for a call.")
        (self.num_visual_tokens,) = self._budgets(_plain(num_visual_tokens), [(1, 1)])
        self.visual_token_budgets = visual_token_budgets
        for budget in _plain(visual_token_budgets, "visual_token_budgets") or ():
            self._check_budget(budget)
        image_token_ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(image_token_ids) != 1:
            raise ValueError(
                f"The tokenizer splits {self.image_token!r} into {len(image_token_ids)} tokens: make it a special one."
            )
        self.image_token_id = image_token_ids[0]
        tokenizer.padding_side = "left"
        # from_pretrained passes its arguments to the tokenizer too, which would save them and let them override these
        for name in ("num_visual_tokens", "visual_token_budgets"):
            tokenizer.init_kwargs.pop(name, None)
        if hasattr(tokenizer, "legacy"):
            # A LlamaTokenizer does not save it, and would put other spaces after special tokens when loaded again
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

    def adopt_budgets(self, config: DeltaLlavaConfig):
        """Take patch grid, default and trained budgets from the configuration that this is to be saved beside."""
        self.patch_grid_size, self.num_visual_tokens = config.patch_grid_size, config.num_visual_tokens
        self.visual_token_budgets = list(config.visual_token_budgets)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Unpack[DeltaLlavaProcessorKwargs],
    ) -> BatchFeature:
        # From a chat, transformers passes both as None
        if kwargs.pop("videos", None) is not None or kwargs.pop("audio", None) is not None:
            raise ValueError(
                f"{type(self).__name__} takes images and text, neither videos nor audio: give a clip as its frames."
            )
        kwargs = self._share_total(self._check_arguments(kwargs), images, text)
        self._check_budgets_for_server(kwargs)
        if self._begins_with_bos(text) and "add_special_tokens" not in {**kwargs, **kwargs.get("text_kwargs", {})}:
            kwargs["add_special_tokens"] = False  # a chat template has written them
        return super().__call__(images=images, text=text, **kwargs)

    def apply_chat_template(self, conversation, *args, **kwargs):
        """transformers' own, for chats of text and images only: a part of another type is an error."""
        is_list = isinstance(conversation, (list, tuple)) and len(conversation) > 0
        is_batch = is_list and not isinstance(conversation[0], dict)
        for chat in conversation if is_batch else [conversation]:
            for number, message in enumerate(getattr(chat, "messages", chat)):
                _check_content(number, message.get("content"))
        # Before 5.23 an argument of a call among the template's would make transformers drop `processor_kwargs`
        templates = inspect.signature(super().apply_chat_template).parameters.keys()
        own = {name: kwargs.pop(name) for name in (self._known_arguments() & kwargs.keys()) - templates}
        if own:
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **own}
        return super().apply_chat_template(conversation, *args, **kwargs)

    def _known_arguments(self) -> set[str]:
        known = {"common_kwargs", *self.valid_processor_kwargs.__annotations__}
        parts = (
            *self.valid_processor_kwargs.__annotations__.values(),
            getattr(self.image_processor, "valid_kwargs", None),
        )
        return known.union(*(part.__annotations__ for part in parts if is_typeddict(part)))

    def _check_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A copy, checked for unknown names, with the budgets beside `images_kwargs` and as Python's own values."""
        known = self._known_arguments()
        kwargs = {name: dict(value) if name == "images_kwargs" else value for name, value in kwargs.items()}
        images_kwargs = kwargs.get("images_kwargs", {})
        for name in (kwargs.keys() | images_kwargs.keys()) - known:
            similar = "".join(f"; did you mean {other}?" for other in difflib.get_close_matches(name, known, 1))
            raise TypeError(f"{type(self).__name__} takes no argument {name}{similar}")
        for name, plain in (("num_visual_tokens", _plain), ("total_visual_tokens", _plain_value)):
            named = [plain(part.pop(name, None)) for part in (kwargs, images_kwargs)]
            named = [value for value in named if value is not None]
            if len(named) > 1:
                raise ValueError(f"The call names {name} twice, {named[0]} and in images_kwargs {named[1]}: name one.")
            if named:
                kwargs[name] = named[0]
        return kwargs

    def _check_budgets_for_server(self, kwargs: dict[str, Any]):
        # vLLM asks for offsets, and caches an image under the whole list: at another position it would get a wrong one
        budgets = kwargs.get("num_visual_tokens")
        if "vllm" in sys.modules and kwargs.get("return_text_replacement_offsets") and isinstance(budgets, list):
            raise ValueError(
                f"num_visual_tokens={budgets}: vLLM would mix up the budgets of single images. Give an integer for all,"
                " or install the package delta-llava beside vLLM, which takes lists."
            )

    def _share_total(self, kwargs: dict[str, Any], images, text) -> dict[str, Any]:
        """The arguments with the budget of each image in place of a `total_visual_tokens`."""
        total = kwargs.pop("total_visual_tokens", None)
        if total is None:
            return kwargs
        if "num_visual_tokens" in kwargs:
            raise ValueError(f"total_visual_tokens={total} and num_visual_tokens exclude each other: name one.")
        if type(total) is not int:
            raise ValueError(f"total_visual_tokens={total!r} must be an integer: the tokens of a text's images.")
        images = [] if images is None else images
        if isinstance(images, (list, tuple)) and all(isinstance(row, (list, tuple)) for row in images):
            rows = [len(row) for row in images]
        elif text is not None:
            rows = [sample.count(self.image_token) for sample in ([text] if isinstance(text, str) else text)]
        else:
            raise ValueError(f"total_visual_tokens={total} is shared by the images of each text: give the text.")
        shares = []
        for row, num_images in enumerate(rows):
            try:
                shares += share_visual_tokens(total, num_images, self._trained_budgets())
            except ValueError as error:
                raise ValueError(f"Row {row}: {error}") from error
        return {**kwargs, "num_visual_tokens": shares}

    def _trained_budgets(self) -> list[int]:
        if self.visual_token_budgets:
            return self.visual_token_budgets
        if self.patch_grid_size is None:
            raise ValueError("To choose budgets, a processor needs visual_token_budgets or patch_grid_size.")
        valid = valid_visual_token_counts(self.patch_grid_size)
        return [budget for budget in valid if budget <= self.num_visual_tokens]

    def _patch_size(self) -> int:
        """Side of one of the tower's patches, in pixels."""
        if self.patch_grid_size is None:
            raise ValueError("num_visual_tokens='auto' needs a processor that knows its patch_grid_size.")
        pixel_values = self.image_processor(Image.new("RGB", (1, 1)), return_tensors="np")["pixel_values"]
        return pixel_values.shape[-1] // self.patch_grid_size

    def _begins_with_bos(self, text) -> bool:
        bos = self.tokenizer.bos_token
        begins = [sample.startswith(bos) for sample in ([text] if isinstance(text, str) else text or ()) if bos]
        if any(begins) and not all(begins) and self.tokenizer.bos_token_id in self.tokenizer.encode(""):
            raise ValueError(
                f"Text {begins.index(True)} begins with {bos} and text {begins.index(False)} does not: let all begin"
                " with it or none, or say add_special_tokens."
            )
        return bool(begins) and all(begins)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Opens images first, in any form that [`open_image`] takes, so that an unreadable one is named."""
        if images is not None:
            images = self._open_images(images, {**kwargs, **kwargs.get("images_kwargs", {})})
            if isinstance(images, list) and all(isinstance(row, list) and not row for row in images):
                images = None  # no row has an image
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _open_images(self, images, kwargs: dict[str, Any]):
        if isinstance(images, (list, tuple)):
            return [self._open_images(image, kwargs) for image in images]
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            return open_image(images)
        if images.ndim == 4:
            return [self._open_images(image, kwargs) for image in images]
        if kwargs.get("do_rescale", self.image_processor.do_rescale) is False:
            return images  # the caller says that they are scaled
        return open_image(images, kwargs.get("input_data_format"))

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Checks also that each row has as many placeholders as images, and the call as many budgets."""
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            self._check_placeholders([sample.count(self.image_token) for sample in text], images)
        if images is None:
            self._budgets(kwargs.get("num_visual_tokens"), [])
        super().validate_inputs(images=images, text=text, **kwargs)

    def _check_placeholders(self, placeholders: list[int], images):
        by_row = isinstance(images, list) and all(isinstance(row, list) for row in images)
        for index, (found, row) in enumerate(zip_longest(placeholders, images, fillvalue=()) if by_row else ()):
            if found != len(row):
                raise ValueError(
                    f"The number of {self.image_token} tokens in the prompts should be the same as the number of"
                    f" images, but text {index} holds {found or 0} and comes with {len(row)} images."
                )
        num_images = 0 if images is None else len(make_flat_list_of_images(images))
        if sum(placeholders) != num_images:
            raise ValueError(
                f"The number of {self.image_token} tokens in the prompts should be the same as the number of images,"
                f" but the texts hold {sum(placeholders)} and come with {num_images} images."
            )

    def _process_images(self, images, num_visual_tokens: int | str | list[int | str] | None = None, **kwargs):
        # The budget must not reach the image processor, which knows no such argument
        processed = self.image_processor(images, **kwargs)
        sizes = [_size(image, kwargs.get("input_data_format")) for image in make_flat_list_of_images(images)]
        processed["num_visual_tokens"] = self._budgets(num_visual_tokens, sizes)
        return processed, [self.replace_image_token(processed, index) for index in range(len(sizes))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The image tokens of image `image_idx`, which take the place of its placeholder."""
        return self.image_token * int(image_inputs["num_visual_tokens"][image_idx])

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Image tokens for images of these `(height, width)`, by which servers plan a prompt's length."""
        if image_sizes is None:
            return MultiModalData()
        kwargs = self._check_arguments(kwargs)
        if "total_visual_tokens" in kwargs:
            raise ValueError(
                "total_visual_tokens is shared by the images of a text, and image_sizes do not say which share one:"
                " give num_visual_tokens, a list from share_visual_tokens."
            )
        return MultiModalData(
            num_image_tokens=self._budgets(kwargs.get("num_visual_tokens"), image_sizes),
            num_image_patches=[1] * len(image_sizes),
        )

    def _budgets(
        self, num_visual_tokens: int | str | list[int | str] | None, image_sizes: list[tuple[int, int]]
    ) -> list[int]:
        """The budget of each image; `image_sizes` are heights and widths, in either order."""
        budgets = self.num_visual_tokens if num_visual_tokens is None else num_visual_tokens
        budgets = budget_of_each_image(budgets, len(image_sizes))
        if "auto" in budgets:
            rule = self._patch_size(), self._trained_budgets(), self.num_visual_tokens
            budgets = [
                auto_visual_tokens(max(size), *rule) if budget == "auto" else budget
                for budget, size in zip(budgets, image_sizes, strict=True)
            ]
        for budget in set(budgets):
            self._check_budget(budget)
        return budgets

    def _check_budget(self, num_visual_tokens: int):
        if self.patch_grid_size is not None:
            query_grid_size(num_visual_tokens, self.patch_grid_size)
        elif num_visual_tokens < 1 or isqrt(num_visual_tokens) ** 2 != num_visual_tokens:
            raise ValueError(f"num_visual_tokens={num_visual_tokens} must be a square: 1, 4, 9, 16, ...")

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_visual_tokens"]


def _size(image: Any, data_format: ChannelDimension | str | None) -> tuple[int, int]:
    """Height and width, in either order, of an image that is open."""
    if isinstance(image, Image.Image):
        return image.size
    return get_image_size(image, data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4)))


def _plain_value(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) else value


def _plain(num_visual_tokens: Any, name: str = "num_visual_tokens") -> int | str | list[int | str] | None:
    found = _plain_value(num_visual_tokens)
    found = [_plain_value(budget) for budget in found] if isinstance(found, (list, tuple)) else found
    budgets = found if isinstance(found, list) else [found]
    if found is None or all(type(budget) is int or budget == "auto" for budget in budgets):
        return found
    raise ValueError(
        f"{name}={num_visual_tokens!r} must be an integer or 'auto', or a list, tuple or 1-d tensor of one per image."
    )


def _check_content(number: int, content: Any):
    """Refuse what a chat template would silently leave out."""
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"Message {number} has {type(content).__name__} content: give a text, or a list of parts.")
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image", "image_url"):
            raise ValueError(
                f"Part {place} of message {number} is {str(part)[:100]}: give {{'type': 'text', 'text': ...}} or"
                " {'type': 'image', ...}, one for each frame of a clip; other types are not supported."
            )
        if kind == "text" and not isinstance(part.get("text"), str):
            raise ValueError(f"Part {place} of message {number} is a text without text: {str(part)[:100]}")


def open_image(
    source: Any,
    input_data_format: ChannelDimension | str | None = None,
    *,
    name: Any = None,
    max_pixels: int | None = None,
) -> Image.Image:
    """
    Open an image as the model sees it: upright, 8-bit RGB, transparency on white, the first frame of an animation.

    Inference, data checks and training open every image by this function, so that all of them see and refuse the same.
    Beside limits on bytes, pixels (twice Pillow's `MAX_IMAGE_PIXELS`), sides and their ratio, it finds damage that
    Pillow does not: wrong checksums, missing rows or a missing end in a PNG, and JPEG data that end too early, too late
    or without an end marker.

    Args:
        source:
            `str` or `Path` of a file, http(s) or `data:` URL, base64, `bytes` of a file in one of `IMAGE_FORMATS`, or a
            decoded image: PIL's, or an array or tensor of shape `(height, width)`, `(height, width, channels)` or
            `(channels, height, width)` with 1, 3 or 4 channels. Integers beyond 8 bits are scaled by the fewest bits
            (10, 12, 14 or 16) that hold the largest; floats span 0..1 or 0..255.
        input_data_format (`ChannelDimension` or `str`, *optional*):
            `"channels_first"` or `"channels_last"`, for an array whose shape leaves it open.
        name (*optional*, defaults to `source`): What an error calls the image.
        max_pixels (`int`, *optional*): A lower limit on the pixels of a file than Pillow's.

    Returns:
        `PIL.Image.Image`: In mode RGB. For a file, its `info` holds `format` and EXIF's `orientation`.

    Raises:
        ValueError: Names the image and what is wrong with it. Its cause is a `PIL.Image.DecompressionBombError` if the
            image is larger than a limit.
    """
    try:
        if isinstance(source, Image.Image):
            return _from_pil(source)
        if isinstance(source, (np.ndarray, torch.Tensor)):
            return _from_array(source, input_data_format)
        return _from_file(read_image(source), max_pixels)
    except Exception as error:  # Pillow's plugins raise anything
        raise unreadable_image(source if name is None else name, error) from error


def unreadable_image(source: Any, error: Exception) -> ValueError:
    """The error that names an image and says, from `error`, why it cannot be read."""
    return ValueError(f"Cannot read image {_name(source)}: {str(error) or type(error).__name__}")


def fetch_image(
    url: str,
    *,
    timeout: float | None = None,
    max_bytes: int | None = None,
    transport: httpx.BaseTransport | None = None,
) -> bytes:
    """
    Get the bytes of an image from an http(s) URL, even with `HF_HUB_OFFLINE`, which is about the Hub.

    Args:
        url (`str`): The address. Up to `MAX_REDIRECTS` redirects are followed.
        timeout (`float`, *optional*, defaults to `FETCH_SECONDS`):
            Seconds for all of it, after which nothing more is looked up, connected to or read.
        max_bytes (`int`, *optional*, defaults to `MAX_IMAGE_BYTES`): The longest answer that is accepted.
        transport (`httpx.BaseTransport`, *optional*):
            Sends each request, also redirected ones. With it, the environment's proxies are not used.

    Returns:
        `bytes`: The answer.

    Raises:
        Exception: The answer is late, an error, too long, or compressed.
    """
    timeout = FETCH_SECONDS if timeout is None else timeout
    deadline = time.monotonic() + timeout

    def check_time():
        if time.monotonic() >= deadline:
            raise TimeoutError

    def trace(step: str, info: dict[str, Any]):
        # Closing the client ends what is open; a slow lookup or redirect must open nothing after that
        if step.endswith(("connect_tcp.started", "send_request_headers.started")):
            check_time()

    def receive() -> bytes:
        with client.stream("GET", url, extensions={"trace": trace}) as response:
            response.raise_for_status()
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding.lower() != "identity":  # a few bytes may unpack to gigabytes
                raise ValueError(f"the server sends it compressed ({encoding}), which was not requested")
            data = bytearray()
            for part in response.iter_raw():
                check_time()
                data += part
                _check_length(len(data), max_bytes)
            return bytes(data)

    # In a thread, because httpx's timeout starts again with each byte that arrives
    client = httpx.Client(
        headers={"Accept-Encoding": "identity"},
        timeout=timeout / 4,
        follow_redirects=True,
        max_redirects=MAX_REDIRECTS,
        transport=transport,
        trust_env=transport is None,
    )
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(receive).result(timeout)
    except TimeoutError:
        raise TimeoutError(f"no whole answer within {timeout:g} s") from None
    finally:
        pool.shutdown(wait=False)
        client.close()


def _name(source: Any) -> str:
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or repr(source)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return f"of shape {tuple(source.shape)} and type {source.dtype}"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {len(source)} bytes"
    name = str(source)
    return name if len(name) <= 200 else f"{name[:100]}... ({len(name)} characters)"


def read_image(source: Any) -> bytes:
    """The bytes of a file, in any form that [`open_image`] takes."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"its type is {type(source).__name__}: give a path, a URL, base64, bytes, a PIL image, an array or a tensor"
        )
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith(("http://", "https://")):
            return fetch_image(source)
        if scheme.startswith("data:"):
            return decode_data_url(source)
    try:
        status = os.stat(source)
    except (OSError, ValueError) as error:  # ValueError: a null character
        try:
            return decode_base64(str(source))
        except (OSError, ValueError):
            raise FileNotFoundError("no such file (and neither a URL nor base64)") from error
    if not stat.S_ISREG(status.st_mode):  # reading a FIFO or a device may never end
        raise OSError("it is not a regular file")
    _check_length(status.st_size)
    with open(source, "rb") as file:
        return file.read()


def decode_data_url(url: str) -> bytes:
    """The bytes in a `data:` URL, or a `ValueError` if their base64 is broken."""
    header, _, content = url.partition(",")
    return _from_base64(content) if header.lower().endswith(";base64") else unquote_to_bytes(content)


def decode_base64(text: str) -> bytes:
    """The bytes of an image in base64, or a `ValueError` if it is not one."""
    data = _from_base64(text)
    _open(BytesIO(data))
    return data


def _from_base64(text: str) -> bytes:
    text = re.sub(r"\s", "", text).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is broken: {error}") from error


def _check_length(num_bytes: int, max_bytes: int | None = None):
    max_bytes = MAX_IMAGE_BYTES if max_bytes is None else max_bytes
    if num_bytes > max_bytes:
        raise Image.DecompressionBombError(f"it has more than {max_bytes} bytes")


def _check_size(width: int, height: int, max_pixels: int | None = None):
    if min(width, height) < 1:
        raise ValueError(f"it has {width} x {height} pixels")
    if max_pixels is None and Image.MAX_IMAGE_PIXELS is not None:
        max_pixels = 2 * Image.MAX_IMAGE_PIXELS
    if max_pixels is not None and width * height > max_pixels:
        raise Image.DecompressionBombError(f"it has {width} x {height} pixels, more than {max_pixels} in all")
    if max(width, height) > MAX_IMAGE_SIDE or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise Image.DecompressionBombError(
            f"it has {width} x {height} pixels: a side has at most {MAX_IMAGE_SIDE}, and at most {MAX_ASPECT_RATIO}"
            " times those of the other"
        )


def _open(file: BytesIO) -> Image.Image:
    Image.init()
    try:
        # AVIF and others depend on Pillow's build
        return Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError:
        raise ValueError(f"it is no image of the formats {', '.join(IMAGE_FORMATS)}") from None


def _from_file(data: bytes, max_pixels: int | None = None) -> Image.Image:
    _check_length(len(data))
    file = _WatchedJpeg(data) if data.startswith(b"\xff\xd8") else BytesIO(data)
    with _open(file) as image:
        _check_size(*image.size, max_pixels)
        if isinstance(file, _WatchedJpeg):
            file.watch()
        upright = _from_pil(image)
        if isinstance(file, _WatchedJpeg):
            file.check()
        if image.format == "PNG":
            _check_png(image, data)
        upright.info = {"format": image.format, "orientation": _orientation(image)}
        return upright


def _check_depth(image: Image.Image):
    highest = max(
        high for band, (_, high) in zip(image.getbands(), image.getextrema(), strict=True) if band not in "Aa"
    )
    if highest < 64:
        raise ValueError(
            f"its 16-bit colours reach {256 * highest + 255} of 65535 at most, so they seem to have fewer bits, and"
            " would come out almost black; convert it to 8 bits"
        )


def _check_png(image: Image.Image, data: bytes):
    # Pillow checks neither the checksums of the pixels' chunks nor that all rows and the end are there
    chunks, chunk, position = [], b"", 8
    while not chunk.startswith(b"IEND"):
        if position + 12 > len(data):
            raise ValueError("the file is damaged: its end is missing")
        length = int.from_bytes(data[position : position + 4], "big")
        chunk = data[position + 4 : position + 8 + length]
        position += 12 + length
        if chunk.startswith((b"IDAT", b"IEND")):
            if zlib.crc32(chunk) != int.from_bytes(data[position - 4 : position], "big"):
                raise ValueError("the file is damaged: a checksum of its pixels or its end is wrong")
            chunks.append(chunk[4:])
    width, height, (depth, colour, _, _, is_interlaced) = *image.size, data[24:29]
    # Missing rows come out as zeros, the last row among them
    last = image.crop((0, height - 1, width, height)).getextrema()
    if not is_interlaced and np.any(last):
        return
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if is_interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    missing = 0
    for left, top, column_step, row_step in passes:
        num_columns, num_rows = -((left - width) // column_step), -((top - height) // row_step)
        missing += num_rows * (1 + (num_columns * bits + 7) // 8) if num_columns > 0 else 0
    inflate = zlib.decompressobj()
    for chunk in chunks:
        while chunk and missing > 0:
            missing -= len(inflate.decompress(chunk, min(missing, 2**20)))
            chunk = inflate.unconsumed_tail
    if missing > 0:
        raise ValueError("the file is damaged: rows of its pixels are missing")


_JPEG_MARKER = re.compile(rb"\xff[\x01-\xfe]")  # 0xff00 is a byte of data
_MAX_JPEG_SCANS = 200  # each is a pass over all pixels, however few bytes it has
_STRAY_BYTES = 32  # some cameras leave a few at the end of a sound image
_PADDING = bytes(16)  # more than libjpeg looks ahead
_HOLE = bytes(16)


class _JpegPart(bytes):
    """Data for the decoder. Pillow slices off what it has used, which shows how much it has not."""

    file: "_WatchedJpeg"

    def __radd__(self, rest: bytes) -> "_JpegPart":
        whole = _JpegPart(rest + bytes(self))
        whole.file = self.file
        return whole

    def __getitem__(self, key):
        part = bytes(self)[key]
        if isinstance(key, slice):
            self.file.num_unused[-1] = len(part)
        return part


class _WatchedJpeg(BytesIO):
    """
    A JPEG file that finds damage in its data. libjpeg warns of it, but Pillow drops the warnings.

    Data with a hole hold too many or too few codes for their blocks. So the file is handed out in parts that end
    shortly before and shortly after the last code of a run. There two bytes come one by one: a decoder that needs more
    codes leaves a byte unused, the second at the latest, and one that has all of them skips both as stray.
    """

    parts: list[tuple[str, bytes]] | None = None
    damage: str | None = None

    def watch(self):
        """Hand out the parts from now on."""
        data, position, parts = self.getvalue(), 0, []
        for start, end in self._runs(data):
            # Not within 0xff00, half of which is no code
            places = range(end - _STRAY_BYTES, start + _STRAY_BYTES, -1)
            if stop := next((place for place in places if 0xFF not in data[place - 1 : place + 2]), None):
                parts += [("", data[position:stop]), ("", data[stop : stop + 1])]
                parts.append(("too many", data[stop + 1 : stop + 2]))
                position = stop + 2
            parts += [("", data[position:end] + _PADDING), ("", b"\0"), ("too few", b"\0")]
            position = end
        self.num_needed = len(parts) - 2
        self.num_unused: list[int | None] = []
        self.parts = [*parts, ("", data[position:])]

    def read(self, size: int | None = -1) -> bytes:
        if self.parts is None:
            return super().read(size)
        num_read = len(self.num_unused)
        if num_read and (finding := self.parts[num_read - 1][0]) and None not in self.num_unused[-2:]:
            if (self.num_unused[-2:] == [0, 0]) == (finding == "too many"):
                self.damage = f"its data hold {finding} codes"
        if num_read == len(self.parts):
            return b""
        self.num_unused.append(None)
        part = _JpegPart(self.parts[num_read][1])
        part.file = self
        return part

    def check(self):
        """Raise an error if damage was found while all was read."""
        if len(self.num_unused) < self.num_needed:  # the one scan of a file is read no further than its last pixel
            self.damage = "its data hold too many codes"
        if self.damage:
            raise ValueError(f"the file is damaged: {self.damage}")

    def _runs(self, data: bytes) -> list[tuple[int, int]]:
        """Where each run of codes starts and ends: a scan, or its part up to a restart marker."""
        runs, first_codes, position, num_scans, is_arithmetic = [], {}, 2, 0, False
        # Up to the end of the image, or the start of another
        while (marker := _JPEG_MARKER.search(data, position)) and (kind := marker[0][-1]) not in (0xD8, 0xD9):
            start = marker.end() + 2
            position = max(start, start - 2 + int.from_bytes(data[start - 2 : start], "big"))
            segment = data[start:position]
            if kind < 0xC0 or 0xF0 <= kind <= 0xFD:
                self.damage = "its data hold an unknown marker"
            is_arithmetic |= 0xC9 <= kind <= 0xCF and kind != 0xCC
            while kind == 0xC4 and len(segment) > 17:  # Huffman tables, each with its shortest code first
                first_codes[segment[0]] = segment[17]
                segment = segment[17 + sum(segment[1:17]) :]
            if kind != 0xDA or len(segment) < 6:
                continue
            num_scans += 1
            if num_scans > _MAX_JPEG_SCANS:
                raise Image.DecompressionBombError(f"it has more than {_MAX_JPEG_SCANS} scans")
            # Zero bits are the first code, again and again. No image has that, unless the code ends a block, as in
            # areas of one colour
            _, last, refines = segment[-3:]
            first_used = [first_codes.get(0x10 | tables & 15, 0) for tables in segment[2:-3:2]]
            has_no_zeros = last > 0 and refines < 16 and any(code & 15 for code in first_used)
            for number in count():
                end = _JPEG_MARKER.search(data, position)
                if not end:
                    position = len(data)
                    break
                runs.append((position, end.start()))
                if has_no_zeros and data.find(_HOLE, position, end.start()) >= 0:
                    self.damage = "its data have a hole of zeros"
                if not 0xD0 <= end[0][-1] <= 0xD7:
                    position = end.start()
                    break
                position = end.end()
                if end[0][-1] & 7 != number & 7:
                    self.damage = "parts of its data are missing"
        # libjpeg accepts that if the bytes that follow, such as zeros, complete the last scan
        if not marker or kind == 0xD8:
            self.damage = "its end marker is missing"
        return [] if is_arithmetic else runs  # libjpeg needs arithmetic codes in one piece


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if orientation in range(1, 9) else 1
    except Exception:  # broken EXIF raises anything, and no viewer turns the image
        return 1


def _from_pil(image: Image.Image) -> Image.Image:
    _check_size(*image.size)
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in IMAGE_FORMATS:
        raise ValueError(f"its format {image.format} is none of {', '.join(IMAGE_FORMATS)}")
    # Of deep colours Pillow keeps only the upper 8 bits
    is_deep = re.search(";16[BLN]", str(getattr(image, "tile", ""))) and image.mode in ("RGB", "RGBA", "RGBa", "LA")
    image.load()
    if is_deep:
        _check_depth(image)
    orientation = _orientation(image)
    if image.mode == "F" or image.mode.startswith("I"):
        upright = Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    elif "transparency" in image.info or {"A", "a"} & set(image.getbands()):
        for mode in {"La": ["LA"], "PA": ["RGBA"]}.get(image.mode, []):
            image = image.convert(mode)
        white = Image.new("RGBA", image.size, "white")
        upright = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    else:
        upright = image.convert("RGB")
    upright.info = {}  # else it would be turned again
    upright.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(upright, in_place=True)
    return upright


def _from_array(source: np.ndarray | torch.Tensor, data_format: ChannelDimension | str | None) -> Image.Image:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if source.ndim == 3:
        if data_format is None:
            data_format = infer_channel_dimension_format(source, num_channels=(1, 3, 4))
        if ChannelDimension(data_format) == ChannelDimension.FIRST:
            source = np.moveaxis(source, 0, -1)
    if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[-1] not in (1, 3, 4)):
        raise ValueError("an image has the dimensions height, width and maybe 1, 3 or 4 channels")
    _check_size(source.shape[1], source.shape[0])
    if source.ndim == 3 and source.shape[-1] == 1:
        source = source[..., 0]
    return _from_pil(Image.fromarray(np.ascontiguousarray(_eight_bits(source))))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "buif":
        raise ValueError(f"its values are of type {values.dtype}, not numbers")
    if values.dtype == np.uint8:
        return values
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f":
        rounding = 1e-3  # what a resampling adds
        maximum = 1 if high <= 1 + rounding else 255
        if not -rounding * maximum <= low <= high <= maximum * (1 + rounding):
            raise ValueError(f"its values span {low:g}..{high:g}; floats must span 0..1 or 0..255")
    elif values.dtype.kind == "b":
        maximum = 1
    else:
        if not 0 <= low <= high < 2**16:
            raise ValueError(f"its values span {low:g}..{high:g}; integers must lie in 0..65535")
        maximum = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    return np.rint(values.clip(0, maximum) * (255 / maximum)).astype(np.uint8)


DeltaLlavaProcessor.register_for_auto_class()
# As an import does, but transformers' loading of remote code does not. Without it dill, by which `datasets` sends
# functions to other processes, pickles these classes by value and cannot load them again
setattr(importlib.import_module(__package__), __name__.rpartition(".")[2], sys.modules[__name__])

__all__ = [
    "DeltaLlavaProcessor",
    "decode_base64",
    "decode_data_url",
    "fetch_image",
    "open_image",
    "read_image",
    "unreadable_image",
]
