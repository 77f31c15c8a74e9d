"""Trains the demo's two backbones once, from nothing: a small CLIP tower and a small Qwen2 language model.

    python -m delta_llava.demo.pretrain_backbones            # both, about half an hour on 2 cores
    python -m delta_llava.demo.pretrain_backbones --only language_model

They stand in for CLIP and Vicuna: the tower has never seen a word, the language model has never seen a picture,
and neither has met a held-out layout or a held-out scan (see `scenes.py`). Both are saved in `demo/backbones/`
as `save_pretrained` writes them, with the skills they reached on held-out data in `skills.json`.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from . import scenes


FOLDER = Path(__file__).parent / "backbones"
PATCH_GRID = 12
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
# How a scene is told to the language model: in a sentence, or as a mosaic of so many rows and columns.
FORMS, FORM_WEIGHTS = ("words", 2, 3, 4, 6, 12), (0.35, 0.2, 0.15, 0.15, 0.1, 0.05)


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
    layouts = [scenes.random_layout(rng, held_out=False) for _ in range(2000)]
    corpus = [SYSTEM.replace("<|im_start|>", ""), "user\n", "assistant\n", scenes.DESCRIBE]
    for layout in layouts:
        corpus += [scenes.tell(layout, rng), *(cell_words(layout, place) for place in range(4))]
        corpus += [text for turn in scenes.conversation(layout, rng, scenes.QUESTION_TYPES) for text in turn]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus * 2, trainers.BpeTrainer(vocab_size=1024, special_tokens=special_tokens, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=2048,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def cell_words(layout, place):
    """The four words of one cell of a mosaic, e.g. " top left red circle"."""
    colour, name = layout[place] or ("no", "thing")
    return f" {scenes.PLACES[place]} {colour} {name}"


class Storyteller:
    """Writes what the language model reads: scenes told in words, then a caption or questions with answers.

    A told scene stands where an image will stand. A sentence has one word per position, as text does. In a mosaic
    each position holds the four words of a cell at once, their embeddings added: the place and the thing of one
    cell as one vector, which is the form that a projector can learn to write into a frozen model most easily.
    """

    def __init__(self, tokenizer):
        self.encode = functools.cache(lambda text: tokenizer.encode(text, add_special_tokens=False))

    def _told(self, layout, form, rng):
        """A told scene: a list of positions, each a list of token ids."""
        if form == "words":
            return [[token] for token in self.encode(scenes.tell(layout, rng))]
        # Where a border between places would cut cells in two, they go to either side.
        rows, columns = (np.arange(form) >= rng.integers(form // 2, (form + 1) // 2 + 1) for _ in range(2))
        return [self.encode(cell_words(layout, 2 * row + column)) for row in rows for column in columns]

    def _segments(self, layout, form, rng, questions, plain):
        """A sequence in pieces `(positions, whether the loss counts)`: a chat, or the plain form of stage 1."""
        told = self._told(layout, form, rng)
        if questions is None:
            return [(told, False), (self.encode(scenes.tell(layout, rng) + "\n"), True)]
        if plain:
            pieces = [((f"\n{question}", False), (f" {answer}.", True)) for question, answer in questions]
            return [(told, False), *((self.encode(text), counts) for piece in pieces for text, counts in piece)]
        segments = [(self.encode(SYSTEM + "<|im_start|>user\n"), False), (told, False)]
        for index, (question, answer) in enumerate(questions):
            opening = "\n" if index == 0 else "\n<|im_start|>user\n"
            asked = f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n"
            segments += [(self.encode(asked), False), (self.encode(answer + "<|im_end|>"), True)]
        return segments

    def batch(self, layouts, form, rng, conversations, plain=False):
        """Collate sequences.

        Args:
            layouts (`list`): one scene per sequence.
            form (`str` or `int`): one of `FORMS`.
            conversations (`list`): per sequence a list of (question, answer), or `None` for a caption.
            plain (`bool`): whether questions follow the scene line by line instead of in the turns of a chat.

        Returns:
            ids `(B, T, 4)` with -1 where a position holds fewer words, labels `(B, T)` with -100 where the loss
            does not count, and told `(B, T)`, true where the scene is told in a mosaic.
        """
        sequences = [
            self._segments(layout, form, rng, questions, plain)
            for layout, questions in zip(layouts, conversations, strict=True)
        ]
        length = max(sum(len(positions) for positions, _ in sequence) for sequence in sequences)
        ids = np.full((len(layouts), length, 4), -1)
        ids[:, :, 0] = 0
        labels = np.full((len(layouts), length), -100)
        for row, sequence in enumerate(sequences):
            at = 0
            for positions, counts in sequence:
                for position in positions:
                    words = position if isinstance(position, list) else [position]
                    ids[row, at, : len(words)] = words
                    labels[row, at] = words[0] if counts else -100
                    at += 1
        ids = torch.from_numpy(ids)
        return ids, torch.from_numpy(labels), ids[:, :, 1] >= 0


def language_model_logits(model, ids, labels, told, noise=0.0):
    """Logits and targets at the labelled positions, `(n, vocabulary)` and `(n,)`."""
    embeddings = (model.get_input_embeddings()(ids.clamp(min=0)) * (ids >= 0).unsqueeze(-1)).sum(2)
    if noise:
        embeddings = embeddings + noise * torch.randn_like(embeddings) * told.unsqueeze(-1)
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    answers = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][answers]), labels[:, 1:][answers]


@torch.no_grad()
def language_model_skill(model, storyteller, number=200):
    """Share of questions about unseen told scenes answered exactly, by form and type of question."""
    skill = {}
    for form in FORMS:
        rng = np.random.default_rng(1)
        for question_type in scenes.QUESTION_TYPES:
            drawn = []
            while len(drawn) < number:
                layout = scenes.random_layout(rng, held_out=True)
                question = scenes.ask(layout, rng, question_type)
                drawn += [(layout, [question])] if question else []
            batch = storyteller.batch([row[0] for row in drawn], form, rng, [row[1] for row in drawn])
            logits, targets = language_model_logits(model, *batch)
            row_of = torch.nonzero(batch[1][:, 1:] != -100)[:, 0]
            wrong = torch.zeros(number).index_add_(0, row_of, (logits.argmax(-1) != targets).float())
            skill.setdefault("words" if form == "words" else f"mosaic {form}x{form}", {})[question_type] = (
                (wrong == 0).float().mean().item()
            )
    return skill


def _chat(layout, rng):
    """The turns of a chat about a scene, in a third of the cases with a description first; in a sixth a caption."""
    turns = scenes.conversation(layout, rng, ("kind", "colour", "digit", "place", "place", "number", "number"))
    described = [(scenes.DESCRIBE, scenes.tell(layout, rng))]
    return None if rng.random() < 1 / 6 else described * int(rng.integers(3) == 0) + turns


def pretrain_language_model(steps, batch_size=32):
    """Train and save the language model; returns its skill on held-out layouts."""
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
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
    storyteller, rng = Storyteller(tokenizer), np.random.default_rng(0)

    def step_loss(step):
        # Skills are learnt first and fastest in short sequences, in turn: telling a scene again in another order,
        # finding a thing, counting.
        short = step <= 0.45 * steps
        form = FORMS[rng.integers(4) if short else rng.choice(len(FORMS), p=FORM_WEIGHTS)]
        layouts = [scenes.random_layout(rng, held_out=False) for _ in range(2 * batch_size if short else batch_size)]
        if short:
            types = (None, ["place"] * 4, ["number"] * 4)[step % 3]
            conversations = [types and scenes.conversation(layout, rng, types) for layout in layouts]
        else:
            conversations = [_chat(layout, rng) for layout in layouts]
        batch = storyteller.batch(layouts, form, rng, conversations, plain=short)
        logits, targets = language_model_logits(model, *batch, noise=0.02)
        if step % 500 == 0:
            skill = language_model_skill(model.eval(), storyteller)
            model.train()
            for told, by_type in skill.items():
                print(f"  {told}: " + ", ".join(f"{name} {share:.1%}" for name, share in by_type.items()), flush=True)
        return F.cross_entropy(logits, targets)

    train("language model", model, step_loss, steps, learning_rate=2e-3)
    model.save_pretrained(FOLDER / "language_model")
    tokenizer.save_pretrained(FOLDER / "language_model")
    return language_model_skill(model.eval(), storyteller)


CONTENTS = ("nothing", *scenes.SHAPES, *scenes.DIGITS)
COLOURS = ("none", *scenes.COLOURS)


def picture_batch(rng, size, held_out):
    """Pictures `(B, 48, 48, 3)` uint8 and the class of contents and of colour at each place, both `(B, 4)`."""
    layouts = [scenes.random_layout(rng, held_out) for _ in range(size)]
    pictures = np.stack([scenes.render(layout, rng, held_out)[0] for layout in layouts])
    contents = [[CONTENTS.index("nothing" if thing is None else thing[1]) for thing in layout] for layout in layouts]
    colours = [[COLOURS.index("none" if thing is None else thing[0]) for thing in layout] for layout in layouts]
    return pictures, torch.tensor(contents), torch.tensor(colours)


def to_pixels(pictures, processor):
    """What the image processor does to 48x48 pictures, for a whole batch at once: `(B, 3, 48, 48)` float."""
    scaled = (pictures / 255 - np.array(processor.image_mean)) / np.array(processor.image_std)
    return torch.from_numpy(scaled).float().permute(0, 3, 1, 2)


class PlaceHeads(nn.Module):
    """Says of every patch what stands at its place and which place that is; thrown away after training."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(width, len(CONTENTS) + len(COLOURS) + 4)

    def forward(self, hidden_state):
        """`(B, 1 + 144, width)` to logits of contents, colour and place, each `(B, 144, classes)`."""
        return self.classify(self.norm(hidden_state[:, 1:])).split([len(CONTENTS), len(COLOURS), 4], dim=-1)


