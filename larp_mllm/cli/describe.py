"""larp-mllm describe: a caption of a video."""

import argparse
from pathlib import Path

from larp_mllm.cli import options

DESCRIPTION = """\
Print the caption of a video file by a language model of training/train_mllm.py. Frames of any size are resized and cropped
as in training; of a long video the middle frames are read.

examples:
  larp-mllm describe clip.mp4
  larp-mllm describe clip.mp4 --temperature 0.7 --top-k 40 --seed 2 --model runs/ucf/mllm"""


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "describe", help="print a caption of a video file", description=DESCRIPTION, formatter_class=options.Defaults
    )
    parser.set_defaults(run=run)
    parser.add_argument("video", type=Path, help="a video file; of a long one the middle frames are read")
    options.add_max_new_tokens(parser, 48)
    options.add_sampling(parser, options.TEXT_SAMPLING, temperature=0.0)
    options.add_seed(parser)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the caption."""
    from larp.data.video import probe
    from larp_mllm.api import describe

    probe(arguments.video)  # before a model is loaded
    print(
        describe(
            arguments.video,
            **options.values(arguments, "seed", "max_new_tokens", *options.TEXT_SAMPLING),
            **options.model_options(arguments),
        )
    )
