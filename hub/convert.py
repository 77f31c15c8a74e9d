"""
Converts published checkpoints into Hub layout, tensor by tensor from file to file.

```
python -m delta_llava.hub.convert --checkpoint llava-v1.5-7b-144 --output_dir checkpoints/delta-llava-7b-144
```

What the checkpoint is, its files tell:

- A whole checkpoint of the LLaVA code base, as Delta-LLaVA's authors train it. Its tower is its own, or the one that
  `mm_vision_tower` in its config.json names; `--vision_tower` says where that lies now.
- A projector that stage 1 of that code base has saved (`mm_projector.bin`, the file or its folder). It needs
  `--language_model`, the model that it was trained with.
- A LLaVA-1.5 of transformers (the organisation llava-hf on the Hub). Its tower and language model are taken. The
  projector is a fresh one, to be trained from stage 1 on.

Weights are read from safetensors, and in the first two cases from PyTorch files too, by
`torch.load(weights_only=True)`. Only safetensors are written. Memory holds one shard at a time.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    LlavaImageProcessor,
    PreTrainedConfig,
    set_seed,
)

from ..configuration_delta_llava import DeltaLlavaConfig
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaProjector
from ..processing_delta_llava import DeltaLlavaProcessor
from .assemble import (
    add_tokens,
    build_config,
    build_generation_config,
    check_image_size,
    find_chat_template,
    is_repository,
    write_sources,
)


# Published name (a regular expression over its beginning) and ours, in the order of the projector's steps.
_RENAMED = {
    r"combined_block\.ntb\.patch_embed\.conv\.": "refinement_block.attention_input.",
    r"combined_block\.ntb\.norm_mhsa\.": "refinement_block.attention.input_norm.",
    r"combined_block\.ntb\.e_mhsa\.norm\.": "refinement_block.attention.norm.",
    r"combined_block\.ntb\.e_mhsa\.([qkv])\.": r"refinement_block.attention.\1_proj.",
    r"combined_block\.ntb\.e_mhsa\.proj\.": "refinement_block.attention.out_proj.",
    r"combined_block\.ntb\.projection\.conv\.": "refinement_block.convolution_input.",
    r"combined_block\.ntb\.mhca\.group_conv3x3\.": "refinement_block.convolution.grouped.",
    r"combined_block\.ntb\.mhca\.norm\.": "refinement_block.convolution.norm.",
    r"combined_block\.ntb\.mhca\.projection\.": "refinement_block.convolution.pointwise.",
    r"combined_block\.ntb\.mlp\.conv1\.": "refinement_block.mlp.0.",
    r"combined_block\.ntb\.mlp\.conv2\.": "refinement_block.mlp.2.",
    r"q_proj_1\.": "query_projection.",
    r"k_proj_1\.": "key_projection.",
    r"v_proj_1\.": "value_projection.",
    r"clip_attn\.": "attention.",
    r"mlp\.": "mlp.",
}

# Beginnings of the names in a checkpoint (the first that matches counts), and the part that a tensor belongs to. Towers
# of older transformers carry one prefix more, `vision_model.`.
_LLAVA_CODE_BASE = {
    r"(?:model\.)?mm_projector\.": "published_projector.",
    r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_tower.",
    r"model\.": "language_model.",
}
_LLAVA_HF = {
    r"language_model\.lm_head\.": "lm_head.",
    r"(?:model\.)?language_model\.(?:model\.)?": "language_model.",
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?": "vision_tower.",
    r"(?:model\.)?multi_modal_projector\.": "mlp_projector.",
}
_LANGUAGE_MODEL = {r"model\.": "language_model."}
_VISION_TOWER = {
    r"(?=text_model\.|text_projection\.|visual_projection\.|logit_)": "text_half.",
    r"(?:vision_model\.)?": "vision_tower.",
}
_DELTA_LLAVA = {
    r"model\.vision_tower\.(?:vision_model\.)?": "vision_tower.",
    r"model\.multi_modal_projector\.": "projector.",
    r"model\.language_model\.": "language_model.",
}

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
_EMBEDDINGS = ("language_model.embed_tokens.weight", "lm_head.weight")
# Of a repository: all but the weights
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file, as the file's header describes it.

    Args:
        file (`Path`): The file.
        name (`str`): Its name there.
        shape (`tuple[int, ...]`), dtype (`torch.dtype`): Its own.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


@dataclass
class Conversion:
    """
    What became of every tensor.

    Args:
        layout (`str`): What the checkpoint was found to be.
        config (`DeltaLlavaConfig`): The configuration as saved.
        used (`dict[str, StoredTensor]`): Where each weight of the new checkpoint was taken from, by its new name.
        fresh (`list[str]`): Weights that no file held and that were initialized instead.
        left (`dict[StoredTensor, str]`): Tensors that the new checkpoint has no use for, and why.
    """

    layout: str
    config: DeltaLlavaConfig
    used: dict[str, StoredTensor]
    fresh: list[str]
    left: dict[StoredTensor, str]


@dataclass
class _Parts:
    """What a layout holds; tensors go by the part that they belong to, and their name in it."""

    layout: str
    vision_config: PreTrainedConfig
    text_config: PreTrainedConfig
    image_processor: BaseImageProcessor
    tokenizer: Path
    tensors: dict[str, StoredTensor]
    num_visual_tokens: list[int] | None
    query_feature_layer: int
    sources: dict[str, str]


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    language_model: str | None = None,
    vision_tower: str | None = None,
    num_visual_tokens: list[int] | None = None,
    chat_template: str | Path | None = None,
    dtype: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    max_shard_size: int | str = "5GB",
) -> Conversion:
    """
    Converts a checkpoint of another layout and saves it with its processor and code files.

    The new checkpoint is written to `output_dir` + `.incomplete` and renamed when it is whole; what an interrupted
    conversion has left there, the next one removes.

    Args:
        checkpoint (`str` or `Path`): Folder, `mm_projector.bin` or Hub repository.
        output_dir (`str` or `Path`): New or empty folder for the new checkpoint.
        language_model (`str`, *optional*): Folder or Hub repository of the language model that a stage-1 projector was
            trained with. For a whole checkpoint it is the name of its base model, if config.json does not tell it.
        vision_tower (`str`, *optional*): Folder or Hub repository of the vision tower, in place of the name in
            config.json.
        num_visual_tokens (`list[int]`, *optional*): Budgets, where config.json has no `scale_factor`. Those of a fresh
            projector are free: without them, the configuration's default.
        chat_template (`str` or `Path`, *optional*): Jinja file. Needed where the family of the language model has none
            here (Vicuna v1 for Llama, ChatML for Qwen).
        dtype (`str`, *optional*, defaults to `"auto"`): `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"` for that of
            the language model's embeddings.
        seed (`int`, *optional*, defaults to 0): Seed of a fresh projector's weights.
        revision (`str`, *optional*): Branch, tag or commit of `checkpoint`, if it is a repository.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Largest file to write, in bytes or with a
            unit, and with it the memory that the conversion needs.

    Returns:
        `Conversion`: What became of every tensor.

    Raises:
        ValueError: If `output_dir` holds files, `checkpoint` is of no known layout or holds another projector, a file
            could run code when read, a tensor is missing, misshapen or unknown, or an option is missing or contradicts
            the checkpoint.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} holds files already: name a new or an empty folder.")
    parts = _read_parts(str(checkpoint), revision, language_model, vision_tower, num_visual_tokens, chat_template)
    # The configuration is given, because config.json may name a model type that transformers does not know
    tokenizer = AutoTokenizer.from_pretrained(parts.tokenizer, config=parts.text_config)
    template = find_chat_template(parts.text_config, chat_template, tokenizer)
    add_tokens(tokenizer)
    config = build_config(
        parts.vision_config,
        parts.text_config,
        tokenizer,
        parts.num_visual_tokens,
        query_feature_layer=parts.query_feature_layer,
    )
    processor = DeltaLlavaProcessor(
        image_processor=parts.image_processor,
        tokenizer=tokenizer,
        num_visual_tokens=config.num_visual_tokens,
        patch_grid_size=config.patch_grid_size,
        chat_template=template,
    )
    check_image_size(processor, config)

    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    expected = model.state_dict()
    if config.tie_word_embeddings:
        del expected["lm_head.weight"]
    fresh = {}
    if not any(name.startswith("projector.") for name in parts.tensors):
        set_seed(seed)
        projector = DeltaProjector(config).apply(model._init_weights)
        fresh = {f"model.multi_modal_projector.{name}": weight for name, weight in projector.state_dict().items()}
    used, left = _account(parts, config, {name: weight for name, weight in expected.items() if name not in fresh})
    config.dtype = config.vision_config.dtype = config.text_config.dtype = _common_dtype(used, dtype)
    config.architectures = [type(model).__name__]

    incomplete = output_dir.with_name(f"{output_dir.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir(parents=True)
    expected = {name: weight.to(config.dtype) for name, weight in expected.items()}
    _write_shards(incomplete, expected, used, fresh, max_shard_size)
    processor.save_pretrained(incomplete)
    build_generation_config(parts.tokenizer, parts.text_config, tokenizer, template).save_pretrained(incomplete)
    write_sources(incomplete, **parts.sources)
    config.save_pretrained(incomplete)  # last, and with it the code files: without a config.json nothing loads
    if output_dir.exists():
        output_dir.rmdir()
    incomplete.rename(output_dir)
    return Conversion(parts.layout, config, used, list(fresh), left)


def projector_from_released(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of a published projector.

    Args:
        state_dict (`dict[str, torch.Tensor]`): Published names, without the prefix `model.mm_projector.` that they have
            in a checkpoint.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors under names that `DeltaProjector` loads with `strict=True`.

    Raises:
        ValueError: If a name is not one of the published projector's.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for published, ours in _RENAMED.items():
            new_name, count = re.subn(f"^{published}", ours, name)
            if count:
                renamed[new_name] = tensor
                break
        else:
            raise ValueError(
                f"{name!r} is no weight of the published projector, whose names begin with"
                " q_proj_1, k_proj_1, v_proj_1, clip_attn, mlp or combined_block.ntb."
            )
    return renamed


def _read_parts(
    checkpoint: str,
    revision: str | None,
    language_model: str | None,
    vision_tower: str | None,
    num_visual_tokens: list[int] | None,
    chat_template: str | Path | None,
) -> _Parts:
    """Tells the layout of a checkpoint by its files, and reads everything but the weights themselves."""
    folder = Path(checkpoint)
    if not folder.is_file():
        folder = _fetch(checkpoint, "checkpoint", revision)
    settings = {}
    if (folder / "config.json").exists():
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    if settings.get("model_type") == "llava" and "vision_config" in settings:
        if language_model or vision_tower:
            raise ValueError(
                f"checkpoint={checkpoint} is a LLaVA of transformers and holds its own parts: leave language_model="
                f"{language_model} and vision_tower={vision_tower} out."
            )
        return _read_llava_hf(checkpoint, folder, settings, num_visual_tokens)
    projector_file = folder if folder.is_file() else folder / "mm_projector.bin"
    if not folder.is_file() and "mm_vision_tower" in settings and _weight_files(folder):
        projector_file = None
    elif not projector_file.exists():
        raise ValueError(
            f"checkpoint={checkpoint} is of no known layout: its config.json has model_type="
            f"{settings.get('model_type')!r}, and it should be a LLaVA of transformers (model_type 'llava' with a"
            " vision_config), or of the LLaVA code base, with mm_vision_tower in its config.json and all weights or"
            " mm_projector.bin."
        )
    if settings.get("mm_use_im_start_end") and chat_template is None:
        raise ValueError(
            f"mm_use_im_start_end in the config.json of {checkpoint} puts tokens around each image: name a Jinja file"
            " by --chat_template that writes them."
        )
    return _read_llava_code_base(
        checkpoint, folder, settings, projector_file, language_model, vision_tower, num_visual_tokens
    )


def _read_llava_code_base(
    checkpoint: str,
    folder: Path,
    settings: dict,
    projector_file: Path | None,
    language_model: str | None,
    vision_tower: str | None,
    num_visual_tokens: list[int] | None,
) -> _Parts:
    """`projector_file` is that of stage 1, or `None` for a whole checkpoint."""
    for field, allowed in {
        "image_aspect_ratio": ("square", "pad"),
        "mm_vision_select_feature": ("patch",),
    }.items():
        if settings.get(field, allowed[0]) not in allowed:
            raise ValueError(
                f"{field}={settings[field]!r} in the config.json of {checkpoint} has no counterpart here, only"
                f" {' and '.join(map(repr, allowed))}."
            )
    tower = vision_tower or settings.get("mm_vision_tower")
    if tower is None:
        raise ValueError(f"checkpoint={checkpoint} does not tell its vision tower: name it by --vision_tower.")

    if projector_file is None:
        layout = "whole checkpoint of the LLaVA code base"
        text_config, tokenizer = _text_config(checkpoint, settings), folder
        tensors = _by_part(_read_headers(_weight_files(folder)), _LLAVA_CODE_BASE)
    elif language_model is None:
        raise ValueError(
            f"{projector_file.name} of {checkpoint} holds a projector alone: name the language model that it was"
            " trained with by --language_model."
        )
    else:
        layout = "stage-1 projector of the LLaVA code base"
        tokenizer = _fetch(language_model, "language_model")
        text_config = AutoConfig.from_pretrained(tokenizer)
        tensors = _by_part(_read_headers([projector_file]), _LLAVA_CODE_BASE)
        tensors |= _by_part(_read_headers(_required_weights(tokenizer, language_model)), _LANGUAGE_MODEL, tensors)
    published = {
        name.removeprefix("published_projector."): tensors.pop(name)
        for name in list(tensors)
        if name.startswith("published_projector.")
    }
    if "q_proj_1.shared_weight.weight" not in published:
        raise ValueError(
            f"checkpoint={checkpoint} does not hold Delta-LLaVA's projector, which has q_proj_1.shared_weight.weight:"
            f" its mm_projector_type is {settings.get('mm_projector_type')!r}, and its projector's weights are"
            f" {_few(published)}."
        )
    tensors |= {f"projector.{name}": tensor for name, tensor in projector_from_released(published).items()}

    has_tower = any(name.startswith("vision_tower.") for name in tensors)
    tower_folder = _fetch(tower, "vision_tower", weights=not has_tower)
    vision_config = AutoConfig.from_pretrained(tower_folder)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    if not has_tower:
        tensors |= _by_part(_read_headers(_required_weights(tower_folder, tower)), _VISION_TOWER, tensors)
    image_processor = AutoImageProcessor.from_pretrained(tower_folder)
    if settings.get("image_aspect_ratio") == "pad":
        image_processor = LlavaImageProcessor(
            do_pad=True,
            size=image_processor.size,
            crop_size=image_processor.crop_size,
            image_mean=image_processor.image_mean,
            image_std=image_processor.image_std,
        )
    return _Parts(
        layout=layout,
        vision_config=vision_config,
        text_config=text_config,
        image_processor=image_processor,
        tokenizer=tokenizer,
        tensors=tensors,
        num_visual_tokens=_budgets(checkpoint, settings, vision_config, num_visual_tokens),
        query_feature_layer=settings.get("mm_vision_select_layer", -2),
        sources={
            "vision_tower": _public_name(tower),
            "language_model": _public_name(language_model or _base_model(settings, checkpoint)),
            "converted_from": checkpoint,
        },
    )


def _read_llava_hf(checkpoint: str, folder: Path, settings: dict, num_visual_tokens: list[int] | None) -> _Parts:
    config = AutoConfig.from_pretrained(folder)
    config.text_config.tie_word_embeddings |= config.tie_word_embeddings
    files = _required_weights(folder, checkpoint, suffixes=[".safetensors"])
    return _Parts(
        layout="LLaVA of transformers",
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=folder,
        tensors=_by_part(_read_headers(files), _LLAVA_HF),
        num_visual_tokens=num_visual_tokens,
        query_feature_layer=-2,
        sources={
            "vision_tower": _base_model(settings["vision_config"], checkpoint),
            "language_model": _base_model(settings.get("text_config", {}), checkpoint),
            "converted_from": checkpoint,
        },
    )


def _text_config(checkpoint: str, settings: dict) -> PreTrainedConfig:
    """The language model's configuration, which LLaVA's code base keeps in one dict with its own settings."""
    family = settings["model_type"].removeprefix("llava").removeprefix("_")
    model_type = {"": "llama", "qwen": "qwen2"}.get(family, family)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type={settings['model_type']!r} in the config.json of {checkpoint} names no language model that"
            " transformers knows; 'llava_llama', 'llava_qwen2' and 'llava_seed_oss' are examples of those that do."
        )
    # Old files hold arguments of generate and names of classes too: what matters are the fields of the family
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
    return CONFIG_MAPPING[model_type](**{field: value for field, value in settings.items() if field in known})


def _budgets(
    checkpoint: str, settings: dict, vision_config: PreTrainedConfig, num_visual_tokens: list[int] | None
) -> list[int]:
    scale_factor = settings.get("scale_factor")
    if scale_factor is None:
        if num_visual_tokens is None:
            raise ValueError(
                f"checkpoint={checkpoint} has no scale_factor in a config.json: name the visual tokens per image that"
                " it was trained for by --num_visual_tokens."
            )
        return num_visual_tokens
    grid_size = vision_config.image_size // vision_config.patch_size
    if grid_size % scale_factor:
        raise ValueError(
            f"scale_factor={scale_factor} in the config.json of {checkpoint} does not divide the vision tower's grid of"
            f" {grid_size}x{grid_size} patches."
        )
    budgets = [(grid_size // scale_factor) ** 2]
    if num_visual_tokens not in (None, budgets):
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens} contradicts scale_factor={scale_factor} in the config.json of"
            f" {checkpoint}, which makes {budgets[0]} tokens of {grid_size}x{grid_size} patches: leave the option out."
        )
    return budgets


def _base_model(settings: dict, checkpoint: str) -> str:
    """What a model was trained from, as long as that is the name of a repository; otherwise the checkpoint itself."""
    name = settings.get("_name_or_path") or ""
    return name if is_repository(name) else checkpoint


def _public_name(name: str) -> str:
    """Of a path on another machine, the last name alone, as [`write_sources`] has it for paths on this one."""
    return name if Path(name).exists() or is_repository(name) else Path(name).name


def _fetch(name: str, argument: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of that name, or the part of the repository that is needed, in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{argument}={name} is not a folder here, and no repository can be named so.") from None
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES))
    # The first format that there is: the same weights are not fetched twice
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "mm_projector.bin") if weights else ():
        snapshot_download(name, revision=revision, allow_patterns=pattern)
        if any(folder.glob(pattern)):
            break
    return folder


