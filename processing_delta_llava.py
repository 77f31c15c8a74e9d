"""Processor of Delta-LLaVA: images to pixels, and each `<image>` in a text to as many tokens as its image gets."""

from .configuration_delta_llava import AUTO_MAP, query_grid_size  # first: it refuses older releases


# isort: split

import base64
import os
from io import BytesIO
from itertools import zip_longest

from huggingface_hub import get_session
from PIL import Image, ImageOps
from transformers import ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs


class DeltaLlavaImagesKwargs(ImagesKwargs, total=False):
    """
    num_visual_tokens (`int` or `list[int]`, *optional*):
        The budget of all images of the call, or of each in the order of their placeholders.
    """

    num_visual_tokens: int | list[int] | None


class DeltaLlavaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: DeltaLlavaImagesKwargs

    _defaults = {}  # older releases ask for it


class DeltaLlavaProcessor(ProcessorMixin):
    r"""
    Joins an image processor and a tokenizer.

    A call returns, beside what those two return, `num_visual_tokens` (int64, `(num_images,)`): the budgets, which go
    to the model with `pixel_values`. Texts are padded on the left, as generation needs it.

    Args:
        image_processor (`BaseImageProcessor`): Makes `(num_images, 3, height, width)` pixels of the tower's size.
        tokenizer (`PreTrainedTokenizerBase`): Knows `<image>` as one token.
        num_visual_tokens (`int`, *optional*, defaults to 144): Budget of an image when a call names none.
        patch_grid_size (`int`, *optional*):
            Side of the tower's patch grid, so that a budget which it does not allow is refused here already.
        chat_template (`str`, *optional*): Jinja template of a conversation.

    Raises:
        ValueError: For a budget that the grid does not allow, or a tokenizer that does not know `<image>`.

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
        **kwargs,
    ):
        self.num_visual_tokens = num_visual_tokens
        self.patch_grid_size = patch_grid_size
        self._check_budget(num_visual_tokens)
        image_token_ids = tokenizer.encode(self.image_token, add_special_tokens=False)
        if len(image_token_ids) != 1:
            raise ValueError(
                f"The tokenizer splits {self.image_token!r} into {len(image_token_ids)} tokens: make it a special one."
            )
        self.image_token_id = image_token_ids[0]
        tokenizer.padding_side = "left"
        # from_pretrained hands a budget to the tokenizer too, which would save it and let it win over the processor's
        tokenizer.init_kwargs.pop("num_visual_tokens", None)
        if hasattr(tokenizer, "legacy"):
            # Saving a LlamaTokenizer forgets it, and the saved one would put other spaces after special tokens
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Loads images first (paths, URLs, base64 or PIL), so that an unreadable one is a ValueError that names it."""
        if images is not None:
            images = _readable(images)
        images, text, *others = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if text is not None:
            self._check_placeholders([sample.count(self.image_token) for sample in text], images)
        return images, text, *others

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

    def _process_images(self, images, num_visual_tokens: int | list[int] | None = None, **kwargs):
        # The budget must not reach the image processor, which knows no such argument.
        processed = self.image_processor(images, **kwargs)
        num_images = len(make_flat_list_of_images(images))
        processed["num_visual_tokens"] = self._budgets(num_visual_tokens, num_images)
        return processed, [self.replace_image_token(processed, index) for index in range(num_images)]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholder of image `image_idx`, once for each of its visual tokens."""
        return self.image_token * int(image_inputs["num_visual_tokens"][image_idx])

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholders for images of these `(height, width)`; what servers plan a prompt's length by."""
        if image_sizes is None:
            return MultiModalData()
        num_visual_tokens = {**kwargs, **kwargs.get("images_kwargs", {})}.get("num_visual_tokens")
        return MultiModalData(
            num_image_tokens=self._budgets(num_visual_tokens, len(image_sizes)),
            num_image_patches=[1] * len(image_sizes),
        )

    def _budgets(self, num_visual_tokens: int | list[int] | None, num_images: int) -> list[int]:
        if num_visual_tokens is None:
            num_visual_tokens = self.num_visual_tokens
        budgets = [num_visual_tokens] * num_images if isinstance(num_visual_tokens, int) else list(num_visual_tokens)
        if len(budgets) != num_images:
            raise ValueError(f"num_visual_tokens names {len(budgets)} budgets, but there are {num_images} images.")
        for budget in set(budgets):
            self._check_budget(budget)
        return budgets

    def _check_budget(self, num_visual_tokens: int):
        if self.patch_grid_size is not None:
            query_grid_size(num_visual_tokens, self.patch_grid_size)
        elif (
            isinstance(num_visual_tokens, bool)
            or num_visual_tokens < 1
            or round(num_visual_tokens**0.5) ** 2 != num_visual_tokens
        ):
            raise ValueError(f"num_visual_tokens={num_visual_tokens} must be a square: 1, 4, 9, 16, ...")

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_visual_tokens"]


def _readable(images):
    """Opens what is named, and decodes what is lazy, in a possibly nested list of images."""
    if isinstance(images, (list, tuple)):
        return [_readable(image) for image in images]
    if not isinstance(images, (str, Image.Image)):
        return images
    name = images if isinstance(images, str) else getattr(images, "filename", "") or repr(images)
    try:
        image = _open(images) if isinstance(images, str) else images
        image.load()
        return _to_eight_bits(image)
    except Exception as error:  # Pillow's plugins raise what they like
        raise ValueError(f"Cannot read image {name[:200]}: {error}") from error


def _open(source: str) -> Image.Image:
    # Not transformers' `load_image`: it converts to RGB, which is too late to scale 16-bit images.
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, follow_redirects=True)
        response.raise_for_status()
        file = BytesIO(response.content)
    elif os.path.exists(source):
        file = source
    elif source.startswith("data:image/") or len(source) > 255:
        file = BytesIO(base64.b64decode(source.split(",")[-1]))
    else:
        raise FileNotFoundError("no such file (and neither a URL nor base64)")
    return ImageOps.exif_transpose(Image.open(file))


def _to_eight_bits(image: Image.Image) -> Image.Image:
    # Pillow clips 16-bit grey at 255 when it converts it to RGB, which turns nearly all of it white.
    if image.mode.startswith("I"):
        image = image.convert("I")
        low, high = image.getextrema()
        if low < 0 or high > 65535:
            raise ValueError(f"its values span {low}..{high}; 16 bits hold 0..65535")
        return image.point(lambda value: value / 256).convert("L")
    if image.mode == "F":
        raise ValueError("it holds floating point values, whose range is unknown; convert it to 8 bits")
    return image


DeltaLlavaProcessor.register_for_auto_class()

__all__ = ["DeltaLlavaProcessor"]
