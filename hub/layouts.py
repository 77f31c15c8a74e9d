"""Layouts of published LLaVAs and Delta-LLaVAs: what their files hold, and what each tensor is here."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, BaseImageProcessor, PreTrainedConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..modeling_delta_llava import brief_list
from ..weights import weight_files
from .client import is_repository


# For each layout, how its tensors' names begin (the first match counts), and the part that loads such a tensor under
# the rest of its name. Towers of older transformers have one more prefix, `vision_model.`.
_LLAVA_HF = {
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?": "vision_tower.",
    r"(?:model\.)?multi_modal_projector\.": "projector.",
    r"(?:model\.)?language_model\.|(?=lm_head\.)": "language_model.",
}
_LLAVA_CODE_BASE = {
    r"(?:model\.)?mm_projector\.": "projector.",
    r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?": "vision_tower.",
    r"": "language_model.",
}
_LANGUAGE_MODEL = {r"": "language_model."}
_VISION_TOWER = {
    r"(?=text_model\.|text_projection\.|visual_projection\.|logit_)": "text_half.",
    r"(?:vision_model\.)?": "vision_tower.",
}
# LLaVA-1.5's projector, as transformers and as its code base name it
_LLAVA_MLP = {r"(?:linear_1|0)\.": "mlp.0.", r"(?:linear_2|2)\.": "mlp.2."}
# Delta-LLaVA's, as its authors name it, in the order of its steps
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

# All of a repository but the weights
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
FRESH = "--projector_variant released takes its tower and its language model, with a fresh projector."


@dataclass(eq=False, repr=False)
class StoredTensor:
    """
    A tensor in a file.

    Args:
        file (`Path`): The file.
        name (`str`): Its name there.
        tensor (`torch.Tensor`): The tensor, mapped from the file.
    """

    file: Path
    name: str
    tensor: torch.Tensor

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"

    __repr__ = __str__


@dataclass
class Source:
    """What a checkpoint holds. Tensors are sorted by part, under the names that the part loads."""

    layout: str
    vision_config: PreTrainedConfig
    text_config: PreTrainedConfig
    image_processor: BaseImageProcessor
    text_folder: Path  # with the tokenizer and the language model's generation_config.json
    parts: dict[str, dict[str, StoredTensor]]
    projector: str  # "released" for Delta-LLaVA's, "residual" for LLaVA-1.5's, which is that variant's MLP
    scale_factor: int | None  # patches along one side of the cells that Delta-LLaVA was trained for
    query_feature_layer: int
    select_strategy: str | None  # whether the tower's first token is dropped, if a config.json says so
    is_padded: bool  # whether images are padded to squares
    sources: dict[str, str]


def read_source(
    checkpoint: str,
    revision: str | None,
    language_model: str | None,
    vision_tower: str | None,
    projector_variant: str | None,
    chat_template: str | Path | None,
) -> Source:
    """Recognizes the layout of a checkpoint, and reads what it holds."""
    folder = Path(checkpoint)
    if not folder.is_file():
        folder = _fetch(checkpoint, "checkpoint", revision)
    settings = {}
    if (folder / "config.json").exists():
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    if settings.get("model_type") == "llava" and "vision_config" in settings:
        if language_model or vision_tower:
            raise ValueError(
                f"checkpoint={checkpoint} is a LLaVA of transformers and holds its own parts: leave out "
                f"language_model={language_model} and vision_tower={vision_tower}."
            )
        return _read_llava_hf(checkpoint, folder, settings, projector_variant in (None, "residual"))
    weights = [] if folder.is_file() or "mm_vision_tower" not in settings else _read_weights(folder)
    projector_file = folder if folder.is_file() else folder / "mm_projector.bin"
    if not weights and not projector_file.exists():
        raise ValueError(
            f"checkpoint={checkpoint} is of no known layout: its config.json has model_type="
            f"{settings.get('model_type')!r}. Known are LLaVA of transformers (model_type 'llava' with a vision_config)"
            " and of the LLaVA code base, with mm_vision_tower in config.json and all weights or mm_projector.bin."
        )
    if settings.get("mm_use_im_start_end") and chat_template is None:
        raise ValueError(
            f"mm_use_im_start_end in the config.json of {checkpoint} puts tokens around each image: name a Jinja file"
            " that writes them with --chat_template."
        )
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
        raise ValueError(f"checkpoint={checkpoint} does not name its vision tower: name it with --vision_tower.")

    if weights:
        layout = "whole checkpoint of the LLaVA code base"
        text_config, text_folder = _text_config(checkpoint, settings), folder
        parts = _by_part(weights, _LLAVA_CODE_BASE)
    elif language_model is None:
        raise ValueError(
            f"{projector_file.name} of {checkpoint} holds only a projector: name the language model that it was"
            " trained with, with --language_model."
        )
    else:
        layout = "stage-1 projector of the LLaVA code base"
        text_folder = _fetch(language_model, "language_model")
        text_config = AutoConfig.from_pretrained(text_folder)
        parts = _by_part(_read_file(projector_file), _LLAVA_CODE_BASE)
        if other := parts.keys() - {"projector"}:
            raise ValueError(
                f"{projector_file} should hold only a projector, but also holds {brief_list(parts[min(other)])}."
            )
        parts |= _by_part(_required_weights(text_folder, language_model), _LANGUAGE_MODEL)
    projector, parts["projector"] = _recognize_projector(checkpoint, parts.get("projector", {}), settings)

    tower_folder = _fetch(tower, "vision_tower", weights="vision_tower" not in parts)
    vision_config = AutoConfig.from_pretrained(tower_folder)
    if "vision_tower" not in parts:
        parts |= _by_part(_required_weights(tower_folder, tower), _VISION_TOWER)
    return Source(
        layout=layout,
        vision_config=getattr(vision_config, "vision_config", vision_config),
        text_config=text_config,
        image_processor=AutoImageProcessor.from_pretrained(tower_folder),
        text_folder=text_folder,
        parts=parts,
        projector=projector,
        scale_factor=settings.get("scale_factor"),
        query_feature_layer=settings.get("mm_vision_select_layer", -2),
        select_strategy=None,
        is_padded=settings.get("image_aspect_ratio") == "pad",
        sources={
            "vision_tower": _public_name(tower),
            "language_model": _public_name(language_model or _base_model(settings, checkpoint)),
            "converted_from": checkpoint,
        },
    )


def _read_llava_hf(checkpoint: str, folder: Path, settings: dict, keeps_projector: bool) -> Source:
    config = AutoConfig.from_pretrained(folder)
    config.text_config.tie_word_embeddings |= config.tie_word_embeddings
    layer = config.vision_feature_layer
    layers = layer if isinstance(layer, (list, tuple)) else [layer]
    for field, found, allowed in (
        ("projector_hidden_act", config.projector_hidden_act, "gelu"),
        ("multimodal_projector_bias", config.multimodal_projector_bias, True),
        ("vision_feature_layer", len(layers), 1),
    ):
        if keeps_projector and found != allowed:
            raise ValueError(
                f"{field}={getattr(config, field)!r} in the config.json of {checkpoint} is not LLaVA-1.5's, whose"
                f" projector reads one layer, with two linear maps with biases and 'gelu' between them. {FRESH}"
            )
    parts = _by_part(_required_weights(folder, checkpoint), _LLAVA_HF)
    parts["projector"] = {_rename(name, _LLAVA_MLP): tensor for name, tensor in parts.get("projector", {}).items()}
    return Source(
        layout="LLaVA of transformers",
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_processor=AutoImageProcessor.from_pretrained(folder),
        text_folder=folder,
        parts=parts,
        projector="residual",
        scale_factor=None,
        query_feature_layer=layers[0] if keeps_projector else -2,
        select_strategy=config.vision_feature_select_strategy,
        is_padded=keeps_projector,
        sources={
            "vision_tower": _base_model(settings["vision_config"], checkpoint),
            "language_model": _base_model(settings.get("text_config", {}), checkpoint),
            "converted_from": checkpoint,
        },
    )


def _recognize_projector(
    checkpoint: str, stored: dict[str, StoredTensor], settings: dict
) -> tuple[str, dict[str, StoredTensor]]:
    """The variant that a projector belongs to, and its tensors by our names."""
    kind = settings.get("mm_projector_type")
    if "q_proj_1.shared_weight.weight" in stored:
        return "released", projector_from_released(stored)
    renamed = {_rename(name, _LLAVA_MLP): tensor for name, tensor in stored.items()}
    # Conversion names every tensor that is missing here, unless a fresh projector is asked for
    if renamed.keys() <= {f"mlp.{layer}.{name}" for layer in "02" for name in ("weight", "bias")} and kind in (
        None,
        "mlp2x_gelu",
    ):
        return "residual", renamed
    raise ValueError(
        f"checkpoint={checkpoint} holds neither Delta-LLaVA's projector, which has q_proj_1.shared_weight.weight, nor"
        f" LLaVA-1.5's 'mlp2x_gelu': its mm_projector_type is {kind!r}, and its projector's weights are"
        f" {brief_list(stored)}."
    )


def projector_from_released(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of a published projector, whose names lack a checkpoint's prefix `model.mm_projector.`, to those
    that `DeltaProjector` loads with `strict=True`.

    Raises:
        ValueError: If a name is not one of the published projector's.
    """
    for name in state_dict:
        if not any(re.match(published, name) for published in _RENAMED):
            raise ValueError(
                f"{name!r} is not a weight of the published projector, whose names begin with"
                " q_proj_1, k_proj_1, v_proj_1, clip_attn, mlp or combined_block.ntb."
            )
    return {_rename(name, _RENAMED): tensor for name, tensor in state_dict.items()}