def _weight_files(folder: Path, suffixes: Iterable[str] = (".safetensors", ".bin")) -> list[Path]:
    """All files of the model's weights, in the first format that there is; none if there is none."""
    for suffix in suffixes:
        file = folder / {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}[suffix]
        index = folder / f"{file.name}.index.json"
        if file.exists():
            return [file]
        if index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
            if absent := [file.name for file in files if not file.exists()]:
                raise ValueError(f"{index} names {_few(absent)}, but {folder} does not hold them.")
            return files
    return []


def _required_weights(folder: Path, name: str, suffixes: Iterable[str] = (".safetensors", ".bin")) -> list[Path]:
    files = _weight_files(folder, suffixes)
    if not files:
        raise ValueError(f"{name} holds no weights that can be read here: one of {list(suffixes)} is needed.")
    return files


def _read_headers(files: list[Path]) -> list[StoredTensor]:
    tensors = []
    for file in files:
        if file.suffix == ".safetensors":
            with _open_safetensors(file) as opened:
                for name in opened.keys():
                    tensor = opened.get_slice(name)
                    dtype = _SAFETENSORS_DTYPES.get(tensor.get_dtype())
                    if dtype is None:
                        raise ValueError(
                            f"{name} in {file} has dtype {tensor.get_dtype()}, but weights must be one of"
                            f" {list(_SAFETENSORS_DTYPES)}: quantized checkpoints cannot be converted."
                        )
                    tensors.append(StoredTensor(file, name, tuple(tensor.get_shape()), dtype))
        else:
            for name, tensor in _load_pickled(file).items():
                tensors.append(StoredTensor(file, name, tuple(tensor.shape), tensor.dtype))
    return tensors


