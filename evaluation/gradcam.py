r"""
Shows where the evidence for an answer is: Grad-CAM on the projector's output and on its input (Figure 1).

```
python -m delta_llava.evaluation.gradcam --checkpoint checkpoints/delta-llava-vicuna-7b --image taxi.jpg \
    --question "What is weird about this picture?" --num_visual_tokens 16 64 144 --output gradcam.png
```

Each row of the picture explains the model's answer at that budget, or `--answer`.

The maps are element-wise Grad-CAM: the gradient of the answer's log-probability times the feature, its positive part
summed over the channels of each position. Plain Grad-CAM weights a channel by the mean of its gradient over all
positions, which suits a classifier that pools them; a language model reads each token, so each keeps its own gradient.
"""

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from ..configuration_delta_llava import query_grid_size


MAX_NEW_TOKENS = 256  # of an answer


@dataclass
class GradCam:
    """
    Where the evidence for one answer is at one budget. All tensors are float32, on the CPU, row by row of the image.

    image (`torch.Tensor` of shape `(height, width, 3)`):
        The vision tower's input, in 0 … 1: after cropping or padding, where whole patches cover it.
    question, answer (`str`): The question, and the answer that is explained.
    num_visual_tokens (`int`): The budget V = g².
    score (`float`): Log-probability of the answer, in nats.
    output_map (`torch.Tensor` of shape `(g, g)`):
        Relevance of each visual token, 0 or more, without a unit: compare it only within a map.
    input_map (`torch.Tensor` of shape `(G, G)`): Relevance of the projector's input from each patch.
    window_attention (`torch.Tensor` of shape `(G, G)`, *optional*):
        Where in its own cell each visual token looks: attention weights, averaged over heads and summed over feature
        levels, so that every cell of (G/g)² patches sums to 1. `None` for projectors other than Delta-LLaVA's.
    """

    image: torch.Tensor
    question: str
    answer: str
    num_visual_tokens: int
    score: float
    output_map: torch.Tensor
    input_map: torch.Tensor
    window_attention: torch.Tensor | None


def grad_cam(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image | str,
    question: str,
    num_visual_tokens: int,
    answer: str | None = None,
    earlier: Sequence[tuple[str, str]] = (),
) -> GradCam:
    """
    Explains an answer by the gradients of its log-probability.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`]): In any floating dtype; it is left as it was.
        processor ([`DeltaLlavaProcessor`]): Of the same checkpoint.
        image (`Image.Image` or `str`): The image, or its file or URL.
        question (`str`): The question about it.
        num_visual_tokens (`int`): The budget V = g² of the image, one that the patch grid allows.
        answer (`str`, *optional*): The answer to explain. Defaults to the model's greedy answer.
        earlier (`Sequence[tuple[str, str]]`, *optional*): Earlier questions and answers of the same chat.

    Returns:
        [`GradCam`]

    Raises:
        ValueError: If the grid does not allow the budget, the image cannot be read, or question or answer are empty.
    """
    if not question.strip():
        raise ValueError("The question is empty: ask something about the image.")
    side = query_grid_size(num_visual_tokens, model.config.patch_grid_size)

    asked = conversation(image, question, earlier)
    prompt = encode_chat(model, processor, asked, num_visual_tokens, add_generation_prompt=True)
    prompt_ids = prompt["input_ids"][0]
    with _evaluation_mode(model):
        if answer is None:
            generated = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)[0]
            answer = processor.decode(generated[len(prompt_ids) :], skip_special_tokens=True)
        answer = answer.strip()
        if not answer:
            raise ValueError(f"There is no answer to explain at {num_visual_tokens} visual tokens: it is empty.")
        inputs, answer_ids = _encode_answer(model, processor, asked, answer, prompt_ids, num_visual_tokens)
        with torch.enable_grad(), _watch_projector(model.model.multi_modal_projector) as seen:
            score = _score(model, inputs, answer_ids)
            features = seen["query_features"], seen["memory_features"], seen["visual_tokens"]
            # No parameter gets a gradient. A projector that does not read the memory leaves zeros there
            gradients = torch.autograd.grad(score, features, materialize_grads=True)

    query_map, memory_map, output_map = map(_relevance, features, gradients)
    return GradCam(
        image=seen_image(inputs["pixel_values"][0], processor, model.config.vision_config.patch_size),
        question=question,
        answer=answer,
        num_visual_tokens=num_visual_tokens,
        score=score.item(),
        output_map=output_map.unflatten(0, (side, side)),
        input_map=(query_map + memory_map).unflatten(0, (model.config.patch_grid_size,) * 2),
        window_attention=seen.get("window_attention"),
    )


