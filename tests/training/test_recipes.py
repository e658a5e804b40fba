"""The recipes of the published tokenizer: every value that its authors' code takes, and what the variants change."""

from pathlib import Path

from larp.config import from_dict, load_recipe, parse, to_dict
from larp.data.datasets import split_specs
from larp.engine.backend import Ranks, micro_batch
from larp.models.discriminator import Discriminator
from larp.models.prior import PRIOR_SIZES
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from training.train_generator import TrainGeneratorConfig
from training.train_tokenizer import RECIPES, TrainTokenizerConfig

import pytest
import torch

VARIANTS = ("larp-l-long-as-printed", "larp-l-long-8gpu", "larp-l-long-1gpu")


def recipe(name: str) -> TrainTokenizerConfig:
    return from_dict(TrainTokenizerConfig, load_recipe(name, RECIPES), where=name)


def flat(config: dict, prefix: str = "") -> dict:
    pairs = {}
    for name, value in config.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return pairs


def changes(name: str) -> dict:
    """What a recipe has other than `larp-l-long`."""
    base, other = (flat(to_dict(recipe(n))) for n in ("larp-l-long", name))
    return {key: value for key, value in other.items() if value != base[key]}


def test_the_recipe_holds_what_reproduces_the_released_weights():
    """Read from the authors' configuration and script (hywang66/LARP), as it takes effect there."""
    config = recipe("larp-l-long")
    assert config.model == TokenizerConfig.of_size("L")
    assert (config.model.prior.depth, config.model.prior.heads, config.model.prior.width) == PRIOR_SIZES["S"]
    wanted = {
        "epochs": 150, "batch_size": 128, "seed": 66667, "flip": False, "ema": 0.0, "mix_peak": 0.5, "mix_ramp": 0.3,
        "model.codebook_size": 8192, "model.code_dim": 16, "model.temperature": 0.03, "model.stochastic": True,
        "model.prior.rounds": 2, "model.prior.dropout": 0.1, "model.prior.temperature": 1.0,
        "loss.l1": 1.0, "loss.l2": 0.0, "loss.lpips": 1.0, "loss.quantizer": 0.1, "loss.commitment": 0.25,
        "loss.prior": 0.06, "loss.gan": 0.3, "loss.gan_start": 0, "loss.gan_every": 5, "loss.gan_kind": "smooth",
        "loss.lecam": 1e-6, "loss.r1": 0.0,
        "optimizer.name": "adam", "optimizer.lr": 1e-4, "optimizer.prior_lr": None, "optimizer.betas": [0.5, 0.9],
        "optimizer.schedule": "cosine", "optimizer.warmup_epochs": 8, "optimizer.final": 0.01,
        "adversary.hidden": 512, "adversary.depth": 12, "adversary.heads": 8, "adversary.lr": 3e-5,
        "engine.precision": "bf16", "engine.clip_grad": 0.0,
    }  # fmt: skip
    found = flat(to_dict(config))
    assert {key: found[key] for key in wanted} == wanted
    assert [spec.split(":")[0] for spec in split_specs(config.data)] == ["k600", "ucf101"]


def test_the_recipe_says_every_value_of_the_model_the_losses_and_the_optimizer_itself():
    """So that it stays the paper's when a default changes; left out is only what it does not use."""
    said = set(flat(load_recipe("larp-l-long", RECIPES)))
    unused = {
        "model.decoder_patch_size",
        "loss.r1_every",
        "optimizer.matrix_lr",
        "optimizer.prior_lr",
        "optimizer.warmup",
    }
    unused |= {"optimizer.milestones", "optimizer.gamma"}
    groups = ("model.", "loss.", "optimizer.", "adversary.")
    assert {key for key in flat(to_dict(recipe("larp-l-long"))) if key.startswith(groups)} == {
        key for key in said | unused if key.startswith(groups)
    }


@pytest.mark.parametrize("name", ["larp-l-long", *VARIANTS])
def test_models_of_the_published_size(name):
    config = recipe(name)
    with torch.device("meta"):
        model = LarpTokenizer(config.model)
        judge = Discriminator(config.adversary.discriminator(config.model))
    prior = sum(p.numel() for p in model.prior.parameters())
    assert round(prior / 1e6, 1) == 21.7
    # 172.2 M learned numbers; the paper's 173.0 M count one more table of 1024 x 768.
    assert round((model.num_parameters() - prior) / 1e6, 1) == 172.2
    assert round((model.num_parameters() - prior + 1024 * 768) / 1e6, 1) == 173.0
    assert round(judge.num_parameters() / 1e6, 1) == 38.2


def test_as_printed_changes_what_the_published_scripts_print():
    assert changes("larp-l-long-as-printed") == {"flip": True, "loss.lecam": 1e-3, "optimizer.prior_lr": 50 * 1e-4}


@pytest.mark.parametrize(("name", "gpus", "clips"), [("larp-l-long-8gpu", 8, 8), ("larp-l-long-1gpu", 1, 8)])
def test_variants_for_machines_train_the_same_model_on_the_same_batch(name, gpus, clips):
    assert all(key.startswith("engine.") for key in changes(name))
    config = recipe(name)
    ranks = Ranks(0, gpus, 0, torch.device("cpu"))
    assert micro_batch(config.batch_size, config.engine.accumulation, ranks) == clips
    assert config.engine.compile and config.engine.zero_stage <= 2


def test_the_run_has_its_published_length():
    steps = recipe("larp-l-long").in_steps(400_000)
    assert steps.steps == 468_750
    factor = steps.optimizer.lr_factor(steps.steps, 400_000 / 128)
    assert factor(0) < 1e-4 and factor(25_000) == 1.0 and factor(468_749) == pytest.approx(0.01)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_parses_as_its_script_reads_it(path: Path):
    name = path.stem
    if name.startswith("mllm-"):
        from training.train_mllm import TrainMllmConfig as Config
    elif name.startswith("generator-") or name.startswith("larp-l-long-ar"):
        Config = TrainGeneratorConfig
    else:
        Config = TrainTokenizerConfig
    assert parse(Config, ["--recipe", name], RECIPES, "script.py")[1] == name
    assert path.read_text().startswith("# "), "a recipe says what it is for"
