"""larp-mllm fetch: the table, the files, one line for what could not be had."""

from larp.metrics import fetching
from larp_mllm.cli import main

import pytest


def test_without_a_name_it_lists(capsys):
    main(["fetch"])
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["name", "at", "hand", "download", "licence", "what"]
    assert "\nlpips  " in said and "\ni3d  " in said


def test_an_unknown_name_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "lpips", "vgg"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "larp-mllm: there is no 'vgg' to fetch: choose lpips, lpips-alexnet, i3d or all\n"
    )


def test_what_fails_does_not_hold_up_the_rest(capsys, monkeypatch, tmp_path):
    def fetch(source, say):
        if source.name == "i3d":
            raise ValueError("i3d cannot be fetched")
        return (tmp_path / source.name,)

    monkeypatch.setattr(fetching, "fetch", fetch)
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "i3d", "all"])
    said = capsys.readouterr()
    assert stopped.value.code == 1 and said.err == "larp-mllm: i3d cannot be fetched\n"
    assert said.out.split() == [str(tmp_path / name) for name in ("lpips", "lpips-alexnet")]
    main(["fetch", "lpips", "lpips"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "lpips")]
