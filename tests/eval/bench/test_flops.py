"""eval/bench/flops.py: the operations of both implementations are those that torch counts."""

from dataclasses import replace

from bench import flops
from bench.reference import ReferenceTokenizer, reference_discriminator
from eval import speed
from larp.engine.adversary import AdversaryConfig
from larp.kernels import matmul
from larp.models.discriminator import Discriminator
from larp.models.prior import PriorConfig
from larp.models.tokenizer_config import TokenizerConfig
from tests.eval.bench.test_reference import ADVERSARY, CONFIG, build

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(work) -> int:
    """What torch counts, where it knows every operation: without oneDNN's matmuls and fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("pruned", [True, False], ids=["ours", "reference"])
def test_operations_are_those_that_torch_counts(monkeypatch, pruned):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    model, clip, discriminator = build(), torch.rand(2, 3, *CONFIG.clip_shape), Discriminator(ADVERSARY)
    way, score = (
        (model, discriminator)
        if pruned
        else (ReferenceTokenizer(model), lambda x: reference_discriminator(discriminator, x))
    )
    codes = model.encode(clip)
    assert counted(lambda: way.encode(clip)) == flops.forward_flops(flops.encode_matmuls(CONFIG, 2, pruned))
    assert counted(lambda: way.decode(codes)) == flops.forward_flops(flops.decode_matmuls(CONFIG, 2, pruned))
    subject = speed.Subject(CONFIG, AdversaryConfig(), speed.LossConfig(), speed.SpeedConfig(device="cpu"))
    optimizers = {module: torch.optim.SGD(module.parameters()) for module in (model, discriminator)}
    alone = dict(list(optimizers.items())[:1])
    assert counted(lambda: speed.step_once(subject, way, None, alone, clip)) == flops.step_flops(
        CONFIG, None, 2, pruned
    )
    assert counted(lambda: speed.step_once(subject, way, score, optimizers, clip)) == flops.step_flops(
        CONFIG, ADVERSARY, 2, pruned
    )


def test_the_papers_size():
    ours, reference = (
        flops.forward_flops(
            flops.encode_matmuls(TokenizerConfig(), 1, pruned) + flops.decode_matmuls(TokenizerConfig(), 1, pruned)
        )
        for pruned in (True, False)
    )
    assert 0.96 < ours / reference < 0.97 and round(reference / 1e9) == 1008


def test_without_a_prior_it_costs_nothing():
    bare = replace(CONFIG, prior=PriorConfig(enabled=False))
    assert not flops.prior_matmuls(bare) and flops.step_flops(bare) < flops.step_flops(CONFIG)
