"""Loading a generator with its tokenizer, class numbers without names, and the rows of a table of Frechet distances."""

from larp.data.listing import VideoSet
from larp.generator import GeneratorConfig, LarpGenerator
from larp.metrics.clipsets import class_numbers, describe_row, floor_row, frechet_row, generated_clips, load_pair
from larp.metrics.frechet import Moments, frechet_distance
from larp.prior import PriorConfig
from larp.tokenizer import LarpTokenizer, TokenizerConfig

import pytest
import torch

_SHRINK = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)


def tokenizer() -> LarpTokenizer:
    sizes = dict(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, **_SHRINK)
    return LarpTokenizer(TokenizerConfig(**sizes, prior=PriorConfig(enabled=False)))


def generator(**more) -> LarpGenerator:
    small = dict(num_tokens=4, codebook_size=32, depth=1, heads=2, width=16, ffn_multiple=16, num_classes=3)
    model = LarpGenerator(GeneratorConfig(**small | more))
    torch.nn.init.normal_(model.output.weight, std=2.0)
    return model


def test_a_pair_belongs_together_in_the_variant_that_made_the_codes(tmp_path):
    last, averaged = tokenizer(), tokenizer()
    last.save_pretrained(tmp_path / "tokenizer", ema=averaged)
    generator(tokenizer_hash=averaged.weight_hash()).save_pretrained(tmp_path / "generator")
    pair = str(tmp_path / "generator"), str(tmp_path / "tokenizer")
    _, codec = load_pair(*pair, "class", "cpu", "ema")
    assert codec.weight_hash() == averaged.weight_hash()
    with pytest.raises(ValueError, match="trained on codes of the tokenizer"):
        load_pair(*pair, "class", "cpu")
    with pytest.raises(ValueError, match="is conditional on classes; this needs one that predicts frames"):
        load_pair(*pair, "frame-prediction", "cpu", "ema")


def test_classes_without_names_go_by_position_where_there_are_as_many():
    three, two = (VideoSet((), names, "data") for names in (("a", "b", "c"), ("a", "b")))
    assert class_numbers(generator(), three, [2, 0]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="3 classes without names, data has 2"):
        class_numbers(generator(), two, [0])


def test_a_generated_clip_does_not_depend_on_its_batch():
    model, codec = generator(), tokenizer()
    conditions = torch.tensor([0, 1, 2, 0, 1])
    whole, parts = (
        torch.cat([codes for _, codes in generated_clips(model, codec, conditions, size, guidance=2.0, seed=3)])
        for size in (5, 2)
    )
    assert whole.shape == (5, 4) and torch.equal(whole, parts)


def test_rows_of_a_table():
    real, other = torch.randn(30, 5), torch.randn(30, 5) + 1
    row = frechet_row("moved", real, other, 4, 0)
    assert row["value"] == pytest.approx(frechet_distance(Moments.of(real), Moments.of(other))) and row["deviation"] > 0
    assert describe_row(row).split("±")[0].split() == ["moved", f"{row['value']:.2f}"] and "(N=30)" in describe_row(row)
    assert "±" not in describe_row(floor_row((1.5, 7))) and "1.50 (N=7)" in describe_row(floor_row((1.5, 7)))
