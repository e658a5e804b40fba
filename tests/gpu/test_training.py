"""The three trainings under DeepSpeed on a GPU: ZeRO 0, 2 and 3 in bfloat16, resuming after a kill, compiled blocks.

Each runs in a process of its own (tests.gpu.worker), begun before the first test.
"""

import math

import pytest

pytestmark = pytest.mark.gpu

TRAINED = ("tokenizer", "discriminator", "generator", "language model")
# Stage 3 is refused where another model's loss goes through the raw module.
ALLOWED = [(name, stage) for stage in (0, 2, 3) for name in (TRAINED if stage < 3 else TRAINED[2:])]


@pytest.mark.parametrize(("name", "stage"), ALLOWED)
def test_every_training_steps_at_every_stage(device, trainings, name, stage):
    found = trainings.result(f"zero{stage}")
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    run = found["trained"][name]
    assert run["device"] == device.type and run["skipped"] == 0
    assert all(math.isfinite(loss) for loss in run["losses"]) and 0 < run["grad_norm"] < math.inf
    assert stage == 3 or 0 < run["moved"] < 0.1
    if stage < 3 and name in ("tokenizer", "generator"):
        assert run["average"] == device.type
    if name == "generator":
        assert run["sampled"] == [2, 16]
    if name == "tokenizer":
        assert run["decoded"] == [8, 3, 8, 32, 32]
    plain = trainings.result("zero0")["trained"][name]["losses"]
    assert run["losses"] == pytest.approx(plain, rel=0.02, abs=0.02), "the stages train alike"


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_changes_no_weight(device, trainings, stage):
    found = trainings.result(f"zero{stage}")["trained"]["tokenizer"]["poisoned"]
    assert found == {"kept": True, "counted": 1, "grad_norm": True}


def test_a_step_of_the_tokenizer_does_not_wait_for_the_device(device, trainings):
    """At stage 0, but for what the trainer itself asks: the program then runs ahead, and the GPU always has work."""
    found = trainings.result("zero0")["trained"]["tokenizer"]["waits"]
    print("waited for the device at", found)
    own = ("backend.py", "device_steps.py", "averaging.py", "optimizer.py", "noise.py", "prior.py", "codescores.py")
    own += ("quantizer.py", "layers.py", "products.py", "tokenizer.py")
    assert not [place for place in found if "/larp/" in place and place.split(":")[0].endswith(own)]


def test_a_run_goes_on_after_a_kill_to_the_same_weights(device, trainings):
    whole, cut = trainings.result("whole"), trainings.result("cut")
    assert (whole["began"], cut["began"]) == (0, 3) and cut["reached"] and not whole["reached"]
    for part in ("tokenizer", "discriminator", "average"):
        assert cut[part] == whole[part], part


@pytest.mark.parametrize("model", ["tokenizer", "generator"])
def test_compiled_blocks_give_the_losses_and_gradients_of_plain_ones(device, trainings, model):
    found = trainings.result("compile")[model]
    assert found["compiled"] == pytest.approx(found["plain"], rel=1e-3)
    assert found["gradient_error"] < 5e-3


def test_deepspeed_builds_nothing(device, trainings):
    """A C++ or CUDA helper takes a minute to build, and one whose build was killed hangs every later run."""
    for stage in (0, 2, 3):
        trainings.result(f"zero{stage}")
    built = [path for path in (trainings.folder / "extensions").rglob("*") if path.is_file()]
    assert not built, built
