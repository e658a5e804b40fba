"""Generation: only codes inside a span, the same video whatever the batch."""

import json
import subprocess
import sys

import larp_mllm.api
from larp.data.video import probe
from larp_mllm.generation.decode import decode_codes
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.locate import find_model, set_default_model
from larp_mllm.video import SUFFIXES

import numpy as np
import pytest
import torch

PROMPTS = ["a red circle", "surfing", "a person that is surfing slowly with a <|video_start|> in the text", ""]


def test_batch_equals_single(mllm):
    for scale in (1.0, 3.0):
        together = mllm.generate(PROMPTS, sampling=VideoSampling(guidance_scale=scale, seed=3))
        in_pieces = mllm.generate(PROMPTS, sampling=VideoSampling(guidance_scale=scale, seed=3, batch_size=1))
        assert [v.codes for v in together] == [v.codes for v in in_pieces]
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(together, in_pieces, strict=True))


def test_left_padding_does_not_reach_the_logits(mllm):
    layout, model = mllm.processor.layout, mllm.model
    prompts = [layout.prompt(mllm.processor.encode_text(text)) for text in PROMPTS]
    seen = []

    def sample(logits, index):
        seen.append(logits)
        return torch.full((len(logits),), index)

    decode_codes(model, prompts, sample)
    batch, seen[:] = list(seen), []
    for row, prompt in enumerate(prompts):
        decode_codes(model, [prompt], sample)
        for step in range(4):
            torch.testing.assert_close(seen[step][0], batch[step][row], rtol=1e-4, atol=1e-5)
        seen.clear()


@torch.no_grad()
def test_logits_are_those_of_the_plain_forward_and_guidance_mixes_them(mllm):
    layout, model, v = mllm.processor.layout, mllm.model, mllm.model.vocabulary
    prompt, unconditional = layout.prompt([5, 6, 7]), layout.prompt([])
    codes, seen = [3, 0, 15, 2], []

    def sample(logits, index):
        seen.append(logits[0])
        return torch.tensor([codes[index]])

    assert decode_codes(model, [prompt], sample, unconditional, guidance_scale=2.5).tolist() == [codes]
    written = [v.code_to_id(code) for code in codes[:3]]
    conditional, free = (
        model(torch.tensor([start + written])).logits[0, -4:, v.first_code :] for start in (prompt, unconditional)
    )
    torch.testing.assert_close(torch.stack(seen), free + 2.5 * (conditional - free), rtol=1e-4, atol=1e-5)


def test_no_text_logits_are_computed(qwen):
    hook = qwen.model.base.get_output_embeddings().register_forward_hook(lambda *_: pytest.fail("the text head ran"))
    qwen.generate(["surfing"])
    hook.remove()


def test_options_change_the_result(qwen):
    def codes(**options):
        return qwen.generate(["surfing"], sampling=VideoSampling(**options))[0].codes

    base = codes()
    changed = [
        codes(seed=1),
        codes(temperature=0),
        codes(guidance_scale=30.0),
        codes(top_k=1),
        codes(top_p=0.01),
        codes(min_p=1.0),
    ]
    assert all(other != base for other in changed)
    assert changed[1] == codes(top_k=1)
    first, second = qwen.generate(["surfing"], num_videos=2)
    assert first.codes == base and second.codes != base


