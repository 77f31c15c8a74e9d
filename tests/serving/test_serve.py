"""`python -m delta_llava.serve`, started as README says and asked by OpenAI's client."""

import inspect
import json
import os
import re
import runpy
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from clients import data_url, free_port, greedy_tokens, running
from huggingface_hub.utils import httpx
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.cli.serve import Serve
from transformers.models.auto import modeling_auto
from transformers.utils import import_utils
from typer.testing import CliRunner

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, serve
from delta_llava.modeling_delta_llava import DeltaLlavaModel


ROOT = Path(__file__).parents[2]
SECTION = re.search(
    r"### transformers' server\n(.*?)\n### ", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)[1]
QUESTION = "What is it?"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_processor, noise, tmp_path_factory):
    """A folder as README's commands expect it, with a tiny checkpoint that says other things of other images."""
    folder = tmp_path_factory.mktemp("serve")
    model, processor = tiny_model(), tiny_processor()
    with torch.no_grad():
        for token in range(320):  # of half a character a stream says nothing
            text = processor.tokenizer.decode(token)
            if not (text and text.isascii() and text.isprintable()):
                model.lm_head.weight[token] = 0
    model.save_pretrained(folder / "demo/out/checkpoint")
    processor.save_pretrained(folder / "demo/out/checkpoint")
    (folder / "demo/out/scenes/images").mkdir(parents=True)
    noise(1)[0].save(folder / "demo/out/scenes/images/held_out-00000.png")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """The process that README's command starts, on a port of its own."""
    command = re.search(r"^python (-m delta_llava\.serve .*)$", SECTION, re.MULTILINE)[1].split()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    with running([sys.executable, *command], folder, folder / "log", **environment) as process:
        yield process


@pytest.fixture
def client(server):
    """OpenAI's client. After whatever a test has done, the server still answers."""
    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    yield client
    assert server.poll() is None and ask(client, [], max_tokens=1)


@pytest.fixture(scope="module")
def expected(folder):
    """`expected(images, budgets)`: transformers' own greedy answer, computed once."""
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder / "demo/out/checkpoint")
    processor, answers = AutoProcessor.from_pretrained(folder / "demo/out/checkpoint"), {}

    def answer(images, budgets):
        key = tuple(image.tobytes() for image in images), tuple(budgets)
        if key not in answers:
            tokens = greedy_tokens(model, processor, images, QUESTION, budgets, NEW_TOKENS)
            answers[key] = processor.decode(tokens, skip_special_tokens=True)
        return answers[key]

    return answer


def ask(client, images, details=None, budget=None, **options):
    content = [
        {"type": "image_url", "image_url": {"url": image if isinstance(image, str) else data_url(image)}}
        for image in images
    ]
    for part, detail in zip(content, details or [], strict=False):
        part["image_url"]["detail"] = detail
    extra = {} if budget is None else {"chat_template_kwargs": {"num_visual_tokens": budget}}
    answer = client.chat.completions.create(
        model="demo/out/checkpoint",
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}],
        **{"temperature": 0, "max_tokens": NEW_TOKENS, "extra_body": extra, **options},
    )
    if options.get("stream"):
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    return answer.choices[0].message.content


