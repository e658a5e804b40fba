"""Defaults, recipes and command lines: precedence and error messages."""

import dataclasses
import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from larp.config import (
    DATA_SPECS,
    ConfigError,
    check_count,
    check_types,
    from_dict,
    is_number,
    is_whole,
    load_recipe,
    parse,
    to_dict,
)
from larp.engine import signals
from larp.engine.signals import run_script

import numpy as np
import pytest


@dataclass(frozen=True)
class Model:
    num_tokens: int = 1024
    """Tokens of one clip."""
    patch_size: tuple[int, int, int] = (4, 8, 8)
    """Frames, rows and columns of a patch."""
    widths: tuple[int, ...] = ()
    """Widths of the layers."""

    def __post_init__(self):
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}, expected at least 1")


@dataclass(frozen=True)
class Gan:
    weight: float = 0.3
    """Weight of the loss."""


@dataclass(frozen=True)
class Config:
    """Train something small."""

    data: str = "shapes:"
    """Where the videos are."""
    out: Path = Path("runs/tiny")
    """Run folder."""
    steps: int = 100
    """Optimizer steps."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning-rate schedule."""
    seed: int | None = None
    """Random seed; None samples one."""
    resume: bool = False
    """Continue the run in `out`."""
    model: Model = field(default_factory=lambda: Model(num_tokens=32))
    """The tokenizer."""
    gan: Gan | None = None
    """The adversarial loss."""

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}, expected at least 0")


@pytest.fixture
def recipes(tmp_path):
    (tmp_path / "base.toml").write_text(
        "steps = 5\nlearning_rate = 1\n[model]\npatch-size = [2, 4, 4]\nwidths = [8, 8]\n"
    )
    (tmp_path / "tiny.toml").write_text('inherit = "base"\nsteps = 7\n[model]\nnum_tokens = 16\nwidths = [4]\n')
    return tmp_path


def run(argv, recipes, default=None):
    return parse(Config, argv, recipes, "train.py", default)


def test_default_then_recipe_then_command_line(recipes):
    config, name = run([], recipes)
    assert (config, name) == (Config(), None)
    config, name = run(["--local_rank=0", "--recipe", "tiny"], recipes)
    assert name == "tiny" and config.steps == 7 and config.learning_rate == 1.0
    assert config.model == Model(16, (2, 4, 4), (4,))
    config, _ = run(["--recipe=base", "--steps", "9", "--model.num-tokens", "3", "--local_rank", "1"], recipes, "tiny")
    assert (config.steps, config.model.num_tokens, config.model.patch_size) == (9, 3, (2, 4, 4))
    assert run([], recipes, "tiny")[1] == "tiny"


def test_options_that_were_not_typed_may_follow_those_that_were(recipes):
    seen = {}

    def adjust(config, typed):
        seen.update(typed)
        return dataclasses.replace(config, learning_rate=config.steps * 1.0)

    argv = ["--steps=4", "--resume", "--model.num-tokens", "3", "--model.num_tokens", "9", "--data", "here"]
    config, _ = parse(Config, ["--recipe", "tiny", *argv], recipes, "train.py", adjust=adjust)
    assert seen == {"steps": "4", "resume": "", "model.num_tokens": "9", "data": "here"}
    assert (config.steps, config.learning_rate, config.model.num_tokens) == (4, 7.0, 9)
    argv += ["--learning-rate", "3"]
    assert parse(Config, argv, recipes, "train.py", adjust=adjust)[0].learning_rate == 3.0


def test_a_recipe_merges_groups_key_by_key(recipes):
    (recipes / "part.toml").write_text("[model]\nwidths = [1]\n[gan]\n")
    config, _ = run(["--recipe", "part"], recipes)
    assert config.model == Model(num_tokens=32, widths=(1,)) and config.gan == Gan()
    assert run(["--recipe", "part", "--gan.weight", "2"], recipes)[0].gan == Gan(2.0)


