"""Explanations of answers: relevance is where the asked-for thing is, and the model is left as it was."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from delta_llava.demo import ask, pretrain_backbones, scenes
from delta_llava.evaluation import gradcam
from delta_llava.evaluation.gradcam import draw, grad_cam, token_relevance
from delta_llava.hub.assemble import assemble
from delta_llava.serving.feature_cache import FeatureCache, cache_image_features
from delta_llava.study.projectors import (
    AveragePoolingProjector,
    MlpProjector,
    ResamplerProjector,
    TokenPackerProjector,
)


BUDGETS = (1, 4, 9, 16, 36, 144)
TRAINED_AT = 16


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """
    A checkpoint of the demo's backbones that knows groups and things, after seconds of training at 16 visual tokens.

    The language model reads a scene as the words of each place, added up, so the projector learns to give those sums,
    and no pass through the language model is needed.
    """
    folder = tmp_path_factory.mktemp("taught") / "checkpoint"
    backbones = pretrain_backbones.FOLDER
    model = assemble(backbones / "vision_tower", backbones / "language_model", folder, num_visual_tokens=[*BUDGETS])
    _, processor = ask.load(folder)
    rng = np.random.default_rng(0)
    layouts = [scenes.random_layout(rng, held_out=False) for _ in range(256)]
    pictures = np.stack([scenes.render(layout, rng, "noto") for layout in layouts])
    storyteller = pretrain_backbones.Storyteller(processor.tokenizer)
    with torch.no_grad():
        pixels = pretrain_backbones.to_pixels(pictures, processor.image_processor)
        _, query_features, memory_features = model.model._run_vision_tower(pixels)
        words = torch.tensor([storyteller.cells(layout) for layout in layouts])
        targets = model.get_input_embeddings()(words).sum(2)
    projector = model.model.multi_modal_projector.train()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # `one_thread` does so for each test, which is later than this
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1 - step / 80))
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        batch = torch.randint(len(layouts), (16,), generator=generator)
        given = projector(query_features[batch], memory_features[batch], TRAINED_AT)
        optimizer.zero_grad()
        (F.mse_loss(given, targets[batch]) / targets.var()).backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    torch.set_num_threads(num_threads)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_and_processor(taught):
    return ask.load(taught)


def asked_scenes(number=50, sizes=("small", "big")):
    """Held-out scenes of several things, with a question about one: image, question, answer and the thing's places."""
    rng = np.random.default_rng(1)
    index = 0
    while index < number:
        layout = scenes.random_layout(rng, held_out=True)
        asked = scenes.ask(layout, rng, ("thing", "group")[index % 2])
        if asked.size in sizes and len(layout) >= 4:
            place = next(place for place in scenes.PLACES if place in asked.question)
            places = scenes.covered(layout)[place].places()
            yield Image.fromarray(scenes.render(layout, rng, "noto")), asked.question, asked.answer, places
            index += 1


def concentration(relevance, places):
    """The relevance of an average patch at these places, as a multiple of that of an average patch of the image."""
    assert relevance.dtype == torch.float32 and relevance.min() >= 0
    patches = F.interpolate(relevance[None, None], size=(pretrain_backbones.PATCH_GRID,) * 2).flatten()
    there = torch.tensor([scenes.PLACES.index(place) for place in places])
    return float(patches[torch.isin(pretrain_backbones.place_of_patch(), there)].mean() / patches.mean())


def localization(model, processor, num_visual_tokens, **options):
    """Over the scenes: the share of right answers, and the concentration at the thing asked about, output and input."""
    rows = []
    for image, question, answer, places in asked_scenes(**options):
        seen = grad_cam(model, processor, image, question, num_visual_tokens)
        concentrations = (concentration(relevance, places) for relevance in (seen.output_map, seen.input_map))
        rows.append((seen.answer == answer, *concentrations))
    return np.mean(rows, axis=0)