def _open_safetensors(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}.") from error


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        # Mapped: a tensor's bytes are read when they are needed
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{file} is refused, because it holds more than tensors and could run code when it is read"
            " (torch.load with weights_only=True). Ask whoever made it for safetensors."
        ) from error
    except RuntimeError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} should hold a dict of tensors.")
    return tensors


def _by_part(
    tensors: list[StoredTensor], beginnings: dict[str, str], others: dict[str, StoredTensor] | None = None
) -> dict[str, StoredTensor]:
    """Renames by `beginnings`; a name that two tensors get, of these or of `others`, is an error."""
    parts = {}
    for tensor in tensors:
        name = _rename(tensor.name, beginnings)
        if twin := parts.get(name) or (others or {}).get(name):
            raise ValueError(f"{tensor} and {twin} are the same weight: only one can be used.")
        parts[name] = tensor
    return parts


def _rename(name: str, beginnings: dict[str, str]) -> str:
    for beginning, part in beginnings.items():
        if match := re.match(beginning, name):
            return part + name[match.end() :]
    return name


def _account(
    parts: _Parts, config: DeltaLlavaConfig, expected: dict[str, torch.Tensor]
) -> tuple[dict[str, StoredTensor], dict[StoredTensor, str]]:
    """Finds a tensor for every expected weight, and a reason for every tensor that is none."""
    targets = {_rename(name, _DELTA_LLAVA): name for name in expected}
    used, left, unknown, misshapen = {}, {}, [], []
    for name, tensor in parts.tensors.items():
        if name in targets:
            used[targets[name]] = tensor
            shape = tuple(expected[targets[name]].shape)
            if name in _EMBEDDINGS:
                shape = (parts.text_config.vocab_size, *shape[1:])  # to be resized
            if tensor.shape != shape:
                misshapen.append(f"{tensor} has shape {tensor.shape} instead of {shape}")
            if tensor.dtype not in _DTYPES.values():
                misshapen.append(f"{tensor} has dtype {tensor.dtype} instead of one of {list(_DTYPES)}")
        elif reason := _reason_to_leave(name, parts, config, targets):
            left[tensor] = reason
        else:
            unknown.append(str(tensor))
    missing = [name for name in expected if name not in used]
    problems = {
        "no tensor was found for": missing,
        "unlike what config.json says,": misshapen,
        "the new checkpoint has no place for": unknown,
    }
    if any(problems.values()):
        found = "; ".join(f"{problem} {_few(names)}" for problem, names in problems.items() if names)
        raise ValueError(f"{parts.sources['converted_from']} cannot be converted: {found}.")
    if config.tie_word_embeddings and "lm_head.weight" in parts.tensors:
        head, embeddings = (parts.tensors[name] for name in reversed(_EMBEDDINGS))
        if not torch.equal(_load(head), _load(embeddings)):
            raise ValueError(f"{head} differs from {embeddings}, though tie_word_embeddings in config.json is true.")
    return used, left


