"""eval/speed_gpu.py, rehearsed on tiny sizes: every measurement is taken and written down. Figures are the machine's."""

import json

from eval import speed_gpu

import pytest


@pytest.mark.slow
def test_a_rehearsal_takes_every_measurement(tmp_path, capsys):
    out = tmp_path / "new" / "speed.json"
    speed_gpu.main(["--device", "cpu", "--rehearse", "--out", str(out)])
    figures = json.loads(out.read_text())["measurements"]
    assert not [one for one in figures.values() if "error" in one or "skipped" in one]
    assert figures["attention, flash"]["operations_a_second"] > 0
    assert figures["copy"]["bytes_a_second"] > 0 and figures["matmul"]["operations_a_second"] > 0
    for name, size in (("LARP-L", 4), ("box", 2)):
        step = figures[f"{name} step, batch 2"]
        assert step["mfu"] > 0 and sum(step["parts"].values()) == pytest.approx(1, abs=1e-3)
        assert any(f"{name} step, batch {b}, compiled" in figures for b in range(2, size + 1, 2))
    one = figures["sampler, 1 clip"]
    assert list(one["milliseconds_at"]) == ["8", "24", "40", "56"] and one["seconds_of_a_whole_clip"] > 0
    assert sum(name.startswith("loss, ") for name in figures) == 8
    assert capsys.readouterr().out.count("clips/s") >= 7


@pytest.mark.slow
def test_what_is_chosen_is_measured_beside_the_ceilings(tmp_path):
    out = tmp_path / "speed.json"
    speed_gpu.main(["--device", "cpu", "--rehearse", "--out", str(out), "--only", "loss"])
    figures = json.loads(out.read_text())["measurements"]
    assert list(figures)[:2] == ["copy", "matmul"] and len(figures) == 10
    assert all(name.startswith("loss, ") for name in list(figures)[2:])


def test_the_clock_must_have_time():
    with pytest.raises(ValueError, match="minutes is 0"):
        speed_gpu.SpeedGpuConfig(minutes=0, device="cpu")
