"""larp-mllm decode-tokens: videos out of the text of an exported model's answer."""

import argparse
import sys
from pathlib import Path

from larp_mllm.cli import options

DESCRIPTION = """\
Decode the videos in the text that a server answered, which has loaded a folder of `larp-mllm export`, and print their paths.
The text holds a video as tokens: <|video_start|>, the codes, <|video_end|>. A server's whole reply in JSON will do as well.
A video that is not whole is named, and the others are written.

examples:
  larp-mllm decode-tokens out/stock answer.txt -o surfing.mp4
  curl ... | larp-mllm decode-tokens out/stock -o surfing.mp4    # several become surfing-0.mp4, surfing-1.mp4, ..."""


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "decode-tokens",
        help="write the videos in the text of an exported model's answer",
        description=DESCRIPTION,
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument("export", type=Path, help="folder of larp-mllm export")
    parser.add_argument("text", type=Path, nargs="?", help="file that holds the answer (default: standard input)")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        help=".mp4, .gif, or .png for a contact sheet; replaced if it exists; several are numbered after its name",
    )
    options.add_scale(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the videos; print their paths. Raises ValueError, afterwards, if one was not whole."""
    arguments.num_videos = 1
    options.check_videos_out(arguments, "answer")
    text = _read(arguments.text)
    from larp_mllm.export.answer_text import read_answer

    videos, broken = read_answer(arguments.export, text)
    arguments.num_videos = len(videos)
    options.save_videos(videos, arguments, "answer")
    if broken:
        raise ValueError(
            f"{'; '.join(broken)}; {len(videos) or 'none'} written. Let the server answer with more tokens, and by the "
            "generate of the folder (--trust-remote-code)"
        )


def _read(path: Path | None) -> str:
    data = sys.stdin.buffer.read() if path is None else path.read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path or 'standard input'} is not text in UTF-8 ({error.reason}): give the answer"
        ) from error
