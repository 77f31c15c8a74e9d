"""Joins the parts of a checkpoint and checks the result: what assemble, convert and merge_adapter share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BaseImageProcessor,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..configuration_delta_llava import DeltaLlavaConfig, default_visual_tokens
from ..modeling_delta_llava import DeltaLlavaForConditionalGeneration, DeltaLlavaModel, DeltaProjector, brief_list
from ..processing_delta_llava import DeltaLlavaProcessor
from ..turns import TEMPLATES, stop_at_end_of_turn


# By type of language model: the chat template, and what a model's own template must write to count as the same format
FAMILIES = {
    "llama": ("vicuna-v1.jinja", ("USER:", "ASSISTANT:")),
    "qwen2": ("chatml.jinja", ("<|im_start|>", "<|im_end|>")),
    "qwen3": ("chatml.jinja", ("<|im_start|>", "<|im_end|>")),
}
# Largest distance from a language model's own logits, relative to their norm: dtypes round, and do so in another order
# in matrices of other shapes
LOGITS_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@contextmanager
def new_folder(output_dir: str | Path) -> Iterator[Path]:
    """
    A folder for a checkpoint that appears when it is complete: `output_dir` + `.incomplete`, renamed at the end of the
    block and removed on an error. The next run removes what a killed process has left there.

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
    The logits of a model on a text without images, for [`check_logits`]: float32 `(1, sequence_length, vocab_size)`, on
    the CPU.
    """
    inputs = tokenizer("The quick brown fox jumps over the lazy dog, 17 times.", return_tensors="pt").to(model.device)
    return model(input_ids=inputs["input_ids"], use_cache=False).logits.float().cpu()


def check_logits(model: DeltaLlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, expected: torch.Tensor):
    """
    Checks that a model gives the logits of its language model alone, `expected` (from [`text_logits`]), and that it can
    generate with a cache. Its vocabulary may be larger.

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
            f" {error:.2g} of their norm away from the language model's own, and rounding explains only {tolerance}."
        )


def write_sources(output_dir: Path, **names: str | None):
    """
    Writes what a checkpoint was made from to its `training/sources.yaml`, which training and the model card read: names
    of Hub repositories, or of folders without their paths.
    """
    sources = {key: Path(name).resolve().name if Path(name).exists() else name for key, name in names.items() if name}
    file = output_dir / "training" / "sources.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(sources, sort_keys=False), encoding="utf-8")


def add_tokens(tokenizer: PreTrainedTokenizerBase):
    """
    Adds the placeholder `<image>`, and `<pad>` to a tokenizer that has no padding token.

    Raises:
        ValueError: If the tokenizer has no vocabulary: transformers makes an empty one if its files are missing.
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
    The configuration of a checkpoint, from those of its parts and a tokenizer after [`add_tokens`].

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
    # No path of this machine is published
    config.vision_config._name_or_path = config.text_config._name_or_path = ""
    # Language models such as Qwen's have more embeddings than their tokenizer has tokens
    num_embeddings = max(config.text_config.vocab_size, len(tokenizer))
    config.text_config.vocab_size = -(-num_embeddings // 64) * 64
    config.text_config.pad_token_id = tokenizer.pad_token_id
    return config


def _check_language_model(config: DeltaLlavaConfig):
    """Raises a `ValueError` unless the language model consists of a decoder of embeddings and an output head."""
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
            raise ValueError(f"it has weights outside of its base and its output head: {brief_list(others)}")
    except Exception as error:  # a class that does not fit may fail in any way
        reason = str(error)[:300]
        raise ValueError(f"Language models of type {text_config.model_type!r} cannot be joined: {reason}") from error


@torch.no_grad()
def _num_prefix_tokens(config: DeltaLlavaConfig) -> int:
    """
    Number of tokens that the tower puts before those of its patches (CLS, registers), found with one random layer.

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
            f" {str(error)[:300]}. A tower must make one token of each patch, as CLIP, SigLIP and DINOv2 do."
        ) from error
    return num_prefix_tokens


