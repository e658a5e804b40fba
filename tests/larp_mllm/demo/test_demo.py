"""larp-mllm demo: its page through Gradio's client, what its tabs refuse, and the command."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from larp.data.video import VideoError, probe, write_video
from larp_mllm.cli import main
from larp_mllm.demo import jobs
from larp_mllm.demo.models import Models
from larp_mllm.generation.progress import Progress
from larp_mllm.locate import set_default_model
from tests.larp.codec.test_whole_video import noise, random_tokenizer
from tests.larp.models.test_generator import random_generator
from tests.larp_mllm.cli.test_cli import refused
from tests.larp_mllm.tiny import colourful_mllm

import pytest
import torch

NAMES = ("Archery", "Horse Race", "Surfing")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A language model that continues, a nested tokenizer, a generator of its codes, and a video of ten frames."""
    made = tmp_path_factory.mktemp("made")
    mllm = colourful_mllm()
    mllm.model.config.given_frames = 2
    mllm.save(made / "mllm")
    tokenizer = random_tokenizer(nested=True)
    tokenizer.save_pretrained(made / "tokenizer")
    random_generator(class_names=NAMES, tokenizer_hash=tokenizer.weight_hash()).save_pretrained(made / "generator")
    write_video(made / "clip.mp4", noise(10), 12.5)
    (made / "broken.mp4").write_text("hello")
    return made


@pytest.fixture(scope="module")
def models(made) -> Models:
    return Models(*(str(made / name) for name in ("mllm", "tokenizer", "generator")), device="cpu")


@pytest.fixture(scope="module")
def client(models, tmp_path_factory):
    """A client of the page of these models."""
    pytest.importorskip("gradio", reason="needs pip install 'larp-mllm[demo]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("files")))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from larp_mllm.demo.page import serve

        from gradio_client import Client

        with serve(models, tmp_path_factory.mktemp("results")) as url:
            assert url.startswith("http://127.0.0.1:")
            yield Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def upload(path: Path):
    from gradio_client import handle_file

    return handle_file(str(path))


def message(call, *arguments, api_name: str) -> str:
    """The message that the page shows in place of a result."""
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError) as error:
        call(*arguments, api_name=api_name)
    return str(error.value)


def test_videos_for_a_prompt(client):
    *videos, status = client.predict("a person surfing", 3, 2.0, 1.0, 2, api_name="/generate")
    assert [video["visible"] for video in videos] == [True, True, False, False]
    assert re.fullmatch(r"2 videos of 4 frames, [\d.]+ s", status)
    assert all(probe(video["value"]).frames == 4 and probe(video["value"]).height == 256 for video in videos[:2])
    assert Path(videos[0]["value"]).read_bytes() != Path(videos[1]["value"]).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((" ", 0, 2.0, 1.0, 1), "the prompt is empty"),
        (("a", 0, 2.0, 1.0, 5), "greater than maximum value 4"),
        (("a", None, 2.0, 1.0, 1), "seed must be a whole number"),
        (("word " * 390, 0, 2.0, 1.0, 1), "positions"),
    ],
)
def test_errors_are_shown_in_words(client, arguments, said):
    assert said in message(client.predict, *arguments, api_name="/generate")


def test_an_upload_is_reconstructed_with_the_chosen_number_of_codes(client, made):
    bits = []
    for num_tokens in (6, 2):
        path, figures = client.predict(upload(made / "clip.mp4"), num_tokens, api_name="/reconstruct")
        assert probe(path).frames == 10 and re.search(r"PSNR [\d.]+ dB", figures)
        bits.append(int(re.search(r"(\d+) bits", figures)[1]))
    assert bits == [3 * 6 * 5, 3 * 2 * 5]


def test_a_broken_upload_gives_a_message_and_the_page_lives_on(client, made):
    text = message(client.predict, upload(made / "broken.mp4"), 6, api_name="/reconstruct")
    assert text.startswith("broken.mp4: does not begin like a video file")
    assert "no video was uploaded" in message(client.predict, None, 6, api_name="/reconstruct")
    assert client.predict(upload(made / "clip.mp4"), 6, api_name="/reconstruct")


