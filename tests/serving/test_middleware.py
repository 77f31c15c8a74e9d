"""What reaches transformers' app: a budget for each image, images as `data:` URLs, and nothing unchecked."""

import asyncio
import base64
import json
import re
import threading
import time

import numpy as np
import pytest
from clients import data_url
from huggingface_hub.utils import httpx
from PIL import Image
from starlette.responses import JSONResponse

from delta_llava.processing_delta_llava import open_image
from delta_llava.serving import middleware
from delta_llava.serving.image_guard import ImageGuard
from delta_llava.serving.middleware import MAX_BODY_BYTES, RequestGuard


def chat(*parts, **fields):
    return {"messages": [{"role": "user", "content": list(parts)}], **fields}


def image(url, detail=None):
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


TEXT = {"type": "text", "text": "What is it?"}


@pytest.fixture
def serve(tiny_config, tiny_processor):
    """`serve(app=None, **options)` makes `post(path, body)`, which gives status and answer: what reached the app."""

    def make(app=None, config=None, **options):
        async def echo(scope, receive, send):
            message = await receive()
            assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
            await JSONResponse(json.loads(message["body"]))(scope, receive, send)

        guard = RequestGuard(
            app or echo,
            **{
                "checkpoint": "here",
                "config": config or tiny_config(),
                "processor": tiny_processor(),
                "default_budget": 36,
                "guard": ImageGuard(),
                **options,
            },
        )

        async def send(method, path, body):
            transport = httpx.ASGITransport(app=guard, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                content = body if isinstance(body, (bytes, type(None))) else json.dumps(body)
                answer = await client.request(method, path, content=content)
                return answer.status_code, answer.json()

        def post(path, body, method="POST"):
            return asyncio.run(send(method, path, body))

        post.send = send
        return post

    return make


def refusal(answer):
    status, body = answer
    assert status == 400 and body["error"]["type"] == "invalid_request_error"
    return body["error"]["message"]


def budgets(answer):
    status, body = answer
    assert status == 200, body
    return body["chat_template_kwargs"].get("num_visual_tokens")


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ([1, 4, 9, 16, 36, 144], {"low": 16, "high": 144, "auto": 36, None: 36}),
        ([36, 144], {"low": 36, "high": 144, "auto": 36, None: 36}),
        ([1, 4, 9], {"low": 1, "high": 9, "auto": 36, None: 36}),
        ([36], {"low": 36, "high": 36, "auto": 36, None: 36}),
    ],
)
def test_a_detail_is_a_budget_that_the_checkpoint_was_trained_for(serve, tiny_config, noise, trained, expected):
    post = serve(config=tiny_config(visual_token_budgets=trained))
    url = data_url(noise(1)[0])
    for detail, budget in expected.items():
        assert budgets(post("/v1/chat/completions", chat(image(url, detail), TEXT))) == [budget]
    assert budgets(post("/v1/chat/completions", chat(*[image(url, detail) for detail in expected]))) == [
        *expected.values()
    ]
    flat = [{"type": "input_image", "image_url": url, "detail": "low"}, {"type": "input_text", "text": "What?"}]
    for given in (flat, [{"role": "user", "content": flat}], [{"type": "message", "role": "user", "content": flat}]):
        answer = post("/v1/responses", {"input": given})
        assert budgets(answer) == [expected["low"]] and answer[1]["stream"] is False
    for detail in ("original", "", "LOW", 5, ["low"], {}):
        wrong = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
        assert 'must be "low", "high" or "auto"' in refusal(post("/v1/chat/completions", chat(wrong)))


def test_auto_is_left_to_the_processor_which_sees_the_image(serve, noise):
    url, auto = data_url(noise(1)[0]), {"chat_template_kwargs": {"num_visual_tokens": "auto"}}
    assert budgets(serve()("/v1/chat/completions", chat(image(url, "high"), TEXT, **auto))) == "auto"
    by_default = serve(default_budget="auto")
    assert budgets(by_default("/v1/chat/completions", chat(image(url), image(url, "low"), TEXT))) == ["auto", 16]
    many = chat(*[image(url)] * 60, TEXT)  # of up to 36 tokens
    assert "2160 of them for 60 images" in refusal(by_default("/v1/chat/completions", many))


