"""larp-mllm sample: videos of classes, continuations of a video."""

import json
import re
import shutil
from pathlib import Path

import larp.sampling.long_clips
from larp.data import token_cache as tokens
from larp.data.video import probe, write_video
from larp.engine.generator_run import Training, find_training
from larp.models.generator import LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp.sampling.sample import generate
from larp_mllm.cli import main
from tests.larp.codec.test_whole_video import noise, random_tokenizer
from tests.larp.models.test_generator import random_generator
from tests.larp_mllm.cli.test_cli import refused
from tests.larp_mllm.tiny import tiny_cache
from training.train_generator import main as train

import pytest
import torch

NAMES = ("Archery", "Horse Race", "Surfing")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer t (clips of 4 frames), generators c and p, clip.mp4 of ten frames; tokenizers and a video that do not fit."""
    made = tmp_path_factory.mktemp("made")
    tokenizer = random_tokenizer()
    tokenizer.save_pretrained(made / "t")
    belongs = {"tokenizer_hash": tokenizer.weight_hash()}
    random_generator(class_names=NAMES, **belongs).save_pretrained(made / "c/model")
    random_generator(task="frame-prediction", **belongs).save_pretrained(made / "p")
    write_video(made / "clip.mp4", noise(10), 12.5)
    random_tokenizer(code_dim=4).save_pretrained(made / "other")
    random_tokenizer(codebook_size=33).save_pretrained(made / "larger")
    write_video(made / "short.mp4", noise(2), 12.5)
    (made / "text").write_text("hello")
    return made


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """A user's working folder, with all of `made`."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sampled_with(monkeypatch) -> list[dict]:
    """The options of every call of the sampler."""
    calls: list[dict] = []
    monkeypatch.setattr(
        larp.sampling.long_clips, "generate", lambda *a, **o: calls.append((a[2], o["seed"])) or generate(*a, **o)
    )
    return calls


def sample(*arguments: str) -> None:
    main(["sample", "-o", "out", "--tokenizer", "t", *arguments])


def written() -> list[str]:
    return sorted(path.name for path in Path("out").iterdir())


def test_classes_are_used_in_turn(folder, capsys):
    sample("--generator", "c", "--class", "Surfing", "--class", "0", "-n", "3", "--device", "cpu")
    assert written() == ["000-Surfing.mp4", "001-Archery.mp4", "002-Surfing.mp4", "sheet.png"]
    assert capsys.readouterr().out.splitlines() == [
        "out/000-Surfing.mp4: 4 frames at 12 fps",
        "out/001-Archery.mp4: 4 frames at 12 fps",
        "out/002-Surfing.mp4: 4 frames at 12 fps",
        "out/sheet.png",
    ]
    info = probe("out/000-Surfing.mp4")
    assert (info.frames, info.fps, info.height, info.width) == (4, 12, 256, 384)
    sample("--generator", "c/model", "-n", "4", "-o", "all", "--fps", "5", "--scale", "1")
    names = ["000-Archery.mp4", "001-Horse-Race.mp4", "002-Surfing.mp4", "003-Archery.mp4", "sheet.png"]
    assert sorted(path.name for path in Path("all").iterdir()) == names
    assert (probe("all/000-Archery.mp4").height, probe("all/000-Archery.mp4").fps) == (16, 5)
    sample("--generator", "c", "--class", "2", "--class", "1", "-o", "two")
    assert len(list(Path("two").glob("*.mp4"))) == 2


def test_videos_depend_on_seed_and_index_not_on_the_batch_size(folder):
    def bytes_of(*options):
        sample("--generator", "c", "--class", "Surfing", "-n", "3", "--scale", "1", *options)
        return [Path(f"out/{number:03d}-Surfing.mp4").read_bytes() for number in range(3)]

    first = bytes_of("--batch-size", "3")
    assert bytes_of("--batch-size", "1") == first and len(set(first)) == 3
    assert not set(bytes_of("--seed", "1")) & set(first)


