"""What a client may send to our server: budgets, images and lengths, checked before transformers sees them."""

import asyncio
import base64
import inspect
import json
import math
from dataclasses import dataclass
from reprlib import Repr
from typing import Any

from anyio import CapacityLimiter, to_thread
from jinja2 import TemplateError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import ProcessorMixin
from transformers.utils import logging

from ..configuration_delta_llava import DeltaLlavaConfig
from ..processing_delta_llava import MAX_IMAGE_SIDE, DeltaLlavaProcessor
from .image_guard import ImageGuard


logger = logging.get_logger(__name__)

MAX_BODY_BYTES = 2**26
# No tokens are longer on average, so that a text of more need not be tokenized to be too long
_MAX_TOKEN_BYTES = 32
# Of OpenAI's and transformers' fields, those that would fail deep in a generation, or never end it
_RANGES = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "seed": (-(2**63), 2**63 - 1),
    "num_beams": (1, 8),
    "num_return_sequences": (1, 1),
}
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "max_length")
_WHOLE = (*_LENGTHS, "seed", "num_beams", "num_return_sequences")
# They would take memory for nothing
_INNER_OUTPUTS = ["return_dict_in_generate"]
_INNER_OUTPUTS += [f"output_{name}" for name in ("attentions", "hidden_states", "logits", "scores")]
# Requests may be as long and as deep as they like
_short = Repr()
_short.maxstring = _short.maxother = 60
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "input_image")
# What transformers' handlers raise for a request of another shape than they expect
_REQUEST_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, TemplateError)


@dataclass
class _Image:
    """An image of a request: where its address is to be written, and what was said of it."""

    owner: dict[str, Any]
    key: str
    source: str
    detail: str | None
    place: str