def token_relevance(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Image.Image | str,
    question: str,
    num_visual_tokens: int,
    answer: str,
    earlier: Sequence[tuple[str, str]] = (),
) -> torch.Tensor:
    """
    Relevance of each visual token for an answer: the `output_map` of [`grad_cam`] alone, from what `get_image_features`
    returns, so that an image whose visual tokens are cached is not encoded again.

    Args:
        As for [`grad_cam`]; the answer is required, and must not be empty.

    Returns:
        `torch.Tensor` of shape `(g, g)`: 0 or more, float32, on the CPU.
    """
    asked = conversation(image, question, earlier)
    prompt = encode_chat(model, processor, asked, num_visual_tokens, add_generation_prompt=True)
    inputs, answer_ids = _encode_answer(model, processor, asked, answer, prompt["input_ids"][0], num_visual_tokens)
    with _evaluation_mode(model):
        with torch.no_grad():
            encoded = model.get_image_features(inputs.pop("pixel_values"), num_visual_tokens, return_dict=True)
        visual_tokens = encoded.pooler_output[0][None].requires_grad_()
        encoded.pooler_output = list(visual_tokens)
        with torch.enable_grad():
            score = _score(model, inputs, answer_ids, mm_encoder_outputs={"image": encoded})
            (gradient,) = torch.autograd.grad(score, visual_tokens)
    return _relevance(visual_tokens, gradient).unflatten(0, (isqrt(num_visual_tokens),) * 2)


def conversation(image: Image.Image | str, question: str, earlier: Sequence[tuple[str, str]] = ()) -> list[dict]:
    """The messages of a chat in which `question` is asked about `image`, after `earlier` questions and answers."""
    messages = []
    for asked, answered in earlier:
        messages.append({"role": "user", "content": [{"type": "text", "text": asked}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answered}]})
    messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    return messages


def encode_chat(
    model: PreTrainedModel, processor: ProcessorMixin, messages: list[dict], num_visual_tokens: int, **options
) -> BatchFeature:
    """The model's inputs for a chat, on its device; `options` are those of `apply_chat_template`."""
    budget = {"num_visual_tokens": num_visual_tokens}
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=budget, **options
    )
    return inputs.to(model.device)


def _encode_answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: list[dict],
    answer: str,
    prompt_ids: torch.Tensor,
    num_visual_tokens: int,
) -> tuple[BatchFeature, torch.Tensor]:
    """The model's inputs for the chat `asked` with its answer, and the ids of the answer."""
    answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    inputs = encode_chat(model, processor, [*asked, answered], num_visual_tokens, continue_final_message=True)
    ids = inputs["input_ids"][0]
    # The answer's tokens are those that the prompt does not have: the template may put a space before them
    shared = min(len(ids), len(prompt_ids))
    return inputs, ids[int((ids[:shared] == prompt_ids[:shared]).cumprod(0).sum()) :]


def _score(model: PreTrainedModel, inputs: BatchFeature, answer_ids: torch.Tensor, **options) -> torch.Tensor:
    """Log-probability of an answer at the end of the input."""
    logits = model(**inputs, logits_to_keep=len(answer_ids) + 1, use_cache=False, **options).logits[0, :-1].float()
    return -F.cross_entropy(logits, answer_ids.to(logits.device), reduction="sum")