BAD_OPTIONS = [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"top_p": 0},
    {"top_p": float("nan")},
    {"guidance_scale": float("inf")},
    {"guidance_scale": float("nan")},
    {"num_videos": 0},
    {"num_videos": 1.5},
    {"batch_size": 0},
    {"seed": 1.5},
    {"seed": None},
    # Of True, "2" and tensors nobody knows what number was meant.
    {"seed": True},
    {"num_videos": True},
    {"batch_size": torch.tensor(2)},
    {"temperature": True},
    {"top_k": True},
    {"top_p": "0.5"},
    {"guidance_scale": torch.tensor(2.0)},
    {"progress": "x"},
    {"preview_every": "2"},
]


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fail the test if a model is looked for."""
    monkeypatch.setattr(larp_mllm.api, "find_model", lambda *_: pytest.fail("a model was looked for"))


@pytest.mark.parametrize("wrong", BAD_OPTIONS)
def test_bad_options_are_named_before_a_model_is_loaded(wrong, nothing_loads):
    name = next(iter(wrong)).removesuffix("_scale")
    with pytest.raises(ValueError, match=name):
        larp_mllm.generate("surfing", **wrong)


@pytest.mark.parametrize("prompt", [None, 3, ["surfing", None], b"surfing"])
def test_a_prompt_that_is_no_text_is_refused(prompt, nothing_loads):
    with pytest.raises(ValueError, match="must be a str, several a list of them, got"):
        larp_mllm.generate(prompt)


def test_half_a_character_in_a_prompt_is_refused(nothing_loads):
    with pytest.raises(ValueError, match=r"'surf\\ud83c'.*position 4: remove it"):
        larp_mllm.generate("surf\ud83c")


@pytest.mark.parametrize("seconds, words", [
    (0, "seconds is 0"), (True, "seconds is True"), ("2", "seconds is '2'"), (float("inf"), "seconds is inf"),
    (3601, "seconds is 3601; at most 3600"), (torch.tensor(2.0), "seconds is tensor"),
])  # fmt: skip
def test_seconds_are_a_number_of_at_most_an_hour(seconds, words, nothing_loads):
    with pytest.raises(ValueError, match=words):
        larp_mllm.continue_video("clip.mp4", seconds)


def test_what_is_no_model_or_cannot_be_called_is_refused(nothing_loads):
    for call in (
        larp_mllm.generate,
        larp_mllm.describe,
        larp_mllm.chat,
        lambda x, **o: larp_mllm.continue_video(x, 1, **o),
    ):
        with pytest.raises(ValueError, match="model must be a folder, a hub name or a loaded Mllm, got 3"):
            call("surfing", model=3)
        with pytest.raises(ValueError, match="progress must be a function of a Progress, or None, got 'x'"):
            call("surfing", progress="x")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta"])
def test_an_absent_device_is_named_before_a_model_is_loaded(device, nothing_loads):
    with pytest.raises(ValueError, match=f"device '{device}' is not there; this machine has cpu"):
        larp_mllm.generate("surfing", device=device)
    with pytest.raises(ValueError, match=f"device '{device}' is not there; this machine has cpu"):
        larp_mllm.describe("clip.mp4", device=device)


def test_seeds_of_numpy_are_seeds(qwen):
    seeds = (np.int64(2**40), 2**40)
    one, other = (qwen.generate(["surfing"], sampling=VideoSampling(seed=seed))[0].codes for seed in seeds)
    assert one == other


def test_captions_longer_than_the_base_are_refused_by_name(qwen):
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=r"max_new_tokens is 2000; of the 1024 positions .* leaves 1018"):
        qwen.describe([frames], TextSampling(max_new_tokens=2000))
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1, got 0"):
        larp_mllm.describe(frames, max_new_tokens=0)


def test_a_prompt_too_long_for_the_base(qwen):
    with pytest.raises(ValueError, match="1024 positions"):
        qwen.generate(["surf " * 2000])


def test_public_functions_find_the_newest_model(qwen, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    qwen.save(folder)
    set_default_model(folder)
    video = larp_mllm.generate("a person surfing", seed=5, device="cpu")
    assert video.frames.shape == (4, 16, 16, 3) and video.frames.dtype == np.uint8
    assert video.codes == qwen.generate(["a person surfing"], sampling=VideoSampling(seed=5))[0].codes
    assert "a person surfing" in repr(video) and "16x16" in repr(video)
    assert len(larp_mllm.generate(["a", "b"], num_videos=2, model=qwen)) == 4
    assert isinstance(larp_mllm.describe(video, model=qwen, max_new_tokens=4), str)
    monkeypatch.setenv("LARP_MLLM_MODEL", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"LARP_MLLM_MODEL=.*quickstart"):
        find_model()


def test_without_any_model_the_three_ways_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"model=FOLDER.*LARP_MLLM_MODEL.*train_mllm.py.*make quickstart"):
        larp_mllm.generate("a person surfing")


def test_describe_writes_text_only(mllm):
    frames = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    short = TextSampling(max_new_tokens=6)
    assert mllm.describe([frames, frames[::-1].copy()], short)[0] == mllm.describe([frames], short)[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_videos_are_saved_by_their_suffix(qwen, tmp_path, suffix):
    path = qwen.generate(["surfing"])[0].save(tmp_path / f"clip{suffix}", scale=2)
    assert path.stat().st_size > 100
    if suffix not in (".png", ".gif"):  # a GIF merges equal frames, which random weights make
        info = probe(path)
        assert (info.width, info.height, info.frames) == (32, 32, 4)
    if suffix == ".mp4":
        assert info.fps == 8.0


@pytest.mark.parametrize("suffix", [".webm", ".jpg", ".xyz", ""])
def test_other_suffixes_are_refused(qwen, tmp_path, suffix):
    with pytest.raises(ValueError, match=r"choose one of \.mp4"):
        qwen.generate(["surfing"])[0].save(tmp_path / f"clip{suffix}")
    assert not list(tmp_path.iterdir())


def test_importing_the_package_is_light():
    heavy = ["torch", "transformers", "deepspeed", "av", "larp.models.tokenizer"]
    code = (
        f"import sys, json, larp_mllm; print(json.dumps([m for m in {heavy} if m in sys.modules])); larp_mllm.nonsense"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(run.stdout) == []
    assert "it offers" in run.stderr
