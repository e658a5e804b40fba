"""The larp-mllm command."""

import inspect
import io
import json
import os

import larp_mllm.api
import larp_mllm.video
from larp.data.video import VideoError, probe, read_video, write_video
from larp_mllm.cli import COMMANDS, build_parser, main
from larp_mllm.cli.options import VIDEO_SAMPLING
from larp_mllm.engine.samples import SamplingConfig
from larp_mllm.generation.sampling import VideoSampling
from tests.larp_mllm.tiny import colourful_mllm, favour_videos

import numpy as np
import pytest


def test_generate_then_describe(qwen, tmp_path, capsys):
    qwen.save(tmp_path / "model")
    assert capsys.readouterr() == ("", "")
    out = tmp_path / "clip.mp4"
    main(["generate", "a red circle", "-o", str(out), "-n", "2", "--model", str(tmp_path / "model"), "--device", "cpu"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "clip-0.mp4"), str(tmp_path / "clip-1.mp4")]
    main(["describe", str(tmp_path / "clip-0.mp4"), "--model", str(tmp_path / "model"), "--max-new-tokens", "3"])
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize(
    "command",
    [[], *([command.__name__.split(".")[-1].removesuffix("_video").replace("_", "-")] for command in COMMANDS)],
)
def test_every_command_has_a_help_text(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith(f"usage: {' '.join(['larp-mllm', *command])} ") and "options:" in output


@pytest.mark.parametrize(
    ("function", "command"),
    [(larp_mllm.api.generate, ["generate", "x"]), (larp_mllm.api.chat, ["chat", "x"]),
     (larp_mllm.api.continue_video, ["continue", "clip.mp4", "--seconds", "1"])],
)  # fmt: skip
def test_videos_have_the_same_defaults_everywhere(function, command):
    own, typed = inspect.signature(function).parameters, build_parser().parse_args(command)
    expected = VideoSampling() if command[0] != "continue" else VideoSampling(guidance_scale=1.0)
    for name in VIDEO_SAMPLING:
        assert own[name].default == getattr(typed, name) == getattr(expected, name), name
    assert SamplingConfig().temperature == VideoSampling().temperature


def test_ctrl_c_ends_a_command_with_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(larp_mllm.api, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red circle", "-o", str(tmp_path / "x.mp4")])
    assert stopped.value.code == 130 and capsys.readouterr().err == "larp-mllm: stopped\n"


@pytest.fixture
def folder(qwen, tmp_path, monkeypatch):
    """A working folder with a default model."""
    qwen.save(tmp_path / "model")
    monkeypatch.setenv("LARP_MLLM_MODEL", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments) -> str:
    """Return the message of a command that ends with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    output = capsys.readouterr().err
    assert output.startswith("larp-mllm: ") and output.count("\n") == 1
    return output


@pytest.mark.parametrize(
    "out, words",
    [
        ("/proc/x.mp4", "/proc takes no files"),
        ("/proc/new/x.mp4", "/proc takes no files"),
        ("there.mp4", "there.mp4 is a folder"),
        ("there.mp4/", "there.mp4 is a folder"),
        ("file/x.mp4", "file is a file, not a folder"),
        ("there/", "suffix ''"),
        ("x.webm", "suffix '.webm'; choose one of .mp4"),
        ("x.jpg", "suffix '.jpg'"),
        ("x.xyz", "suffix '.xyz'"),
        ("", "suffix ''"),
    ],
)
def test_a_bad_out_is_refused_before_a_model_is_loaded(folder, monkeypatch, capsys, out, words):
    monkeypatch.setattr(larp_mllm.api, "find_model", lambda *_: pytest.fail("a model was looked for"))
    (folder / "there.mp4").mkdir()
    (folder / "there").mkdir()
    (folder / "file").write_text("")
    before = sorted(folder.rglob("*"))
    assert words in refused(capsys, "generate", "a red circle", "-o", out)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "option", [("-n", "0"), ("--scale", "0"), ("--guidance-scale", "nan"), ("--device", "nonsense")]
)
def test_bad_options_are_named(folder, capsys, option):
    words = {"-n": "num_videos", "--guidance-scale": "guidance"}.get(option[0], option[0].removeprefix("--"))
    assert words in refused(capsys, "generate", "a red circle", *option)


def test_new_folders_are_made_and_out_is_replaced(folder, capsys):
    for _ in range(2):
        main(["generate", "a red circle", "-o", "new/deep/x.gif"])
    assert [path.name for path in (folder / "new/deep").iterdir()] == ["x.gif"]


def test_without_out_nothing_is_ever_replaced(folder, capsys):
    (folder / "video.mp4").write_text("mine")
    (folder / "video-1.mp4").mkdir()
    for prompt in ("", "🚲", "犬"):
        main(["generate", prompt])
    main(["generate", "🚲", "-n", "2"])
    assert capsys.readouterr().out.split() == [f"video-{number}.mp4" for number in (0, 2, 3, 4, 5)]
    assert (folder / "video.mp4").read_text() == "mine"
    main(["generate", "A red circle!"])
    assert capsys.readouterr().out == "a-red-circle.mp4\n"


def test_a_full_disk_is_one_message(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "x.mp4")

    monkeypatch.setattr(larp_mllm.video.Video, "save", full)
    assert "No space left on device: 'x.mp4'" in refused(capsys, "generate", "a red circle")


@pytest.fixture(scope="module")
def painter():
    """A model whose videos are not all grey, for continuation from 3 of the 4 frames of a clip."""
    mllm = colourful_mllm()
    mllm.model.config.given_frames = 3
    return mllm


@pytest.fixture
def clip(tmp_path, monkeypatch, painter):
    """A video in the working folder; `painter` is loaded for every model name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(larp_mllm.api, "open_model", lambda *_, **__: painter)
    write_video("clip.mp4", np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8), 10)
    return tmp_path / "clip.mp4"


def test_continue_writes_the_whole_video(clip, painter, capsys):
    main(["continue", "clip.mp4", "--seconds", "0.2", "--seed", "2", "--scale", "2"])
    assert capsys.readouterr().out == "clip-continued.mp4\n"
    info = probe("clip-continued.mp4")
    assert (info.frames, info.fps, info.width, info.height) == (11, 10, 32, 32)
    main(["continue", "clip.mp4", "--seconds", "0.1", "-n", "2", "-o", "out/on.gif"])
    assert capsys.readouterr().out.split() == ["out/on-0.gif", "out/on-1.gif"]
    main(["continue", "clip.mp4", "--seconds", "0.1"])
    assert capsys.readouterr().out == "clip-continued-0.mp4\n"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["clip.mp4", "--seconds", "0"], "seconds is 0"),
        (["clip.mp4", "--seconds", "1", "-o", "clip.mp4"], "clip.mp4 is the video itself"),
        (["gone.mp4", "--seconds", "1"], "gone.mp4"),
        (["clip.mp4", "--seconds", "1", "-n", "0"], "num_videos"),
        (["clip.mp4", "--seconds", "1", "--top-k", "-1"], "top_k"),
    ],
)
def test_continue_refuses_bad_arguments(clip, capsys, arguments, words):
    assert words in refused(capsys, "continue", *arguments)