def test_every_sampling_option_reaches_the_sampler(folder, sampled_with):
    sample("--generator", "c", "--scale", "1")
    options = {"guidance-scale": 2, "guidance-final": 3, "guidance-start": 0.2, "guidance-stop": 0.9}
    options |= {"temperature": 0.9, "top-k": 7, "top-p": 0.8, "min-p": 0.1, "seed": 5}
    sample("--generator", "c", "--scale", "1", *(f"--{name}={value}" for name, value in options.items()))
    values = {name.replace("-", "_"): value for name, value in options.items() if name != "seed"}
    assert sampled_with == [(GuidedSampling(guidance_scale=2.0), 0), (GuidedSampling(**values), 5)]


def test_a_video_is_continued(folder, capsys, sampled_with):
    sample("--generator", "p", "--from", "clip.mp4", "--given", "3", "-n", "2", "--seconds", "0.56", "--scale", "1")
    *lines, sheet, seams = capsys.readouterr().out.splitlines()
    assert written() == ["000-clip.mp4", "001-clip.mp4", "sheet.png"] and sheet == "out/sheet.png"
    for number, line in enumerate(lines):
        assert re.fullmatch(rf"out/00{number}-clip.mp4: 7 frames at 12.5 fps, seams( [\d.]+){{4}} dB", line)
    assert re.match(r"seams: [\d.]+ dB on average of 8: PSNR", seams)
    assert probe("out/001-clip.mp4").frames == 7 and probe("out/001-clip.mp4").fps == 12.5
    assert all(sampling == GuidedSampling() for sampling, _ in sampled_with)
    sample("--generator", "p", "--from", "clip.mp4", "--given", "3", "--stride", "4", "--scale", "1")
    assert probe("out/000-clip.mp4").fps == 3.125 and probe("out/000-clip.mp4").frames == 4


def test_a_class_is_continued_by_another_generator(folder, capsys):
    small = ("--class", "Surfing", "--scale", "1")
    sample("--generator", "c", *small, "--seconds", "1", "--continue-with", "p", "--given", "2")
    assert "12 frames at 12 fps, seams" in capsys.readouterr().out
    assert probe("out/000-Surfing.mp4").frames == 12
    sample("--generator", "c", *small, "--seconds", "0.25")
    assert probe("out/000-Surfing.mp4").frames == 3


def run_of(folder: Path, **cache: int) -> Path:
    """The run of a generator on a token cache of clips at 20 frames a second; the working folder becomes its home."""
    where = tiny_cache(folder, classes=NAMES, key={"stride": 2} | cache)
    index = tokens.read_json(where / tokens.INDEX)
    columns, notes = tokens.read_shard(where / index["shards"][0])
    fps = torch.full((len(columns["codes"]),), 20.0, dtype=torch.float64)
    tokens.write_shard(where / index["shards"][0], columns | {"fps": fps}, notes["videos"], notes["skipped"])
    shape = dict(num_tokens=4, codebook_size=16, tokenizer_hash=index["key"]["tokenizer"])
    task = "frame-prediction" if cache else "class"
    random_generator(task=task, class_names=() if cache else NAMES, **shape).save_pretrained(folder / "run" / "model")
    (folder / "run" / "config.json").write_text(json.dumps({"tokens": str(where), "tokenizer": None, "stride": 1}))
    return folder / "run"


def test_tokenizer_and_frame_rate_come_from_the_run(folder, capsys):
    run = run_of(folder / "home")
    main(["sample", "--generator", str(run), "-o", "out", "--class", "Surfing"])
    assert probe("out/000-Surfing.mp4").fps == 20
    capsys.readouterr()
    LarpTokenizer.from_pretrained("t").save_pretrained(folder / "home" / "tokenizer")
    output = refused(capsys, "sample", "--generator", str(run), "-o", "out")
    assert "when it was trained" in output and "Give --tokenizer" in output


def test_given_frames_and_stride_come_from_the_run(folder):
    run = run_of(folder / "home", condition_frames=3)
    tokenizer = folder / "home" / "tokenizer"
    assert find_training(str(run)) == Training(str(tokenizer), None, 20, 2, 3)
    main(["sample", "--generator", str(run), "-o", "out", "--from", "clip.mp4", "--seconds", "1"])
    info = probe("out/000-clip.mp4")
    assert (info.frames, info.fps) == (6, 6.25)


