"""Trains the demo's two backbones once, from scratch: a small CLIP tower and a small Qwen2 language model.

    python -m delta_llava.demo.pretrain_backbones            # both, about an hour and a half
    python -m delta_llava.demo.pretrain_backbones --only language_model

They take the places of CLIP and Vicuna: the tower has never seen a word, the language model has never seen a picture,
and neither has seen a held-out layout or the held-out design (see `scenes.py`). Both are saved in `demo/backbones/`
by `save_pretrained`, with their skills on held-out data in `skills.json`.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from tokenizers import AddedToken, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from . import atlases, scenes


FOLDER = Path(__file__).parent / "backbones"
PATCH_GRID = 12
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# How the language model reads a scene: in words (0), or as a mosaic of so many rows and columns.
FORMS = (0, 12, 6, 4, 3, 2, 1)
SHORT_WEIGHTS, FORM_WEIGHTS = (0.45, 0, 0.15, 0.28, 0.04, 0.06, 0.02), (0.3, 0.08, 0.17, 0.2, 0.1, 0.1, 0.05)

TYPE_WEIGHTS = (0.17, 0.05, 0.3, 0.3, 0.12, 0.06)  # of scenes.QUESTION_TYPES


def train(name, module, step_loss, steps, learning_rate):
    """Run Muon and AdamW, warmed up and then decayed, over `step_loss(step) -> loss`; shows the time left."""
    # Muon on the inner matrices learns look-ups in a fraction of AdamW's steps.
    matrices = [weight for name, weight in module.named_parameters() if weight.ndim == 2 and "layers" in name]
    others = [weight for weight in module.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 100, 1 - step / steps))
        for optimizer in optimizers
    ]
    started, losses = time.time(), []
    for step in range(1, steps + 1):
        loss = step_loss(step)
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps:
            elapsed = time.time() - started
            left = elapsed / step * (steps - step)
            print(
                f"{name} step {step}/{steps}  loss {np.mean(losses[-50:]):.3f}  {elapsed:.0f} s, {left:.0f} s left",
                flush=True,
            )


def build_tokenizer():
    """A byte-level BPE tokenizer that has every word of the demo's world as one token and can write any text."""
    rng = np.random.default_rng(0)
    corpus = [SYSTEM.replace("<|im_start|>", ""), "user\n", "assistant\n", scenes.DESCRIBE] * 4000
    for _ in range(4000):
        layout = scenes.random_layout(rng, held_out=False)
        corpus += [scenes.tell(layout), *(f" {text}" for text in scenes.tell(layout).split(", "))]
        corpus += [text for turn in scenes.conversation(layout, rng, scenes.QUESTION_TYPES) for text in turn]
    # Words that occur in no drawn scene, or seldom, are tokens all the same.
    words = (*scenes.THINGS, *scenes.GROUPS, *scenes.COUNTS, "big", "small", "nothing", "yes", "no")
    corpus += [text for word in words for text in (word, f" {word}")] * 500
    # The class that AutoTokenizer takes for a Qwen2 model, whatever tokenizer.json says: it splits text in its own way.
    tokenizer = Qwen2Tokenizer(
        eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], model_max_length=2048
    ).train_new_from_iterator(corpus, vocab_size=1024, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # It never joins a letter and a digit, so places are added as they are.
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, single_word=text == place)
            for place in scenes.PLACES
            for text in (place, f" {place}")
        ]
    )
    return tokenizer


class Batch(NamedTuple):
    """What the language model reads: `mosaic` positions from `start` on show the scene; the rest is text."""

    ids: torch.Tensor  # (B, T)
    labels: torch.Tensor  # (B, T), -100 where the loss does not count
    cells: torch.Tensor  # (B, 16, 3), the words of each place: where, how large, what
    start: int
    grid: int  # the mosaic has grid * grid positions; 0: the scene is in words


