"""A merged checkpoint holds finite weights, of a base model whose files are its own."""

import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from delta_llava.hub.merge_adapter import merge_adapter


@pytest.fixture
def adapter(tiny_model, tiny_processor, tmp_path):
    """`adapter(value)`: the folder of an adapter, with that value in the projector that was trained beside it."""

    def make(value=0.0):
        model = tiny_model()
        model.save_pretrained(tmp_path / "base", max_shard_size="200KB")
        config = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
        peft_model = get_peft_model(model, config)
        peft_model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        name, weight = next((n, w) for n, w in peft_model.named_parameters() if "modules_to_save" in n)
        with torch.no_grad():
            weight.view(-1)[0] = value
        folder = tmp_path / "adapter"
        peft_model.save_pretrained(folder)
        model.config.to_json_file(folder / "trained_config.json")
        tiny_processor().save_pretrained(folder)
        (folder / "training").mkdir()
        return folder, name.split("modules_to_save.default.")[1]

    return make


def test_a_projector_that_is_not_finite_is_refused_by_name(adapter, tmp_path):
    folder, name = adapter(float("nan"))
    with pytest.raises(ValueError, match=rf"multi_modal_projector\.{name} in {folder}/adapter_model\.saf.* holds NaN"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
PROJECTOR = "base_model.model.model.multi_modal_projector.mlp.0.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A.weight": None, "B.weight": None}, rf"lacks 2 of the .*: {LAYER}A\.weight, {LAYER}B\.weight\.$"),
        ({"A.weight": None}, rf"lacks 1 of the adapter's tensors: {LAYER}A\.weight\.$"),
        ({PROJECTOR: None}, rf"lacks 1 of the adapter's tensors: {PROJECTOR}\.$"),
        ({"B.weight": torch.full((64, 8), torch.nan)}, rf"{LAYER}B\.weight in .* holds NaN"),
        ({"B.weight": torch.zeros(63, 8)}, rf"{LAYER}B\.weight in .* has shape \(63, 8\) instead of \(\d+, 8\)"),
        ({"C.weight": torch.zeros(1)}, r"holds 1 tensors that are not the model's: .*q_proj\.lora_C"),
    ],
    ids=["a layer", "a matrix", "the projector", "NaN", "shape", "unknown"],
)
def test_an_adapter_that_is_not_the_models_is_refused_by_name(adapter, tmp_path, change, message):
    folder, _ = adapter()
    file = folder / "adapter_model.safetensors"
    change = {name if name == PROJECTOR else LAYER + name: weight for name, weight in change.items()}
    tensors = load_file(file)
    assert all(name in tensors for name, weight in change.items() if weight is None)
    save_file({name: weight for name, weight in (tensors | change).items() if weight is not None}, file)
    with pytest.raises(ValueError, match=message) as refused:
        merge_adapter(folder, tmp_path / "merged")
    assert str(file) in str(refused.value) and not (tmp_path / "merged").exists()


def test_a_cut_file_and_a_base_model_that_is_gone_are_named(adapter, tmp_path):
    folder, _ = adapter()
    shard = next((tmp_path / "base").glob("model-00002*"))
    for file in (folder / "adapter_model.safetensors", shard):
        content = file.read_bytes()
        file.write_bytes(content[:-9])
        with pytest.raises(ValueError, match=rf"{re.escape(str(file))} cannot be read"):
            merge_adapter(folder, tmp_path / "merged")
        file.write_bytes(content)
    gone = tmp_path / "base"
    gone.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"base model of {folder} .*base_model={gone} is neither .*--base_model"):
        merge_adapter(folder, tmp_path / "merged")
    merge_adapter(folder, tmp_path / "merged", tmp_path / "moved")


def test_a_merge_that_fails_midway_leaves_nothing(adapter, tmp_path, monkeypatch):
    folder, _ = adapter()

    def full(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full)
        with pytest.raises(OSError, match="No space left"):
            merge_adapter(folder, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}
    merge_adapter(folder, tmp_path / "merged")
    with pytest.raises(ValueError, match="holds files already"):
        merge_adapter(folder, tmp_path / "merged")


def test_a_record_that_links_out_of_the_adapter_is_refused(adapter, tmp_path):
    folder, _ = adapter()
    (tmp_path / "private.png").write_text("private")
    (folder / "training/finetune.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(ValueError, match=r"finetune\.png leads out of its folder"):
        merge_adapter(folder, tmp_path / "merged")
