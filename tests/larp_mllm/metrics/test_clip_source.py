"""Where an evaluation's generated clips come from: a language model's own codes, and which options choose a model."""

import json
from dataclasses import replace

from larp.data.listing import VideoItem, VideoSet
from larp.data.video import write_video
from larp.metrics.clip_source import GeneratorSource
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.models.tokenizer import LarpTokenizer
from larp.sampling.options import GuidedSampling
from larp_mllm.data.phrases import PHRASINGS
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.locate import set_default_model
from larp_mllm.metrics.clip_source import ClipSourceConfig, MllmSource
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm, tiny_video_tokenizer

import numpy as np
import pytest
import torch

CLASSES = ("Archery", "PlayingPiano")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A language model, and a generator with its tokenizer."""
    root = tmp_path_factory.mktemp("sources")
    mllm = tiny_mllm()
    mllm.model.config.frame_stride = 2
    mllm.save(root / "mllm/model")
    tokenizer = tiny_video_tokenizer()
    tokenizer.save_pretrained(root / "tokenizer")
    small = dict(num_tokens=4, codebook_size=16, depth=1, heads=2, width=16, ffn_multiple=16)
    names = dict(num_classes=2, class_names=CLASSES, tokenizer_hash=tokenizer.weight_hash())
    LarpGenerator(GeneratorConfig(**small, **names)).save_pretrained(root / "generator")
    return root


@pytest.fixture(scope="module")
def videos(root):
    items = tuple(VideoItem(path=root / name, name=name, label=number) for number, name in enumerate(CLASSES))
    return VideoSet(items, CLASSES, "data")


def open_source(root, **options):
    return ClipSourceConfig(**{"data": "data"} | options, device="cpu", out=root / "x.json").resolved().open_source()


def test_a_language_model_gets_the_phrasings_of_its_training_in_turn(root, videos):
    source = open_source(root, mllm=str(root / "mllm"))
    assert source.prompts(videos, [1, 0, 1]) == [
        PHRASINGS[0].format("playing piano"),
        PHRASINGS[0].format("archery"),
        PHRASINGS[1].format("playing piano"),
    ]
    assert source.prompts(videos, [0] * 7)[6] == "archery"
    assert source.notes(videos)["prompts"]["Archery"] == [text.format("archery") for text in PHRASINGS]


def test_its_clips_are_those_that_it_generates(root, videos):
    source, labels = open_source(root, mllm=str(root / "mllm")), [0, 1, 1, 0, 1]
    sampling = GuidedSampling(guidance_scale=2.0, top_k=5)
    source.check(videos, labels, sampling)
    batches = list(source.clips(videos, labels, sampling, 7, 2))
    assert [len(codes) for _, codes in batches] == [2, 2, 1]
    clips, codes = (torch.cat(parts) for parts in zip(*batches, strict=True))
    options = VideoSampling(guidance_scale=2.0, top_k=5, seed=7)
    made = Mllm.load(root / "mllm").generate(source.prompts(videos, labels), sampling=options)
    assert codes.tolist() == [list(video.codes) for video in made]
    torch.testing.assert_close(clips, source.tokenizer.decode(codes), rtol=0, atol=1e-5)
    ((_, whole),) = source.clips(videos, labels, sampling, 7, 5)
    assert torch.equal(whole, codes)
    other = torch.cat([batch for _, batch in source.clips(videos, labels, sampling, 8, 5)])
    assert not torch.equal(other, codes)


def test_its_shape_and_hashes(root):
    source = open_source(root, mllm=str(root / "mllm"))
    assert isinstance(source, MllmSource) and source.shape.stride == 2 and source.shape.frames == 4
    assert set(source.checkpoints) == {
        "mllm/model.safetensors",
        "mllm/video_tokenizer/model.safetensors",
        "tokenizer",
    }


@pytest.mark.parametrize("ramp", [{"guidance_final": 2.0}, {"guidance_start": 0.5}, {"guidance_stop": 0.5}])
def test_guidance_that_changes_along_the_clip_is_refused(root, videos, ramp):
    source = open_source(root, mllm=str(root / "mllm"))
    with pytest.raises(ValueError, match="one guidance scale for all codes of a clip; leave out --guidance-final"):
        source.check(videos, [0], GuidedSampling(), GuidedSampling(**ramp))


def test_a_generator_with_its_tokenizer(root, videos):
    source = open_source(root, generator=str(root / "generator"), tokenizer=str(root / "tokenizer"))
    assert isinstance(source, GeneratorSource) and set(source.checkpoints) == {"generator", "tokenizer"}
    source.check(videos, [0, 1], GuidedSampling())
    with pytest.raises(ValueError, match="Knitting"):
        source.check(VideoSet((), ("Knitting",), "data"), [0])
    with pytest.raises(ValueError, match="holds none of a clip's 4 codes"):
        source.check(videos, [], GuidedSampling(guidance_start=0.8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "a", "mllm": "b"}, "--generator, --mllm: both are given; give one of them"),
        (
            {"data": ""},
            r"^no data: .*LARP_UCF101 to ROOT\. UCF-101 is .*: ROOT holds UCF-101/<class>/.*ucfTrainTestlist",
        ),
        (
            {"mllm": "a", "tokenizer": "b"},
            "--mllm a: a language model has its own video tokenizer; leave out --tokenizer",
        ),
        ({"mllm": "a", "variant": "ema"}, "leave out --tokenizer and --variant"),
        ({"mllm": "a"}, "--mllm a: there is no such folder, .* Give --mllm such a folder, .*, or tiny, which comes"),
    ],
)
def test_one_model_is_chosen(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, **options)


def test_by_default_the_generator_is_that_of_the_package_with_its_tokenizer(root):
    source = open_source(root)
    assert source.generator.config.tokenizer_hash == source.tokenizer.weight_hash() and source.shape.frames == 16


def test_the_data_come_from_the_environment_else_from_the_run(root, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    LarpGenerator.from_pretrained(root / "generator").save_pretrained(run / "model")
    options = {"tokens": None, "tokenizer": str(root / "tokenizer"), "data": "jsonl:list.jsonl"}
    (run / "config.json").write_text(json.dumps(options))
    set_default_model(run / "model", "generator")
    config = ClipSourceConfig(device="cpu", out=tmp_path / "x.json")
    assert config.resolved().data == "jsonl:list.jsonl" and config.resolved().generator == str(run / "model")
    assert f"the data are jsonl:list.jsonl ({run / 'model'})" in capsys.readouterr().err
    source = config.resolved().open_source()
    assert source.tokenizer.weight_hash() == LarpTokenizer.from_pretrained(root / "tokenizer").weight_hash()
    monkeypatch.setenv("LARP_UCF101", str(tmp_path))
    assert config.resolved().data == f"ucf101:{tmp_path}"
    monkeypatch.setenv("LARP_UCF101", "/nowhere")
    with pytest.raises(ValueError, match=r"LARP_UCF101=/nowhere: there is no such folder\. UCF-101 is"):
        config.resolved()
    assert replace(config, data="shapes:").resolved().data == "shapes:"


def test_videos_of_classes_that_the_generator_knows_are_used(root, tmp_path, capsys):
    """Three classes, of which the generator knows two; then none."""
    lines = [
        {"path": f"{name}.mp4", "label": name, "split": "test"} for name in ("Archery", "Knitting", "PlayingPiano")
    ]
    write_video(tmp_path / "Archery.mp4", np.zeros((4, 16, 16, 3), np.uint8), 25)

    def videos(*lines):
        (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
        config = ClipSourceConfig(
            data=f"jsonl:{tmp_path / 'list.jsonl'}", device="cpu", generator=str(root / "generator")
        )
        source = replace(config, tokenizer=str(root / "tokenizer")).open_source()
        return source, config.open_videos(source, "test")

    source, found = videos(*lines)
    assert found.classes == ("Archery", "PlayingPiano") and [item.label for item in found.items] == [0, 1]
    assert "note: the generator knows 2 of the 3 classes of jsonl:" in capsys.readouterr().err
    assert "their 2 videos are used" in source.notes(found)["notes"][-1]
    source.check(found, [0, 1])
    source, found = videos(lines[0], lines[2])
    assert source.notes(found) == {} and capsys.readouterr().err == ""
    with pytest.raises(
        ValueError, match=r"knows none of the 1 classes of jsonl:.*, but Archery, PlayingPiano: give the data"
    ):
        videos(lines[0] | {"label": "Knitting"})