def test_options_of_every_type(recipes):
    argv = [
        "--out",
        "a/b",
        "--seed",
        "3",
        "--resume",
        "--schedule",
        "constant",
        "--model.patch_size",
        "1",
        "2",
        "3",
        "--learning_rate",
        "1e-3",
    ]
    config, _ = run(argv, recipes)
    assert config.out == Path("a/b") and config.seed == 3 and config.resume and config.schedule == "constant"
    assert config.model.patch_size == (1, 2, 3) and config.learning_rate == 1e-3
    assert run(["--seed", "None"], recipes)[0].seed is None


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("stepps = 3", ["tiny.toml", "'stepps'", "did you mean 'steps'"]),
        ("num_tokens = 3", ["'num_tokens'", "did you mean 'model.num_tokens'"]),
        ("[model]\nnum_token = 3", ["'model.num_token'", "did you mean 'model.num_tokens'"]),
        ("zzz = 3", ["'zzz'", "known keys", "learning_rate"]),
        ("steps = '3'", ["tiny.toml", "'steps'", "'3'", "a whole number"]),
        ("steps = true", ["'steps'", "True", "a whole number"]),
        ("resume = 1", ["'resume'", "true or false"]),
        ("schedule = 'linear'", ["'schedule'", "'linear'", "'cosine'", "'constant'"]),
        ("seed = 'x'", ["'seed'", "'x'", "a whole number"]),
        ("model = 3", ["'model'", "group", "num_tokens"]),
        ("[model]\npatch_size = [1, 2]", ["'model.patch_size'", "3 values"]),
        ("[model]\nwidths = ['a']", ["'model.widths[0]'", "'a'"]),
        ("[model]\nnum_tokens = 0", ["tiny.toml", "model:", "expected at least 1"]),
        ("steps = = 3", ["tiny.toml", "not valid TOML"]),
        ("inherit = 'bass'", ["'bass'", "inherited by tiny.toml", "did you mean 'base'"]),
        ("inherit = 'tiny'", ["circle", "tiny.toml -> tiny.toml"]),
    ],
)
def test_an_error_in_a_recipe_names_place_and_remedy(recipes, toml, words):
    (recipes / "tiny.toml").write_text(toml + "\n")
    with pytest.raises(ConfigError) as error:
        run(["--recipe", "tiny"], recipes)
    for word in words:
        assert word in str(error.value)


def test_an_error_in_an_inherited_recipe_names_that_file(recipes):
    (recipes / "base.toml").write_text("stepps = 3\n")
    with pytest.raises(ConfigError, match=r"base\.toml: unknown key 'stepps'"):
        run(["--recipe", "tiny"], recipes)


def test_an_unknown_recipe_lists_the_available_ones(recipes):
    with pytest.raises(ConfigError, match=r"did you mean 'tiny'.*base, tiny"):
        load_recipe("tinny", recipes)
    with pytest.raises(ConfigError, match="--recipe needs a value"):
        run(["--recipe", "--steps", "3"], recipes)


def test_a_recipe_can_be_a_path(recipes, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    (other / "mine.toml").write_text('inherit = "more"\nsteps = 1\n')
    (other / "more.toml").write_text("learning_rate = 2\n")
    assert load_recipe(other / "mine.toml", recipes) == {"steps": 1, "learning_rate": 2}


def test_invalid_values_on_the_command_line_name_the_option(recipes, capsys):
    for argv in (["--stepps", "3"], ["--steps", "x"], ["--schedule", "linear"]):
        with pytest.raises(SystemExit) as stop:
            run(argv, recipes)
        assert stop.value.code == 2
        assert argv[0] in capsys.readouterr().err
    for argv, words in ((["--model.num-tokens", "0"], "expected at least 1"), (["--steps", "-1"], "at least 0")):
        with pytest.raises(SystemExit) as stop:
            run(argv, recipes)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


def test_help_explains_each_option_and_lists_the_recipes(recipes, capsys):
    with pytest.raises(SystemExit) as stop:
        run(["--help", "--recipe", "tiny"], recipes)
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for words in ("Tokens of one clip", "Where the videos are", "--model.num-tokens", "base, tiny", "--recipe NAME"):
        assert words in text


def test_round_trip_through_json():
    config = Config(out=Path("a"), seed=4, gan=Gan(0.5), model=Model(patch_size=(1, 2, 3), widths=(5, 6)))
    assert from_dict(Config, json.loads(json.dumps(to_dict(config))), "config.json") == config
    assert from_dict(Config, to_dict(Config()), "config.json") == Config()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"seed": "3"}, "Config: 'seed' is '3'.*a whole number"),
        ({"schedule": "linear"}, "'schedule'.*'cosine', 'constant'"),
        ({"model": None}, "'model' is a group of options.*None"),
        ({"model": {"num_tokens": 3}}, "'model' is .*expected a Model"),
        ({"gan": 3}, "'gan' is 3.*expected a Gan"),
    ],
)
def test_the_types_of_a_config_made_in_python_are_checked(fields, words):
    check_types(Config())
    check_types(Config(gan=Gan(1), learning_rate=1))
    with pytest.raises(ConfigError, match=words):
        check_types(Config(**fields))


