"""What the README, the card template and the packaging say is true."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoConfig, CLIPVisionConfig, LlavaImageProcessor
from trl import ModelConfig, SFTConfig

from delta_llava import DeltaLlavaConfig, costs
from delta_llava.configuration_delta_llava import auto_visual_tokens
from delta_llava.train import memory
from delta_llava.train.recipe import ScriptArguments


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run(tiny_model, tiny_processor, noise, tmp_path, monkeypatch, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    snippets = [snippet for snippet in snippets if "OpenAI" not in snippet]  # tests/serving/test_serve.py runs that one
    assert len(snippets) == 5
    (tmp_path / "demo/out/scenes/images").mkdir(parents=True)
    for number, image in enumerate(noise(4)):
        image.save(tmp_path / f"demo/out/scenes/images/held_out-{number:05}.png")
    tiny_model().save_pretrained(tmp_path / "demo/out/checkpoint")
    tiny_processor().save_pretrained(tmp_path / "demo/out/checkpoint")
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, image_size=96, patch_size=4
    )
    converted = {"projector_variant": "residual", "num_visual_tokens": 576, "visual_token_budgets": [576]}
    tiny_model(vision_config=tower, **converted).save_pretrained(tmp_path / "checkpoints/llava-1.5-7b")
    size = {"size": {"height": 96, "width": 96}, "crop_size": {"height": 96, "width": 96}, "do_center_crop": False}
    processor = tiny_processor(num_visual_tokens=576, patch_grid_size=24)
    processor.image_processor = LlavaImageProcessor(do_pad=True, **size)
    processor.save_pretrained(tmp_path / "checkpoints/llava-1.5-7b")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "tower"),
    [
        ("CLIP-L/14, 336 pixels", "clip-vit-large-patch14-336"),
        ("CLIP-L/14, 224 pixels", "clip-vit-large-patch14"),
        ("SigLIP-so400m/14, 384 pixels", "siglip-so400m-patch14-384"),
    ],
)
def test_budget_table(row, tower, backbones):
    config = DeltaLlavaConfig(vision_config=AutoConfig.from_pretrained(backbones / tower))
    budgets, grid = ", ".join(map(str, config.valid_visual_token_counts)), config.patch_grid_size
    assert f"| {row} | {grid} x {grid} | {budgets} | {config.num_visual_tokens} |" in README


def test_auto_table():
    rows = re.search(r"\| longer side .*?\|(.*)\n.*\n\| visual tokens \|(.*)\n", README).groups()
    sides, budgets = ([cell.strip() for cell in row.strip(" |").split("|")] for row in rows)
    trained = [int(budget) for budget in budgets]
    assert trained == [1, 4, 9, 16, 36, 64, 144] and sides[-1] == "any"
    for side, (budget, next_budget) in zip(map(int, sides[:-1]), pairwise(trained), strict=True):
        assert auto_visual_tokens(side, 14, trained, 144) == budget
        assert auto_visual_tokens(side + 1, 14, trained, 144) == next_budget


def test_paths_that_documents_name_exist():
    for document in ("README.md", "CONTRIBUTING.md", "train/README.md", "benchmarks/README.md", "study/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        folders = "train|hub|tests|templates|backbones|benchmarks|demo|study|evaluation|space"
        named = re.findall(rf"[\s`(]((?:{folders})/[\w./-]*\w)", text)
        missing = [path for path in named if not path.startswith("demo/out") and "NAME" not in path]
        missing = [path for path in missing if not (ROOT / path).exists()]
        assert not missing, document


def test_options_that_documents_name_exist():
    known = {field.name for kind in (ScriptArguments, SFTConfig, ModelConfig) for field in fields(kind)} | {"config"}
    for script in [*ROOT.glob("*.py"), *(ROOT / "hub").glob("*.py"), *(ROOT / "evaluation").glob("*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', script.read_text(encoding="utf-8")))
    named = set()
    for document in ("README.md", "train/README.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        text = re.sub(r"\n## Serve\n.*?\n## ", "\n## ", text, flags=re.DOTALL)  # servers have options of their own
        commands = re.findall(
            r"delta_llava\.train\.(?:pretrain|finetune) (.*?)(?:\n\n|\n```|accelerate)", text, re.DOTALL
        )
        said = re.findall(r"`(--\w.*?)`", text, re.DOTALL)
        named |= set(re.findall(r"--(\w+)(?![\w-])", " ".join(commands + said)))  # with hyphens, they are others'
    assert len(named) > 10
    assert named - known <= {"machine_rank", "model", "host", "quantization"}  # accelerate's and vLLM's


def test_the_memory_table_is_what_its_command_prints(capsys):
    memory.main([])
    assert capsys.readouterr().out.strip() in (ROOT / "train/README.md").read_text(encoding="utf-8")


def test_the_costs_are_what_their_command_prints(capsys):
    costs.main(["--recipe", "vicuna-7b", "--max_tflops", "3"])
    assert capsys.readouterr().out.strip() in README


def test_what_a_budget_loses_is_what_the_study_found():
    results = (ROOT / "study/RESULTS.md").read_text(encoding="utf-8")
    _, table = results.split("## All questions")
    row = re.search(r"^\| Average pooling \+ MLP, Delta added \(ours\) \|(.*)", table, re.MULTILINE)[1]
    at_144, at_36, at_16, _, at_4, at_1 = re.findall(r"([\d.]+) ±", row)
    assert f"answers {at_144} % at 144 tokens, {at_36} at 36, {at_16} at 16, {at_4} at 4 and {at_1} at 1" in README


def test_an_installed_package_is_whole(tmp_path):
    """What `pip install` makes of the tracked files imports, and has every file that is no code."""
    source, site = tmp_path / "source", tmp_path / "site"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=ROOT, check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(pip, check=True)
    suffixes = {".json", ".jinja", ".yaml", ".safetensors", ".webp"}
    folders = "backbones", "templates", "hub", "train", "demo"
    data = [path for folder in folders for path in (source / folder).rglob("*") if path.suffix in suffixes]
    data += (source / "evaluation/metrics").rglob("*.py")  # which evaluate loads by their paths
    data += (path for path in (source / "space").rglob("*") if path.is_file())  # what push_space sends
    missing = [path for path in data if not (site / "delta_llava" / path.relative_to(source)).is_file()]
    assert data and not missing
    code = (
        "import delta_llava.demo.run, delta_llava.hub.push_family, delta_llava.serving.vllm_plugin;"
        "import delta_llava.train.finetune as it; print(it.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(output.strip()) == site / "delta_llava/train/finetune.py"
