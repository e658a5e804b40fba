"""The analytic checker: rendered clips, blur and noise, and clips without a blob."""

from larp.data import shapes
from larp.data.clips import pixels_to_clip
from larp.metrics.shape_checker import read_blob, score

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture(scope="module")
def rendered():
    attributes = [a for split in ("train", "test") for a, _ in shapes.sample_attributes(150, 7, split)]
    return [pixels_to_clip(shapes.render(a, seed=k)) for k, a in enumerate(attributes)], attributes


def blurred(clip, noise, box=3):
    kernel = torch.full((3, 1, box, box), 1 / box**2)
    smooth = F.conv2d(F.pad(clip.transpose(0, 1), (box // 2,) * 4, mode="replicate"), kernel, groups=3).transpose(0, 1)
    return (smooth + noise * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def test_clean_clips_are_read_correctly(rendered):
    result = score(*rendered)
    assert result["n"] == 300
    assert (
        result["colour_accuracy"] >= 0.99 and result["direction_accuracy"] >= 0.99 and result["shape_accuracy"] >= 0.97
    )


def test_blur_and_noise_change_little(rendered):
    clips, attributes = rendered
    result = score((blurred(clip, 0.03) for clip in clips), attributes)
    assert (
        result["colour_accuracy"] >= 0.97 and result["direction_accuracy"] >= 0.97 and result["shape_accuracy"] >= 0.9
    )


def test_shapes_survive_a_strong_blur(rendered):
    clips, attributes = rendered
    result = score((blurred(clip, 0.03, box=5) for clip in clips[:60]), attributes[:60])
    assert (
        result["colour_accuracy"] >= 0.97 and result["direction_accuracy"] >= 0.97 and result["shape_accuracy"] >= 0.85
    )


def test_travel_depends_on_the_speed(rendered):
    for clip, attributes in list(zip(*rendered, strict=True))[:40]:
        assert read_blob(clip).travel == pytest.approx(shapes.SPEEDS[attributes.speed], rel=0.15)


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.06])
def test_a_grey_clip_scores_zero(noise):
    clip = (
        torch.full((3, 16, 32, 32), 0.3) + noise * torch.randn(3, 16, 32, 32, generator=torch.manual_seed(0))
    ).clamp(0, 1)
    reading = read_blob(clip)
    assert reading.colour is reading.shape is reading.direction is None and reading.found == 0
    result = score([clip], [shapes.Attributes("red", "circle", "left")])
    assert result == {"colour_accuracy": 0.0, "direction_accuracy": 0.0, "shape_accuracy": 0.0, "n": 1}


def test_coloured_noise_has_no_blob():
    assert read_blob(torch.rand(3, 16, 32, 32, generator=torch.manual_seed(0))).colour is None


def test_a_blob_that_stands_still_has_no_direction(rendered):
    clip = rendered[0][0][:, :1].expand(-1, 16, -1, -1)
    reading = read_blob(clip)
    assert reading.colour == rendered[1][0].colour and reading.direction is None and reading.direction_confidence == 0


def test_wrong_answers_count_as_wrong(rendered):
    clips, attributes = rendered
    other = [shapes.Attributes("red" if a.colour != "red" else "blue", a.shape, a.direction) for a in attributes[:10]]
    result = score(clips[:10], other)
    assert result["colour_accuracy"] == 0 and result["direction_accuracy"] == 1


def test_mismatched_input_is_refused(rendered):
    with pytest.raises(ValueError, match=r"2 clips and 1 expected"):
        score(rendered[0][:2], rendered[1][:1])
    with pytest.raises(ValueError, match=r"\(3, T, H, W\)"):
        read_blob(torch.zeros(1, 3, 16, 32, 32))