def test_a_budget_in_a_request_wins_wherever_it_is_named(serve, noise):
    post, url = serve(), data_url(noise(1)[0])
    for fields in (
        {"chat_template_kwargs": {"num_visual_tokens": 4}},
        {"processor_kwargs": {"num_visual_tokens": 4}},
        {"chat_template_kwargs": {"processor_kwargs": {"num_visual_tokens": 4}}},
        {"chat_template_kwargs": {"num_visual_tokens": [4]}, "processor_kwargs": {"num_visual_tokens": [4]}},
    ):
        status, body = post("/v1/chat/completions", chat(image(url, "high"), TEXT, **fields))
        assert status == 200 and body["chat_template_kwargs"] in ({"num_visual_tokens": 4}, {"num_visual_tokens": [4]})
        assert "processor_kwargs" not in body
    several = {"chat_template_kwargs": {"num_visual_tokens": 4}, "processor_kwargs": {"num_visual_tokens": 9}}
    assert "several num_visual_tokens: 4 and 9" in refusal(post("/v1/chat/completions", chat(image(url), **several)))
    by_list = {"chat_template_kwargs": {"num_visual_tokens": [1, 144]}}
    assert budgets(post("/v1/chat/completions", chat(image(url), image(url), **by_list))) == [1, 144]
    assert budgets(post("/v1/chat/completions", chat(TEXT, chat_template_kwargs={"num_visual_tokens": 4}))) is None


@pytest.mark.parametrize(
    "budget", [7, 0, -1, True, False, "36", "", 36.0, 36.5, [], [36, 4], [[36]], [True], ["36"], 10**30, {"a": 1}]
)
def test_a_wrong_budget_is_refused_before_an_image_is_opened(serve, noise, budget):
    post, opened = serve(guard=None), data_url(noise(1)[0])
    for path, body in {
        "/v1/chat/completions": chat(image(opened), TEXT),
        "/v1/responses": {"input": [{"role": "user", "content": [image(opened)]}]},
    }.items():
        for place in ("chat_template_kwargs", "processor_kwargs"):
            assert "num_visual_tokens" in refusal(post(path, {**body, place: {"num_visual_tokens": budget}}))
    if budget not in ([], True, False) and not isinstance(budget, list):  # wrong without an image, too
        named = {"chat_template_kwargs": {"num_visual_tokens": budget}}
        assert "num_visual_tokens" in refusal(post("/v1/chat/completions", chat(TEXT, **named)))


