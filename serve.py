"""
`transformers serve` for a Delta-LLaVA checkpoint: OpenAI's API with a budget per request and per image.

    python -m delta_llava.serve demo/out/checkpoint --port 8000

All options of `transformers serve` work. A request sets the budget of its images by
`"chat_template_kwargs": {"num_visual_tokens": 36}`, or of one image by its `detail`. See
[`~serving.middleware.RequestGuard`] for what is checked, and [`~serving.image_guard.ImageGuard`] for the images that a
client may name.
"""

from .configuration_delta_llava import DeltaLlavaConfig  # first: it refuses older releases


# isort: split

import inspect
import json
from typing import Annotated

import typer
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils.import_utils import is_serve_available


if not is_serve_available():
    raise ImportError('The server needs more packages: run `pip install "delta-llava[serve]"`.')

# isort: split

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from transformers.cli.serve import Serve
from transformers.cli.serving.response import TransformersResponseCreateParamsStreaming

from .modeling_delta_llava import DeltaLlavaForConditionalGeneration
from .serving.feature_cache import FeatureCache, cache_image_features
from .serving.image_guard import ImageGuard
from .serving.middleware import RequestGuard, openai_error


# The handler of /v1/responses reads chat_template_kwargs, but its list of fields lacks them
TransformersResponseCreateParamsStreaming.__mutable_keys__ |= {"chat_template_kwargs"}


class Server(Serve):
    """
    transformers' server of one checkpoint.

    Args:
        checkpoint (`str`): Folder or Hub repository, `ORG/NAME@REVISION` for a revision other than `main`.
        allow_local_images (`bool`, *optional*, defaults to `False`):
            Whether a client may name files of this machine and addresses that are not public.
        feature_cache_mb (`int`, *optional*, defaults to 256):
            Memory for the visual tokens of earlier images, so that the next question about one does not encode it.
        options: Those of `transformers.cli.serve.Serve`.

    Raises:
        ValueError: If the checkpoint is of another model, or `chat_template_kwargs` name a wrong budget.
    """

    def __init__(
        self,
        checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder or ORG/NAME[@REVISION].")],
        *,
        allow_local_images: Annotated[
            bool,
            typer.Option(
                "--allow_local_images",
                "--allow-local-images",
                help="Let clients name files of this machine and addresses that are not public.",
            ),
        ] = False,
        feature_cache_mb: Annotated[
            int,
            typer.Option(
                "--feature_cache_mb",
                "--feature-cache-mb",
                min=0,
                help="Memory for the visual tokens of earlier images: the next question about one does not encode it.",
            ),
        ] = 256,
        non_blocking: bool = False,
        **options,
    ):
        name, _, revision = checkpoint.partition("@")
        config = AutoConfig.from_pretrained(name, revision=revision or "main")
        if not isinstance(config, DeltaLlavaConfig):
            raise ValueError(f"{checkpoint} is a {config.model_type}, not a delta_llava: try `transformers serve`.")
        processor = AutoProcessor.from_pretrained(name, revision=revision or "main")
        template_kwargs = json.loads(options.get("chat_template_kwargs") or "{}")
        budget = {**template_kwargs.get("processor_kwargs", {}), **template_kwargs}.get("num_visual_tokens")
        (num_tokens,) = processor._get_num_multimodal_tokens([(1, 1)], num_visual_tokens=budget)["num_image_tokens"]
        if "enable_thinking" not in (processor.chat_template or ""):
            options.pop("reasoning", None)  # other models ignore it, but our processor refuses it

        _serve_class(FeatureCache(feature_cache_mb * 2**20))
        self._guard = Middleware(
            RequestGuard,
            checkpoint=checkpoint,
            config=config,
            processor=processor,
            default_budget=budget if budget == "auto" else num_tokens,
            guard=ImageGuard(allow_local_images),
        )
        self._runs_in_thread = non_blocking
        super().__init__(checkpoint, non_blocking=True, **options)

    def start_server(self):
        """Called when the app is built and the model loaded."""
        app = self.server.config.app
        # Innermost, so that refusals have the headers of CORS and request ids, too
        app.user_middleware.append(self._guard)
        app.add_exception_handler(
            HTTPException, lambda request, error: openai_error(str(error.detail), error.status_code)
        )
        if self._runs_in_thread:
            super().start_server()
        else:
            self.server.run()


def _serve_class(cache: FeatureCache):
    """Let transformers' server find our model, which keeps its image features in the cache."""

    class CachedDeltaLlava(DeltaLlavaForConditionalGeneration):
        def __init__(self, config: DeltaLlavaConfig):
            super().__init__(config)
            cache_image_features(self, cache)

        def generate(self, *args, generation_config=None, tokenizer=None, **kwargs):
            context = getattr(self.config.text_config, "max_position_embeddings", None)
            if context and generation_config and generation_config.max_new_tokens:
                # A request without a length gets one of 1024 or more
                left = context - kwargs["input_ids"].shape[1]
                generation_config.max_new_tokens = min(generation_config.max_new_tokens, left)
            # The server passes the processor, in which stop strings cannot be looked up
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            return super().generate(*args, generation_config=generation_config, tokenizer=tokenizer, **kwargs)

    AutoModelForMultimodalLM.register(DeltaLlavaConfig, CachedDeltaLlava, exist_ok=True)
    # From these names the server knows how to load a model, and whether it takes images
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["delta_llava"] = CachedDeltaLlava.__name__
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["delta_llava"] = DeltaLlavaForConditionalGeneration.__name__


own = list(inspect.signature(Server).parameters.values())[:3]
theirs = [option.replace(kind=option.KEYWORD_ONLY) for option in inspect.signature(Serve).parameters.values()]
Server.__signature__ = inspect.Signature([*own, *(option for option in theirs if option.name != "force_model")])

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
app.command(
    help="Serve a Delta-LLaVA checkpoint by transformers' server, with OpenAI's API. A request sets the budget of its"
    ' images by "chat_template_kwargs": {"num_visual_tokens": 36}, or of one image by its "detail": "low", "high" or'
    ' "auto". All options of `transformers serve` work.'
)(Server)

if __name__ == "__main__":
    app()
