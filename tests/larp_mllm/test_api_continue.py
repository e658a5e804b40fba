"""continue_video: given frames stay unchanged, and each window continues from the last frames of the one before."""

import larp_mllm
from larp.data.clips import clip_to_frames, pixels_to_clip, resize_frames
from larp.data.video import read_video, write_video
from larp.models.losses import psnr
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.pipeline import Mllm
from larp_mllm.video import Video
from tests.larp_mllm.tiny import colourful_mllm

import numpy as np
import pytest
import torch

PLAIN = VideoSampling(guidance_scale=1.0, seed=3)


@pytest.fixture(scope="module")
def continuing() -> Mllm:
    """A model configured to continue from 3 of the 4 frames of a clip."""
    mllm = colourful_mllm()
    mllm.model.config.given_frames = 3
    return mllm


def clips_of(rows: int, count: int) -> torch.Tensor:
    return torch.rand(rows, 3, count, 16, 16, generator=torch.Generator().manual_seed(3))


def frames_of(count: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_each_window_continues_from_the_last_frames_of_the_one_before(continuing):
    clips, tokenizer, layout = clips_of(2, 5), continuing.processor.video_tokenizer, continuing.processor.layout
    sampling = VideoSampling(guidance_scale=1.0, temperature=0)
    long = continuing.continue_clips(clips, 8, ["a red circle", ""], sampling)
    assert long.frames.shape == (2, 3, 8, 16, 16) and long.seam_psnr.shape == (2, 3)
    assert torch.equal(long.frames[:, :, :5], clips)
    for row, text in enumerate(("a red circle", "")):
        want, seams = clips[row : row + 1], []
        while want.shape[2] < 8:
            known = want[:, :, -3:]
            given = tokenizer.encode(torch.cat([known, known[:, :, -1:]], dim=2))[0].tolist()
            ids = layout.prompt(continuing.processor.encode_text(text))[:-1] + layout.vocabulary.span(given)
            ids.append(layout.vocabulary.video_start)
            for _ in range(4):
                logits = continuing.model(torch.tensor([ids])).logits[0, -1, layout.vocabulary.first_code :]
                ids.append(layout.vocabulary.code_to_id(int(logits.argmax())))
            clip = tokenizer.decode(layout.vocabulary.id_to_code(torch.tensor([ids[-4:]])))
            seams.append(psnr(known, clip[:, :, :3]).item())
            want = torch.cat([want, clip[:, :, 3:]], dim=2)
        torch.testing.assert_close(long.frames[row : row + 1], want)
        assert long.seam_psnr[row].tolist() == pytest.approx(seams)


def test_prompt_seed_and_guidance_change_the_continuation(continuing):
    clips = clips_of(1, 4)

    def continuation(**options):
        text = options.pop("prompt", "")
        return continuing.continue_clips(clips, 6, [text], VideoSampling(**{"guidance_scale": 1.0} | options)).frames

    base = continuation()
    assert torch.equal(base, continuation()) and base[0, :, 4:].std() > 0.05
    for other in ({"seed": 1}, {"guidance_scale": 30.0}, {"temperature": 0}):
        assert not torch.equal(continuation(**other), base), other
    cold = {"temperature": 1e-3}  # at 1, the logits of random weights are too similar to matter
    assert not torch.equal(continuation(**cold, prompt="a red circle moving left"), continuation(**cold))


def test_the_batch_size_changes_nothing(continuing):
    clips = clips_of(3, 4)
    whole = continuing.continue_clips(clips, 7, sampling=PLAIN)
    parts = continuing.continue_clips(clips, 7, sampling=VideoSampling(guidance_scale=1.0, seed=3, batch_size=2))
    assert torch.equal(whole.frames, parts.frames) and torch.equal(whole.seam_psnr, parts.seam_psnr)


def test_a_file_is_continued_in_the_tokenizers_size_for_so_many_seconds(continuing, tmp_path):
    write_video(tmp_path / "a.mp4", frames_of(9, 32, 48), 10)
    frames, _ = read_video(tmp_path / "a.mp4")
    video = larp_mllm.continue_video(tmp_path / "a.mp4", seconds=0.5, prompt="surfing", model=continuing)
    assert video.fps == 10 and video.frames.shape == (14, 16, 16, 3) and video.prompt == "surfing"
    assert video.given == 9
    assert np.array_equal(video.frames[:9], resize_frames(frames, 16, 16))
    known = pixels_to_clip(video.frames[6:9])[None]
    again = continuing.continue_clips(known, 8, ["surfing"], VideoSampling(guidance_scale=1.0))
    assert np.array_equal(video.frames[9:], clip_to_frames(again.frames[0, :, 3:]))
    several = larp_mllm.continue_video(tmp_path / "a.mp4", 0.5, prompt="surfing", num_videos=2, model=continuing)
    assert np.array_equal(several[0].frames, video.frames)
    assert not np.array_equal(several[1].frames[9:], video.frames[9:])


def test_every_nth_frame_of_a_file_is_read_and_the_last_is_one(continuing, tmp_path, monkeypatch):
    monkeypatch.setattr(continuing.model.config, "frame_stride", 2)
    write_video(tmp_path / "a.mp4", frames_of(8), 10)
    frames, _ = read_video(tmp_path / "a.mp4")
    (video,) = continuing.continue_video(tmp_path / "a.mp4", 1)
    assert video.fps == 5 and len(video.frames) == 9
    assert np.array_equal(video.frames[:4], frames[1::2])
    with pytest.raises(ValueError, match=r"b.mp4 has 2 frames at stride 2, fewer than the 3 .* give a longer one"):
        write_video(tmp_path / "b.mp4", frames_of(4), 10)
        continuing.continue_video(tmp_path / "b.mp4", 1)
    write_video(tmp_path / "slow.mp4", frames_of(8), 0.016)
    with pytest.raises(ValueError, match=r"slow.mp4: its fps is 0.008; .* convert the video to another rate"):
        continuing.continue_video(tmp_path / "slow.mp4", 1)


def test_videos_frames_and_clips_are_continued_alike(continuing):
    frames = frames_of(5)
    (want,) = continuing.continue_video(frames, 0.25)
    assert want.fps == 8.0 and len(want.frames) == 7 and np.array_equal(want.frames[:5], frames)
    for same in (torch.tensor(frames), pixels_to_clip(frames), pixels_to_clip(frames).numpy(), Video(frames, 8.0)):
        (got,) = continuing.continue_video(same, 0.25)
        assert np.array_equal(got.frames, want.frames)
    (slow,) = continuing.continue_video(Video(frames, 4.0), 0.25)
    assert slow.fps == 4 and len(slow.frames) == 6
    (longer,) = continuing.continue_video(slow, 0.25)
    assert np.array_equal(longer.frames[:6], slow.frames) and len(longer.frames) == 7


def test_bad_arguments_are_refused(continuing, tmp_path):
    frames, clips = frames_of(5), clips_of(2, 5)
    for words, call in {
        "seconds is 0;": lambda: larp_mllm.continue_video(frames, 0, model="nowhere"),
        "seconds is nan": lambda: larp_mllm.continue_video(frames, float("nan"), model="nowhere"),
        "num_videos must be": lambda: larp_mllm.continue_video(frames, 1, num_videos=0, model="nowhere"),
        "a prompt must be a str": lambda: larp_mllm.continue_video(frames, 1, prompt=None, model="nowhere"),
        "guidance_scale is -1": lambda: larp_mllm.continue_video(frames, 1, guidance_scale=-1, model="nowhere"),
        "has 2 frames, fewer than the 3": lambda: continuing.continue_video(frames[:2], 1),
        "got float64": lambda: continuing.continue_video(frames / 255, 1),
        r"values in \[0, 1\]": lambda: continuing.continue_video(frames.astype(float).transpose(3, 0, 1, 2), 1),
        "got None": lambda: continuing.continue_video(None, 1),
        "must be uint8 frames .*inhomogeneous": lambda: continuing.continue_video([frames, frames[:1]], 1),
        r"float clip must be \(3, T, 16, 16\), got \(3, 5, 16, 8\)": lambda: continuing.continue_video(
            clips[0, ..., :8], 1
        ),
        "gone.mp4": lambda: continuing.continue_video(tmp_path / "gone.mp4", 1),
        "at least the 3 given": lambda: continuing.continue_clips(clips[:, :, :2], 9),
        "total_frames must be a whole number of at least 5": lambda: continuing.continue_clips(clips, 4),
        "1 prompts for 2 clips": lambda: continuing.continue_clips(clips, 9, ["a"]),
        "expected a clip": lambda: continuing.continue_clips(clips[..., :8], 9),
        "1024 positions": lambda: continuing.continue_video(frames, 1, "surf " * 2000),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_a_model_not_trained_for_continuation_is_refused(qwen):
    with pytest.raises(ValueError, match=r"given_frames is 0.*--condition-frames 5"):
        qwen.continue_video(frames_of(5), 1)
