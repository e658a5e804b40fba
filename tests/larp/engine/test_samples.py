"""larp/engine/samples.py: the conditions of the samples, and the effect of every option."""

from larp.data.token_cache import TokenCache
from larp.engine.distributed import Ranks
from larp.engine.samples import Samples, SamplingConfig
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import numpy as np
import pytest
import torch

N, K = 4, 32
SIDES = {
    f"{side}_{name}": 16 if name == "width" else 1 for side in ("encoder", "decoder") for name in ("width", "depth")
}


@pytest.fixture(scope="module")
def tokenizer() -> LarpTokenizer:
    torch.manual_seed(0)
    shape = dict(num_frames=8, height=16, width=16, patch_size=(8, 8, 8), num_tokens=N, codebook_size=K, code_dim=8)
    heads = dict(encoder_heads=2, decoder_heads=2)
    model = LarpTokenizer(TokenizerConfig(**shape, **SIDES, **heads, init="balanced", prior=PriorConfig(enabled=False)))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model.eval()


def cache_of(rows: int, fps: float) -> TokenCache:
    """A cache of random codes with conditions."""
    codes = torch.randint(K, (rows, N), generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(rows)
    names = tuple(f"v{row}.mp4" for row in range(rows))
    return TokenCache(
        {"num_tokens": N, "codebook_size": K}, codes, codes.flip(1), numbers % 2, numbers, numbers * 0, numbers < 0,
        torch.full((rows,), fps, dtype=torch.float64), names, (None,) * rows, ("Archery", "Surfing"), (), "",
    )  # fmt: skip


def model_of(task: str) -> LarpGenerator:
    torch.manual_seed(2)
    classes = dict(num_classes=2, class_names=("Archery", "Surfing")) if task == "class" else dict(null_condition=True)
    model = LarpGenerator(
        GeneratorConfig(task, N, K, depth=1, heads=2, width=16, ffn_multiple=16, dropout=0.5, **classes)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def sampled(tokenizer, task="class", ranks=Ranks(), clips=4, **options) -> np.ndarray:  # noqa: B008 (frozen)
    config = SamplingConfig(clips=clips, **options)
    model = model_of(task)
    samples = Samples(clips, config.resolve(1.25), tokenizer, cache_of(6, 25.0), model.config, 5, ranks)
    return np.stack(samples.sample(model))


def test_conditions_are_the_classes_in_turn_or_evenly_spaced_clips(tokenizer):
    config, cache = SamplingConfig(), cache_of(6, 25.0)
    for task, names in (("class", ["Archery", "Surfing", "Archery"]), ("frame-prediction", ["v0", "v2", "v4"])):
        samples = Samples(3, config.resolve(1.0), tokenizer, cache, model_of(task).config, 0, Ranks())
        assert samples.names == names and len(samples.condition) == 3 and samples.fps == 25.0
    assert torch.equal(samples.condition[:, :N], cache.codes[[0, 2, 4]].flip(1))
    few = Samples(9, config.resolve(1.0), tokenizer, cache, model_of(task).config, 0, Ranks())
    assert few.names == [f"v{row}" for row in range(6)], "no clip comes twice"


@pytest.mark.parametrize("task", ["class", "frame-prediction"])
@pytest.mark.parametrize(
    "options",
    [
        dict(guidance_scale=3.0), dict(guidance_final=4.0), dict(guidance_start=0.7), dict(guidance_stop=0.3),
        dict(temperature=0.2), dict(top_k=2), dict(top_p=0.2), dict(min_p=0.9),
    ],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_every_option_has_an_effect(tokenizer, task, options):
    plain = dict(guidance_scale=2.5) if "guidance_scale" not in options else {}
    assert not np.array_equal(sampled(tokenizer, task, **plain, **options), sampled(tokenizer, task, **plain))


def test_each_rank_samples_its_share_of_the_same_clips(tokenizer):
    whole = sampled(tokenizer, clips=5)
    parts = []
    for rank in (0, 1):
        samples_of_rank = sampled(tokenizer, clips=5, ranks=Ranks(rank, 2))
        parts.append(samples_of_rank)
    assert [len(part) for part in parts] == [2, 3] and np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(every=-1), "sampling.every is -1"),
        (dict(clips=-1), "sampling.clips is -1"),
        (dict(guidance_scale=-1.0), "guidance_scale is -1.0"),
        (dict(guidance_final=float("nan")), "guidance_final is nan"),
        (dict(guidance_start=0.9, guidance_stop=0.2), "start < stop"),
        (dict(min_p=2.0), "min_p is 2.0"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingConfig(**options)