def test_a_video_is_continued_and_described(client, made):
    video, status = client.predict(upload(made / "clip.mp4"), 0.5, "", 0, 1.0, 1.0, api_name="/continue_video")
    assert probe(video).frames == 16 and status.startswith("10 given frames and 6 new ones")
    assert "maximum value 10" in message(
        client.predict, upload(made / "clip.mp4"), 11, "", 0, 1, 1, api_name="/continue_video"
    )
    assert isinstance(client.predict(upload(made / "clip.mp4"), 0, 0, api_name="/describe"), str)


def test_a_chat_keeps_its_messages(client, made):
    client.reset_session()
    shown, *_ = client.predict("what is it?", upload(made / "clip.mp4"), 0, 2.0, 1.0, api_name="/chat")
    assert [turn["role"] for turn in shown[:2]] == ["user", "user"] and shown[2]["role"] == "assistant"
    longer, *_ = client.predict("and now?", None, 0, 2.0, 1.0, api_name="/chat")
    assert len(longer) > len(shown) and "and now?" in str(longer)
    said = message(client.predict, "look", upload(made / "broken.mp4"), 0, 2.0, 1.0, api_name="/chat")
    assert said.startswith("broken.mp4: "), "without the folder of uploads"


def test_an_answer_shows_its_text_its_codes_and_its_videos(tmp_path, models):
    from larp_mllm.demo.page import _add

    (video,) = models.mllm.generate(["a"])
    answer: list[dict] = []
    for event in (
        *(
            Progress("text", 1, 9, " He"),
            Progress("text", 2, 9, "re"),
            Progress("codes", 1, 4),
            Progress("codes", 2, 4),
        ),
        *(Progress("codes", 4, 4, previews=[video]), Progress("text", 3, 9, " Done")),
    ):
        _add(answer, event, tmp_path)
        if event.done == 2 and event.kind == "codes":
            assert answer[-1]["content"] == "(a video: 1 of 4 codes)"
    assert [turn["content"] for turn in answer[::2]] == ["Here", "Done"]
    assert probe(answer[1]["content"]["path"]).frames == 4


def test_a_class_is_sampled(client):
    *videos, status = client.predict("Surfing", 0, 1.25, 1.0, 1, api_name="/sample")
    assert probe(videos[0]["value"]).frames == 4 and status.startswith("1 video of 4 frames")
    assert "no class is chosen" in message(client.predict, None, 0, 1.25, 1.0, 1, api_name="/sample")


def test_a_nested_tokenizer_gives_previews(models):
    mllm = models.mllm
    tokenizer = mllm.processor.video_tokenizer
    assert jobs.preview_every(models) == 0
    before, tokenizer.config = tokenizer.config, replace(tokenizer.config, nested=True)
    tokenizer.mask_latent = torch.nn.Parameter(torch.zeros(4))
    try:
        assert jobs.preview_every(models) == 1
        with jobs.running(lambda report: mllm.generate(["a"], progress=report, preview_every=1)) as events:
            *progress, videos = events
    finally:
        tokenizer.config, tokenizer.mask_latent = before, None
    assert [len(event.previews) for event in progress] == [1] * 4 and len(videos) == 1


def test_a_job_that_nobody_waits_for_ends():
    ended = threading.Event()

    def job(report):
        try:
            while True:
                report(Progress("codes", 1, 2))
                time.sleep(0.01)
        finally:
            ended.set()

    with jobs.running(job) as events:
        next(events)
    assert ended.is_set()


def test_uploads_are_bounded(made, tmp_path, monkeypatch):
    assert jobs.check_upload(str(made / "clip.mp4")) == made / "clip.mp4"
    write_video(tmp_path / "fast.mp4", noise(4), 240)
    with pytest.raises(VideoError, match="240 frames a second"):
        jobs.check_upload(str(tmp_path / "fast.mp4"))
    monkeypatch.setattr(jobs, "MAX_FRAMES", 9)
    with pytest.raises(VideoError, match="more than 9 frames"):
        jobs.check_upload(str(made / "clip.mp4"))
    monkeypatch.setattr(jobs, "MAX_MEGABYTES", 0)
    with pytest.raises(VideoError, match="larger than 0 MB"):
        jobs.check_upload(str(made / "clip.mp4"))


