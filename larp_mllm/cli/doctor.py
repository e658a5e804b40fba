"""larp-mllm doctor: the problems of a data set, and which published weights are in the cache."""

import argparse

from larp.config import DATA_SPECS
from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="open every video of a data set and list its problems; list the published weights in the cache",
        description="Open every video of a data set. Lists the videos of each split and class beside the published numbers;\n"
        "missing, broken and short videos; and videos in two splits, by name, by group or byte for byte. The exit\n"
        "status is 1 if there is an error: a video that cannot be read, or one in two splits. Then, or without --data\n"
        "only this: which published weights of metrics and losses are in the cache (`larp-mllm fetch` gets them).",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help=DATA_SPECS,
    )
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip; shorter videos are listed")
    parser.add_argument("--stride", type=int, default=1, help="every n-th frame of a video is a frame of the clip")
    parser.add_argument(
        "--decode", action="store_true", help="decode every frame: slow, finds damage after the first frame"
    )
    parser.add_argument("--workers", type=int, default=4, help="threads")
    parser.add_argument("--lines", type=int, default=10, help="most lines of each list; 0 shows all")


def run(arguments: argparse.Namespace) -> None:
    """Print the report and the cached weights; exit status 1 for errors in the report."""
    from larp.data.doctor import examine
    from larp.metrics.fetching import describe

    if arguments.lines < 0:
        raise ValueError(f"--lines is {arguments.lines}; it must be at least 1, or 0 for all")
    if arguments.data is None:
        print(describe())
        return
    report = examine(
        arguments.data,
        frames=arguments.frames,
        stride=arguments.stride,
        decode=arguments.decode,
        workers=arguments.workers,
    )
    print(report.describe(arguments.lines), describe(), sep="\n\n")
    if not report.ok:
        raise SystemExit(1)