@pytest.fixture
def scene(tmp_path):
    """The file of a held-out scene, and a question about it."""
    image, question, *_ = next(asked_scenes(1))
    image.save(tmp_path / "scene.png")
    return tmp_path / "scene.png", question


def test_the_asked_for_thing_is_more_relevant_than_the_rest_of_a_held_out_scene(model_and_processor):
    accuracy, *concentrations = localization(*model_and_processor, TRAINED_AT)
    assert accuracy >= 0.8
    assert min(concentrations) > 1.6  # 1 in a map without a clue


@pytest.mark.slow
@pytest.mark.skipif(
    not (ask.CHECKPOINT / "config.json").is_file(), reason="`make demo` has not left its checkpoint yet"
)
@pytest.mark.parametrize("num_visual_tokens", [144, 36, 16, 9, 4])
def test_so_it_is_in_the_demo_at_every_budget(num_visual_tokens):
    """After `make demo`: `python -m pytest -m slow -s tests/evaluation/test_gradcam.py`, which prints the figures."""
    sizes = ("small", "big") if num_visual_tokens >= 36 else ("big",)  # what few tokens say of small things is little
    accuracy, output, patches = localization(*ask.load(ask.CHECKPOINT), num_visual_tokens, sizes=sizes)
    print(
        f"{num_visual_tokens} visual tokens: {accuracy:.0%} right; relevance at the {' or '.join(sizes)} thing asked"
        f" about: {output:.1f} times the mean of the output's map, {patches:.1f} times that of the input's"
    )
    assert accuracy >= 0.8
    assert min(output, patches) > 1.6  # 1 in a map without a clue


def test_gradients_are_the_slope_of_the_score(tiny_model, tiny_processor, noise, monkeypatch):
    """Gradient x feature, summed over channels with its sign, is what the score gains as a visual token is scaled."""
    monkeypatch.setattr(gradcam, "_relevance", lambda features, gradients: (features * gradients).sum(-1)[0].detach())
    model, processor = tiny_model(), tiny_processor()
    scale = torch.ones(16, 1)
    model.model.multi_modal_projector.register_forward_hook(lambda module, arguments, tokens: tokens * scale)

    def explain():
        return grad_cam(model, processor, noise(1)[0], "What is it?", 16, "a red circle")

    slopes = explain().output_map.flatten()
    for token in slopes.abs().topk(3).indices:
        scores = []
        for factor in (1.02, 0.98):
            scale[token] = factor
            scores.append(explain().score)
        scale[token] = 1
        assert (scores[0] - scores[1]) / 0.04 == pytest.approx(slopes[token].item(), rel=0.05)


def test_bfloat16_agrees_with_float32(taught, model_and_processor):
    model, processor = model_and_processor
    half = ask.load(taught)[0].to(torch.bfloat16)
    for image, question, *_ in asked_scenes(3):
        exact = grad_cam(model, processor, image, question, TRAINED_AT)
        rough = grad_cam(half, processor, image, question, TRAINED_AT, exact.answer)
        for name in ("output_map", "input_map", "window_attention"):
            expected, found = getattr(exact, name), getattr(rough, name)
            assert expected.dtype == found.dtype == torch.float32
            assert F.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.95, name


def test_explains_what_the_model_answers(model_and_processor, scene):
    model, processor = model_and_processor
    image, question = scene
    seen = grad_cam(model, processor, str(image), question, TRAINED_AT)
    assert (seen.question, seen.num_visual_tokens) == (question, TRAINED_AT)
    assert seen.answer == ask.answer(model, processor, [image], [question], TRAINED_AT)[0]