def _reason_to_leave(name: str, parts: _Parts, config: DeltaLlavaConfig, targets: dict[str, str]) -> str | None:
    layer = re.match(r"vision_tower\.(.*layers)\.(\d+)\.(.+)", name)
    if layer and f"vision_tower.{layer[1]}.0.{layer[3]}" in targets:
        last = config.vision_config.num_hidden_layers
        if last <= int(layer[2]) < parts.vision_config.num_hidden_layers:
            return f"layer behind the tower's layer {last}, the last one that is read"
    if name.startswith("vision_tower.head."):
        return "pooling head of the tower, which nothing reads"
    if name.startswith("text_half."):
        return "the contrastive model's other half"
    if name.startswith("mlp_projector."):
        return "LLaVA-1.5's projector: a fresh one stands in its place"
    if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
        return "buffer that is computed from the configuration"
    if name == "lm_head.weight":
        return "tied to the embeddings"
    return None


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"


def _common_dtype(used: dict[str, StoredTensor], dtype: str) -> torch.dtype:
    if dtype == "auto":
        return used["model.language_model.embed_tokens.weight"].dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} must be 'auto' or one of {list(_DTYPES)}.")
    return _DTYPES[dtype]


def _load(tensor: StoredTensor) -> torch.Tensor:
    """
    The tensor itself, mapped from its file: it takes memory of its own only where it is changed.

    Each has a mapping to itself, because the pages that were read stay in memory until the last tensor of a mapping is
    gone.
    """
    if tensor.file.suffix == ".safetensors":
        with _open_safetensors(tensor.file) as opened:
            return opened.get_tensor(tensor.name)
    return _load_pickled(tensor.file)[tensor.name]


