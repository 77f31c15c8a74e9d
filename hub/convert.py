"""
Converts published checkpoints into Hub layout.

```
python -m delta_llava.hub.convert --checkpoint llava-hf/llava-1.5-7b-hf --output_dir checkpoints/llava-1.5-7b
```

What the checkpoint is, its files say:

- LLaVA-1.5, of transformers (the organisation llava-hf on the Hub) or of the LLaVA code base
  (`liuhaotian/llava-v1.5-7b`). Its projector is kept, as the MLP of the `residual` variant with a gate of zero: without
  any training the result is that LLaVA-1.5 at all patches, and LLaVA-1.5 on pooled features below. With
  `--projector_variant released` (or `paper`) a fresh projector takes its place, to be trained from stage 1 on.
- A whole checkpoint of Delta-LLaVA's authors, whose code is the LLaVA code base.
- A projector that stage 1 of that code base has saved (`mm_projector.bin`, the file or its folder), of either kind. It
  needs `--language_model`, the model that it was trained with.

A checkpoint of the LLaVA code base has a tower of its own, or names one as `mm_vision_tower` in its config.json;
`--vision_tower` says where that is now. Weights are read from safetensors or PyTorch files, the latter by
`torch.load(weights_only=True)`. Only safetensors are written. Memory holds the model once.
"""

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from ..configuration_delta_llava import DeltaLlavaConfig
from ..llava import fit_spaces, pad_to_square
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaProjector
from ..processing_delta_llava import DeltaLlavaProcessor
from ..weights import check_finite, weight_files
from .assemble import add_tokens, build_config, check_image_size, find_chat_template, is_repository, join, write_sources


# For each layout the beginnings of its tensors' names (the first that matches counts) and the part that loads such a
# tensor, by the rest of its name. Towers of older transformers carry one prefix more, `vision_model.`.
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
# LLaVA-1.5's projector as transformers and as its code base name it
_LLAVA_MLP = {r"(?:linear_1|0)\.": "mlp.0.", r"(?:linear_2|2)\.": "mlp.2."}
# Delta-LLaVA's as its authors name it, in the order of its steps
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

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Of a repository: all but the weights
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_FRESH = "--projector_variant released takes its tower and its language model, and a fresh projector."


@dataclass(eq=False, repr=False)
class StoredTensor:
    """
    A tensor in a file.

    Args:
        file (`Path`): The file.
        name (`str`): Its name there.
        tensor (`torch.Tensor`): What it holds, mapped from the file.
    """

    file: Path
    name: str
    tensor: torch.Tensor

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"

    __repr__ = __str__


@dataclass
class Conversion:
    """
    What became of every tensor.

    Args:
        layout (`str`): What the checkpoint was found to be.
        config (`DeltaLlavaConfig`): The configuration as saved.
        used (`dict[str, list[StoredTensor]]`): Those that `"vision_tower"`, `"projector"` and `"language_model"` were
            loaded from.
        fresh (`list[str]`): The projector's weights that no file held and that were initialized instead.
        left (`dict[StoredTensor, str]`): Tensors that the new checkpoint has no use for, and why.
    """

    layout: str
    config: DeltaLlavaConfig
    used: dict[str, list[StoredTensor]]
    fresh: list[str]
    left: dict[StoredTensor, str]


@dataclass
class _Source:
    """What was found in a checkpoint. Tensors are sorted by part, under the names that the part loads them by."""

    layout: str
    vision_config: PreTrainedConfig
    text_config: PreTrainedConfig
    image_processor: BaseImageProcessor
    text_folder: Path  # with the tokenizer and the language model's generation_config.json
    parts: dict[str, dict[str, StoredTensor]]
    projector: str  # "released" for Delta-LLaVA's, "residual" for LLaVA-1.5's, which is that variant's MLP
    scale_factor: int | None  # patches along one side of the cells that Delta-LLaVA was trained for
    query_feature_layer: int
    select_strategy: str | None  # what becomes of the tower's first token, where a config.json says it
    is_padded: bool  # whether images are padded to squares
    sources: dict[str, str]


