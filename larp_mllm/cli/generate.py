"""larp-mllm generate: videos for a prompt."""

import argparse
import re

from larp_mllm.cli import options

DESCRIPTION = """\
Generate videos for a prompt with a language model of training/train_mllm.py, and print their paths. The same seed gives the
same videos; with -n, videos 0, 1, ... of a seed.

examples:
  larp-mllm generate "a person surfing"                                   # a-person-surfing.mp4
  larp-mllm generate "a person surfing" -n 8 --seed 3 -o out/surfing.mp4  # out/surfing-0.mp4 ... out/surfing-7.mp4
  larp-mllm generate "a red circle moving left" -o circle.png             # a contact sheet of its frames
  larp-mllm generate "archery" --guidance-scale 3 --temperature 0.9 --model runs/ucf/mllm"""


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "generate", help="write videos for a prompt", description=DESCRIPTION, formatter_class=options.Defaults
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompt", help='what the video shows, such as "a person surfing"')
    options.add_videos_out(parser, "the prompt")
    options.add_seed(parser)
    options.add_sampling(parser, options.VIDEO_SAMPLING, guidance_scale=2.0, temperature=0.8)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the videos; print their paths."""
    from larp_mllm.api import generate

    stem = re.sub(r"[^a-z0-9]+", "-", arguments.prompt.lower())[:60].strip("-") or "video"
    options.check_videos_out(arguments, stem)
    videos = generate(
        [arguments.prompt],
        arguments.num_videos,
        **options.values(arguments, "seed", *options.VIDEO_SAMPLING),
        **options.model_options(arguments),
    )
    options.save_videos(videos, arguments, stem)
