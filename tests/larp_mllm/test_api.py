"""generate, describe and their relatives: arguments are checked before a model is loaded, and the default model is found."""

import json
import re
import subprocess
import sys

import larp_mllm.api
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import find_model, set_default_model

import numpy as np
import pytest
import torch

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
    # bool, str and tensors are no numbers here.
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
    """Fail the test if a model is looked up."""
    monkeypatch.setattr(larp_mllm.api, "find_model", lambda *_: pytest.fail("a model was looked up"))


@pytest.mark.parametrize("wrong", BAD_OPTIONS)
def test_bad_options_are_refused_before_a_model_is_loaded(wrong, nothing_loads):
    name = next(iter(wrong)).removesuffix("_scale")
    with pytest.raises(ValueError, match=name):
        larp_mllm.generate("surfing", **wrong)


@pytest.mark.parametrize("prompt", [None, 3, ["surfing", None], b"surfing"])
def test_a_prompt_that_is_no_text_is_refused(prompt, nothing_loads):
    with pytest.raises(ValueError, match="must be a str, several a list of them, got"):
        larp_mllm.generate(prompt)


def test_a_lone_surrogate_in_a_prompt_is_refused(nothing_loads):
    with pytest.raises(ValueError, match=r"'surf\\ud83c'.*position 4: remove it"):
        larp_mllm.generate("surf\ud83c")


@pytest.mark.parametrize("seconds, words", [
    (0, "seconds is 0"), (True, "seconds is True"), ("2", "seconds is '2'"), (float("inf"), "seconds is inf"),
    (3601, "seconds is 3601; at most 3600"), (torch.tensor(2.0), "seconds is tensor"),
])  # fmt: skip
def test_seconds_are_a_number_up_to_3600(seconds, words, nothing_loads):
    with pytest.raises(ValueError, match=words):
        larp_mllm.continue_video("clip.mp4", seconds)


def test_a_model_or_progress_of_another_type_is_refused(nothing_loads):
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
def test_an_absent_device_is_refused_before_a_model_is_loaded(device, nothing_loads):
    with pytest.raises(ValueError, match=f"device '{device}' is not there; this machine has cpu"):
        larp_mllm.generate("surfing", device=device)
    with pytest.raises(ValueError, match=f"device '{device}' is not there; this machine has cpu"):
        larp_mllm.describe("clip.mp4", device=device)


def test_functions_load_the_default_model(qwen, tmp_path, monkeypatch):
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


def test_a_model_that_does_not_exist_is_refused_with_the_ways_to_choose_one():
    with pytest.raises(
        ValueError, match=r"^model=nosuch: there is no such folder, and no model of this name comes"
    ) as error:
        larp_mllm.generate("a person surfing", model="nosuch")
    assert re.search(r"model=FOLDER.*or model=tiny.*LARP_MLLM_MODEL.*`make quickstart`", str(error.value))
    assert str(error.value).count(". ") == 1, "two sentences"


def test_importing_the_package_is_light():
    heavy = ["torch", "transformers", "deepspeed", "av", "larp.models.tokenizer"]
    code = (
        f"import sys, json, larp_mllm; print(json.dumps([m for m in {heavy} if m in sys.modules])); larp_mllm.nonsense"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert json.loads(run.stdout) == []
    assert "it offers" in run.stderr


def test_chat_says_whether_an_option_is_of_text_or_of_videos():
    for option, start in (("text_top_p", "text: top_p is 2"), ("top_p", "top_p is 2")):
        with pytest.raises(ValueError, match=f"^{start}"):
            larp_mllm.chat([{"role": "user", "content": "hi"}], **{option: 2})
