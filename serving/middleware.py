"""What a client may send to our server: budgets, images and lengths, checked before transformers sees them."""

import asyncio
import base64
import inspect
import json
import math
import re
import time
from dataclasses import dataclass, replace
from reprlib import Repr
from typing import Any

from anyio import CapacityLimiter, to_thread
from jinja2 import TemplateError
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import ProcessorMixin
from transformers.cli.serving.chat_completion import TransformersCompletionCreateParamsStreaming
from transformers.cli.serving.completion import TransformersTextCompletionCreateParams
from transformers.cli.serving.response import TransformersResponseCreateParamsStreaming
from transformers.utils import logging

from ..configuration_delta_llava import DeltaLlavaConfig
from ..processing_delta_llava import MAX_IMAGE_SIDE, DeltaLlavaProcessor
from .image_guard import ImageGuard


logger = logging.get_logger(__name__)

MAX_BODY_BYTES = 2**26
# Of "{", "[" and ",", also in texts: parsed, 64 MiB of them are gigabytes
MAX_STRUCTURE = 100_000
# No text has longer tokens on average, so a text of more than this for each token of the context is not tokenized
_MAX_TOKEN_BYTES = 32
_MAX_BIASED_TOKENS = 300  # OpenAI's limit
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")
# A request may be of any length and depth
_short = Repr()
_short.maxstring = _short.maxother = 60
_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "input_image")
# What transformers' handlers raise for a request of an unexpected shape
_REQUEST_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, TemplateError)


@dataclass
class _Image:
    """An image of a request: the part that its `data:` URL goes into, its address, its detail and its place."""

    part: dict[str, Any]
    source: str
    detail: str | None
    place: str


@dataclass(frozen=True)
class _Number:
    """The numbers that a field may have."""

    low: float
    high: float
    kind: type[float] = float
    or_zero: bool = False

    def check(self, name: str, value: Any) -> float:
        is_number = type(value) is self.kind or (self.kind is float and type(value) is int)
        if not is_number or not (self.low <= value <= self.high or (self.or_zero and value == 0)):
            kind = "an integer" if self.kind is int else "a number"
            allowed = f"{'0 or ' if self.or_zero else ''}{kind} of {self.low}..{self.high}"
            allowed = "true or false" if self.kind is bool else allowed
            raise _Refusal(f"{name}={_short.repr(value)} must be {allowed}.")
        return self.kind(value)  # transformers takes no integers for floats


_FLAG = _Number(False, True, bool)
# Lower temperatures are as good as 0, and end in NaN
_SAMPLING = {"temperature": _Number(0.01, 2, or_zero=True), "top_p": _Number(0, 1)}


