"""The recipes of the generators: those of the paper hold every value that its authors' code takes, and all build."""

import dataclasses
from types import SimpleNamespace

from larp.config import from_dict, load_recipe
from larp.engine.optimizer import OptimizerConfig
from training.train_generator import RECIPES, TrainGeneratorConfig, build_model

import pytest
import torch


def recipe(name: str) -> TrainGeneratorConfig:
    return from_dict(TrainGeneratorConfig, load_recipe(name, RECIPES), name)


@pytest.mark.parametrize(
    ("name", "codes", "codebook", "millions"),
    [
        ("generator-shapes32", 16, 512, 1.2),
        ("generator-shapes32-fp", 16, 512, 1.2),
        ("generator-ucf64", 128, 1024, 1.3),
        ("generator-ucf64-fp", 128, 1024, 1.3),
        ("generator-box-gpu", 256, 8192, 2.8),
        ("generator-box-cpu", 256, 8192, 2.8),
        ("larp-l-long-ar", 1024, 8192, 632),
        ("larp-l-long-ar-fp", 1024, 8192, 633),
    ],
)
def test_recipes_build_models_of_their_size(name, codes, codebook, millions):
    config, classes = recipe(name), tuple(map(str, range(101)))
    key = {"num_tokens": codes, "codebook_size": codebook, "tokenizer": ""}
    with torch.device("meta"):
        tokenizer = SimpleNamespace(codebook=torch.empty(codebook, 8))
        model = build_model(config, SimpleNamespace(key=key, classes=classes), tokenizer)
    assert config.in_steps(392_622).steps > config.optimizer.warmup
    frames = name.endswith("-fp")
    assert model.config.task == config.task == ("frame-prediction" if frames else "class")
    assert model.config.positions == (2 * codes if frames else codes)
    assert round(model.num_parameters() / 1e6, 1 if millions < 10 else None) == millions


@pytest.mark.parametrize("name", ["larp-l-long-ar", "larp-l-long-ar-fp"])
def test_recipes_of_the_published_generators(name):
    """Read from the authors' configurations and scripts (hywang66/LARP), as they take effect there."""
    config = recipe(name)
    optimizer = OptimizerConfig("adamw", 6e-4, betas=(0.9, 0.95), weight_decay=0.05, schedule="cosine", final=0.01)
    videos, epochs, warm = (9537, 3000, 4) if name == "larp-l-long-ar" else (392_622, 75, 1)
    steps = videos // 64
    assert config.optimizer == dataclasses.replace(optimizer, warmup=pytest.approx(warm * steps, abs=2))
    assert config.in_steps(videos).steps == pytest.approx(epochs * steps, rel=1e-3)
    assert (config.size, config.batch_size, config.seed, config.flips, config.stride) == ("LP", 64, 66667, False, 1)
    assert (config.dropout, config.ema, config.engine.precision, config.engine.clip_grad) == (0.1, 0.0, "bf16", 0.0)
    sampling = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, guidance_final=None)
    assert all(getattr(config.sampling, option) == value for option, value in sampling.items())
    if name == "larp-l-long-ar":
        assert (config.dropped, config.sampling.guidance_scale) == (0.1, 1.25)
    else:
        assert (config.dropped, config.sampling.guided, config.condition_frames) == (0.0, False, 5)
        assert config.data.startswith("k600:")
