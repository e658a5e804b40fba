"""larp-mllm pack-clips: the clips of data sets as one small file."""

import argparse
from pathlib import Path

from larp.config import DATA_SPECS
from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "pack-clips",
        help="write the clips of data sets into one small file, to train on elsewhere",
        description="Write the middle frames of every video of some data sets into one file, as small square H.264 videos.\n"
        "Videos keep their split; those of folders, and of manifests without one, are for training. Of UCF-101's\n"
        "training list, the last group of each class is for validation. `larp-mllm unpack-clips` reads the file.",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        metavar="SPEC",
        help=f"{DATA_SPECS}; may be given several times",
    )
    parser.add_argument(
        "--more",
        action="append",
        default=[],
        metavar="SPEC",
        help="more videos for training alone, without their classes (a tokenizer needs none); may be given several times",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="file to write; replaced if it exists")
    parser.add_argument("--size", type=int, default=84, help="pixels along both sides")
    parser.add_argument("--max-frames", type=int, default=96, help="most frames of a clip for training")
    parser.add_argument("--held-out-frames", type=int, default=32, help="most frames of a clip for validation or test")
    parser.add_argument("--crf", type=int, default=20, help="x264's quality, from 0 (best) to 51")
    parser.add_argument("--workers", type=int, help="threads (default: one for each core)")


def run(arguments: argparse.Namespace) -> None:
    """Write the pack; print its contents."""
    from larp.data.clip_pack import PackOptions, pack_clips

    options = PackOptions(arguments.size, arguments.max_frames, arguments.held_out_frames, arguments.crf)
    report = pack_clips(arguments.data, arguments.out, options, arguments.workers, arguments.more)
    for name, reason in report.skipped:
        print(f"left out: {name}: {reason}")
    clips = ", ".join(f"{count} {split}" for split, count in report.clips.items())
    print(
        f"{arguments.out}: {report.bytes} bytes, {clips} clips, {report.frames} frames of {options.size}x{options.size}, "
        f"{report.psnr:.2f} dB"
    )
    if report.short:
        print(
            f"note: {len(report.short)} clips have fewer than 16 frames, too few for most models, such as {report.short[0]}"
        )
    if "test" not in report.clips:
        print("note: no clip is for test: a training on them needs other clips with --eval-data")
