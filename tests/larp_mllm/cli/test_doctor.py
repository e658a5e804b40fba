"""larp-mllm doctor: the printed report and the exit status."""

from larp.data.video import write_video
from larp_mllm.cli import main

import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path):
    """Two videos of 8 frames."""
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 16, 16, 3), dtype=np.uint8)
        write_video(tmp_path / f"{number}.mp4", pixels, 25)
    return tmp_path


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["doctor", *arguments])
    return stopped.value.code


def test_a_data_set_without_errors(folder, capsys):
    main(["doctor", "--data", str(folder), "--frames", "8"])
    output = capsys.readouterr().out
    assert (
        output.startswith(str(folder))
        and "train: 1 videos, 1 can be used" in output
        and "errors: 0, warnings: 0" in output
    )


def test_published_weights_are_listed(folder, capsys):
    main(["doctor"])
    table = capsys.readouterr().out
    assert "lpips " in table and "i3d " in table
    main(["doctor", "--data", str(folder), "--frames", "8"])
    assert capsys.readouterr().out.endswith("\n\n" + table)


def test_options_reach_the_doctor(folder, capsys):
    assert status("--data", str(folder)) == 1
    assert "0.mp4: has 8 frames, the clip needs 16" in capsys.readouterr().out
    assert status("--data", str(folder), "--frames", "8", "--stride", "2", "--lines", "0") == 1
    assert "the clip needs 15 at stride 2" in capsys.readouterr().out


def test_decoding_finds_damage_after_the_first_frame(folder, capsys):
    pixels = np.random.default_rng(2).integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
    write_video(folder / "torn.avi", pixels, 25)
    torn = (folder / "torn.avi").read_bytes()
    (folder / "torn.avi").write_bytes(torn[: len(torn) * 2 // 3])
    main(["doctor", "--data", str(folder), "--frames", "8"])
    assert status("--data", str(folder), "--frames", "8", "--decode") == 1
    assert "\n  torn.avi: " in capsys.readouterr().out


def test_a_mistake_is_one_line_and_status_2(folder, capsys):
    assert status("--data", str(folder / "absent")) == 2
    output = capsys.readouterr().err
    assert output.startswith("larp-mllm: data spec") and output.count("\n") == 1
    assert status("--data", str(folder), "--workers", "0") == 2
    capsys.readouterr()
    assert status("--data", str(folder), "--lines", "-1") == 2
    assert "--lines is -1" in capsys.readouterr().err
