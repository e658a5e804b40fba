"""Saving in the published layout reproduces the golden files; configs that it cannot represent are an error."""

import json
from dataclasses import replace

from larp.hub import CheckpointError
from larp.models.discriminator import Discriminator
from larp.models.prior import PriorConfig
from larp.models.published import main, save_published
from larp.models.published_tokenizer import tokenizer_config, tokenizer_tensors, tokenizer_to_published
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import pytest
import torch
from safetensors.torch import load_file

SMALL_PRIOR = PriorConfig(depth=6, heads=4, width=256, positions=32, dropout=0.2, rounds=1, temperature=0.5)


def small(**changes) -> TokenizerConfig:
    settings = dict(num_frames=4, height=16, width=16, patch_size=(2, 8, 8), num_tokens=6, codebook_size=32, code_dim=8)
    for side in ("encoder", "decoder"):
        settings |= {f"{side}_width": 32, f"{side}_depth": 1, f"{side}_heads": 4}
    return TokenizerConfig(**settings | {"prior": PriorConfig(enabled=False)} | changes)


@pytest.mark.parametrize(
    "kind, model_class", [("official_tokenizer", LarpTokenizer), ("official_discriminator", Discriminator)]
)
def test_loading_and_saving_reproduces_the_reference_files(golden_root, tmp_path, kind, model_class):
    source = golden_root / kind
    folder = save_published(model_class.from_pretrained(source), tmp_path / "out")
    # Compared as text: the published code distinguishes 1 from true and from "1".
    assert json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True) == json.dumps(
        json.loads((source / "config.json").read_text()), sort_keys=True
    )
    written, expected = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {"init": "balanced"},
        {"patch_size": (1, 8, 8)},
        {"prior": SMALL_PRIOR},
        {"prior": replace(SMALL_PRIOR, positions=1024, dropout=0.0)},
        {"stochastic": False, "temperature": 0.1, "encoder_width": 48},
    ],
)
def test_ours_to_published_and_back_gives_equal_codes(tmp_path, changes):
    model = LarpTokenizer(small(**changes)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)
    again = LarpTokenizer.from_pretrained(save_published(model, tmp_path))
    expected = replace(model.config, init="published")
    if not expected.prior.enabled:
        expected = replace(expected, prior=again.config.prior)
    assert again.config == expected
    clip = torch.rand(2, 3, 4, 16, 16)
    codes = model.encode(clip)
    assert torch.equal(again.encode(clip), codes) and torch.equal(again.decode(codes), model.decode(codes))
    assert (again.prior is None) == (model.prior is None)


def test_a_patch_of_one_frame_is_a_conv2d_there():
    model = LarpTokenizer(small(patch_size=(1, 8, 8)))
    _, tensors = tokenizer_to_published(model.config, model.state_dict())
    assert tensors["x_embedder.proj.weight"].shape == (32, 3, 8, 8)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"width": 24}, "height = 16 rows and 24 columns"),
        ({"patch_size": (2, 8, 16)}, "patch_size = 8 rows and 16 columns"),
        ({"decoder_patch_size": (4, 8, 8)}, "decoder_patch_size"),
        ({"nested": True}, "nested"),
        ({"prior": replace(SMALL_PRIOR, depth=3)}, r"prior\.depth.*XXS"),
    ],
)
def test_a_config_that_the_layout_cannot_represent_is_an_error_before_writing(tmp_path, changes, words):
    with torch.device("meta"):
        model = LarpTokenizer(small(**changes))
    with pytest.raises(CheckpointError, match=words):
        save_published(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_and_booleans_may_be_text(golden_root):
    config = json.loads((golden_root / "official_tokenizer/config.json").read_text())

    def words(value):
        return {k: words(v) for k, v in value.items()} if isinstance(value, dict) else value and str(value).lower()

    flags = tokenizer_config(config), tokenizer_config(words(config | {"prior_model": {"name": "none"}}))
    assert flags[1] == replace(flags[0], prior=PriorConfig(enabled=False)) and flags[0].stochastic


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("latent_pe_scale_factor", 100, "latent_pe_scale_factor = 100"),
        ("encoder_name", "transformer_encoder_fused", "encoder_name"),
        ("bottleneck.args.norm", "layer", r"bottleneck\.args\.norm"),
        ("bottleneck.args.regularizer.args.l2_normalized", False, r"regularizer\.args\.l2_normalized"),
        ("prior_model.args.l2_normalized", "false", r"prior_model\.args\.l2_normalized"),
        ("prior_model.name", "gptc-XL", "gptc-XL"),
        ("bottleneck.args.regularizer.name", "fsq", r"regularizer\.name = 'fsq'"),
    ],
)
def test_unsupported_values_are_an_error(golden_root, path, value, words):
    with pytest.raises(CheckpointError, match=words):
        tokenizer_config(golden_config(golden_root, path, value))