def join(
    config: DeltaLlavaConfig, vision_tower: PreTrainedModel, language_model: PreTrainedModel
) -> DeltaLlavaForConditionalGeneration:
    """
    Makes one model of a tower with the layers of `config.vision_config`, a causal language model, whose embeddings are
    resized to `config`'s, and a fresh projector. No weights but the embeddings are copied, and the model has the device
    and the dtype of the language model.

    Raises:
        ValueError: If the parts' weights are not those that `config` asks for.
    """
    on_meta = language_model.device.type == "meta"
    # New embeddings start from the mean of the old ones, so that their logits do not stand out
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
    The chat template of a checkpoint: that of the Jinja file `chat_template`, if there is one, or the one here for the
    language model's family.

    Raises:
        ValueError: If no file is given, and the family has no template here or the model has another one.
    """
    if chat_template is not None:
        return Path(chat_template).read_text(encoding="utf-8")
    if text_config.model_type not in FAMILIES:
        raise ValueError(
            f"No chat template is known for language models of type {text_config.model_type!r}, only for"
            f" {sorted(FAMILIES)}: name a Jinja file with --chat_template."
        )
    name, markers = FAMILIES[text_config.model_type]
    if tokenizer.chat_template and not all(marker in _written_by(tokenizer) for marker in markers):
        raise ValueError(
            f"The language model has a chat template of its own, which is not {name} (it lacks"
            f" {' or '.join(map(repr, markers))}): name a Jinja file of its format with --chat_template."
        )
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _written_by(tokenizer: PreTrainedTokenizerBase) -> str:
    """A question and an answer in a tokenizer's own chat template, or nothing if it fails on them."""
    for content in ("Hello", [{"type": "text", "text": "Hello"}]):
        chat = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            return tokenizer.apply_chat_template(chat, tokenize=False)
        except Exception:  # templates raise what they like, and take text, a list of parts or both
            continue
    return ""


def build_generation_config(
    language_model: str | Path,
    text_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
) -> GenerationConfig:
    """
    The language model's own generation configuration, with the tokenizer's padding, the end tokens of the tokenizer and
    of an answer in the chat template (the end of its `{% generation %}` span), and image placeholders suppressed. The
    end tokens of a language model without a `generation_config.json` are those of `text_config`.

    Raises:
        ValueError: If the template cannot be rendered.
    """
    try:
        generation_config = GenerationConfig.from_pretrained(language_model)
    except OSError:
        generation_config = GenerationConfig.from_model_config(text_config)
    if not generation_config.do_sample:
        # Vicuna has them. Without sampling their only effect is that the configuration cannot be saved
        generation_config.temperature = generation_config.top_p = generation_config.top_k = None
    stop_at_end_of_turn(generation_config, tokenizer, chat_template)
    if generation_config.bos_token_id is None:
        generation_config.bos_token_id = tokenizer.bos_token_id
    generation_config.pad_token_id = tokenizer.pad_token_id
    # Prompt lookup takes candidates from the prompt, in which placeholders follow words that an answer may hold too
    image_token_id = tokenizer.convert_tokens_to_ids(DeltaLlavaProcessor.image_token)
    generation_config.suppress_tokens = sorted({*(generation_config.suppress_tokens or ()), image_token_id})
    return generation_config


def build_processor(
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str,
    config: DeltaLlavaConfig,
) -> DeltaLlavaProcessor:
    """
    The processor of a new checkpoint.

    Raises:
        ValueError: If the image processor makes images of another size than the vision tower takes.
    """
    processor = DeltaLlavaProcessor(image_processor=image_processor, tokenizer=tokenizer, chat_template=chat_template)
    processor.adopt_budgets(config)
    pixel_values = image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"]
    height, width = pixel_values.shape[-2:]
    if (height, width) != (config.image_size, config.image_size):
        raise ValueError(
            f"The image processor makes images of {height}x{width} pixels, but the vision tower takes"
            f" {config.image_size}x{config.image_size}. For a tower that takes both, choose with --image_size of"
            " delta_llava.hub.assemble."
        )
    return processor
