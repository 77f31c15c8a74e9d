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

Any tower and any language model of transformers whose parts fit is taken, and any other refused before it is loaded. At
the end, the checkpoint is loaded from what was written and must give the language model's own logits. That doubles the
time, not the memory, which holds one language model at a time.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..configuration_delta_llava import DeltaLlavaConfig, default_visual_tokens
from ..modeling_delta_llava import (
    DeltaLlavaForConditionalGeneration,
    DeltaLlavaModel,
    DeltaProjector,
    check_all_loaded,
)
from ..processing_delta_llava import DeltaLlavaProcessor
from ..turns import stop_at_end_of_turn


TEMPLATES = Path(__file__).parents[1] / "templates"
# The chat template of a language model's family, and what a template that a model brings along must hold to be another
# form of it.
FAMILIES = {
    "llama": ("vicuna-v1.jinja", ("USER:", "ASSISTANT:")),
    "qwen2": ("chatml.jinja", ("<|im_start|>", "<|im_end|>")),
    "qwen3": ("chatml.jinja", ("<|im_start|>", "<|im_end|>")),
}
# How far logits may be from a language model's own, relative to their norm: dtypes round, and matrices of other shapes
# do so in another order.
LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


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
            and more), or of a model that holds one.
        language_model (`str`): Folder or Hub repository of a causal language model and its tokenizer.
        output_dir (`str` or `Path`): New or empty folder for the checkpoint.
        num_visual_tokens (`list[int]`, *optional*): Budgets that the checkpoint will be trained for; the largest up to
            144 becomes the default. Without them, the configuration's default.
        chat_template (`str` or `Path`, *optional*): Jinja file. Needed where the family of `language_model` has none
            here (Vicuna v1 for Llama, ChatML for Qwen), and where the model brings another one along.
        image_size (`int`, *optional*): Side of the images in pixels. Needed where the tower's configuration and its
            image processor name different ones; another one than the tower's needs a tower that takes it by itself.
        dtype (`str`, *optional*, defaults to `"auto"`): Dtype of the weights; `"auto"` is the language model's.
        seed (`int`, *optional*, defaults to 0): Seed of the projector's weights.
        **config_overrides: Further fields of `DeltaLlavaConfig`; `projector_variant` is `"residual"` without one.

    Returns:
        `DeltaLlavaForConditionalGeneration`: The model, loaded from what was saved.

    Raises:
        ValueError: If `output_dir` holds files, a budget does not fit the tower's grid, the image processor makes
            images of another size than the tower takes, no chat template is known, a part cannot be joined, or the
            result does not give the language model's logits. Then nothing is left in `output_dir`.
        OSError: If a folder or repository does not hold safetensors weights (nothing is unpickled here).
    """
    with new_folder(output_dir) as folder:
        return _assemble(
            vision_tower,
            language_model,
            folder,
            num_visual_tokens,
            chat_template,
            dtype,
            seed,
            image_size=image_size,
            **config_overrides,
        )


def _assemble(
    vision_tower: str,
    language_model: str,
    folder: Path,
    num_visual_tokens: list[int] | None,
    chat_template: str | Path | None,
    dtype: str,
    seed: int,
    **config_overrides,
) -> DeltaLlavaForConditionalGeneration:
    vision_config = AutoConfig.from_pretrained(vision_tower)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    text_config = AutoConfig.from_pretrained(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    template = find_chat_template(text_config, chat_template, tokenizer)
    add_tokens(tokenizer)
    config_overrides = {"projector_variant": "residual", **config_overrides}
    config = build_config(vision_config, text_config, tokenizer, num_visual_tokens, **config_overrides)
    processor = DeltaLlavaProcessor(
        image_processor=load_image_processor(vision_tower, config_overrides["image_size"]),
        tokenizer=tokenizer,
        chat_template=template,
    )
    processor.adopt_budgets(config)
    check_image_size(processor, config)
    generation_config = build_generation_config(language_model, text_config, tokenizer, template)

    language, info = AutoModelForCausalLM.from_pretrained(
        language_model, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_all_loaded(info, language_model)
    expected = text_logits(language, tokenizer)
    tower, info = AutoModel.from_pretrained(
        vision_tower, config=config.vision_config, dtype=language.dtype, use_safetensors=True, output_loading_info=True
    )
    check_all_loaded(info, vision_tower)
    set_seed(seed)
    model = join(config, tower, language)
    check_logits(model, tokenizer, expected)
    model.generation_config = generation_config
    model.save_pretrained(folder, max_shard_size="5GB")
    processor.save_pretrained(folder)
    write_sources(folder, vision_tower=vision_tower, language_model=language_model)

    del model, tower, language  # memory is for one language model
    model = DeltaLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    check_logits(model, tokenizer, expected)
    return model


@contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """
    A folder for a checkpoint that is there when it is whole, and not before: `output_dir` + `.incomplete`, renamed at
    the end of the block and removed on an error. What a killed process has left there, the next one removes.

    Raises:
        ValueError: If `output_dir` holds files.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir={output_dir} holds files already: name a new or an empty folder.")
    incomplete = output_dir.with_name(f"{output_dir.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir(parents=True)
    try:
        yield incomplete
    except BaseException:
        shutil.rmtree(incomplete)
        raise
    if output_dir.exists():
        output_dir.rmdir()
    incomplete.rename(output_dir)


@torch.no_grad()
def text_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """
    What a model predicts on a text without images, to be compared by [`check_logits`].

    Args:
        model (`PreTrainedModel`): A causal language model, or one that is made of it.
        tokenizer (`PreTrainedTokenizerBase`): The language model's.

    Returns:
        `torch.Tensor` of shape `(1, sequence_length, vocab_size)`, float32, on the CPU.
    """
    inputs = tokenizer("The quick brown fox jumps over the lazy dog, 17 times.", return_tensors="pt").to(model.device)
    return model(input_ids=inputs["input_ids"], use_cache=False).logits.float().cpu()


def check_logits(model: DeltaLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, expected: torch.Tensor):
    """
    Checks that a model gives its language model's own logits, and can go on from there with a cache.

    Args:
        model (`DeltaLlavaForConditionalGeneration`): The model.
        tokenizer (`PreTrainedTokenizerBase`): The language model's.
        expected (`torch.Tensor` of shape `(1, sequence_length, vocab_size)`): What [`text_logits`] has returned for the
            language model alone; the model may have a larger vocabulary.

    Raises:
        ValueError: If they differ by more than the rounding of the model's dtype, or cannot be computed.
    """
    model_type = model.config.text_config.model_type
    try:
        found = text_logits(model, tokenizer)[..., : expected.shape[-1]]
        prompt = tokenizer("Hello", return_tensors="pt").to(model.device)
        model.generate(
            input_ids=prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=2, do_sample=False
        )
    except Exception as error:  # a class that does not fit may fail in any way
        raise ValueError(f"Language models of type {model_type!r} cannot be joined: {error}") from error
    error = ((found - expected).norm() / expected.norm()).item()
    tolerance = LOGITS_TOLERANCE.get(model.dtype, 1e-3)
    if not error <= tolerance:
        raise ValueError(
            f"Language models of type {model_type!r} cannot be joined: the joined model's logits on a text are"
            f" {error:.2g} of their norm away from the language model's own, where rounding explains {tolerance}."
        )


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
    """
    Adds the placeholder `<image>`, and `<pad>` to a tokenizer that has no padding token.

    Raises:
        ValueError: If the tokenizer knows no words: without files, transformers makes an empty one.
    """
    if not tokenizer("Hello", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{tokenizer.name_or_path} lacks the vocabulary of its tokenizer: put the language model's tokenizer.json"
            " there."
        )
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
        ValueError: If a budget does not fit the tower's grid, or a part cannot be joined.
    """
    if num_visual_tokens:
        default = default_visual_tokens(num_visual_tokens)
        config_overrides |= {"num_visual_tokens": default, "visual_token_budgets": sorted(set(num_visual_tokens))}
    config = DeltaLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids(DeltaLlavaProcessor.image_token),
        **config_overrides,
    )
    config.vision_feature_select_strategy = "default" if _num_prefix_tokens(config) else "full"
    _check_language_model(config)
    if config.vision_config.model_type == "siglip_vision_model":
        config.vision_config.vision_use_head = False  # a pooling head, which nothing reads
    # No folder of this machine shall be published
    config.vision_config._name_or_path = config.text_config._name_or_path = ""
    # Language models like Qwen's have more embeddings than their tokenizer has tokens.
    num_embeddings = max(config.text_config.vocab_size, len(tokenizer))
    config.text_config.vocab_size = -(-num_embeddings // 64) * 64
    config.text_config.pad_token_id = tokenizer.pad_token_id
    return config


def _check_language_model(config: DeltaLlavaConfig):
    """Raises a `ValueError` if the language model has other parts than a decoder of embeddings and an output head."""
    text_config = config.text_config
    try:
        with torch.device("meta"):
            language_model = AutoModelForCausalLM.from_config(text_config)
            model = DeltaLlavaForConditionalGeneration(config)
        base_model, head = language_model.base_model, language_model.get_output_embeddings()
        ours = type(model.model.language_model)
        if type(base_model) is not ours:
            raise ValueError(f"its base is {type(base_model).__name__}, but AutoModel makes {ours.__name__}")
        shapes, expected = (
            {name: tuple(weight.shape) for name, weight in part.named_parameters()} for part in (head, model.lm_head)
        )
        if shapes != expected:
            raise ValueError(f"its output head has {shapes}, where {expected} is known")
        if base_model.get_input_embeddings().embedding_dim != text_config.hidden_size:
            raise ValueError(
                f"its embeddings have {base_model.get_input_embeddings().embedding_dim} dimensions, not hidden_size="
                f"{text_config.hidden_size}"
            )
        known = {*base_model.parameters(), *head.parameters()}
        if others := [name for name, weight in language_model.named_parameters() if weight not in known]:
            raise ValueError(f"it has weights outside of its base and its output head: {', '.join(others[:4])}")
    except Exception as error:  # a class that does not fit may fail in any way
        reason = str(error)[:300]
        raise ValueError(f"Language models of type {text_config.model_type!r} cannot be joined: {reason}") from error


@torch.no_grad()
def _num_prefix_tokens(config: DeltaLlavaConfig) -> int:
    """
    How many tokens the tower puts before those of its patches (CLS, registers), as one random layer of it shows.

    Raises:
        ValueError: If it cannot be run at `config.image_size`, or its last tokens are not the patches, row by row.
    """
    vision_config, grid_size, image_size = config.vision_config, config.patch_grid_size, config.image_size
    try:
        probe = DeltaLlavaConfig(
            vision_config=vision_config,
            text_config=LlamaConfig(
                vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
            ),
            query_feature_layer=1,
            memory_feature_layers=[1],
            vision_feature_select_strategy="full",
            image_size=image_size,
        )
        with torch.device("meta"):
            model = DeltaLlavaModel(probe)
        # The second image differs from the first in the second patch, the third in the last
        changed = (min(1, grid_size**2 - 1), grid_size**2 - 1)
        pixels = torch.zeros(3, getattr(vision_config, "num_channels", 3), image_size, image_size)
        side = vision_config.patch_size if isinstance(vision_config.patch_size, int) else image_size // grid_size
        for image, patch in enumerate(changed, start=1):
            row, column = side * (patch // grid_size), side * (patch % grid_size)
            pixels[image, :, row : row + side, column : column + side] = torch.randn(side, side)
        for _ in range(4):  # attention that is random may move a patch more than the patch itself does
            model.vision_tower = AutoModel.from_config(probe.vision_config, dtype=torch.float32).eval()
            _, tokens, _ = model._run_vision_tower(pixels)
            num_prefix_tokens = tokens.shape[1] - grid_size**2
            places = (tokens[1:] - tokens[0]).norm(dim=-1).argmax(dim=-1) - num_prefix_tokens
            if places.tolist() == [*changed]:
                break
        if tokens.shape != (3, num_prefix_tokens + grid_size**2, vision_config.hidden_size) or num_prefix_tokens < 0:
            raise ValueError(f"3 images make tokens of shape {tuple(tokens.shape)}")
        if places.tolist() != [*changed]:
            raise ValueError(f"its last {grid_size**2} tokens are not its patches, row by row")
    except Exception as error:  # a class that does not fit may fail in any way
        raise ValueError(
            f"Vision towers of type {vision_config.model_type!r} cannot be used at {image_size}x{image_size} pixels:"
            f" {str(error)[:300]}. Those that can make one token of each patch, as CLIP, SigLIP and DINOv2 do."
        ) from error
    return num_prefix_tokens


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

    Raises:
        ValueError: If the parts' weights are not those that `config` asks for.
    """
    on_meta = language_model.device.type == "meta"
    # New embeddings start from the mean of the old ones, so that no logit of theirs stands out.
    language_model.resize_token_embeddings(config.text_config.vocab_size, mean_resizing=not on_meta)
    with torch.device("meta"):
        model = DeltaLlavaForConditionalGeneration(config)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    with torch.device(language_model.device):
        projector = DeltaProjector(config).apply(model._init_weights)
    model.model.multi_modal_projector = projector.to(language_model.dtype)
    model.tie_weights()
    found = {name: weight.shape for name, weight in model.state_dict().items()}
    if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise ValueError(
            f"The parts do not fit their configuration: {min(wrong)} has shape {found.get(min(wrong))}, but"
            f" {expected.get(min(wrong))} is expected."
        )
    return model


def find_chat_template(
    text_config: PreTrainedConfig, chat_template: str | Path | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """
    The chat template of a checkpoint: of the file, or the one for the language model's family.

    Args:
        text_config (`PreTrainedConfig`): Configuration of the language model.
        chat_template (`str` or `Path`, *optional*): Jinja file.
        tokenizer (`PreTrainedTokenizerBase`): The language model's.

    Returns:
        `str`: Its text.

    Raises:
        ValueError: If no file is named, and no template is known for the family or the model was trained with another.
    """
    if chat_template is not None:
        return Path(chat_template).read_text(encoding="utf-8")
    if text_config.model_type not in FAMILIES:
        raise ValueError(
            f"No chat template is known for language models of type {text_config.model_type!r}, only for"
            f" {sorted(FAMILIES)}: name a Jinja file by --chat_template."
        )
    name, markers = FAMILIES[text_config.model_type]
    if tokenizer.chat_template and not all(marker in _written_by(tokenizer) for marker in markers):
        raise ValueError(
            f"The language model brings a chat template of its own, which is not {name} (it lacks"
            f" {' or '.join(map(repr, markers))}): name a Jinja file by --chat_template that writes its format."
        )
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _written_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """A question and an answer as a tokenizer's own chat template writes them, or nothing where it cannot."""
    for content in ("Hello", [{"type": "text", "text": "Hello"}]):
        chat = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            return tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception:  # templates raise what they like, and take contents of one kind or of both
            continue
    return ""


def build_generation_config(
    language_model: str | Path,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
) -> GenerationConfig:
    """
    The language model's own generation configuration, with its tokenizer's padding, the end tokens of its tokenizer and
    of an answer in the chat template, and no placeholder of an image in an answer.

    Args:
        language_model (`str` or `Path`): Folder or Hub repository with its `generation_config.json`, if it has one.
        text_config (`PreTrainedConfig`): Its configuration, which says the end tokens where there is no such file.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, as the checkpoint will have it.
        chat_template (`str`): The chat template. What counts is the end of its `{% generation %}` span.

    Raises:
        ValueError: If the template cannot be rendered.
    """
    try:
        generation_config = GenerationConfig.from_pretrained(language_model)
    except OSError:
        generation_config = GenerationConfig.from_model_config(text_config)
    if not generation_config.do_sample:
        # Vicuna has them. Without sampling they do nothing but forbid that the configuration is saved.
        generation_config.temperature = generation_config.top_p = generation_config.top_k = None
    stop_at_end_of_turn(generation_config, tokenizer, chat_template)
    if generation_config.bos_token_id is None:
        generation_config.bos_token_id = tokenizer.bos_token_id
    generation_config.pad_token_id = tokenizer.pad_token_id
    # Prompt lookup takes candidates from the prompt, where placeholders follow what an answer may hold too
    image_token_id = tokenizer.convert_tokens_to_ids(DeltaLlavaProcessor.image_token)
    generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or ()), image_token_id})
    return generation_config


