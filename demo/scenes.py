"""The world of the demo: pictures of 96x96 pixels with emoji on a lattice of 4x4 places, in LLaVA's JSON format.

    python -m delta_llava.demo.scenes --output_dir demo/out/scenes

Columns are a to d, rows 1 to 4. A thing is small and fills one place, or big and fills a quadrant of two by two
places, named by its top left one (a1, c1, a3 or c3). A scene holds each thing at most once, in one of the
designs of `atlases.py`. A scene of big things needs few visual tokens, one of small things many.

Held-out scenes share no layout with training scenes: a fixed rule puts each layout on one side. One design, OpenMoji,
is held out whole: no training sees it.
"""

import argparse
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from . import atlases


IMAGE_SIZE = 96
PLACE_SIZE = 24
COLUMNS, ROWS = "abcd", "1234"
PLACES = tuple(column + row for row in ROWS for column in COLUMNS)
QUADRANTS = ("a1", "c1", "a3", "c3")
GROUPS = atlases.GROUPS
GROUP_OF = {thing: group for group, things in GROUPS.items() for thing in things}
THINGS = tuple(GROUP_OF)
TRAIN_DESIGNS = tuple(design for design in atlases.DESIGNS if design != atlases.HELD_OUT_DESIGN)
COUNTS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
QUESTION_TYPES = ("thing", "place", "beside", "number", "group", "presence")
TRAINED_TYPES = ("number", "beside", *QUESTION_TYPES)  # the hardest twice
DESCRIBE = "Describe the picture."
HOW_MANY = "How many {} are there?"


class Placed(NamedTuple):
    """A thing in a scene: its place (the top left one if it is big), its name and whether it is big."""

    place: str
    thing: str
    big: bool = False

    def places(self):
        """All places it covers."""
        return quadrant(self.place) if self.big else (self.place,)

    def __str__(self):
        return f"{self.place} {'big ' * self.big}{self.thing}"


def beside(place, step):
    """The place that is `step` columns and rows away, or `None` outside the picture."""
    column, row = COLUMNS.index(place[0]) + step[0], ROWS.index(place[1]) + step[1]
    return COLUMNS[column] + ROWS[row] if 0 <= column < 4 and 0 <= row < 4 else None


def quadrant(place):
    """The four places of the quadrant with this top left place."""
    return tuple(beside(place, step) for step in ((0, 0), (1, 0), (0, 1), (1, 1)))


def covered(layout):
    """`{place: Placed}` of the places that are not empty."""
    return {place: placed for placed in layout for place in placed.places()}


def is_held_out(layout):
    """Whether a layout, a tuple of [`Placed`] in the order of `PLACES`, is held out from all training."""
    return zlib.crc32(tell(layout).encode()) % 10 == 0


def random_layout(rng, held_out, things=THINGS):
    """Draw a layout, held out or for training, of these things: a tuple of [`Placed`] in the order of `PLACES`."""
    while True:
        places = []
        filled = rng.uniform(0.4, 0.9)
        for corner in QUADRANTS:
            if rng.random() < 0.4:
                places += [(corner, True)] * (rng.random() < 0.9)
            else:
                places += [(place, False) for place in quadrant(corner) if rng.random() < filled]
        # Few groups in a scene, so that there is something to count.
        groups = rng.choice(list(GROUPS), size=rng.integers(2, len(GROUPS) + 1), replace=False)
        at_hand = rng.permutation([thing for thing in things if GROUP_OF[thing] in groups])
        places = [places[index] for index in rng.permutation(len(places))[: len(at_hand)]]
        drawn = [Placed(place, str(thing), big) for (place, big), thing in zip(places, at_hand, strict=False)]
        layout = tuple(sorted(drawn, key=lambda placed: PLACES.index(placed.place)))
        if layout and is_held_out(layout) == held_out:
            return layout


def _background(rng):
    """A background, `(96, 96, 3)` floats: slightly tinted and noisy, often with a gradient."""
    steps = np.linspace(-0.5, 0.5, IMAGE_SIZE)
    slopes = rng.uniform(-50, 50, 2) * (rng.random() < 0.6)
    grey = rng.uniform(60, 220) + slopes[0] * steps[:, None] + slopes[1] * steps[None, :]
    ground = grey[:, :, None] + rng.uniform(-20, 20, 3)
    return ground + rng.normal(0, rng.uniform(0, 5), ground.shape)


