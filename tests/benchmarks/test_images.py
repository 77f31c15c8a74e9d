"""The image benchmark compares the same pictures, made by the ways that it names."""

import PIL.Image
import pytest
import torch
from transformers import CLIPImageProcessorPil
from transformers.utils import is_torchvision_available

from delta_llava.benchmarks import images
from delta_llava.benchmarks.photographs import write_photographs


@pytest.fixture
def files(tmp_path):
    return write_photographs(tmp_path, 2)


def test_photographs_have_cocos_sizes_and_a_photographs_weight(files):
    pictures = [PIL.Image.open(file) for file in files]
    assert [(picture.format, picture.size) for picture in pictures] == [("JPEG", (640, 480)), ("JPEG", (480, 640))]
    # A noisy sensor at quality 90: neither flat nor pure noise
    assert all(0.15 < len(open(file, "rb").read()) / (640 * 480) < 0.6 for file in files)


def test_every_path_makes_llavas_picture(files):
    paths = images.make_paths(files)
    for index in range(2):
        reference = paths["LLaVA's"](index)
        assert (reference.shape, reference.dtype) == ((3, 336, 336), torch.float32)
        # Padding is there: above a landscape, left of a portrait, in the mean colour
        edge = reference[:, :40] if index == 0 else reference[:, :, :40]
        assert edge.abs().max() < 0.02
        assert images.grey_levels_apart(paths["ours, PIL"](index), reference) == 0
        if is_torchvision_available():
            assert images.grey_levels_apart(paths["ours, torchvision"](index), reference) <= 1.001


def test_grey_levels_are_those_of_the_picture():
    dark, light = (PIL.Image.new("RGB", (336, 336), (grey, 50, 60)) for grey in (40, 43))
    processor = CLIPImageProcessorPil(**images.SIZE)
    values = [processor(image, return_tensors="pt")["pixel_values"][0] for image in (dark, light)]
    assert images.grey_levels_apart(*values) == pytest.approx(3, abs=1e-3)


def test_the_table_has_the_median_speed_of_every_path(cells):
    rows = [
        {"path": path, "grey_levels": 0.25, "seconds": [seconds, seconds, 100.0, 0.0]}
        for path, seconds in (("LLaVA's", 2.0), ("ours, PIL", 4.0))
    ]
    assert cells(images.table(rows, 2)) == [["LLaVA's", "1.0", "1.00", "0.250"], ["ours, PIL", "0.5", "0.50", "0.250"]]


def test_the_command_measures_every_path_and_needs_an_image(capsys, cells):
    images.main(["--images", "1"])
    assert [row[0] for row in cells(capsys.readouterr().out)] == list(images.make_paths([]))
    with pytest.raises(SystemExit):
        images.main(["--images", "0"])
    assert "--images 0: at least 1 is needed" in capsys.readouterr().err
