"""The text of an exported model's answer becomes videos; what is no video is named, and nothing that decodes is lost."""

import io
import json
import sys
from types import SimpleNamespace

from larp.data.video import read_video
from larp_mllm.cli import main
from larp_mllm.export.answer_text import read_answer
from larp_mllm.export.checkpoint import export, read_video_ids

import numpy as np
import pytest

START, END = "<|video_start|>", "<|video_end|>"
A, B = (3, 1, 15, 0), (7, 7, 2, 9)


def tokens(codes, between="") -> str:
    return between.join(f"<|code_{code}|>" for code in codes)


def span(codes) -> str:
    return f"{START}{tokens(codes)}{END}"


@pytest.fixture(scope="module")
def folder(qwen, tmp_path_factory):
    return export(qwen, tmp_path_factory.mktemp("export") / "out")


def found(folder, text):
    videos, broken = read_answer(folder, text)
    return [video.codes for video in videos], broken


@pytest.mark.parametrize(
    "text, codes",
    [
        (span(A), [A]),
        (f"Here: {span(A)} and {span(B)}.", [A, B]),
        (f"{START} {tokens(A, ' ')}\n{END}", [A]),  # vLLM puts spaces between special tokens
        (START + tokens(A), [A]),  # cut before video_end
        (json.dumps([START + tokens(A)]), [A]),
        (tokens(A) + END, [A]),  # a completion whose prompt ends with video_start
        (f"{tokens(A)} or {tokens(B)}", [A, B]),
        (json.dumps({"choices": [{"message": {"content": text}} for text in (span(A), span(B))]}), [A, B]),
    ],
)
def test_whole_videos(text, codes, folder):
    assert found(folder, text) == (codes, [])


@pytest.mark.parametrize(
    "text, codes, broken",
    [
        (span(A[:3]), [], "video 1 of 1 has 3 codes, not 4"),
        (span([*A, 1]), [], "video 1 of 1 has 5 codes, not 4"),
        (START + END, [], "video 1 of 1 has 0 codes, not 4"),
        (f"{START}{tokens(A[:2])} a wave {tokens(A[2:])}{END}", [], "video 1 of 1 has 'a wave' among its codes"),
        (span([1, 2, 3, 16]), [], "video 1 of 1 has code 16, the last is 15"),
        (span([1, 2, 10**30, 3, 4]), [], f"video 1 of 1 has '<|code_{10**30}|>' among its codes"),
        (json.dumps([START + tokens(A[:3])]), [], "video 1 of 1 has 3 codes, not 4"),
        (span(A) + START + tokens(A[:1]) + span(B), [A, B], "video 2 of 3 has 1 codes, not 4"),
        (tokens(A[:2]), [], "video 1 of 1 has 2 codes, not 4"),
    ],
)
def test_what_is_no_video_is_named_and_the_others_are_there(text, codes, broken, folder):
    assert found(folder, text) == (codes, [broken])


@pytest.mark.parametrize("text", ["", "A wave.", END, "<|video|>", "<|code_|>"])
def test_a_text_without_a_video(text, folder):
    with pytest.raises(ValueError, match=rf"has no video, .* it has {len(text)} characters") as refused:
        read_answer(folder, text)
    assert repr(text) in str(refused.value)


def test_the_frames_are_those_of_the_codes(folder, qwen):
    ((video,), _) = read_answer(folder, span(A))
    assert np.array_equal(video.frames, read_video_ids(folder, qwen.model.vocabulary.span(A)).frames)
    assert video.fps == qwen.model.config.fps


def test_the_command_reads_a_file_or_standard_input(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "answer.txt").write_text(span(A))
    main(["decode-tokens", str(folder), str(tmp_path / "answer.txt"), "-o", str(tmp_path / "a.mp4"), "--scale", "1"])
    assert len(read_video(tmp_path / "a.mp4", 0, 4)[0]) == 4
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(f"Two: {span(A)}{span(B)}".encode())))
    main(["decode-tokens", str(folder), "-o", str(tmp_path / "b.gif")])
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in ("a.mp4", "b-0.gif", "b-1.gif")]
    assert (tmp_path / "b-1.gif").stat().st_size > 0


def test_the_command_writes_what_decodes_and_names_the_rest(folder, tmp_path, capsys):
    answer = tmp_path / "answer.txt"

    def refused(text: bytes) -> str:
        answer.write_bytes(text)
        with pytest.raises(SystemExit) as stopped:
            main(["decode-tokens", str(folder), str(answer), "-o", str(tmp_path / "a.mp4")])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "video 2 of 2 has 3 codes, not 4; 1 written. Let the server" in refused((span(A) + span(B[:3])).encode())
    assert (tmp_path / "a.mp4").stat().st_size > 0
    assert "not 4; none written" in refused(span(B[:3]).encode())
    assert "has no video" in refused(b"A wave.")
    assert f"{answer} is not text in UTF-8" in refused(b"\xff")
