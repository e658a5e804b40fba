"""larp-mllm detokenize: a token file decoded into a video."""

import argparse
from pathlib import Path

from larp_mllm.cli import options


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "detokenize",
        help="decode a token file into a video",
        description="Decode a file of `larp-mllm tokenize` into a video without sound. The tokenizer must be the one that "
        "wrote\nthe file: any other is refused.",
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument("tokens", type=Path, help="a .larp file")
    parser.add_argument("-o", "--out", type=Path, required=True, help=".mp4, .mkv, .gif, ...; replaced if it exists")
    options.add_original_size(parser)
    options.add_tokenizer(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the video; print its path."""
    from larp.codec.token_file import TokenizedVideo
    from larp.codec.whole_video import detokenize_video

    options.check_movie(arguments.out)
    video = TokenizedVideo.load(arguments.tokens)
    path = detokenize_video(
        video,
        options.load_tokenizer(arguments),
        arguments.out,
        original_size=arguments.original_size,
        batch_size=arguments.batch_size,
        name=arguments.tokenizer,
        where=arguments.tokens,
    )
    print(path)