def _write_shards(
    folder: Path,
    expected: dict[str, torch.Tensor],
    used: dict[str, StoredTensor],
    fresh: dict[str, torch.Tensor],
    max_shard_size: int | str,
):
    split = split_torch_state_dict_into_shards(expected, max_shard_size=max_shard_size)
    for filename, names in tqdm(split.filename_to_tensors.items(), desc="Writing shards", unit=" shards"):
        shard = {}
        for name in names:
            weight = _load(used[name]) if name in used else fresh[name]
            shard[name] = _fit(name, weight, expected[name])
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _fit(name: str, weight: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Gives a weight the dtype of the checkpoint, and embeddings the rows of new tokens."""
    if new_rows := len(expected) - len(weight):
        # New embeddings are the mean of the old ones, so that no logit of theirs stands out
        mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
        weight = torch.cat([weight, mean.expand(new_rows, -1)])
    fitted = weight.to(expected.dtype).contiguous()
    if weight.dtype != expected.dtype and not torch.stack(fitted.aminmax()).isfinite().all():
        raise ValueError(f"{name} does not fit into {expected.dtype}: name a wider one by --dtype.")
    return fitted


def _report(conversion: Conversion) -> str:
    """Every tensor that was left, then the groups that were used."""

    def line(label: str, tensors: list[StoredTensor]) -> str:
        megabytes = sum(tensor.num_bytes for tensor in tensors) / 1e6
        return f"{label:22} {len(tensors):>5} tensors {megabytes:>12,.1f} MB"

    lines = []
    for reason in dict.fromkeys(conversion.left.values()):
        tensors = [tensor for tensor, why in conversion.left.items() if why == reason]
        lines += [f"  {tensor}" for tensor in tensors] + [f"{line('left', tensors)}  {reason}"]
    for label, beginning in {
        "vision tower": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "language model": ("model.language_model.", "lm_head."),
    }.items():
        tensors = [tensor for name, tensor in conversion.used.items() if name.startswith(beginning)]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        lines.append(f"{line(label, tensors)}  {', '.join(dtypes)}")
    if conversion.fresh:
        lines.append(f"{'projector, fresh':22} {len(conversion.fresh):>5} tensors")
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder, mm_projector.bin or repository to convert")
    parser.add_argument("--output_dir", required=True, help="new folder for the checkpoint")
    parser.add_argument("--language_model", help="folder or repository: the one that mm_projector.bin was trained with")
    parser.add_argument("--vision_tower", help="folder or repository (default: mm_vision_tower in config.json)")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="budgets, if no scale_factor tells them")
    parser.add_argument("--chat_template", help="Jinja file, for families other than Llama and Qwen")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the embeddings')")
    parser.add_argument("--seed", type=int, default=0, help="seed of a fresh projector's weights")
    parser.add_argument("--revision", help="branch, tag or commit of the checkpoint's repository")
    parser.add_argument("--max_shard_size", default="5GB", help="largest file to write")
    options = parser.parse_args(arguments)
    conversion = convert(**vars(options))
    print(_report(conversion))
    print(
        f"Saved the {conversion.layout} to {options.output_dir} in {conversion.config.dtype}, for"
        f" {conversion.config.visual_token_budgets} visual tokens per image."
    )


if __name__ == "__main__":
    main()
