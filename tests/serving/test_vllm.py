"""vLLM serves our checkpoints, each image at its own budget. `make test-vllm` has the environment for it."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest


pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

import openai
import torch
from clients import data_url, greedy_tokens, running
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins


pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND, REQUEST = re.findall(r"```\n(.*?)```", README.split("### vLLM")[1].split("\n#")[0], flags=re.DOTALL)
BUDGETS = [1, 4, 9, 16, 36, 144]
WRONG = [7, 0, -1, 25, 10**40, -(2**63), True, "36", "", 36.0, {}, {"a": 1}, [], [36, 36, 36], [7, 36], [[36], [36]]]
WRONG += [[None, 36], [True, 36], ["36", 36], [36.0, 36]]
QUESTION = "What is it?"


class Server:
    """One that runs, and what transformers answers to the same questions."""

    def __init__(self, checkpoint, address):
        self.checkpoint, self.address = checkpoint, address
        # It asks again where vLLM, after an error 500, has closed the connection
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint)
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    def request(self, images, question=QUESTION, max_tokens=8, model=None, **extra):
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        return {
            "model": model or str(self.checkpoint),
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "extra_body": {"return_token_ids": True, **extra},
        }

    def ask(self, images, budget=None, **request):
        """Token ids of the answer."""
        named = {} if budget is None else {"mm_processor_kwargs": {"num_visual_tokens": budget}}
        return self.client.chat.completions.create(**self.request(images, **request, **named)).choices[0].token_ids

    def refuses(self, images, named, status=400):
        """The message of the error."""
        with pytest.raises(openai.APIStatusError) as refusal:
            self.client.chat.completions.create(**self.request(images, mm_processor_kwargs=named))
        assert refusal.value.status_code == status, refusal.value
        return str(refusal.value)

    def expected(self, images, budget=None, question=QUESTION, max_tokens=8, model=None):
        return greedy_tokens(model or self.model, self.processor, images, question, budget, max_tokens)


def surroundings(folder):
    """What keeps vLLM small, offline, and away from what lies elsewhere on the machine."""
    caches = {"VLLM_CACHE_ROOT": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # README says `python`
    return {**os.environ, **caches, **small, **offline, "PATH": path}


@contextmanager
def serve(command, checkpoint, folder, **environment):
    """A [`Server`] that `command` starts, until the block ends."""
    environment = {**surroundings(folder), **environment}
    with running([*command, "--dtype", "float32"], ROOT, folder / "log", **environment) as process:
        yield Server(checkpoint, process.url)


def command(checkpoint, *options):
    engine = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    return [*engine, "--trust-request-mm-kwargs", "--enforce-eager", *options]


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_processor, tmp_path_factory):
    """A tiny one, to whose answers every visual token, and its place, matters."""
    folder, model = tmp_path_factory.mktemp("checkpoint"), tiny_model()
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """LoRA on the language model, as training saves it, and not as it starts: it changes answers."""
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    targets = r".*language_model\..*\.(q_proj|v_proj|down_proj)"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def plugin(checkpoint, adapter, tmp_path_factory):
    lora = ["--enable-lora", "--lora-modules", f"adapter={adapter[0]}"]
    with serve(command(checkpoint, *lora), checkpoint, tmp_path_factory.mktemp("plugin")) as server:
        yield server


@pytest.fixture(scope="module")
def remote_code(checkpoint, tmp_path_factory):
    """A server that does not have this package: no plug-in is loaded."""
    options = ["--trust-remote-code", "--model-impl", "transformers"]
    folder = tmp_path_factory.mktemp("remote_code")
    with serve(command(checkpoint, *options), checkpoint, folder, VLLM_PLUGINS="none") as server:
        yield server


@pytest.fixture(scope="module", params=["plugin", "remote_code"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """README's command on the checkpoint of the demo."""
    checkpoint = ROOT / "demo/out/checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        pytest.fail("There is no demo/out/checkpoint: run `make demo` first.")
    (line,) = [line for line in COMMAND.splitlines() if "--model" in line]
    words = line.split()
    settings = dict(word.split("=") for word in words if "=" in word)
    engine = [word for word in words if "=" not in word]
    with serve(engine, "demo/out/checkpoint", tmp_path_factory.mktemp("demo"), **settings) as server:
        yield server


