"""Mllm: loading, saving to the hub, progress, previews, captions."""

import json
from pathlib import Path

import larp_mllm.api
from larp.data.clips import clip_to_frames
from larp.data.video import write_video
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp_mllm.generation.progress import Progress
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.model.base_models import load_base
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import LarpMllmProcessor
from tests.larp_mllm.tiny import CAPTIONS, K, N

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def folder(qwen, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    qwen.save(path)
    return path


@pytest.fixture(scope="module")
def nested() -> Mllm:
    """A model with a nested video tokenizer, whose videos differ."""
    torch.manual_seed(0)
    small = dict(encoder_width=16, encoder_depth=1, encoder_heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2)
    config = TokenizerConfig(
        4, 16, 16, (2, 8, 8), None, N, K, 4, **small, nested=True, prior=PriorConfig(enabled=False)
    )
    tokenizer = LarpTokenizer(config).eval()
    torch.nn.init.normal_(tokenizer.head.weight, std=0.2)
    base, text_tokenizer = load_base("tiny-qwen2", CAPTIONS, layers=1, width=32, heads=2)
    model = LarpMllmForCausalLM.from_base(base, len(text_tokenizer), tokenizer.codebook, N).eval()
    return Mllm(model, LarpMllmProcessor(text_tokenizer, tokenizer, model.vocabulary))


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", torch.float16])
def test_the_language_model_gets_the_dtype_and_the_video_tokenizer_stays_float32(qwen, folder, dtype):
    loaded = Mllm.load(folder, "cpu", dtype)
    wanted = torch.float32 if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    assert {weight.dtype for weight in loaded.model.parameters()} == {wanted}
    assert {weight.dtype for weight in loaded.processor.video_tokenizer.parameters()} == {torch.float32}
    frequencies = {name: b.dtype for name, b in loaded.model.named_buffers() if "inv_freq" in name}
    assert frequencies and set(frequencies.values()) == {torch.float32}
    (video,) = loaded.generate(["surfing"], sampling=VideoSampling(seed=3))
    if wanted == torch.float32:
        assert video.codes == qwen.generate(["surfing"], sampling=VideoSampling(seed=3))[0].codes
    assert isinstance(loaded.describe([video], TextSampling(max_new_tokens=3))[0], str)


def test_bad_options_of_loading_are_refused_before_loading_and_for_a_loaded_model(qwen, monkeypatch):
    monkeypatch.setattr(larp_mllm.api, "find_model", lambda *_: pytest.fail("a model was looked for"))
    for wrong in ("int8", "float64", 3, torch.int64):
        with pytest.raises(ValueError, match=r"dtype is .*; choose one of float32, bfloat16, float16"):
            larp_mllm.generate("surfing", dtype=wrong)
    for option in ({"device": "cpu"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match=r"loaded already.*Mllm\.load"):
            larp_mllm.generate("surfing", model=qwen, **option)


def test_a_model_is_loaded_once_for_each_dtype(folder):
    first = larp_mllm.api.open_model(folder, "cpu")
    assert larp_mllm.api.open_model(folder, "cpu") is first
    other = larp_mllm.api.open_model(folder, "cpu", "bfloat16")
    assert other is not first and other.model.dtype == torch.bfloat16
    assert larp_mllm.api.open_model(folder, "cpu", torch.bfloat16) is other


def test_model_and_processor_are_pushed_to_the_same_repository(qwen, monkeypatch):
    seen = []
    for part in (LarpMllmForCausalLM, LarpMllmProcessor):
        monkeypatch.setattr(part, "push_to_hub", lambda self, repo, **options: seen.append((type(self), repo, options)))
    qwen.push_to_hub("owner/name", private=True)
    options = {"private": True, "token": None, "revision": None}
    assert seen == [(type(part), "owner/name", options) for part in (qwen.model, qwen.processor)]


def test_what_is_known_of_the_training_is_saved_and_pushed(qwen, tmp_path, monkeypatch, capsys):
    known = {"base": "tiny-qwen2", "captions": {"words": ["surfing"], "examples": ["surfing"]}}
    training = {**known, "model": "/home/me/model", "samples": ["/home/me/sheet.png"]}
    Mllm(qwen.model, qwen.processor, training).save(tmp_path / "model")
    loaded = Mllm.load(tmp_path / "model", "cpu")
    assert loaded.training == known and not (tmp_path / "plain").exists()
    loaded.generate(["a spaceship landing"])
    assert "no word of the captions" in capsys.readouterr().err
    pushed = []
    for part in (LarpMllmForCausalLM, LarpMllmProcessor):
        monkeypatch.setattr(part, "push_to_hub", lambda *_, **__: None)
    monkeypatch.setattr(
        "larp_mllm.pipeline.upload",
        lambda folder, repo, **_: pushed.append((repo, json.loads((Path(folder) / "training.json").read_text()))),
    )
    loaded.push_to_hub("owner/name")
    assert pushed == [("owner/name", known)]


def test_progress_counts_every_code_and_changes_nothing(qwen, capsys):
    steps: list[Progress] = []
    sampling = VideoSampling(seed=1, batch_size=2)
    videos = qwen.generate(["a", "b", "c"], sampling=sampling, progress=steps.append, preview_every=1)
    assert [(step.kind, step.done, step.total) for step in steps] == [
        ("codes", done, 12) for done in (2, 4, 6, 8, 9, 10, 11, 12)
    ]
    assert all(step.previews is None for step in steps)  # this video tokenizer is not nested
    assert [video.codes for video in videos] == [v.codes for v in qwen.generate(["a", "b", "c"], sampling=sampling)]
    assert capsys.readouterr() == ("", "")


def test_previews_show_the_codes_so_far_with_a_nested_video_tokenizer(nested):
    steps: list[Progress] = []
    videos = larp_mllm.generate(["a", "b"], model=nested, progress=steps.append, preview_every=2)
    assert [step.previews is not None for step in steps] == [False, True, False, True]
    codes = torch.tensor([video.codes for video in videos])
    for number, shown in ((2, steps[1].previews), (4, steps[3].previews)):
        clips = nested.processor.video_tokenizer.decode(codes[:, :number])
        for video, clip in zip(shown, clips, strict=True):
            assert np.array_equal(video.frames, clip_to_frames(clip)) and video.fps == 8
    assert not np.array_equal(steps[1].previews[0].frames, videos[0].frames)
    with pytest.raises(ValueError, match="preview_every"):
        larp_mllm.generate("a", model="nowhere", preview_every=-1)


def test_progress_of_a_caption_gets_the_caption_piece_by_piece(qwen):
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    steps: list[Progress] = []
    caption = larp_mllm.describe(frames, model=qwen, temperature=1.0, seed=4, max_new_tokens=12, progress=steps.append)
    assert "".join(step.text for step in steps) == caption and sum(bool(step.text) for step in steps) > 3
    assert [step.done for step in steps][:3] == [1, 2, 3] and {step.total for step in steps} == {12}


def test_progress_of_a_continuation_counts_the_codes_of_all_windows(qwen, monkeypatch):
    monkeypatch.setattr(qwen.model.config, "given_frames", 3)
    steps: list[Progress] = []
    qwen.continue_clips(torch.rand(2, 3, 4, 16, 16), 6, progress=steps.append)
    assert [step.done for step in steps] == list(range(2, 17, 2)) and {step.total for step in steps} == {16}


def test_a_callback_can_end_the_call(qwen):
    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise InterruptedError("enough")

    before = torch.get_num_threads()
    with pytest.raises(InterruptedError, match="enough"):
        qwen.generate(["surfing"], progress=stop)
    assert torch.get_num_threads() == before


def test_the_middle_frames_of_a_longer_file_are_read(qwen, tmp_path, monkeypatch):
    frames = np.zeros((60, 16, 16, 3), np.uint8)
    frames[28:32] = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path / "long.mkv", frames, 10, codec="ffv1", pixel_format="bgr0")
    assert qwen.processor.encode_videos([tmp_path / "long.mkv"]) == qwen.processor.encode_videos([frames[28:32]])
    with pytest.raises(ValueError, match=r"short\.mp4: has 3 frames, the model reads 4: give a longer video"):
        write_video(tmp_path / "short.mp4", frames[:3], 10)
        qwen.describe([tmp_path / "short.mp4"])


def test_empty_lists_give_empty_lists(qwen):
    assert qwen.describe([]) == [] and qwen.generate([]) == []


def test_captions_depend_on_the_seed_and_the_place_in_the_list(qwen):
    frames = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    first = qwen.describe([frames, frames], TextSampling(temperature=1.0, max_new_tokens=8))
    assert (
        first == qwen.describe([frames, frames], TextSampling(temperature=1.0, max_new_tokens=8))
        and first[0] != first[1]
    )
    assert first[0] != qwen.describe([frames], TextSampling(temperature=1.0, max_new_tokens=8, seed=1))[0]
