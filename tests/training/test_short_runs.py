"""A recipe in a shorter run: what it counts in steps follows, unless it was typed."""

from dataclasses import replace

from larp.config import parse
from larp.engine.generator_settings import TrainGeneratorConfig
from larp.engine.schedules import lr_factor
from larp.engine.tokenizer_settings import TrainTokenizerConfig
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.engine.stages import stages
from training.train_tokenizer import RECIPES

import pytest

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))
TOKENIZERS = [
    name for name in NAMES if name.startswith("tokenizer-") or (name.startswith("larp-l-long") and "-ar" not in name)
]
GENERATORS = [name for name in NAMES if name.startswith("generator-") or name.startswith("larp-l-long-ar")]
MLLMS = [name for name in NAMES if name.startswith("mllm-")]


def read(config: type, *argv: str):
    return parse(config, argv, RECIPES, "script.py", adjust=config.adjusted)[0]


def config_of(name: str) -> type:
    return TrainTokenizerConfig if name in TOKENIZERS else TrainGeneratorConfig


@pytest.mark.parametrize("steps", ["30", "2", "1"])
@pytest.mark.parametrize("name", [*TOKENIZERS, *GENERATORS])
def test_every_recipe_takes_a_short_length(name, steps):
    config = read(config_of(name), "--recipe", name, "--steps", steps)
    assert (config.steps, config.epochs) == (int(steps), None)
    config.optimizer.lr_factor(config.steps, 10_000)
    whole = read(config_of(name), "--recipe", name)
    warm = whole.optimizer.warmup or whole.optimizer.warmup_epochs
    assert bool(config.optimizer.warmup) == bool(warm and int(steps) > 1)


def test_typed_steps_end_a_run_whose_recipe_has_minutes():
    for config, name, steps in (
        (TrainTokenizerConfig, "tokenizer-box-cpu", "--steps"),
        (TrainGeneratorConfig, "generator-box-cpu", "--steps"),
        (TrainMllmConfig, "mllm-box-cpu", "--joint.steps"),
    ):
        assert read(config, "--recipe", name).minutes > 1
        assert read(config, "--recipe", name, steps, "30").minutes is None
        assert read(config, "--recipe", name, steps, "30", "--minutes", "2").minutes == 2
        assert read(config, "--recipe", name, "--minutes", "2").minutes == 2


@pytest.mark.parametrize("name", MLLMS)
def test_every_recipe_of_a_language_model_takes_short_stages(name):
    config = read(TrainMllmConfig, "--recipe", name, "--joint.steps", "30")
    (stage,) = stages(config.align, config.joint)
    assert stage.steps == 30 and 1 <= stage.warmup < 5
    lr_factor("cosine", stage.steps, stage.warmup, 0.0)


def test_the_defaults_take_a_short_length_too():
    assert read(TrainGeneratorConfig, "--steps", "30").optimizer.warmup == 1  # 50 of 1000
    config = read(TrainMllmConfig, "--recipe", "mllm-shapes32", "--align.steps", "20", "--joint.steps", "40")
    assert [stage.warmup for stage in stages(config.align, config.joint)] == [2, 3]  # a tenth; 30 of 400


@pytest.mark.parametrize("name", [*TOKENIZERS, *GENERATORS, *MLLMS])
def test_the_length_of_the_recipe_changes_nothing_when_it_is_typed(name):
    """But for its minutes, which a typed length replaces."""
    if name in MLLMS:
        config = read(TrainMllmConfig, "--recipe", name)
        lengths = ["--align.steps", str(config.align.steps), "--joint.steps", str(config.joint.steps)]
        assert read(TrainMllmConfig, "--recipe", name, *lengths) == replace(config, minutes=None)
        return
    config = read(config_of(name), "--recipe", name)
    length = ["--epochs", str(config.epochs)] if config.epochs else ["--steps", str(config.steps)]
    assert read(config_of(name), "--recipe", name, *length) == replace(config, minutes=None)


def test_what_counts_steps_keeps_its_share():
    config = read(TrainTokenizerConfig, "--recipe", "tokenizer-box-cpu", "--steps", "1000")
    # Of 10,000 steps: 200, 8000 and 8500.
    assert (config.optimizer.warmup, config.loss.lpips_start, config.loss.gan_start) == (20, 800, 850)
    assert config.in_steps(100).notes == ()
    longer = read(TrainTokenizerConfig, "--recipe", "tokenizer-box-cpu", "--steps", "20000")
    assert (longer.optimizer.warmup, longer.loss.gan_start) == (200, 8500)
    typed = ["--steps=1000", "--optimizer.warmup", "7", "--loss.gan_start=9000"]
    config = read(TrainTokenizerConfig, "--recipe", "tokenizer-box-cpu", *typed)
    assert (config.optimizer.warmup, config.loss.lpips_start, config.loss.gan_start) == (7, 800, 9000)


def test_recipes_in_epochs_are_shortened_in_epochs_and_in_steps():
    config = read(TrainTokenizerConfig, "--recipe", "larp-l-long", "--epochs", "15")
    assert (config.epochs, config.optimizer.warmup_epochs) == (15, pytest.approx(0.8))  # 8 of 150
    config = read(TrainTokenizerConfig, "--recipe", "larp-l-long", "--steps", "1500")
    assert (config.optimizer.warmup, config.optimizer.warmup_epochs) == (80, None)
    given = ["--recipe", "larp-l-long", "--steps", "1500", "--optimizer.warmup-epochs", "0.1"]
    config = read(TrainTokenizerConfig, *given)
    assert (config.optimizer.warmup, config.optimizer.warmup_epochs) == (0, 0.1)
    config = read(TrainGeneratorConfig, "--recipe", "larp-l-long-ar-fp", "--epochs", "7.5")
    assert config.optimizer.warmup == 613  # 6135 of 75 epochs
    assert read(TrainGeneratorConfig, "--recipe", "larp-l-long-ar-fp", "--steps", "500").optimizer.warmup == 50


def test_a_warm_up_that_was_typed_and_does_not_fit_is_an_error(capsys):
    config = read(TrainGeneratorConfig, "--recipe", "generator-ucf64", "--steps", "30", "--optimizer.warmup", "50")
    with pytest.raises(ValueError, match=r"warmup is 50 steps of a run of 30.*--optimizer\.warmup"):
        config.optimizer.lr_factor(config.steps, 10)
    with pytest.raises(SystemExit):
        read(TrainMllmConfig, "--recipe", "mllm-shapes32", "--joint.steps", "20", "--joint.warmup", "30")
    assert "joint.warmup is 30 steps of a stage of 20" in " ".join(capsys.readouterr().err.replace("│", " ").split())
