"""larp-mllm sample: videos of classes, or continuations of a video, by a trained generator."""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from larp.engine.generator_run import FPS
from larp.sampling.options import CLASS_GUIDANCE, GuidedSampling
from larp_mllm.cli import options
from larp_mllm.locate import find_generator, load_generator_tokenizer

if TYPE_CHECKING:
    from larp.engine.generator_run import Training
    from larp.models.generator import LarpGenerator
    from larp.models.tokenizer import LarpTokenizer
    from larp.sampling.long_clips import LongClip

_OUT = "samples"
DESCRIPTION = f"""\
Generate videos of classes, or continuations of a video, with a generator of training/train_generator.py: numbered .mp4
files and a contact sheet, sheet.png, in the folder OUT. Long videos are generated window by window: the last frames of
each window are given to the next, and are not changed. For each window the PSNR in dB between the given frames and the
model's version of them is printed (the seam).
The guidance scale is {CLASS_GUIDANCE} for classes and 1 (off) for --from, unless --guidance-scale says otherwise."""


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "sample",
        help="write videos of classes, or continuations of a video",
        description=DESCRIPTION,
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--generator",
        help="folder or hub name of a trained generator, or the folder of its run (default: the newest one for classes that "
        "was trained on this machine, else the one that comes with larp-mllm)",
    )
    parser.add_argument(
        "--tokenizer",
        help="folder or hub name of the tokenizer, or the folder of its run (default: the one that the generator was trained "
        "with)",
    )
    parser.add_argument("--variant", choices=["ema"], help="ema: the averaged weights of the tokenizer")
    parser.add_argument(
        "--generator-variant",
        choices=["ema"],
        help="ema: the averaged weights of the generator, if it was trained with --ema",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="name or number of a class, in any spelling (horse race, HorseRace); several are used in turn (default: all classes)",
    )
    what.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="VIDEO",
        help="continue the last frames of this video, with a generator trained with --task frame-prediction",
    )
    parser.add_argument("-n", "--num-videos", type=int, help="number of videos (default: one, or one for each --class)")
    parser.add_argument(
        "-o",
        "--out",
        help=f"folder to write to; files of the same names are replaced (default: {_OUT}; numbered, so that nothing is "
        "replaced)",
    )
    _add_length(parser)
    options.add_seed(parser)
    options.add_sampling(parser, GuidedSampling.__dataclass_fields__, guidance_scale=None)
    options.add_scale(parser)
    options.add_device(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="videos in one pass; does not change them")


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds",
        type=float,
        help="length of each video, given frames included (default: one window)",
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="frames per second (default: as in --from, else as in the generator's training if its run is known, else "
        f"{FPS:g})",
    )
    parser.add_argument(
        "--given",
        type=int,
        help="given frames of each window (default: as in training if the run is known, else 5)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        help="read every n-th frame of --from (default: as in training if the run is known, else 1)",
    )
    parser.add_argument(
        "--continue-with",
        metavar="GENERATOR",
        help="generator trained with --task frame-prediction on codes of the same tokenizer, for all windows of a class "
        "but the first; with the same guidance if it supports it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the videos and the sheet; print their paths and seams."""
    from larp.data.clips import clip_to_frames
    from larp.data.contact_sheet import Gallery, check_scale
    from larp.engine.generator_run import find_training
    from larp.hub import choose_device
    from larp.models.generator import LarpGenerator

    _check(arguments)
    sampling = _sampling(arguments)
    device = choose_device(arguments.device)
    arguments.generator = find_generator(arguments.generator, arguments.classes or ())
    generator = LarpGenerator.from_pretrained(arguments.generator, device=device, variant=arguments.generator_variant)
    labels = _labels(arguments, generator)
    training = find_training(arguments.generator)
    tokenizer = load_generator_tokenizer(
        arguments.generator, generator, training, arguments.tokenizer, arguments.variant, device
    )
    if arguments.scale is not None:
        check_scale(arguments.scale, tokenizer.config.height, tokenizer.config.width)
    fps = _fps(arguments, training)
    names, clips = _videos(arguments, generator, tokenizer, training, labels, fps, sampling)
    seams = []
    with _opened(arguments.out) as folder:
        gallery = Gallery(folder, fps, arguments.scale)
        for batch in clips:
            for clip, row in zip(batch.frames, batch.seam_psnr.tolist(), strict=True):
                path = gallery.add(names[len(gallery.names)], clip_to_frames(clip))
                about = f", seams {' '.join(f'{value:.1f}' for value in row)} dB" if row else ""
                print(f"{path}: {clip.shape[1]} frames at {fps:g} fps{about}", flush=True)
                seams += row
        print(gallery.write_sheet())
    if seams:
        print(
            f"seams: {sum(seams) / len(seams):.2f} dB on average of {len(seams)}: PSNR of the model's version of the given"
            " frames, which are not changed"
        )


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that are wrong whatever the model."""
    from larp.data.contact_sheet import SHEET
    from larp.data.video import probe
    from larp.files import check_writable, user_path
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
        raise ValueError("--continue-with is for classes: --from is continued by the --generator")
    elif arguments.generator is None:
        raise ValueError(
            "--from needs a generator that continues videos: give --generator, trained with --task frame-prediction"
        )
    else:
        probe(arguments.source)
    if arguments.continue_with is not None and arguments.seconds is None:
        raise ValueError("--continue-with is for videos longer than one window: give --seconds")
    if arguments.out is not None and not arguments.out.strip():
        raise ValueError("--out is empty: name a folder, such as out/")
    arguments.out = arguments.out and user_path(arguments.out)
    folder = arguments.out or next(name for name in _default_folders() if not name.exists())
    if folder.suffix.lower() in SUFFIXES and not folder.is_dir():
        raise ValueError(f"{folder} is the name of a file: give a folder with --out, the videos in it are numbered")
    check_writable(folder / SHEET)


@contextmanager
def _opened(out: Path | None) -> Iterator[Path]:
    """Yield the folder to write to, which no other program writes to at the same time: OUT, or the first default that is new."""
    from larp.files import writing_alone

    folder = out
    for name in _default_folders() if out is None else ():
        with suppress(FileExistsError):
            name.mkdir()
            folder = name
            break
    with writing_alone(folder):
        yield folder


def _default_folders() -> Iterator[Path]:
    return itertools.chain([Path(_OUT)], (Path(f"{_OUT}-{number}") for number in itertools.count()))


def _sampling(arguments: argparse.Namespace) -> GuidedSampling:
    """Return the checked sampling options."""
    default = CLASS_GUIDANCE if arguments.source is None else 1.0
    return GuidedSampling.of(arguments, **({"guidance_scale": default} if arguments.guidance_scale is None else {}))


def _labels(arguments: argparse.Namespace, generator: "LarpGenerator") -> list[int]:
    """Return the class of each video, none for --from; ValueError if the generator has the other task."""
    if arguments.source is not None:
        if generator.config.task == "class":
            raise ValueError(
                f"{arguments.generator} writes videos of classes: --from needs one of --task frame-prediction"
            )
        return []
    if generator.config.task != "class":
        raise ValueError(
            f"{arguments.generator} continues given frames: give --from VIDEO"
            + (" in place of --class" if arguments.classes else "")
        )
    try:
        selected = generator.class_labels(arguments.classes or range(generator.config.num_classes)).tolist()
    except ValueError as error:
        raise ValueError(f"{arguments.generator}: {error}") from error
    count = arguments.num_videos or len(arguments.classes or [0])
    return [selected[number % len(selected)] for number in range(count)]


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
    """Return the value found in the run, else the default, with a note if the run's token cache is missing."""
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
    """Return the names of the videos, and an iterator over the videos."""
    from larp.engine.generator_run import find_training
    from larp.models.generator import LarpGenerator
    from larp.sampling.long_clips import GIVEN, last_frames, sample_classes, sample_continuations

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
        other = find_training(arguments.continue_with)
        shared["given"] = arguments.given or _trained("--given", arguments.continue_with, other, other.given, GIVEN)
    known = generator.config.class_names
    names = [known[label] if known else f"class {label}" for label in labels]
    return names, sample_classes(generator, tokenizer, torch.tensor(labels), total, **shared)
