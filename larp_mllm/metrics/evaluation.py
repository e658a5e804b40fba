"""Evaluation on held-out videos of named classes: bits, agreement with a classifier, captions, continuation.

Each function returns plain values for a record. Shapes: n clips of T frames, the first G of them given, N codes of a clip.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any

from larp.data.clips import ClipShape, pixels_to_clip
from larp.data.datasets import VideoSet, evenly_spaced, humanize
from larp.data.extraction import repeat_last
from larp.data.listing import captions_of
from larp.data.loader import iterate_once
from larp.data.token_cache import TokenCache
from larp.metrics.classifier import ClipClassifier, agreement
from larp.metrics.clipsets import RealClips, skipped_entries
from larp.metrics.frame_prediction import BASELINES, CODED_COPY, COPY, baselines, frame_psnr, paired_gain, psnr_figures
from larp.metrics.intervals import clustered_mean, sources, sources_of
from larp_mllm.data.phrases import PHRASINGS, caption_phrases, drop_mirrored_directions, drop_without_text
from larp_mllm.generation.sampling import VideoSampling
from larp_mllm.metrics.scores import caption_figures, code_bits, frequency_bits
from larp_mllm.pipeline import Mllm
from larp_mllm.video import Video

import torch
from torch import Tensor
from tqdm import tqdm

_MOST_COUNTED = 100_000


def clip_shape(mllm: Mllm) -> ClipShape:
    """Return the shape of the clips that a model was trained on."""
    return ClipShape(*mllm.processor.video_tokenizer.config.clip_shape, mllm.model.config.frame_stride)


def held_out_bits(mllm: Mllm, cache: TokenCache, train: TokenCache | None, batch_size: int) -> dict[str, Any]:
    """Return bits per code of the clips of a cache: after a caption in each phrasing, without text, and baselines.

    Args:
        train: the training clips, for the baseline of code frequencies, which 100,000 of them give.

    Keys: "first_phrasing", "all_phrasings", "without_text" and "text_saves" (without_text - first_phrasing), each {"mean",
    "interval_95"} over sources, see `larp.metrics.intervals`; "by_phrasing", "uniform", "frequencies" (with `train`), "num_clips", "num_videos".
    """
    cache = drop_mirrored_directions(drop_without_text(cache))
    groups = sources(cache.names)
    phrases = caption_phrases(cache)
    prompts = {text: _prompt(mllm, text) for text in {"", *(text for row in phrases for text in row)}}

    def bits(texts: Sequence[str]) -> Tensor:
        return code_bits(mllm.model, [prompts[text] for text in texts], cache.codes, batch_size)

    # Rows with fewer phrasings than others repeat theirs.
    each = [bits([row[k % len(row)] for row in phrases]) for k in range(max(map(len, phrases)))]
    without = bits([""] * len(phrases))
    report = {
        "first_phrasing": clustered_mean(each[0], groups),
        "all_phrasings": clustered_mean(torch.stack(each).mean(dim=0), groups),
        "by_phrasing": [values.mean().item() for values in each],
        "without_text": clustered_mean(without, groups),
        "text_saves": clustered_mean(without - each[0], groups),
        "uniform": math.log2(cache.codebook_size),
        "num_clips": len(cache),
        "num_videos": len(cache.videos.unique()),
        "num_sources": len(groups.unique()),
    }
    if train is not None:
        rows = torch.tensor(evenly_spaced(range(len(train)), _MOST_COUNTED))
        report["frequencies"] = frequency_bits(train.take("codes", rows), cache.codes, cache.codebook_size)
    return report


def prompts_of(videos: VideoSet) -> list[tuple[str, ...]]:
    """Return the prompts of each class: the phrasings of its name, or its videos' captions if those are not just the name."""
    names = [humanize(name) for name in videos.classes]
    if all(item.caption in (None, names[item.label]) for item in videos.items):
        return [tuple(phrasing.format(name) for phrasing in PHRASINGS) for name in names]
    own = [
        {text for item in videos.items if item.label == number for text in captions_of(item.caption)}
        for number in range(len(names))
    ]
    return [tuple(sorted(texts)) or (name,) for name, texts in zip(names, own, strict=True)]