@pytest.mark.parametrize("template", ["chatml", "vicuna-v1"])
def test_the_score_is_the_log_probability_of_the_named_answer(template, tiny_model, tiny_processor, templates, noise):
    model, processor = tiny_model(), tiny_processor()
    processor.chat_template = (templates / f"{template}.jinja").read_text()
    seen = grad_cam(model, processor, noise(1)[0], "What is it?", 16, "a red circle")
    asked = [{"type": "image", "image": noise(1)[0]}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)
    answer = " a red circle" if template == "vicuna-v1" else "a red circle"
    inputs = processor(images=noise(1), text=text + answer, num_visual_tokens=16, return_tensors="pt")
    number = len(processor.tokenizer(answer).input_ids)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -number - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, inputs["input_ids"][0, -number:, None]).sum().item()
    assert seen.answer == "a red circle"
    assert seen.score == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_visual_tokens", BUDGETS)
@pytest.mark.parametrize("variant", ["released", "paper", "residual"])
def test_windows_show_the_attention_that_torch_computes(
    variant, num_visual_tokens, tiny_model, tiny_processor, noise, monkeypatch
):
    model = tiny_model(projector_variant=variant)
    attention, calls = model.model.multi_modal_projector.attention, []
    with torch.no_grad():
        attention.in_proj_bias.normal_()
        attention.in_proj_weight.mul_(5)
    attention.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    seen = grad_cam(model, tiny_processor(), noise(1)[0], "What is it?", num_visual_tokens, "a red circle")
    if variant != "paper" and num_visual_tokens == 144:
        assert torch.equal(seen.window_attention, torch.ones(12, 12))
        return
    queries, keys, values = (tensor.flatten(0, 1) for tensor in calls[-1])
    _, weights = nn.MultiheadAttention.forward(attention, queries.unsqueeze(1), keys, values)

    side = math.isqrt(num_visual_tokens)
    scale = 12 // side
    assert seen.window_attention.shape == (12, 12)
    for cell in range(num_visual_tokens):
        row, column = (scale * index for index in divmod(cell, side))
        window = seen.window_attention[row : row + scale, column : column + scale]
        assert window.sum().item() == pytest.approx(1, abs=1e-5)
        expected = weights[cell, 0].view(-1, scale, scale).sum(0)
        torch.testing.assert_close(window, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [MlpProjector, AveragePoolingProjector, TokenPackerProjector, ResamplerProjector])