def load_image_processor(vision_tower: str, image_size: int | None) -> BaseImageProcessor:
    """The image processor of a tower, made to give square images of `image_size` pixels if that is not `None`."""
    image_processor = AutoImageProcessor.from_pretrained(vision_tower)
    if image_size is None:
        return image_processor
    side = {"height": image_size, "width": image_size}
    sizes = {"size": side}
    if getattr(image_processor, "do_center_crop", None):
        sizes = {"size": {"shortest_edge": image_size}, "crop_size": side}
    return AutoImageProcessor.from_pretrained(vision_tower, **sizes)


def check_image_size(processor: DeltaLlavaProcessor, config: DeltaLlavaConfig):
    """Raises a `ValueError` if the image processor makes images of another size than the vision tower takes."""
    pixel_values = processor.image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"]
    height, width = pixel_values.shape[-2:]
    if (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"The image processor makes images of {height}x{width} pixels, but the vision tower takes"
            f" {config.image_size}x{config.image_size}. Towers that take both get one by --image_size of"
            " delta_llava.hub.assemble."
        )


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision_tower", required=True, help="folder or repository of a tower or a model that has one")
    parser.add_argument("--language_model", required=True, help="folder or repository of a causal language model")
    parser.add_argument("--output_dir", required=True, help="new folder for the checkpoint")
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", help="budgets that it will be trained for")
    parser.add_argument("--chat_template", help="Jinja file, for families other than Vicuna and Qwen")
    parser.add_argument("--image_size", type=int, help="side of the images, where tower and image processor differ")
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
