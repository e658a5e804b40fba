"""eval/bench/measurements.py: a measurement that fails, or has no time, costs only itself."""

import json

from bench.measurements import Measurements
from eval import speed_gpu

import torch


def test_a_measurement_that_fails_or_has_no_time_costs_only_itself(tmp_path):
    out, device = tmp_path / "speed.json", torch.device("cpu")
    take = Measurements(out, device, 60, {"machine": "some"})

    def breaks():
        raise RuntimeError("out of luck\nand of memory")

    take.take("first", breaks)
    assert take.take("second", lambda: {"seconds": 1.0})["seconds"] == 1
    assert "needs about 99 s" in take.take("third", breaks, needs=99)["skipped"]
    record = json.loads(out.read_text())
    assert record["machine"] == "some" and list(record["measurements"]) == ["first", "second", "third"]
    assert record["measurements"]["first"]["error"] == "RuntimeError: out of luck\nand of memory"
    lines = speed_gpu.table(record)
    assert "error: RuntimeError: out of luck" in lines[0] and "skipped" in lines[2]
