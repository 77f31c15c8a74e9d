r"""
Joins a vision tower and a causal language model into an untrained Delta-LLaVA in Hub layout, ready for stage 1.

```
python -m delta_llava.hub.assemble \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --language_model lmsys/vicuna-7b-v1.5 \
    --output_dir checkpoints/delta-llava-vicuna-7b \
    --num_visual_tokens 144
```

Several budgets, `--num_visual_tokens 1 4 16 36 144`, are those that one elastic checkpoint will be trained for. The
projector is the `residual` one; the paper's are a matter of the configuration:
`--config_overrides '{"projector_variant": "released"}'`, or `"paper"`.
"""

import argparse
import json
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoImageProcessor,
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
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaProjector
from ..processing_delta_llava import DeltaLlavaProcessor


TEMPLATES = Path(__file__).parents[1] / "templates"
# The chat template of a language model's family, and the token that ends a turn in it (None: the tokenizer's own).
FAMILIES = {
    "llama": ("vicuna-v1.jinja", None),
    "qwen2": ("chatml.jinja", "<|im_end|>"),
    "qwen3": ("chatml.jinja", "<|im_end|>"),
}


def assemble(
    vision_tower: str,
    language_model: str,
    output_dir: str | Path,
    num_visual_tokens: list[int] | None = None,
    chat_template: str | Path | None = None,
    dtype: str = "auto",
    seed: int = 0,
    **config_overrides,
) -> DeltaLlavaForConditionalGeneration:
    """
    Assembles a checkpoint and saves it.

    Args:
        vision_tower (`str`): Folder or Hub repository of a CLIP or SigLIP model, or of its vision tower alone.
        language_model (`str`): Folder or Hub repository of a causal language model and its tokenizer.
        output_dir (`str` or `Path`): New or empty folder for the checkpoint.
        num_visual_tokens (`list[int]`, *optional*): Budgets that the checkpoint will be trained for; the largest up to
            144 becomes the default. Without them, the configuration's default.
        chat_template (`str` or `Path`, *optional*): Jinja file. Needed where the family of `language_model` has none
            here (Vicuna v1 for Llama, ChatML for Qwen).
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the weights; `"auto"` is the language model's.
        seed (`int`, *optional*, defaults to 0): Seed of the projector's weights.
        **config_overrides: Further fields of `DeltaLlavaConfig`; `projector_variant` is `"residual"` without one.

    Returns:
        `DeltaLlavaForConditionalGeneration`: The model as saved. Its tower and language model are the loaded ones, not
        copies.

    Raises:
        ValueError: If `output_dir` holds files, a budget does not fit the tower's grid, the image processor makes
            images of another size than the tower takes, or no chat template is known.
        OSError: If a folder or repository does not hold safetensors weights (nothing is unpickled here).
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} holds files already: name a new or an empty folder.")
    vision_config = AutoConfig.from_pretrained(vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    text_config = AutoConfig.from_pretrained(language_model)
    template, end_of_turn = find_chat_template(text_config, chat_template)

    tokenizer = AutoTokenizer.from_pretrained(language_model)
    add_tokens(tokenizer)
    config_overrides = {"projector_variant": "residual", **config_overrides}
    config = build_config(vision_config, text_config, tokenizer, num_visual_tokens, **config_overrides)
    processor = DeltaLlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(vision_tower),
        tokenizer=tokenizer,
        num_visual_tokens=config.num_visual_tokens,
        patch_grid_size=config.patch_grid_size,
        chat_template=template,
    )
    check_image_size(processor, config)

    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype, use_safetensors=True)
    tower = AutoModel.from_pretrained(
        vision_tower, config=config.vision_config, dtype=language.dtype, use_safetensors=True
    )
    set_seed(seed)
    model = join(config, tower, language)
    end_tokens = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end_of_turn or tokenizer.eos_token)}
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(end_tokens), pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(output_dir, max_shard_size="5GB")
    processor.save_pretrained(output_dir)
    write_sources(output_dir, vision_tower=vision_tower, language_model=language_model)
    return model


def write_sources(output_dir: Path, **names: str | None):
    """
    Write what a checkpoint was made from to `training/sources.yaml`, where training and the model card look for it.

    Args:
        output_dir (`Path`): The checkpoint.
        **names (`str`, *optional*): Hub repositories, or folders, of which the last name alone is written.
    """
    sources = {key: Path(name).resolve().name if Path(name).exists() else name for key, name in names.items() if name}
    file = output_dir / "training" / "sources.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(sources, sort_keys=False), encoding="utf-8")


def is_repository(name: str) -> bool:
    """Whether a repository of the Hub can be named so, with its owner: ORG/NAME."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def add_tokens(tokenizer: PreTrainedTokenizerBase):
    """Adds the placeholder `<image>`, and `<pad>` to a tokenizer that has no padding token."""
    tokenizer.add_tokens(DeltaLlavaProcessor.image_token, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})


