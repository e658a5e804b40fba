"""The larp-mllm command."""

from larp_mllm.cli import main

import pytest


def test_generate_then_describe(qwen, tmp_path, capsys):
    qwen.save(tmp_path / "model")
    out = tmp_path / "clip.mp4"
    main(["generate", "a red circle", "-o", str(out), "-n", "2", "--model", str(tmp_path / "model"), "--device", "cpu"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "clip-0.mp4"), str(tmp_path / "clip-1.mp4")]
    main(["describe", str(tmp_path / "clip-0.mp4"), "--model", str(tmp_path / "model"), "--max-new-tokens", "3"])
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("command", [[], ["generate"], ["describe"]])
def test_help_says_what_to_type(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "--model" in capsys.readouterr().out


def test_user_mistakes_end_with_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "a red circle"])
    assert stopped.value.code == 2
    assert "make quickstart" in capsys.readouterr().err