def test_images_arrive_as_data_urls(serve, noise):
    photo = Image.fromarray(np.uint8(np.linspace(0, 255, 60 * 70 * 3).reshape(60, 70, 3)))
    post = serve()
    for given in (data_url(photo), data_url(photo, "JPEG"), data_url(photo).partition(",")[2]):
        _, body = post("/v1/chat/completions", chat(image(given), TEXT))
        sent = body["messages"][0]["content"][0]["image_url"]
        assert sent.startswith("data:image/")
        assert open_image(sent).tobytes() == open_image(given).tobytes()


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", "http://127.0.0.1/a.png", "http://[::1]/"])
def test_no_endpoint_hands_on_what_a_client_may_not_name(serve, source):
    post = serve()
    part = {"type": "input_image", "image_url": source}
    for path, body in [
        ("/v1/chat/completions", chat(image(source))),
        ("/v1/chat/completions", chat({"type": "image_url", "image_url": source})),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": [part]}, *chat(TEXT)["messages"]]}),
        ("/v1/responses", {"input": [part]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [part]}]}),
        (
            "/v1/responses",
            {
                "input": [
                    {"role": "user", "content": "a"},
                    {"type": "function_call_output", "call_id": "1", "output": [part]},
                ]
            },
        ),
    ]:
        message = refusal(post(path, body))
        assert "is not a public address" in message or "local files are not allowed" in message
    # transformers takes images from these, too, and other shapes of one
    for hidden in (
        {"images": [source]},
        {"processor_kwargs": {"images": [source]}},
        {"size": {"shortest_edge": 10**6}},
        {"images_kwargs": {"do_resize": False}},
        {"chat_template": "{{ 1 }}"},
        {"tokenize": False},
        {"messages": []},
        {"eos_token": "a" * 1000},
    ):
        answer = post("/v1/chat/completions", chat(TEXT, chat_template_kwargs=hidden))
        assert re.search("takes (only )?num_visual_tokens", refusal(answer))
    assert "takes only num_visual_tokens" in refusal(
        post("/v1/chat/completions", chat(TEXT, processor_kwargs={"images": [source]}))
    )
    assert "serves only here, not" in refusal(post("/load_model", {"model": source}))
    assert post("/load_model", {"model": "here"})[0] == 200
    for path in ("/v1/audio/transcriptions", "/reset", "/v1/embeddings", "/v1/systemone", "/v1//chat/completions"):
        assert post(path, {"url": source})[0] == 404


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "The request is not JSON"),
        (b"[" * 100_000, "The request is not JSON"),
        (b'{"messages": NaN}', "NaN is not a finite number"),
        (b'{"temperature": 1e999}', "1e999 is not a finite number"),
        (b"\xff\xfe", "The request is not JSON"),
        (b"1" * 5000, "The request is not JSON"),
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [5]}, r"messages\[0\] must be a message with a role"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\] must be a message with a role"),
        ({"messages": [{"role": "user", "content": 5}]}, "must be a text or a list of parts"),
        (chat(5), r"messages\[0\]\.content\[0\] is 5: its type"),
        (chat({"type": "text", "text": 5}), "a text part needs a text"),
        (chat({"type": "image_url"}), "an image part needs an image_url"),
        (chat({"type": "video_url", "video_url": {"url": "a"}}), "its type must be one of"),
        (chat({"type": ["text"]}), "its type must be one of"),
        (chat(image("data:image/png;base64,eHh4")), r"content\[0\]: Cannot read image data:.*: it is no image"),
        (chat(image("data:image/png;base64,?")), "base64 is broken"),
        (chat(image("\ud800")), "Cannot read image"),
        (chat({"type": "text", "text": "\ud800"}), "surrogates"),
        (chat(TEXT, chat_template_kwargs=5), "chat_template_kwargs must be an object"),
        (chat(TEXT, processor_kwargs=[1]), "processor_kwargs must be an object"),
        (chat(TEXT, chat_template_kwargs={"style": "a " * 4000}), r"has about \d+ tokens"),
        (chat(TEXT, max_tokens=0), r"max_tokens=0 must be an integer of 1\.\.2048"),
        (chat(TEXT, max_completion_tokens=True), "max_completion_tokens=True"),
        (chat(TEXT, seed=1.5), "seed"),
        (chat(TEXT, temperature=1e-300), r"temperature=1e-300 must be 0 or a number of 0\.01\.\.2"),
        (chat(TEXT, frequency_penalty=-1), r"frequency_penalty=-1 must be a number of -0\.9\.\.2"),
        (chat(TEXT, stream="x"), "stream='x' must be true or false"),
        (chat(TEXT, max_tokens=2045), r"has about \d+ tokens, .* asks for 2045 more, .* context holds 2048 tokens"),
        (chat(TEXT, model="another"), "serves only here, not 'another'"),
        (
            chat(TEXT, num_visual_tokens=36),
            "Unexpected fields .'num_visual_tokens'.: budgets belong in chat_template_kw",
        ),
        (chat(image("data:image/png;base64,eHh4"), top_k=5), "Unexpected fields .'top_k'."),
        (chat(TEXT, logit_bias=5), "logit_bias must be an object of up to 300 tokens"),
        (chat(TEXT, logit_bias={str(token): 1 for token in range(301)}), "logit_bias must be .* 300 tokens"),
        (chat(TEXT, logit_bias={"1" * 5000: 1}), "logit_bias names tokens by their numbers"),
        (chat(TEXT, logit_bias={"999999": 1}), "A token of logit_bias=999999 must be an integer of 0.."),
        (chat(TEXT, logit_bias={"5": "a"}), "logit_bias of token 5='a' must be a number of -100..100"),
        (chat(TEXT, tools=5), "tools must be a list of functions, but are 5"),
        (chat(TEXT, tools=[{"type": "function", "function": {"name": 5}}]), r"tools\[0\] must be a function"),
        (chat(TEXT, tools=[{"type": "function", "function": {"name": "f", "parameters": 5}}]), r"tools\[0\] must be"),
        (chat(TEXT, tool_choice=5), "tool_choice=5 must be a text or an object"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, r"messages\[0\]\.tool_calls must be a list, but is 5"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "with arguments that are"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            r"tool_calls\[0\]: arguments is not JSON",
        ),
        (chat(TEXT, stop=[""]), "stop"),
        (chat(TEXT, stop=["a"] * 5), "stop"),
        (chat(TEXT, generation_config='{"num_beams": 100000}'), "num_beams=100000"),
        (chat(TEXT, stop="a" * 101), "stop"),
        (
            chat(TEXT, generation_config='{"output_attentions": true}'),
            r"generation_config takes .*max_new_tokens.*, not \['output_attentions'\]",
        ),
        (chat(TEXT, max_tokens=10**9, generation_config='{"max_new_tokens": 1}'), "max_tokens=1000000000"),
        (chat(TEXT, generation_config='{"do_sample": 1}'), "do_sample=1 must be true or false"),
        (chat(TEXT, generation_config='{"repetition_penalty": 0}'), "repetition_penalty=0"),
        (chat(TEXT, generation_config='{"eos_token_id": [1, "x"]}'), "eos_token_id='x' must be an integer of 0.."),
        (chat(TEXT, generation_config='{"eos_token_id": []}'), r"eos_token_id=\[\] must be"),
        (chat(TEXT, generation_config='{"num_beams": 2}', stream=True), "num_beams=2 gives no stream"),
        (chat(TEXT, generation_config={"num_beams": 2}), "generation_config must be a text of JSON"),
        (chat(TEXT, generation_config="5"), "generation_config must be a JSON object, but is 5"),
        (chat(TEXT, generation_config="{"), "generation_config is not JSON"),
        (chat({"type": "text", "text": "a " * 4000}), r"has about \d+ tokens, 0 of them .* context holds 2048 tokens"),
        ({"messages": [{"role": "user", "content": ""}] * 1000}, r"has about \d+ tokens"),
        ({"messages": [{"role": "user", "content": ""}] * 10**4}, "has more parts than the 2048 tokens"),
        (chat(*[{"type": "text", "text": ""}] * 10**4), "has more parts than the 2048 tokens"),
        (chat({"type": "text", "text": "a" * 10**6}), r"a text of 10000\d\d bytes"),
    ],
)
def test_a_request_of_another_shape_is_refused_in_a_sentence(serve, body, reason):
    assert re.search(reason, refusal(serve()("/v1/chat/completions", body)))