def place_of_patch():
    """The place (0 to 3) that each of the 144 patches lies in."""
    half = torch.arange(PATCH_GRID) // (PATCH_GRID // 2)
    return (2 * half[:, None] + half[None, :]).flatten()


@torch.no_grad()
def vision_tower_skill(model, heads, processor, batches=16):
    """Share of held-out places read rightly from the last-but-one hidden state, averaged over a place's patches."""
    rng, right, of_digits = np.random.default_rng(1), [], []
    where = F.one_hot(place_of_patch()).float()
    for _ in range(batches):
        pictures, contents, colours = picture_batch(rng, 64, held_out=True)
        hidden = model(to_pixels(pictures, processor), output_hidden_states=True).hidden_states[-2]
        read = [torch.einsum("bpc,pq->bqc", logits, where).argmax(-1) for logits in heads(hidden)[:2]]
        right.append(torch.stack([read[0] == contents, read[1] == colours]))
        of_digits.append((read[0] == contents)[contents >= CONTENTS.index("0")])
    content, colour = torch.cat(right, 1).float().mean((1, 2)).tolist()
    return {"shape or digit": content, "colour": colour, "digits alone": torch.cat(of_digits).float().mean().item()}


def pretrain_vision_tower(steps, batch_size=32):
    """Train and save the vision tower; returns its skill on held-out layouts and scans."""
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.IMAGE_SIZE // PATCH_GRID,
        projection_dim=128,
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
        pictures, contents, colours = picture_batch(rng, batch_size, held_out=False)
        hidden_states = model(to_pixels(pictures, processor), output_hidden_states=True).hidden_states
        targets = (contents[:, where], colours[:, where], where.expand(batch_size, -1))
        if step % 500 == 0:
            print(
                "  "
                + ", ".join(f"{k} {v:.1%}" for k, v in vision_tower_skill(model.eval(), heads, processor, 4).items()),
                flush=True,
            )
            model.train()
        # A projector reads the inner layers and never the last one's output, so the inner ones must carry it all.
        return (
            sum(
                F.cross_entropy(logits.flatten(0, 1), target.flatten())
                for hidden_state in hidden_states[-3:]
                for logits, target in zip(heads(hidden_state), targets, strict=True)
            )
            / 3
        )

    train("vision tower", nn.ModuleList([model, heads]), step_loss, steps, learning_rate=1e-3)
    model.save_pretrained(FOLDER / "vision_tower")
    processor.save_pretrained(FOLDER / "vision_tower")
    return vision_tower_skill(model.eval(), heads, processor)


def main():
    """Train what is asked for and write `skills.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("vision_tower", "language_model"))
    parser.add_argument("--vision_tower_steps", type=int, default=1500)
    parser.add_argument("--language_model_steps", type=int, default=1900)
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
