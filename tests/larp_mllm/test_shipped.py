"""The weights in the package: size, what they reconstruct, generate and describe, and what is said where they are the default."""

import shutil
from pathlib import Path

import larp_mllm
from larp.data.clips import frames_to_clip
from larp.data.video import probe, read_video, write_video
from larp.models.generator import LarpGenerator
from larp.models.losses import psnr
from larp.models.tokenizer import LarpTokenizer
from larp_mllm import locate
from larp_mllm.cli import main
from larp_mllm.locate import _say_once
from tests.larp.codec.test_whole_video import noise
from tests.larp_mllm.cli.test_cli import refused

import pytest
import torch

SHIPPED = Path(larp_mllm.__file__).parent / "shipped"


@pytest.fixture(scope="module")
def tokenizer() -> LarpTokenizer:
    return LarpTokenizer.from_pretrained(SHIPPED / "tokenizer")


def test_the_shipped_files_are_small(tokenizer):
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path.name for path in files if path.suffix not in (".md", ".json", ".safetensors")]
    assert tokenizer.config.clip_shape == (16, 64, 64) and tokenizer.num_tokens == 256


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A machine on which nothing was trained."""
    monkeypatch.setenv("LARP_MLLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LARP_MLLM_MODEL", raising=False)
    _say_once.cache_clear()


def test_the_language_model_is_the_default_and_says_what_it_is(fresh, capfd, tmp_path, monkeypatch):
    video = larp_mllm.generate("a person surfing")
    said = capfd.readouterr().err
    assert said.count("comes with larp-mllm") == 1 and "surfing" in said and "no word" not in said
    assert video.frames.shape == (16, 64, 64, 3) and len(video.codes) == 256 and video.fps == 25.0
    video.save(tmp_path / "surfing.mp4")
    assert larp_mllm.generate("a person surfing", model="tiny").codes == video.codes
    monkeypatch.chdir(SHIPPED)
    assert larp_mllm.generate("a person surfing", model="language-model").codes == video.codes
    assert "comes with" not in capfd.readouterr().err


def test_it_knows_what_it_was_trained_on(fresh, clips_root, capfd):
    """Clips of the test list: the nearest things to what its users will give it."""
    found = {
        name: larp_mllm.describe(clips_root / "ucf101/UCF-101" / f"{name}.mp4")
        for name in (
            "Surfing/v_Surfing_g01_c01",
            "BasketballDunk/v_BasketballDunk_g02_c02",
            "HorseRace/v_HorseRace_g01_c01",
        )
    }
    right = [name for name, text in found.items() if any(part in text for part in ("surf", "basketball", "horse")
             if part in name.lower())]  # fmt: skip
    assert len(right) >= 2, found


def test_a_prompt_far_from_the_captions_is_said(fresh, capfd):
    assert larp_mllm.generate("a spaceship landing").frames.shape == (16, 64, 64, 3)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "spaceship" in line]
    assert line.startswith('"a spaceship landing" has no word of the captions') and "surfing" in line


def test_the_generator_writes_codes_of_the_tokenizer(tokenizer):
    generator = LarpGenerator.from_pretrained(SHIPPED / "generator")
    generator.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())
    assert "Surfing" in generator.config.class_names and len(generator.config.class_names) == 6
    assert torch.allclose(generator.output.codebook, tokenizer.codebook, atol=0.01)


def test_a_class_is_sampled_without_further_options(fresh, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["sample", "--class", "Surfing"])
    out, said = capsys.readouterr()
    assert out == "samples/000-Surfing.mp4: 16 frames at 25 fps\nsamples/sheet.png\n"
    assert said.count("comes with larp-mllm: Archery, BasketballDunk") == 1
    assert probe("samples/000-Surfing.mp4").fps == 25
    main(["sample", "--class", "Surfing", "--seed", "1"])
    assert capsys.readouterr().out.endswith("samples-0/sheet.png\n")
    assert Path("samples/sheet.png").read_bytes() != Path("samples-0/sheet.png").read_bytes()
    assert "shipped/generator: unknown class 'Surfin'; nearest: Surfing" in refused(
        capsys, "sample", "--class", "Surfin"
    )
    assert "give --generator, trained with --task frame-prediction" in refused(capsys, "sample", "--from", "clip.mp4")


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("language-model/model.safetensors", ("generate", "surfing")),
        ("language-model/tokenizer.json", ("generate", "surfing", "--model", "tiny")),
        ("tokenizer/model.safetensors", ("generate", "surfing")),
        ("generator/model.safetensors", ("sample", "--class", "Surfing")),
        ("generator/training.json", ("sample", "--class", "Surfing")),
        ("tokenizer/config.json", ("sample", "--class", "Surfing")),
        ("tokenizer/model.safetensors", ("reconstruct", "clip.mp4", "-o", "again.mp4")),
    ],
)
def test_a_missing_or_truncated_file_is_named_with_its_remedy(file, command, fresh, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_video("clip.mp4", noise(4), 25)
    shutil.copytree(SHIPPED, tmp_path / "copy", copy_function=lambda source, to: Path(to).symlink_to(source))
    monkeypatch.setattr(locate, "_SHIPPED", tmp_path / "copy")
    path, content = tmp_path / "copy" / file, (SHIPPED / file).read_bytes()
    path.unlink()
    for state in ("missing", "damaged ("):
        said = refused(capsys, *command)
        assert f"{path}, which comes with larp-mllm, is {state}" in said and ": install the package again" in said
        path.write_bytes(content[: len(content) // 2])


def test_real_clips_are_reconstructed(tokenizer, clips_root):
    """Clips of the test list, not trained on: above 20 dB each, where the mean colour is below."""
    names = ("Surfing/v_Surfing_g01_c01", "Archery/v_Archery_g02_c02", "PlayingPiano/v_PlayingPiano_g03_c01")
    for name in names:
        frames, _ = read_video(clips_root / "ucf101/UCF-101" / f"{name}.mp4", 20, 16)
        clip = frames_to_clip(frames, 64, 64)[None]
        codes = tokenizer.encode(clip)
        reconstruction = tokenizer.decode(codes)
        mean_colour = clip.mean(dim=(2, 3, 4), keepdim=True).expand_as(clip)
        assert psnr(clip, reconstruction) > 20 > psnr(clip, mean_colour), name
        assert torch.equal(codes, tokenizer.encode(clip)) and codes.unique().numel() > 64
