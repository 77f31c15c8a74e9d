"""Tiny backbones of the real architectures, made in place, and what is built from them."""

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import evaluate
import pytest
import torch
import transformers.dynamic_module_utils
import transformers.utils.hub
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast, SiglipVisionConfig

import delta_llava
from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor


# pytest imports the root's __init__.py by the clone's name, and a second copy of the package would register its own
# classes with transformers
sys.modules.setdefault(Path(delta_llava.__file__).parent.name, delta_llava)


def pytest_collection_modifyitems(items):
    """Training's long files come first: at the end short ones keep all cores busy."""
    items.sort(key=lambda item: "train" not in item.path.parts)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and lose much where others compute too."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session", autouse=True)
def library_caches(tmp_path_factory):
    """Caches of the tests' own, in subprocesses too: what the machine's own hold decides no test.

    transformers and evaluate put their folder of code on `sys.path`, where the first of two `evaluate_modules` wins.
    """
    data, modules = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(data))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", data)
        patch.setenv("HF_MODULES_CACHE", str(modules))
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", modules)
        for module in (transformers.utils.hub, transformers.dynamic_module_utils):
            patch.setattr(module, "HF_MODULES_CACHE", str(modules))
        yield


@pytest.fixture(scope="session")
def fixtures():
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def templates():
    return Path(__file__).parents[1] / "templates"


@pytest.fixture(scope="session")
def backbones():
    return Path(__file__).parents[1] / "backbones"


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer that can spell anything, new at every call."""

    def make(image_token="<image>", pad_token="<pad>"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=special
        )
        tokenizer.train_from_iterator(["USER: What is it? ASSISTANT: a red circle"] * 3, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad_token
        )
        if image_token:
            tokenizer.add_tokens(image_token, special_tokens=True)
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_config(tiny_tokenizer):
    """A 12x12 grid of patches (budgets 1, 4, 9, 16, 36, 144) and a two-layer Llama; a test overrides what it wants."""

    def make(siglip=False, drops=True, **overrides):
        size = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 4,
        }
        text_config = LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        defaults = {
            "vision_config": SiglipVisionConfig(**size, vision_use_head=False) if siglip else CLIPVisionConfig(**size),
            "text_config": text_config,
            "image_token_id": tiny_tokenizer().convert_tokens_to_ids("<image>"),
            "num_visual_tokens": 36,
            "visual_token_budgets": [1, 4, 9, 16, 36, 144],
            "vision_feature_select_strategy": "full" if siglip else "default",
        }
        if not drops:  # drop path is random
            defaults |= {f"{branch}_drop_path": 0.0 for branch in ("attention", "convolution", "mlp")}
        return DeltaLlavaConfig(**{**defaults, **overrides})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """An untrained model whose image features are large enough to sway what it says."""

    def make(**overrides):
        torch.manual_seed(0)
        model = DeltaLlavaForConditionalGeneration(tiny_config(**overrides)).eval()
        with torch.no_grad():
            projector = model.model.multi_modal_projector
            projector.mlp[-1].weight.mul_(50)
            if projector.variant == "residual":
                projector.text_projection.weight.normal_(std=0.1)  # from zero, which would hide the attention
            model.lm_head.weight.mul_(10)
        return model

    return make


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer, templates):
    def make(**overrides):
        return DeltaLlavaProcessor(
            image_processor=CLIPImageProcessor(
                size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, do_convert_rgb=True
            ),
            tokenizer=tiny_tokenizer(),
            chat_template=(templates / "vicuna-v1.jinja").read_text(),
            **{"num_visual_tokens": 36, "patch_grid_size": 12, **overrides},
        )

    return make


@pytest.fixture
def checkpoint(tiny_model, tiny_processor, tmp_path):
    """Folder of a tiny checkpoint, of 36 visual tokens by default."""
    folder = tmp_path / "checkpoint"
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def in_fresh_process(tmp_path):
    """`in_fresh_process(code, **variables)`: runs code where there is no Hub and no `delta_llava`; its last line."""

    def run(code, **variables):
        environment = {"HF_HOME": str(tmp_path / "empty_cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        completed = subprocess.run(
            [sys.executable, "-c", "import sys; sys.modules['delta_llava'] = None\n" + code],
            env=environment | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert completed.returncode == 0, completed.stderr[-3000:]
        return completed.stdout.strip().rpartition("\n")[2]

    return run


@pytest.fixture(scope="session")
def noise():
    """`noise(n)`: n different RGB images."""

    def make(count, size=(60, 70)):
        generator = torch.Generator().manual_seed(count)
        pixels = torch.randint(0, 256, (count, *size, 3), dtype=torch.uint8, generator=generator)
        return [Image.fromarray(image.numpy()) for image in pixels]

    return make


@pytest.fixture
def http_server():
    """`http_server(handler)`: starts a server on loopback with this request handler, and returns it."""
    servers = []

    def serve(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.handle_error = lambda *args: None  # clients that go away
        # The default interval makes each shutdown wait for half a second
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def httpserver_url(http_server):
    """`httpserver_url(folder)`: serves the folder on loopback and returns its URL."""

    def serve(folder):
        return f"http://127.0.0.1:{http_server(partial(SimpleHTTPRequestHandler, directory=folder)).server_port}"

    return serve
