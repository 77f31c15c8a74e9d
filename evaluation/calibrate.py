"""
Finds when a cascade (`delta_llava.cascade`) should ask again, on validation questions with known answers.

```
python -m delta_llava.evaluation.calibrate --checkpoint checkpoints/delta-llava-vicuna-7b --json_path validation.json \\
    --image_folder images --budgets 16 144 --target_tokens 40
```

The checkpoint answers all questions at each of its budgets: records of any form that training takes, each with one
question about its images and one short answer. An answer is right if it equals the record's after the normalization of
the VQA evaluation. Of all thresholds whose mean number of visual tokens per image, over both passes, is within the
target, the one with the highest accuracy goes into the checkpoint's `cascade.json`, which `cascade.generate` reads.
"""

import argparse
import json
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from ..cascade import CASCADE_NAME, NEVER, check_budgets, generate_scored
from ..records import BadRecord, Chat, parse_record, read_records
from .checkpoint import check_visual_tokens, locate
from .metrics.normalization import comparable


@dataclass
class Cascade:
    """
    A cascade's figures at one threshold.

    Args:
        threshold (`float`): Mean log-probability below which it asks again, in nats.
        mean_visual_tokens (`float`): Visual tokens per image, over both passes.
        accuracy, asked_again (`float`): Shares of the questions that are answered right, and asked again.
    """

    threshold: float
    mean_visual_tokens: float
    accuracy: float
    asked_again: float


def read_questions(json_path: str | Path, image_folder: str | Path) -> list[Chat]:
    """
    Reads validation questions, records of any form that training takes: each a chat of one question and one answer, and
    its images as paths or bytes.

    Raises:
        ValueError: If a record is not one question about at least one image with its answer, or an image is missing.
    """
    questions = []
    for index, record in enumerate(read_records(json_path)):
        try:
            chat = parse_record(record, require_images=True)
        except BadRecord as error:
            raise ValueError(f"{json_path}, record {index}: {error}") from error
        images = [Path(image_folder, image) if isinstance(image, str) else image["bytes"] for image in chat.images]
        for image in images:
            if isinstance(image, Path) and not image.is_file():
                raise ValueError(f"{json_path}, record {index}: there is no image {image}.")
        questions.append(chat._replace(images=images))
    return questions


