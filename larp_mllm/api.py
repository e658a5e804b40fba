"""generate, describe, continue_video and chat: they check their arguments, load a model and call it."""

from functools import lru_cache
from pathlib import Path

from larp.config import check_count
from larp.hub import check_device, loading
from larp_mllm.checks import check_progress, check_prompt, check_prompts, check_seconds
from larp_mllm.generation.progress import ProgressCallback
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.locate import find_model
from larp_mllm.pipeline import Mllm, check_dtype
from larp_mllm.processing.video_inputs import VideoInput
from larp_mllm.video import Video

import torch

Model = str | Path | Mllm | None


def generate(
    prompt: str | list[str],
    num_videos: int = 1,
    *,
    guidance_scale: float = 2.0,
    temperature: float = 0.8,
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
    """Generate videos for a text: `larp_mllm.generate("a person surfing").save("surfing.mp4")`.

    Args:
        prompt: what the video shows, or a list of such texts. Nothing in it becomes a control token.
        num_videos: number of videos for each prompt.
        guidance_scale, temperature, top_k, top_p, seed, batch_size: see `VideoSampling`.
        model: a folder, a hub name "owner/name" or a loaded `Mllm`; by default the environment variable LARP_MLLM_MODEL,
            else the newest model trained on this machine.
        device: by default the GPU if there is one.
        dtype: of the language model's weights: "float32", "bfloat16" or "float16"; by default as saved.
        progress: called with a `Progress` after each code. Without it, a progress bar appears after two seconds.
        preview_every: with a nested video tokenizer, progress gets the unfinished videos every so many codes; 0: never.

    Returns:
        A Video; a list of them, prompt by prompt, if `prompt` is a list or num_videos > 1.

    Raises:
        ValueError: if an argument is out of range, the prompt is too long for the model, or there is no model.
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
    mllm = open_model(model, device, dtype)
    videos = mllm.generate(prompts, num_videos, sampling, progress, preview_every)
    return videos if prompts is prompt or num_videos != 1 else videos[0]


def describe(
    video: VideoInput,
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
    """Generate a caption for a video.

    Args:
        video: a file, a Video, uint8 frames (T, H, W, 3) or (T, 3, H, W), a float clip (3, T, H, W) in [0, 1] of the size of
            the training clips, a list of frames (PIL images, arrays), or a reader or frames of torchcodec or decord. Of a
            longer video the middle frames are read.
        temperature, top_k, top_p, max_new_tokens, seed: see `TextSampling`.
        model, device, dtype: see `generate`.
        progress: called with a `Progress` after each token.

    Returns:
        The caption.

    Raises:
        ValueError: if an argument is out of range, the video cannot be read or has too few frames, or there is no model.
    """
    check_progress(progress)
    sampling = TextSampling(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
    return open_model(model, device, dtype).describe([video], sampling, progress)[0]


def continue_video(
    video: VideoInput,
    seconds: float,
    *,
    prompt: str = "",
    num_videos: int = 1,
    guidance_scale: float = 1.0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    model: Model = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> Video | list[Video]:
    """Continue a video by new frames.

    Args:
        video: as in `describe`. Of a file every n-th frame is read, as in training.
        seconds: duration of the new frames, at most 3600.
        prompt: what the video shows; may be empty.
        num_videos: number of continuations.
        guidance_scale, temperature, top_k, top_p, seed, batch_size: see `VideoSampling`.
        model, device, dtype, progress: see `generate`.

    Returns:
        A Video of the size of the training clips: the given frames, resized and cropped, then the new ones, generated
        window by window from the last frames of the window before. A list of them if num_videos > 1.

    Raises:
        ValueError: if an argument is out of range, the video cannot be read or has too few frames, there is no model, or
            it is not trained for continuation.
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
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    max_videos: int = 4,
    seed: int = 0,
    model: Model = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    progress: ProgressCallback | None = None,
) -> dict:
    """Answer a conversation with text and videos in any order.

    Args:
        messages: `{"role": "user", "content": "..."}`; or as content a list of `{"type": "text", "text": "..."}` and
            `{"type": "video", "video": ...}` with a video as in `describe`, of a file optionally with "start", in seconds.
        text_temperature, text_top_k, text_top_p, max_new_tokens: of the text, see `TextSampling`.
        guidance_scale, temperature, top_k, top_p: of the videos, see `VideoSampling`.
        max_videos: the largest number of videos in the answer.
        seed: of text and videos.
        model, device, dtype: see `generate`.
        progress: called with a `Progress` after each id, with each new piece of text.

    Returns:
        A message of the same form with the role assistant, whose videos are Videos. Append it to `messages` to continue.

    Raises:
        ValueError: if an argument is out of range, the messages have another form or are too long for the model, or there
            is no model.
    """
    check_count("max_videos", max_videos, least=0)
    check_progress(progress)
    video = VideoSampling(guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    try:
        text = TextSampling(
            temperature=text_temperature, top_k=text_top_k, top_p=text_top_p, max_new_tokens=max_new_tokens, seed=seed
        )
    except ValueError as error:
        # Videos have options of the same names.
        raise ValueError(f"text: {error}") from None
    return open_model(model, device, dtype).chat(messages, video, text, max_videos, progress)


def open_model(model: Model = None, device: str | None = None, dtype: str | torch.dtype | None = None) -> Mllm:
    """The loaded model, see `generate`. The last two models stay in memory."""
    dtype = check_dtype(dtype)
    if isinstance(model, Mllm):
        if device is not None or dtype is not None:
            raise ValueError(
                "this model is loaded already: pass device and dtype to Mllm.load, or give the model's folder"
            )
        return model
    if model is not None and not isinstance(model, (str, Path)):
        raise ValueError(f"model must be a folder, a hub name or a loaded Mllm, got {model!r}")
    if device is not None:
        check_device(device)
    folder = find_model(model).resolve()
    with loading:  # so that threads that ask for one model at a time load it once
        return _load_cached(folder, (folder / "config.json").stat().st_mtime_ns, device, dtype)


@lru_cache(maxsize=2)
def _load_cached(folder: Path, modified_ns: int, device: str | None, dtype: torch.dtype | None) -> Mllm:
    return Mllm.load(folder, device, dtype)