def test_each_tab_has_a_model_of_the_package(monkeypatch, tmp_path):
    fresh = Models(device="cpu")
    assert not (fresh.missing_mllm() or fresh.missing_continuation() or fresh.missing_classes())
    assert fresh.class_names()[-1] == "Surfing" and fresh.prefix_lengths() == 0
    assert fresh.about().count("the one that comes with larp-mllm") == 3 and "`" not in fresh.about()
    _, tokenizer, fps = fresh.classes
    assert fps == 25 and tokenizer.weight_hash() == fresh.codec.weight_hash()
    named = Models("tiny", device="cpu")
    assert named.codec.weight_hash() == tokenizer.weight_hash()


def test_a_broken_default_model_is_said_and_not_replaced(monkeypatch, tmp_path):
    monkeypatch.setenv("LARP_MLLM_MODEL", str(tmp_path / "gone"))
    broken = Models()
    assert "gone" in broken.missing_mllm() and "tokenizer: none" in broken.about() and broken.prefix_lengths() == 0
    with pytest.raises(ValueError, match=r"LARP_MLLM_MODEL=.*gone"):
        broken.codec  # noqa: B018
    monkeypatch.setattr("larp_mllm.locate._SHIPPED", tmp_path / "gone")
    assert "config.json, which comes with larp-mllm, is missing" in broken.missing_classes()
    assert broken.class_names() == []


def test_each_tab_says_what_makes_its_model(made, tmp_path):
    colourful_mllm().save(tmp_path / "mllm")
    other = Models(str(tmp_path / "mllm"), generator=str(made / "generator"))
    assert other.missing_mllm() == "" and "--condition-frames" in other.missing_continuation()
    with pytest.raises(ValueError, match="does not say which tokenizer"):
        other.classes  # noqa: B018


def test_models_are_found_and_loaded_once(models, made):
    assert not (models.missing_mllm() or models.missing_continuation() or models.missing_classes())
    assert models.class_names() == list(NAMES) and models.prefix_lengths() == 6
    assert models.mllm is models.mllm and models.codec is models.codec and models.classes is models.classes
    random_generator(task="frame-prediction").save_pretrained(made / "frames")
    assert "--task class" in Models(generator=str(made / "frames")).missing_classes()


def test_what_is_trained_while_the_page_is_open_is_shown_and_used(made, tmp_path, monkeypatch):
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LARP_MLLM_MODEL", raising=False)
    page = Models(device="cpu")
    before = page.mllm, page.codec, page.classes
    assert all(one is other for one, other in zip(before, (page.mllm, page.codec, page.classes), strict=True))
    set_default_model(made / "mllm")
    assert str(made / "mllm") in page.about() and page.mllm.model.config.tokens_per_video == 4
    assert page.codec.weight_hash() == page.mllm.processor.video_tokenizer.weight_hash() != before[1].weight_hash()
    own = Models(tokenizer=str(made / "tokenizer"), generator=str(tmp_path / "generator"), device="cpu")
    for names in (NAMES, ("one", "two", "three")):
        tokenizer_hash = own.codec.weight_hash()
        random_generator(class_names=names, tokenizer_hash=tokenizer_hash).save_pretrained(tmp_path / "generator")
        generator, *_ = own.classes
        assert list(generator.config.class_names) == own.class_names() == list(names)


def test_the_command_needs_gradio(monkeypatch, capsys):
    monkeypatch.setattr("larp_mllm.cli.demo.find_spec", lambda name: None)
    assert refused(capsys, "demo") == "larp-mllm: the page needs Gradio: pip install 'larp-mllm[demo]'\n"


def test_the_command_serves_until_ctrl_c_and_leaves_no_files(client, made, monkeypatch, tmp_path, capsys):
    def interrupted():
        raise KeyboardInterrupt

    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    event = SimpleNamespace(wait=interrupted)
    monkeypatch.setattr("larp_mllm.cli.demo.threading", SimpleNamespace(Event=lambda: event))
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--model", str(made / "mllm")])
    output = capsys.readouterr()
    assert stopped.value.code == 130 and output.out.startswith("http://127.0.0.1:")
    assert list(tmp_path.iterdir()) == []


def test_what_was_named_must_be_there(client, made, capsys):
    assert "no_such" in refused(capsys, "demo", "--model", "no_such")
    assert "no_such" in refused(capsys, "demo", "--generator", "no_such")
    assert "nothing can listen there" in refused(capsys, "demo", "--host", "203.0.113.1", "--port", "80")