def build_config(
    vision_config: PreTrainedConfig,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_visual_tokens: list[int] | None = None,
    **config_overrides,
) -> DeltaLlavaConfig:
    """
    The configuration of an assembled checkpoint, from those of its parts and a tokenizer that [`add_tokens`] has seen.

    Args:
        num_visual_tokens (`list[int]`, *optional*): Budgets that the checkpoint will be trained for.

    Raises:
        ValueError: If a budget does not fit the tower's grid.
    """
    if num_visual_tokens:
        default = max((budget for budget in num_visual_tokens if budget <= 144), default=min(num_visual_tokens))
        config_overrides |= {"num_visual_tokens": default, "visual_token_budgets": sorted(set(num_visual_tokens))}
    with torch.device("meta"):
        tower = AutoModel.from_config(vision_config)
    has_class_token = any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())
    config = DeltaLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(DeltaLlavaProcessor.image_token),
        vision_feature_select_strategy="default" if has_class_token else "full",
        **config_overrides,
    )
    if hasattr(tower, "use_head"):
        config.vision_config.vision_use_head = False  # SigLIP's pooling head, which nothing reads
    # No folder of this machine shall be published
    config.vision_config._name_or_path = config.text_config._name_or_path = ""
    # Language models like Qwen's have more embeddings than their tokenizer has tokens.
    num_embeddings = max(config.text_config.vocab_size, len(tokenizer))
    config.text_config.vocab_size = -(-num_embeddings // 64) * 64
    config.text_config.pad_token_id = tokenizer.pad_token_id
    return config


def join(
    config: DeltaLlavaConfig, vision_tower: PreTrainedModel, language_model: PreTrainedModel
) -> DeltaLlavaForConditionalGeneration:
    """
    Makes one model of its loaded parts and a fresh projector, without copying a weight other than the embeddings.

    Args:
        config (`DeltaLlavaConfig`): As [`build_config`] returns it.
        vision_tower (`PreTrainedModel`): Tower with the layers that `config.vision_config` names.
        language_model (`PreTrainedModel`): Causal language model, whose embeddings are resized to `config`'s.

    Returns:
        `DeltaLlavaForConditionalGeneration`: On the device and in the dtype of the language model.
    """
    on_meta = language_model.device.type == "meta"
    # New embeddings start from the mean of the old ones, so that no logit of theirs stands out.
    language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=not on_meta)
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    with torch.device(language_model.device):
        projector = DeltaProjector(config).apply(model._init_weights)
    model.model.multi_modal_projector = projector.to(language_model.dtype)
    model.tie_weights()
    return model


def find_chat_template(text_config: PreTrainedConfig, chat_template: str | Path | None) -> tuple[str, str | None]:
    """
    The chat template of a checkpoint: of the file, or the one for the language model's family.

    Args:
        text_config (`PreTrainedConfig`): Configuration of the language model.
        chat_template (`str` or `Path`, *optional*): Jinja file.

    Returns:
        `tuple[str, str | None]`: Its text, and the token that ends a turn in it (`None`: the tokenizer's end token).

    Raises:
        ValueError: If no file is named and no template is known for the family.
    """
    if chat_template is not None:
        return Path(chat_template).read_text(encoding="utf-8"), None
    if text_config.model_type not in FAMILIES:
        raise ValueError(
            f"No chat template is known for language models of type {text_config.model_type!r}, only for"
            f" {sorted(FAMILIES)}: name a Jinja file by --chat_template."
        )
    name, end_of_turn = FAMILIES[text_config.model_type]
    return (TEMPLATES / name).read_text(encoding="utf-8"), end_of_turn


def check_image_size(processor: DeltaLlavaProcessor, config: DeltaLlavaConfig):
    """Raises a `ValueError` if the image processor makes images of another size than the vision tower takes."""
    size = getattr(processor.image_processor, "crop_size", None) or processor.image_processor.size
    expected = config.vision_config.image_size
    if (size["height"], size["width"]) != (expected, expected):
        raise ValueError(
            f"The image processor makes images of {size['height']}x{size['width']} pixels, but the vision tower takes"
            f" {expected}x{expected}."
        )


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_tower", required=True, help="folder or repository of a CLIP or SigLIP model")
    parser.add_argument("--language_model", required=True, help="folder or repository of a causal language model")
    parser.add_argument("--output_dir", required=True, help="new folder for the checkpoint")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="budgets that it will be trained for")
    parser.add_argument("--chat_template", help="Jinja file, for families other than Llama and Qwen")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the language model's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's weights")
    parser.add_argument("--config_overrides", type=json.loads, default={}, help="JSON: fields of DeltaLlavaConfig")
    options = vars(parser.parse_args(arguments))
    model = assemble(**options.pop("config_overrides"), **options)
    parts = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
    }
    for name, part in parts.items():
        print(f"{name:15} {sum(weight.numel() for weight in part.parameters()):>14,} parameters")
    print(f"Saved to {options['output_dir']}, for {model.config.visual_token_budgets} visual tokens per image.")


if __name__ == "__main__":
    main()
