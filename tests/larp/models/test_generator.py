"""LarpGenerator: golden values of the reference, conditions, configs and checkpoints."""

import json
import math

from larp.hub import CheckpointError
from larp.models.generator import SIZES, GeneratorConfig, LarpGenerator, code_loss, config_from_published
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def tiny(**changes) -> GeneratorConfig:
    fields = dict(num_tokens=6, codebook_size=32, depth=2, heads=2, width=16, num_classes=3, ffn_multiple=16)
    return GeneratorConfig(**fields | changes)


def random_generator(**changes) -> LarpGenerator:
    """Return a tiny model in evaluation mode with random weights, output head included."""
    torch.manual_seed(0)
    model = LarpGenerator(tiny(**changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("name", ["class", "frame_prediction"])
def test_golden(golden_root, name):
    folder = golden_root / f"official_generator_{name}"
    model, want = LarpGenerator.from_pretrained(folder), load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model(want["codes"], want["condition"])
    torch.testing.assert_close(logits, want["logits"], rtol=1e-5, atol=1e-5 * want["logits"].abs().max().item())
    torch.testing.assert_close(code_loss(logits, want["codes"]), want["loss"][0], rtol=1e-5, atol=0)
    guidances = (
        {1.0: "greedy"}
        if name == "frame_prediction"
        else {1.0: "greedy", 1.25: "greedy_cfg_1.25", 3.0: "greedy_cfg_3.0"}
    )
    for guidance, key in guidances.items():
        for weights in ("plain", "auto"):
            codes = generate(
                model, want["condition"], GuidedSampling(guidance_scale=guidance, top_k=1), weights=weights
            )
            assert torch.equal(codes, want[key]), (key, weights)


def test_published_sizes():
    # The paper's 343 M for L is the count with a codebook of 16384; with LARP's own 8192 it is 326 M.
    counts = {}
    with torch.device("meta"):
        for size, codebook_size in (("L", 16384), ("LP", 8192)):
            model = LarpGenerator(GeneratorConfig.of_size(size, codebook_size=codebook_size))
            counts[size] = round(model.num_parameters() / 1e6)
    assert counts == {"L": 343, "LP": 632}
    assert all(width % heads == 0 for _, heads, width in SIZES.values())


def test_training_starts_at_log_k_and_reaches_every_weight():
    model = LarpGenerator(tiny(task="frame-prediction"))
    codes = torch.randint(32, (4, 6))
    loss = code_loss(model(codes, model.frame_condition(codes)), codes)
    torch.testing.assert_close(loss, torch.tensor(32.0).log())
    torch.nn.init.normal_(model.output.weight, std=0.02)
    code_loss(model(codes, model.frame_condition(codes)), codes).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_the_unconditional_frame_condition(tmp_path):
    published, model = (
        random_generator(task="frame-prediction"),
        random_generator(task="frame-prediction", null_condition=True),
    )
    assert published.tok_embeddings.weight.shape[0] == 33, "the published layout: the codes and the separator"
    codes = torch.randint(32, (1, 6))
    nothing = model.unconditional(model.frame_condition(codes))
    assert nothing.tolist() == [[33] * 6 + [32]]
    assert not torch.allclose(model(codes, nothing), model(codes, model.frame_condition(codes)))
    again = LarpGenerator.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(again(codes, nothing), model(codes, nothing))
    with pytest.raises(ValueError, match=r"use guidance_scale 1\.0, or train one with null_condition"):
        published.unconditional(published.frame_condition(codes))
    with pytest.raises(ValueError, match="33; this generator has 0 to 32"):
        generate(published, nothing)
    with pytest.raises(ValueError, match="null_condition is for frame prediction"):
        tiny(null_condition=True)


@pytest.mark.parametrize("task", ["class", "frame-prediction"])
def test_position_i_depends_on_the_codes_before_it_only(task):
    model = random_generator(task=task)
    codes = torch.randint(32, (2, 6))
    condition = torch.tensor([0, 2]) if task == "class" else model.frame_condition(codes.flip(0))
    with torch.no_grad():
        before = model(codes, condition)
        codes[:, 3] = (codes[:, 3] + 1) % 32
        after = model(codes, condition)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


def test_dropout_is_active_in_training_only():
    model = random_generator(dropout=0.5)
    codes, label = torch.randint(32, (1, 6)), torch.tensor([1])
    assert torch.equal(model(codes, label), model(codes, label))
    model.train()
    assert not torch.equal(model(codes, label), model(codes, label))


@pytest.mark.parametrize("task", ["class", "frame-prediction"])
def test_rows_from_the_codebook(task, tmp_path):
    config = tiny(task=task, code_dim=4)
    model = LarpGenerator(config)
    codebook = F.normalize(torch.randn(config.codebook_size, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    codebook[1] = codebook[0] + 1e-3
    model.take_codebook(codebook)
    codes = torch.randint(config.codebook_size, (2, config.num_tokens))
    condition = torch.tensor([0, 1]) if task == "class" else model.frame_condition(codes)

    assert code_loss(model(codes, condition), codes).item() == pytest.approx(math.log(config.codebook_size))
    rows = model.tok_embeddings.weight
    assert rows.shape == (config.codebook_size + (task != "class"), config.width)
    assert (rows[0] - rows[1]).norm() < 0.1 * (rows[0] - rows[2:]).norm(dim=-1).min()
    fewer = LarpGenerator(tiny(task=task)).num_parameters() - model.num_parameters()
    assert fewer == 2 * config.width * (config.codebook_size - 4 - 1 - config.width)  # weights and biases of two MLPs

    torch.nn.init.normal_(model.output.mlp[2].weight)
    model.save_pretrained(tmp_path)
    loaded = LarpGenerator.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(codes, condition), model.eval()(codes, condition))


def test_save_load_round_trip(tmp_path):
    model = random_generator(class_names=("walk", "run", "jump"), tokenizer_hash="ab")
    again = LarpGenerator.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert again.config == model.config and again.weight_hash() == model.weight_hash()
    labels = again.class_labels(["jump", 0, "1"])
    assert labels.tolist() == [2, 0, 1]
    assert torch.equal(generate(again, labels, seed=3), generate(model, labels, seed=3))


def test_unknown_classes():
    model = LarpGenerator(tiny(class_names=("walk", "run", "jump")))
    with pytest.raises(ValueError, match=r"'jmup'; nearest: jump \(of 3\)"):
        model.class_labels(["jmup"])
    with pytest.raises(ValueError, match=r"'polo'; there are 3: walk, run, jump$"):
        model.class_labels(["polo"])
    with pytest.raises(ValueError, match="0 to 2"):
        model.class_labels([3])
    with pytest.raises(ValueError, match="use numbers"):
        LarpGenerator(tiny()).class_labels(["walk"])
    with pytest.raises(ValueError, match="no classes"):
        LarpGenerator(tiny(task="frame-prediction")).class_labels([0])


def test_a_class_may_be_spelt_in_any_way():
    names = ("PlayingPiano", "HorseRace", "red circle", "blue_square", "1", "TaiChi", "Taichi")
    model = LarpGenerator(tiny(class_names=names, num_classes=len(names)))
    typed = ["playing piano", "playing_piano", "PLAYINGPIANO", "horse-race", " Horse Race", "RedCircle", "blue square"]
    assert model.class_labels(typed).tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert model.class_labels([1, "1", "Taichi", "TaiChi"]).tolist() == [1, 4, 6, 5], "as it is stored, or a number"
    with pytest.raises(ValueError, match="'tai chi'; nearest: TaiChi, Taichi"):
        model.class_labels(["tai chi"])
    with pytest.raises(ValueError, match="class -1 is out of range"):
        model.class_labels(["-1"])


def test_another_tokenizer_is_an_error():
    model = LarpGenerator(tiny(tokenizer_hash="aa11"))
    model.check_tokenizer(6, 32, "aa11")
    with pytest.raises(ValueError, match="6 codes of 32 values"):
        model.check_tokenizer(8, 32, "aa11")
    with pytest.raises(ValueError, match="bb22"):
        model.check_tokenizer(6, 32, "bb22")
    LarpGenerator(tiny()).check_tokenizer(6, 32, "any")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": "frames"}, "task is 'frames'"),
        ({"heads": 3}, "width 16 is not a multiple of heads 3"),
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"class_names": ("a",)}, "class_names has 1 names, but num_classes is 3"),
    ],
)
def test_bad_configs(change, words):
    with pytest.raises(ValueError, match=words):
        tiny(**change)


