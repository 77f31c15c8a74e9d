"""Weights are read from the folder's own files, each once, and are finite."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from delta_llava.weights import read_weights, refuse_adapter, weight_digests, weight_files


INDEX = "model.safetensors.index.json"
SHARDS = {"model-1-of-2.safetensors": {"a": torch.ones(2)}, "model-2-of-2.safetensors": {"b": torch.zeros(0)}}


@pytest.fixture
def shards(tmp_path):
    """`shards({file: tensors})`: a folder of these files and of an index of what is in them."""

    def make(files=SHARDS, weight_map=None):
        folder = tmp_path / "checkpoint"
        folder.mkdir(exist_ok=True)
        for name, tensors in files.items():
            save_file(tensors, folder / name)
        found = {weight: name for name, tensors in files.items() for weight in tensors}
        (folder / INDEX).write_text(json.dumps({"weight_map": found | (weight_map or {})}))
        return folder

    return make


def test_all_weights_are_read_from_one_file_or_several(shards, tmp_path):
    folder = shards()
    assert weight_files(folder) == sorted(SHARDS)
    assert {name: len(weight) for name, weight in read_weights(folder)} == {"a": 2, "b": 0}
    assert weight_digests(folder) == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(SHARDS)
    }
    save_file({"c": torch.ones(3, dtype=torch.int64)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == ["model.safetensors"]
    assert [name for name, _ in read_weights(tmp_path)] == ["c"]
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=r"must hold model.safetensors or .*, and holds both"):
        weight_files(tmp_path)


def test_an_index_of_pickles_goes_by_the_same_rule(tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../a.bin"}}')
    with pytest.raises(ValueError, match=r"'../a.bin', but must name .bin files beside it"):
        weight_files(tmp_path, "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "a.bin"}}')
    (tmp_path / "a.bin").touch()
    assert weight_files(tmp_path, "pytorch_model.bin") == ["a.bin"]


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "..", "", "x.bin"]
)
def test_an_index_names_files_beside_it(shards, place):
    folder = shards(weight_map={"a": place})
    with pytest.raises(ValueError, match=r"index.json places weights in .* beside it"):
        weight_files(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10**5]
)
def test_an_index_that_is_none_is_named(shards, content):
    folder = shards()
    (folder / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        weight_files(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"c": "model-3.safetensors"}, "model-3.safetensors, but .* does not hold that file"),
        ({"c": "model-1-of-2.safetensors"}, "places 2 tensors in model-1-.*, which holds 1: see c"),
        ({"a": "model-2-of-2.safetensors"}, "places 2 tensors in model-2-.*, which holds 1: see a"),
    ],
)
def test_what_an_index_says_is_where_it_says(shards, weight_map, message):
    folder = shards(weight_map=weight_map)
    with pytest.raises(ValueError, match=message):
        list(read_weights(folder))


def test_a_tensor_in_two_files_is_refused(shards):
    folder = shards({**SHARDS, "model-2-of-2.safetensors": {"a": torch.ones(2), "b": torch.ones(2)}})
    with pytest.raises(ValueError, match=r"places 1 tensors in model-2-.*, which holds 2: see a"):
        weights = {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}
        (folder / INDEX).write_text(json.dumps({"weight_map": weights}))
        list(read_weights(folder))


def test_links_lead_nowhere_else_but_in_the_cache_of_the_hub(shards, tmp_path):
    folder = shards()
    outside = tmp_path / "outside"
    (folder / "model-1-of-2.safetensors").rename(outside)
    (folder / "model-1-of-2.safetensors").symlink_to("../outside")
    with pytest.raises(ValueError, match=r"model-1-of-2.safetensors leads out of its folder, to .*outside"):
        weight_files(folder)
    snapshot, blobs = tmp_path / "models--a--b/snapshots/commit", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    outside.rename(blobs / "blob")
    (snapshot / "model.safetensors").symlink_to("../../blobs/blob")
    assert weight_files(snapshot) == ["model.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e5m2", "float8_e4m3fn"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_named(shards, dtype, value):
    if (dtype, value[-3:]) == ("float8_e4m3fn", "inf"):
        return  # it has NaN, but nothing infinite
    weight = torch.ones(3, 2)
    weight[1, 1] = float(value)
    folder = shards({**SHARDS, "model-2-of-2.safetensors": {"c": weight.to(getattr(torch, dtype))}})
    with pytest.raises(ValueError, match=r"^c in .*model-2-of-2.safetensors holds NaN or infinite values"):
        list(read_weights(folder))


def test_an_adapter_is_refused_by_the_name_that_the_user_gave(tmp_path):
    refuse_adapter(tmp_path, "org/name")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^org/name holds an adapter: .* with delta_llava\.hub\.merge_adapter\.$"):
        refuse_adapter(tmp_path, "org/name")