def test_images_of_a_request_have_limits_together(serve):
    many = data_url(Image.new("L", (8, 8)))
    answer = serve()("/v1/chat/completions", chat(*[image(many, "high")] * 100))
    assert "14400 of them for 100 images" in refusal(answer)
    assert budgets(serve()("/v1/chat/completions", chat(*[image(many, "low")] * 100))) == [16] * 100
    large = data_url(Image.new("L", (6000, 6000)))
    assert "at most 33554432 bytes, 50000000 pixels and 20 s together" in refusal(
        serve()("/v1/chat/completions", chat(image(large), image(large)))
    )
    num_bytes = len(base64.b64decode(large.partition(",")[2]))
    of_bytes = serve(guard=ImageGuard(max_bytes=2 * num_bytes - 1, max_pixels=10**9))
    assert of_bytes("/v1/chat/completions", chat(image(large)))[0] == 200
    assert re.search(
        rf"content\[1\]: .* more than {num_bytes - 1} bytes \(the images of a request .* {2 * num_bytes - 1} bytes",
        refusal(of_bytes("/v1/chat/completions", chat(image(large), image(large)))),
    )

    class Slow(ImageGuard):
        def check(self, source):
            asked.append(self.timeout)
            time.sleep(0.05)
            return super().check(source)

    asked = []
    serve(guard=Slow(timeout=1.0))("/v1/chat/completions", chat(*[image(many)] * 3))
    assert asked[0] == 1 and asked[1] <= 0.95 and asked[2] <= 0.9
    bomb = data_url(Image.new("L", (8000, 8000)))
    assert "it has 8000 x 8000 pixels" in refusal(serve()("/v1/chat/completions", chat(image(bomb))))
    status, body = serve()("/v1/chat/completions", b" " * (MAX_BODY_BYTES + 1))
    assert status == 413 and "more than 67108864" in body["error"]["message"]


