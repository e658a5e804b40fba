"""larp-mllm tokenize: a video encoded into a token file."""

import argparse
from pathlib import Path

from larp_mllm.cli import options


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "tokenize",
        help="encode a video into a small file of codes",
        description="Encode a video into a small file of codes, which only the same tokenizer decodes.\n"
        f"{options.WINDOWS}\nThe file holds no sound.",
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument("video", type=Path, help="a video of any length and size, or a .png or .jpg picture")
    parser.add_argument("-o", "--out", type=Path, required=True, help=".larp file to write; replaced if it exists")
    options.add_encoding(parser)
    options.add_tokenizer(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the token file; print its contents."""
    from larp.codec.token_file import check_suffix
    from larp.codec.whole_video import check_paths, tokenize_video
    from larp.files import check_writable

    encoding = options.encoding(arguments)
    check_suffix(arguments.out)
    check_writable(arguments.out)
    check_paths(arguments.video, arguments.out)
    tokenizer = options.load_tokenizer(arguments)
    video = tokenize_video(arguments.video, tokenizer, encoding, name=arguments.tokenizer, variant=arguments.variant)
    size = video.save(arguments.out).stat().st_size
    header = video.header
    print(
        f"{arguments.out}: {size} bytes, {len(video.codes)} codes of {header.codebook_size} "
        f"({header.windows} x {header.num_frames} frames)"
    )
    full = int((video.lengths == header.num_tokens).sum())
    if encoding.target_psnr is not None and full:
        print(
            f"note: {full} of {header.windows} windows took all their codes and may be below the target of "
            f"{encoding.target_psnr:g} dB; larp-mllm reconstruct prints the PSNR"
        )
