"""An answer at a small budget, repeated at a larger one if the model is unsure of it."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, cached_file

from .configuration_delta_llava import query_grid_size


CASCADE_NAME = "cascade.json"  # beside the weights, where `delta_llava.evaluation.calibrate` writes it
NEVER = -1e30  # a threshold that no answer is below, in a number that JSON has
# They end, stream or multiply the answers of one pass, and a cascade has two
REFUSED = ("streamer", "stopping_criteria", "stop_strings", "num_return_sequences", "max_length", "mm_encoder_outputs")
# Set here
OUTPUTS = ("return_dict_in_generate", "output_logits")


@dataclass
class CascadeOutput(ModelOutput):
    """
    Args:
        sequences (`torch.Tensor` of shape `(batch_size, max_answer_length)`, int64):
            The answers without their prompts, padded on the right.
        num_visual_tokens (`torch.Tensor` of shape `(batch_size,)`, int64):
            The budget of each image with which the answer was given.
        visual_tokens_used (`torch.Tensor` of shape `(batch_size,)`, int64):
            Visual tokens that the language model read for each row, of all its images and in both passes.
        log_probabilities (`torch.Tensor` of shape `(batch_size,)`, float32):
            Mean log-probability of each answer's tokens, its end token included, in nats.
    """

    sequences: torch.Tensor | None = None
    num_visual_tokens: torch.Tensor | None = None
    visual_tokens_used: torch.Tensor | None = None
    log_probabilities: torch.Tensor | None = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    num_visual_tokens: torch.Tensor | None = None,
    *,
    budgets: Sequence[int] | None = None,
    threshold: float | None = None,
    **kwargs: Any,
) -> CascadeOutput:
    """
    Answer at the smaller of two budgets, and again at the larger one in the rows whose answer has a mean
    log-probability below a threshold. The vision tower runs once; rows without images are answered once.

    Greedy decoding, beams and sampling all work. The log-probabilities are the model's own, before temperature and the
    like.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`]): In any dtype.
        input_ids, attention_mask, pixel_values, num_visual_tokens:
            What the processor returns for the smaller budget.
        budgets (`Sequence[int]` of two, *optional*):
            The smaller and the larger budget of each image. By default the checkpoint's.
        threshold (`float`, *optional*):
            In nats, 0 or less: `0` repeats nearly all answers, `-inf` none. By default the checkpoint's, found by
            `python -m delta_llava.evaluation.calibrate`.
        **kwargs: For `generate`.

    Returns:
        [`CascadeOutput`]

    Raises:
        ValueError: If the prompts were not made for the smaller budget, the budgets are not two that the patch grid
            allows, or an argument of `generate` does not fit two passes.
        FileNotFoundError: If `budgets` or `threshold` is missing, and the checkpoint has no calibration.

    Example:

    ```python
    >>> from delta_llava.cascade import generate

    >>> inputs = processor.apply_chat_template(chats, ..., processor_kwargs={"num_visual_tokens": 16})
    >>> output = generate(model, **inputs, budgets=(16, 144), threshold=-0.1, max_new_tokens=20)
    >>> processor.batch_decode(output.sequences, skip_special_tokens=True), output.visual_tokens_used
    ```"""
    if refused := sorted({*REFUSED, *OUTPUTS} & kwargs.keys()):
        raise ValueError(f"{', '.join(refused)}: not for a cascade, whose answers may come from a second pass.")
    if budgets is None or threshold is None:
        calibration = read_calibration(model.config._name_or_path, getattr(model.config, "_commit_hash", None))
        budgets = calibration["num_visual_tokens"] if budgets is None else budgets
        if threshold is None and list(budgets) != calibration["num_visual_tokens"]:
            raise ValueError(
                f"The checkpoint was calibrated for budgets={calibration['num_visual_tokens']}, not for"
                f" {list(budgets)}: name a threshold."
            )
        threshold = calibration["threshold"] if threshold is None else threshold
    small, large = check_budgets(budgets, model.config.patch_grid_size)
    if not threshold <= 0:
        raise ValueError(f"threshold={threshold} must be a mean log-probability: 0 or less.")
    num_image_tokens = (input_ids == model.config.image_token_id).sum(1)
    asked = [] if num_visual_tokens is None else torch.as_tensor(num_visual_tokens).flatten().tolist()
    if set(asked) - {small} or bool((num_image_tokens % small).any()):
        raise ValueError(
            f"The prompts must be made at the smaller budget, num_visual_tokens={small}, but name {asked} and hold"
            f" {num_image_tokens.tolist()} image tokens."
        )
    num_images = num_image_tokens // small
    num_pixels = 0 if pixel_values is None else len(pixel_values)
    if int(num_images.sum()) != num_pixels:
        raise ValueError(f"The prompts have image tokens for {num_images.tolist()} images, but there are {num_pixels}.")
    attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    features = None if pixel_values is None else model.model._run_vision_tower(pixel_values)[1:]
    config, kwargs = _settings(model, kwargs)
    pad = config.pad_token_id

    def answer(ids: torch.Tensor, mask: torch.Tensor, images: torch.Tensor, budget: int):
        encoded = {}
        if features is not None and len(images):
            visual_tokens = model.model.multi_modal_projector(
                *(part[images.to(part.device)] for part in features), budget
            )
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=list(visual_tokens))}
        return generate_scored(
            model, input_ids=ids, attention_mask=mask, mm_encoder_outputs=encoded, generation_config=config, **kwargs
        )

    every = torch.arange(int(num_images.sum()), device=input_ids.device)
    sequences, log_probabilities = answer(input_ids, attention_mask, every, small)
    budgets = torch.full_like(num_images, small)
    again = ((log_probabilities < threshold) & (num_images > 0)).nonzero().flatten()
    if len(again):
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids[again], attention_mask[again], strict=True)]
        image = model.config.image_token_id
        prompts = [ids.repeat_interleave(repeats(ids, image, small, large)) for ids in prompts]
        ids = pad_sequence(prompts, batch_first=True, padding_value=pad, padding_side="left")
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        mask = torch.arange(ids.shape[1], 0, -1, device=ids.device) <= lengths[:, None]
        images = torch.isin(torch.arange(len(num_images), device=ids.device).repeat_interleave(num_images), again)
        better, log_probabilities[again] = answer(ids, mask.long(), images.nonzero().flatten(), large)
        width = max(sequences.shape[1], better.shape[1])
        sequences, better = (F.pad(part, (0, width - part.shape[1]), value=pad) for part in (sequences, better))
        sequences[again] = better
        budgets[again] = large
    return CascadeOutput(
        sequences=sequences,
        num_visual_tokens=budgets,
        visual_tokens_used=num_images * (small + large * (budgets == large)),
        log_probabilities=log_probabilities,
    )


@torch.no_grad()
def generate_scored(
    model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Answers, and how sure the model is of them.

    Args:
        model ([`DeltaLlavaForConditionalGeneration`]): In any dtype.
        input_ids (`torch.Tensor` of shape `(batch_size, prompt_length)`, int64): The prompts.
        **kwargs: For `generate`, images among them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The answers without their prompts, `(batch_size, answer_length)`, int64,
        and the mean log-probability of each, `(batch_size,)`, float32, in nats: of its tokens and of the end token, as
        the model gives it, before temperature and the like.

    Raises:
        ValueError: If `generate` is to return several answers of a prompt.
    """
    config, kwargs = _settings(model, kwargs)
    output = model.generate(input_ids=input_ids, generation_config=config, **kwargs)
    scores = model.compute_transition_scores(
        output.sequences, output.logits, output.get("beam_indices"), normalize_logits=True
    )
    answers = output.sequences[:, -scores.shape[1] :]
    ends = torch.tensor([] if config.eos_token_id is None else config.eos_token_id, device=answers.device).flatten()
    is_end = torch.isin(answers, ends)
    is_answer = is_end.cumsum(1) - is_end.long() == 0
    return answers, scores.masked_fill(~is_answer, 0).sum(1) / is_answer.sum(1)


def _settings(model: PreTrainedModel, options: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """The generation configuration, and the arguments for the model."""
    options = {**options, **dict.fromkeys(OUTPUTS, True)}
    config = deepcopy(options.pop("generation_config", None) or model.generation_config)
    options = config.update(**options)
    for name in ("eos_token_id", "pad_token_id"):  # as `generate` does
        if getattr(config, name) is None:
            setattr(config, name, getattr(model.generation_config, name))
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = 0 if ends is None else ends[0] if isinstance(ends, list) else ends
    if (config.num_return_sequences or 1) > 1:
        raise ValueError("num_return_sequences must be 1: a cascade gives one answer to each prompt.")
    if config.max_length is not None and config.max_new_tokens is None:
        raise ValueError(f"max_length={config.max_length} counts the prompt, which grows: set max_new_tokens.")
    return config, options


def repeats(ids: torch.Tensor, image_token_id: int, small: int, large: int) -> torch.Tensor:
    """How often each token of prompts at the smaller budget occurs at the larger, `(..., length)` as the `ids`."""
    is_image = ids == image_token_id
    is_first = is_image & (is_image.cumsum(-1) % small == 1 % small)
    return torch.where(is_image, is_first * large, 1)


def check_budgets(budgets: Sequence[int], patch_grid_size: int) -> tuple[int, int]:
    """
    The smaller and the larger budget of a cascade.

    Raises:
        ValueError: If they are not two, the smaller one first, that a patch grid of this side allows.
    """
    if isinstance(budgets, (str, int)) or len(budgets) != 2 or not budgets[0] < budgets[1]:
        raise ValueError(f"budgets={budgets} must be two numbers of visual tokens, the smaller one first.")
    for budget in budgets:
        query_grid_size(budget, patch_grid_size)
    return tuple(budgets)


def read_calibration(checkpoint: str | Path, revision: str | None = None) -> dict[str, Any]:
    """
    The result of `python -m delta_llava.evaluation.calibrate` for a checkpoint.

    Args:
        checkpoint (`str` or `Path`): Folder, or `ORG/NAME` of a Hub repository.
        revision (`str`, *optional*): Branch or commit of the repository.

    Returns:
        `dict`: `num_visual_tokens`, the two budgets, `threshold` in nats, and `validation`, the data it was found on.

    Raises:
        FileNotFoundError: If the checkpoint has none.
        ValueError: If it is damaged.
    """
    try:
        file = cached_file(checkpoint, CASCADE_NAME, revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"{checkpoint or 'The model'} has no {CASCADE_NAME}: name budgets and threshold, or run"
            " python -m delta_llava.evaluation.calibrate."
        ) from error
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        small, large = found["num_visual_tokens"]
        valid = small < large and found["threshold"] <= 0
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if not valid:
        raise ValueError(f"{file} is damaged: two budgets, smaller first, and a threshold of 0 or less are needed.")
    return found