def test_the_demo_s_answers_are_those_of_transformers_token_for_token(demo):
    scenes = ROOT / "demo/out/scenes"
    rows = json.loads((scenes / "held_out.json").read_text(encoding="utf-8"))[::37][:20]
    budgets, right = (1, 16, 36, 144), 0
    assert len(rows) == 20
    for row, budget in product(rows, budgets):
        image = Image.open(scenes / "images" / row["image"])
        answer = demo.ask([image], budget, question=row["question"])
        assert answer == demo.expected([image], budget, question=row["question"]), (row, budget)
        right += demo.processor.decode(answer, skip_special_tokens=True).strip() == row["answer"]
    assert right > 40  # of 80: it has learnt to see


def test_readme_s_request_is_answered(demo):
    request = REQUEST.replace("http://127.0.0.1:8000", demo.address)
    output = subprocess.run(["bash", "-c", request], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    body = json.loads(output)
    image = Image.open(ROOT / re.search(r"base64 -w0 (\S+?)\)", REQUEST)[1])
    question = re.search(r'"text": "(.*?)"', REQUEST)[1]
    tokens = demo.expected([image], 36, question=question, max_tokens=20)
    assert body["choices"][0]["message"]["content"] == demo.processor.decode(tokens, skip_special_tokens=True)


def test_what_a_client_may_name_is_what_readme_s_command_says(demo, httpserver_url, noise, tmp_path):
    noise(1)[0].save(tmp_path / "image.png")
    for address, status in (
        (f"{httpserver_url(tmp_path)}/image.png", 400),  # not one of the allowed domains
        (str(tmp_path / "image.png"), 400),
        ((tmp_path / "image.png").as_uri(), 500),
    ):
        request = demo.request([])
        request["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": address}})
        with pytest.raises(openai.APIStatusError) as refusal:
            demo.client.chat.completions.create(**request)
        assert refusal.value.status_code == status, address
    assert demo.ask(noise(1)) == demo.expected(noise(1))


def test_answers_are_those_of_transformers_at_every_budget(server, noise):
    images = noise(2)
    for budget in (None, *BUDGETS):
        assert server.ask(images[:1], budget) == server.expected(images[:1], budget), budget
        assert server.ask(images, budget) == server.expected(images, budget), budget
    assert len({str(server.ask(images, budget)) for budget in BUDGETS}) == 6  # else the budget would not matter
    assert server.ask([]) == server.expected([])


def test_the_default_is_the_checkpoint_s(server, noise):
    for named in ({}, {"mm_processor_kwargs": None}, {"mm_processor_kwargs": {"num_visual_tokens": None}}):
        response = server.client.chat.completions.create(**server.request(noise(1), **named))
        assert response.choices[0].token_ids == server.expected(noise(1), 36)


def test_streams(server, noise):
    request = server.request(noise(2), mm_processor_kwargs={"num_visual_tokens": 16})
    whole = server.client.chat.completions.create(**request).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or "" for chunk in server.client.chat.completions.create(**request, stream=True)
    ]
    assert len(parts) > 4 and "".join(parts) == whole


def test_48_mixed_requests_at_once(server, noise):
    images = noise(6)
    jobs = [(images[i % 6 : i % 6 + i % 3], (None, *BUDGETS)[i % 7]) for i in range(48)]
    expected = [server.expected(*job) for job in jobs]
    with ThreadPoolExecutor(48) as pool:
        wrong = pool.submit(server.refuses, images[:1], {"num_visual_tokens": 7})
        assert list(pool.map(lambda job: server.ask(*job), jobs)) == expected
        wrong.result()


def test_lists_give_each_image_its_own_budget_cached_repeated_and_swapped(plugin, noise):
    first, second, third = noise(3)
    for images, budgets in (
        ([first, second], [36, 4]),
        ([second, first], [36, 4]),  # both are cached, at other budgets
        ([second, first], [4, 36]),  # both are cached
        ([first, second], [36, 144]),  # one is
        ([third, second, first], [9, 144, 1]),
        ([first, first], [36, 4]),
        ([first, first], [4, 36]),
        ([third, third, third], [16, 1, 16]),
        ([first], [144]),
        ([first, second], [16, 16]),
    ):
        assert plugin.ask(images, budgets) == plugin.expected(images, budgets), budgets
    assert plugin.expected([first, first], [36, 4]) != plugin.expected([first, first], [4, 36])


def test_auto_is_the_budget_of_the_image_s_size(server, noise):
    for size in ((4, 8), (12, 9), (60, 70)):
        assert server.ask(noise(1, size), "auto") == server.expected(noise(1, size), "auto"), size


