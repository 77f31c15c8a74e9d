"""Adapters of the language model train with the whole projector, are saved with it, resume, and merge."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from delta_llava import DeltaLlavaConfig, DeltaLlavaForConditionalGeneration, DeltaLlavaProcessor
from delta_llava.hub.card import build_card
from delta_llava.hub.merge_adapter import merge_adapter
from delta_llava.train import finetune


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "num_visual_tokens": [4, 36]}


def logits(model, processor, noise):
    inputs = processor(images=noise(1), text="<image>\nWhich colour?", num_visual_tokens=4, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_adapters_and_projector_move_and_nothing_else(run, checkpoint, noise):
    folder = run(finetune, **LORA, max_steps=4)
    adapter, before = load_file(folder / "adapter_model.safetensors"), load_file(checkpoint / "model.safetensors")
    weights, projector = {}, {}
    for name, weight in adapter.items():
        name = name.removeprefix("base_model.model.")
        (projector if "multi_modal_projector" in name else weights)[name] = weight
    assert all(".language_model.layers." in name and ".lora_" in name for name in weights)
    assert len(weights) == 2 * 2 * 7  # factors, layers, linear maps of a layer
    assert all(weight.any() for weight in weights.values())  # B starts at zero
    assert projector.keys() == {name for name in before if "multi_modal_projector" in name}
    assert not any(torch.equal(weight, before[name]) for name, weight in projector.items())
    assert not (folder / "model.safetensors").exists()
    one = run(finetune, "one", **LORA, lora_target_modules=["q_proj"], lora_modules_to_save=["lm_head"])
    names = [name for name in load_file(one / "adapter_model.safetensors") if "multi_modal_projector" not in name]
    assert {name.split(".")[-3] for name in names if "lora_" in name} == {"q_proj"}
    assert sum(name.endswith("lm_head.weight") for name in names) == 1


def test_an_adapter_names_the_revision_that_it_was_trained_on(run, checkpoint, tmp_path, monkeypatch):
    folder = run(finetune, **LORA, model_revision="v2")  # a folder has no revisions, and takes any
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == "v2"
    asked = []

    def from_pretrained(name, *args, original=DeltaLlavaForConditionalGeneration.from_pretrained, **kwargs):
        asked.append((name, kwargs["revision"]))
        return original(name, *args, **kwargs)

    monkeypatch.setattr(DeltaLlavaForConditionalGeneration, "from_pretrained", from_pretrained)
    merge_adapter(folder, tmp_path / "merged")
    assert asked == [(str(checkpoint), "v2")]


@pytest.mark.parametrize("quantized", [False, True], ids=["LoRA", "QLoRA"])
def test_a_merged_adapter_is_a_plain_checkpoint_that_says_the_same(run, checkpoint, tmp_path, noise, quantized):
    if quantized:
        pytest.importorskip("bitsandbytes")
    folder = run(finetune, **LORA, load_in_4bit=quantized)
    merged = merge_adapter(folder, tmp_path / "merged")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "modeling_delta_llava.py", "chat_template.jinja"} <= files
    assert not any("adapter" in name for name in files)
    assert merged.config.visual_token_budgets == [4, 36]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())

    loaded = DeltaLlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    processor = DeltaLlavaProcessor.from_pretrained(tmp_path / "merged")
    adapted = AutoModelForImageTextToText.from_pretrained(folder)  # the adapter's folder by itself
    difference = (logits(loaded, processor, noise) - logits(adapted, processor, noise)).abs().max()
    assert difference < (0.5 if quantized else 1e-4)
    untrained = DeltaLlavaForConditionalGeneration.from_pretrained(checkpoint)
    assert (logits(loaded, processor, noise) - logits(untrained, processor, noise)).abs().max() > 1e-2


def test_quantization_touches_neither_tower_nor_projector(run, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from delta_llava.train import trainer

    seen = []

    def training_step(self, model, *args, original=trainer.SFTTrainer.training_step, **kwargs):
        seen.append(model)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", training_step)
    run(finetune, **LORA, load_in_4bit=True)
    linear = {name: type(module) for name, module in seen[0].named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name for name, kind in linear.items() if kind is bitsandbytes.nn.Linear4bit}
    assert quantized and all(".language_model." in name for name in quantized)
    trained = {weight.dtype for weight in seen[0].parameters() if weight.requires_grad}
    assert trained == {torch.float32}


def test_an_adapter_run_resumes_to_the_same_weights(run, tmp_path):
    steps = {**LORA, "save_strategy": "steps", "save_steps": 2, "lora_dropout": 0.1}
    unbroken = run(finetune, "unbroken", **steps, max_steps=5)
    run(finetune, "broken", **steps, max_steps=5)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-5")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    resumed = run(finetune, "broken", ["--resume_from_checkpoint", "latest"], **steps, max_steps=5)
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (unbroken / name).read_bytes()


def test_a_checkpoint_of_an_adapter_run_merges_as_its_result_does(run, tmp_path):
    folder = run(finetune, **LORA, max_steps=3, save_strategy="steps", save_steps=2)
    merge_adapter(folder, tmp_path / "result")
    merge_adapter(folder / "checkpoint-3", tmp_path / "last")
    merge_adapter(folder / "checkpoint-2", tmp_path / "earlier")
    expected = load_file(tmp_path / "result/model.safetensors")
    last, earlier = (load_file(tmp_path / name / "model.safetensors") for name in ("last", "earlier"))
    assert all(torch.equal(weight, last[name]) for name, weight in expected.items())
    assert not all(torch.equal(weight, earlier[name]) for name, weight in expected.items())
    for name, steps in (("result", [1, 2, 3]), ("last", [1, 2, 3]), ("earlier", [1, 2])):
        assert DeltaLlavaConfig.from_pretrained(tmp_path / name).visual_token_budgets == [4, 36]
        processor = DeltaLlavaProcessor.from_pretrained(tmp_path / name)
        assert (processor.visual_token_budgets, processor.num_visual_tokens) == ([4, 36], 36)
        files = {path.name for path in (tmp_path / name / "training").iterdir()}
        assert files == {"finetune.yaml", "finetune.json", "finetune.png"}
        log = json.loads((tmp_path / name / "training/finetune.json").read_text())
        assert [entry["step"] for entry in log["log_history"] if "loss" in entry] == steps
        build_card(tmp_path / name, "org/name", base_model=["org/tower", "org/llm"], datasets=["data"], license="mit")


def test_bad_adapter_settings_are_errors(run, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"lora_target_modules names \['query'\].*'q_proj'"):
        run(finetune, **LORA, lora_target_modules=["query", "v_proj"])
    with pytest.raises(ValueError, match="holds files already"):
        merge_adapter(checkpoint, checkpoint)
    with pytest.raises(
        ValueError, match=r"lacks adapter_config\.json, adapter_model\.safetensors, .* or a checkpoint-N"
    ):
        merge_adapter(checkpoint, tmp_path / "out")