@pytest.mark.parametrize(
    "video, words", [("gone.mp4", "gone.mp4"), ("text.mp4", "text.mp4"), ("short.mp4", "2 frames")]
)
def test_describe_refuses_bad_videos_with_one_line(clip, capsys, video, words):
    (clip.parent / "text.mp4").write_text("no video")
    write_video("short.mp4", np.zeros((2, 16, 16, 3), np.uint8), 10)
    assert words in refused(capsys, "describe", video)


def test_sampling_options_reach_describe(clip, capsys):
    output = []
    for options in ([], ["--temperature", "1"], ["--temperature", "1", "--seed", "1"], ["--max-new-tokens", "2"]):
        main(["describe", "clip.mp4", "--max-new-tokens", "6", *options])
        output.append(capsys.readouterr().out)
    assert len(set(output)) == 4 and all(text.endswith("\n") for text in output)


def test_one_question_one_answer(clip, painter, monkeypatch, capsys):
    favour_videos(painter, monkeypatch, bonus=1e4)
    options = ["--max-new-tokens", "5", "--max-videos", "2", "-o", "out", "--scale", "2", "--text-temperature", "1"]
    main(["chat", "what is it?", "--video", "clip.mp4", *options])
    first, second, text = capsys.readouterr().out.splitlines()
    assert (first, second) == ("out/chat-0.mp4", "out/chat-1.mp4") and text
    question = [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what is it?"}]
    answer = larp_mllm.chat(
        [{"role": "user", "content": question}], max_new_tokens=5, max_videos=2, text_temperature=1.0, model=painter
    )
    assert answer["content"][2]["text"] == text
    info = probe("out/chat-0.mp4")
    assert (info.frames, info.width, info.fps) == (4, 32, 8)
    painted = answer["content"][0]["video"].frames
    assert np.abs(read_video("out/chat-0.mp4")[0][:, ::2, ::2].astype(int) - painted).mean() < 30
    main(["chat", "another", *options])
    assert capsys.readouterr().out.splitlines()[:2] == ["out/chat-2.mp4", "out/chat-3.mp4"]


def test_a_conversation_is_read_line_by_line(clip, painter, monkeypatch, capsys):
    seen = []

    def chat(messages, **_):
        seen.append(json.loads(json.dumps(messages, default=str)))
        if messages[-1]["content"][-1]["text"] == "too long":
            raise ValueError("no room")
        return {"role": "assistant", "content": [{"type": "text", "text": f"answer {len(seen)}"}]}

    monkeypatch.setattr(larp_mllm.api, "chat", chat)
    lines = ["/video clip.mp4", "what is it?", "", "too long", "/video gone.mp4", "/nonsense", "go on", "/new", "again"]
    lines += ["/help", " /quit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(["chat"])
    roles = [[message["role"] for message in messages] for messages in seen]
    assert roles == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"], ["user"]]
    assert seen[0][0]["content"] == [{"type": "video", "video": "clip.mp4"}, {"type": "text", "text": "what is it?"}]
    assert seen[2][1]["content"][0]["text"] == "answer 1" and len(seen[2][2]["content"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "larp-mllm: no room"
    assert sum(line.startswith("larp-mllm: ") for line in errors) == 3 and "/video PATH shows" in errors[-2]
    assert errors[-1].startswith("/video PATH shows") and "/quit" in errors[-1]


def test_videos_to_show_outlast_an_error_that_is_not_theirs(clip, painter, monkeypatch, capsys):
    seen = []

    def chat(messages, **_):
        *shown, said = messages[-1]["content"]
        seen.append((said["text"], len(shown)))
        if said["text"] == "too long":
            raise ValueError("no room")
        if said["text"] == "unreadable":
            raise VideoError("clip.mp4: damaged")
        return {"role": "assistant", "content": []}

    monkeypatch.setattr(larp_mllm.api, "chat", chat)
    lines = ["/video clip.mp4", "too long", "shorter", "next", "/video clip.mp4", "unreadable", "without it"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    main(["chat"])
    assert seen == [("too long", 1), ("shorter", 1), ("next", 0), ("unreadable", 1), ("without it", 0)]


def test_a_conversation_is_answered_in_text_as_it_comes(clip, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand now?\n"))
    main(["chat", "--max-new-tokens", "4", "--max-videos", "0"])
    first, second = capsys.readouterr().out.splitlines()
    asked = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    answer = larp_mllm.chat(asked, max_new_tokens=4, max_videos=0, model=larp_mllm.api.open_model())
    assert answer["content"][0]["text"] == first and second


def test_a_terminal_gets_a_prompt_and_ctrl_d_ends(clip, capsys, monkeypatch):
    typed = iter(["hello"])

    def read(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    main(["chat", "--max-new-tokens", "4", "--max-videos", "0"])
    output = capsys.readouterr()
    assert "Ctrl-D ends" in output.err and len(output.out.splitlines()) == 2


@pytest.mark.parametrize("command", [["--help"], ["chat", "hello"], ["chat"]])
def test_a_closed_output_ends_a_command_silently(clip, monkeypatch, capfd, command):
    """As in `larp-mllm ... | head -1`."""
    answered = []

    def chat(messages, **_):
        print("a word", flush=True)
        answered.append(messages)

    monkeypatch.setattr(larp_mllm.api, "chat", chat)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n" * 3))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nowhere, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", nowhere)
        with pytest.raises(SystemExit) as stopped:
            main(command)
    assert stopped.value.code == 141 and capfd.readouterr() == ("", "") and not answered


@pytest.mark.parametrize("command", [["--help"], ["chat", "hello", "--max-new-tokens", "2", "--max-videos", "0"]])
def test_a_failing_output_is_one_message(clip, monkeypatch, capsys, command):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", full)
        assert "No space left on device" in refused(capsys, *command)


def test_chat_options_are_checked(clip, capsys):
    assert "suffix" not in refused(capsys, "chat", "hello", "--video", "gone.mp4")
    assert "max_videos" in refused(capsys, "chat", "hello", "--max-videos", "-1")
    assert "temperature" in refused(capsys, "chat", "hello", "--text-temperature", "-1")


def test_user_mistakes_end_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red circle", "--model", "nosuch"])
    assert stopped.value.code == 2
    assert "make quickstart" in capsys.readouterr().err


def test_paths_of_options_may_begin_at_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("LARP_MLLM_MODEL")
    main(["generate", "a red circle", "--out=~/x.mp4", "--model=~/model"])
    assert (folder / "x.mp4").is_file()