class Storyteller:
    """Writes what the language model reads: a scene, then a caption or questions with answers.

    The scene is where an image will be. In words it is text. In a mosaic each position holds the mean of the words of
    the patches that it covers, of 12 x 12: place and thing as one vector, the form in which a projector learns most
    easily to write into a frozen model.
    """

    def __init__(self, tokenizer):
        self.encode = functools.cache(lambda text: tokenizer.encode(text, add_special_tokens=False))

    def word(self, text):
        """The token of a word."""
        (token,) = self.encode(f" {text}")
        return token

    def cells(self, layout):
        """The words of the 16 places, a list of (place, big or small, thing or nothing)."""
        at = scenes.covered(layout)
        return [
            [
                self.word(place),
                self.word("big" if place in at and at[place].big else "small"),
                self.word(at[place].thing if place in at else "nothing"),
            ]
            for place in scenes.PLACES
        ]

    def _text(self, layout, questions, plain):
        """The text after the scene, in pieces `(tokens, whether the loss counts)`."""
        if questions is None:
            return [(self.encode("\n"), False), (self.encode(scenes.tell(layout) + "\n"), True)]
        pieces = []
        for index, (question, answer) in enumerate(questions):
            if plain:
                pieces += [(self.encode(f"\n{question}"), False), (self.encode(f" {answer}."), True)]
                continue
            opening = "\n" if index == 0 else "\n<|im_start|>user\n"
            asked = f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n"
            pieces += [(self.encode(asked), False), (self.encode(f"{answer}<|im_end|>"), True)]
        return pieces

    def batch(self, layouts, grid, conversations, plain=False):
        """Collate a [`Batch`].

        Args:
            layouts (`list`): one scene per sequence.
            grid (`int`): of the mosaic, or 0 for words.
            conversations (`list`): per sequence a list of (question, answer), or `None` for a caption.
            plain (`bool`): whether questions follow the scene line by line instead of in the turns of a chat.
        """
        opening = [] if plain else self.encode(SYSTEM + "<|im_start|>user\n")
        sequences = []
        for layout, questions in zip(layouts, conversations, strict=True):
            scene = [0] * grid**2 if grid else self.encode(scenes.tell(layout))
            sequences.append([(opening, False), (scene, False), *self._text(layout, questions, plain)])
        ids, labels = [], []
        for pieces in sequences:
            ids.append(torch.tensor([token for tokens, _ in pieces for token in tokens]))
            labels.append(torch.tensor([token if counts else -100 for tokens, counts in pieces for token in tokens]))
        ids, labels = pad_sequence(ids, True), pad_sequence(labels, True, padding_value=-100)
        cells = torch.tensor([self.cells(layout) for layout in layouts])
        return Batch(ids, labels, cells, len(opening), grid)


def language_model_logits(model, batch, noise=0.0):
    """Logits and targets at the labelled positions, `(n, vocabulary)` and `(n,)`."""
    embed = model.get_input_embeddings()
    embeddings = embed(batch.ids)
    if batch.grid:
        places = embed(batch.cells).sum(2).unflatten(1, (4, 4)).permute(0, 3, 1, 2)
        patches = F.interpolate(places, size=(PATCH_GRID, PATCH_GRID))
        mosaic = F.adaptive_avg_pool2d(patches, batch.grid).flatten(2).mT
        mosaic = mosaic + noise * torch.randn_like(mosaic)
        end = batch.start + batch.grid**2
        embeddings = torch.cat([embeddings[:, : batch.start], mosaic, embeddings[:, end:]], 1)
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    answers = batch.labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][answers]), batch.labels[:, 1:][answers]


@torch.no_grad()
def language_model_skill(model, storyteller, number=200, forms=FORMS, plain=False):
    """Share of questions about unseen scenes answered exactly, by the form of the scene and the type of question."""
    skill = {}
    for grid in forms:
        rng = np.random.default_rng(1)
        for question_type in scenes.QUESTION_TYPES:
            drawn = []
            while len(drawn) < number:
                layout = scenes.random_layout(rng, held_out=True)
                question = scenes.ask(layout, rng, question_type)
                drawn += [(layout, [(question.question, question.answer)])] if question else []
            batch = storyteller.batch([row[0] for row in drawn], grid, [row[1] for row in drawn], plain)
            logits, targets = language_model_logits(model, batch)
            row_of = torch.nonzero(batch.labels[:, 1:] != -100)[:, 0]
            wrong = torch.zeros(number).index_add_(0, row_of, (logits.argmax(-1) != targets).float())
            skill.setdefault(f"mosaic {grid}x{grid}" if grid else "words", {})[question_type] = (
                (wrong == 0).float().mean().item()
            )
    return skill


