"""Distances to the nearest training clip against ones worked out by hand."""

import json

from larp.data.clips import ClipShape, frames_to_clip
from larp.data.datasets import open_videos
from larp.data.video import read_video, write_video
from larp.metrics.i3d import RandomI3D
from larp.metrics.nearest import (
    distance_row,
    distances,
    nearest,
    nearest_among_themselves,
    real_features,
)
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import numpy as np
import pytest
import torch

_SHRINK = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
SHAPE = ClipShape(4, 16, 16)
# Four directions in the plane, whose mean is zero.
TRAINING = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -2.0]])


def test_distance_is_of_directions_around_the_centre():
    centre = torch.tensor([1.0, 1.0])
    a, b = torch.tensor([[2.0, 1.0], [1.0, 5.0]]), torch.tensor([[4.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(distances(a, b, centre), torch.tensor([[0.0, 2.0], [1.0, 1.0]]).double())


def test_a_mirror_image_counts_where_it_is_nearer():
    ways = torch.tensor([[[3.0, 0.1], [1.0, 1.0]], [[1.0, 1.0], [0.0, -5.0]]])
    found, which = nearest(ways, TRAINING)
    assert which.tolist() == [0, 3]
    assert found[0] == pytest.approx(1 - 3 / np.hypot(3, 0.1), rel=1e-4) and found[1] == pytest.approx(0, abs=1e-12)


def test_training_clips_to_other_videos_and_to_their_own():
    others, siblings = nearest_among_themselves(TRAINING, torch.tensor([0, 0, 1, 2]))
    # Neighbours lie at right angles, opposite ones at distance 2; the last two videos have one clip each.
    assert others.tolist() == pytest.approx([1, 1, 1, 1]) and siblings.tolist() == pytest.approx([1, 1])
    others, siblings = nearest_among_themselves(TRAINING, torch.tensor([0, 1, 0, 1]))
    assert others.tolist() == pytest.approx([1, 1, 1, 1]) and siblings.tolist() == pytest.approx([2, 2, 2, 2])


def test_a_row_of_the_table():
    row = distance_row("some", torch.arange(101).double(), 10.5)
    assert (row["median"], row["quantile_05"], row["quantile_01"], row["least"]) == (50, 5, 1, 0)
    assert row["nearer"] == 11 / 101 and row["num_clips"] == 101
    assert row["nearer_interval_95"][0] < 11 / 101 < row["nearer_interval_95"][1]
    with pytest.raises(ValueError, match="some: there is no clip"):
        distance_row("some", torch.empty(0), 1.0)


@pytest.fixture
def world(tmp_path):
    """Three videos of two windows, one of one window and a broken one; a tokenizer."""
    rng, lines = np.random.default_rng(0), []
    for number, frames in enumerate((9, 8, 7, 8)):
        path = f"{number}.mp4"
        write_video(tmp_path / path, rng.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8), 25, quality=10)
        lines.append({"path": path, "label": "a", "split": "train"})
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "broken.mp4", "label": "a", "split": "train"})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    sizes = dict(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, **_SHRINK)
    tokenizer = LarpTokenizer(TokenizerConfig(**sizes, prior=PriorConfig(enabled=False))).eval()
    torch.nn.init.normal_(tokenizer.head.weight, std=0.05)
    return open_videos(f"jsonl:{tmp_path / 'list.jsonl'}"), tokenizer


def test_features_of_real_clips_are_those_of_their_windows(world):
    videos, tokenizer = world
    features = RandomI3D(width=0.05)
    found = real_features(videos, SHAPE, 2, features, tokenizer, 3)
    assert found.videos.tolist() == [0, 0, 1, 1, 2, 3, 3] and found.windows.tolist() == [0, 1, 0, 1, 0, 0, 1]
    (entry,) = found.skipped
    assert entry["name"] == "broken.mp4" and "cannot be decoded" in entry["reason"]
    # The second window of the video of eight frames: frames 4 to 7.
    clip = frames_to_clip(read_video(videos.items[1].path)[0][4:8], 16, 16)[None]
    torch.testing.assert_close(found.real[3:4], features(clip), rtol=1e-4, atol=1e-4)
    again = tokenizer.decode(tokenizer.encode(clip))
    torch.testing.assert_close(found.decoded[3:4], features(again), rtol=1e-4, atol=1e-4)
    both = real_features(videos, SHAPE, 2, features, tokenizer, 3, mirror=True)
    torch.testing.assert_close(both.decoded[:, 0], found.decoded)
    torch.testing.assert_close(both.decoded[3:4, 1], features(again.flip(-1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.real[3:4, 1], features(clip.flip(-1)), rtol=1e-4, atol=1e-4)


def test_unreadable_videos_are_an_error(world):
    videos, tokenizer = world
    for item in videos.items:
        item.path.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"none of its 5 videos can be read, such as 0\.mp4"):
        real_features(videos, SHAPE, 1, RandomI3D(width=0.05), tokenizer, 2)