def render(layout, rng, design, crop=atlases.crop):
    """Render a layout in one design, with random background, sizes and positions.

    Args:
        crop (`Callable`): draws a thing, as `atlases.crop` does; training of the tower varies its drawings.

    Returns:
        The picture, `(96, 96, 3)` uint8.
    """
    picture = _background(rng)
    for placed in layout:
        room = PLACE_SIZE * (2 if placed.big else 1)
        size = int(rng.integers(round(0.8 * room), room + 1))
        left, top = (int(rng.integers(0, room - size + 1)) for _ in range(2))
        left += PLACE_SIZE * COLUMNS.index(placed.place[0])
        top += PLACE_SIZE * ROWS.index(placed.place[1])
        drawing = crop(design, placed.thing, size)
        part = picture[top : top + size, left : left + size]
        part[:] = drawing[..., :3] + (1 - drawing[..., 3:] / 255) * part
    return picture.clip(0, 255).astype(np.uint8)


def count(layout, group):
    """How many things of a group are in a scene, as a word of `COUNTS`, whose last means that many or more."""
    number = sum(GROUP_OF[placed.thing] == group for placed in layout)
    return COUNTS[min(number, len(COUNTS) - 1)]


def tell(layout):
    """The scene in words, e.g. "a1 cat, c1 big bus, b2 pear", in the order of `PLACES`."""
    return ", ".join(map(str, layout))


def parse(text):
    """The layout that a text of [`tell`] describes.

    Raises:
        ValueError: if a clause is not understood, names an unknown place or thing, or a place or thing occurs twice.
    """
    layout = []
    for clause in text.split(","):
        words = clause.split()
        big = words[1:2] == ["big"]
        if len(words) != 2 + big:
            raise ValueError(f"{clause.strip()!r} is not a thing at a place: write it like 'a1 cat' or 'c3 big bus'")
        place, thing = words[0], words[-1]
        if place not in PLACES:
            raise ValueError(f"{clause.strip()!r}: there is no place {place!r}; columns are a to d, rows 1 to 4")
        if big and place not in QUADRANTS:
            raise ValueError(f"{clause.strip()!r}: a big thing is at one of {', '.join(QUADRANTS)}")
        if thing not in GROUP_OF:
            raise ValueError(f"{clause.strip()!r}: there is no {thing!r}; things are {', '.join(THINGS)}")
        placed = Placed(place, thing, big)
        for other in layout:
            if other.thing == thing:
                raise ValueError(f"{thing} occurs twice; a scene holds each thing at most once")
            shared = [place for place in placed.places() if place in other.places()]
            if shared:
                raise ValueError(f"'{placed}' and '{other}' are both at {', '.join(shared)}")
        layout.append(placed)
    return tuple(sorted(layout, key=lambda placed: PLACES.index(placed.place)))


class Question(NamedTuple):
    """A question, its answer and the size of the thing it is about: "small", "big" or `None`."""

    question: str
    answer: str
    size: str | None = None