def index(layout, rng, things):
    """The place of every thing in a scene and of some that are absent, by name in random order: ("The cat", "b2").

    Finding a thing by its name, on which three types of question rest, is learnt from this in a fraction of the time.
    """
    places = {placed.thing: placed.place for placed in layout}
    names = [
        *places,
        *rng.choice([thing for thing in things if thing not in places], min(4, len(things) - len(places))),
    ]
    return [(f"The {names[at]}", places.get(names[at], "nothing")) for at in rng.permutation(len(names))]


def census(layout, rng, question):
    """How many things of each group are in a scene, in random order, by a question with a place for the group."""
    return [(question.format(group), scenes.count(layout, group)) for group in rng.permutation(list(scenes.GROUPS))]


def practise_counting(model, storyteller, steps, form_weights, batch_size=20):
    """Train on, every other batch on counting, which is learnt late: it rests on knowing the groups."""
    rng = np.random.default_rng(1)

    def step_loss(step):
        grid = int(rng.choice(FORMS, p=form_weights))
        layouts = [scenes.random_layout(rng, False) for _ in range(batch_size)]
        if step % 2:
            conversations = [census(layout, rng, scenes.HOW_MANY) for layout in layouts]
        else:
            conversations = [scenes.conversation(layout, rng, scenes.QUESTION_TYPES) for layout in layouts]
        return F.cross_entropy(*language_model_logits(model, storyteller.batch(layouts, grid, conversations), 0.02))

    train("language model, counting", model, step_loss, steps, learning_rate=1e-3)


def pretrain_language_model(steps, batch_size=20):
    """Train and save the language model; returns its skill on held-out layouts."""
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        # Queries and keys start alike, so that from the first step on a word attends to itself in the scene: finding a
        # thing by its name is a look-up that random weights take very long to learn.
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.normal_(std=0.06)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    storyteller, rng = Storyteller(tokenizer), np.random.default_rng(0)

    def step_loss(step):
        # Short sequences of one kind teach skills fastest, so they come first: finding things, then everything else,
        # line by line and in chats. Long chats in all forms come last.
        finds, short = step <= 0.25 * steps, step <= 0.65 * steps
        grid = int(rng.choice(FORMS, p=SHORT_WEIGHTS if short else FORM_WEIGHTS))
        if finds:
            grid = 4 if step % 2 else 0
        plain = finds or (short and step % 2 == 0)
        things = scenes.THINGS[:: 4 if step <= 0.08 * steps else 1]
        layouts = [scenes.random_layout(rng, False, things) for _ in range(batch_size)]
        conversations = []
        for layout in layouts:
            types = [rng.choice(scenes.QUESTION_TYPES, p=TYPE_WEIGHTS)] if short else scenes.QUESTION_TYPES
            turns = scenes.conversation(layout, rng, np.resize(types, 5 if short else 9))
            drill = rng.random() / (0.8 if finds else 0.3)
            if plain and drill < 1:
                turns = index(layout, rng, things) if drill < 0.5 else census(layout, rng, "The {}")
            if not short and rng.random() < 0.2:
                turns = [(scenes.DESCRIBE, scenes.tell(layout)), *turns]
            conversations.append(None if rng.random() < 0.1 else turns)
        batch = storyteller.batch(layouts, grid, conversations, plain)
        logits, targets = language_model_logits(model, batch, noise=0.02)
        if step % 250 == 0:
            skill = language_model_skill(model.eval(), storyteller, 100, (0, 6, 4, 2), finds)
            model.train()
            for form, by_type in skill.items():
                print(f"  {form}: " + ", ".join(f"{name} {share:.1%}" for name, share in by_type.items()), flush=True)
        return F.cross_entropy(logits, targets)

    train("language model", model, step_loss, steps, learning_rate=2e-3)
    for form_weights in (SHORT_WEIGHTS, FORM_WEIGHTS):
        practise_counting(model, storyteller, steps // 5, form_weights)
    model.save_pretrained(FOLDER / "language_model")
    tokenizer.save_pretrained(FOLDER / "language_model")
    return language_model_skill(model.eval(), storyteller)


CONTENTS = ("nothing", *scenes.THINGS)
SIZES = ("none", "small", "big")


@functools.cache
def inked(design, thing):
    """A thing as a line drawing: few colours, dark edges; `(64, 64, 4)` uint8, RGBA."""
    drawing = Image.fromarray(atlases.crops(design)[scenes.THINGS.index(thing)])
    flat = Image.new("RGB", drawing.size, "white")
    flat.paste(drawing, mask=drawing.getchannel("A"))
    flat = np.asarray(flat.filter(ImageFilter.MedianFilter(5)).quantize(6).convert("RGB")).astype(float)
    alpha = np.asarray(drawing.getchannel("A")) / 255
    steps = [np.abs(np.diff(flat, axis=axis, prepend=255)).sum(-1) for axis in (0, 1)]
    outline = [np.abs(np.diff(alpha > 0.5, axis=axis, prepend=False)) for axis in (0, 1)]
    edges = Image.fromarray(255 * ((sum(steps) > 90) | outline[0] | outline[1]).astype(np.uint8))
    edges = np.asarray(edges.filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(0.7)))[..., None] / 255
    colours = flat * (1 - edges) + 20 * edges
    return np.dstack([colours, 255 * np.maximum(alpha, edges[..., 0])]).astype(np.uint8)


