"""A merged checkpoint holds finite weights, of a base model whose files are its own."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

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
    with pytest.raises(ValueError, match=rf"multi_modal_projector\.{name} in .* with {folder} holds NaN or infinite"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_base_model_whose_index_points_elsewhere_is_refused(adapter, tmp_path):
    folder, _ = adapter()
    index = tmp_path / "base/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index\.json places weights in '\.\./elsewhere\.safetensors'"):
        merge_adapter(folder, tmp_path / "merged")


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