def test_a_body_of_countless_objects_is_refused_before_it_is_parsed(serve, monkeypatch):
    post = serve()
    text = "one, two, {three} [four] " * 1000  # as a long text may be
    assert "about" in refusal(post("/v1/chat/completions", chat({"type": "text", "text": text})))
    bodies = [b'{"messages": [' + piece * 10**6 + b"{}]}" for piece in (b"{},", b"0,", b"[],", b'"a",')]
    monkeypatch.setattr(middleware.json, "loads", lambda *args, **kwargs: 1 / 0)
    for body in bodies:
        with pytest.raises(
            ValueError, match=r"The request has .* brackets, braces and commas, more than 100000"
        ) as error:
            middleware._parse(body, "The request")
        assert error.value.status == 413
    with pytest.raises(ValueError, match="generation_config has 100001 brackets"):
        middleware._parse("[" * 100_001, "generation_config")


def test_an_address_that_answers_slowly_blocks_nobody(serve, noise):
    answered = threading.Event()

    class Slow(ImageGuard):
        def check(self, source):
            if source.startswith("http"):
                raise ValueError("at last" if answered.wait(60) else "blocked")
            return super().check(source)

    post = serve(guard=Slow())

    async def both():
        request = chat(image("https://slow.test/a.png"))
        waiting = [asyncio.create_task(post.send("POST", "/v1/chat/completions", request)) for _ in range(20)]
        await asyncio.sleep(0.05)
        answer = await post.send("POST", "/v1/chat/completions", chat(image(data_url(noise(1)[0]))))
        answered.set()
        return answer[0], [await slow for slow in waiting]

    status, slow_ones = asyncio.run(both())
    assert status == 200
    assert all("at last" in refusal(answer) for answer in slow_ones)


def test_an_app_that_takes_its_time_blocks_nobody(serve):
    answered = threading.Event()

    async def busy(scope, receive, send):
        is_slow = b"slow" in (await receive())["body"]
        await JSONResponse({"waited": is_slow and answered.wait(60)})(scope, receive, send)

    post = serve(app=busy)

    async def both():
        slow = asyncio.create_task(post.send("POST", "/v1/chat/completions", chat({"type": "text", "text": "slow"})))
        await asyncio.sleep(0.05)
        answer = await post.send("POST", "/v1/chat/completions", chat(TEXT))
        answered.set()
        return answer, await slow

    assert asyncio.run(both()) == ((200, {"waited": False}), (200, {"waited": True}))


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("the template knows no role tool"), 400, "the template knows no role tool"),
        (KeyError("role"), 400, "The request is not what transformers expects: KeyError: 'role'"),
        (RuntimeError("at 0x7f: secret"), 500, "The server failed to answer: RuntimeError"),
    ],
)
def test_what_transformers_raises_is_an_answer(serve, error, status, message):
    async def fails(scope, receive, send):
        raise error

    found = serve(app=fails)("/v1/chat/completions", chat(TEXT))
    assert found[0] == status and found[1]["error"]["message"] == message


