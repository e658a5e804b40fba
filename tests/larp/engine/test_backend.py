"""Engines: stages and precisions, accumulation, skipped updates, learning rates, two engines, several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from larp.engine import backend, signals
from larp.engine import distributed as rank_module
from larp.engine.backend import EngineConfig, Ranks, make_engine, micro_batch, reduce_mean, reduce_sum
from larp.engine.schedules import lr_factor
from larp.engine.signals import run_script

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
STAGES = (0, 1, 2, 3)


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.module.state_dict().items()}


def plain_losses(steps, factor=lambda step: 1.0):
    """The same training in plain torch, with clipping at 1."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
    groups = [{"params": module[0].parameters(), "lr": 1e-2}, {"params": module[2].parameters(), "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.5, 0.9))
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)
        loss = (module(inputs) - targets).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group, lr in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = lr * factor(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_like_plain_torch(new_engine, train, stage, accumulation):
    factor = lr_factor("cosine", 6, 2, 0.1)
    engine = new_engine(EngineConfig(zero_stage=stage, accumulation=accumulation), factor)
    assert train(engine, 0, 6) == pytest.approx(plain_losses(6, factor), rel=1e-5)
    assert engine.step_count == 6 and engine.skipped_count == 0
    assert engine.lr == pytest.approx(1e-2 * factor(5))


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (2, "bf16"), (3, "bf16"), (0, "fp16")])
def test_lower_precision_stays_close_and_keeps_float32_weights(new_engine, train, stage, precision):
    engine = new_engine(EngineConfig(zero_stage=stage, precision=precision))
    assert train(engine, 0, 4) == pytest.approx(plain_losses(4), rel=0.02)
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    if stage < 3:
        inputs = torch.ones(2, 4)
        with engine.autocast():
            assert (
                engine.module(inputs).dtype
                == engine(inputs).dtype
                == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
            )


def test_deepspeed_does_not_time_its_throughput(new_engine):
    assert not new_engine()._engine.tput_timer.config.enabled


def test_step_returns_whether_weights_were_updated(new_engine):
    engine = new_engine(EngineConfig(accumulation=2))
    before = weights(engine)
    engine.backward(engine(torch.ones(4, 4)).mean())
    assert engine.step() is None and engine.step_count == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    engine.backward(engine(torch.ones(4, 4)).mean())
    assert engine.step() is True and engine.step_count == 1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (0, "fp16"), (1, "fp32"), (2, "bf16")])
