"""What `larp_mllm` offers at its top: generate, describe, continue_video and chat, with the model that is meant.

Each says what is wrong with its arguments before a model is loaded, writes nothing, and prints nothing.
"""

from functools import lru_cache
from pathlib import Path

from larp.hub import check_device
from larp_mllm.checks import check_count, check_progress, check_prompt, check_prompts, check_seconds
from larp_mllm.generation.progress import ProgressCallback
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.pipeline import Mllm, check_dtype
from larp_mllm.video import Video

import numpy as np
import torch
from torch import Tensor

Model = str | Path | Mllm | None
AnyVideo = str | Path | np.ndarray | Tensor | Video


def generate(
    prompt: str | list[str],
    num_videos: int = 1,
    *,
    guidance_scale: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    model: Model = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: ProgressCallback | None = None,
    preview_every: int = 0,
) -> Video | list[Video]:
    """Videos for a sentence: `larp_mllm.generate("a person surfing").save("surfing.mp4")`.

    Returns a Video; a list of them, prompt by prompt, if `prompt` is a list or num_videos > 1.

    Args:
        prompt: what the video shows; nothing in it is read as a control token.
        num_videos: videos of each prompt.
        guidance_scale, temperature, top_k, top_p, seed, batch_size: see `VideoSampling`, whose fields they are.
        model: a folder, a hub name or a loaded Mllm; by default LARP_MLLM_MODEL, else the newest model trained here.
        device: by default the GPU if there is one.
        dtype: of the language model's weights, "float32", "bfloat16" or "float16"; by default as they were saved.
        progress: called with a `Progress` after each code; without it a bar appears over what takes seconds.
        preview_every: with a nested video tokenizer, progress shows the unfinished videos after each so many codes.

    Raises ValueError for what is out of range, for a prompt too long for the model, and, naming the ways to choose one,
    if there is no model.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    check_prompts(prompts)
    check_count("num_videos", num_videos)
    check_count("preview_every", preview_every, least=0)
    check_progress(progress)
    sampling = VideoSampling(
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )
    opened = open_model(model, device, dtype)
    videos = opened.generate(prompts, num_videos, sampling, progress, preview_every)
    return videos if prompts is prompt or num_videos != 1 else videos[0]


def describe(
    video: AnyVideo,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 48,
    seed: int = 0,
    model: Model = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> str:
    """The caption that the model gives to a video: a file, a Video, uint8 frames (T, H, W, 3), or a float clip
    (3, T, H, W) in [0, 1] of the size that the model was trained on; other arrays are a ValueError.

    Of a longer video the frames around its middle are read. temperature, top_k, top_p, max_new_tokens, seed: see
    `TextSampling`, whose fields they are. progress is called after each word piece. The others as in `generate`.
    """
    check_progress(progress)
    sampling = TextSampling(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    return open_model(model, device, dtype).describe([video], sampling, progress)[0]


def continue_video(
    video: AnyVideo,
    seconds: float,
    *,
    prompt: str = "",
    num_videos: int = 1,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    model: Model = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> Video | list[Video]:
    """A video that goes on for `seconds` more: the frames at hand, then new ones; a list if num_videos > 1.

    video: as in `describe`; of a file every n-th frame counts, as in training. The result has the size of the clips that
    the model was trained on, and its frames at hand are the given ones, resized and cropped to it. It is written
    window by window, each from the last frames of the one before. prompt: what the video shows, if that helps. The
    others as in `generate`. Raises ValueError for a model that was not trained on continuation, too.
    """
    check_prompt(prompt)
    check_count("num_videos", num_videos)
    check_seconds(seconds)
    check_progress(progress)
    sampling = VideoSampling(
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )
    videos = open_model(model, device, dtype).continue_video(video, seconds, prompt, num_videos, sampling, progress)
    return videos if num_videos != 1 else videos[0]


def chat(
    messages: list[dict],
    *,
    text_temperature: float = 0.0,
    text_top_k: int = 0,
    text_top_p: float = 1.0,
    max_new_tokens: int = 256,
    guidance_scale: float = 2.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_videos: int = 4,
    seed: int = 0,
    model: Model = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> dict:
    """The model's answer to a conversation; it may hold text and videos in any order.

    messages: `{"role": "user", "content": "..."}`, or as content a list of `{"type": "text", "text": "..."}` and
    `{"type": "video", "video": file, Video or array}`, of a file with "start" from so many seconds on. Returned is a message
    of the role assistant of that form, its videos as Videos: append it to `messages` to go on. `text_*` and
    max_new_tokens are for its text, the others for its videos as in `generate`; it holds at most `max_videos`. progress
    is called after each id, with the pieces of text as they come.
    """
    check_count("max_videos", max_videos, least=0)
    check_progress(progress)
    video = VideoSampling(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    text = TextSampling(
        temperature=text_temperature, top_k=text_top_k, top_p=text_top_p, max_new_tokens=max_new_tokens, seed=seed
    )
    return open_model(model, device, dtype).chat(messages, video, text, max_videos, progress)


def open_model(model: Model = None, device: str | None = None, dtype: str | torch.dtype | None = None) -> Mllm:
    """The model that is meant, see `generate`; one that was opened lately is not loaded again."""
    dtype = check_dtype(dtype)
    if isinstance(model, Mllm):
        if device is not None or dtype is not None:
            raise ValueError("this model is loaded already: give device and dtype to Mllm.load, or the model's folder")
        return model
    if model is not None and not isinstance(model, (str, Path)):
        raise ValueError(f"model must be a folder, a hub name or a loaded Mllm, got {model!r}")
    if device is not None:
        check_device(device)
    folder = find_model(model).resolve()
    return _load_once(folder, (folder / "config.json").stat().st_mtime_ns, device, dtype)


@lru_cache(maxsize=2)
def _load_once(folder: Path, written: int, device: str | None, dtype: torch.dtype | None) -> Mllm:
    return Mllm.load(folder, device, dtype)