def split_evenly(num_videos: int, classes: int) -> list[int]:
    """Return a class number for each video, the classes in turn; ValueError unless all get equally many."""
    if num_videos < 1 or num_videos % classes:
        near = [count * classes for count in (num_videos // classes, num_videos // classes + 1) if count > 0]
        raise ValueError(
            f"num_videos={num_videos} is no multiple of the {classes} classes: give {' or '.join(map(str, near))}"
        )
    return [number % classes for number in range(num_videos)]


def prompts_in_turn(texts: Sequence[Sequence[str]], labels: Iterable[int]) -> list[str]:
    """Return a prompt for each label: of the texts of its class, each clip of the class gets the next one."""
    turns = [cycle(of_class) for of_class in texts]
    return [next(turns[label]) for label in labels]


def generated_agreement(
    mllm: Mllm, classifier: ClipClassifier, texts: Sequence[Sequence[str]], num_videos: int, sampling: VideoSampling
) -> tuple[dict[str, Any], list[list[Video]]]:
    """Generate videos of classes; return how often the classifier agrees (see `agreement`), and the videos of each class.

    texts: the prompts of each class, used in turn. Raises ValueError unless num_videos is a multiple of the classes.
    """
    count = len(texts)
    labels = split_evenly(num_videos, count)
    videos = mllm.generate(prompts_in_turn(texts, labels), sampling=sampling)
    predicted = torch.cat([classifier.predict(pixels_to_clip(video.frames)[None]) for video in videos])
    return agreement(labels, predicted, classifier.classes), [videos[label::count] for label in range(count)]


def caption_accuracy(mllm: Mllm, videos: VideoSet, batch_size: int) -> dict[str, Any]:
    """Return how often the greedy caption of a video's centre clip names its class, see `caption_figures`.

    Also "captions", the 50 most frequent with their counts, and "skipped", the unreadable videos. Raises ValueError if no
    video can be read.
    """
    once = iterate_once(videos, clip_shape(mllm), batch_size)
    wanted: list[int] = []
    captions: list[str] = []
    places: list[int] = []
    for batch in tqdm(once, desc="describing", unit="batch", delay=2):
        wanted += batch["label"].tolist()
        places += batch["index"].tolist()
        captions += mllm.describe(list(batch["clip"]))
    if not wanted:
        raise ValueError(f"{videos.spec}: none of its {len(videos)} videos can be read, such as {once.skipped[0][0]}")
    frequent = sorted(set(captions), key=lambda text: (-captions.count(text), text))[:50]
    return caption_figures(captions, wanted, videos.classes, sources_of(videos.items[i] for i in places)) | {
        "captions": {text: captions.count(text) for text in frequent},
        "skipped": skipped_entries(once.skipped),
    }


@torch.inference_mode()
def continuation_figures(
    mllm: Mllm,
    videos: VideoSet,
    num_clips: int,
    seed: int,
    samplings: dict[str, VideoSampling],
    batch_size: int,
    show: Callable[[str, list[str], Tensor], None],
) -> dict[str, Any]:
    """Predict frames from the first G frames of real clips; return their PSNR beside baselines, and bits per code.

    Args:
        videos: labelled; unreadable ones are replaced by other windows, and listed.
        num_clips, seed: clips sampled from the non-overlapping windows of all videos, see `RealClips`.
        samplings: the ways to sample, by name; each is measured.
        show: called for each way with its name, the videos' names, and clips (n, 3, T, 2 H, W), originals above predictions.

    Returns `psnr_figures` of each way; "above": the gains over copying a frame; "given_frames_regenerated": PSNR of the
    given frames as decoded from the generated codes; "bits_after": bits per code after given frames, text, both, nothing;
    "skipped".
    """
    tokenizer, layout, shape = mllm.processor.video_tokenizer, mllm.processor.layout, clip_shape(mllm)
    given, device = mllm.model.config.given_frames, tokenizer.codebook.device
    sampled = RealClips(videos, shape, num_clips, seed, batch_size)
    real, before, whole = [], [], []
    values: dict[str, list[Tensor]] = {way: [] for way in BASELINES}
    for cpu_clip in sampled.sampled():
        clip = cpu_clip.to(device)
        real.append(cpu_clip)
        before.append(tokenizer.encode(repeat_last(clip, given)))
        whole.append(tokenizer.encode(clip))
        for way, made in baselines(tokenizer, clip, given, before[-1], whole[-1]).items():
            values[way].append(frame_psnr(clip, made, given))
    clips, given_codes, codes = torch.cat(real), torch.cat(before).tolist(), torch.cat(whole).cpu()
    psnrs, seams = {way: torch.cat(parts) for way, parts in values.items()}, {}
    selected = sampled.sampled_items
    for way, sampling in samplings.items():
        made = mllm.continue_clips(clips[:, :, :given], shape.frames, sampling=sampling)
        psnrs[way], seams[way] = frame_psnr(clips, made.frames, given), made.seam_psnr.double().mean().item()
        show(way, [item.name for item in selected], torch.cat([clips, made.frames], dim=3))
    texts = prompts_of(videos)
    text_ids = [mllm.processor.encode_text(texts[item.label][0]) for item in selected]
    contexts = {
        "given_frames_and_text": [layout.continuation(*pair) for pair in zip(text_ids, given_codes, strict=True)],
        "given_frames": [layout.continuation([], row) for row in given_codes],
        "text": [layout.prompt(text) for text in text_ids],
        "nothing": [layout.prompt([])] * len(codes),
    }
    groups = sources_of(selected)
    return psnr_figures(psnrs) | {
        "given": given,
        "frame": list(range(given + 1, shape.frames + 1)),
        "above": {
            way: {base: paired_gain((psnrs[way] - psnrs[base]).mean(dim=1), groups) for base in (COPY, CODED_COPY)}
            for way in samplings
        },
        "given_frames_regenerated": seams,
        "bits_after": {
            name: clustered_mean(code_bits(mllm.model, context, codes, batch_size), groups)
            for name, context in contexts.items()
        },
        "num_clips": len(clips),
        "skipped": sampled.skipped,
    }


def _prompt(mllm: Mllm, text: str) -> list[int]:
    return mllm.processor.layout.prompt(mllm.processor.encode_text(text))
