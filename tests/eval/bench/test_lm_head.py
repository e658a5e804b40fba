"""eval/bench/lm_head.py on small heads: both implementations agree, and the record holds every figure, whatever its value."""

import json
from dataclasses import replace

from bench import lm_head
from bench.lm_head import HeadCase, HeadSize, describe_heads, difference, one_pass
from eval import speed

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SIZE = HeadSize(hidden=16, vocab_size=400, codebook_size=48, positions=60, text_share=0.1, chunk=20)
CASES = [(batch, trained) for batch in lm_head.BATCHES for trained in (False, True)]


def options(tmp_path):
    sizes = [f"--head.{name.replace('_', '-')}={value}" for name, value in vars(SIZE).items()]
    return ["--what", "head", "--device", "cpu", "--pairs", "3", *sizes, "--out", str(tmp_path / "head.json")]


def test_the_head_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lm_head, "in_fresh_process", lambda work, *arguments: work(*arguments))
    report = speed.main(options(tmp_path))
    assert json.loads((tmp_path / "head.json").read_text()) == report
    assert "encode" not in report and "model" not in report
    for batch, trained in CASES:
        case = report["head"][f"{batch}, {'trained' if trained else 'frozen'}"]
        assert case["largest_difference"] < 1e-4
        ours, reference = case["ours"], case["reference"]
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert (
            len(ours["all_seconds"]) == 3 == len(ours["all_cpu_seconds"])
            and ours["share_of_rate"] > 0
            and ours["peak_memory"] > 1e8
        )
        assert ours["operations"] < reference["operations"]
    printed = capsys.readouterr().out
    assert "text only, trained" in printed and "GFLOP/s" in printed and "memory of the pass" in printed


@pytest.mark.parametrize("batch, trained", CASES)
@pytest.mark.parametrize("way", lm_head.WAYS)
def test_operations_are_those_that_torch_counts(batch, trained, way):
    case = HeadCase(SIZE, batch, trained, "cpu", "fp32")
    model = case.build()
    hidden, labels = case.inputs(model)
    # Some releases of transformers multiply the angles of positions, in a base without layers too.
    with FlopCounterMode(display=False) as body, torch.no_grad():
        model.base.base_model(inputs_embeds=hidden)
    with FlopCounterMode(display=False) as counter:
        if way == "reference":
            lm_head.reference_loss(model, hidden, labels).backward()
        else:
            model(inputs_embeds=hidden, labels=labels, head_chunk=SIZE.chunk).loss.backward()
    counted = sum(matmul.flops * (1 + matmul.gradients) for matmul in case.matmuls(way))
    assert counted == pytest.approx(counter.get_total_flops() - body.get_total_flops(), rel=1e-9)


def test_an_implementation_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_head, "in_fresh_process", lambda work, *arguments: work(*arguments))
    reference_loss = lm_head.reference_loss
    monkeypatch.setattr(lm_head, "reference_loss", lambda *arguments: reference_loss(*arguments) * 1.02)
    with pytest.raises(ValueError, match=r"differ by 0\.0.* \(mixed\)"):
        speed.main(options(tmp_path))
    assert not (tmp_path / "head.json").exists()


def test_gradients_are_compared_too():
    case = HeadCase(SIZE, "mixed", True, "cpu", "fp32")
    ours, reference = (one_pass(case, way) for way in lm_head.WAYS)
    assert difference(ours, reference) < 1e-5
    ours["gradients"][-1] = ours["gradients"][-1] * 0.9
    assert difference(ours, reference) == pytest.approx(0.1, rel=1e-3)


def test_sizes_that_cannot_be_are_refused():
    for wrong, message in (({"chunk": 1}, "chunk must be at least 2, got 1"), ({"text_share": 1.0}, "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            replace(SIZE, **wrong)


def test_the_table_names_both_implementations_of_each_case():
    own = {"seconds": 2.0, "all_seconds": [2.0] * 3, "cpu_seconds": 1.9, "floor_seconds": 1.0, "share_of_rate": 0.5}
    own |= {"peak_memory": 2**31, "memory_of_the_pass": 2**30}
    wall, cpu = ({"median": middle, "lowest": 0.1, "highest": 0.9} for middle in (0.25, 0.375))
    case = {"ours": own, "reference": own, "time_ratio": wall, "cpu_time_ratio": cpu, "matmul_rate": 5e9}
    lines = describe_heads({"mixed, frozen": case | {"memory_of_the_pass_ratio": 0.125}})
    assert lines[1].split()[2:] == ["ours", "2.000", "1.900", "1.000", "50.0%", "2.00", "1.00"]
    words = ("wall time 0.250 (0.100 to 0.900)", "CPU time 0.375", "3 pairs", "0.125", "5 GFLOP/s")
    assert all(figure in lines[-1] for figure in words)
