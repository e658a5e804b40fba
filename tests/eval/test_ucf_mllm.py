"""eval/ucf_mllm.py, from the command line to the files, with a tiny random model; its figures against others made here."""

import json
import math
import re

from eval import ucf_mllm
from larp.data.clips import ClipShape, clip_to_frames
from larp.data.datasets import open_videos
from larp.data.loader import iterate_once
from larp.data.video import read_video, write_video
from larp.metrics.frame_prediction import CODED_COPY, COPY, RECONSTRUCTION
from larp_mllm.data.phrases import PHRASINGS
from larp_mllm.pipeline import Mllm
from larp_mllm.video import Video
from tests.larp_mllm.tiny import K, tiny_cache, tiny_mllm

import numpy as np
import pytest
import torch
from PIL import Image

COLOURS = {"Archery": (200, 60, 40), "PlayingViolin": (40, 60, 200)}
GIVEN = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos of two classes that differ in colour and grow light, a broken one, token caches, and a model that knows nothing."""
    root = tmp_path_factory.mktemp("ucf-mllm")
    lines, rng = [], np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 3)):
        for number in range(count):
            for name, colour in COLOURS.items():
                lit = np.array(colour) * np.linspace(0.2, 1.2, 9)[:, None, None, None]
                path = f"{split}-{name}-{number}.mp4"
                frames = (lit + rng.integers(-10, 10, (9, 16, 16, 3))).clip(0, 255).astype(np.uint8)
                write_video(root / path, frames, 25, quality=10)
                lines.append({"path": path, "label": name, "split": split})
    (root / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 broken")
    lines.append({"path": "broken.mp4", "label": "Archery", "split": "test"})
    (root / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tiny_cache(root / "test", rows=6, classes=tuple(COLOURS))
    tiny_cache(root / "train", rows=40, classes=tuple(COLOURS))
    tiny_cache(root / "other", rows=6, classes=tuple(COLOURS), seed=1)
    mllm = tiny_mllm()
    torch.nn.init.normal_(mllm.processor.video_tokenizer.head.weight, std=0.05)
    # Another head is another tokenizer: the model and the caches record that.
    mllm.model.config.video_tokenizer_hash = own = mllm.processor.video_tokenizer.weight_hash()
    for name in ("test", "train"):
        for path in (root / name / "cache/key.json", root / name / "cache/index.json"):
            path.write_text(re.sub(r'("tokenizer": )"[0-9a-f]{64}"', rf'\1"{own}"', path.read_text()))
    mllm.save(root / "plain/model")
    mllm.model.config.given_frames = GIVEN
    mllm.save(root / "model")
    return root


def run(world, out, *extra):
    options = {"--model": world / "model", "--data": f"jsonl:{world / 'list.jsonl'}", "--out": out, "--device": "cpu"}
    return ucf_mllm.main([*(str(part) for pair in options.items() for part in pair), *map(str, extra)])


def test_all_parts_with_one_command(world, tmp_path, capsys):
    out = tmp_path / "new" / "x.json"
    options = ["--eval-tokens", world / "test/cache", "--train-tokens", world / "train/cache", "--num-videos", 4]
    options += ["--num-clips", 4, "--guidance-scale", 1, 3, "--continuation-temperature", 1, "--show", 2]
    report = run(world, out, *options)
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert [figures["guidance_scale"] for figures in report["agreement"]["generated"]] == [1, 3]
    protocol = report["protocol"]
    assert protocol["model"]["given_frames"] == GIVEN and protocol["config"]["seed"] == 42
    assert set(protocol["checkpoint"]) == {"model.safetensors", "video_tokenizer/model.safetensors"}
    for part in ("agreement", "captions", "continuation"):
        (entry,) = report[part]["skipped"]
        assert entry["name"] == "broken.mp4" and "cannot be decoded" in entry["reason"], part
        assert str(world) not in json.dumps(report[part]) or part == "agreement"
    names = ["x-guidance-1.png", "x-guidance-3.png", "x-continuation-temperature-1.png"]
    assert report["files"] == [str(out.with_name(name)) for name in names]
    for name in names:
        assert min(Image.open(out.with_name(name)).size) > 50
    printed = capsys.readouterr().out
    for words in ("after the caption, first phrasing", f"{'real test clips':<34} 100.0%", "generated, guidance 3",
                  "captions that name the class", "prediction, temperature 1", "skipped broken.mp4", "seed 42"):  # fmt: skip
        assert words in printed, words


def test_bits_of_a_model_to_which_all_codes_are_alike(world, tmp_path):
    mllm = Mllm.load(world / "model")
    with torch.no_grad():
        for parameter in mllm.model.adapter.code_output.parameters():
            parameter.zero_()
    mllm.save(tmp_path / "model")
    report = run(world, tmp_path / "x.json", "--what", "bits", "--eval-tokens", world / "test/cache",
                 "--model", tmp_path / "model", "--data", "")["bits"]  # fmt: skip
    for name in ("first_phrasing", "all_phrasings", "without_text"):
        assert report[name]["mean"] == pytest.approx(math.log2(K)), name
    assert report["text_saves"]["mean"] == 0 and report["uniform"] == math.log2(K)
    assert report["num_videos"] == 6 and "frequencies" not in report


def test_bits_are_the_models_own(world, tmp_path):
    """The first phrasing alone by the logits of codes; every phrasing is another figure."""
    report = run(world, tmp_path / "x.json", "--what", "bits", "--eval-tokens", world / "test/cache",
                 "--train-tokens", world / "train/cache")["bits"]  # fmt: skip
    mllm = Mllm.load(world / "model")
    nats = 0.0
    for kind, text in enumerate(("archery", "playing violin")):
        codes = [(kind * 3 + place) % K for place in range(4)]
        prompt = mllm.processor.layout.prompt(mllm.processor.encode_text(text))
        ids = torch.tensor([[*prompt, *mllm.model.vocabulary.span(codes)[1:]]])
        logits = mllm.model(input_ids=ids).logits[0, len(prompt) - 1 : -2, mllm.model.vocabulary.first_code :]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(codes), reduction="sum").item()
    assert report["first_phrasing"]["mean"] == pytest.approx(nats / 8 / math.log(2), rel=1e-5)
    assert len(set(report["by_phrasing"])) == len(PHRASINGS)
    assert report["all_phrasings"]["mean"] == pytest.approx(np.mean(report["by_phrasing"]))
    saved = report["without_text"]["mean"] - report["first_phrasing"]["mean"]
    assert report["text_saves"]["mean"] == pytest.approx(saved) and saved != 0
    # Codes 0, 1, 2 and 4, 5, 6 come up 20 times each in training, code 3 in both classes, of 160.
    counts = [20] * 3 + [40] + [20] * 3
    entropy = sum(count / 160 * math.log2(160 / count) for count in counts)
    assert report["frequencies"]["entropy"] == pytest.approx(entropy)


def frames_of(colour) -> np.ndarray:
    return np.full((4, 16, 16, 3), colour, dtype=np.uint8)


def test_agreement_of_a_model_that_draws_one_class(world, tmp_path, monkeypatch):
    """It is right half of the time with all guidance scales; the prompts are the phrasings in turn."""
    asked = []

    def generate(self, prompts, num_videos=1, sampling=None, progress=None):
        asked.append((prompts, sampling))
        return [Video(frames_of(COLOURS["Archery"]), 25.0, prompt) for prompt in prompts]

    monkeypatch.setattr(ucf_mllm.Mllm, "generate", generate)
    options = ["--what", "agreement", "--num-videos", 14, "--guidance-scale", 1, 2, "--top-k", 3, "--show", 0]
    report = run(world, tmp_path / "x.json", *options)["agreement"]
    for figures in report["generated"]:
        assert figures["accuracy"] == 0.5 and figures["by_class"] == {"Archery": 1, "PlayingViolin": 0}
        assert figures["confusion"] == [[7, 0], [7, 0]]
    assert report["real"]["accuracy"] == 1 and report["real"]["num_clips"] == 6 == report["reconstructed"]["num_clips"]
    prompts, sampling = asked[1]
    assert prompts[::2] == [p.format("archery") for p in (*PHRASINGS, PHRASINGS[0])]
    assert prompts[1] == "playing violin" and (sampling.guidance_scale, sampling.top_k, sampling.seed) == (2, 3, 42)
    assert not list(tmp_path.glob("*.png"))


def test_agreement_of_a_model_that_draws_what_it_is_told(world, tmp_path, monkeypatch):
    def generate(self, prompts, num_videos=1, sampling=None, progress=None):
        colours = [COLOURS["PlayingViolin" if "violin" in prompt else "Archery"] for prompt in prompts]
        return [Video(frames_of(colour), 25.0) for colour in colours]

    monkeypatch.setattr(ucf_mllm.Mllm, "generate", generate)
    options = ["--what", "agreement", "--num-videos", 6, "--guidance-scale", 2, "--show", 3]
    report = run(world, tmp_path / "x.json", *options)
    assert report["agreement"]["generated"][0]["accuracy"] == 1
    # A row for each class, in whose columns its videos stand.
    sheet = np.asarray(Image.open(tmp_path / "x-guidance-2.png")).astype(int)
    for name, part in zip(COLOURS, np.split(sheet[: len(sheet) // 2 * 2], 2), strict=True):
        alike = np.abs(part - np.array(COLOURS[name])).max(axis=2) < 3
        assert alike.sum() == 3 * 80 * 80, name


@pytest.mark.parametrize("caption, share, unread", [("a person archery", 0.5, 0), ("something", 0, 6)])
def test_captions_that_are_always_the_same(world, tmp_path, monkeypatch, caption, share, unread):
    seen = []
    monkeypatch.setattr(ucf_mllm.Mllm, "describe", lambda self, clips: seen.extend(clips) or [caption] * len(clips))
    report = run(world, tmp_path / "x.json", "--what", "captions", "--batch-size", 4)["captions"]
    assert (report["accuracy"], report["unread"], report["num_clips"]) == (share, unread, 6)
    assert report["captions"] == {caption: 6} and report["chance"] == report["most_frequent"] == 0.5
    # The centre clips of the readable test videos.
    frames, _ = read_video(world / "test-Archery-0.mp4")
    assert np.array_equal(clip_to_frames(seen[0]), frames[2:6])


def test_continuation_beside_copying_by_hand(world, tmp_path, monkeypatch):
    """A model that writes the codes of the given frames is the copy through the tokenizer; baselines from the files."""
    clips: list = []

    def continue_clips(self, given, total, prompts=None, sampling=None, progress=None):
        assert given.shape[2] == GIVEN and prompts is None and sampling.guidance_scale == 1
        tokenizer = self.processor.video_tokenizer
        padded = torch.cat([given, given[:, :, -1:].expand(-1, -1, total - GIVEN, -1, -1)], dim=2)
        made = tokenizer.decode(tokenizer.encode(padded))
        clips.append(given)
        frames = torch.cat([given, made[:, :, GIVEN:]], dim=2)
        return type("LongClip", (), {"frames": frames, "seam_psnr": torch.full((len(given), 1), 7.0)})()

    monkeypatch.setattr(ucf_mllm.Mllm, "continue_clips", continue_clips)
    options = ["--what", "continuation", "--num-clips", 5, "--batch-size", 2, "--show", 0]
    report = run(world, tmp_path / "x.json", *options)["continuation"]
    way = "temperature 1"
    assert report["mean"][way] == pytest.approx(report["mean"][CODED_COPY], abs=1e-4)
    assert report["above"][way][CODED_COPY]["mean"] == pytest.approx(0, abs=1e-4)
    assert report["given_frames_regenerated"] == {way: 7.0, "temperature 0": 7.0}
    assert (report["given"], report["frame"], report["num_clips"]) == (GIVEN, [3, 4], 5)
    # Copying by hand: windows of 4 frames of 9, which the given frames identify.
    windows = [read_video(path)[0][first : first + 4] for path in sorted(world.glob("test-*.mp4")) for first in (0, 4)]
    values = []
    for given in map(clip_to_frames, clips[0]):
        window = next(window for window in windows if np.array_equal(window[:GIVEN], given)).astype(float)
        errors = ((window[GIVEN:] - window[GIVEN - 1]) ** 2).mean(axis=(1, 2, 3))
        values.append(10 * np.log10(255**2 / errors))
    assert report["mean"][COPY] == pytest.approx(np.mean(values), abs=1e-3)
    assert report["per_frame"][COPY] == pytest.approx(np.mean(values, axis=0).tolist(), abs=1e-3)
    gain = report["above"][way][COPY]
    assert gain["mean"] == pytest.approx(report["mean"][way] - report["mean"][COPY])
    assert report["mean"][RECONSTRUCTION] != report["mean"][CODED_COPY]
    assert set(report["bits_after"]) == {"given_frames_and_text", "given_frames", "text", "nothing"}
    assert len({figure["mean"] for figure in report["bits_after"].values()}) == 4


def test_sampling_and_seed_act_and_the_batch_does_not(world, tmp_path):
    def predicted(*extra):
        options = ["--what", "continuation", "--num-clips", 4, "--show", 0, "--continuation-temperature"]
        return run(world, tmp_path / "x.json", *options, *extra)["continuation"]["per_frame"]

    first = predicted(1)
    plain = first["temperature 1"]
    assert predicted(1, "--batch-size", 3)["temperature 1"] == pytest.approx(plain)
    both = predicted(1, 0, "--top-k", 2)
    assert both["temperature 1"] not in (plain, both["temperature 0"])
    assert predicted(1, "--seed", 1)[COPY] != first[COPY], "other clips"


def test_what_is_left_out_is_not_measured(world, tmp_path, monkeypatch):
    monkeypatch.setattr(ucf_mllm, "classifier_of", lambda *_: pytest.fail("the classifier was trained"))
    report = run(world, tmp_path / "x.json", "--model", world / "plain", "--what", "captions")
    assert set(report) == {"protocol", "captions", "files"} and report["files"] == []


def test_stride_is_that_of_the_model(world, tmp_path, monkeypatch):
    mllm = Mllm.load(world / "model")
    mllm.model.config.frame_stride = 2
    mllm.save(tmp_path / "model")
    seen = []
    original = Mllm.describe
    monkeypatch.setattr(Mllm, "describe", lambda self, clips: seen.extend(clips) or original(self, clips))
    options = ["--model", tmp_path / "model", "--what", "captions", "continuation", "--num-clips", 4]
    report = run(world, tmp_path / "x.json", *options)
    videos = open_videos(f"jsonl:{world / 'list.jsonl'}", "test")
    expected = torch.cat([batch["clip"] for batch in iterate_once(videos, ClipShape(4, 16, 16, 2), 8)])
    assert torch.equal(torch.stack(seen), expected)
    # Nine frames hold one window of 4 at stride 2.
    assert report["continuation"]["num_clips"] == 4 and "at stride 2" in report["protocol"]["clips"]
    with pytest.raises(ValueError, match="6 windows of 7 frames"):
        run(world, tmp_path / "x.json", *options[:-1], 7)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--what", "bits"], "bits needs --eval-tokens"),
        (["--what", "captions", "--data", ""], "captions: --data is needed"),
        (["--what", "agreement", "--num-videos", "5"], "no multiple of the 2 classes: give 4 or 6"),
        (["--what", "agreement", "--num-videos", "1"], "num_videos=1 is no multiple of the 2 classes: give 2"),
        (["--what", "continuation", "--model", "ROOT/plain"], "was not trained to continue clips"),
        (["--what", "bits", "--eval-tokens", "ROOT/other/cache"], "made from something else: tokenizer"),
        (["--what", "captions", "--model", "ROOT/nowhere"], "there is no such folder"),
        (["--out", "x.png"], "is the name of a picture"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, extra, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(world, tmp_path / "x.json", *[text.replace("ROOT", str(world)) for text in extra])


@pytest.mark.parametrize(
    "extra",
    [["--what"], ["--guidance-scale", "-1"], ["--continuation-temperature"], ["--num-clips", "1"], ["--top-p", "2"]],
)
def test_options_out_of_range_are_refused(world, tmp_path, extra, capsys):
    with pytest.raises(SystemExit):
        run(world, tmp_path / "x.json", *extra)
    assert extra[0][2:].split("-")[0] in capsys.readouterr().err.replace("_", "-")
