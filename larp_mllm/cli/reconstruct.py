"""larp-mllm reconstruct: a video encoded and decoded by a tokenizer."""

import argparse
from pathlib import Path

from larp_mllm.cli import options


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "reconstruct",
        help="encode and decode a video with a tokenizer, and print the quality",
        description="Encode and decode a video with a tokenizer; print PSNR, bits per pixel and codes per second.\n"
        f"{options.WINDOWS}\nThe sound is copied if the output format allows it. Figures are over the pixels that "
        "the tokenizer sees,\nwithout the bars of --fit pad.",
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument("video", type=Path, help="a video of any length and size, or a .png or .jpg picture")
    parser.add_argument("-o", "--out", type=Path, required=True, help=".mp4, .mkv, .gif, ...; replaced if it exists")
    options.add_original_size(parser)
    options.add_encoding(parser)
    options.add_tokenizer(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the video; print its size and figures."""
    from larp.codec.whole_video import check_paths, reconstruct_video

    encoding = options.encoding(arguments)
    options.check_movie(arguments.out)
    check_paths(arguments.video, arguments.out)
    tokenizer = options.load_tokenizer(arguments)
    report = reconstruct_video(
        arguments.video, arguments.out, tokenizer, encoding, original_size=arguments.original_size
    )
    print(f"{arguments.out}: {report.width}x{report.height} at {report.fps:.4g} fps, {report.frames} frames")
    print(
        f"PSNR {report.psnr:.2f} dB, {report.bits_per_pixel:.4f} bits per pixel, {report.tokens_per_second:.1f} codes "
        f"per second of video ({report.windows} x {tokenizer.config.num_frames} frames, {report.codes} codes of "
        f"{tokenizer.codebook_size})"
    )
    for note in report.notes:
        print(f"note: {note}")