class RequestGuard:
    """
    ASGI middleware for transformers' server of one Delta-LLaVA checkpoint.

    A request is answered by 400, in OpenAI's form, if a budget, an image, a length or its shape is wrong. Images are
    opened here and handed on as `data:` URLs, so that the app behind opens no other address. Each gets a budget: the
    request's (`num_visual_tokens` in `chat_template_kwargs` or `processor_kwargs`, one for all images or a list), or
    else that of its `detail`: for `"low"` the smallest trained one that is 16 or more (or the smallest there is), for
    `"high"` the largest trained one, for `"auto"` the default.

    Args:
        app (`ASGIApp`): The app of `transformers serve`.
        checkpoint (`str`): The one model that is served.
        config (`DeltaLlavaConfig`), processor (`DeltaLlavaProcessor`): Those of the checkpoint.
        default_budget (`int` or `"auto"`): Budget of an image of which a request says nothing.
        guard (`ImageGuard`): What opens images.
    """

    def __init__(
        self,
        app: ASGIApp,
        checkpoint: str,
        config: DeltaLlavaConfig,
        processor: DeltaLlavaProcessor,
        default_budget: int | str,
        guard: ImageGuard,
    ):
        self.app = app
        self.checkpoint = checkpoint
        self.processor = processor
        self.guard = guard
        self.context = getattr(config.text_config, "max_position_embeddings", None) or math.inf
        trained = config.visual_token_budgets
        self.budget_of_detail = {
            "low": min((budget for budget in trained if budget >= 16), default=min(trained)),
            "high": max(trained),
            "auto": default_budget,
            None: default_budget,
        }
        # Addresses that answer slowly must not keep other images waiting
        self.fetching, self.opening = CapacityLimiter(32), CapacityLimiter(4)
        self.answering = CapacityLimiter(256)
        # Arguments of the processor, and tokens of the chat template, are not a client's to set
        self.taken_names = {"messages", *processor._known_arguments(), *processor.tokenizer.special_tokens_map}
        for call in (ProcessorMixin.apply_chat_template, ProcessorMixin.__call__):
            self.taken_names.update(inspect.signature(call).parameters)
        # What the chat template adds to the first message, and to each further one
        lengths = [
            self._num_tokens(
                processor.apply_chat_template(
                    [{"role": role, "content": ""} for role in ("user", "assistant", "user")[:num_messages]],
                    add_generation_prompt=True,
                )
            )
            for num_messages in (1, 3)
        ]
        self.first_overhead, self.next_overhead = lengths[0], math.ceil((lengths[1] - lengths[0]) / 2)
        self.endpoints = {
            "/v1/chat/completions": self._check_chat,
            "/v1/responses": self._check_response,
            "/v1/completions": self._check_completion,
            "/v1/systemone": self._check_decision,
            "/load_model": self._check_model,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] in ("GET", "OPTIONS") and scope["path"] == "/v1/models":
            # transformers lists the Hub's cache, of which nothing else is served, and fails where there is none
            models = [{"id": self.checkpoint, "object": "model", "created": 0, "owned_by": ""}]
            return await JSONResponse({"object": "list", "data": models})(scope, receive, send)
        has_started = False

        async def watched_send(message: Message):
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            if scope["method"] == "POST":
                scope, receive = await self._checked(scope, receive)
                await self._answer(scope, receive, watched_send)
            else:
                await self.app(scope, receive, watched_send)
        except Exception as error:
            if has_started:
                raise
            if isinstance(error, _Refusal):
                status, message = error.status, str(error)
            elif isinstance(error, _REQUEST_ERRORS):
                logger.warning("A request was refused:", exc_info=True)
                status, message = 400, str(error) or type(error).__name__
            else:
                logger.exception("A request failed:")
                status, message = 500, f"The server failed to answer: {type(error).__name__}"
            await openai_error(message, status)(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The request as it is handed on."""
        if scope["path"] not in self.endpoints:
            raise _Refusal(f"There is no {scope['path']} here: POST to {', '.join(self.endpoints)}", 404)
        data = await _read_body(receive)
        body = _parse(data, "The request")
        await self.endpoints[scope["path"]](body)
        data = json.dumps(body).encode()
        headers = {name: value for name, value in scope["headers"] if name != b"transfer-encoding"}
        headers |= {b"content-length": str(len(data)).encode(), b"content-type": b"application/json"}
        scope = {**scope, "headers": list(headers.items())}
        messages = [{"type": "http.request", "body": data, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return scope, replay

    async def _answer(self, scope: Scope, receive: Receive, send: Send):
        """Runs the app in a thread: transformers tokenizes and scales images where others wait for their next token."""
        loop = asyncio.get_running_loop()

        def from_thread(call):
            async def called(*args):
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(*args), loop))

            return called

        def run():
            asyncio.run(self.app(scope, from_thread(receive), from_thread(send)))

        await to_thread.run_sync(run, limiter=self.answering)

    def _num_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer.tokenize(text))

    def _num_image_tokens(self, budget: Any, num_images: int) -> list[int]:
        """Of each image; `"auto"` counts as the most that it may be."""
        sizes = [(MAX_IMAGE_SIDE, MAX_IMAGE_SIDE)] * num_images
        return self.processor._get_num_multimodal_tokens(sizes, num_visual_tokens=budget)["num_image_tokens"]

    async def _check_chat(self, body: dict[str, Any]):
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _Refusal("messages must be a list of at least one message.")
        images, texts = [], [json.dumps(body.get("tools") or "")]
        body["messages"] = [
            self._message(message, f"messages[{number}]", images, texts) for number, message in enumerate(messages)
        ]
        await self._check_prompt(body, images, texts, len(messages))

    async def _check_response(self, body: dict[str, Any]):
        body.setdefault("stream", False)  # as OpenAI has it; transformers streams
        images, texts, items = [], [], body.get("input")
        instructions = body.get("instructions")
        if instructions is not None and not isinstance(instructions, str):
            raise _Refusal(f"instructions must be a text, but are of type {type(instructions).__name__}.")
        texts += [instructions or "", json.dumps(body.get("tools") or "")]
        if isinstance(items, str):
            texts.append(items)
        elif isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
            if "role" not in items[0]:
                body["input"] = self._parts(items, "input", images, texts)
            else:
                body["input"] = [
                    self._item(item, f"input[{number}]", images, texts) for number, item in enumerate(items)
                ]
        else:
            raise _Refusal("input must be a text, or a list of messages or parts, and not empty.")
        num_messages = len(items) if isinstance(items, list) and "role" in items[0] else 1
        await self._check_prompt(body, images, texts, num_messages + (instructions is not None))

    def _item(self, item: dict[str, Any], place: str, images: list[_Image], texts: list[str]) -> dict[str, Any]:
        if "role" in item:
            return self._message(item, place, images, texts)
        if item.get("type") == "function_call_output":
            return {**item, "output": self._parts(item.get("output"), f"{place}.output", images, texts)}
        texts.append(json.dumps(item))
        return item

    def _message(self, message: Any, place: str, images: list[_Image], texts: list[str]) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Refusal(f"{place} must be a message with a role, but is {_short.repr(message)}.")
        message = {name: value for name, value in message.items() if value is not None}
        if "tool_calls" in message:  # transformers takes them instead of the content
            texts.append(json.dumps(message["tool_calls"]))
            message["content"] = None
        return {**message, "content": self._parts(message.get("content"), f"{place}.content", images, texts)}

    def _parts(self, content: Any, place: str, images: list[_Image], texts: list[str]) -> Any:
        """The content of a message; its images and texts are added to the lists."""
        self._check_number(images, texts)
        if content is None or isinstance(content, str):
            texts.append(content or "")
            return content
        if not isinstance(content, list):
            raise _Refusal(f"{place} must be a text or a list of parts, but is {_short.repr(content)}.")
        parts = []
        for number, part in enumerate(content):
            self._check_number(images, texts)
            kind = part.get("type") if isinstance(part, dict) else None
            found = f"{place}[{number}] is {_short.repr(part)}"
            if kind in _TEXTS:
                if not isinstance(part.get("text"), str):
                    raise _Refusal(f"{found}: a text part needs a text.")
                texts.append(part["text"])
                parts.append({"type": kind, "text": part["text"]})
            elif kind in _IMAGES:
                image = part.get("image_url")
                image = image if isinstance(image, dict) else {"url": image, "detail": part.get("detail")}
                source, detail = image.get("url"), image.get("detail", part.get("detail"))
                if not isinstance(source, str):
                    raise _Refusal(f"{found}: an image part needs an image_url, and in it a url.")
                if not isinstance(detail, str | None) or detail not in self.budget_of_detail:
                    raise _Refusal(f'{found}: detail={detail!r} must be "low", "high" or "auto".')
                parts.append({"type": kind, "image_url": source})
                images.append(_Image(parts[-1], "image_url", source, detail, f"{place}[{number}]"))
            else:
                raise _Refusal(f"{found}: its type must be one of {', '.join((*_TEXTS, *_IMAGES))}.")
        return parts

    def _check_number(self, images: list[_Image], texts: list[str]):
        if len(images) + len(texts) > self.context:
            raise _Refusal(f"The request has more parts than the {self.context} tokens that the model's context holds.")

    async def _check_completion(self, body: dict[str, Any]):
        texts = [body.get("prompt"), body.get("suffix") or ""]
        if not texts[0] or not all(isinstance(text, str) for text in texts):
            raise _Refusal("prompt must be a text that is not empty, and suffix a text.")
        if any(self.processor.image_token in text for text in texts):
            raise _Refusal(
                f"A completion takes no images, but its text holds {self.processor.image_token}: use a chat."
            )
        await self._check_lengths(body, [], texts)

    async def _check_decision(self, body: dict[str, Any]):
        assets = body.get("assets") or {}
        if not isinstance(assets, dict) or not all(isinstance(asset, dict) for asset in assets.values()):
            raise _Refusal('assets must map names to images, as {"data_base64": ...}.')
        images = [
            _Image(asset, "data_base64", asset["data_base64"], None, f"assets[{name!r}]")
            for name, asset in assets.items()
            if "data_base64" in asset
        ]
        texts = [json.dumps([body.get("state"), body.get("questions")])]
        await self._check_lengths(body, self._num_image_tokens(self.budget_of_detail[None], len(images)), texts)
        await self._open(images)
        for image in images:  # base64 alone
            image.owner[image.key] = image.owner[image.key].partition(",")[2]

    async def _check_model(self, body: dict[str, Any]):
        if body.get("model") != self.checkpoint:
            raise _Refusal(f"This server serves {self.checkpoint} alone, not {_short.repr(body.get('model'))}.")

    async def _check_prompt(self, body: dict[str, Any], images: list[_Image], texts: list[str], num_messages: int):
        """What chats and responses have in common: the budget of each image, all lengths, and the images."""
        template_kwargs = _object(body, "chat_template_kwargs")
        budget = self._requested_budget(body, template_kwargs)
        if budget is None:
            budget = [self.budget_of_detail[image.detail] for image in images]
        # One for all is right or wrong without images, too
        num_images = len(images) if isinstance(budget, list) else max(len(images), 1)
        budgets = self._num_image_tokens(budget, num_images)[: len(images)]
        body["chat_template_kwargs"] = {**template_kwargs, "num_visual_tokens": budget} if images else template_kwargs
        texts.append(json.dumps(template_kwargs))
        overhead = self.first_overhead + (num_messages - 1) * self.next_overhead
        await self._check_lengths(body, budgets, texts, overhead)
        await self._open(images)

    def _requested_budget(self, body: dict[str, Any], template_kwargs: dict[str, Any]) -> Any:
        """Takes the budget out of wherever a request names it."""
        found = [template_kwargs.pop("num_visual_tokens", None)]
        for owner in (template_kwargs, body):
            processor_kwargs = _object(owner, "processor_kwargs")
            owner.pop("processor_kwargs", None)
            found.append(processor_kwargs.pop("num_visual_tokens", None))
            if processor_kwargs:
                raise _Refusal(
                    f"processor_kwargs takes num_visual_tokens alone here, not {', '.join(processor_kwargs)}."
                )
        # The rest are variables of the chat template
        if taken := self.taken_names & template_kwargs.keys():
            raise _Refusal(
                "chat_template_kwargs takes num_visual_tokens and variables of the chat template here, not"
                f" {', '.join(sorted(taken))}."
            )
        found = [budget for budget in found if budget is not None]
        if any(budget != found[0] or type(budget) is not type(found[0]) for budget in found):
            raise _Refusal(f"The request names several num_visual_tokens: {' and '.join(map(str, found))}.")
        return found[0] if found else None

    async def _check_lengths(self, body: dict[str, Any], budgets: list[int], texts: list[str], overhead: int = 0):
        fields = dict(body)
        if isinstance(body.get("generation_config"), str):
            fields |= _parse(body["generation_config"], "generation_config")
        ranges = _RANGES | dict.fromkeys(_LENGTHS, (1, self.context))
        for name in ranges.keys() & fields.keys():
            (low, high), value = ranges[name], fields[name]
            kinds = {int} if name in _WHOLE else {int, float}
            if value is not None and (type(value) not in kinds or not low <= value <= high):
                kind = "an integer" if name in _WHOLE else "a number"
                raise _Refusal(f"{name}={_short.repr(value)} must be {kind} of {low}..{high}.")
        stop = body.get("stop")
        stops = [stop] if isinstance(stop, str) else stop or []
        is_list = isinstance(stops, list) and len(stops) <= 4
        if not is_list or not all(isinstance(text, str) and 0 < len(text) <= 100 for text in stops):
            raise _Refusal(f"stop={_short.repr(stop)} must be a text of 1..100 characters, or a list of up to four.")
        if asked := [name for name in _INNER_OUTPUTS if fields.get(name)]:
            raise _Refusal(f"generation_config asks for {', '.join(asked)}, which an answer does not hold.")
        num_tokens = sum(budgets) + overhead
        text = "\n".join(texts)
        if (num_bytes := len(text.encode())) <= self.context * _MAX_TOKEN_BYTES:
            num_tokens += await to_thread.run_sync(self._num_tokens, text, limiter=self.opening)
            found = f"about {num_tokens} tokens, {sum(budgets)} of them for {len(budgets)} images"
        else:
            num_tokens, found = math.inf, f"a text of {num_bytes} bytes"
        if num_tokens >= self.context:
            raise _Refusal(f"The request has {found}, but the model's context holds {self.context} tokens.")

    async def _open(self, images: list[_Image]):
        """Write each image into the request as a `data:` URL, one after the other, since all of them take memory."""
        num_pixels = 0

        def data_url(image: _Image) -> str:
            nonlocal num_pixels
            data, opened = self.guard.check(image.source)
            num_pixels += opened.width * opened.height
            if num_pixels > self.guard.max_pixels:
                raise ValueError(f"the images of a request have at most {self.guard.max_pixels} pixels in all")
            return f"data:image/{opened.info['format'].lower()};base64,{base64.b64encode(data).decode()}"

        for image in images:
            is_address = isinstance(image.source, str) and image.source[:4].lower() == "http"
            limiter = self.fetching if is_address else self.opening
            try:
                image.owner[image.key] = await to_thread.run_sync(data_url, image, limiter=limiter)
            except ValueError as error:
                raise _Refusal(f"{image.place}: {error}") from error


def openai_error(message: str, status: int) -> JSONResponse:
    """An error in the form that OpenAI's clients know."""
    message = message[:2000].encode(errors="backslashreplace").decode()  # JSON may hold what UTF-8 cannot
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


class _Refusal(ValueError):
    """What is wrong with a request, in a sentence."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


async def _read_body(receive: Receive) -> bytes:
    data, num_bytes, is_whole = bytearray(), 0, False
    while not is_whole:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Refusal("The client went away.")
        num_bytes += len(message.get("body", b""))
        if num_bytes <= MAX_BODY_BYTES:
            data += message.get("body", b"")
        is_whole = not message.get("more_body", False)
    if num_bytes > MAX_BODY_BYTES:  # said after the last of them, since before it no client listens
        raise _Refusal(f"The request has {num_bytes} bytes, more than {MAX_BODY_BYTES}.", 413)
    return bytes(data)


def _parse(data: bytes | str, name: str) -> dict[str, Any]:
    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is no number")
        return value

    try:
        body = json.loads(data, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise _Refusal(f"{name} is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise _Refusal(f"{name} must be a JSON object, but is {_short.repr(body)}.")
    return body


def _object(owner: dict[str, Any], name: str) -> dict[str, Any]:
    value = owner.get(name)
    if value is not None and not isinstance(value, dict):
        raise _Refusal(f"{name} must be an object, but is {_short.repr(value)}.")
    return dict(value or {})
