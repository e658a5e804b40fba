"""eval/ucf_rfvd.py and eval/ucf_gfvd.py, from the command line to the files, with tiny random models."""

import json
import re
from dataclasses import replace

from eval import ucf_gfvd, ucf_rfvd
from larp.data.datasets import open_videos
from larp.data.video import write_video
from larp.metrics import clip_source
from larp.metrics.i3d import RandomI3D
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.prior import PriorConfig
from larp.models.tokenizer import LarpTokenizer
from larp.models.tokenizer_config import TokenizerConfig
from larp.sampling.options import GuidedSampling
from larp_mllm.locate import set_default_model
from tests.larp_mllm.tiny import tiny_mllm

import numpy as np
import pytest
import torch

VIDEOS, FRAMES = 12, 13
_SHRINK = dict(encoder_width=32, encoder_depth=1, encoder_heads=2, decoder_width=32, decoder_depth=1, decoder_heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with twelve small videos of two classes and a broken one, a tokenizer, and a generator."""
    root = tmp_path_factory.mktemp("world")
    lines, rng = [], np.random.default_rng(0)
    for k in range(VIDEOS):
        coarse = rng.integers(0, 256, (1, 2, 2, 3), dtype=np.uint8)
        frames = coarse.repeat(FRAMES, 0).repeat(16, 1).repeat(16, 2)
        write_video(root / f"v{k:02d}.mp4", frames, 25, quality=10)
        lines.append({"path": f"v{k:02d}.mp4", "label": ("Archery", "Surfing")[k % 2], "split": "test"})
    (root / "v99.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "v99.mp4", "label": "Archery", "split": "test"})
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    torch.manual_seed(0)
    sizes = dict(num_frames=4, height=16, width=16, num_tokens=4, codebook_size=32, code_dim=4, **_SHRINK)
    prior = PriorConfig(depth=1, heads=2, width=16, positions=4)
    tokenizer = LarpTokenizer(TokenizerConfig(**sizes, prior=prior))
    tokenizer.save_pretrained(root / "tokenizer")
    generator = LarpGenerator(
        GeneratorConfig(
            num_tokens=4, codebook_size=32, depth=1, heads=2, width=16, ffn_multiple=16, num_classes=2,
            class_names=("Surfing", "Archery"), tokenizer_hash=tokenizer.weight_hash(),
        )
    )  # fmt: skip
    generator.save_pretrained(root / "generator")
    return root


@pytest.fixture
def rfvd(monkeypatch):
    return with_small_features(ucf_rfvd, monkeypatch)


@pytest.fixture
def gfvd(monkeypatch):
    return with_small_features(ucf_gfvd, monkeypatch)


def with_small_features(module, monkeypatch):
    monkeypatch.setattr("larp.metrics.evaluation.open_features", lambda *_: RandomI3D(width=0.05))
    return module


def common(world, out):
    tokenizer, data = world / "tokenizer", f"jsonl:{world / 'list.jsonl'}"
    return [
        "--tokenizer",
        str(tokenizer),
        "--data",
        data,
        "--split",
        "test",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--repeats",
        "2",
    ]


def test_rfvd_measures_writes_and_repeats(world, rfvd, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert rfvd.main([*common(world, out), "--show", "3", "--batch-size", "5"])["frechet"]
    report = json.loads(out.read_text())
    figure = report["frechet"]
    assert (
        report["psnr"] < report["mean_colour_psnr"] and 0 < report["codes_used"] <= 1 and report["tokens_per_clip"] == 4
    )
    assert report["psnr_above_mean_colour"] == pytest.approx(report["psnr"] - report["mean_colour_psnr"])
    assert (figure["metric"], figure["num_clips"], figure["comparable"]) == ("frechet-random-i3d", VIDEOS, False)
    assert figure["protocol"]["num_videos"] == VIDEOS + 1 and figure["floor"]["num_clips"] == VIDEOS // 2
    assert [entry["name"] for entry in report["skipped"]] == ["v99.mp4"]
    assert (tmp_path / "results.mp4").stat().st_size > 0 and (tmp_path / "results.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "frechet-random-i3d" in printed and "NOT comparable" in printed and "skipped v99.mp4" in printed
    again = tmp_path / "new" / "folder" / "again.json"
    assert rfvd.main([*common(world, again), "--show", "0", "--batch-size", "5"])["frechet"]
    assert json.loads(again.read_text())["frechet"]["value"] == pytest.approx(figure["value"], rel=1e-6)
    assert not again.with_suffix(".mp4").exists()


def test_rfvd_measures_the_averaged_weights(world, rfvd, tmp_path):
    last = LarpTokenizer.from_pretrained(world / "tokenizer")
    averaged = LarpTokenizer.from_pretrained(world / "tokenizer")
    torch.nn.init.normal_(averaged.head.bias)
    folder = last.save_pretrained(tmp_path / "both", ema=averaged)
    out = tmp_path / "ema.json"
    options = [*common(world, out), "--tokenizer", str(folder), "--show", "0", "--variant", "ema"]
    assert rfvd.main(options)["frechet"]["checkpoints"] == {"tokenizer": averaged.weight_hash()}


def test_rfvd_takes_a_seeded_part_of_the_videos(world, rfvd, tmp_path):
    values = []
    for seed in (1, 2):
        out = tmp_path / f"{seed}.json"
        assert rfvd.main([*common(world, out), "--show", "0", "--num-clips", "5", "--seed", str(seed)])["frechet"]
        values.append(json.loads(out.read_text())["psnr"])
    assert values[0] != values[1]


def test_gfvd_generates_for_the_labels_of_the_real_clips(world, gfvd, tmp_path, capsys):
    arguments = [*common(world, tmp_path / "g.json"), "--generator", str(world / "generator"), "--num-clips", "15"]
    assert gfvd.main([*arguments, "--batch-size", "4", "--show", "2"])["metric"]
    report = json.loads((tmp_path / "g.json").read_text())
    assert (report["metric"], report["num_clips"], report["floor"]["num_clips"]) == ("frechet-random-i3d", 15, 15)
    assert set(report["checkpoints"]) == {"generator", "tokenizer"} and report["config"]["guidance_scale"] == 1.25
    assert [entry["name"] for entry in report["skipped"]] == ["v99.mp4"]
    assert (tmp_path / "g.png").exists() and "NOT comparable" in capsys.readouterr().out
    other = [*arguments[:-2], "--num-clips", "15", "--batch-size", "15", "--show", "0"]
    assert gfvd.main(other)["metric"]
    assert json.loads((tmp_path / "g.json").read_text())["value"] == pytest.approx(report["value"], rel=1e-4)


def test_gfvd_without_options_measures_the_newest_generator_on_the_data_of_its_run(
    world, gfvd, tmp_path, capsys, monkeypatch
):
    """The data have a third class, which the generator does not know."""
    monkeypatch.chdir(tmp_path)
    lines = (world / "list.jsonl").read_text().splitlines()
    videos = [json.loads(line) for line in lines if "v99" not in line]
    videos = [video | {"path": str(world / video["path"]), "split": "train"} for video in videos]
    videos.append(videos[0] | {"label": "Knitting", "path": str(world / "v99.mp4")})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, videos)))
    LarpGenerator.from_pretrained(world / "generator").save_pretrained(tmp_path / "run/model")
    run = {"tokens": None, "tokenizer": str(world / "tokenizer"), "data": "jsonl:list.jsonl"}
    (tmp_path / "run/config.json").write_text(json.dumps(run))
    set_default_model("run/model", "generator")
    report = gfvd.main(["--num-clips", "12", "--device", "cpu", "--show", "0"])
    assert (tmp_path / "gfvd.json").is_file()
    assert report["checkpoints"]["generator"] == LarpGenerator.from_pretrained(world / "generator").weight_hash()
    assert report["protocol"]["num_videos"] == VIDEOS and report["skipped"] == []
    note = f"the generator knows 2 of the 3 classes of jsonl:list.jsonl: their {VIDEOS} videos are used"
    assert report["notes"] == [note] and note in capsys.readouterr().err
    # As many clips as the data hold, where these are fewer than published; at the stride of the training.
    (tmp_path / "run/config.json").write_text(json.dumps(run | {"stride": 2}))
    report = gfvd.main(["--device", "cpu", "--show", "0"])
    assert report["num_clips"] == VIDEOS * (FRAMES // 7), "4 frames, every second one"
    assert report["protocol"]["frame_rule"].endswith("native frame rate, stride 2")


def test_gfvd_puts_reconstructions_and_other_guidance_into_one_table(world, gfvd, tmp_path, capsys):
    # Fresh models paint one colour, and sample codes evenly whatever the class: these do not.
    tokenizer = LarpTokenizer.from_pretrained(world / "tokenizer")
    torch.nn.init.normal_(tokenizer.head.weight, std=0.05)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    generator = LarpGenerator.from_pretrained(world / "generator")
    generator = LarpGenerator(replace(generator.config, tokenizer_hash=tokenizer.weight_hash()))
    torch.nn.init.normal_(generator.output.weight, std=2.0)
    torch.nn.init.normal_(generator.cls_embedding.embedding_table.weight)
    generator.save_pretrained(tmp_path / "generator")
    models = ["--generator", str(tmp_path / "generator"), "--tokenizer", str(tmp_path / "tokenizer")]
    arguments = [*common(world, tmp_path / "g.json"), *models, "--num-clips", "12"]
    report = gfvd.main([*arguments, "--show", "0", "--also-guidance", "1", "3"])
    names = [
        "other real clips (the floor)",
        "reconstructions",
        *(f"generated, guidance {s}" for s in ("1", "3", "1.25")),
    ]
    assert [row["clips"] for row in report["table"]] == names
    assert report["table"][-1]["value"] == report["value"] and report["table"][0]["value"] == report["floor"]["value"]
    assert len({row["value"] for row in report["table"]}) == 5
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    with pytest.raises(SystemExit):
        gfvd.main([*arguments, "--also-guidance", "-1"])


def test_gfvd_hands_every_sampling_option_on(world, gfvd, tmp_path, monkeypatch):
    seen, real = [], clip_source.generated_clips
    monkeypatch.setattr(clip_source, "generated_clips", lambda *given: seen.append(given[3:5]) or real(*given))
    arguments = [*common(world, tmp_path / "g.json"), "--generator", str(world / "generator"), "--num-clips", "12"]
    options = {
        "temperature": 0.9,
        "top_k": 7,
        "top_p": 0.8,
        "min_p": 0.1,
        "guidance_start": 0.25,
        "guidance_stop": 0.75,
    }
    ramp = {"guidance_scale": 2.0, "guidance_final": 4.0}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in (options | ramp).items()]
    report = gfvd.main([*arguments, *words, "--seed", "3", "--also-guidance", "1", "--show", "0"])
    assert seen == [(GuidedSampling(**options, **scale), 3) for scale in ({"guidance_scale": 1.0}, ramp)]
    assert report["table"][-1]["clips"] == "generated, guidance 2 to 4 from 25% to 75%"
    for option in (("--min-p", "2"), ("--guidance-start", "1"), ("--guidance-final", "-1")):
        with pytest.raises((ValueError, SystemExit)):
            gfvd.main([*arguments, *option])


def test_gfvd_of_a_language_model(world, gfvd, tmp_path):
    """Its own tokenizer and stride; the same clips for any batch size, and a table of guidance scales."""
    mllm = tiny_mllm()
    torch.nn.init.normal_(mllm.processor.video_tokenizer.head.weight, std=0.05)
    mllm.model.config.video_tokenizer_hash = mllm.processor.video_tokenizer.weight_hash()
    mllm.model.config.frame_stride = 2
    mllm.save(tmp_path / "mllm")
    arguments = common(world, tmp_path / "g.json")[2:]
    arguments += ["--mllm", str(tmp_path / "mllm"), "--num-clips", "12", "--also-guidance", "1", "--show", "2"]
    report = gfvd.main(arguments)
    assert [row["clips"] for row in report["table"][2:]] == ["generated, guidance 1", "generated, guidance 1.25"]
    assert report["protocol"]["frame_rule"].endswith("native frame rate, stride 2") and (tmp_path / "g.png").exists()
    assert {"mllm/model.safetensors", "tokenizer"} <= set(report["checkpoints"]) and report["tokens_per_clip"] == 4
    assert report["prompts"]["Archery"][:2] == ["archery", "a person archery"]
    again = gfvd.main([*arguments, "--batch-size", "5"])
    assert again["value"] == pytest.approx(report["value"], rel=1e-4)
    with pytest.raises(ValueError, match="one guidance scale for all codes"):
        gfvd.main([*arguments, "--guidance-final", "2"])
    with pytest.raises(ValueError, match="leave out --tokenizer and --variant"):
        gfvd.main([*arguments, "--tokenizer", str(world / "tokenizer")])


def test_gfvd_maps_classes_by_name(world):
    generator = LarpGenerator.from_pretrained(world / "generator")
    videos = open_videos(f"jsonl:{world / 'list.jsonl'}", "test")
    assert videos.classes == ("Archery", "Surfing")
    assert clip_source.class_numbers(generator, videos, [0, 1, 1]).tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num-clips", "40"], "windows of 4 frames"),
        (["--tokenizer", "nowhere"], "nowhere: no such folder"),
        (["--data", ""], "no data: give --data ucf101:ROOT"),
        (["--mllm", "x"], "--generator, --mllm: both are given"),
        (["--tokenizer", ""], "does not say which tokenizer made its codes: give --tokenizer"),
        (["--variant", "ema"], "holds no variant 'ema'"),
        (["--guidance-start", "0.8"], "holds none of a clip's 4 codes"),
    ],
)
def test_mistakes_end_in_one_line(world, gfvd, tmp_path, extra, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gfvd.main([*common(world, tmp_path / "g.json"), "--generator", str(world / "generator"), *extra])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("g.png", "is the name of a picture"),
        ("g.MP4", "is the name of a picture"),
        ("", "is a folder: give the name of a file"),
        ("file/g.json", "cannot be written ("),
    ],
)
@pytest.mark.parametrize("evaluator", [ucf_rfvd, ucf_gfvd])
def test_a_bad_out_is_refused_before_anything_is_loaded(tmp_path, evaluator, name, message):
    (tmp_path / "file").write_text("mine")
    arguments = ["--tokenizer", "nowhere", "--data", "nowhere"]
    with pytest.raises(ValueError, match=re.escape(f"--out {tmp_path / name} {message}")):
        evaluator.main([*arguments, "--out", str(tmp_path / name)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_many_clips_for_one_of_each_video(world, rfvd, tmp_path):
    with pytest.raises(ValueError, match="num_clips=20"):
        rfvd.main([*common(world, tmp_path / "r.json"), "--num-clips", "20"])
    assert not (tmp_path / "r.json").exists()
