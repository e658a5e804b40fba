"""eval/class_agreement.py, from the command line to the files, with tiny random models."""

import json
import re
from types import SimpleNamespace

from eval import class_agreement
from larp.data.video import write_video
from larp.metrics import clip_source, kinetics_classifier
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm

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
    # Larger real clips as well; the tests have no weights of I3D.
    assert report["real_128"]["num_clips"] == 10 and "real test clips, 128x128" in printed
    assert "no zero-shot classifier: the weights of I3D are not at hand" in printed
    assert "zero_shot" not in report["real"] and "larp-mllm fetch i3d" in report["zero_shot"]["missing"]


class Reddish:
    """Logits by which red clips are surfing, and others archery: the wrong way round."""

    name, dim, min_frames, weights_hash = "fvd-i3d-tfhub", 400, 1, "fake"

    def __call__(self, clip):
        logits = torch.zeros(len(clip), 400)
        red = clip[:, 0].mean(dim=(1, 2, 3)) > clip[:, 2].mean(dim=(1, 2, 3))
        logits[:, 5], logits[:, 337] = (~red).float(), red.float()
        return logits


@pytest.fixture
def reddish(monkeypatch):
    monkeypatch.setattr(kinetics_classifier, "I3D_KINETICS", SimpleNamespace(find=lambda: ("a file",)))
    monkeypatch.setattr(kinetics_classifier, "open_features", lambda *_, **__: Reddish())


def test_both_classifiers_judge_the_same_clips(world, tmp_path, reddish, capsys):
    report = run(world, tmp_path / "x.json", "--num-clips", "6", "--guidance-scale", "2", "--show", "0")
    for name in ("real_128", "real"):
        assert report[name]["accuracy"] == 1 and report[name]["zero_shot"]["accuracy"] == 0, name
        assert report[name]["zero_shot"]["confusion"] == [[0, 5], [5, 0]]
    assert report["reconstructed"]["zero_shot"]["num_clips"] == 10
    assert report["generated"][0]["zero_shot"]["num_clips"] == 6
    assert report["zero_shot"]["kinetics"] == {"Archery": "archery", "Surfing": "surfing water"}
    printed = capsys.readouterr().out
    assert "zero-shot, fvd-i3d-tfhub among 2 classes\n" in printed and "minus each class's mean" in printed
    assert report["real"]["zero_shot"]["centred"]["num_clips"] == 10 and "centred" not in report["real"]
    assert "not the same class" not in printed and "real test clips              0.0%" in printed


def test_classes_that_the_generator_does_not_know_are_left_out(world, tmp_path):
    lines = (world / "list.jsonl").read_text().splitlines()
    videos = [{**json.loads(line), "path": str(world / json.loads(line)["path"])} for line in lines]
    more = [videos[number] | {"label": "Aerobics", "path": str(world / f"{split}.mp4"), "split": split}
            for number, split in ((0, "train"), (-2, "test"))]  # fmt: skip
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, more + videos)))
    report = run(
        world, tmp_path / "x.json", "--data", f"jsonl:{tmp_path / 'list.jsonl'}", "--num-clips", "4", "--show", "0"
    )
    assert report["classes"] == ["Archery", "Surfing"] and report["real"]["num_clips"] == 10
    assert report["real"]["accuracy"] == 1 and "knows 2 of the 3 classes" in report["notes"][-1]


def test_a_class_that_kinetics_has_not_is_named(world, tmp_path, monkeypatch, reddish, capsys):
    monkeypatch.setattr(kinetics_classifier, "_NOT_THE_SAME", {"Surfing"})
    run(world, tmp_path / "x.json", "--num-clips", "2", "--guidance-scale", "1", "--show", "0")
    assert "Surfing is not the same class as Kinetics' surfing water" in capsys.readouterr().out


def test_a_language_model_in_place_of_a_generator(world, tmp_path, monkeypatch):
    """Its codes, for prompts of the classes in turn, are judged; here those of a model that knows one class."""
    tiny_mllm().save(world / "mllm")
    prompts = []

    def generate_codes(self, texts, sampling, progress=None, preview_every=0):
        prompts.append((texts, sampling))
        return torch.zeros(len(texts), 4, dtype=torch.int64)

    monkeypatch.setattr(Mllm, "generate_codes", generate_codes)
    arguments = ["--mllm", str(world / "mllm"), "--data", f"jsonl:{world / 'list.jsonl'}", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "x.json"), "--num-clips", "5", "--guidance-scale", "2", "--top-k", "3"]
    report = class_agreement.main(arguments)
    ((texts, sampling),) = prompts
    assert texts == ["archery", "surfing", "a person archery", "a person surfing", "a video of archery"]
    assert (sampling.guidance_scale, sampling.top_k, sampling.seed) == (2.0, 3, 42)
    # Equal codes are equal clips, of one class.
    assert sorted(map(sum, zip(*report["generated"][0]["confusion"], strict=True))) == [0, 5]
    assert "mllm/model.safetensors" in report["checkpoints"] and report["prompts"]["Surfing"][0] == "surfing"


def test_clips_of_a_class_are_made_for_that_class(world, tmp_path, monkeypatch):
    """The generator numbers its classes in another order than the data."""
    asked = []
    original = clip_source.generated_clips
    monkeypatch.setattr(
        clip_source,
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

    original = clip_source.generated_clips
    monkeypatch.setattr(clip_source, "generated_clips", spy)

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
        (["--data", ""], "no data: give --data ucf101:ROOT"),
        (["--mllm", "x"], "--generator, --mllm: both are given"),
        (["--generator", ""], "the tokenizer makes 4 codes of 32 values, but the generator was trained on 256 codes"),
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
