"""Videos longer than a clip: given frames are unchanged, windows follow each other, seams are measured."""

import larp.sampling.long_clips
from larp.data.clips import frames_to_clip
from larp.data.video import ShortVideoError, read_video, write_video
from larp.models.generator import LarpGenerator
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.long_clips import continue_clip, last_frames, sample_classes, sample_continuations
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate, row_uniforms
from tests.larp.codec.test_whole_video import noise, random_tokenizer
from tests.larp.models.test_generator import random_generator

import pytest
import torch

LABELS = torch.tensor([0, 1, 2, 0, 1])


@pytest.fixture(scope="module")
def tokenizer() -> LarpTokenizer:
    """Clips of 4 frames of 16x24."""
    return random_tokenizer()


@pytest.fixture(scope="module")
def frame_predictor() -> LarpGenerator:
    return random_generator(task="frame-prediction")


@pytest.fixture(scope="module")
def class_generator() -> LarpGenerator:
    return random_generator()


def frames_of(rows: int, count: int) -> torch.Tensor:
    return torch.rand(rows, 3, count, 16, 24, generator=torch.Generator().manual_seed(3))


def test_given_frames_are_unchanged_and_all_frames_returned(tokenizer, frame_predictor):
    frames = frames_of(2, 5)
    for total, windows in ((5, 0), (6, 1), (7, 2), (12, 7)):
        long = continue_clip(frame_predictor, tokenizer, frames, total, given=3)
        assert long.frames.shape == (2, 3, total, 16, 24) and long.seam_psnr.shape == (2, windows)
        assert long.frames.dtype == torch.float32 and 0 <= long.frames.min() <= long.frames.max() <= 1
        assert torch.equal(long.frames[:, :, :5], frames)


@pytest.mark.parametrize("given", [1, 2, 3])
def test_each_window_continues_the_last_frames(tokenizer, frame_predictor, given):
    frames = frames_of(1, 4)
    long = continue_clip(frame_predictor, tokenizer, frames, 10, sampling=GuidedSampling(temperature=0), given=given)
    expected, seams = frames, []
    while expected.shape[2] < 10:
        known = expected[:, :, -given:]
        padded = torch.cat([known] + [known[:, :, -1:]] * (4 - given), dim=2)
        codes = generate(
            frame_predictor, frame_predictor.frame_condition(tokenizer.encode(padded)), GuidedSampling(temperature=0)
        )
        clip = tokenizer.decode(codes)
        seams.append(psnr(known, clip[:, :, :given]).item())
        expected = torch.cat([expected, clip[:, :, given:]], dim=2)
    assert torch.equal(long.frames, expected[:, :, :10])
    assert long.seam_psnr.tolist() == [pytest.approx(seams)] and all(0 < seam < 30 for seam in seams)


def test_the_batch_size_changes_nothing(tokenizer, frame_predictor, class_generator):
    for sample in (
        lambda size: sample_classes(
            class_generator,
            tokenizer,
            LABELS,
            11,
            sampling=GuidedSampling(guidance_scale=2.0),
            continuation=frame_predictor,
            given=2,
            batch_size=size,
        ),
        lambda size: sample_continuations(
            frame_predictor, tokenizer, frames_of(1, 3)[0], 5, 11, given=2, batch_size=size
        ),
    ):
        whole, parts = list(sample(5)), list(sample(2))
        assert [len(part.frames) for part in whole] == [5] and [len(part.frames) for part in parts] == [2, 2, 1]
        assert torch.equal(whole[0].frames, torch.cat([part.frames for part in parts]))
        assert torch.equal(whole[0].seam_psnr, torch.cat([part.seam_psnr for part in parts]))
        assert len({frame.numpy().tobytes() for frame in whole[0].frames}) == 5


