"""The world of the demo: 48x48 pictures with up to four coloured things, in LLaVA's JSON format.

    python -m delta_llava.demo.scenes --output_dir demo/out/scenes

A scene has four places; each is empty or holds a circle, a square, a triangle or a handwritten digit, in
one of four colours. The digits are the 1,797 scans of 8x8 pixels that scikit-learn ships
(`sklearn.datasets.load_digits`: Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, licence CC BY 4.0), so the model also reads what nobody drew by rule.

Training and held-out scenes share neither a layout (what stands where) nor a scan: fixed rules decide for
every layout and every scan to which side it belongs, so whatever is trained here never meets the other side.
"""

import argparse
import functools
import json
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits


IMAGE_SIZE = 48
PLACES = ("top left", "top right", "bottom left", "bottom right")
SHAPES = ("circle", "square", "triangle")
DIGITS = tuple("0123456789")
COLOURS = {"red": (225, 45, 45), "green": (40, 185, 60), "blue": (60, 95, 245), "yellow": (240, 215, 50)}
COUNTS = ("zero", "one", "two", "three", "four")
KINDS = ("nothing", *SHAPES, "digit")
QUESTION_TYPES = ("kind", "colour", "digit", "place", "number")
DESCRIBE = "Describe the picture."


def kind(thing):
    """The kind (one of `KINDS`) of a place's content, which is `None` or a pair of colour and shape or digit."""
    if thing is None:
        return "nothing"
    return "digit" if thing[1] in DIGITS else thing[1]


def is_held_out(layout):
    """Whether a layout (the contents of the four places, in the order of `PLACES`) is kept from all training."""
    return zlib.crc32(repr(tuple(layout)).encode()) % 10 == 0


def random_layout(rng, held_out):
    """Draw the contents of the four places, each `None` or `(colour, shape or digit)`, of the wanted side."""
    while True:
        layout = []
        for drawn in rng.choice(KINDS, size=4, p=(0.19, 0.17, 0.17, 0.17, 0.30)):
            name = str(rng.choice(DIGITS)) if drawn == "digit" else str(drawn)
            layout.append(None if drawn == "nothing" else (str(rng.choice(list(COLOURS))), name))
        if is_held_out(layout) == held_out:
            return tuple(layout)


@functools.cache
def digit_scans(held_out):
    """Indices into `load_digits()` by digit, `{"0": array, …}`; every seventh scan is held out."""
    labels = load_digits().target
    of_this_side = (np.arange(len(labels)) % 7 == 0) == held_out
    return {digit: np.flatnonzero((labels == int(digit)) & of_this_side) for digit in DIGITS}


@functools.cache
def _scan_images():
    return (load_digits().images * (255 / 16)).astype(np.uint8)


def _background(rng):
    """A dim grey ground, `(48, 48, 3)` floats: plain, or with a gradient, in any case a little tinted and noisy."""
    steps = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    slopes = rng.uniform(-50, 50, 2) * (rng.random() < 0.6)
    grey = rng.uniform(35, 105) + slopes[0] * steps[:, None] + slopes[1] * steps[None, :]
    ground = grey[:, :, None] + rng.uniform(-12, 12, 3)
    return ground + rng.normal(0, rng.uniform(0, 9), ground.shape)