@pytest.mark.slow
def test_a_trained_run_needs_no_other_option(tmp_path, monkeypatch):
    """As training/train_generator.py writes it."""
    monkeypatch.chdir(tmp_path)
    cache = tiny_cache(Path(), classes=NAMES)
    train(
        [
            "--tokens",
            str(cache),
            "--out",
            "run",
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--sampling.clips",
            "0",
            "--optimizer.warmup",
            "1",
        ]
    )
    main(["sample", "--generator", "run", "-o", "out", "-n", "3"])
    assert written() == ["000-Archery.mp4", "001-Horse-Race.mp4", "002-Surfing.mp4", "sheet.png"]


def test_a_run_without_a_cache_has_its_options(tmp_path):
    random_generator().save_pretrained(tmp_path / "model")
    options = {"tokens": None, "tokenizer": "somewhere/t", "stride": 3, "condition_frames": 2}
    (tmp_path / "config.json").write_text(json.dumps(options))
    assert find_training(str(tmp_path / "model")) == Training("somewhere/t", None, None, 3, 2)
    (tmp_path / "config.json").write_text(json.dumps(options | {"tokens": "gone"}))
    assert find_training(str(tmp_path / "model")) == Training("somewhere/t", missing="gone")
    (tmp_path / "config.json").write_text(json.dumps({"data": "shapes:"}))
    assert find_training(str(tmp_path / "model")) == find_training("owner/name") == Training()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        find_training(str(tmp_path / "model"))
    (tmp_path / "config.json").write_text(json.dumps(options | {"tokens": 5}))
    with pytest.raises(ValueError, match=r"config.json: tokens is 5, expected a path or null: copy the run again"):
        find_training(str(tmp_path / "model"))


def test_a_run_is_used_from_another_folder(folder, monkeypatch, capsys):
    run = run_of(folder / "home", condition_frames=3)
    cache = next(path.parent for path in (folder / "home").rglob(tokens.INDEX))
    index = tokens.read_json(cache / tokens.INDEX) | {"tokenizer": "home/tokenizer"}
    (cache / tokens.INDEX).write_text(json.dumps(index))
    (run / "config.json").write_text(json.dumps({"tokens": str(cache.relative_to(folder)), "tokenizer": None}))
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    main(["sample", "--generator", str(run), "-o", "out", "--from", "../clip.mp4", "--seconds", "1"])
    info = probe("out/000-clip.mp4")
    assert (info.frames, info.fps) == (6, 6.25) and "note:" not in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps({"tokens": "gone/cache", "tokenizer": None}))
    options = ("sample", "--generator", str(run), "-o", "out", "--from", "../clip.mp4")
    assert "home/run, gone/cache, is found neither here" in refused(capsys, *options)
    main([*options, "--tokenizer", str(folder / "home" / "tokenizer"), "--given", "2"])
    output = capsys.readouterr().err
    assert "gone/cache, is not found: --stride is 1" in output and "--given is" not in output


def test_a_damaged_cache_of_a_run_is_named(folder, capsys):
    run = run_of(folder / "home")
    cache = next(path.parent for path in (folder / "home").rglob(tokens.INDEX))
    (cache / tokens.INDEX).write_text("{}")
    output = refused(capsys, "sample", "--generator", str(run), "-o", "out")
    assert "index.json is damaged: it lacks key, classes, tokenizer, shards; delete this file" in output
    with pytest.raises(tokens.TokenCacheError, match=r"index.json is damaged"):
        tokens.TokenCache.open(cache)


def test_the_averaged_weights_of_a_generator(folder, capsys):
    assert "holds no variant 'ema'" in refused(
        capsys, "sample", "--generator", "c", "-o", "out", "--generator-variant=ema"
    )
    model = LarpGenerator.from_pretrained("c/model")
    average = LarpGenerator.from_pretrained("c/model")
    with torch.no_grad():
        average.output.weight.neg_()
    model.save_pretrained("c/model", ema=average)
    sample("--generator", "c", "--class", "0")
    plain = Path("out/000-Archery.mp4").read_bytes()
    sample("--generator", "c", "--class", "0", "--generator-variant", "ema")
    assert Path("out/000-Archery.mp4").read_bytes() != plain