def varied_crop(rng):
    """A stand-in for `atlases.crop` that draws each thing in a random training design, and never twice alike."""

    def crop(design, thing, size):
        design = str(rng.choice(scenes.TRAIN_DESIGNS))
        if rng.random() < 0.25:
            return atlases.crop(design, thing, size)
        drawing = atlases.crop(design, thing, atlases.CROP_SIZE, inked if rng.random() < 0.35 else None)
        if rng.random() < 0.5:
            drawing = drawing[:, ::-1]
        if rng.random() < 0.75:
            mixing = np.eye(3) + rng.normal(0, 0.12, (3, 3))
            if rng.random() < 0.2:
                mixing = mixing[:, rng.permutation(3)]
            if rng.random() < 0.2:
                mixing = 0.25 * mixing + 0.25
            colours = drawing[..., :3] @ mixing * rng.uniform(0.7, 1.4)
            drawing = np.concatenate([colours.clip(0, drawing[..., 3:]), drawing[..., 3:]], -1)
        image = Image.fromarray(drawing.astype(np.uint8))
        if rng.random() < 0.6:
            image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        return np.asarray(image.resize((size, size), Image.Resampling.BOX)).astype(np.float32)

    return crop


def picture_batch(rng, size, held_out, designs=scenes.TRAIN_DESIGNS, varied=False):
    """Pictures `(B, 96, 96, 3)` uint8 and the class of contents and of size at each place, both `(B, 16)`."""
    layouts = [scenes.random_layout(rng, held_out) for _ in range(size)]
    crop = varied_crop(rng) if varied else atlases.crop
    pictures = np.stack([scenes.render(layout, rng, str(rng.choice(designs)), crop) for layout in layouts])
    contents, sizes = np.zeros((2, size, len(scenes.PLACES)), int)
    for row, layout in enumerate(layouts):
        for place, placed in scenes.covered(layout).items():
            contents[row, scenes.PLACES.index(place)] = CONTENTS.index(placed.thing)
            sizes[row, scenes.PLACES.index(place)] = 1 + placed.big
    return pictures, torch.from_numpy(contents), torch.from_numpy(sizes)


def to_pixels(pictures, processor):
    """What the image processor does to 96x96 pictures, for a whole batch at once: `(B, 3, 96, 96)` float."""
    scaled = (pictures / 255 - np.array(processor.image_mean)) / np.array(processor.image_std)
    return torch.from_numpy(scaled).float().permute(0, 3, 1, 2)


class PlaceHeads(nn.Module):
    """Predicts from each patch what is at its place, its size and which place it is; discarded after training."""

    def __init__(self, width):
        super().__init__()
        self.classes = [len(CONTENTS), len(SIZES), len(scenes.PLACES)]
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, sum(self.classes))

    def forward(self, hidden_state):
        """`(B, 1 + 144, width)` to logits of contents, size and place, each `(B, 144, classes)`."""
        return self.classify(self.norm(hidden_state[:, 1:])).split(self.classes, dim=-1)


