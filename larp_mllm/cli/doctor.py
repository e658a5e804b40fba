"""larp-mllm doctor: what is wrong with a data set, and which published weights are at hand."""

import argparse

from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="open every video of a data set, and say what is wrong with it; which published weights are at hand",
        description="Open every video of a data set. Says what is in each split and class, beside the published numbers;\n"
        "which videos are missing, broken or too short; and which are in two splits, by name, by group or byte for byte.\n"
        "Ends with status 1 if there is an error: a video that cannot be read, or one in two splits.\n"
        "Then, or without --data alone, which published weights of metrics and losses are at hand (`larp-mllm fetch`).",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        metavar="SPEC",
        help="ucf101:ROOT, k600:ROOT, csv:FILE, jsonl:FILE, folder:DIR, shapes:",
    )
    parser.add_argument("--frames", type=int, default=16, help="of a clip; shorter videos are named")
    parser.add_argument("--stride", type=int, default=1, help="every n-th frame of a video is a frame of the clip")
    parser.add_argument(
        "--decode", action="store_true", help="decode every frame: slow, finds damage behind the first one"
    )
    parser.add_argument("--workers", type=int, default=4, help="threads")
    parser.add_argument("--lines", type=int, default=10, help="of each list at most; 0 shows all")


def run(arguments: argparse.Namespace) -> None:
    """Print the report and the weights at hand; status 1 for errors in the report."""
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
