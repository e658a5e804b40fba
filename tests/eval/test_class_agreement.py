"""eval/class_agreement.py, from the command line to the files, with tiny random models."""

import json
import re

from eval import class_agreement
from larp.data.video import write_video
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig

import numpy as np
import pytest
import torch
from PIL import Image

_SHRINK = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)
COLOURS = {"Archery": (200, 60, 40), "Surfing": (40, 60, 200)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos of two classes that differ in colour, a broken one, a tokenizer, and a generator for each task."""
    root = tmp_path_factory.mktemp("agreement")
    lines, rng = [], np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 5)):
        for number in range(count):
            for name, colour in COLOURS.items():
                noise = rng.integers(-30, 30, (9, 16, 16, 3))
                path = f"{split}-{name}-{number}.mp4"
                write_video(root / path, (np.array(colour) + noise).astype(np.uint8), 25, quality=10)
                lines.append({"path": path, "label": name, "split": split})
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "broken.mp4", "label": "Archery", "split": "test"})
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "bare.jsonl").write_text(
        "\n".join(json.dumps({k: v for k, v in line.items() if k != "label"}) for line in lines)
    )
    torch.manual_seed(0)
    sizes = dict(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, **_SHRINK)
    tokenizer = LarpTokenizer(TokenizerConfig(**sizes, prior=PriorConfig(enabled=False)))
    torch.nn.init.normal_(tokenizer.head.weight, std=0.05)
    tokenizer.save_pretrained(root / "tokenizer")
    small = dict(num_tokens=4, codebook_size=32, depth=1, heads=2, width=16, ffn_multiple=16)
    names = dict(num_classes=2, class_names=("Surfing", "Archery"), tokenizer_hash=tokenizer.weight_hash())
    model = LarpGenerator(GeneratorConfig(**small, **names))
    torch.nn.init.normal_(model.output.weight, std=2.0)
    model.save_pretrained(root / "generator")
    LarpGenerator(GeneratorConfig(**small, task="frame-prediction")).save_pretrained(root / "predictor")
    return root


def run(world, out, *extra):
    options = {"--generator": world / "generator", "--tokenizer": world / "tokenizer", "--out": out, "--device": "cpu"}
    options["--data"] = f"jsonl:{world / 'list.jsonl'}"
    return class_agreement.main([*(str(part) for pair in options.items() for part in pair), *extra])


def test_it_judges_real_reconstructed_and_generated_clips(world, tmp_path, capsys):
    out = tmp_path / "new" / "x.json"
    report = run(world, out, "--num-clips", "9", "--guidance-scale", "1", "3", "--show", "3", "--batch-size", "4")
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert report["real"]["accuracy"] == 1 and report["real"]["num_clips"] == 10 and report["chance"] == 0.5
    assert report["reconstructed"]["num_clips"] == 10
    assert [figures["guidance_scale"] for figures in report["generated"]] == [1, 3]
    # The classes in turn, by their names: nine clips are five of the first and four of the second.
    assert [sum(row) for row in report["generated"][0]["confusion"]] == [5, 4]
    assert report["classes"] == ["Archery", "Surfing"] and report["classifier"]["trained_on"]["windows"] == 2
    assert [entry["name"] for entry in report["skipped"]] == ["broken.mp4"]
    assert min(Image.open(tmp_path / "new" / "x.png").size) > 50
    printed = capsys.readouterr().out
    assert "real test clips            100.0%" in printed and "generated, guidance 3" in printed and "chance" in printed


def test_clips_of_a_class_are_made_for_that_class(world, tmp_path, monkeypatch):
    """The generator numbers its classes in another order than the data."""
    asked = []
    original = class_agreement.generated_clips
    monkeypatch.setattr(
        class_agreement,
        "generated_clips",
        lambda *a, **k: asked.append((a[2].tolist(), a[3].guidance_scale)) or original(*a, **k),
    )
    run(world, tmp_path / "x.json", "--num-clips", "3", "--guidance-scale", "1", "2", "--show", "0")
    assert asked == [([1, 0, 1], 1.0), ([1, 0, 1], 2.0)] and not (tmp_path / "x.png").exists()


def test_sampling_options_and_seed_act_and_the_batch_does_not(world, tmp_path, monkeypatch):
    written = []

    def spy(*arguments, **sampling):
        for clips, codes in original(*arguments, **sampling):
            written.append(codes)
            yield clips, codes

    original = class_agreement.generated_clips
    monkeypatch.setattr(class_agreement, "generated_clips", spy)

    def codes(*extra):
        written.clear()
        run(world, tmp_path / "x.json", "--num-clips", "12", "--guidance-scale", "1", "--show", "0", *extra)
        return torch.cat(written)

    plain = codes()
    assert torch.equal(codes("--batch-size", "5"), plain)
    for extra in (["--seed", "1"], ["--temperature", "0"], ["--top-k", "2"], ["--top-p", "0.3"]):
        assert not torch.equal(codes(*extra), plain), extra


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", ""], "--data is needed"),
        (["--generator", "PREDICTOR"], "predicts frames; this needs one that is conditional on classes"),
        (["--data", "BARE"], "have no class, such as"),
        (["--out", "x.png"], "is the name of a picture"),
        (["--variant", "ema"], "holds no variant 'ema'"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, extra, message):
    extra = [text.replace("PREDICTOR", str(world / "predictor")) for text in extra]
    extra = [text.replace("BARE", f"jsonl:{world / 'bare.jsonl'}") for text in extra]
    with pytest.raises(ValueError, match=re.escape(message)):
        run(world, tmp_path / "x.json", *extra)


@pytest.mark.parametrize(
    "extra", [["--num-clips", "0"], ["--guidance-scale", "-1"], ["--guidance-scale"], ["--device", "cuda:99"]]
)
def test_options_out_of_range_are_refused(world, tmp_path, extra, capsys):
    with pytest.raises(SystemExit):
        run(world, tmp_path / "x.json", *extra)
    assert extra[0][2:].replace("-", " ").split()[0] in capsys.readouterr().err.replace("_", " ").replace("-", " ")