def test_a_gradient_that_is_not_finite_changes_nothing(new_engine, train, stage, precision, accumulation):
    engine = new_engine(EngineConfig(zero_stage=stage, precision=precision, accumulation=accumulation))
    train(engine, 0, 2)
    before = weights(engine)
    for value in (float("inf"), 1.0)[:accumulation]:
        engine.backward((engine(torch.ones(8 // accumulation, 4)) * value).mean())
        applied = engine.step()
    assert applied is False and engine.grad_norm == float("inf")
    assert (engine.step_count, engine.skipped_count) == (3, 1)
    assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    assert all(loss < 100 for loss in train(engine, 3, 5)) and engine.skipped_count == 1


def test_too_many_skipped_steps_in_a_row_end_the_run(new_engine, train):
    engine = new_engine(max_skipped=2, name="generator")

    def poison():
        engine.backward((engine(torch.ones(8, 4)) * float("nan")).mean())
        return engine.step()

    assert poison() is False
    train(engine, 1, 2)
    assert poison() is False
    with pytest.raises(FloatingPointError, match=r"generator.*2 steps in a row.*step 4"):
        poison()


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_is_skipped_though_its_gradient_is_and_its_clips_are_named(new_engine, capsys, stage):
    engine = new_engine(EngineConfig(zero_stage=stage), name="generator")
    engine.clips_of = lambda step: [f"surf-{step}.mp4", "dive.mp4"]
    before = weights(engine) if stage < 3 else None
    engine.backward(engine(torch.ones(8, 4)).mean() + float("inf"))
    assert engine.step(41) is False and engine.is_skipping and engine.skipped_count == 1
    line = "step 42: loss or gradient of the generator is not finite, no update; its clips: surf-41.mp4, dive.mp4\n"
    assert capsys.readouterr().out == line
    if before is not None:
        assert all(torch.equal(value, before[name]) for name, value in weights(engine).items())
    engine.backward(engine(torch.ones(8, 4)).mean())
    assert engine.step() is True and not engine.is_skipping and capsys.readouterr().out == ""


@pytest.mark.parametrize("stage", STAGES)
def test_the_rate_of_each_group_is_used(new_engine, stage):
    engine = new_engine(EngineConfig(zero_stage=stage), factor=lambda step: float(step == 1))
    moved = []
    for _ in range(2):
        before = weights(engine) if stage < 3 else None
        engine.backward(engine(torch.ones(8, 4)).mean())
        engine.step()
        if before is not None:
            after = weights(engine)
            moved.append([(after[name] - before[name]).abs().max().item() for name in ("0.bias", "2.bias")])
    assert engine.lr == 1e-2
    if stage < 3:
        # Adam's first steps have the size of the rate itself.
        assert moved[0] == [0, 0] and moved[1] == pytest.approx([1e-2, 1e-3], rel=0.1)


def test_grad_norm_is_the_norm_before_clipping(new_engine):
    norms = []
    for stage in STAGES:
        engine = new_engine(EngineConfig(zero_stage=stage, clip_grad=0.01))
        assert engine.grad_norm is None
        engine.backward(engine(torch.ones(8, 4)).mean())
        engine.step()
        norms.append(engine.grad_norm)
    assert norms[0] > 0.1 and norms == pytest.approx([norms[0]] * len(STAGES), rel=1e-4)


def test_clipping_is_one_option_away(new_engine):
    moved = []
    for clip in (0.0, 1e-3):
        torch.manual_seed(0)
        module = nn.Linear(4, 1)
        engine = make_engine(
            module,
            torch.optim.SGD(module.parameters(), lr=1.0),
            lambda step: 1.0,
            EngineConfig(clip_grad=clip),
            8,
            Ranks(),
        )
        before = weights(engine)
        engine.backward(engine(torch.ones(8, 4)).mean())
        engine.step()
        moved.append(sum((value - before[name]).square().sum() for name, value in weights(engine).items()) ** 0.5)
    assert moved[0] > 1 and moved[1] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_engines_train_against_each_other(new_engine, stage):
    """A GAN step: the generator's loss uses the raw discriminator, which must get no gradient from it."""
    config = EngineConfig(zero_stage=stage, accumulation=2)
    generator, critic = new_engine(config), None
    torch.manual_seed(1)
    module = nn.Linear(1, 1)
    critic = make_engine(
        module,
        torch.optim.AdamW(module.parameters(), lr=1e-2),
        lambda s: 1.0,
        config,
        8,
        Ranks(),
        name="discriminator",
        max_zero_stage=2,
    )
    results = []
    for _ in range(4):
        critic.module.requires_grad_(False)
        fake = generator(torch.ones(4, 4))
        before = weights(critic)
        generator.backward(-critic.module(fake).mean())
        applied = generator.step()
        assert all(torch.equal(value, before[name]) for name, value in weights(critic).items())
        critic.module.requires_grad_(True)
        critic.backward(critic(fake.detach()).mean() - critic(torch.ones(4, 1)).mean())
        assert critic.step() is applied
        results.append(applied)
    assert results == [None, True, None, True]
    assert not torch.equal(weights(critic)["weight"], before["weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_overwritten_weight_stays_until_it_is_trained(new_engine, train, tmp_path, stage, precision):
    config = EngineConfig(zero_stage=stage, precision=precision)
    first = new_engine(config)
    train(first, 0, 1)
    first.save(tmp_path, "one", {})
    engine = new_engine(config, factor=lambda step: 0.0)
    engine.load(tmp_path, "one")
    value = torch.full((8, 4), 0.3)
    engine.overwrite(engine.module[0].weight, value)
    before = weights(engine)
    train(engine, 1, 2)
    assert all(torch.equal(after, before[name]) for name, after in weights(engine).items())
    assert torch.equal(engine.module[0].weight, value)


def test_invalid_settings_are_refused(new_engine):
    with pytest.raises(ValueError, match=r"discriminator.*another model.*wrong gradients.*0 to 2"):
        new_engine(EngineConfig(zero_stage=3), name="discriminator", max_zero_stage=2)
    with pytest.raises(ValueError, match="zero_stage is 4"):
        EngineConfig(zero_stage=4)
    with pytest.raises(ValueError, match="fp16 works at zero_stage 0 only"):
        EngineConfig(zero_stage=1, precision="fp16")
    with pytest.raises(ValueError, match="accumulation is 0"):
        EngineConfig(accumulation=0)
    with pytest.raises(ValueError, match="clip_grad is -1"):
        EngineConfig(clip_grad=-1)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_engine(frozen, torch.optim.SGD(frozen.parameters()), lambda s: 1.0, EngineConfig(), 8, Ranks())
    half = nn.Linear(2, 2).bfloat16()
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        make_engine(half, torch.optim.SGD(half.parameters()), lambda s: 1.0, EngineConfig(), 8, Ranks())


def test_micro_batch_names_the_numbers_that_do_not_divide():
    assert micro_batch(16, 2, Ranks(world_size=4)) == 2
    with pytest.raises(
        ValueError, match=r"batch_size 10 .* 2 micro batches .* 4 ranks: .* multiple of 8, for example 8"
    ):
        micro_batch(10, 2, Ranks(world_size=4))


def test_one_process_reduces_to_itself(ranks):
    assert reduce_mean({"a": torch.tensor(2.0), "b": 3}) == {"a": 2.0, "b": 3.0} and reduce_mean({}) == {}
    assert reduce_sum(torch.tensor([1, 2])).tolist() == [1, 2]
    assert backend.broadcast_object({"a": 1}) == {"a": 1}


def test_an_error_of_the_main_rank_is_raised_on_all_and_printed_once(monkeypatch, capsys):
    sent, worked = [], []

    def work():
        worked.append(rank_module.current_ranks().rank)
        raise ValueError("record 3 is damaged")

    # The two ranks run one after the other: the second receives what the first has broadcast.
    monkeypatch.setattr(rank_module, "broadcast_object", lambda obj: sent.append(obj) or sent[0])
    for rank in (0, 1):
        monkeypatch.setattr(rank_module, "_current", Ranks(rank, 2))
        with pytest.raises(SystemExit) as ended:
            run_script("x.py", lambda: rank_module.main_first(work))
        assert ended.value.code == 2
    assert worked == [0] and capsys.readouterr().err == "x.py: record 3 is damaged\n"


def test_collectives_have_a_long_timeout(ranks):
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert group.options._timeout >= timedelta(hours=12)


def test_start_can_follow_finish_and_seeds_alike():
    first = backend.start(3)
    sampled = torch.rand(2)
    assert backend.start(3) == first and torch.equal(torch.rand(2), sampled)
    backend.finish()
    backend.finish()
    assert "RANK" not in os.environ and not torch.distributed.is_initialized()
    assert backend.start(3) == first and torch.distributed.is_initialized()


def test_an_incomplete_environment_is_named():
    with pytest.raises(ValueError, match=r"RANK are set but LOCAL_RANK, MASTER_ADDR, MASTER_PORT, WORLD_SIZE are not"):
        rank_module.fill_in_environment({"RANK": "0"})


def test_sigterm_asks_to_stop_and_does_not_kill(ranks):
    assert not backend.stop_requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert backend.stop_requested()
    signals._requested.clear()


WORKER = """
import json, sys, torch
from larp.engine import backend
from larp.engine.backend import EngineConfig, make_engine, reduce_mean
from larp.engine.checkpoint import load_state, open_run, save_state
from torch import nn
stage, out, resume = int(sys.argv[1]), sys.argv[2], "--resume" in sys.argv
ranks = backend.start(0)
module = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
engine = make_engine(module, optimizer, lambda step: 1.0, EngineConfig(zero_stage=stage), 8, ranks)
state = open_run(out, {}, resume, 99)
if state:
    load_state({"model": engine}, state)
losses = []
rows = slice(ranks.rank * 8 // ranks.world_size, (ranks.rank + 1) * 8 // ranks.world_size)
for step in range(engine.step_count, engine.step_count + 4):
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)
    if ranks.rank == ranks.world_size - 1 and step == 2:
        inputs = inputs * float("nan")
    loss = (engine(inputs[rows]) - targets[rows]).square().mean()
    engine.backward(loss)
    applied = engine.step()
    assert applied is (step != 2), step
    losses.append(reduce_mean({"loss": loss})["loss"])
save_state({"model": engine}, out, engine.step_count, {})
assert backend.broadcast_object(ranks.rank) == 0
if ranks.is_main:
    print("RESULT " + json.dumps({"world": ranks.world_size, "losses": losses}), flush=True)
backend.finish()
"""


def launch(command, folder):
    script = folder / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run([*command(script)], env=environment, capture_output=True, text=True, timeout=90, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1].removeprefix("RESULT ")) if lines else done.stdout + done.stderr


def torchrun(count, *arguments):
    return lambda script: (
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone", script, *arguments]
        if count > 1
        else [sys.executable, script, *arguments]
    )


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 2])
def test_two_processes_train_to_the_losses_of_one(tmp_path, stage):
    one = launch(torchrun(1, str(stage), str(tmp_path / "one")), tmp_path)
    two = launch(torchrun(2, str(stage), str(tmp_path / "two")), tmp_path)
    assert isinstance(one, dict) and isinstance(two, dict), (one, two)
    assert (one["world"], two["world"]) == (1, 2)
    finite = [i for i in range(4) if i != 2]
    assert [two["losses"][i] for i in finite] == pytest.approx([one["losses"][i] for i in finite], rel=1e-5)
    # One rank resumes the checkpoint of two: directly at stage 0, else after the conversion that the error states.
    resumed = launch(torchrun(1, str(stage), str(tmp_path / "two"), "--resume"), tmp_path)
    if stage > 0:
        assert (
            isinstance(resumed, str) and "ds_to_universal" in resumed and "saved by 2 ranks, this run has 1" in resumed
        )
        command = next(line for line in resumed.splitlines() if "python -m deepspeed.checkpoint" in line).split()
        subprocess.run([sys.executable, *command[command.index("-m") :]], check=True, capture_output=True, timeout=90)
        resumed = launch(torchrun(1, str(stage), str(tmp_path / "two"), "--resume"), tmp_path)
    alike = launch(torchrun(1, str(stage), str(tmp_path / "one"), "--resume"), tmp_path)
    assert isinstance(resumed, dict), resumed
    assert resumed["losses"] == pytest.approx(alike["losses"], rel=1e-4)


ENDLESS = """
import os, sys, time
from larp.engine import backend
ranks = backend.start(0)
open(f"{sys.argv[-1]}/pid-{ranks.rank}", "w").write(str(os.getpid()))
while not backend.stop_requested():
    time.sleep(0.1)
open(f"{sys.argv[-1]}/left-{ranks.rank}", "w").write("saved")
backend.finish()
"""


@pytest.mark.slow
def test_the_ranks_leave_when_the_deepspeed_runner_is_killed(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    runner = Path(sys.executable).with_name("deepspeed")
    command = [
        sys.executable,
        runner,
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        tmp_path / "endless.py",
        tmp_path,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert wait_for(lambda: all((tmp_path / f"pid-{rank}").exists() for rank in (0, 1)), 90)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert wait_for(lambda: all((tmp_path / f"left-{rank}").exists() for rank in (0, 1)), 20)
    pids = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
    assert wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.2)
    return condition()