def test_other_messages_and_fields_arrive_as_they_are(serve):
    post = serve()
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [TEXT]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "4"},
            {"role": "assistant", "content": "four", "tool_calls": None, "refusal": None},
            {"role": "user", "content": ""},
        ],
        "chat_template_kwargs": {"enable_thinking": True},
        "stream": True,
        "temperature": 0.5,
    }
    status, found = post("/v1/chat/completions", body)
    assert status == 200 and found["messages"][1:4] == body["messages"][1:4]
    assert found["messages"][4] == {"role": "assistant", "content": "four"}
    assert {name: found[name] for name in ("chat_template_kwargs", "stream", "temperature")} == {
        name: body[name] for name in ("chat_template_kwargs", "stream", "temperature")
    }
    generation = json.dumps({"do_sample": True, "top_k": 5, "min_p": 0.1, "eos_token_id": [1, 2]})
    for given, expected in (
        ({"generation_config": generation, "max_tokens": 5}, {"generation_config": generation, "max_tokens": 5}),
        (
            {"generation_config": '{"temperature": 2, "num_beams": null}'},
            {"generation_config": '{"temperature": 2.0}'},
        ),
        (
            {"generation_config": '{"temperature": 0, "do_sample": true}'},
            {"generation_config": '{"temperature": 1.0, "do_sample": false}'},
        ),
        ({"logit_bias": {"5": -100, "6": 0.5}}, {"logit_bias": {"5": -100.0, "6": 0.5}}),
        ({"logit_bias": {}, "stop": [], "temperature": 0, "seed": -1}, {"temperature": 0, "seed": -1}),
        ({"stop": "a", "frequency_penalty": -0.9}, {"stop": ["a"], "frequency_penalty": -0.9}),
        ({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"},) * 2,
    ):
        _, found = post("/v1/chat/completions", chat(TEXT, **given))
        assert found == chat(TEXT, **expected, chat_template_kwargs={})
    _, found = post("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a", "tool_calls": []}]})
    assert found["messages"] == [{"role": "assistant", "content": "a"}]
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "a"},
        {"type": "reasoning", "content": [{"text": "so"}]},
        call,
        {"type": "function_call_output", "call_id": "1", "output": "4"},
    ]
    assert post("/v1/responses", {"input": items, "tools": [{"type": "function", "name": "f"}]})[1]["input"] == items
    for wrong in (
        {"type": "reasoning", "content": "so"},
        {"type": "reasoning", "content": [{}]},
        {**call, "call_id": 5},
        {**call, "name": None},
        {**call, "arguments": "["},
        {"type": "function_call_output", "output": "4"},
        {"type": "item_reference", "id": "1"},
    ):
        assert refusal(post("/v1/responses", {"input": [items[0], wrong]})).startswith("input[1]")
    assert post("/v1/completions", {"prompt": "a", "max_tokens": 3})[1] == {"prompt": "a", "max_tokens": 3}
    for given in (
        {},
        {"prompt": ""},
        {"prompt": ["a"]},
        {"prompt": "a", "suffix": 5},
        {"prompt": "a", "suffix": False},
    ):
        assert "prompt must be a text" in refusal(post("/v1/completions", given))
    assert "use a chat" in refusal(post("/v1/completions", {"prompt": "<image>"}))
    for given in ([], 5, None, [5], [{"role": "user", "content": "a"}, {"role": 5}]):
        assert "input" in refusal(post("/v1/responses", {"input": given}))
    status, found = post("/v1/models", None, method="GET")
    assert status == 200 and [model["id"] for model in found["data"]] == ["here"]