def test_an_image_that_a_client_names_by_its_id_is_cached_at_each_budget(plugin, noise):
    (image,) = noise(1)
    for budget in (36, 4, 36):
        request = plugin.request([image], mm_processor_kwargs={"num_visual_tokens": budget})
        request["messages"][0]["content"][0]["uuid"] = "the image"
        for _ in range(2):
            answer = plugin.client.chat.completions.create(**request).choices[0].token_ids
            assert answer == plugin.expected([image], budget)
            request["messages"][0]["content"][0]["image_url"] = None  # cached, it need not be sent again
    request["extra_body"]["mm_processor_kwargs"] = {"num_visual_tokens": "auto"}
    with pytest.raises(openai.BadRequestError, match="'auto' needs the size of an image"):
        plugin.client.chat.completions.create(**request)


def test_by_remote_code_a_list_is_refused(remote_code, noise):
    for budgets in ([36, 4], [36, 36], [36]):
        assert "num_visual_tokens" in remote_code.refuses(noise(2)[: len(budgets)], {"num_visual_tokens": budgets})


def test_a_wrong_budget_is_a_400_that_says_so(server, noise):
    for budget in WRONG:
        assert "num_visual_tokens" in server.refuses(noise(2), {"num_visual_tokens": budget})
    server.refuses(noise(1), {"num_visual_token": 36})
    server.refuses(noise(1), [36])
    assert server.ask(noise(1), 36) == server.expected(noise(1), 36)


def test_the_plug_in_says_what_is_wrong_with_a_budget(plugin, noise):
    assert "must be one of [1, 4, 9, 16, 36, 144]" in plugin.refuses(noise(1), {"num_visual_tokens": 7})
    assert "must be an integer" in plugin.refuses(noise(1), {"num_visual_tokens": "36"})
    assert "names 1 budgets, but there are 2 images" in plugin.refuses(noise(2), {"num_visual_tokens": [36]})
    for name in ("num_visual_token", "crop_size", "images_kwargs"):  # pixels of another size would end the engine
        assert f"num_visual_tokens, not {name}" in plugin.refuses(noise(1), {name: {"height": 24, "width": 24}})


def test_an_image_that_the_processor_refuses_is_a_400_that_says_why(plugin):
    assert "Cannot read image" in plugin.refuses([Image.new("RGB", (1, 5000))], None)


def test_placeholders_in_a_client_s_text_harm_nobody(server, noise):
    for images in ([], noise(1)):
        server.ask(images, 4, question="<image> or <image>?")
    assert server.ask(noise(1), 4) == server.expected(noise(1), 4)


def test_lora_on_the_language_model(plugin, adapter, noise):
    for budget in (1, 36, 144):
        adapted = plugin.ask(noise(2), budget, model="adapter")
        assert adapted == plugin.expected(noise(2), budget, model=adapter[1]) != plugin.expected(noise(2), budget)


def test_quantization_leaves_tower_and_projector_alone(checkpoint, tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "quantized.py"), str(checkpoint), "fp8_per_channel"]
    environment = {**surroundings(tmp_path), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    layers = re.findall(r"layer model\.(\w+)\S* (\w+)", output)
    assert {part for part, method in layers if method == "UnquantizedLinearMethod"} == {
        "vision_tower",
        "multi_modal_projector",
    }
    assert {part for part, method in layers if "Fp8" in method} == {"language_model"}


@pytest.fixture
def planner(checkpoint):
    """`planner(...)`: what plans prompts in vLLM's processes, for a server with these settings."""
    load_general_plugins()

    def make(**settings):
        config = ModelConfig(model=str(checkpoint), dtype="float32", **settings)
        return MULTIMODAL_REGISTRY.create_processor(config)

    return make


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({}, 144),
        ({"mm_processor_kwargs": {"num_visual_tokens": 4}}, 144),  # a default, which a request may override
        ({"max_model_len": 100}, 36),
        ({"max_model_len": 144}, 36),  # there is a question, too
    ],
)
def test_the_engine_plans_for_the_largest_budget_that_fits(planner, settings, largest):
    processor = planner(**settings)
    assert processor.info.get_mm_max_tokens_per_item(100, {"image": 1}) == {"image": largest}
    (place,) = processor.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"]
    assert place.length == largest


@pytest.mark.parametrize("budget", [7, "36", [36, 4]])
def test_a_server_s_own_wrong_budget_is_refused_at_its_start(planner, budget):
    with pytest.raises(ValueError, match="num_visual_tokens"):
        planner(mm_processor_kwargs={"num_visual_tokens": budget}).get_dummy_mm_inputs({"image": 1})