class RequestGuard:
    """
    ASGI middleware for transformers' server of one Delta-LLaVA checkpoint.

    A request with a wrong budget, image, length or shape gets an error 400 in OpenAI's form. Images are opened here and
    passed on as `data:` URLs, so that transformers opens no address. Each gets a budget: the request's
    (`num_visual_tokens` in `chat_template_kwargs` or `processor_kwargs`), or else that of its `detail`: for `"low"` the
    smallest trained one from 16 up (or the smallest of all), for `"high"` the largest trained one, for `"auto"` the
    default. See "How a budget is decided" in `configuration_delta_llava.py`.

    Args:
        app (`ASGIApp`): The app of `transformers serve`.
        checkpoint (`str`): The one model that is served.
        config (`DeltaLlavaConfig`), processor (`DeltaLlavaProcessor`): Those of the checkpoint.
        default_budget (`int` or `"auto"`): Budget of an image for which a request sets none.
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
        length, self.token = _Number(1, self.context, int), _Number(0, config.text_config.vocab_size - 1, int)
        self.body_fields = {
            **_SAMPLING,
            **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), length),
            **dict.fromkeys(("stream", "parallel_tool_calls"), _FLAG),
            "frequency_penalty": _Number(-0.9, 2),  # 1 more is transformers' repetition_penalty
            "seed": _Number(-(2**63), 2**63 - 1, int),
        }
        # The other fields of a generation may fail deep inside it, never end, or take all memory
        self.generation_fields = {
            **_SAMPLING,
            **dict.fromkeys(("max_new_tokens", "max_length"), length),
            "do_sample": _FLAG,
            "top_k": _Number(0, 10**6, int),
            "min_p": _Number(0, 1),
            "num_beams": _Number(1, 8, int),
            "repetition_penalty": _Number(0.1, 3),
            "no_repeat_ngram_size": _Number(2, 100, int, or_zero=True),
            "eos_token_id": self.token,
            "pad_token_id": self.token,
        }
        # Slow addresses must not keep other images waiting
        self.fetching, self.opening = CapacityLimiter(32), CapacityLimiter(4)
        self.answering = CapacityLimiter(256)
        # Arguments of the processor, and tokens of the chat template, are not a client's to set
        self.taken_names = {"messages", *processor._known_arguments(), *processor.tokenizer.special_tokens_map}
        for call in (ProcessorMixin.apply_chat_template, ProcessorMixin.__call__):
            self.taken_names.update(inspect.signature(call).parameters)
        # Tokens that the chat template adds to the first message, and to each further one
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
        chat = {*TransformersCompletionCreateParamsStreaming.__mutable_keys__, "processor_kwargs"}
        response = {*TransformersResponseCreateParamsStreaming.__mutable_keys__, "processor_kwargs"}
        self.endpoints = {
            "/v1/chat/completions": (self._check_chat, {*chat, "chat_template_kwargs"}),
            "/v1/responses": (self._check_response, {*response, "chat_template_kwargs"}),
            "/v1/completions": (self._check_completion, TransformersTextCompletionCreateParams.__mutable_keys__),
            "/load_model": (None, {"model"}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] in ("GET", "OPTIONS") and scope["path"] == "/v1/models":
            # transformers would list the Hub's cache, which is not served, and fails without one
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
                status, message = 400, str(error)
                if isinstance(error, UnicodeError) or not isinstance(error, (ValueError, TemplateError)):
                    message = f"The request is not what transformers expects: {type(error).__name__}: {error}"
            else:
                logger.exception("A request failed:")
                status, message = 500, f"The server failed to answer: {type(error).__name__}"
            await openai_error(message, status)(scope, receive, send)

    async def _checked(self, scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The request as it is passed on."""
        if scope["path"] not in self.endpoints:
            raise _Refusal(f"There is no {scope['path']} here: POST to {', '.join(self.endpoints)}", 404)
        data = await _read_body(receive)
        body = {name: value for name, value in _parse(data, "The request").items() if value is not None}
        check, known = self.endpoints[scope["path"]]
        if unknown := body.keys() - known:
            raise _Refusal(
                f"Unexpected fields {_short.repr(sorted(unknown))}: budgets belong in chat_template_kwargs, and"
                f" {', '.join(self.generation_fields)} in generation_config, as the text of a JSON object."
            )
        if body.get("model") not in (None, self.checkpoint):
            raise _Refusal(f"This server serves only {self.checkpoint}, not {_short.repr(body['model'])}.")
        if check:
            await check(body)
        data = json.dumps(body, ensure_ascii=False).encode()
        headers = {name: value for name, value in scope["headers"] if name != b"transfer-encoding"}
        headers |= {b"content-length": str(len(data)).encode(), b"content-type": b"application/json"}
        scope = {**scope, "headers": list(headers.items())}
        messages = [{"type": "http.request", "body": data, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return scope, replay

    async def _answer(self, scope: Scope, receive: Receive, send: Send):
        """Runs the app in a thread: transformers' preprocessing would delay the next tokens of other requests."""
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
        """Of each image; `"auto"` counts as the largest budget that it may choose."""
        sizes = [(MAX_IMAGE_SIDE, MAX_IMAGE_SIDE)] * num_images
        return self.processor._get_num_multimodal_tokens(sizes, num_visual_tokens=budget)["num_image_tokens"]

    async def _check_chat(self, body: dict[str, Any]):
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _Refusal("messages must be a list of at least one message.")
        images, texts = [], [_tools(body)]
        body["messages"] = [
            self._message(message, f"messages[{number}]", images, texts) for number, message in enumerate(messages)
        ]
        await self._check_prompt(body, images, texts, len(messages))

    async def _check_response(self, body: dict[str, Any]):
        body.setdefault("stream", False)  # OpenAI's default; that of transformers is True
        images, texts, items = [], [], body.get("input")
        instructions = body.get("instructions")
        if instructions is not None and not isinstance(instructions, str):
            raise _Refusal(f"instructions must be a text, but are of type {type(instructions).__name__}.")
        texts += [instructions or "", _tools(body)]
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
        kind = item.get("type")
        found = f"{place} is {_short.repr(item)}"
        if kind == "reasoning":
            content = item.get("content") or []
            if not isinstance(content, list) or not all(
                isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
            ):
                raise _Refusal(f"{found}: the content of a reasoning must be a list of parts with a text.")
        elif "role" in item:
            return self._message(item, place, images, texts)
        elif kind not in ("function_call", "function_call_output") or not isinstance(item.get("call_id"), str):
            raise _Refusal(
                f"{found}: it must be a message with a role, a reasoning, or a function_call or function_call_output"
                " with a call_id."
            )
        elif kind == "function_call_output":
            return {**item, "output": self._parts(item.get("output"), f"{place}.output", images, texts)}
        else:
            _check_call(item, place)
        texts.append(json.dumps(item))
        return item

    def _message(self, message: Any, place: str, images: list[_Image], texts: list[str]) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _Refusal(f"{place} must be a message with a role, but is {_short.repr(message)}.")
        message = {name: value for name, value in message.items() if value is not None}
        if calls := message.pop("tool_calls", None):  # transformers reads them instead of the content
            if not isinstance(calls, list):
                raise _Refusal(f"{place}.tool_calls must be a list, but is {_short.repr(calls)}.")
            for number, call in enumerate(calls):
                function = call.get("function") if isinstance(call, dict) else None
                _check_call(function or call, f"{place}.tool_calls[{number}]")
            texts.append(json.dumps(calls))
            message |= {"tool_calls": calls, "content": None}
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
                images.append(_Image(parts[-1], source, detail, f"{place}[{number}]"))
            else:
                raise _Refusal(f"{found}: its type must be one of {', '.join((*_TEXTS, *_IMAGES))}.")
        return parts

    def _check_number(self, images: list[_Image], texts: list[str]):
        if len(images) + len(texts) > self.context:
            raise _Refusal(f"The request has more parts than the {self.context} tokens that the model's context holds.")

    async def _check_completion(self, body: dict[str, Any]):
        texts = [body.get("prompt"), body.get("suffix", "")]
        if not texts[0] or not all(isinstance(text, str) for text in texts):
            raise _Refusal("prompt must be a text that is not empty, and suffix a text.")
        if any(self.processor.image_token in text for text in texts):
            raise _Refusal(
                f"A completion takes no images, but its text holds {self.processor.image_token}: use a chat."
            )
        await self._check_fields(body, [], texts)

    async def _check_prompt(self, body: dict[str, Any], images: list[_Image], texts: list[str], num_messages: int):
        """Checks for both chats and responses: the budget of each image, all lengths, and the images."""
        template_kwargs = _object(body, "chat_template_kwargs")
        budget = self._requested_budget(body, template_kwargs)
        if budget is None:
            budget = [self.budget_of_detail[image.detail] for image in images]
        # One for all is checked without images, too
        num_images = len(images) if isinstance(budget, list) else max(len(images), 1)
        budgets = self._num_image_tokens(budget, num_images)[: len(images)]
        body["chat_template_kwargs"] = {**template_kwargs, "num_visual_tokens": budget} if images else template_kwargs
        texts.append(json.dumps(template_kwargs))
        overhead = self.first_overhead + (num_messages - 1) * self.next_overhead
        await self._check_fields(body, budgets, texts, overhead)
        await self._open(images)

    def _requested_budget(self, body: dict[str, Any], template_kwargs: dict[str, Any]) -> Any:
        """The budget of a request, taken out of every place that may hold it."""
        found = [template_kwargs.pop("num_visual_tokens", None)]
        for owner in (template_kwargs, body):
            processor_kwargs = _object(owner, "processor_kwargs")
            owner.pop("processor_kwargs", None)
            found.append(processor_kwargs.pop("num_visual_tokens", None))
            if processor_kwargs:
                raise _Refusal(
                    f"processor_kwargs takes only num_visual_tokens here, not {', '.join(processor_kwargs)}."
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

    async def _check_fields(self, body: dict[str, Any], budgets: list[int], texts: list[str], overhead: int = 0):
        config = body.get("generation_config")
        if not isinstance(config, str | None):
            raise _Refusal(f"generation_config must be a text of JSON, but is {_short.repr(config)}.")
        config = {} if config is None else _parse(config, "generation_config")
        config = {name: value for name, value in config.items() if value is not None}
        if unknown := config.keys() - self.generation_fields.keys():
            allowed = ", ".join(self.generation_fields)
            raise _Refusal(f"generation_config takes {allowed} here, not {_short.repr(sorted(unknown))}.")
        for fields, allowed in ((body, self.body_fields), (config, self.generation_fields)):
            for name in allowed.keys() & fields.keys():
                value = fields[name]
                if name == "eos_token_id" and isinstance(value, list) and 0 < len(value) <= 16:
                    fields[name] = [allowed[name].check(name, token) for token in value]
                else:
                    fields[name] = allowed[name].check(name, value)
        if body.get("stream") and config.get("num_beams", 1) > 1:
            raise _Refusal(f"num_beams={config['num_beams']} gives no stream: ask with stream=false, or for one beam.")
        if config.get("temperature") == 0:  # as in the body
            config |= {"temperature": 1.0, "do_sample": False}
        if "generation_config" in body:
            body["generation_config"] = json.dumps(config)
        stops = body.pop("stop", None) or []
        stops = [stops] if isinstance(stops, str) else stops
        is_list = isinstance(stops, list) and len(stops) <= 4
        if not is_list or not all(isinstance(text, str) and 0 < len(text) <= 100 for text in stops):
            raise _Refusal(f"stop={_short.repr(stops)} must be a text of 1..100 characters, or a list of up to four.")
        if stops:
            body["stop"] = stops
        if bias := self._bias(body.pop("logit_bias", None)):
            body["logit_bias"] = bias
        num_tokens = sum(budgets) + overhead
        text = "\n".join(texts)
        if (num_bytes := len(text.encode())) <= self.context * _MAX_TOKEN_BYTES:
            num_tokens += await to_thread.run_sync(self._num_tokens, text, limiter=self.opening)
            found = f"about {num_tokens} tokens, {sum(budgets)} of them for {len(budgets)} images"
        else:
            num_tokens, found = math.inf, f"a text of {num_bytes} bytes"
        asked = max(fields.get(name, 1) for fields in (body, config) for name in _LENGTHS)
        if num_tokens + asked > self.context:
            more = f", and asks for {asked} more" if asked > 1 else ""
            raise _Refusal(f"The request has {found}{more}, but the model's context holds {self.context} tokens.")

    def _bias(self, bias: Any) -> dict[str, float]:
        if bias is None:
            return {}
        if not isinstance(bias, dict) or len(bias) > _MAX_BIASED_TOKENS:
            raise _Refusal(f"logit_bias must be an object of up to {_MAX_BIASED_TOKENS} tokens.")
        for token in bias:
            if not re.fullmatch(r"[0-9]{1,9}", token):
                raise _Refusal(f"logit_bias names tokens by their numbers, as '17', not {_short.repr(token)}.")
            self.token.check("A token of logit_bias", int(token))
        bound = _Number(-100, 100)
        return {token: bound.check(f"logit_bias of token {token}", value) for token, value in bias.items()}

    async def _open(self, images: list[_Image]):
        """Write each image into the request as a `data:` URL, one after the other to limit the memory."""
        guard = self.guard

        def data_url(image: _Image) -> str:
            nonlocal guard
            start = time.monotonic()
            data, opened = guard.check(image.source)
            guard = replace(
                guard,
                max_bytes=guard.max_bytes - len(data),
                max_pixels=guard.max_pixels - opened.width * opened.height,
                timeout=max(guard.timeout - (time.monotonic() - start), 0.0),
            )
            return f"data:image/{opened.info['format'].lower()};base64,{base64.b64encode(data).decode()}"

        for image in images:
            limiter = self.fetching if image.source[:4].lower() == "http" else self.opening
            try:
                image.part["image_url"] = await to_thread.run_sync(data_url, image, limiter=limiter)
            except ValueError as error:
                of_all = (
                    f" (the images of a request have at most {self.guard.max_bytes} bytes, {self.guard.max_pixels}"
                    f" pixels and {self.guard.timeout:g} s together)"
                )
                raise _Refusal(f"{image.place}: {error}{'' if guard is self.guard else of_all}") from error


def openai_error(message: str, status: int) -> JSONResponse:
    """An error in the form that OpenAI's clients know."""
    message = message[:2000].encode(errors="backslashreplace").decode()  # JSON may hold what UTF-8 cannot
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


class _Refusal(ValueError):
    """A sentence that says what is wrong with a request."""

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
    if num_bytes > MAX_BODY_BYTES:  # only after the last of them does a client read the answer
        raise _Refusal(f"The request has {num_bytes} bytes, more than {MAX_BODY_BYTES}.", 413)
    return bytes(data)


def _tools(body: dict[str, Any]) -> str:
    """The text of a request's tools."""
    tools = body.get("tools")
    if not isinstance(tools, list | None):
        raise _Refusal(f"tools must be a list of functions, but are {_short.repr(tools)}.")
    for number, tool in enumerate(tools or []):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not isinstance(function.get("parameters"), dict | None)
        ):
            raise _Refusal(
                f"tools[{number}] must be a function with a name, and an object as its parameters, but is"
                f" {_short.repr(tool)}."
            )
    if not isinstance(body.get("tool_choice"), str | dict | None):
        raise _Refusal(f"tool_choice={_short.repr(body['tool_choice'])} must be a text or an object.")
    return json.dumps(tools or "")


def _check_call(function: Any, place: str):
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if isinstance(arguments, str):
        arguments = _parse(arguments, f"{place}: arguments")
    if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
        raise _Refusal(
            f"{place} must call a function by its name, with arguments that are an object or the JSON of one, but is"
            f" {_short.repr(function)}."
        )


def _parse(data: bytes | str, name: str) -> dict[str, Any]:
    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is not a finite number")
        return value

    raw = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    if (size := len(raw) - len(raw.translate(None, b"{[,"))) > MAX_STRUCTURE:
        raise _Refusal(f"{name} has {size} brackets, braces and commas, more than {MAX_STRUCTURE}.", 413)
    try:
        body = json.loads(data, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise _Refusal(f"{name} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise _Refusal(f"{name} must be a JSON object, but is {_short.repr(body)}.")
    return body


def _object(owner: dict[str, Any], name: str) -> dict[str, Any]:
    value = owner.get(name)
    if value is not None and not isinstance(value, dict):
        raise _Refusal(f"{name} must be an object, but is {_short.repr(value)}.")
    return dict(value or {})
