"""larp-mllm fetch: the table, the files, one line for each failure."""

from larp.metrics import fetching
from larp_mllm.cli import main

import pytest


def test_without_a_name_it_lists(capsys):
    main(["fetch"])
    output = capsys.readouterr().out
    assert output.splitlines()[0].split() == ["name", "local", "files", "download", "licence", "what"]
    assert "\nlpips  " in output and "\ni3d  " in output


def test_an_unknown_name_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "lpips", "vgg"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "larp-mllm: there is no 'vgg' to fetch: choose lpips, lpips-alexnet, i3d, smollm2 or all\n"
    )


def test_a_failure_does_not_stop_the_others(capsys, monkeypatch, tmp_path):
    def fetch(source, say):
        if source.name == "i3d":
            raise ValueError("i3d cannot be fetched")
        return (tmp_path / source.name,)

    monkeypatch.setattr(fetching, "fetch", fetch)
    with pytest.raises(SystemExit) as stopped:
        main(["fetch", "i3d", "all"])
    output = capsys.readouterr()
    assert stopped.value.code == 1 and output.err == "larp-mllm: i3d cannot be fetched\n"
    assert output.out.split() == [str(tmp_path / name) for name in ("lpips", "lpips-alexnet", "smollm2")]
    main(["fetch", "lpips", "lpips"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "lpips")]