def place_of_patch():
    """The place (0 to 15) that each of the 144 patches lies in."""
    quarter = torch.arange(PATCH_GRID) // (PATCH_GRID // 4)
    return (4 * quarter[:, None] + quarter[None, :]).flatten()


@torch.no_grad()
def vision_tower_skill(model, heads, processor, batches=8):
    """Share of things in held-out layouts read correctly from the second-to-last hidden state, by place."""
    where = F.one_hot(place_of_patch()).float()
    skill = {}
    for name, designs in (("known designs", scenes.TRAIN_DESIGNS), ("held-out design", (atlases.HELD_OUT_DESIGN,))):
        rng, right, sizes = np.random.default_rng(1), [], []
        for _ in range(batches):
            pictures, contents, size = picture_batch(rng, 64, True, designs)
            hidden = model(to_pixels(pictures, processor), output_hidden_states=True).hidden_states[-2]
            read = torch.einsum("bpc,pq->bqc", heads(hidden)[0], where).argmax(-1)
            right.append(read == contents)
            sizes.append(size)
        right, sizes = torch.cat(right), torch.cat(sizes)
        skill[name] = {label: right[sizes == index].float().mean().item() for index, label in enumerate(SIZES)}
    return skill


def pretrain_vision_tower(steps, batch_size=32):
    """Train and save the vision tower; returns its skill on held-out layouts, in known and in held-out designs."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.IMAGE_SIZE // PATCH_GRID,
        projection_dim=128,
        attention_dropout=0.1,
    )
    torch.manual_seed(0)
    model, rng = CLIPVisionModel(config), np.random.default_rng(0)
    heads = PlaceHeads(config.hidden_size)
    pictures = picture_batch(rng, 500, held_out=False)[0].reshape(-1, 3) / 255
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    processor = CLIPImageProcessor(
        size={"shortest_edge": scenes.IMAGE_SIZE},
        crop_size=size,
        image_mean=pictures.mean(0).round(3).tolist(),
        image_std=pictures.std(0).round(3).tolist(),
    )
    where = place_of_patch()

    def step_loss(step):
        pictures, contents, sizes = picture_batch(rng, batch_size, held_out=False, varied=True)
        hidden_states = model(to_pixels(pictures, processor), output_hidden_states=True).hidden_states
        targets = (contents[:, where], sizes[:, where], where.expand(batch_size, -1))
        if step % 250 == 0:
            skill = vision_tower_skill(model.eval(), heads, processor, 2)
            for name, by_size in skill.items():
                print(f"  {name}: " + ", ".join(f"{k} {v:.1%}" for k, v in by_size.items()), flush=True)
            model.train()
        # A projector reads the inner layers and never the last one's output, so the inner ones must hold everything.
        return (
            sum(
                F.cross_entropy(logits.flatten(0, 1), target.flatten(), label_smoothing=0.05)
                for hidden_state in hidden_states[-3:]
                for logits, target in zip(heads(hidden_state), targets, strict=True)
            )
            / 3
        )

    train("vision tower", nn.ModuleList([model, heads]), step_loss, steps, learning_rate=2e-3)
    model.config.attention_dropout = 0.0  # was for this training, not for those of models that the tower is part of
    model.save_pretrained(FOLDER / "vision_tower")
    processor.save_pretrained(FOLDER / "vision_tower")
    return vision_tower_skill(model.eval(), heads, processor)


def main():
    """Train both backbones, or the one asked for, and write `skills.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("vision_tower", "language_model"))
    parser.add_argument("--vision_tower_steps", type=int, default=3600)
    parser.add_argument("--language_model_steps", type=int, default=4400)
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    skills = {}
    if options.only != "vision_tower":
        skills["language_model"] = pretrain_language_model(options.language_model_steps)
    if options.only != "language_model":
        skills["vision_tower"] = pretrain_vision_tower(options.vision_tower_steps)
    path = FOLDER / "skills.json"
    if path.exists():
        skills = {**json.loads(path.read_text(encoding="utf-8")), **skills}
    path.write_text(json.dumps(skills, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(skills, indent=1))


if __name__ == "__main__":
    main()
