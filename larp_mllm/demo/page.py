"""The page: a tab for each use of the models, made with Gradio.

Gradio shows a ValueError in words (`_in_words`); any other exception is a defect, and shows as "Error" with its traceback in the
terminal. Each tab's function returns the components that are filled anew when the page is loaded, since a model may have
been trained meanwhile.
"""

import html
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from larp.sampling.options import CLASS_GUIDANCE, GuidedSampling
from larp_mllm.demo import jobs
from larp_mllm.demo.jobs import MAX_MEGABYTES, MAX_SECONDS, MAX_VIDEOS
from larp_mllm.demo.models import Models
from larp_mllm.generation.progress import Progress
from larp_mllm.generation.sampling import TextSampling, VideoSampling
from larp_mllm.video import Video

import gradio as gr

# The events of all tabs share one queue: one job at a time.
_QUEUE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": 1}
_WAITING = 32
# Seconds between two states of an unfinished answer.
_SECONDS_BETWEEN = 0.5
# Seconds after which files of earlier jobs are looked for, and their age when they are deleted.
_DELETE = (3600, 86400)
# What a page load fills anew: a component, and the function that gives its value.
Refreshed = list[tuple[Any, Callable[[], Any]]]


@contextmanager
def serve(models: Models, folder: str | Path, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page during a `with` block, which gets its address.

    Args:
        models: shown by the tabs.
        folder: for files of results. The environment variable GRADIO_TEMP_DIR says where those of uploads lie.
        host, port: where to listen; None: the first free port from 7860 on.

    Raises ValueError if the address is taken or unknown.
    """
    page = build(models, Path(folder)).queue(max_size=_WAITING, api_open=False)
    try:
        # Gradio would print a traceback.
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            enable_monitoring=False,
            max_file_size=f"{MAX_MEGABYTES}mb",
            footer_links=[],
        )
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"{host}:{port or '7860 and up'}: nothing can listen there: choose another --port or --host"
        ) from error
    try:
        yield url
    finally:
        page.close(verbose=False)


def build(models: Models, folder: Path) -> gr.Blocks:
    """Return the page; `folder` gets the files of results."""
    with gr.Blocks(title="larp-mllm", analytics_enabled=False, delete_cache=_DELETE) as page:
        gr.Markdown("# larp-mllm: video as vocabulary")
        about = gr.Markdown(models.about())
        refreshed: Refreshed = [(about, models.about)]
        for title, tab in _TABS.items():
            with gr.Tab(title):
                refreshed += tab(models, folder)
        gr.Markdown(jobs.BOUNDS)
        components, values = zip(*refreshed, strict=True)
        page.load(lambda: [value() for value in values], None, list(components), queue=False, api_visibility="private")
    return page


def _text_to_video(models: Models, folder: Path) -> Refreshed:
    notice = _notice(models.missing_mllm)
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", placeholder="a person surfing", max_length=2000, elem_id="prompt")
            seed, guidance, temperature = _sampling(guidance=2.0)
            count = gr.Slider(1, MAX_VIDEOS, value=1, step=1, label="Videos")
            button = gr.Button("Generate", variant="primary", elem_id="generate")
        with gr.Column():
            videos, status = _results("generated")

    def generate(prompt, seed, guidance, temperature, count, progress=gr.Progress()):
        with _in_words():
            if not prompt.strip():
                raise ValueError("the prompt is empty: say what the video shows, such as: a person surfing")
            sampling, start = _video_sampling(seed, guidance, temperature), time.monotonic()

            def job(report):
                return models.mllm.generate([prompt], count, sampling, report, jobs.preview_every(models))

            with jobs.running(job) as events:
                for event in events:
                    if not isinstance(event, Progress):
                        yield _shown(event, folder, time.monotonic() - start)
                        return
                    progress((event.done, event.total), desc="sampling", unit="codes")
                    if event.previews:
                        yield _shown(event.previews, folder)

    inputs = [prompt, seed, guidance, temperature, count]
    for event in (button.click, prompt.submit):
        event(generate, inputs, [*videos, status], show_progress_on=status, api_name="generate", **_QUEUE)
    return [notice]


def _chat(models: Models, folder: Path) -> Refreshed:
    notice = _notice(models.missing_mllm)
    # The messages for the model, and as the page shows them.
    conversation = gr.State(([], []))
    chatbot = gr.Chatbot(label="Chat", height=460)
    with gr.Row():
        with gr.Column(scale=3):
            text = gr.Textbox(
                label="Message", placeholder="Show me a person surfing.", max_length=4000, elem_id="message"
            )
            with gr.Row():
                send = gr.Button("Send", variant="primary", elem_id="send")
                new = gr.Button("New conversation")
            seed, guidance, temperature = _sampling(guidance=2.0)
        with gr.Column(scale=2):
            upload = _upload("Video to show with the message (optional)")

    def say(text, video, seed, guidance, temperature, conversation):
        with _in_words(video):
            if not text.strip():
                raise ValueError("the message is empty: write one")
            content, shown = [{"type": "text", "text": text}], [_said("user", text)]
            if video:
                content.insert(0, {"type": "video", "video": jobs.check_upload(video)})
                shown.insert(0, _said("user", {"path": video}))
            said, shown_before = conversation
            messages, shown = [*said, {"role": "user", "content": content}], [*shown_before, *shown]
            sampling, texts = _video_sampling(seed, guidance, temperature), TextSampling(max_new_tokens=256, seed=seed)
            yield shown, conversation, text, video

            def job(report):
                return models.mllm.chat(messages, sampling, texts, MAX_VIDEOS, report)

            with jobs.running(job) as events:
                answer, shown_at = [], time.monotonic()
                for event in events:
                    if not isinstance(event, Progress):
                        break
                    # Not for each word: the whole chat goes to the browser each time.
                    if _add(answer, event, folder) and time.monotonic() - shown_at > _SECONDS_BETWEEN:
                        yield shown + answer, conversation, text, video
                        shown_at = time.monotonic()
            answer = [turn for turn in answer if turn["metadata"]["id"] != "progress"] or [
                _said("assistant", "(no answer)")
            ]
            yield shown + answer, ([*messages, event], shown + answer), "", None

    inputs = [text, upload, seed, guidance, temperature, conversation]
    outputs = [chatbot, conversation, text, upload]
    for event in (send.click, text.submit):
        event(say, inputs, outputs, show_progress_on=chatbot, show_progress="minimal", api_name="chat", **_QUEUE)
    new.click(lambda: ([], ([], [])), None, [chatbot, conversation], api_visibility="private")
    return [notice]


def _said(role: str, content: Any, kind: str = "said") -> dict:
    """A message as the page shows it."""
    return {"role": role, "content": content, "metadata": {"id": kind}}


def _add(answer: list[dict], event: Progress, folder: Path) -> bool:
    """Add what was sampled to the shown messages of an answer; returns whether there is something to show."""
    if answer and answer[-1]["metadata"]["id"] == "progress" and (event.text or event.previews):
        answer.pop()
    if event.text:
        if not answer or not isinstance(answer[-1]["content"], str):
            answer.append(_said("assistant", ""))
        answer[-1]["content"] = (answer[-1]["content"] + event.text).lstrip()
        return True
    if event.previews:
        answer += [_said("assistant", {"path": jobs.write(video, folder)}) for video in event.previews]
        return True
    if event.kind == "codes" and event.done % 32 == 1:
        if answer and answer[-1]["metadata"]["id"] == "progress":
            answer.pop()
        answer.append(_said("assistant", f"(a video: {event.done} of {event.total} codes)", "progress"))
        return True
    return False


def _reconstruct(models: Models, folder: Path) -> Refreshed:
    gr.Markdown("A video is encoded and decoded. The tokenizer sees the middle of each frame, in small pixels.")
    with gr.Row():
        upload = _upload("Original", "original")
        out = gr.Video(label="Reconstruction", interactive=False, autoplay=True, loop=True, elem_id="reconstruction")
    codes = _num_tokens(models)
    button = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
    about = gr.Markdown(elem_id="figures")

    def reconstruct(video, num_tokens):
        with _in_words(video):
            path, report = jobs.reconstruct(models, video, num_tokens if models.prefix_lengths() else None, folder)
            return path, jobs.figures(report, models)

    button.click(reconstruct, [upload, codes], [out, about], api_name="reconstruct", **_QUEUE)
    return [(codes, lambda: _num_tokens(models))]


def _num_tokens(models: Models) -> gr.Slider:
    """The number of codes of a window, hidden where the tokenizer is not nested."""
    most = models.prefix_lengths()
    return gr.Slider(1, max(most, 2), value=max(most, 2), step=1, label="Codes of each window", visible=most > 0)


def _continue(models: Models, folder: Path) -> Refreshed:
    notice = _notice(models.missing_continuation)
    with gr.Row():
        with gr.Column():
            upload = _upload("Video")
            seconds = gr.Slider(0.5, MAX_SECONDS, value=1, step=0.5, label="New seconds")
            prompt = gr.Textbox(label="Prompt (optional)", placeholder="what the video shows", max_length=2000)
            seed, guidance, temperature = _sampling(guidance=1.0)
            button = gr.Button("Continue", variant="primary")
        with gr.Column():
            (video, *_), status = _results("continued", 1)

    def continue_video(path, seconds, prompt, seed, guidance, temperature, progress=gr.Progress()):
        with _in_words(path):
            sampling, path, start = (
                _video_sampling(seed, guidance, temperature),
                jobs.check_upload(path),
                time.monotonic(),
            )

            def job(report):
                return models.mllm.continue_video(path, seconds, prompt, 1, sampling, report)

            (made,) = _followed(job, progress, "codes")
            note = f"{made.given} given frames and {len(made.frames) - made.given} new ones"
            return jobs.write(made, folder), f"{note}, {time.monotonic() - start:.1f} s"

    inputs = [upload, seconds, prompt, seed, guidance, temperature]
    button.click(continue_video, inputs, [video, status], show_progress_on=status, api_name="continue_video", **_QUEUE)
    return [notice]


def _describe(models: Models, folder: Path) -> Refreshed:
    notice = _notice(models.missing_mllm)
    with gr.Row():
        with gr.Column():
            upload = _upload("Video")
            temperature = gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: the likeliest word")
            seed = _seed()
            button = gr.Button("Describe", variant="primary")
        caption = gr.Textbox(label="Description", interactive=False, lines=3)

    def describe(path, temperature, seed, progress=gr.Progress()):
        with _in_words(path):
            sampling, path = TextSampling(temperature=temperature, seed=seed), jobs.check_upload(path)
            return _followed(lambda report: models.mllm.describe([path], sampling, report), progress, "tokens at most")[
                0
            ]

    button.click(describe, [upload, temperature, seed], caption, api_name="describe", **_QUEUE)
    return [notice]


def _sample(models: Models, folder: Path) -> Refreshed:
    notice = _notice(models.missing_classes)
    with gr.Row():
        with gr.Column():
            names = gr.Dropdown(models.class_names(), label="Class", value=None)
            seed, guidance, temperature = _sampling(CLASS_GUIDANCE, GuidedSampling.temperature)
            count = gr.Slider(1, MAX_VIDEOS, value=1, step=1, label="Videos")
            button = gr.Button("Sample", variant="primary")
        with gr.Column():
            videos, status = _results("sampled")

    def sample(name, seed, guidance, temperature, count):
        with _in_words():
            if models.missing_classes():
                raise ValueError(models.missing_classes())
            if not name:
                raise ValueError("no class is chosen: choose one")
            start = time.monotonic()
            made = jobs.sample_class(models, name, count, seed, guidance, temperature)
            return _shown(made, folder, time.monotonic() - start)

    inputs = [names, seed, guidance, temperature, count]
    button.click(sample, inputs, [*videos, status], show_progress_on=status, api_name="sample", **_QUEUE)
    return [notice, (names, lambda: gr.Dropdown(models.class_names(), value=next(iter(models.class_names()), None)))]


_TABS = {
    "Text to video": _text_to_video,
    "Chat": _chat,
    "Reconstruct": _reconstruct,
    "Continue": _continue,
    "Describe": _describe,
    "Sample a class": _sample,
}


# Parts that tabs share


def _notice(missing: Callable[[], str]) -> tuple[Any, Callable[[], Any]]:
    """A line that says what is missing, hidden while nothing is."""

    def shown():
        text = missing()
        return gr.Markdown(text, visible=bool(text))

    text = missing()
    return gr.Markdown(text, visible=bool(text)), shown


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, info="same seed, same result")


def _sampling(guidance: float, temperature: float = VideoSampling.temperature) -> tuple[Any, Any, Any]:
    """Seed, guidance and temperature, with what the last two begin at."""
    with gr.Row():
        return (
            _seed(),
            gr.Slider(0, 10, value=guidance, step=0.25, label="Guidance", info="1 is off"),
            gr.Slider(0, 2, value=temperature, step=0.05, label="Temperature", info="0: the likeliest code"),
        )


def _upload(label: str, name: str | None = None) -> gr.Video:
    return gr.Video(label=label, sources=["upload"], include_audio=True, elem_id=name, height=320)


def _results(name: str, most: int = MAX_VIDEOS) -> tuple[list[Any], Any]:
    """Places for videos, the first one shown, and a line below them."""
    videos = []
    for first in range(0, most, 2):
        with gr.Row():
            for number in range(first, min(first + 2, most)):
                label = f"Video {number + 1}" if most > 1 else "Video"
                videos.append(
                    gr.Video(
                        label=label,
                        interactive=False,
                        autoplay=True,
                        loop=True,
                        visible=number == 0,
                        elem_id=f"{name}-{number}",
                        height=320,
                    )
                )
    return videos, gr.Textbox(label="Status", interactive=False, elem_id=f"{name}-status")


def _shown(videos: list[Video], folder: Path, seconds: float | None = None) -> list[Any]:
    """The values of `_results`; without `seconds` the videos are unfinished."""
    places = [gr.Video(jobs.write(video, folder), visible=True) for video in videos]
    places += [gr.Video(None, visible=False)] * (MAX_VIDEOS - len(videos))
    made = f"{len(videos)} video{'s' * (len(videos) > 1)} of {len(videos[0].frames)} frames"
    return [*places, "sampling" if seconds is None else f"{made}, {seconds:.1f} s"]


def _followed(job: Callable, progress: gr.Progress, unit: str) -> Any:
    """The result of a job, whose progress is shown meanwhile."""
    with jobs.running(job) as events:
        for event in events:
            if isinstance(event, Progress):
                progress((event.done, event.total), desc="sampling", unit=unit)
    return event


def _video_sampling(seed: int, guidance: float, temperature: float) -> VideoSampling:
    return VideoSampling(seed=seed, guidance_scale=guidance, temperature=temperature)


@contextmanager
def _in_words(upload: str | None = None) -> Iterator[None]:
    """Show a ValueError or OSError as a message. An upload is named as its user named it, without its folder here."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error) if upload is None else str(error).replace(str(upload), Path(upload).name)
        raise gr.Error(html.escape(text, quote=False), duration=None, print_exception=False) from None