def _thing_mask(rng, name, held_out):
    """A jittered 24x24 mask (`L` image) of a shape or of a scan of a digit, and the scan's index or `None`."""
    size = rng.integers(17, 22) if name in DIGITS else rng.integers(14, 21)
    left, top = rng.integers(1, 24 - size, size=2)
    if name in DIGITS:
        scan = int(rng.choice(digit_scans(held_out)[name]))
        mask = Image.new("L", (24, 24))
        enlarged = Image.fromarray(_scan_images()[scan]).resize((size, size), Image.Resampling.BICUBIC)
        mask.paste(enlarged.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR), (left, top))
        return mask, scan
    # Drawn four times too large and reduced, which smooths the edges.
    mask = Image.new("L", (96, 96))
    draw = ImageDraw.Draw(mask)
    box = [4 * left, 4 * top, 4 * (left + size) - 1, 4 * (top + size) - 1]
    if name == "circle":
        draw.ellipse(box, fill=255)
    elif name == "square":
        inset = size // 4
        draw.rectangle([box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset], fill=255)
    else:
        draw.polygon([((box[0] + box[2]) / 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=255)
    return mask.resize((24, 24), Image.Resampling.BOX), None


def render(layout, rng, held_out):
    """Render a layout with random background, sizes, positions and scans.

    Returns:
        The picture, `(48, 48, 3)` uint8, and the list of the scans' indices that occur in it.
    """
    picture, scans = _background(rng), []
    for place, thing in enumerate(layout):
        if thing is None:
            continue
        mask, scan = _thing_mask(rng, thing[1], held_out)
        scans += [] if scan is None else [scan]
        rows, columns = (slice(24 * half, 24 * half + 24) for half in divmod(place, 2))
        alpha = np.asarray(mask, dtype=float)[:, :, None] / 255
        colour = np.array(COLOURS[thing[0]]) * rng.uniform(0.85, 1.1)
        picture[rows, columns] = (1 - alpha) * picture[rows, columns] + alpha * colour
    return picture.clip(0, 255).astype(np.uint8), scans


def tell(layout, rng):
    """The scene in words, one clause per place, in a random order."""
    things = ["nothing" if thing is None else f"a {thing[0]} {thing[1]}" for thing in layout]
    return ", ".join(f"{PLACES[place]}: {things[place]}" for place in rng.permutation(4))


def ask(layout, rng, question_type):
    """Draw one question of a type about a layout.

    Returns:
        The question and its answer, or `None` where the scene allows no question of this type.
    """
    if question_type == "number":
        subjects = [("things", sum(thing is not None for thing in layout))]
        subjects += [(f"{colour} things", sum(t is not None and t[0] == colour for t in layout)) for colour in COLOURS]
        # Weights by the answer, so that "zero" and "one" do not drown the rest.
        weights = np.array([(0.35, 0.6, 1.5, 2.5, 3)[count] for _, count in subjects])
        subject, count = subjects[rng.choice(len(subjects), p=weights / weights.sum())]
        return f"How many {subject} are there?", COUNTS[count]
    colours = [None if thing is None else thing[0] for thing in layout]
    allowed = {
        "kind": lambda place: True,
        "colour": lambda place: layout[place] is not None,
        "digit": lambda place: kind(layout[place]) == "digit",
        "place": lambda place: layout[place] is not None and colours.count(colours[place]) == 1,
    }[question_type]
    places = [place for place in range(4) if allowed(place)]
    if not places:
        return None
    place = int(rng.choice(places))
    thing, where = layout[place], PLACES[place]
    return {
        "kind": lambda: (f"What is at the {where}?", kind(thing)),
        "colour": lambda: (f"What colour is the thing at the {where}?", thing[0]),
        "digit": lambda: (f"Which digit is at the {where}?", thing[1]),
        "place": lambda: (f"Where is the {thing[0]} thing?", where),
    }[question_type]()


def conversation(layout, rng, question_types):
    """Draw questions of these types, as far as the scene allows them, shuffled and without repeats.

    Returns:
        A list of `(question, answer)`.
    """
    drawn = [ask(layout, rng, str(question_type)) for question_type in rng.permutation(question_types)]
    return [turn for turn in dict.fromkeys(drawn) if turn]


def _turns(pairs):
    """LLaVA's `conversations` of (question, answer) pairs, the image standing in the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": ("<image>\n" if index == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def write_scenes(output_dir, train_scenes=6000, held_out_scenes=160, seed=0, questions_per_scene=8):
    """Render scenes to PNG files and write the data of both stages and the held-out questions.

    Args:
        output_dir (`str`): receives `images/`, `pretrain.json` (captions), `finetune.json` (conversations) and
            `held_out.json` (a list of `{id, image, type, question, answer, scans}`).
        train_scenes (`int`), held_out_scenes (`int`): how many scenes of each side.
        seed (`int`): fixes every file bit by bit.
        questions_per_scene (`int`): the length of a training conversation; held-out scenes get one per type.
    """
    folder = Path(output_dir)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captions, conversations, held_out_questions = [], [], []
    for held_out, number in ((False, train_scenes), (True, held_out_scenes)):
        for index in range(number):
            rng = np.random.default_rng((seed, held_out, index))
            layout = random_layout(rng, held_out)
            picture, scans = render(layout, rng, held_out)
            record = {"id": f"{'held_out' if held_out else 'train'}-{index:05d}"}
            record["image"] = record["id"] + ".png"
            Image.fromarray(picture).save(folder / "images" / record["image"])
            if held_out:
                for question_type in QUESTION_TYPES:
                    drawn = ask(layout, rng, question_type)
                    if drawn:
                        question = {"type": question_type, "question": drawn[0], "answer": drawn[1], "scans": scans}
                        held_out_questions.append({**record, **question})
                continue
            caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": tell(layout, rng)}]
            captions.append({**record, "conversations": caption})
            turns = conversation(layout, rng, np.resize(QUESTION_TYPES, questions_per_scene))
            conversations.append({**record, "conversations": _turns(turns)})
    for name, rows in (("pretrain", captions), ("finetune", conversations), ("held_out", held_out_questions)):
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def main():
    """Command line of `write_scenes`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--train_scenes", type=int, default=6000)
    parser.add_argument("--held_out_scenes", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    write_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
