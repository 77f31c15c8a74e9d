r"""
Joins a vision tower and a causal language model into an untrained Delta-LLaVA in Hub layout, ready for stage 1.

```
python -m delta_llava.hub.assemble \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --language_model lmsys/vicuna-7b-v1.5 \
    --output_dir checkpoints/delta-llava-vicuna-7b \
    --num_visual_tokens 144
```

Several budgets, `--num_visual_tokens 1 4 16 36 144`, make an elastic checkpoint, to be trained for all of them. The
projector is the `residual` one; the paper's are `--config_overrides '{"projector_variant": "released"}'`, or `"paper"`.

Any tower and any language model of transformers whose parts fit can be used; others are refused before they are loaded.
At the end, the checkpoint is loaded from the new files and must give the language model's own logits. That doubles the
time but not the memory, which holds one language model at a time.
"""

import argparse
import json
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    set_seed,
)

from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, check_all_loaded
from . import parts


def assemble(
    vision_tower: str,
    language_model: str,
    output_dir: str | Path,
    num_visual_tokens: list[int] | None = None,
    chat_template: str | Path | None = None,
    image_size: int | None = None,
    dtype: str = "auto",
    seed: int = 0,
    **config_overrides,
) -> DeltaLlavaForConditionalGeneration:
    """
    Assembles a checkpoint, saves it, and checks that it gives the language model's own logits.

    Args:
        vision_tower (`str`): Folder or Hub repository of a tower that makes a token of each patch (CLIP, SigLIP, DINOv2
            and more), or of a model with such a tower.
        language_model (`str`): Folder or Hub repository of a causal language model and its tokenizer.
        output_dir (`str` or `Path`): New or empty folder for the checkpoint.
        num_visual_tokens (`list[int]`, *optional*): Budgets that the checkpoint will be trained for; the largest up to
            144 becomes the default. By default, the configuration's default.
        chat_template (`str` or `Path`, *optional*): Jinja file. Needed if the family of `language_model` has none here
            (Vicuna v1 for Llama, ChatML for Qwen) or the model has a different one.
        image_size (`int`, *optional*): Side of the images in pixels. Needed if the tower's configuration and its image
            processor differ; the tower itself must support the size.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the weights; `"auto"` is the language model's.
        seed (`int`, *optional*, defaults to 0): Seed of the projector's weights.
        **config_overrides: Further fields of `DeltaLlavaConfig`; `projector_variant` defaults to `"residual"`.

    Returns:
        `DeltaLlavaForConditionalGeneration`: The model, loaded from what was saved.

    Raises:
        ValueError: If `output_dir` holds files, a budget does not fit the tower's grid, the image processor makes
            images of another size than the tower takes, no chat template is known, a part cannot be joined, or the
            result does not give the language model's logits. Then nothing is left in `output_dir`.
        OSError: If a folder or repository has no safetensors weights (nothing is unpickled here).
    """
    with parts.new_folder(output_dir) as folder:
        vision_config = AutoConfig.from_pretrained(vision_tower)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        text_config = AutoConfig.from_pretrained(language_model)
        tokenizer = AutoTokenizer.from_pretrained(language_model)
        template = parts.find_chat_template(text_config, chat_template, tokenizer)
        parts.add_tokens(tokenizer)
        config_overrides = {"projector_variant": "residual", "image_size": image_size, **config_overrides}
        config = parts.build_config(vision_config, text_config, tokenizer, num_visual_tokens, **config_overrides)
        processor = parts.build_processor(_load_image_processor(vision_tower, image_size), tokenizer, template, config)
        generation_config = parts.build_generation_config(language_model, text_config, tokenizer, template)

        options = {"use_safetensors": True, "output_loading_info": True}
        language, info = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype, **options)
        check_all_loaded(info, language_model)
        expected = parts.text_logits(language, tokenizer)
        options |= {"config": config.vision_config, "dtype": language.dtype}
        tower, info = AutoModel.from_pretrained(vision_tower, **options)
        check_all_loaded(info, vision_tower)
        set_seed(seed)
        model = parts.join(config, tower, language)
        parts.check_logits(model, tokenizer, expected)
        model.generation_config = generation_config
        model.save_pretrained(folder, max_shard_size="5GB")
        processor.save_pretrained(folder)
        parts.write_sources(folder, vision_tower=vision_tower, language_model=language_model)

        del model, tower, language  # memory is for one language model
        model = DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
        parts.check_logits(model, tokenizer, expected)
        return model


def _load_image_processor(vision_tower: str, image_size: int | None) -> BaseImageProcessor:
    """A tower's image processor; with `image_size`, one that makes square images of as many pixels."""
    image_processor = AutoImageProcessor.from_pretrained(vision_tower)
    if image_size is None:
        return image_processor
    side = {"height": image_size, "width": image_size}
    sizes = {"size": side}
    if getattr(image_processor, "do_center_crop", None):
        sizes = {"size": {"shortest_edge": image_size}, "crop_size": side}
    return AutoImageProcessor.from_pretrained(vision_tower, **sizes)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_tower", required=True, help="folder or repository of a tower or a model with one")
    parser.add_argument("--language_model", required=True, help="folder or repository of a causal language model")
    parser.add_argument("--output_dir", required=True, help="new folder for the checkpoint")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="budgets to be trained for")
    parser.add_argument("--chat_template", help="Jinja file, for families other than Vicuna and Qwen")
    parser.add_argument("--image_size", type=int, help="side of the images, if tower and image processor differ")
    parser.add_argument("--dtype", default="auto", help="dtype of the weights (default: the language model's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the projector's weights")
    parser.add_argument("--config_overrides", type=json.loads, default={}, help="JSON: fields of DeltaLlavaConfig")
    options = vars(parser.parse_args(arguments))
    model = assemble(**options.pop("config_overrides"), **options)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        weights = model.model.get_submodule(name).parameters()
        print(f"{name:22} {sum(weight.numel() for weight in weights):>14,} parameters")
    print(f"Saved to {options['output_dir']}, for {model.config.visual_token_budgets} visual tokens per image.")


if __name__ == "__main__":
    main()
