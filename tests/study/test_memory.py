"""What the study's runs share is what the package would have computed for each of them."""

import pytest
import torch

from delta_llava.demo.scenes import write_scenes
from delta_llava.hub.assemble import assemble
from delta_llava.modeling_delta_llava import DeltaLlavaForConditionalGeneration
from delta_llava.processing_delta_llava import DeltaLlavaProcessor
from delta_llava.study.memory import Rows, remembered_tower, widen
from delta_llava.study.meteor import MeteorProcessor, meteor_from
from delta_llava.study.methods import BACKBONES
from delta_llava.study.run import Questions
from delta_llava.turns import TEMPLATES


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, train_scenes=4, held_out_scenes=2, seed=7)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    assemble(**BACKBONES, output_dir=folder, num_visual_tokens=(144, 36, 16, 9, 4, 1))
    return folder


PROCESSORS = pytest.mark.parametrize("processor_class", [DeltaLlavaProcessor, MeteorProcessor])


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in expected)


@PROCESSORS
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_remembered_rows_make_the_batches_of_the_collator(scenes, checkpoint, processor_class, stage):
    template = (TEMPLATES / "plain.jinja").read_text() if stage == "pretrain" else None
    rows = Rows(scenes, stage, processor_class.from_pretrained(checkpoint), 512, template)
    for budget in (1, 9, 144):
        keys = [(index, budget) for index in (2, 0, 3)]
        assert_same(rows.collate([rows[key] for key in keys]), rows.collator([rows.budgeted[key] for key in keys]))


@PROCESSORS
def test_a_prompt_is_widened_to_what_the_processor_makes_at_a_budget(scenes, checkpoint, processor_class):
    processor, questions = processor_class.from_pretrained(checkpoint), Questions(scenes / "held_out.json")
    narrow, wide = (questions.inputs(processor, questions.rows, budget) for budget in (1, 36))
    assert_same(widen(narrow, processor.image_token_id, 36), wide)


@pytest.mark.parametrize("is_meteor", [False, True])
def test_the_tower_encodes_a_picture_once_and_all_get_the_same(checkpoint, is_meteor):
    model = DeltaLlavaForConditionalGeneration.from_pretrained(checkpoint)
    model = meteor_from(model) if is_meteor else model
    pictures, encoded = torch.randn(5, 3, 96, 96, generator=torch.Generator().manual_seed(8)), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda tower, args, kwargs: encoded.append(len((args or [*kwargs.values()])[0])), with_kwargs=True
    )
    expected = model.eval().get_image_features(pictures, 16)
    encoded.clear()
    with remembered_tower(model):
        features = [model.get_image_features(pictures[part], 16).pooler_output for part in (slice(3), [4, 3, 4, 1])]
    assert encoded == [3, 2]
    for index, found in zip((0, 1, 2, 4, 3, 4, 1), [*features[0], *features[1]], strict=True):
        torch.testing.assert_close(found, expected.pooler_output[index])
    model.get_image_features(pictures, 16)
    assert encoded == [3, 2, 5]