def _article(thing):
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def ask(layout, rng, question_type):
    """Draw one [`Question`] of a type about a layout that is not empty, or `None` where the scene allows none."""
    at = covered(layout)

    def pick(choices):
        return choices[rng.integers(len(choices))]

    def size(placed):
        return "big" if placed.big else "small"

    if question_type == "thing":
        # A quarter of the answers are "nothing" if there are empty places.
        empty = [place for place in PLACES if place not in at]
        place = pick(empty if empty and rng.random() < 0.25 else list(at))
        question = f"What is at {place}?"
        return Question(question, at[place].thing, size(at[place])) if place in at else Question(question, "nothing")
    if question_type == "number":
        counts = {group: count(layout, group) for group in GROUPS}
        # Weights by the answer, so that "zero" and "one" do not drown the rest.
        weights = np.array([(0.25, 0.6, 1, 1.4, 1.8)[min(COUNTS.index(answer), 4)] for answer in counts.values()])
        group = str(rng.choice(list(counts), p=weights / weights.sum()))
        return Question(HOW_MANY.format(group), counts[group])
    if question_type == "presence":
        if rng.random() < 0.5:
            placed = pick(layout)
            return Question(f"Is there {_article(placed.thing)}?", "yes", size(placed))
        # Half of the absent things belong to a group that is there.
        here = {placed.thing for placed in layout}
        groups = {GROUP_OF[thing] for thing in here} if rng.random() < 0.5 else set(GROUPS)
        absent = pick([thing for thing in THINGS if thing not in here and GROUP_OF[thing] in groups])
        return Question(f"Is there {_article(absent)}?", "no")
    if question_type == "beside":
        around = [
            (placed, side, beside(placed.place, step))
            for placed in layout
            if not placed.big
            for side, step in SIDES.items()
            if beside(placed.place, step)
        ]
        full = [choice for choice in around if choice[2] in at]
        if not around:
            return None
        placed, side, place = pick(full if full and rng.random() < 0.75 else around)
        return Question(f"What is {side} the {placed.thing}?", at[place].thing if place in at else "nothing")
    placed = pick(layout)
    if question_type == "place":
        return Question(f"Where is the {placed.thing}?", placed.place, size(placed))
    place = pick(placed.places())
    return Question(f"Which group does the thing at {place} belong to?", GROUP_OF[placed.thing], size(placed))


def conversation(layout, rng, question_types):
    """Draw questions of these types, as far as the scene allows, shuffled and without repeats.

    Returns:
        A list of `(question, answer)`.
    """
    drawn = [ask(layout, rng, str(question_type)) for question_type in rng.permutation(question_types)]
    return list(dict.fromkeys((turn.question, turn.answer) for turn in drawn if turn))


def _turns(pairs):
    """LLaVA's `conversations` of (question, answer) pairs, with the image in the first question."""
    turns = []
    for index, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": ("<image>\n" if index == 0 else "") + question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def write_scenes(output_dir, train_scenes=4000, held_out_scenes=120, seed=0, questions_per_scene=8):
    """Render scenes to PNG files and write the data of both stages and the held-out questions.

    Args:
        output_dir (`str`): receives `images/`, `pretrain.json` (captions), `finetune.json` (conversations),
            `held_out.json` (new layouts in known designs) and `held_out_design.json` (new layouts in the held-out
            design); the last two are lists of `{id, image, design, type, question, answer, size, conversations}`, so
            that each is one of LLaVA's records, too.
        train_scenes (`int`), held_out_scenes (`int`): how many scenes of each kind.
        seed (`int`): fixes every file bit by bit.
        questions_per_scene (`int`): the length of a training conversation; held-out scenes get one per type.
    """
    folder = Path(output_dir)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    files = {"pretrain": [], "finetune": [], "held_out": [], "held_out_design": []}
    for side, (name, number, designs) in enumerate(
        (
            ("train", train_scenes, TRAIN_DESIGNS),
            ("held_out", held_out_scenes, TRAIN_DESIGNS),
            ("held_out_design", held_out_scenes, (atlases.HELD_OUT_DESIGN,)),
        )
    ):
        for index in range(number):
            rng = np.random.default_rng((seed, side, index))
            layout = random_layout(rng, held_out=name != "train")
            design = designs[index % len(designs)]
            record = {"id": f"{name}-{index:05d}", "image": f"{name}-{index:05d}.png"}
            Image.fromarray(render(layout, rng, design)).save(folder / "images" / record["image"])
            if name == "train":
                caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": tell(layout)}]
                files["pretrain"].append({**record, "conversations": caption})
                turns = conversation(layout, rng, np.resize(TRAINED_TYPES, questions_per_scene))
                files["finetune"].append({**record, "conversations": _turns(turns)})
                continue
            for question_type in QUESTION_TYPES:
                drawn = ask(layout, rng, question_type)
                if drawn:
                    asked = {"conversations": _turns([(drawn.question, drawn.answer)])}
                    files[name].append({**record, "design": design, "type": question_type, **drawn._asdict(), **asked})
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def main():
    """Command line of `write_scenes`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--train_scenes", type=int, default=4000)
    parser.add_argument("--held_out_scenes", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    write_scenes(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