def _relevance(features: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Element-wise Grad-CAM, `(1, num_positions, num_channels)` to `(num_positions,)`, float32 on the CPU."""
    return (gradients.float() * features.detach().float()).relu().sum(-1)[0].cpu()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    # Not `train()` afterwards: a frozen part may have a different mode
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _watch_projector(projector: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dict that the projector's next pass fills with its inputs, as leaves that take gradients, and output."""
    seen = {}

    def before(module, arguments):
        query_features, memory_features, num_visual_tokens = arguments
        # The features of a frozen tower have no graph
        seen["query_features"] = query_features.detach().requires_grad_()
        seen["memory_features"] = memory_features.detach().requires_grad_()
        return seen["query_features"], seen["memory_features"], num_visual_tokens

    def after(module, arguments, output):
        seen["visual_tokens"] = output

    def attend(module, arguments):
        queries, keys, _ = arguments
        num_patches = seen["query_features"].shape[1]
        if queries is None:  # cells of one patch, which gets all attention
            seen["window_attention"] = torch.ones([isqrt(num_patches)] * 2)
        else:
            seen["window_attention"] = _window_attention(module, queries, keys, num_patches)

    handles = [projector.register_forward_pre_hook(before), projector.register_forward_hook(after)]
    # By name: the class in a checkpoint's own code is another object
    cells = [module for module in projector.modules() if type(module).__name__ == "CellAttention"]
    handles += [module.register_forward_pre_hook(attend) for module in cells]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _window_attention(
    attention: nn.MultiheadAttention, queries: torch.Tensor, keys: torch.Tensor, num_patches: int
) -> torch.Tensor:
    """
    The attention weights of all cells, laid out on the patch grid: float32 `(G, G)`, on the CPU.

    The cells' `attention` has packed weights, `queries` are `(1, V, hidden_size)`, row by row of the query grid, and
    `keys` `(1, V, num_levels * (G/g)², hidden_size)`, those that a cell's query sees; `num_patches` is G².
    """
    projected = (
        F.linear(tokens[0].float(), weight.float(), bias.float()).unflatten(-1, (attention.num_heads, -1))
        for tokens, weight, bias in zip(
            (queries, keys), attention.in_proj_weight.chunk(3)[:2], attention.in_proj_bias.chunk(3)[:2], strict=True
        )
    )
    scores = torch.einsum("vhd,vmhd->vhm", *projected) * attention.head_dim**-0.5
    weights = scores.softmax(-1).mean(1)
    side, scale = isqrt(len(weights)), isqrt(num_patches // len(weights))
    cells = weights.view(side, side, -1, scale, scale).sum(2)  # the levels of a patch together
    return cells.transpose(1, 2).reshape(side * scale, -1).cpu()


def seen_image(pixel_values: torch.Tensor, processor: ProcessorMixin, patch_size: int) -> torch.Tensor:
    """
    The vision tower's input for one image, `(3, height, width)` from the processor, as a picture: `(height, width, 3)`,
    float32 in 0 … 1, on the CPU, where whole patches of `patch_size` pixels cover the image.
    """
    image_processor = processor.image_processor
    pixels = pixel_values.float().cpu().movedim(0, -1)
    if image_processor.do_normalize:
        pixels = pixels * torch.tensor(image_processor.image_std) + torch.tensor(image_processor.image_mean)
    height, width = (size - size % patch_size for size in pixels.shape[:2])
    return pixels[:height, :width].clamp(0, 1)


def draw(explanations: list[GradCam], output: str | Path):
    """
    Draws explanations of answers to one question about one image, a row for each budget, as a picture of a type that
    matplotlib writes, such as PNG.

    Raises:
        ValueError: If the picture's type is unknown.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    with_windows = all(explanation.window_attention is not None for explanation in explanations)
    titles = [
        "What the model sees",
        "Relevance of patches read",
        "Relevance of visual tokens",
        "The same, token by token",
        *["Attention within each cell"] * with_windows,
    ]
    num_rows, num_columns = len(explanations), len(titles)
    figure = Figure(figsize=(2.9 * num_columns, 3.4 * num_rows + 1.4), layout="constrained")
    figure.suptitle(_wrap(explanations[0].question), fontsize=14, fontweight="bold", parse_math=False)
    *rows, legend = figure.subfigures(num_rows + 1, 1, height_ratios=[*[3.4] * num_rows, 0.8])
    # As multiples of an even spread, so that cells of different sizes compare
    windows = [e.window_attention * e.input_map.numel() / e.num_visual_tokens for e in explanations if with_windows]
    for index, (row, explanation) in enumerate(zip(rows, explanations, strict=True)):
        row.suptitle(_wrap(_describe(explanation)), fontsize=11, parse_math=False)
        axes = row.subplots(1, num_columns)
        height, width = explanation.image.shape[:2]
        extent = (0, width, height, 0)
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title if index == 0 else "", fontsize=10)
            axis.imshow(explanation.image.numpy(), extent=extent)
            axis.set_axis_off()
        for axis, relevance, interpolation in (
            (axes[1], explanation.input_map, "bilinear"),
            (axes[2], explanation.output_map, "bilinear"),
            (axes[3], explanation.output_map, "nearest"),
        ):
            peak = float(relevance.max()) or 1.0  # of an answer that does not depend on the image
            share = relevance.numpy() / peak
            axis.imshow(
                share,
                cmap="jet",
                alpha=0.1 + 0.6 * share,  # without relevance, the image keeps its colours
                vmin=0,
                vmax=1,
                interpolation=interpolation,
                extent=extent,
            )
        if with_windows:
            looked = axes[4].imshow(
                windows[index].numpy(), cmap="viridis", alpha=0.8, norm=LogNorm(0.1, 10), extent=extent
            )
        side = explanation.output_map.shape[0]
        for axis in axes[3:]:
            for line in range(1, side):
                axis.axhline(line * height / side, color="white", linewidth=0.5)
                axis.axvline(line * width / side, color="white", linewidth=0.5)
    relevance_label = "relevance for the answer (element-wise Grad-CAM), as a share of the map's largest"
    bars = legend.subplots(1, 1 + with_windows, squeeze=False, width_ratios=(3, 2)[: 1 + with_windows])[0]
    figure.colorbar(ScalarMappable(cmap="jet"), cax=bars[0], orientation="horizontal", label=relevance_label)
    if with_windows:
        label = "attention within a token's cell, as a multiple of an even spread"
        figure.colorbar(looked, cax=bars[1], orientation="horizontal", extend="both", label=label)
    figure.savefig(output, dpi=120)


def _describe(explanation: GradCam) -> str:
    plural = "" if explanation.num_visual_tokens == 1 else "s"
    return (
        f"{explanation.num_visual_tokens} visual token{plural}: “{explanation.answer}”"
        f" (log-probability {explanation.score:.2g})"
    )


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 110, max_lines=4, placeholder=" …"))


def main(arguments: list[str] | None = None):
    """Command line: writes the picture and prints the answers, or exits with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or repository of a Delta-LLaVA model")
    parser.add_argument("--image", required=True, help="file or URL")
    parser.add_argument("--question", required=True)
    parser.add_argument("--num_visual_tokens", type=int, nargs="+", required=True, help="a row of the picture each")
    parser.add_argument("--answer", help="the answer to explain (default: the model's at each budget)")
    parser.add_argument("--output", default="gradcam.png", help="the picture (default: gradcam.png)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: the checkpoint's)")
    options = parser.parse_args(arguments)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            options.checkpoint, dtype=options.dtype, device_map="auto", trust_remote_code=True
        )
        processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SystemExit(f"error: checkpoint {options.checkpoint} does not load: {reason}") from error
    explanations = []
    try:
        for budget in options.num_visual_tokens:
            query_grid_size(budget, model.config.patch_grid_size)
        for budget in options.num_visual_tokens:
            explanations.append(grad_cam(model, processor, options.image, options.question, budget, options.answer))
            print(_describe(explanations[-1]), flush=True)
        draw(explanations, options.output)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"Written: {options.output}")


if __name__ == "__main__":
    main()