def test_a_comparator_is_explained_without_windows(kind, tiny_model, tiny_processor, noise, tmp_path):
    model = tiny_model()
    model.model.multi_modal_projector = kind(model.config).apply(model._init_weights).eval()
    seen = grad_cam(model, tiny_processor(), noise(1)[0], "What is it?", 144, "a red circle")
    assert seen.window_attention is None
    assert seen.output_map.shape == seen.input_map.shape == (12, 12)
    assert seen.output_map.sum() > 0 and seen.input_map.sum() > 0
    draw([seen], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file()


@pytest.mark.parametrize("frozen_tower", [True, False])
def test_the_model_is_left_as_it_was(frozen_tower, tiny_model, tiny_processor, noise):
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(not frozen_tower).eval()

    def state():
        modules = [
            (module.training, len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
        ]
        return modules, [(weight.requires_grad, weight.grad) for weight in model.parameters()]

    grad_cam(model, tiny_processor(), noise(1)[0], "What is it?", 36, "a red circle")  # transformers' hooks stay
    before, weights = state(), [weight.clone() for weight in model.parameters()]
    seen = grad_cam(model, tiny_processor(), noise(1)[0], "What is it?", 36, "a red circle")
    assert seen.input_map.sum() > 0
    assert state() == before
    assert all(map(torch.equal, weights, model.parameters()))
    with pytest.raises(ValueError, match="it is empty"):
        grad_cam(model, tiny_processor(), noise(1)[0], "What is it?", 36, " ")
    assert state() == before


def test_the_image_is_what_the_model_sees(tiny_model, tiny_processor):
    pixels = np.zeros((48, 96, 3), dtype=np.uint8)
    pixels[:, 24:72] = np.random.default_rng(0).integers(0, 256, (48, 48, 3))
    seen = grad_cam(tiny_model(), tiny_processor(), Image.fromarray(pixels), "What is it?", 36, "a red circle")
    torch.testing.assert_close(seen.image, torch.tensor(pixels[:, 24:72]) / 255, atol=2 / 255, rtol=0)


def test_the_command_writes_the_picture_and_prints_the_answers(taught, scene, tmp_path, capsys):
    image, question = scene
    output = tmp_path / "picture.png"
    arguments = ["--checkpoint", str(taught), "--image", str(image), "--question", question, "--answer", "cat"]
    gradcam.main([*arguments, "--num_visual_tokens", "16", "4", "--dtype", "bfloat16", "--output", str(output)])
    assert Image.open(output).format == "PNG"
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in printed] == [
        "16 visual tokens: “cat”",
        "4 visual tokens: “cat”",
        f"Written: {output}",
    ]


def test_a_picture_has_a_row_for_each_budget_and_the_texts_of_each(
    tiny_model, tiny_processor, noise, tmp_path, monkeypatch
):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: drawn.append(figure))
    seen = [grad_cam(tiny_model(), tiny_processor(), noise(1)[0], "Is it $5 or $6?", v, "a circle") for v in (16, 1)]
    draw(seen, tmp_path / "picture.png")
    *rows, legend = drawn[0].subfigs
    assert drawn[0].get_suptitle() == "Is it $5 or $6?"
    assert [row.get_suptitle().split(":")[0] for row in rows] == ["16 visual tokens", "1 visual token"]
    assert [len(row.axes) for row in rows] == [5, 5] and len(legend.axes) == 2
    assert all("circle" in row.get_suptitle() for row in rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"--image": "missing.png"}, "error: Cannot read image missing.png: no such file"),
        ({"--num_visual_tokens": "17"}, "error: num_visual_tokens=17 does not fit .* one of"),
        ({"--question": " "}, "error: The question is empty"),
        ({"--answer": ""}, "error: There is no answer to explain at 16 visual tokens"),
        ({"--checkpoint": "."}, "error: checkpoint . does not load: .*config.json"),
        ({"--output": "picture.xyz"}, "error: Format 'xyz' is not supported"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(wrong, message, taught, scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image, question = scene
    options = {"--checkpoint": str(taught), "--image": str(image), "--question": question, "--num_visual_tokens": "16"}
    with pytest.raises(SystemExit, match=message) as error:
        gradcam.main([text for pair in {**options, **wrong}.items() for text in pair])
    assert "\n" not in str(error.value)


EARLIER = [("How many animals are there?", "four"), ("What is at a1?", "rocket")]


@pytest.mark.parametrize("earlier", [[], EARLIER])
@pytest.mark.parametrize("num_visual_tokens", [4, 144])
def test_the_map_of_visual_tokens_needs_no_second_look_at_an_image(taught, scene, num_visual_tokens, earlier):
    model, processor = ask.load(taught)
    image, question = scene
    explained = grad_cam(model, processor, image, question, num_visual_tokens, "cat", earlier)
    cache_image_features(model, FeatureCache())
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    for _ in range(2):
        relevance = token_relevance(model, processor, image, question, num_visual_tokens, "cat", earlier)
        torch.testing.assert_close(relevance, explained.output_map)
    assert passes == [1]


def test_an_answer_is_explained_in_its_chat(model_and_processor, scene):
    model, processor = model_and_processor
    image, question = scene
    explained = grad_cam(model, processor, image, question, 16, "cat", EARLIER)
    texts = [*EARLIER[0], *EARLIER[1], question, "cat"]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in zip(["user", "assistant"] * 3, texts, strict=True)
    ]
    messages[0]["content"].insert(0, {"type": "image", "image": image})
    text = processor.apply_chat_template(messages, continue_final_message=True)
    inputs = processor(images=image, text=text, num_visual_tokens=16, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    (answer,) = processor.tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0, -1] == answer
    assert explained.score == pytest.approx(logits[-2].log_softmax(-1)[answer].item(), abs=1e-4)