def _text_config(checkpoint: str, settings: dict) -> PreTrainedConfig:
    """The language model's configuration, which LLaVA's code base mixes with its own settings."""
    family = settings["model_type"].removeprefix("llava").removeprefix("_")
    model_type = {"": "llama", "qwen": "qwen2"}.get(family, family)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type={settings['model_type']!r} in the config.json of {checkpoint} names no language model that"
            " transformers knows, as 'llava_llama', 'llava_qwen2' and 'llava_seed_oss' do."
        )
    # Old files also hold arguments of `generate` and names of classes: only the family's own fields count
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
    return CONFIG_MAPPING[model_type](**{field: value for field, value in settings.items() if field in known})


def _base_model(settings: dict, checkpoint: str) -> str:
    """What a model was trained from, if that is the name of a repository; otherwise the checkpoint itself."""
    name = settings.get("_name_or_path") or ""
    return name if is_repository(name) else checkpoint


def _public_name(name: str) -> str:
    """The last name of a path on another machine; [`write_sources`] does so for paths on this one."""
    return name if Path(name).exists() or is_repository(name) else Path(name).name


def _fetch(name: str, argument: str, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of that name, or the needed files of the repository, in the cache."""
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{argument}={name} is not a folder here, and cannot be the name of a repository.") from None
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=_SMALL_FILES))
    # The first format that exists: the same weights are not fetched twice
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "mm_projector.bin") if weights else ():
        snapshot_download(name, revision=revision, allow_patterns=pattern)
        if any(folder.glob(pattern)):
            break
    return folder


def _read_weights(folder: Path) -> list[StoredTensor]:
    """All tensors of a model's files, in the first format that exists, if any."""
    for single in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        if (folder / single).exists() or (folder / f"{single}.index.json").exists():
            return [tensor for name in weight_files(folder, single) for tensor in _read_file(folder / name)]
    return []


def _required_weights(folder: Path, name: str) -> list[StoredTensor]:
    weights = _read_weights(folder)
    if not weights:
        raise ValueError(
            f"{name} holds no weights: {SAFE_WEIGHTS_NAME}, {WEIGHTS_NAME} or an index of several is needed."
        )
    return weights


def _read_file(file: Path) -> list[StoredTensor]:
    try:
        tensors = load_state_dict(file, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{file} is refused, because it holds more than tensors and could run code when read (torch.load with"
            " weights_only=True). Ask its author for safetensors."
        ) from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} should hold a dict of tensors.")
    return [StoredTensor(file, name, tensor) for name, tensor in tensors.items()]


def _by_part(tensors: list[StoredTensor], beginnings: dict[str, str]) -> dict[str, dict[str, StoredTensor]]:
    """Sorts tensors by part; two that a part would load by the same name are an error."""
    parts = {}
    for tensor in tensors:
        part, _, name = _rename(tensor.name, beginnings).partition(".")
        if twin := parts.setdefault(part, {}).get(name):
            raise ValueError(f"{tensor} and {twin} are the same weight: only one can be used.")
        parts[part][name] = tensor
    return parts


def _rename(name: str, beginnings: dict[str, str]) -> str:
    for beginning, ours in beginnings.items():
        if match := re.match(beginning, name):
            return match.expand(ours) + name[match.end() :]
    return name
