"""The published layout, written: the golden files come back as they were, and what it cannot express is refused."""

import json
from dataclasses import replace

from larp.discriminator import Discriminator
from larp.hub import CheckpointError
from larp.prior import PriorConfig
from larp.published import main, save_published, tokenizer_config, tokenizer_to_published
from larp.tokenizer import LarpTokenizer, TokenizerConfig

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
def test_the_reference_files_come_back_as_they_were(golden_root, tmp_path, kind, model_class):
    source = golden_root / kind
    folder = save_published(model_class.from_pretrained(source), tmp_path / "out")
    # Compared as text: a number written as a word, or true as 1, would not be what the published code asks for.
    assert json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True) == json.dumps(
        json.loads((source / "config.json").read_text()), sort_keys=True
    )
    written, wanted = load_file(folder / "model.safetensors"), load_file(source / "model.safetensors")
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
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
    wanted = replace(model.config, init="published")
    if not wanted.prior.enabled:
        wanted = replace(wanted, prior=again.config.prior)
    assert again.config == wanted
    clip = torch.rand(2, 3, 4, 16, 16)
    codes = model.encode(clip)
    assert torch.equal(again.encode(clip), codes) and torch.equal(again.decode(codes), model.decode(codes))
    assert (again.prior is None) == (model.prior is None)


def test_a_patch_of_one_frame_is_a_flat_convolution_there():
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
def test_what_the_layout_cannot_express_is_named_before_anything_is_written(tmp_path, changes, words):
    with torch.device("meta"):
        model = LarpTokenizer(small(**changes))
    with pytest.raises(CheckpointError, match=words):
        save_published(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_and_flags_written_as_words_are_read(golden_root):
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
    ],
)
def test_other_mathematics_than_ours_is_refused(golden_root, path, value, words):
    config = json.loads((golden_root / "official_tokenizer/config.json").read_text())
    *groups, name = path.split(".")
    group = config
    for key in groups:
        group = group[key]
    group[name] = value
    with pytest.raises(CheckpointError, match=words):
        tokenizer_config(config)


def test_the_command_writes_a_folder_and_spares_the_one_it_reads(tmp_path, capsys):
    model = LarpTokenizer(small())
    source, target = model.save_pretrained(tmp_path / "ours"), tmp_path / "theirs"
    main([str(source), str(target)])
    assert str(target) in capsys.readouterr().out
    assert "x_embedder.proj.weight" in load_file(target / "model.safetensors")
    with pytest.raises(ValueError, match="is the folder that is read"):
        main([str(source), str(source)])
    with pytest.raises(ValueError, match="usage"):
        main([str(source)])
    assert "x_embedder.weight" in load_file(source / "model.safetensors")
