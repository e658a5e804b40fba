"""Whole videos through a tokenizer: any length, any size, in little memory."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from larp.codec import whole_video
from larp.codec.token_file import TokenFileError, TokenizedVideo
from larp.codec.whole_video import (
    Encoding,
    cut_windows,
    detokenize_video,
    reconstruct_video,
    shortest_prefixes,
    tokenize_video,
)
from larp.data.clips import clip_to_frames, frames_to_clip
from larp.data.open_video import VideoError
from larp.data.video import iter_frames, probe, read_video, write_video
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from tests.larp.data.odd_videos import sound_of, write_with_sound
from tests.larp.models.test_tokenizer import tiny

import numpy as np
import pytest
import torch
from PIL import Image


def random_tokenizer(**changes) -> LarpTokenizer:
    """Return a tokenizer with random weights, head included: clips of 4 frames of 16x24, 6 codes of 32."""
    torch.manual_seed(0)
    model = LarpTokenizer(tiny(**changes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def model() -> LarpTokenizer:
    return random_tokenizer()


def noise(frames: int, height: int = 20, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


@pytest.fixture
def clip(tmp_path) -> Path:
    """Ten frames: two windows and a half."""
    write_video(tmp_path / "clip.mp4", noise(10), 12.5)
    return tmp_path / "clip.mp4"


@pytest.mark.parametrize("frames, lengths", [(1, [1]), (3, [3]), (4, [4]), (5, [4, 1]), (8, [4, 4])])
def test_the_last_window_is_padded_with_its_last_frame(frames, lengths):
    video = noise(frames)
    windows = list(cut_windows(iter(video), 4))
    assert [count for _, count in windows] == lengths and all(len(window) == 4 for window, _ in windows)
    assert np.array_equal(np.concatenate([window[:count] for window, count in windows]), video)
    last, count = windows[-1]
    assert all(np.array_equal(frame, video[-1]) for frame in last[count:])


def test_windows_are_encoded_like_clips_in_training(model, clip):
    video = tokenize_video(clip, model, name="mine")
    frames, _ = read_video(clip)
    assert video.header.frames == 10 and video.header.fps == 12.5 and video.header.tokenizer == "mine"
    for start, codes in zip((0, 4), video.windows, strict=False):
        want = model.encode(frames_to_clip(frames[start : start + 4], 16, 24)[None])[0]
        assert torch.equal(codes, want)
    padded = np.concatenate([frames[8:], frames[[9, 9]]])
    assert torch.equal(video.windows[2], model.encode(frames_to_clip(padded, 16, 24)[None])[0])


def test_reconstruct_is_tokenize_then_detokenize(model, clip, tmp_path):
    report = reconstruct_video(clip, tmp_path / "a.mp4", model)
    loaded = TokenizedVideo.load(tokenize_video(clip, model).save(tmp_path / "a.larp"))
    detokenize_video(loaded, model, tmp_path / "b.mp4")
    a, fps = read_video(tmp_path / "a.mp4")
    assert np.array_equal(a, read_video(tmp_path / "b.mp4")[0])
    assert a.shape == (10, 16, 24, 3) and fps == 12.5
    assert (report.frames, report.height, report.width, report.fps) == (10, 16, 24, 12.5)
    assert (report.windows, report.codes, report.bits) == (3, 18, 18 * 5)
    assert report.bits_per_pixel == pytest.approx(90 / (10 * 16 * 24))
    assert report.tokens_per_second == pytest.approx(18 / (10 / 12.5))


def test_psnr_is_that_of_all_real_frames(model, clip, tmp_path):
    report = reconstruct_video(clip, tmp_path / "a.mp4", model)
    original = frames_to_clip(read_video(clip)[0], 16, 24)
    video = tokenize_video(clip, model)
    again = torch.cat([model.decode(codes[None])[0] for codes in video.windows], dim=1)[:, :10]
    assert report.psnr == pytest.approx(psnr(original[None], again[None]).item(), abs=1e-3)


def test_bars_count_neither_for_bits_per_pixel_nor_for_psnr(model, clip, tmp_path):
    report = reconstruct_video(clip, tmp_path / "a.mp4", model, Encoding(fit="pad"))
    assert report.bits_per_pixel == pytest.approx(90 / (10 * 10 * 24))  # 20x50 fits in as 10x24
    video = tokenize_video(clip, model, Encoding(fit="pad"))
    fitting = video.header.fitting
    original = torch.stack([frames_to_clip(fitting.apply(f[None]), 16, 24)[:, 0] for f in iter_frames(clip)], dim=1)
    again = torch.cat([model.decode(codes[None])[0] for codes in video.windows], dim=1)[:, :10]
    assert report.psnr == pytest.approx(psnr(original[None, ..., 3:13, :], again[None, ..., 3:13, :]).item(), abs=1e-3)


@pytest.mark.parametrize("fit, size", [("crop", (20, 30)), ("stretch", (20, 50)), ("pad", (20, 50))])
def test_original_size(model, clip, tmp_path, fit, size):
    report = reconstruct_video(clip, tmp_path / "a.mp4", model, Encoding(fit=fit), original_size=True)
    detokenize_video(tokenize_video(clip, model, Encoding(fit=fit)), model, tmp_path / "b.mp4", original_size=True)
    assert (report.height, report.width) == size
    for name in ("a.mp4", "b.mp4"):
        assert (probe(tmp_path / name).height, probe(tmp_path / name).width) == size


def test_the_fit_changes_the_codes(model, clip):
    codes = {fit: tuple(tokenize_video(clip, model, Encoding(fit=fit)).codes.tolist()) for fit in ("crop", "pad")}
    assert codes["crop"] != codes["pad"]


def test_the_batch_size_changes_nothing(model, clip, tmp_path):
    one, all_ = (tokenize_video(clip, model, Encoding(batch_size=size)) for size in (1, 8))
    assert torch.equal(one.codes, all_.codes)
    frames = []
    for size in (1, 8):
        detokenize_video(one, model, tmp_path / "a.mp4", batch_size=size)
        frames.append(read_video(tmp_path / "a.mp4")[0].astype(int))
    assert np.abs(frames[0] - frames[1]).mean() < 1  # a pixel that rounds differently changes x264's decisions


def test_a_prefix_of_the_codes_is_stored_and_decoded(clip, tmp_path):
    model = random_tokenizer(nested=True)
    video = tokenize_video(clip, model, Encoding(num_tokens=2))
    assert video.lengths.tolist() == [2, 2, 2]
    whole = tokenize_video(clip, model)
    assert all(torch.equal(a, b[:2]) for a, b in zip(video.windows, whole.windows, strict=True))
    assert reconstruct_video(clip, tmp_path / "a.mp4", model, Encoding(num_tokens=2)).codes == 6
    with pytest.raises(ValueError, match=r"this tokenizer always takes 6.*nested"):
        tokenize_video(clip, random_tokenizer(), Encoding(num_tokens=2))
    with pytest.raises(ValueError, match=r"9 codes: this tokenizer has 1 to 6"):
        tokenize_video(clip, model, Encoding(num_tokens=9))


def test_each_window_gets_the_length_for_the_target(tmp_path):
    torch.manual_seed(0)
    black = LarpTokenizer(tiny(nested=True)).eval()  # untrained: decodes to black
    frames = noise(12, 16, 24)
    frames[4:8] = 0
    write_video(tmp_path / "a.mp4", frames, 10)
    video = tokenize_video(tmp_path / "a.mp4", black, Encoding(target_psnr=30.0))
    assert video.lengths.tolist() == [6, 1, 6]
    again = TokenizedVideo.load(video.save(tmp_path / "a.larp"))
    detokenize_video(again, black, tmp_path / "b.mp4")
    assert probe(tmp_path / "b.mp4").frames == 12
    report = reconstruct_video(tmp_path / "a.mp4", tmp_path / "b.mp4", black, Encoding(target_psnr=30.0))
    assert report.codes == 13 and report.notes == ("2 of 3 windows stay under the target of 30 dB",)
    assert reconstruct_video(tmp_path / "a.mp4", tmp_path / "b.mp4", black, Encoding(target_psnr=2.0)).notes == ()
    with pytest.raises(ValueError, match=r"not both"):
        Encoding(num_tokens=2, target_psnr=30.0)
    with pytest.raises(ValueError, match=r"nested"):
        tokenize_video(tmp_path / "a.mp4", random_tokenizer(), Encoding(target_psnr=30.0))
    for nonsense in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"target_psnr must be a positive number of dB"):
            tokenize_video(tmp_path / "a.mp4", black, Encoding(target_psnr=nonsense))


@pytest.mark.parametrize("fit, frames, gain", [("pad", 4, 2.0), ("crop", 6, 5.2)])
def test_neither_bars_nor_padding_count_for_the_target(tmp_path, fit, frames, gain):
    torch.manual_seed(0)
    black = LarpTokenizer(
        tiny(nested=True)
    ).eval()  # untrained: decodes to black, so bars and black frames have no error
    video = noise(frames)
    video[5:] = 0  # with 6 frames the last window is a noisy frame and three black ones, two of them repeated
    write_video(tmp_path / "a.mp4", video, 10)
    real = reconstruct_video(tmp_path / "a.mp4", tmp_path / "b.mp4", black, Encoding(fit, num_tokens=6)).psnr
    windows = -(-frames // 4)
    target = real + 0.8 * gain
    above = reconstruct_video(tmp_path / "a.mp4", tmp_path / "b.mp4", black, Encoding(fit, target_psnr=target))
    assert above.codes == 6 * windows
    assert above.notes == (f"{windows} of {windows} windows stay under the target of {target:g} dB",)
    below = reconstruct_video(tmp_path / "a.mp4", tmp_path / "b.mp4", black, Encoding(fit, target_psnr=real - 1.5))
    assert below.codes == windows and below.notes == () and below.psnr >= real - 1.5


class Curve:
    """A fake tokenizer: the error of a prefix is given by a curve in the second row of pixels and large elsewhere."""

    def __init__(self, errors: torch.Tensor):
        self.errors, self.quantizer = errors, self

    def lookup(self, codes):
        return codes

    def mask(self, codes, lengths):
        return self.errors.gather(1, lengths[:, None] - 1)

    def decode_latents(self, errors):
        again = torch.ones(len(errors), 3, 4, 2, 8)
        again[:, :, :3, 1] = errors[:, :, None, None]
        return again


def test_a_length_below_n_reaches_the_target_for_any_curve():
    errors = torch.rand(200, 9, generator=torch.Generator().manual_seed(0))
    errors[100:] = errors[100:].sort(dim=1, descending=True).values
    clips, codes = torch.zeros(200, 3, 4, 2, 8), torch.zeros(200, 9, dtype=torch.int64)
    found = shortest_prefixes(Curve(errors), clips, codes, 6.0, (slice(1, 2), slice(None)), [3] * 200)
    reached = -20 * errors.log10() >= 6.0
    assert all(reached[row, n - 1] for row, n in enumerate(found.tolist()) if n < 9)
    fewest = torch.where(reached.any(dim=1), reached.int().argmax(dim=1) + 1, 9)
    assert torch.equal(found[100:], fewest[100:]) and len(found[100:].unique()) > 4


def test_a_long_video_is_never_held_in_memory(model, clip, tmp_path, monkeypatch):
    read, written, ahead = 0, 0, 0
    real = whole_video._write

    def many(_) -> Iterator[np.ndarray]:
        nonlocal read
        for frame in noise(1)[[0] * 400]:
            read += 1
            yield frame

    def write(writer, frames, fitting):
        nonlocal written, ahead
        ahead = max(ahead, read - written)
        written += len(frames)
        real(writer, frames, fitting)

    monkeypatch.setattr(whole_video, "iter_frames", many)
    monkeypatch.setattr(whole_video, "_write", write)
    reconstruct_video(clip, tmp_path / "a.mp4", model, Encoding(batch_size=3))
    assert read == written == 400 and ahead <= 3 * 4
    assert probe(tmp_path / "a.mp4").frames == 400


def test_reconstruct_copies_the_sound_and_detokenize_has_none(model, tmp_path):
    source = write_with_sound(tmp_path / "a.mp4", noise(30, 16, 16), 10)
    assert reconstruct_video(source, tmp_path / "b.mp4", model).notes == ()
    assert len(sound_of(tmp_path / "b.mp4")) == len(sound_of(source)) > 40_000
    detokenize_video(tokenize_video(source, model), model, tmp_path / "c.mp4")
    assert sound_of(tmp_path / "c.mp4").size == 0
    (note,) = reconstruct_video(source, tmp_path / "b.gif", model).notes
    assert ".gif" in note


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_an_image_is_a_video_of_one_frame(model, tmp_path, name):
    Image.fromarray(noise(1)[0]).save(tmp_path / name)
    assert reconstruct_video(tmp_path / name, tmp_path / "b.mp4", model).frames == 1
    assert probe(tmp_path / "b.mp4").frames == 1


def test_a_damaged_file_leaves_no_output(model, tmp_path, clips_root):
    data = bytearray((clips_root / "odd" / "h264_10bits.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (tmp_path / "a.mp4").write_bytes(data)
    for broken in (tmp_path / "a.mp4", clips_root / "odd" / "corrupted.mp4"):
        with pytest.raises(VideoError, match=broken.name):
            reconstruct_video(broken, tmp_path / "b.mp4", model)
        with pytest.raises(VideoError, match=broken.name):
            tokenize_video(broken, model)
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_an_interrupt_leaves_the_old_file(model, clip, tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_text("old")

    def stopped(_):
        yield from noise(9)
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_video, "iter_frames", stopped)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_video(clip, tmp_path / "a.mp4", model, Encoding(batch_size=1))
    assert (tmp_path / "a.mp4").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a.mp4", "clip.mp4"]


def test_the_video_itself_is_never_the_output(model, clip, tmp_path):
    (tmp_path / "link.mp4").symlink_to(clip)
    before = clip.read_bytes()
    for out in (clip, tmp_path / "link.mp4"):
        with pytest.raises(ValueError, match=r"is the video itself"):
            reconstruct_video(clip, out, model)
    assert clip.read_bytes() == before


def test_another_tokenizer_is_an_error_before_writing(model, clip, tmp_path):
    video = tokenize_video(clip, model, name="first")
    with pytest.raises(TokenFileError, match=r"v.larp was made with .*first.*second"):
        detokenize_video(video, random_tokenizer(codebook_size=33), tmp_path / "a.mp4", name="second", where="v.larp")
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("make", [Encoding, lambda **o: detokenize_video(None, None, "a.mp4", **o)])
def test_the_batch_size_must_be_positive(make):
    with pytest.raises(ValueError, match=r"batch_size must be a whole number of at least 1, got 0"):
        make(batch_size=0)


def test_unusual_real_files_keep_their_shape(model, clips_root, tmp_path):
    for name, frames, size in (
        ("video_90.mov", 3, (568, 320)),
        ("-video-with-dash-.mp4", 5, (2, 2)),  # 1x1: an mp4 has even sides
        ("circle.gif", 30, (128, 128)),
        ("h265_video.mp4", 10, (128, 128)),
    ):
        source = clips_root / "odd" / name
        report = reconstruct_video(source, tmp_path / "a.mp4", model, Encoding(fit="pad"), original_size=True)
        info = probe(tmp_path / "a.mp4")
        assert (report.frames, info.frames, (info.height, info.width)) == (frames, frames, size), name
        assert info.fps == pytest.approx(probe(source).fps, rel=1e-3), name


def test_a_real_clip_through_the_published_layout(golden_root, clips_root, tmp_path):
    """The file has the decoded windows, with the sound."""
    model = LarpTokenizer.from_pretrained(golden_root / "official_tokenizer")
    source = sorted((clips_root / "ucf101_original").rglob("*.avi"))[0]
    frames, fps = read_video(source)
    report = reconstruct_video(source, tmp_path / "a.mkv", model)
    length, height, width = model.config.clip_shape
    windows = [window for window, _ in cut_windows(iter(frames), length)]
    decoded = [model.decode(model.encode(frames_to_clip(window, height, width)[None]))[0] for window in windows]
    want = np.concatenate([clip_to_frames(clip) for clip in decoded])[: len(frames)]
    write_video(tmp_path / "want.mkv", want, fps)
    again, _ = read_video(tmp_path / "a.mkv")
    # Batches round differently, which changes x264's decisions; a shift by one frame would differ by 69.
    assert np.abs(again.astype(int) - read_video(tmp_path / "want.mkv")[0]).mean() < 2
    assert report.fps == fps and len(sound_of(tmp_path / "a.mkv")) > 1000