def test_readme_s_request_is_answered(server, folder, monkeypatch, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    exec(snippet.replace("http://127.0.0.1:8000", server.url), {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_answers_are_transformers_own(client, expected, noise):
    first, second, third = noise(3)
    answers = {budget: expected([first], [budget]) for budget in (1, 4, 36, 144)}
    assert len(set(answers.values())) > 1
    for budget, answer in answers.items():
        assert ask(client, [first], budget=budget) == answer
        assert ask(client, [first], budget=budget, stream=True) == answer
    for detail, budget in {"low": 16, "high": 144, "auto": 36}.items():
        assert ask(client, [second], [detail]) == expected([second], [budget])
    assert ask(client, [second]) == expected([second], [36])
    assert ask(client, [first, second, third], ["high", "auto", "low"]) == expected(
        [first, second, third], [144, 36, 16]
    )
    assert ask(client, [second, first], budget=[4, 144]) == expected([second, first], [4, 144])
    assert ask(client, []) == expected([], [])
    stop = answers[36][2]
    stopped = ask(client, [first], budget=36, stop=[stop])
    assert stop in stopped and answers[36].startswith(stopped) and len(stopped) < len(answers[36])


def test_sixteen_at_once_get_their_own_answers(client, expected, noise):
    images = noise(4)
    wanted = [(images[number % 4], (1, 16, 36, 144)[number // 4], number % 3 == 0) for number in range(16)]
    answers = [expected([image], [budget]) for image, budget, _ in wanted]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: ask(client, [one[0]], budget=one[1], stream=one[2]), wanted))
    assert found == answers


def test_responses_take_budgets_too(client, expected, noise):
    image = noise(1)[0]

    def respond(detail="auto", **options):
        content = [
            {"type": "input_image", "image_url": data_url(image), "detail": detail},
            {"type": "input_text", "text": QUESTION},
        ]
        return client.responses.create(
            model="demo/out/checkpoint",
            input=[{"role": "user", "content": content}],
            temperature=0,
            max_output_tokens=NEW_TOKENS,
            **options,
        )

    assert respond("high").output_text == expected([image], [144])
    assert respond(extra_body={"processor_kwargs": {"num_visual_tokens": 4}}).output_text == expected([image], [4])
    events = [event for event in respond("low", stream=True) if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in events) == expected([image], [16])
    with pytest.raises(openai.BadRequestError, match="num_visual_tokens=7"):
        respond(extra_body={"chat_template_kwargs": {"num_visual_tokens": 7}})


@pytest.mark.parametrize("budget", [7, "36", [36, 4], 10**30])
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_budget_is_a_bad_request_with_our_sentence(client, noise, budget, stream):
    with pytest.raises(openai.BadRequestError, match="num_visual_tokens"):
        ask(client, noise(1), budget=budget, stream=stream)


def test_what_a_client_may_not_name_is_a_bad_request(client, folder, server):
    picture = folder / "demo/out/scenes/images/held_out-00000.png"
    for source in (str(picture), "demo/out/scenes/images/held_out-00000.png", picture.as_uri()):
        with pytest.raises(openai.BadRequestError, match="local files are not allowed"):
            ask(client, [source])
    for source in (server.url, "http://localhost/", "https://[::1]/", "http://169.254.169.254/latest/meta-data"):
        with pytest.raises(openai.BadRequestError, match="is not a public address"):
            ask(client, [source])


def test_what_transformers_refuses_is_in_openai_s_form(client, noise):
    with pytest.raises(openai.BadRequestError, match="did you mean num_visual_tokens"):
        ask(client, noise(1), extra_body={"chat_template_kwargs": {"num_visual_token": 36}})
    with pytest.raises(openai.BadRequestError, match="<image>"):
        client.chat.completions.create(
            model="demo/out/checkpoint", messages=[{"role": "user", "content": "What is <image>?"}]
        )


def test_an_answer_ends_where_the_context_does(client):
    prompt = "a " * 1950
    answer = client.completions.create(model="demo/out/checkpoint", prompt=prompt, temperature=0)
    assert answer.choices[0].finish_reason == "length" and 1900 < answer.usage.prompt_tokens < 2048
    assert answer.usage.total_tokens == 2048
    with pytest.raises(openai.BadRequestError, match="asks for 500 more, but the model's context holds 2048 tokens"):
        client.completions.create(model="demo/out/checkpoint", prompt=prompt, max_tokens=500)


def test_what_a_generation_may_be_asked_is_answered(client, noise):
    generation = {"max_new_tokens": 4, "do_sample": True, "top_k": 5, "min_p": 0.1, "no_repeat_ngram_size": 2}
    for options in (
        {"extra_body": {"generation_config": json.dumps(generation)}, "seed": 1},
        {"extra_body": {"generation_config": json.dumps({"num_beams": 2, "do_sample": False, "eos_token_id": [2, 3]})}},
        {"logit_bias": {"5": -100}, "stop": [], "frequency_penalty": -0.9},
        {"temperature": 0.01, "top_p": 0.0, "extra_body": {"generation_config": '{"do_sample": true}'}},
    ):
        assert isinstance(ask(client, noise(1), **{"max_tokens": 4, **options}), str)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, noise(1), extra_body={"generation_config": '{"stop_strings": ["a"]}'})
    allowed = re.search("generation_config takes (.*) here, not .'stop_strings'", str(refused.value))[1].split(", ")
    assert "max_new_tokens" in allowed and all(f"`{name}`" in SECTION for name in allowed)


def test_every_option_of_transformers_serve_is_taken():
    theirs = {f"--{name.replace('_', '-')}" for name in inspect.signature(Serve).parameters}
    ours = set(re.findall(r"--[\w-]+", CliRunner().invoke(serve.app, ["--help"]).output))
    assert theirs - ours == {"--force-model", "--non-blocking"}  # CHECKPOINT, and one that they hide
    assert set(re.findall(r"`(--[\w-]+)", SECTION)) <= ours


@pytest.fixture
def started(folder, monkeypatch):
    """`started(**options)`: the URL of a server in this process, on which the model's encodings are counted."""
    servers = []
    for mapping in (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        monkeypatch.setitem(mapping, "delta_llava", "DeltaLlavaForConditionalGeneration")

    def start(**options):
        port = free_port()
        servers.append(serve.Server(str(folder / "demo/out/checkpoint"), non_blocking=True, port=port, **options))
        while not servers[-1].server.started:
            time.sleep(0.05)
        return f"http://localhost:{port}"

    yield start
    for server in servers:
        server.kill_server()
    AutoModelForMultimodalLM.register(DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, exist_ok=True)


def test_the_owner_s_options(started, folder, httpserver_url, expected, noise, monkeypatch):
    encoded = []
    run = DeltaLlavaModel._run_vision_tower
    monkeypatch.setattr(
        DeltaLlavaModel, "_run_vision_tower", lambda self, pixels, **kw: encoded.append(1) or run(self, pixels, **kw)
    )
    url = started(
        allow_local_images=True, chat_template_kwargs='{"num_visual_tokens": 4}', reasoning="off", enable_cors=True
    )
    picture = folder / "demo/out/scenes/images/held_out-00000.png"

    def post(source, origin="http://page.test"):
        content = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": QUESTION}]
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": NEW_TOKENS}
        headers = {"Origin": origin}
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)

    wanted = expected(noise(1), [4])
    encoded.clear()
    for source in (str(picture), picture.as_uri(), f"{httpserver_url(picture.parent)}/{picture.name}"):
        answer = post(source)
        assert answer.json()["choices"][0]["message"]["content"] == wanted, answer.text
    assert len(encoded) == 1
    refused = post(str(picture.with_name("missing.png")))
    assert refused.status_code == 400 and "no such file" in refused.json()["error"]["message"]
    assert refused.headers["access-control-allow-origin"] and refused.headers["x-request-id"]


def test_what_cannot_be_served_is_said_before_it_is(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"num_visual_tokens=7 .*one of \[1, 4, 9"):
        serve.Server(str(folder / "demo/out/checkpoint"), chat_template_kwargs='{"num_visual_tokens": 7}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is a llama, not a delta_llava"):
        serve.Server(str(tmp_path))
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    monkeypatch.delitem(sys.modules, "delta_llava.serve")
    with pytest.raises(ImportError, match=r'pip install "delta-llava\[serve\]"'):
        runpy.run_module("delta_llava.serve")