def answer_all(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    questions: list[Chat],
    num_visual_tokens: int,
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> tuple[list[bool], list[float]]:
    """
    Answers questions of [`read_questions`] greedily, by the model and the processor of one checkpoint, with one budget
    for every image.

    Returns:
        `tuple[list[bool], list[float]]`: Which answers are right, and their mean log-probabilities in nats.
    """
    right, log_probabilities = [], []
    with tqdm(total=len(questions), desc=f"{num_visual_tokens} visual tokens", unit=" questions") as progress:
        for first in range(0, len(questions), batch_size):
            batch = questions[first : first + batch_size]
            inputs = processor.apply_chat_template(
                [_question(chat) for chat in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "num_visual_tokens": num_visual_tokens},
            ).to(model.device, model.dtype)
            answers, scores = generate_scored(model, **inputs, do_sample=False, max_new_tokens=max_new_tokens)
            for answer, chat in zip(processor.batch_decode(answers, skip_special_tokens=True), batch, strict=True):
                right.append(comparable(answer) == comparable(chat.messages[1]["content"][0]["text"]))
            log_probabilities += scores.tolist()
            progress.update(len(batch))
    return right, log_probabilities


def _question(chat: Chat) -> list[dict]:
    images = iter(chat.images)
    content = [
        {"type": "image", "image": image if isinstance(image := next(images), bytes) else str(image)}
        if part["type"] == "image"
        else part
        for part in chat.messages[0]["content"]
    ]
    return [{"role": "user", "content": content}]


def cascades(
    small: tuple[list[bool], list[float]], large: list[bool], num_images: list[int], budgets: tuple[int, int]
) -> list[Cascade]:
    """
    The cascades of all thresholds that differ in their answers, from the one that never asks again to the one that asks
    again whenever it is not certain.

    Args:
        small (`tuple[list[bool], list[float]]`): From [`answer_all`] at the smaller budget.
        large (`list[bool]`): Which answers are right at the larger one.
        num_images (`list[int]`): Of each question.
        budgets (`tuple[int, int]`): The smaller and the larger.
    """
    least_sure_first = sorted(zip(small[1], small[0], large, num_images, strict=True))
    scores = [score for score, *_ in least_sure_first]
    # After asking the 0, 1, 2, ... least sure again
    right = list(accumulate((after - before for _, before, after, _ in least_sure_first), initial=sum(small[0])))
    images = list(accumulate((images for *_, images in least_sure_first), initial=0))
    found = []
    for threshold in (NEVER, *sorted({score for score in scores if score < 0}), 0.0):
        asked = bisect_left(scores, threshold)
        tokens = images[-1] * budgets[0] + images[asked] * budgets[1]
        found.append(Cascade(threshold, tokens / images[-1], right[asked] / len(scores), asked / len(scores)))
    return found


def choose(found: list[Cascade], target_tokens: float) -> Cascade:
    """
    The most accurate cascade with at most `target_tokens` visual tokens per image on average; of equals, the cheapest.

    Raises:
        ValueError: If even the one that never asks again needs more.
    """
    affordable = [point for point in found if point.mean_visual_tokens <= target_tokens]
    if not affordable:
        raise ValueError(f"target_tokens={target_tokens:g} is less than the smaller budget, which every image needs.")
    return max(affordable, key=lambda point: (point.accuracy, -point.mean_visual_tokens))


def draw(fixed: dict[int, float], found: list[Cascade], chosen: Cascade, budgets: tuple[int, int], output: str | Path):
    """
    Draws accuracy against visual tokens: `fixed`, from 0 to 1, of each budget by itself, and the cascades `found` for a
    pair of `budgets`, as a picture of a type that matplotlib writes, such as PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(fixed), [100 * accuracy for accuracy in fixed.values()], "o-", label="one budget for all")
    points = sorted(found, key=lambda point: point.mean_visual_tokens)
    tokens = [point.mean_visual_tokens for point in points]
    axes.plot(tokens, [100 * point.accuracy for point in points], label=f"{budgets[0]}, and {budgets[1]} where unsure")
    label = f"chosen: asks {chosen.asked_again:.0%} again"
    axes.plot(chosen.mean_visual_tokens, 100 * chosen.accuracy, "*", markersize=14, color="black", label=label)
    axes.set_xscale("log")
    axes.set_xticks(list(fixed), [str(budget) for budget in fixed])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens per image, of all passes (mean)")
    axes.set_ylabel("answers that are right, %")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120)


def calibrate(
    checkpoint: str | Path,
    json_path: str | Path,
    image_folder: str | Path,
    budgets: tuple[int, int],
    target_tokens: float,
    plot: str | Path = "cascade.png",
    dtype: str = "auto",
    batch_size: int = 16,
    max_new_tokens: int = 64,
) -> str:
    """
    Finds the threshold, writes it to the checkpoint and draws the curve.

    Args:
        checkpoint (`str` or `Path`): Folder, which gets `cascade.json`.
        json_path, image_folder (`str` or `Path`): JSON list, or JSON lines, of questions, and folder of their images.
        budgets (`tuple[int, int]`): The smaller and the larger budget of the cascade.
        target_tokens (`float`): Largest mean number of visual tokens per image.
        plot (`str` or `Path`, *optional*, defaults to `"cascade.png"`): The picture.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights.
        batch_size, max_new_tokens (`int`): Questions per batch, and the longest answer.

    Returns:
        `str`: A Markdown table of accuracy against visual tokens.

    Raises:
        ValueError: If questions, budgets, target or plot are not usable, or the checkpoint is not a folder.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    if not Path(checkpoint).is_dir():
        raise ValueError(f"{checkpoint} is not a folder, which {CASCADE_NAME} could be written to: download it first.")
    folder, _ = locate(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    check_visual_tokens(model.config, list(budgets))
    budgets = check_budgets(budgets, model.config.patch_grid_size)
    choose([Cascade(NEVER, budgets[0], 0.0, 0.0)], target_tokens)
    if Path(plot).suffix[1:] not in FigureCanvasBase.filetypes or not Path(plot).parent.is_dir():
        raise ValueError(
            f"plot={plot} must be a picture in an existing folder, of one of the types "
            f"{sorted(FigureCanvasBase.filetypes)}."
        )
    questions = read_questions(json_path, image_folder)

    answered = {
        budget: answer_all(model, processor, questions, budget, batch_size, max_new_tokens)
        for budget in sorted({*model.config.visual_token_budgets, *budgets})
    }
    fixed = {budget: fmean(right) for budget, (right, _) in answered.items()}
    num_images = [len(chat.images) for chat in questions]
    found = cascades(answered[budgets[0]], answered[budgets[1]][0], num_images, budgets)
    chosen = choose(found, target_tokens)
    written = {
        "num_visual_tokens": list(budgets),
        "threshold": chosen.threshold,
        "validation": {
            "questions": len(questions),
            "accuracy": chosen.accuracy,
            "mean_visual_tokens": chosen.mean_visual_tokens,
            "asked_again": chosen.asked_again,
        },
    }
    (folder / CASCADE_NAME).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    draw(fixed, found, chosen, budgets, plot)
    lines = ["| visual tokens per image | accuracy, % |", "|---|---|"]
    lines += [f"| {budget} | {100 * accuracy:.1f} |" for budget, accuracy in fixed.items()]
    lines.append(
        f"| {chosen.mean_visual_tokens:.1f}: {budgets[0]}, and {budgets[1]} for the {chosen.asked_again:.1%} below"
        f" {chosen.threshold:.4g} nats | {100 * chosen.accuracy:.1f} |"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None):
    """Command line: prints the table, or exits with one line that says what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help=f"folder of a Delta-LLaVA model; gets {CASCADE_NAME}")
    parser.add_argument("--json_path", required=True, help="validation questions, not used in training")
    parser.add_argument("--image_folder", required=True)
    parser.add_argument("--budgets", type=int, nargs=2, required=True, metavar=("SMALLER", "LARGER"))
    parser.add_argument("--target_tokens", type=float, required=True, help="largest mean of visual tokens per image")
    parser.add_argument("--plot", default="cascade.png", help="the picture (default: cascade.png)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument("--batch_size", type=int, default=16, help="questions per batch (default: 16)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of an answer (default: 64)")
    options = parser.parse_args(arguments)
    try:
        print(calibrate(**vars(options)))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"Written: {Path(options.checkpoint) / CASCADE_NAME} and {options.plot}")


if __name__ == "__main__":
    main()