def golden_config(golden_root, path, value) -> dict:
    """Return the reference's config with another value at a dotted name."""
    config = json.loads((golden_root / "official_tokenizer/config.json").read_text())
    *groups, name = path.split(".")
    group = config
    for key in groups:
        group = group[key]
    group[name] = value
    return config


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("patch_size", None, "patch_size = None, expected a number"),
        ("patch_size", "x", "patch_size = 'x', expected a number"),
        ("frame_num", 8.5, "frame_num = 8.5, expected a whole number"),
        ("encoder_depth", True, "encoder_depth = True"),
        ("bottleneck", "x", "bottleneck = 'x', expected a group"),
        ("bottleneck.args", None, r"bottleneck\.args = None"),
        ("bottleneck.args.regularizer", [], r"bottleneck\.args\.regularizer = \[\]"),
        ("bottleneck.args.regularizer.args.stochastic", "maybe", r"stochastic = 'maybe', expected true or false"),
        ("bottleneck.args.regularizer.args.stochastic_temperature", "nan", "stochastic_temperature = 'nan'"),
        ("prior_model", "gptc-S", "prior_model = 'gptc-S', expected a group"),
        ("prior_model.n_rounds", [2], r"prior_model\.n_rounds = \[2\]"),
        ("encoder_name", 3, "encoder_name = 3"),
        ("frame_num", 0, "num_frames must be at least 1"),
    ],
)
def test_the_error_for_a_wrong_type_names_field_and_file(golden_root, tmp_path, path, value, words):
    (tmp_path / "model.safetensors").symlink_to(golden_root / "official_tokenizer/model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden_config(golden_root, path, value)))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{words}"):
        LarpTokenizer.from_pretrained(tmp_path)


def test_unknown_fields_are_ignored_with_a_warning(golden_root, recwarn):
    known = golden_config(golden_root, "patch_size", 8)
    assert tokenizer_config(known) and not recwarn.list
    with pytest.warns(UserWarning, match=r"ignored: bottleneck\.args\.shape$"):
        assert tokenizer_config(golden_config(golden_root, "bottleneck.args.shape", 3)) == tokenizer_config(known)


def test_a_huge_codebook_is_an_error_without_allocating_it(golden_root, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(golden_root / "official_tokenizer/model.safetensors")
    path = "bottleneck.args.regularizer.args.codebook_size"
    (tmp_path / "config.json").write_text(json.dumps(golden_config(golden_root, path, 10**12)))
    with pytest.raises(CheckpointError, match=r"quantizer\.embedding\.weight is \(512, 16\).*1000000000000"):
        LarpTokenizer.from_pretrained(tmp_path)


def test_query_key_and_value_of_two_dtypes_are_an_error(golden_root):
    folder = golden_root / "official_tokenizer"
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".attn.query.weight"))
    with pytest.raises(CheckpointError, match=r"query.*float16"):
        tokenizer_tensors(tensors | {name: tensors[name].half()})


@pytest.mark.parametrize("field, value", [("hidden_size", None), ("n_heads", "x"), ("in_channels", 4)])
def test_the_error_names_the_field_of_a_discriminator(golden_root, field, value):
    config = json.loads((golden_root / "official_discriminator/config.json").read_text())
    with pytest.raises(CheckpointError, match=f"{field} = {value!r}"):
        Discriminator.from_published(config | {field: value}, {})


def test_the_command_never_overwrites_its_input(tmp_path, capsys):
    model = LarpTokenizer(small())
    source, target = model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs"
    main([str(source), str(target)])
    assert str(target) in capsys.readouterr().out
    assert "x_embedder.proj.weight" in load_file(target / "model.safetensors")
    with pytest.raises(ValueError, match="is the folder that is read"):
        main([str(source), str(source)])
    with pytest.raises(ValueError, match="TO\nusage"):
        main([str(source)])
    assert "x_embedder.weight" in load_file(source / "model.safetensors")


def test_the_command_writes_the_averaged_weights(tmp_path):
    last, averaged = LarpTokenizer(small()), LarpTokenizer(small())
    source = last.save_pretrained(tmp_path / "ours", ema=averaged)
    for options, expected in (([], last), (["--variant", "ema"], averaged)):
        main([str(source), str(tmp_path / "theirs"), *options])
        assert torch.equal(
            load_file(tmp_path / "theirs/model.safetensors")["encoder_latent_query_embed"], expected.queries
        )
    with pytest.raises(CheckpointError, match="no variant 'best'"):
        main([str(source), str(tmp_path / "theirs"), "--variant", "best"])


def test_a_file_where_the_published_folder_should_be_is_an_error(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="is a file: give another"):
        save_published(LarpTokenizer(small()), tmp_path / "out")
