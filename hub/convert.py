"""
Converts published checkpoints into Hub layout.

```
python -m delta_llava.hub.convert --checkpoint llava-hf/llava-1.5-7b-hf --output_dir checkpoints/llava-1.5-7b
```

The kind of checkpoint is read from its files:

- LLaVA-1.5, of transformers (the organisation llava-hf on the Hub) or of the LLaVA code base
  (`liuhaotian/llava-v1.5-7b`). Its projector is kept, as the MLP of the `residual` variant, whose attention adds
  nothing yet: without any training the result is that LLaVA-1.5 at all patches, and LLaVA-1.5 on pooled features at
  fewer tokens. With `--projector_variant released` (or `paper`) a fresh projector replaces it, to be trained from
  stage 1 on.
- A whole checkpoint of Delta-LLaVA's authors, whose code is the LLaVA code base.
- A projector saved by stage 1 of that code base (`mm_projector.bin`, the file or its folder), of either kind. It needs
  `--language_model`, the model that it was trained with.

A checkpoint of the LLaVA code base has its own tower, or names one as `mm_vision_tower` in its config.json;
`--vision_tower` says where that is now. Weights are read from safetensors or PyTorch files, the latter with
`torch.load(weights_only=True)`. Only safetensors are written. The model is in memory once.
"""

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import (
    AddedToken,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..configuration_delta_llava import DeltaLlavaConfig
from ..llava import fit_spaces, pad_to_square
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaProjector, brief_list
from ..processing_delta_llava import DeltaLlavaProcessor
from ..weights import check_finite
from . import parts
from .layouts import FRESH, Source, StoredTensor, projector_from_released, read_source


__all__ = ["Conversion", "StoredTensor", "convert", "main", "projector_from_released"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Conversion:
    """
    What became of every tensor.

    Args:
        layout (`str`): Kind of the checkpoint.
        config (`DeltaLlavaConfig`): The configuration as saved.
        used (`dict[str, list[StoredTensor]]`): Tensors that `"vision_tower"`, `"projector"` and `"language_model"` were
            loaded from.
        fresh (`list[str]`): The projector's weights that no file held, which were initialized instead.
        left (`dict[StoredTensor, str]`): Tensors that the new checkpoint does not use, and why.
    """

    layout: str
    config: DeltaLlavaConfig
    used: dict[str, list[StoredTensor]]
    fresh: list[str]
    left: dict[StoredTensor, str]


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

    The new checkpoint is written to `output_dir` + `.incomplete`, loaded from there to compare its logits with the
    language model's own, then renamed.

    Args:
        checkpoint (`str` or `Path`): Folder, `mm_projector.bin` or Hub repository.
        output_dir (`str` or `Path`): New or empty folder for the new checkpoint.
        language_model (`str`, *optional*): Folder or Hub repository of the language model that a stage-1 projector was
            trained with. For a whole checkpoint, the name of its base model, if config.json does not have it.
        vision_tower (`str`, *optional*): Folder or Hub repository of the vision tower, instead of the one in
            config.json.
        num_visual_tokens (`list[int]`, *optional*): Budgets of a Delta-LLaVA whose config.json has no `scale_factor`,
            or those that a fresh projector will be trained for (by default the configuration's default). LLaVA-1.5's
            own projector was trained for all patches.
        projector_variant (`str`, *optional*): `"residual"` keeps LLaVA-1.5's projector, `"released"` and `"paper"`
            replace it by a fresh one. Defaults to `"residual"` for LLaVA-1.5; Delta-LLaVA's is `"released"`.
        chat_template (`str` or `Path`, *optional*): Jinja file. Needed if the family of the language model has none
            here (Vicuna v1 for Llama, ChatML for Qwen) or the checkpoint has a different one.
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
            could run code when read, a tensor is missing, misshapen, unknown or not finite, the tokenizer has no
            vocabulary, or an option is missing or contradicts the checkpoint.
    """
    checkpoint = str(checkpoint)
    with parts.new_folder(output_dir) as folder:
        source = read_source(checkpoint, revision, language_model, vision_tower, projector_variant, chat_template)
        variant = projector_variant or source.projector
        if source.projector == "released" != variant:
            raise ValueError(
                f"projector_variant={variant} contradicts checkpoint={checkpoint}, which holds Delta-LLaVA's own"
                " projector, of the variant 'released': leave the option out."
            )
        processor, config, generation_config = _configure(checkpoint, source, variant, num_visual_tokens, chat_template)
        left = _leave_unused(source, config, keeps_projector=variant == source.projector)
        model, expected, fresh = _load(checkpoint, source, config, processor.tokenizer, dtype, seed)
        if head := config.tie_word_embeddings and source.parts["language_model"].pop("lm_head.weight", None):
            left[head] = "tied to the embeddings"
        model.generation_config = generation_config
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        parts.write_sources(folder, **source.sources)
        used = {part: [*tensors.values()] for part, tensors in source.parts.items()}
        del model  # memory is for one language model
        model = DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
        parts.check_logits(model, processor.tokenizer, expected)
    return Conversion(source.layout, model.config, used, fresh, left)


def _configure(
    checkpoint: str,
    source: Source,
    variant: str,
    num_visual_tokens: list[int] | None,
    chat_template: str | Path | None,
) -> tuple[DeltaLlavaProcessor, DeltaLlavaConfig, GenerationConfig]:
    """The new checkpoint without its weights."""
    try:
        # The configuration is given, because config.json may name a model type that transformers does not know
        tokenizer = AutoTokenizer.from_pretrained(source.text_folder, config=source.text_config)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"The tokenizer of {checkpoint} cannot be read: {error} A tokenizer.model without a tokenizer.json needs"
            " `pip install sentencepiece protobuf`."
        ) from error
    template = parts.find_chat_template(source.text_config, chat_template, tokenizer)
    parts.add_tokens(tokenizer)
    # If the tokenizer already had `<image>`, it may be one that swallows the spaces around it
    tokenizer.add_tokens(AddedToken(DeltaLlavaProcessor.image_token, normalized=False), special_tokens=True)
    config = parts.build_config(
        source.vision_config,
        source.text_config,
        tokenizer,
        _budgets(checkpoint, source, variant, num_visual_tokens),
        query_feature_layer=source.query_feature_layer,
        projector_variant=variant,
    )
    patches_alone = config.vision_feature_select_strategy
    has_registers = getattr(source.vision_config, "num_register_tokens", 0)  # which LLaVA takes for patches
    if variant == "residual" and (has_registers or source.select_strategy not in (None, patches_alone)):
        raise ValueError(
            f"vision_feature_select_strategy={source.select_strategy!r} in the config.json of {checkpoint} does not"
            f" select the patches of its {config.vision_config.model_type}; only {patches_alone!r} is supported."
            f" {FRESH}"
        )
    image_processor = pad_to_square(source.image_processor) if source.is_padded else source.image_processor
    processor = parts.build_processor(image_processor, tokenizer, fit_spaces(template, tokenizer), config)
    return processor, config, parts.build_generation_config(source.text_folder, source.text_config, tokenizer, template)


def _budgets(checkpoint: str, source: Source, variant: str, num_visual_tokens: list[int] | None) -> list[int] | None:
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
                f"checkpoint={checkpoint} has no scale_factor in a config.json: say with --num_visual_tokens how many"
                " visual tokens per image it was trained for."
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


def _leave_unused(source: Source, config: DeltaLlavaConfig, keeps_projector: bool) -> dict[StoredTensor, str]:
    """Removes from the parts what the new checkpoint does not use; returns it with the reasons."""
    num_layers, last = source.vision_config.num_hidden_layers, config.vision_config.num_hidden_layers

    def reason_to_leave(part: str, name: str) -> str | None:
        if part == "text_half":
            return "the contrastive model's other half"
        if part == "projector" and not keeps_projector:
            return "LLaVA-1.5's projector: a fresh one replaces it"
        if name.endswith(("rotary_emb.inv_freq", "embeddings.position_ids")):
            return "buffer computed from the configuration"
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
    checkpoint: str,
    source: Source,
    config: DeltaLlavaConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    seed: int,
) -> tuple[DeltaLlavaForConditionalGeneration, torch.Tensor, list[str]]:
    """Loads and joins the parts; returns the model, the language model's logits, and what no file held."""
    sizes = Counter()
    for part, tensors in source.parts.items():
        for stored in tqdm(tensors.values(), desc=f"checking the {part.replace('_', ' ')}", unit=" tensors"):
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
    language = _load_part(AutoModelForCausalLM, source.text_config, source, "language_model", dtype, problems)
    tower = _load_part(AutoModel, config.vision_config, source, "vision_tower", dtype, problems)
    stored = source.parts["projector"]
    with torch.device("meta"):
        expected = DeltaProjector(config).state_dict()
    fresh = [name for name in expected if name not in stored]
    needed = "mlp." if config.projector_variant == "residual" else ""
    if config.projector_variant == source.projector:
        problems += [f"nothing was found for projector.{name}" for name in fresh if name.startswith(needed)]
    for name, tensor in stored.items():
        if name not in expected:
            problems.append(f"the new checkpoint has no place for {tensor}")
        elif tensor.tensor.shape != expected[name].shape:
            problems.append(_misshapen(tensor, expected[name].shape))
    if problems:
        raise ValueError(f"{checkpoint} cannot be converted: {brief_list(problems, '; ')}.")
    if source.text_config.tie_word_embeddings and (
        language.get_output_embeddings().weight is not language.get_input_embeddings().weight
    ):
        raise ValueError(
            f"lm_head.weight of {checkpoint} differs from the embeddings, though tie_word_embeddings in its config.json"
            " is true."
        )
    expected_logits = parts.text_logits(language, tokenizer)
    config.dtype = config.vision_config.dtype = config.text_config.dtype = dtype
    set_seed(seed)
    model = parts.join(config, tower, language)
    projector = {name: tensor.tensor for name, tensor in stored.items()}
    model.model.multi_modal_projector.load_state_dict(projector, strict=False)
    if set(sizes) != {dtype}:
        for name, weight in model.state_dict().items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} does not fit into {dtype}: choose a wider one with --dtype.")
    return model, expected_logits, fresh


def _load_part(
    auto_class: type,
    config: PreTrainedConfig,
    source: Source,
    part: str,
    dtype: torch.dtype,
    problems: list[str],
) -> PreTrainedModel:
    stored = source.parts[part]
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
        # The loader gives a base model's names with its prefix
        tensor = stored.get(name) or stored[name.removeprefix(f"{model.base_model_prefix}.")]
        problems.append(_misshapen(tensor, shape))
    problems += [f"the new checkpoint has no place for {stored[name]}" for name in sorted(info["unexpected_keys"])]
    return model


def _misshapen(tensor: StoredTensor, shape: torch.Size) -> str:
    return f"{tensor} has shape {tuple(tensor.tensor.shape)} instead of {tuple(shape)}"


def _report(conversion: Conversion) -> str:
    """Every tensor that was left out, then the parts made of the others."""

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
    parser.add_argument("--language_model", help="folder or repository: what mm_projector.bin was trained with")
    parser.add_argument("--vision_tower", help="folder or repository (default: mm_vision_tower in config.json)")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="budgets, of Delta-LLaVA without scale_factor")
    parser.add_argument(
        "--projector_variant",
        choices=["residual", "released", "paper"],
        help="for LLaVA-1.5: residual keeps its projector (default), the others replace it by a fresh one",
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
