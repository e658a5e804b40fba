"""larp-mllm sample: videos of a class, and videos that go on, from a trained generator."""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from larp.sampling.options import GuidedSampling
from larp_mllm.cli import options

if TYPE_CHECKING:
    from larp.models.generator import LarpGenerator
    from larp.models.tokenizer import LarpTokenizer
    from larp.sampling.long_clips import LongClip
    from larp.sampling.training_info import Training

CLASS_GUIDANCE = 1.25
DESCRIPTION = f"""\
Write videos of classes, or videos that go on from the last frames of a video, with a generator of
training/train_generator.py: numbered .mp4 files and one contact sheet, sheet.png, in the folder OUT.
Longer videos are written window by window: the last frames of each are the given frames of the next. They are kept as
they are; for every window it is printed how well the model gives them back (PSNR in dB: the seams).
The guidance scale is {CLASS_GUIDANCE} for classes and 1 (off) for --from, unless --guidance-scale says otherwise."""
FPS = 12.0


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "sample",
        help="write videos of a class, or videos that go on from a video",
        description=DESCRIPTION,
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--generator", required=True, help="folder or hub name of a trained generator, or the folder of its run"
    )
    parser.add_argument(
        "--tokenizer",
        help="folder or hub name, or the folder of its run (default: the one that the generator's run names)",
    )
    parser.add_argument(
        "--variant", choices=["ema"], help="of the tokenizer, not of the generator. ema: its averaged weights"
    )
    parser.add_argument(
        "--generator-variant",
        choices=["ema"],
        help="of --generator. ema: its averaged weights, where it was trained with --ema",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="name or number of a class; several take turns (default: all classes in turn)",
    )
    what.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="VIDEO",
        help="go on from the last frames of this video, with a generator trained with --task frame-prediction",
    )
    parser.add_argument(
        "-n", "--num-videos", type=int, help="how many in all (default: one, or one for each --class named)"
    )
    parser.add_argument(
        "-o", "--out", required=True, help="a folder; files in it are replaced by those of the same name"
    )
    _add_length(parser)
    options.add_seed(parser)
    options.add_sampling(parser, GuidedSampling.__dataclass_fields__, guidance_scale=None)
    parser.add_argument(
        "--scale", type=int, help="repeat each pixel so often (default: so that the video is at least 256 high)"
    )
    options.add_device(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="videos at a time; does not change them")


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        type=float,
        help="length of each video, with the given frames (default: one window, the tokenizer's)",
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="frames per second (default: those of --from, else those of the clips trained on where the run of the "
        f"generator says so, else {FPS:g})",
    )
    parser.add_argument(
        "--given",
        type=int,
        help="frames that each window goes on from (default: as in training where the run says so, else 5)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="every n-th frame of --from is given (default: as in training where the run says so, else 1)",
    )
    parser.add_argument(
        "--continue-with",
        metavar="GENERATOR",
        help="a generator trained with --task frame-prediction on codes of the same tokenizer, which writes all "
        "windows of a class but the first; guided like the first if it can be",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the videos and the sheet; print their paths and seams."""
    from larp.data.clips import clip_to_frames
    from larp.data.contact_sheet import Gallery, check_scale
    from larp.hub import choose_device
    from larp.models.generator import LarpGenerator
    from larp.sampling.training_info import find_training

    folder, sampling = _check(arguments), _sampling(arguments)
    device = choose_device(arguments.device)
    generator = LarpGenerator.from_pretrained(arguments.generator, device=device, variant=arguments.generator_variant)
    labels = _labels(arguments, generator)
    training = find_training(arguments.generator)
    tokenizer = _load_tokenizer(arguments, generator, training)
    if arguments.scale is not None:
        check_scale(arguments.scale, tokenizer.config.height, tokenizer.config.width)
    fps = _fps(arguments, training)
    names, clips = _videos(arguments, generator, tokenizer, training, labels, fps, sampling)
    gallery, seams = Gallery(folder, fps, arguments.scale), []
    for batch in clips:
        for clip, row in zip(batch.frames, batch.seam_psnr.tolist(), strict=True):
            path = gallery.add(names[len(gallery.names)], clip_to_frames(clip))
            about = f", seams {' '.join(f'{value:.1f}' for value in row)} dB" if row else ""
            print(f"{path}: {clip.shape[1]} frames at {fps:g} fps{about}", flush=True)
            seams += row
    print(gallery.write_sheet())
    if seams:
        print(
            f"seams: {sum(seams) / len(seams):.2f} dB on average of {len(seams)}: PSNR of what the model makes of the"
            " given frames, which are kept as they were"
        )


def _check(arguments: argparse.Namespace) -> Path:
    """The folder OUT; ValueError for what can be told to be wrong before anything is loaded."""
    from larp.data.contact_sheet import SHEET
    from larp.data.video import probe
    from larp.files import check_writable
    from larp_mllm.video import SUFFIXES

    for name in ("num_videos", "scale", "batch_size", "stride", "given"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    for name, most in (("seconds", math.inf), ("fps", 1000)):
        value = getattr(arguments, name)
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be above 0" + (f", {most} at most" if name == "fps" else ""))
    if arguments.classes and arguments.num_videos is not None and arguments.num_videos < len(arguments.classes):
        raise ValueError(f"num_videos is {arguments.num_videos}, but {len(arguments.classes)} classes are named")
    if arguments.source is None:
        if arguments.stride is not None:
            raise ValueError("--stride is for --from VIDEO: leave it out")
        if arguments.given is not None and arguments.continue_with is None:
            raise ValueError("--given is for --from VIDEO or --continue-with GENERATOR: leave it out")
    elif arguments.continue_with is not None:
        raise ValueError("--continue-with is for classes: a video goes on with the --generator")
    else:
        probe(arguments.source)
    if arguments.continue_with is not None and arguments.seconds is None:
        raise ValueError("--continue-with is for videos longer than one window: give --seconds")
    if not arguments.out.strip():
        raise ValueError("--out is empty: name a folder, such as out/")
    folder = Path(arguments.out)
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise ValueError(f"{folder} is the name of a file; --out is a folder, in which the videos are numbered")
    check_writable(folder / SHEET)
    return folder


def _sampling(arguments: argparse.Namespace) -> GuidedSampling:
    """The sampling that was asked for, checked."""
    default = CLASS_GUIDANCE if arguments.source is None else 1.0
    return GuidedSampling.of(arguments, **({"guidance_scale": default} if arguments.guidance_scale is None else {}))


def _labels(arguments: argparse.Namespace, generator: "LarpGenerator") -> list[int]:
    """The class of each video; none for --from. ValueError if the generator is for the other of the two."""
    if arguments.source is not None:
        if generator.config.task == "class":
            raise ValueError(
                f"{arguments.generator} writes videos of classes: --from needs one of --task frame-prediction"
            )
        return []
    if generator.config.task != "class":
        raise ValueError(
            f"{arguments.generator} goes on from given frames: give --from VIDEO"
            + (" in place of --class" if arguments.classes else "")
        )
    chosen = generator.class_labels(arguments.classes or range(generator.config.num_classes)).tolist()
    count = arguments.num_videos or len(arguments.classes or [0])
    return [chosen[number % len(chosen)] for number in range(count)]


def _load_tokenizer(arguments: argparse.Namespace, generator: "LarpGenerator", training: "Training") -> "LarpTokenizer":
    """The tokenizer that was chosen, or that the generator's run names; ValueError if it is not the generator's."""
    remembered = arguments.tokenizer is None
    if remembered and training.tokenizer is None and training.missing:
        raise ValueError(
            f"the run of {arguments.generator} names its token cache as it was typed then, {training.missing}, which is "
            "found neither here nor around the run, so its tokenizer is not known: give --tokenizer"
        )
    if remembered and training.tokenizer is None:
        raise ValueError(f"{arguments.generator} does not say which tokenizer made its codes: give --tokenizer")
    variant = training.variant if remembered and arguments.variant is None else arguments.variant
    wanted = argparse.Namespace(
        tokenizer=training.tokenizer if remembered else arguments.tokenizer, variant=variant, device=arguments.device
    )
    try:
        tokenizer = options.load_tokenizer(wanted)
        generator.check_tokenizer(tokenizer.num_tokens, tokenizer.codebook_size, tokenizer.weight_hash())
    except ValueError as error:
        if not remembered:
            raise
        raise ValueError(
            f"the run of {arguments.generator} names its tokenizer as it was typed then, {wanted.tokenizer}: {error}. "
            "Give --tokenizer"
        ) from error
    return tokenizer


def _fps(arguments: argparse.Namespace, training: "Training") -> float:
    from larp.data.video import probe

    if arguments.fps is not None:
        return arguments.fps
    if arguments.source is not None:
        return probe(arguments.source).fps / _stride(arguments, training)
    return _trained("--fps", arguments.generator, training, training.fps, FPS)


def _stride(arguments: argparse.Namespace, training: "Training") -> int:
    return arguments.stride or training.stride or 1


def _trained(option: str, generator: str, training: "Training", found: float | None, default: float) -> float:
    """What the run says, or else the default, with a note where the run names a cache that would say it."""
    if found is None and training.missing:
        print(
            f"note: the token cache of {generator}, {training.missing}, is not found: {option} is {default:g}",
            file=sys.stderr,
        )
    return found or default


def _videos(
    arguments: argparse.Namespace,
    generator: "LarpGenerator",
    tokenizer: "LarpTokenizer",
    training: "Training",
    labels: list[int],
    fps: float,
    sampling: GuidedSampling,
) -> tuple[list[str], "Iterator[LongClip]"]:
    """The names of the videos, and the videos as they come."""
    from larp.models.generator import LarpGenerator
    from larp.sampling.long_clips import GIVEN, last_frames, sample_classes, sample_continuations
    from larp.sampling.training_info import find_training

    import torch

    total = None if arguments.seconds is None else max(1, round(arguments.seconds * fps))
    shared = {"sampling": sampling, "seed": arguments.seed, "batch_size": arguments.batch_size, "progress": True}
    if arguments.source is not None:
        count, size = arguments.num_videos or 1, tokenizer.config.clip_shape[1:]
        given = arguments.given or _trained("--given", arguments.generator, training, training.given, GIVEN)
        if arguments.stride is None:
            _trained("--stride", arguments.generator, training, training.stride, 1)
        frames = last_frames(arguments.source, given, _stride(arguments, training), *size)
        if total is not None and total <= frames.shape[1]:
            raise ValueError(
                f"--seconds {arguments.seconds:g} at {fps:g} fps: total_frames is {total}, but {frames.shape[1]} frames "
                "are given: ask for more --seconds"
            )
        videos = sample_continuations(generator, tokenizer, frames, count, total, given=given, **shared)
        return [arguments.source.stem] * count, videos
    if arguments.continue_with is not None:
        if total <= tokenizer.config.num_frames:
            raise ValueError(
                f"--seconds {arguments.seconds:g} at {fps:g} fps is {total} frames, which is one window: leave "
                "--continue-with out, or ask for more"
            )
        device = generator.output.weight.device
        shared["continuation"] = LarpGenerator.from_pretrained(arguments.continue_with, device=device)
        told = find_training(arguments.continue_with)
        shared["given"] = arguments.given or _trained("--given", arguments.continue_with, told, told.given, GIVEN)
    known = generator.config.class_names
    names = [known[label] if known else f"class {label}" for label in labels]
    return names, sample_classes(generator, tokenizer, torch.tensor(labels), total, **shared)