def test_bad_sizes_and_inputs():
    with pytest.raises(ValueError, match=r"unknown generator size 'Huge'.*XXXL"):
        GeneratorConfig.of_size("Huge")
    model = LarpGenerator(tiny(task="frame-prediction"))
    codes = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"codes and separator \(B, 7\)"):
        model(codes, codes)
    with pytest.raises(ValueError, match="5 codes, but this generator has 6"):
        model(codes[:, :5], codes)


def test_unsupported_published_variants_are_an_error(golden_root):
    values = json.loads((golden_root / "official_generator_class" / "config.json").read_text())
    assert config_from_published({name: str(v) if name == "n_layer" else v for name, v in values.items()}).depth == 2
    for change in ({"n_kv_head": 2}, {"use_fixed_pe": True}, {"ffn_dropout_p": 0.3}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            config_from_published(values | change)
    for name, wrong in {"n_layer": None, "dim": [64], "n_head": 2.5, "use_fixed_pe": "maybe", "norm_eps": "x"}.items():
        with pytest.raises(CheckpointError, match=f"published config field {name} = .*, expected"):
            config_from_published(values | {name: wrong})
    assert config_from_published(values | {"frame_prediction": "False"}).task == "class"
    with pytest.warns(UserWarning, match="not known here are ignored: another"):
        config_from_published(values | {"another": 1})
    del values["vocab_size"]
    with pytest.raises(CheckpointError, match="'vocab_size' is missing"):
        config_from_published(values)
