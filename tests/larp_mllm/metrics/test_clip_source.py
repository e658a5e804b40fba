"""Where an evaluation's generated clips come from: a language model's own codes, and which options choose a model."""

from larp.data.listing import VideoItem, VideoSet
from larp.metrics.clip_source import GeneratorSource
from larp.models.generator import GeneratorConfig, LarpGenerator
from larp.sampling.options import GuidedSampling
from larp_mllm.data.dataset import PHRASINGS
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.metrics.clip_source import ClipSourceConfig, MllmSource
from larp_mllm.pipeline import Mllm
from tests.larp_mllm.tiny import tiny_mllm, tiny_video_tokenizer

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
    return ClipSourceConfig(data="data", device="cpu", out=root / "x.json", **options).open_source()


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
        ({}, "--generator, --mllm: neither is given; give one of them"),
        ({"generator": "a", "mllm": "b"}, "--generator, --mllm: both are given; give one of them"),
        ({"generator": "a"}, "--tokenizer is needed with --generator"),
        (
            {"mllm": "a", "tokenizer": "b"},
            "--mllm a: a language model has its own video tokenizer; leave out --tokenizer",
        ),
        ({"mllm": "a", "variant": "ema"}, "leave out --tokenizer and --variant"),
        ({"mllm": "a"}, r"--mllm a: no model folder \(there is no such folder\)"),
    ],
)
def test_one_model_is_chosen(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path, **options)