def convert(
    checkpoint: str | Path,
    output_dir: str | Path,
    language_model: str | None = None,
    vision_tower: str | None = None,
    num_visual_tokens: list[int] | None = None,
    projector_variant: str | None = None,
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
            trained with. For a whole checkpoint it is the name of its base model, if config.json does not have it.
        vision_tower (`str`, *optional*): Folder or Hub repository of the vision tower, in place of the name in
            config.json.
        num_visual_tokens (`list[int]`, *optional*): Budgets of a Delta-LLaVA whose config.json has no `scale_factor`,
            or those that a fresh projector will be trained for (without them, the configuration's default). LLaVA-1.5's
            own projector was trained for all patches.
        projector_variant (`str`, *optional*): `"residual"` keeps LLaVA-1.5's projector, `"released"` and `"paper"` put
            a fresh one in its place. Defaults to `"residual"` for LLaVA-1.5; Delta-LLaVA's is `"released"`.
        chat_template (`str` or `Path`, *optional*): Jinja file. Needed where the family of the language model has none
            here (Vicuna v1 for Llama, ChatML for Qwen), or the checkpoint brings another one.
        dtype (`str`, *optional*, defaults to `"auto"`): `"float32"`, `"float16"`, `"bfloat16"`, or `"auto"` for that of
            most of the language model's weights.
        seed (`int`, *optional*, defaults to 0): Seed of the weights that no file holds.
        revision (`str`, *optional*): Branch, tag or commit of `checkpoint`, if it is a repository.
        max_shard_size (`int` or `str`, *optional*, defaults to `"5GB"`): Largest file to write, in bytes or with a
            unit.

    Returns:
        `Conversion`: What became of every tensor.

    Raises:
        ValueError: If `output_dir` holds files, `checkpoint` is of no known layout or holds another projector, a file
            could run code when read, a tensor is missing, misshapen, unknown or not finite, or an option is missing or
            contradicts the checkpoint.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} holds files already: name a new or an empty folder.")
    checkpoint = str(checkpoint)
    source = _read_source(checkpoint, revision, language_model, vision_tower, projector_variant, chat_template)
    variant = projector_variant or source.projector
    if source.projector == "released" != variant:
        raise ValueError(
            f"projector_variant={variant} contradicts checkpoint={checkpoint}, which holds Delta-LLaVA's own projector,"
            " of the variant 'released': leave the option out."
        )
    template, end_of_turn = find_chat_template(source.text_config, chat_template)
    try:
        # The configuration is given, because config.json may name a model type that transformers does not know
        tokenizer = AutoTokenizer.from_pretrained(source.text_folder, config=source.text_config)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of {checkpoint} cannot be read: {error} A tokenizer.model without a tokenizer.json needs"
            " `pip install sentencepiece protobuf`."
        ) from error
    if chat_template is None:
        _check_own_template(checkpoint, template, tokenizer)
    add_tokens(tokenizer)
    # An `<image>` that was there already may be one that swallows the spaces around it
    tokenizer.add_tokens(AddedToken(DeltaLlavaProcessor.image_token, normalized=False), special_tokens=True)
    config = build_config(
        source.vision_config,
        source.text_config,
        tokenizer,
        _budgets(checkpoint, source, variant, num_visual_tokens),
        query_feature_layer=source.query_feature_layer,
        projector_variant=variant,
    )
    patches_alone = config.vision_feature_select_strategy
    if variant == "residual" and source.select_strategy not in (None, patches_alone):
        raise ValueError(
            f"vision_feature_select_strategy={source.select_strategy!r} in the config.json of {checkpoint} is not what"
            f" leaves a {config.vision_config.model_type}'s patches alone, {patches_alone!r}. {_FRESH}"
        )
    processor = DeltaLlavaProcessor(
        image_processor=pad_to_square(source.image_processor) if source.is_padded else source.image_processor,
        tokenizer=tokenizer,
        num_visual_tokens=config.num_visual_tokens,
        patch_grid_size=config.patch_grid_size,
        chat_template=fit_spaces(template, tokenizer),
    )
    check_image_size(processor, config)

    left = _leave(source, config, keeps_projector=variant == source.projector)
    model, fresh = _load(checkpoint, source, config, dtype, seed)
    if head := config.tie_word_embeddings and source.parts["language_model"].pop("lm_head.weight", None):
        left[head] = "tied to the embeddings"
    end_tokens = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn or tokenizer.eos_token)}
    if (source.text_folder / GENERATION_CONFIG_NAME).exists():
        own = GenerationConfig.from_pretrained(source.text_folder).eos_token_id
        end_tokens |= set(own if isinstance(own, list) else [own]) - {None}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(end_tokens), pad_token_id=tokenizer.pad_token_id
    )

    incomplete = output_dir.with_name(f"{output_dir.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    model.save_pretrained(incomplete, max_shard_size=max_shard_size)
    processor.save_pretrained(incomplete)
    write_sources(incomplete, **source.sources)
    if output_dir.exists():
        output_dir.rmdir()
    incomplete.rename(output_dir)
    return Conversion(
        source.layout, model.config, {part: [*tensors.values()] for part, tensors in source.parts.items()}, fresh, left
    )


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
    for name in state_dict:
        if not any(re.match(published, name) for published in _RENAMED):
            raise ValueError(
                f"{name!r} is no weight of the published projector, whose names begin with"
                " q_proj_1, k_proj_1, v_proj_1, clip_attn, mlp or combined_block.ntb."
            )
    return {_rename(name, _RENAMED): tensor for name, tensor in state_dict.items()}


def _read_source(
    checkpoint: str,
    revision: str | None,
    language_model: str | None,
    vision_tower: str | None,
    projector_variant: str | None,
    chat_template: str | Path | None,
) -> _Source:
    """Finds the layout of a checkpoint by its files, and what it holds."""
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
        return _read_llava_hf(checkpoint, folder, settings, projector_variant in (None, "residual"))
    weights = [] if folder.is_file() or "mm_vision_tower" not in settings else _read_weights(folder)
    projector_file = folder if folder.is_file() else folder / "mm_projector.bin"
    if not weights and not projector_file.exists():
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
        raise ValueError(f"checkpoint={checkpoint} does not name its vision tower: name it by --vision_tower.")

    if weights:
        layout = "whole checkpoint of the LLaVA code base"
        text_config, text_folder = _text_config(checkpoint, settings), folder
        parts = _by_part(weights, _LLAVA_CODE_BASE)
    elif language_model is None:
        raise ValueError(
            f"{projector_file.name} of {checkpoint} holds a projector alone: name the language model that it was"
            " trained with by --language_model."
        )
    else:
        layout = "stage-1 projector of the LLaVA code base"
        text_folder = _fetch(language_model, "language_model")
        text_config = AutoConfig.from_pretrained(text_folder)
        parts = _by_part(_read_file(projector_file), _LLAVA_CODE_BASE)
        if other := parts.keys() - {"projector"}:
            raise ValueError(
                f"{projector_file} should hold a projector alone, but holds {_few(parts[min(other)])} too."
            )
        parts |= _by_part(_required_weights(text_folder, language_model), _LANGUAGE_MODEL)
    projector, parts["projector"] = _recognize_projector(checkpoint, parts.get("projector", {}), settings)

    tower_folder = _fetch(tower, "vision_tower", weights="vision_tower" not in parts)
    vision_config = AutoConfig.from_pretrained(tower_folder)
    if "vision_tower" not in parts:
        parts |= _by_part(_required_weights(tower_folder, tower), _VISION_TOWER)
    return _Source(
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


def _read_llava_hf(checkpoint: str, folder: Path, settings: dict, keeps_projector: bool) -> _Source:
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
                f" projector reads one layer, by two maps with biases and 'gelu' between them. {_FRESH}"
            )
    parts = _by_part(_required_weights(folder, checkpoint), _LLAVA_HF)
    parts["projector"] = {_rename(name, _LLAVA_MLP): tensor for name, tensor in parts.get("projector", {}).items()}
    return _Source(
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
    if renamed.keys() == {f"mlp.{layer}.{name}" for layer in "02" for name in ("weight", "bias")} and kind in (
        None,
        "mlp2x_gelu",
    ):
        return "residual", renamed
    raise ValueError(
        f"checkpoint={checkpoint} holds neither Delta-LLaVA's projector, which has q_proj_1.shared_weight.weight, nor"
        f" LLaVA-1.5's 'mlp2x_gelu': its mm_projector_type is {kind!r}, and its projector's weights are {_few(stored)}."
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


def _budgets(checkpoint: str, source: _Source, variant: str, num_visual_tokens: list[int] | None) -> list[int] | None:
    """The budgets that the projector was trained for; those of a fresh one are the caller's."""
    if variant != source.projector:
        return num_visual_tokens
    grid_size = DeltaLlavaConfig(
        vision_config=source.vision_config, query_feature_layer=source.query_feature_layer
    ).patch_grid_size
    scale_factor = 1 if variant == "residual" else source.scale_factor
    if scale_factor is None:
        if num_visual_tokens is None:
            raise ValueError(
                f"checkpoint={checkpoint} has no scale_factor in a config.json: name the visual tokens per image that"
                " it was trained for by --num_visual_tokens."
            )
        return num_visual_tokens
    if grid_size % scale_factor:
        raise ValueError(
            f"scale_factor={scale_factor} in the config.json of {checkpoint} does not divide the vision tower's grid of"
            f" {grid_size}x{grid_size} patches."
        )
    budgets = [(grid_size // scale_factor) ** 2]
    if num_visual_tokens not in (None, budgets):
        reason = (
            f"scale_factor={scale_factor} in the config.json of {checkpoint}"
            if variant == "released"
            else f"{checkpoint}, whose projector was trained for every patch"
        )
        raise ValueError(
            f"num_visual_tokens={num_visual_tokens} contradicts {reason}, which makes {budgets[0]} tokens of"
            f" {grid_size}x{grid_size} patches: leave the option out."
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


def _check_own_template(checkpoint: str, template: str, tokenizer: PreTrainedTokenizerBase):
    """Where our template is Vicuna's, raises a `ValueError` if a tokenizer brings one that asks otherwise."""
    if tokenizer.chat_template is None or "USER: " not in template:
        return
    content = [{"type": "text", "text": "Why?"}]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    if not re.search(r"USER:\s*Why\?", asked):
        raise ValueError(
            f"checkpoint={checkpoint} brings a chat template of its own, by which a question reads {asked!r}, and not"
            " as Vicuna's: name the Jinja file to use by --chat_template."
        )


def _read_weights(folder: Path) -> list[StoredTensor]:
    """All tensors of a model's files, of the first format that there is; none if there is none."""
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
            f"{file} is refused, because it holds more than tensors and could run code when it is read"
            " (torch.load with weights_only=True). Ask whoever made it for safetensors."
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


def _leave(source: _Source, config: DeltaLlavaConfig, keeps_projector: bool) -> dict[StoredTensor, str]:
    """Takes out of the parts what the new checkpoint has no use for, and says why."""
    num_layers, last = source.vision_config.num_hidden_layers, config.vision_config.num_hidden_layers

    def reason_to_leave(part: str, name: str) -> str | None:
        if part == "text_half":
            return "the contrastive model's other half"
        if part == "projector" and not keeps_projector:
            return "LLaVA-1.5's projector: a fresh one takes its place"
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            return "buffer that is computed from the configuration"
        layer = re.match(r".*layers?\.(\d+)\.", name)
        if part == "vision_tower" and layer and last <= int(layer[1]) < num_layers:
            return f"layer after the tower's layer {last}, the last one that is read"
        if part == "vision_tower" and name.startswith("head.") and hasattr(config.vision_config, "vision_use_head"):
            return "pooling head of the tower, which nothing reads"
        return None

    left = {}
    for part, tensors in source.parts.items():
        for name in list(tensors):
            if reason := reason_to_leave(part, name):
                left[tensors.pop(name)] = reason
    source.parts.pop("text_half", None)
    return left


def _load(
    checkpoint: str, source: _Source, config: DeltaLlavaConfig, dtype: str, seed: int
) -> tuple[DeltaLlavaForConditionalGeneration, list[str]]:
    """Loads the parts and joins them; returns the model, and the projector's weights that no file held."""
    sizes = Counter()
    for part, tensors in source.parts.items():
        for stored in tensors.values():
            if stored.tensor.dtype not in _DTYPES.values():
                raise ValueError(
                    f"{stored} has dtype {stored.tensor.dtype} instead of one of {list(_DTYPES)}: quantized checkpoints"
                    " cannot be converted."
                )
            check_finite(stored.name, stored.tensor, stored.file)
            sizes[stored.tensor.dtype] += stored.tensor.numel() * (part == "language_model")
    if dtype not in ("auto", *_DTYPES):
        raise ValueError(f"dtype={dtype} must be 'auto' or one of {list(_DTYPES)}.")
    dtype = sizes.most_common(1)[0][0] if dtype == "auto" else _DTYPES[dtype]

    problems = []
    language = _load_part(AutoModelForCausalLM, source.text_config, source.parts, "language_model", dtype, problems)
    tower = _load_part(AutoModel, config.vision_config, source.parts, "vision_tower", dtype, problems)
    stored = source.parts["projector"]
    with torch.device("meta"):
        expected = DeltaProjector(config).state_dict()
    fresh = [name for name in expected if name not in stored]
    needed = "mlp." if config.projector_variant == "residual" else ""
    if stored:
        problems += [f"nothing was found for projector.{name}" for name in fresh if name.startswith(needed)]
    for name, tensor in stored.items():
        if name not in expected:
            problems.append(f"the new checkpoint has no place for {tensor}")
        elif tensor.tensor.shape != expected[name].shape:
            problems.append(_misshapen(tensor, expected[name].shape))
    if problems:
        raise ValueError(f"{checkpoint} cannot be converted: {_few(problems, '; ')}.")
    if source.text_config.tie_word_embeddings and (
        language.get_output_embeddings().weight is not language.get_input_embeddings().weight
    ):
        raise ValueError(
            f"lm_head.weight of {checkpoint} differs from the embeddings, though tie_word_embeddings in its config.json"
            " is true."
        )
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype
    set_seed(seed)
    model = join(config, tower, language)
    projector = {name: tensor.tensor for name, tensor in stored.items()}
    model.model.multi_modal_projector.load_state_dict(projector, strict=False)
    if set(sizes) != {dtype}:
        for name, weight in model.state_dict().items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} does not fit into {dtype}: name a wider one by --dtype.")
    return model, fresh


def _load_part(
    auto_class: type,
    config: PreTrainedConfig,
    parts: dict[str, dict[str, StoredTensor]],
    part: str,
    dtype: torch.dtype,
    problems: list[str],
) -> PreTrainedModel:
    stored = parts[part]
    with torch.device("meta"):
        model_class = type(auto_class.from_config(config))
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict={name: tensor.tensor for name, tensor in stored.items()},
        dtype=dtype,
        ignore_mismatched_sizes=True,  # to name them all
        output_loading_info=True,
    )
    problems += [f"nothing was found for {part}.{name}" for name in sorted(info["missing_keys"])]
    for name, _, shape in sorted(info["mismatched_keys"]):
        # Of a base model's names the loader knows the prefix
        tensor = stored.get(name) or stored[name.removeprefix(f"{model.base_model_prefix}.")]
        problems.append(_misshapen(tensor, shape))
    problems += [f"the new checkpoint has no place for {stored[name]}" for name in sorted(info["unexpected_keys"])]
    return model


def _misshapen(tensor: StoredTensor, shape: torch.Size) -> str:
    return f"{tensor} has shape {tuple(tensor.tensor.shape)} instead of {tuple(shape)}"


def _few(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    more = f"{separator}and {len(names) - 4} more" if len(names) > 4 else ""
    return separator.join(names[:4]) + more or "none"


def _report(conversion: Conversion) -> str:
    """Every tensor that was left, then the parts that the others make."""

    def line(label: str, tensors: list[StoredTensor]) -> str:
        megabytes = sum(stored.tensor.nbytes for stored in tensors) / 1e6
        return f"{label:22} {len(tensors):>5} tensors {megabytes:>12,.1f} MB"

    lines = []
    for reason in dict.fromkeys(conversion.left.values()):
        tensors = [tensor for tensor, why in conversion.left.items() if why == reason]
        lines += [f"  {tensor}" for tensor in tensors] + [f"{line('left', tensors)}  {reason}"]
    for part, tensors in conversion.used.items():
        dtypes = sorted({str(stored.tensor.dtype).removeprefix("torch.") for stored in tensors})
        lines.append(f"{line(part.replace('_', ' '), tensors)}  {', '.join(dtypes)}")
    if conversion.fresh:
        lines.append(f"{'projector, fresh':22} {len(conversion.fresh):>5} tensors")
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder, mm_projector.bin or repository to convert")
    parser.add_argument("--output_dir", required=True, help="new folder for the checkpoint")
    parser.add_argument("--language_model", help="folder or repository: the one that mm_projector.bin was trained with")
    parser.add_argument("--vision_tower", help="folder or repository (default: mm_vision_tower in config.json)")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="budgets, of Delta-LLaVA without scale_factor")
    parser.add_argument(
        "--projector_variant",
        choices=["residual", "released", "paper"],
        help="what LLaVA-1.5 gets: residual keeps its projector (default), the others put a fresh one in its place",
    )
    parser.add_argument("--chat_template", help="Jinja file, for families other than Llama and Qwen")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the language model's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights that no file holds")
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