@pytest.mark.parametrize(
    "options, words",
    [
        ("--generator c --class Surfin", "unknown class 'Surfin'; nearest: Surfing (of 3)"),
        ("--generator c --class 3", "class 3 is out of range"),
        ("--generator c --class -1", "class -1 is out of range: this generator has the classes 0 to 2"),
        ("--generator c --scale 1000", "scale is 1000: pictures of 24000 x 16000 pixels"),
        ("--generator p --class Surfing", "p continues given frames: give --from VIDEO in place of --class"),
        ("--generator p", "p continues given frames: give --from VIDEO\n"),
        ("--generator c --from clip.mp4", "c writes videos of classes: --from needs one of --task frame-prediction"),
        ("--generator t", "t holds a larp-tokenizer, not a larp-generator"),
        ("--generator none", "none: no such folder"),
        ("--generator c --tokenizer other", "use that tokenizer, or train again"),
        ("--generator c --tokenizer larger", "6 codes of 33 values, but the generator was trained on 6 codes of 32"),
        ("--generator c --variant ema", "model.ema.safetensors"),
        ("--generator c -n 0", "num_videos is 0"),
        ("--generator c -n 1 --class 0 --class 1", "num_videos is 1, but 2 classes are named"),
        ("--generator c --batch-size 0", "batch_size is 0"),
        ("--generator c --scale 0", "scale is 0"),
        ("--generator c --fps 0", "fps is 0.0"),
        ("--generator c --fps nan", "fps is nan"),
        ("--generator c --fps 1001", "fps is 1001"),
        ("--generator c --seconds -1", "seconds is -1"),
        ("--generator c --seconds inf", "seconds is inf"),
        ("--generator c --seconds 1", "12 frames are more than the 4 of one clip"),
        ("--generator c --seconds 1 --continue-with c", "trained with --task class"),
        ("--generator c --seconds 1 --continue-with p", "given is 5; it must be 1 to 3"),
        ("--generator c --seconds 0.1 --continue-with p", "which is one window: leave --continue-with out"),
        ("--generator c --continue-with p", "give --seconds"),
        ("--generator c --given 3", "--given is for --from VIDEO"),
        ("--generator c --stride 3", "--stride is for --from VIDEO"),
        ("--generator p --from clip.mp4 --continue-with p --seconds 1", "--continue-with is for classes"),
        ("--generator p --from clip.mp4 --given 4", "given is 4; it must be 1 to 3"),
        (
            "--generator p --from clip.mp4 --given 3 --seconds 0.2",
            "--seconds 0.2 at 12.5 fps: total_frames is 2, but 3 frames are given: ask for more --seconds",
        ),
        ("--generator p --from short.mp4 --given 3", "short.mp4: has 2 frames, fewer than the 3 given frames"),
        ("--generator p --from clip.mp4 --given 3 --guidance-scale 2", "use guidance_scale 1.0"),
        ("--generator p --from none.mp4", "none.mp4: no such file"),
        ("--generator c --guidance-scale -1", "guidance_scale is -1.0"),
        ("--generator c --guidance-start 0.5 --guidance-stop 0.5", "0 <= start < stop <= 1"),
        ("--generator c --min-p 2", "min_p is 2.0"),
        ("--generator c --device nonsense", "device 'nonsense'"),
        ("--generator c -o clip.mp4", "clip.mp4 is the name of a file"),
        ("--generator c -o text", "text is a file, not a folder"),
        ("--generator c -o /proc/x", "/proc takes no files"),
        ("--generator c -o =", "--out is empty"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(folder, capsys, options, words):
    before = sorted(folder.rglob("*"))
    given = ["" if option == "=" else option for option in options.split()]
    output = refused(capsys, "sample", "-o", "out", "--tokenizer", "t", *given)
    assert words in output
    assert sorted(folder.rglob("*")) == before


def test_without_a_run_the_tokenizer_must_be_named(folder, capsys):
    assert "p does not say which tokenizer made its codes: give --tokenizer" in refused(
        capsys, "sample", "--generator", "p", "--from", "clip.mp4", "-o", "out"
    )
