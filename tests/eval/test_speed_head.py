"""`eval/speed.py --what head` on small heads: both ways agree, and every figure is there; figures themselves are the machine's."""

import json
from dataclasses import replace

from bench import head_speed
from bench.head_speed import HeadCase, HeadSize, describe_heads, difference, one_pass
from eval import speed

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

SIZE = HeadSize(hidden=16, vocab_size=400, codebook_size=48, positions=60, text_share=0.1, chunk=20)
CASES = [(batch, trained) for batch in head_speed.BATCHES for trained in (False, True)]


def options(tmp_path):
    sizes = [f"--head.{name.replace('_', '-')}={value}" for name, value in vars(SIZE).items()]
    return ["--what", "head", "--device", "cpu", "--rounds", "2", *sizes, "--out", str(tmp_path / "head.json")]


def test_the_head_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(head_speed, "in_fresh_process", lambda work, *arguments: work(*arguments))
    report = speed.main(options(tmp_path))
    assert json.loads((tmp_path / "head.json").read_text()) == report
    assert "encode" not in report and "model" not in report
    for batch, trained in CASES:
        case = report["head"][f"{batch}, {'trained' if trained else 'frozen'}"]
        assert case["largest_difference"] < 1e-4
        ours, plain = case["ours"], case["plain"]
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert len(ours["all_seconds"]) == 2 and ours["share_of_rate"] > 0 and ours["peak_memory"] > 1e8
        assert ours["operations"] < plain["operations"]
    printed = capsys.readouterr().out
    assert "text only, trained" in printed and "GFLOP/s" in printed and "memory of the pass" in printed


@pytest.mark.parametrize("batch, trained", CASES)
@pytest.mark.parametrize("plain", [False, True])
def test_operations_are_those_that_torch_counts(batch, trained, plain):
    case = HeadCase(SIZE, batch, trained, "cpu", "fp32")
    model = case.build()
    hidden, labels = case.inputs(model)
    # Some releases of transformers multiply the angles of positions, in a base without layers too.
    with FlopCounterMode(display=False) as body, torch.no_grad():
        model.base.base_model(inputs_embeds=hidden)
    with FlopCounterMode(display=False) as counter:
        if plain:
            head_speed.plain_loss(model, hidden, labels).backward()
        else:
            model(inputs_embeds=hidden, labels=labels, head_chunk=SIZE.chunk).loss.backward()
    counted = sum(product.flops * (1 + product.gradients) for product in case.products(plain))
    assert counted == pytest.approx(counter.get_total_flops() - body.get_total_flops(), rel=1e-9)


def test_a_way_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(head_speed, "in_fresh_process", lambda work, *arguments: work(*arguments))
    plain = head_speed.plain_loss
    monkeypatch.setattr(head_speed, "plain_loss", lambda *arguments: plain(*arguments) * 1.02)
    with pytest.raises(ValueError, match=r"differ by 0\.0.* \(mixed\)"):
        speed.main(options(tmp_path))
    assert not (tmp_path / "head.json").exists()


def test_gradients_are_compared_too():
    case = HeadCase(SIZE, "mixed", True, "cpu", "fp32")
    ours, plain = one_pass(case, plain=False), one_pass(case, plain=True)
    assert difference(ours, plain) < 1e-5
    ours["gradients"][-1] = ours["gradients"][-1] * 0.9
    assert difference(ours, plain) == pytest.approx(0.1, rel=1e-3)


def test_sizes_that_cannot_be_are_refused():
    for wrong, message in (({"chunk": 1}, "chunk must be at least 2, got 1"), ({"text_share": 1.0}, "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            replace(SIZE, **wrong)


def test_the_table_names_both_ways_of_each_case():
    own = {"seconds": 2.0, "cpu_seconds": 1.9, "floor_seconds": 1.0, "share_of_rate": 0.5}
    own |= {"peak_memory": 2**31, "memory_of_the_pass": 2**30}
    case = {"ours": own, "plain": own, "time_ratio": {"median": 0.25, "cpu_median": 0.375}, "multiply_rate": 5e9}
    lines = describe_heads({"mixed, frozen": case | {"memory_of_the_pass_ratio": 0.125}})
    assert lines[1].split()[2:] == ["ours", "2.000", "1.900", "1.000", "50.0%", "2.00", "1.00"]
    assert all(figure in lines[-1] for figure in ("time ratio 0.250", "0.375", "0.125", "5 GFLOP/s"))