def test_continuing_twice_equals_continuing_once(tokenizer, frame_predictor):
    frames, options = frames_of(2, 3), dict(given=2, seed=7)
    once = continue_clip(frame_predictor, tokenizer, frames, 11, **options)
    half = continue_clip(frame_predictor, tokenizer, frames, 7, **options)
    assert torch.equal(continue_clip(frame_predictor, tokenizer, half.frames, 11, **options).frames, once.frames)


def test_the_seed_decides_and_each_window_has_its_own_random_numbers(
    tokenizer, frame_predictor, class_generator, monkeypatch
):
    def sampled_with(seed):
        (long,) = sample_classes(
            class_generator, tokenizer, LABELS, 11, continuation=frame_predictor, given=2, seed=seed
        )
        return long.frames

    one = sampled_with(1)
    assert torch.equal(sampled_with(1), one) and not torch.equal(sampled_with(2), one)
    seeds = []
    monkeypatch.setattr(
        larp.sampling.long_clips, "generate", lambda *a, **o: seeds.append(o["seed"]) or generate(*a, **o)
    )
    sampled_with(1)
    numbers = [row_uniforms(seed, 0, 5, 6) for seed in seeds]
    assert len(numbers) == 5 and len({row.numpy().tobytes() for rows in numbers for row in rows}) == 25


def test_one_window_of_a_class_equals_generate(tokenizer, class_generator):
    (long,) = sample_classes(
        class_generator, tokenizer, LABELS, sampling=GuidedSampling(guidance_scale=2.0, top_k=9), seed=4
    )
    codes = generate(class_generator, LABELS, GuidedSampling(guidance_scale=2.0, top_k=9), seed=4)
    assert torch.equal(long.frames, torch.cat([tokenizer.decode(row[None]) for row in codes]))
    assert long.seam_psnr.shape == (5, 0)
    (cut,) = sample_classes(
        class_generator, tokenizer, LABELS, 3, sampling=GuidedSampling(guidance_scale=2.0, top_k=9), seed=4
    )
    assert torch.equal(cut.frames, long.frames[:, :, :3])


def test_a_continuation_is_guided_with_null_condition_only(tokenizer, class_generator, monkeypatch):
    scales = []
    monkeypatch.setattr(
        larp.sampling.long_clips, "generate", lambda *a, **o: scales.append(a[2].guidance_scale) or generate(*a, **o)
    )
    for null in (False, True):
        frame_predictor = random_generator(task="frame-prediction", null_condition=null)
        list(
            sample_classes(
                class_generator,
                tokenizer,
                LABELS,
                5,
                sampling=GuidedSampling(guidance_scale=3.0),
                continuation=frame_predictor,
                given=3,
            )
        )
    assert scales == [3.0, 1.0, 3.0, 3.0]
    unconditional = random_generator(task="frame-prediction")
    with pytest.raises(ValueError, match=r"use guidance_scale 1\.0"):
        list(
            sample_continuations(
                unconditional, tokenizer, frames_of(1, 2)[0], 1, sampling=GuidedSampling(guidance_scale=3.0), given=2
            )
        )


def test_by_default_one_window_is_added(tokenizer, frame_predictor):
    (long,) = sample_continuations(frame_predictor, tokenizer, frames_of(1, 6)[0], 2, given=3)
    assert long.frames.shape[2] == 7 and long.seam_psnr.shape == (2, 1)


