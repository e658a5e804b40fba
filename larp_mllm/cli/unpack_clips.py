"""larp-mllm unpack-clips: the clips of a pack as a folder of frames."""

import argparse
from pathlib import Path

from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "unpack-clips",
        help="write the clips of a pack into a folder of frames, which need no video decoder",
        description="Write the clips of a pack into a folder, as .npy files of frames, with two manifests: DIR/clips.jsonl\n"
        "of all, DIR/labelled.jsonl of those with a class. Train on them with --data jsonl:DIR/clips.jsonl. Needs PyAV or\n"
        "OpenCV. A folder that already holds these clips is not changed.",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument("pack", type=Path, help="file of larp-mllm pack-clips")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--size", type=int, help="pixels along both sides (default: as they were packed)")
    parser.add_argument("--workers", type=int, help="threads (default: one for each core)")


def run(arguments: argparse.Namespace) -> None:
    """Write the folder; print its contents."""
    from larp.data.clip_unpack import unpack_clips

    report = unpack_clips(arguments.pack, arguments.out, arguments.size, arguments.workers)
    state = "" if report.fresh else ", as before"
    print(f"{arguments.out}: {report.clips} clips, {report.frames} frames{state}")
    if "test" not in report.splits:
        print("note: no clip is for test: a training on them needs other clips with --eval-data")
