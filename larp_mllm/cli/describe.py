"""larp-mllm describe: a caption for a video."""

import argparse
from pathlib import Path

from larp_mllm.cli.options import Defaults, add_model


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("describe", help="write a caption for a video file", formatter_class=Defaults)
    parser.set_defaults(run=run)
    parser.add_argument("video", type=Path, help="a video file; of a longer one the frames around its middle are read")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of the caption at most")
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the caption."""
    from larp_mllm.generation import describe

    text = describe(
        arguments.video, model=arguments.model, device=arguments.device, max_new_tokens=arguments.max_new_tokens
    )
    print(text)
