"""The larp-mllm command."""

import larp_mllm.generation
import larp_mllm.video
from larp_mllm.cli import COMMANDS, main

import pytest


def test_generate_then_describe(qwen, tmp_path, capsys):
    qwen.save(tmp_path / "model")
    capsys.readouterr()  # saving makes transformers import deepspeed, which says so once in a process
    out = tmp_path / "clip.mp4"
    main(["generate", "a red circle", "-o", str(out), "-n", "2", "--model", str(tmp_path / "model"), "--device", "cpu"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "clip-0.mp4"), str(tmp_path / "clip-1.mp4")]
    main(["describe", str(tmp_path / "clip-0.mp4"), "--model", str(tmp_path / "model"), "--max-new-tokens", "3"])
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("command", [[], *([command.__name__.split(".")[-1]] for command in COMMANDS)])
def test_help_says_what_to_type(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(['larp-mllm', *command])} ") and "options:" in said


def test_ctrl_c_ends_a_command_with_one_line(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(larp_mllm.generation, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red circle", "-o", str(tmp_path / "x.mp4")])
    assert stopped.value.code == 130 and capsys.readouterr().err == "larp-mllm: stopped\n"


@pytest.fixture
def folder(qwen, tmp_path, monkeypatch):
    """The working folder of a user who has a model."""
    qwen.save(tmp_path / "model")
    monkeypatch.setenv("LARP_MLLM_MODEL", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *arguments) -> str:
    """What the command says when it ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("larp-mllm: ") and said.count("\n") == 1
    return said


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
def test_a_bad_out_is_refused_before_a_model_is_looked_for(folder, monkeypatch, capsys, out, words):
    monkeypatch.setattr(larp_mllm.generation, "find_model", lambda *_: pytest.fail("a model was looked for"))
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


def test_what_the_disk_refuses_is_one_message(folder, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "x.mp4")

    monkeypatch.setattr(larp_mllm.video.Video, "save", full)
    assert "No space left on device: 'x.mp4'" in refused(capsys, "generate", "a red circle")


def test_user_mistakes_end_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red circle"])
    assert stopped.value.code == 2
    assert "make quickstart" in capsys.readouterr().err
