"""Loading a generator with its tokenizer, class numbers without names, and the rows of a table of Frechet distances."""

from larp.data.clips import ClipShape
from larp.data.listing import VideoItem, VideoSet
from larp.data.video import write_video
from larp.metrics.clipsets import (
    RealClips,
    class_numbers,
    describe_row,
    floor_row,
    frechet_row,
    generated_clips,
    load_pair,
)
from larp.metrics.frechet import Moments, frechet_distance
from larp.metrics.protocols import sample_windows
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp.sampling.options import GuidedSampling

import numpy as np
import pytest
import torch

_SHRINK = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)


def tokenizer() -> LarpTokenizer:
    sizes = dict(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, **_SHRINK)
    return LarpTokenizer(TokenizerConfig(**sizes, prior=PriorConfig(enabled=False)))


def generator(**more) -> LarpGenerator:
    small = dict(num_tokens=4, codebook_size=32, depth=1, heads=2, width=16, ffn_multiple=16, num_classes=3)
    model = LarpGenerator(GeneratorConfig(**small | more))
    torch.nn.init.normal_(model.output.weight, std=2.0)
    return model


def test_a_pair_belongs_together_in_the_variant_that_made_the_codes(tmp_path):
    last, averaged = tokenizer(), tokenizer()
    last.save_pretrained(tmp_path / "tokenizer", ema=averaged)
    generator(tokenizer_hash=averaged.weight_hash()).save_pretrained(tmp_path / "generator")
    pair = str(tmp_path / "generator"), str(tmp_path / "tokenizer")
    _, codec = load_pair(*pair, "class", "cpu", "ema")
    assert codec.weight_hash() == averaged.weight_hash()
    with pytest.raises(ValueError, match="trained on codes of the tokenizer"):
        load_pair(*pair, "class", "cpu")
    with pytest.raises(ValueError, match="is conditional on classes; this needs one that predicts frames"):
        load_pair(*pair, "frame-prediction", "cpu", "ema")


def test_classes_without_names_go_by_position_where_there_are_as_many():
    three, two = (VideoSet((), names, "data") for names in (("a", "b", "c"), ("a", "b")))
    assert class_numbers(generator(), three, [2, 0]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="3 classes without names, data has 2"):
        class_numbers(generator(), two, [0])


def test_a_generated_clip_does_not_depend_on_its_batch():
    model, codec = generator(), tokenizer()
    conditions = torch.tensor([0, 1, 2, 0, 1])
    whole, parts = (
        torch.cat(
            [
                codes
                for _, codes in generated_clips(model, codec, conditions, GuidedSampling(guidance_scale=2.0), 3, size)
            ]
        )
        for size in (5, 2)
    )
    assert whole.shape == (5, 4) and torch.equal(whole, parts)


@pytest.fixture
def videos(tmp_path):
    """Three videos of four windows each: the first frame of a window of video v is grey, 80 v + 10 window."""
    frames = [np.repeat(np.arange(4, dtype=np.uint8) * 10 + 80 * video, 4) for video in range(3)]
    for video, greys in enumerate(frames):
        picture = np.broadcast_to(greys[:, None, None, None], (16, 16, 16, 3))
        write_video(tmp_path / f"{video}.mp4", np.ascontiguousarray(picture), 25, quality=10)
    items = (VideoItem(tmp_path / f"{video}.mp4", f"{video}.mp4") for video in range(3))
    return VideoSet(tuple(items), (), "three")


def damage(path):
    """Leave the header, which tells the number of frames, and blot out the pictures."""
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    data[start : start + size] = bytes(size)
    path.write_bytes(data)


def windows_of(clips):
    """(video, first frame) of the clips of batches, by their grey."""
    greys = [round(float(clip[:, 0].mean()) * 255) for batch in clips for clip in batch]
    return [(grey // 80, round(grey % 80 / 10) * 4) for grey in (max(0, grey + 3) for grey in greys)]


def test_real_clips_follow_the_protocol(videos):
    clips = RealClips(videos, ClipShape(4, 16, 16), 5, 42, 2)
    sampled, spare = sample_windows([16] * 3, 4, 5, 42, spare=5)
    assert [len(batch) for batch in RealClips(videos, ClipShape(4, 16, 16), 5, 42, 2).sampled()] == [2, 2, 1]
    assert windows_of(clips.sampled()) == sampled == clips.windows
    assert windows_of(clips.others()) == spare and clips.skipped == []


def test_clips_of_a_damaged_video_are_replaced_and_it_is_named(videos):
    sampled, spare = sample_windows([16] * 3, 4, 5, 42, spare=5)
    damage(videos.items[sampled[0][0]].path)
    found = []
    for batch in (2, 5):
        clips = RealClips(videos, ClipShape(4, 16, 16), 5, 42, batch)
        found.append((windows_of(clips.sampled()), clips.windows, windows_of(clips.others())))
        assert [entry["name"] for entry in clips.skipped] == [f"{sampled[0][0]}.mp4"]
        assert "decoded" in clips.skipped[0]["reason"]
    (read, windows, others), again = found
    assert (read, windows, others) == again and read == windows
    good = [window for window in spare if window[0] != sampled[0][0]]
    fresh = [(new, old) for new, old in zip(windows, sampled, strict=True) if new != old]
    assert [new for new, _ in fresh] == good[: len(fresh)] and {old[0] for _, old in fresh} == {sampled[0][0]}
    assert not set(windows) & set(others) and sampled[0][0] not in {video for video, _ in windows + others}
    assert len(windows) + len(others) == 8, "all the windows of the two good videos are read, each once"


def test_too_few_readable_windows_are_an_error(videos):
    damage(videos.items[0].path)
    clips = RealClips(videos, ClipShape(4, 16, 16), 9, 42, 4)
    with pytest.raises(ValueError, match=r"0.mp4 is damaged \(.*repair or remove.* or ask for fewer than 9 clips"):
        list(clips.sampled())


def test_rows_of_a_table():
    real, other = torch.randn(30, 5), torch.randn(30, 5) + 1
    row = frechet_row("moved", real, other, 4, 0)
    assert row["value"] == pytest.approx(frechet_distance(Moments.of(real), Moments.of(other))) and row["deviation"] > 0
    assert describe_row(row).split("±")[0].split() == ["moved", f"{row['value']:.2f}"] and "(N=30)" in describe_row(row)
    assert "±" not in describe_row(floor_row((1.5, 7))) and "1.50 (N=7)" in describe_row(floor_row((1.5, 7)))
