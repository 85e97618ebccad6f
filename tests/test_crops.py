"""Keyed crops and flips: torchvision's algorithm, and a function of (seed, epoch, sample) alone."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torchvision.transforms import RandomResizedCrop

from asge_zoo.data.crops import TRIES, Integers, ResizedCrop, center_boxes, flips, random_boxes
from asge_zoo.seeding import keyed_seed

WORD = 2**64
COUNT = 20000


def uniform(key: int, sample: int, draw: int) -> float:
    """The `draw`-th number, from 1, of a sample's stream, in Python's own integers."""

    def mixed(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
        word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
        return word ^ word >> 31

    stream = mixed(mixed(sample) ^ key)
    return (mixed((stream + draw * 0x9E3779B97F4A7C15) % WORD) >> 11) / 2**53


def box(seed: int, epoch: int, sample: int, height: int, width: int, options: ResizedCrop) -> tuple[int, ...]:
    """torchvision's RandomResizedCrop.get_params, written out, with the keyed numbers."""
    key = keyed_seed(seed, "crop", epoch)
    (least, most), (narrow, wide) = options.scale, options.ratio
    for attempt in range(TRIES):
        area_draw, ratio_draw, top_draw, left_draw = (
            uniform(key, sample, 1 + kind * TRIES + attempt) for kind in range(4)
        )
        area = height * width * (least + (most - least) * area_draw)
        ratio = math.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(top_draw * (height - h + 1)), math.floor(left_draw * (width - w + 1)), h, w
    if width / height < narrow:
        w, h = width, round(width / narrow)
    elif width / height > wide:
        w, h = round(height * wide), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def sizes(count: int) -> tuple[Integers, Integers]:
    """Heights and widths, some of them extreme."""
    drawn = np.random.default_rng(0).integers(1, 600, (2, count))
    drawn[:, ::7] = np.array([[500], [9]])
    drawn[:, 1::7] = np.array([[1], [400]])
    return drawn[0], drawn[1]


RANGES = [
    ResizedCrop(),
    ResizedCrop(scale=(0.35, 1.0)),
    ResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
    ResizedCrop(scale=(0.9, 1.0), ratio=(1.9, 2.0)),
]


@pytest.mark.parametrize("options", RANGES)
def test_boxes_against_a_loop(options: ResizedCrop) -> None:
    count = 500
    samples = np.random.default_rng(1).integers(0, 1 << 40, count)
    heights, widths = sizes(count)
    found = random_boxes(3, 5, samples, heights, widths, options)
    assert (found.shape, found.dtype) == ((count, 4), np.int64)
    for row, sample, height, width in zip(found, samples, heights, widths, strict=True):
        assert tuple(row) == box(3, 5, int(sample), int(height), int(width), options)


@pytest.mark.parametrize("options", RANGES)
def test_boxes_one_by_one_are_those_of_all_together(options: ResizedCrop) -> None:
    samples, (heights, widths) = np.arange(300), sizes(300)
    together = random_boxes(0, 1, samples, heights, widths, options)
    alone = [random_boxes(0, 1, samples[[i]], heights[[i]], widths[[i]], options)[0] for i in range(300)]
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("options", RANGES)
def test_boxes_lie_within_their_images(options: ResizedCrop) -> None:
    heights, widths = sizes(COUNT)
    for boxes in (random_boxes(0, 0, np.arange(COUNT), heights, widths, options), center_boxes(heights, widths)):
        top, left, height, width = boxes.T
        assert top.min() >= 0 and left.min() >= 0 and height.min() >= 1 and width.min() >= 1
        assert (top + height <= heights).all() and (left + width <= widths).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 200)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    """Means and deviations of all four numbers, within five standard errors."""
    options = ResizedCrop()
    ours = random_boxes(0, 0, np.arange(COUNT), np.full(COUNT, height), np.full(COUNT, width), options)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    params = RandomResizedCrop.get_params
    theirs = np.array([params(image, list(options.scale), list(options.ratio)) for _ in range(COUNT // 4)])
    for one, other in zip(ours.T, theirs.T, strict=True):
        error = math.hypot(one.std() / math.sqrt(len(one)), other.std() / math.sqrt(len(other)))
        assert abs(one.mean() - other.mean()) < 5 * error
        assert one.std() == pytest.approx(other.std(), rel=0.05)


def test_draws_go_by_seed_epoch_and_sample() -> None:
    """Each of them gives others, and what one image gets tells nothing of what the next one gets."""
    heights, widths = np.full(1000, 400), np.full(1000, 300)

    def boxes(seed: int, epoch: int, first: int) -> Integers:
        return random_boxes(seed, epoch, np.arange(first, first + 1000), heights, widths, ResizedCrop())

    one = boxes(0, 0, 0)
    assert np.array_equal(one, boxes(0, 0, 0))
    for other in (boxes(1, 0, 0), boxes(0, 1, 0), boxes(0, 0, 1000)):
        assert (one != other).any(axis=1).mean() > 0.99
        assert abs(np.corrcoef(one[:, 0], other[:, 0])[0, 1]) < 0.15
    assert abs(np.corrcoef(one[:-1, 0], one[1:, 0])[0, 1]) < 0.15


def test_flips_are_half_of_the_images_and_others_in_each_epoch() -> None:
    first, second, reseeded = (flips(*key, np.arange(COUNT)) for key in ((0, 0), (0, 1), (1, 0)))
    assert first.dtype == np.bool_ and first.shape == (COUNT,)
    for each in (first, second, reseeded, first ^ second, first ^ reseeded, first[1:] ^ first[:-1]):
        assert 0.48 < each.mean() < 0.52
    assert [bool(flips(0, 0, np.array([i]))[0]) for i in range(50)] == first[:50].tolist()


def test_the_middle_for_evaluation() -> None:
    """The 224 of 256 that images of 256 pixels' shorter side are cut to."""
    boxes = center_boxes(np.array([256, 300, 8, 1]), np.array([341, 256, 8, 5]))
    assert boxes.tolist() == [[16, 58, 224, 224], [38, 16, 224, 224], [0, 0, 7, 7], [0, 2, 1, 1]]


def test_options_come_from_json() -> None:
    options = ResizedCrop.model_validate(json.loads('{"scale": [0.35, 1], "ratio": [1, 1]}'))
    assert (options.scale, options.ratio, options.flip) == ((0.35, 1.0), (1.0, 1.0), True)
    assert ResizedCrop.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    "options",
    [
        {"scale": [0.0, 1.0]},
        {"scale": [0.5, 0.4]},
        {"scale": [0.5, 1.1]},
        {"scale": [0.5]},
        {"scale": ["0.5", "1"]},
        {"ratio": [-1.0, 1.0]},
        {"ratio": [2.0, 1.0]},
        {"ratio": 1.0},
        {"flip": 1},
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ResizedCrop.model_validate(options)