def test_a_missing_required_key_is_named():
    @dataclass(frozen=True)
    class Required:
        data: str

    sys.modules[__name__].Required = Required
    with pytest.raises(ConfigError, match=r"x\.json: 'data' is missing"):
        from_dict(Required, {}, "x.json")


def test_run_script_prints_an_error_as_one_message(capsys, tmp_path):
    def invalid():
        raise ValueError("--data is wrong: give another")

    def diverged():
        raise FloatingPointError("the loss is NaN: lower --lr")

    for main, words in (
        (invalid, "x.py: --data is wrong"),
        (diverged, "x.py: the loss is NaN: lower --lr"),
        (lambda: (tmp_path / "absent" / "file").write_text(""), "absent/file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_script("x.py", main)
        assert stopped.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run_script("x.py", lambda: {"stopped_at": 3})
    assert stopped.value.code == 143
    run_script("x.py", dict)


def test_run_script_ends_after_ctrl_c_with_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    def saved_first():
        signals.install_handlers()
        try:
            signal.raise_signal(signal.SIGINT)
            return {"stopped_at": 3} if signals.stop_flag() else {}
        finally:
            signals.restore_handlers()

    for main in (interrupted, saved_first):
        with pytest.raises(SystemExit) as stopped:
            run_script("x.py", main)
        assert stopped.value.code == 130
    assert "x.py: interrupted" in capsys.readouterr().err


def test_bools_are_neither_counts_nor_numbers():
    assert is_whole(3) and is_whole(np.int64(3)) and not any(map(is_whole, (True, 3.0, "3", None)))
    assert is_number(0.5) and is_number(np.float32(0.5)) and not any(map(is_number, (False, "1", None, 1j)))
    check_count("clips", 2, least=2)
    for value in (1, 2.0, True):
        with pytest.raises(ValueError, match=f"clips must be a whole number of at least 2, got {value}"):
            check_count("clips", value, least=2)


def test_a_leading_tilde_is_the_home_folder(recipes, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.toml").write_text('out = "~/a"\ndata = "~/videos"\n')
    assert run(["--recipe", "~/mine.toml"], recipes)[0].out == tmp_path / "a"
    assert run(["--recipe", "~/mine.toml"], recipes)[0].data == str(tmp_path / "videos")
    for written in (["--out", "~/b"], ["--out=~/b"]):
        assert run(written, recipes)[0].out == tmp_path / "b"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_hangup_asks_for_a_stop_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, handled in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            signals.install_handlers()
            signal.raise_signal(signal.SIGHUP) if handled else None
            assert signals.stop_flag() is handled and (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) is not handled
            assert not handled or signals.stopped_by() == signal.SIGHUP
            signals.restore_handlers()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_help_of_scripts_with_data_lists_the_kinds(capsys, tmp_path):
    from larp.data.datasets import _READERS
    from larp.engine.tokenizer_settings import TrainTokenizerConfig

    with pytest.raises(SystemExit):
        parse(TrainTokenizerConfig, ["--help"], tmp_path, "train")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert DATA_SPECS in said and all(f"{kind}:" in DATA_SPECS for kind in _READERS)