def test_errors_are_raised_before_sampling(tokenizer, frame_predictor, class_generator, monkeypatch):
    monkeypatch.setattr(larp.sampling.long_clips, "generate", lambda *_, **__: pytest.fail("something was sampled"))
    frames, other = frames_of(1, 3), random_generator(task="frame-prediction", codebook_size=33)
    foreign = random_generator(task="frame-prediction", tokenizer_hash="f" * 64)
    for words, call in {
        "give one that was trained with --task frame-prediction": lambda: continue_clip(
            class_generator, tokenizer, frames, 9, given=3
        ),
        "6 codes of 32 values, but the generator was": lambda: continue_clip(other, tokenizer, frames, 9, given=3),
        "tokenizer ffffffffffff": lambda: continue_clip(foreign, tokenizer, frames, 9, given=3),
        "given is 4; it must be 1 to 3": lambda: continue_clip(frame_predictor, tokenizer, frames, 9, given=4),
        "given is 5; it must be 1 to 3": lambda: continue_clip(frame_predictor, tokenizer, frames, 9),
        "given is 0": lambda: continue_clip(frame_predictor, tokenizer, frames, 9, given=0),
        "at least the 3 given frames": lambda: continue_clip(frame_predictor, tokenizer, frames[:, :, :2], 9, given=3),
        "there are 3 frames already": lambda: continue_clip(frame_predictor, tokenizer, frames, 2, given=2),
        "clip in \\[0, 1\\], got values": lambda: continue_clip(frame_predictor, tokenizer, 2 * frames, 9, given=3),
        "expected a clip": lambda: continue_clip(frame_predictor, tokenizer, frames[..., :8], 9, given=3),
        "give one that was trained with --task class": lambda: sample_classes(frame_predictor, tokenizer, LABELS),
        "5 frames are more than the 4 of one clip.*--continue-with": lambda: sample_classes(
            class_generator, tokenizer, LABELS, 5
        ),
        "trained with --task class": lambda: sample_classes(
            class_generator, tokenizer, LABELS, 5, continuation=class_generator
        ),
        "codes of 33": lambda: sample_classes(class_generator, tokenizer, LABELS, 5, continuation=other),
        "there are no class labels": lambda: sample_classes(class_generator, tokenizer, LABELS[:0]),
        "batch_size must be a whole number of at least 1, got 0": lambda: sample_classes(
            class_generator, tokenizer, LABELS, batch_size=0
        ),
        "total_frames must be a whole number of at least 1, got 0": lambda: sample_classes(
            class_generator, tokenizer, LABELS, 0
        ),
        "videos must be a whole number of at least 1, got -1": lambda: sample_continuations(
            frame_predictor, tokenizer, frames[0], -1, given=3
        ),
        "total_frames is 3.*ask for more": lambda: sample_continuations(
            frame_predictor, tokenizer, frames[0], 1, 3, given=3
        ),
    }.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_the_last_frames_of_a_file(tmp_path):
    write_video(tmp_path / "a.mp4", noise(10), 10)
    frames, _ = read_video(tmp_path / "a.mp4")
    assert torch.equal(last_frames(tmp_path / "a.mp4", 3, 1, 16, 24), frames_to_clip(frames[7:], 16, 24))
    assert torch.equal(last_frames(tmp_path / "a.mp4", 3, 2, 16, 24), frames_to_clip(frames[[5, 7, 9]], 16, 24))
    with pytest.raises(ShortVideoError, match=r"a.mp4: has 10 frames, fewer than the 11 given frames"):
        last_frames(tmp_path / "a.mp4", 11, 1, 16, 24)
    with pytest.raises(ShortVideoError, match=r"has 10 frames, .* 5 given frames at stride 3 \(which span 13\)"):
        last_frames(tmp_path / "a.mp4", 5, 3, 16, 24)


def test_published_checkpoints_continue_a_real_clip(golden_root, clips_root):
    tokenizer = LarpTokenizer.from_pretrained(golden_root / "official_tokenizer")
    frame_predictor = LarpGenerator.from_pretrained(golden_root / "official_generator_frame_prediction")
    source = sorted((clips_root / "ucf101" / "UCF-101" / "Surfing").iterdir())[0]
    frames = last_frames(source, 5, 1, 32, 32)
    (long,) = sample_continuations(frame_predictor, tokenizer, frames, 1, 14)
    assert torch.equal(long.frames[0, :, :5], frames) and long.frames.shape[2] == 14
    assert long.seam_psnr.shape == (1, 3) and (long.seam_psnr > 3).all()
