"""The `larp-mllm` command.

Each module of this package except `options` is one command: `add(commands)` makes its parser and sets `run`, a function of
the parsed arguments. `run` imports the libraries that do the work, so that --help is fast.
"""

import argparse
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from larp.engine.signals import flush_output, plain_output, stop_signals
from larp.files import error_line, user_path
from larp_mllm.cli import (
    chat,
    continue_video,
    decode_tokens,
    demo,
    describe,
    detokenize,
    doctor,
    export,
    export_onnx,
    fetch,
    generate,
    pack_clips,
    reconstruct,
    sample,
    tokenize,
    train_info,
    unpack_clips,
)

COMMANDS = (
    *(generate, describe, continue_video, chat, export, decode_tokens, sample),
    *(reconstruct, tokenize, detokenize, export_onnx),
    *(fetch, doctor, pack_clips, unpack_clips, train_info, demo),
)
EXAMPLES = """\
examples:
  larp-mllm generate "a red circle moving left" -o circle.mp4
  larp-mllm generate "a person surfing" -n 8 --guidance-scale 2 --seed 3 -o surfing.png
  larp-mllm describe clip.mp4
  larp-mllm continue clip.mp4 --seconds 2 -o longer.mp4
  larp-mllm chat "what happens here?" --video clip.mp4
  larp-mllm export --to out/stock
  larp-mllm decode-tokens out/stock answer.txt -o answer.mp4
  larp-mllm sample --class Surfing
  larp-mllm sample --from clip.mp4 --seconds 8 -o longer/ --generator runs/ucf/prediction
  larp-mllm reconstruct clip.mp4 -o again.mp4
  larp-mllm tokenize clip.mp4 -o clip.larp --tokenizer runs/ucf/tokenizer
  larp-mllm detokenize clip.larp -o again.mp4 --tokenizer runs/ucf/tokenizer
  larp-mllm export-onnx --to onnx/ --tokenizer runs/ucf/tokenizer
  larp-mllm fetch lpips
  larp-mllm doctor --data ucf101:/path/to/UCF101
  larp-mllm pack-clips --data ucf101:/path/to/UCF101 -o ucf.clips
  larp-mllm unpack-clips ucf.clips -o clips/
  larp-mllm train-info runs/mllm
  larp-mllm demo

The model of generate, describe, continue, chat and demo is --model FOLDER, else the environment variable LARP_MLLM_MODEL,
else the newest one trained on this machine, else a small one that comes along; the generator of sample and demo is found likewise.
`make quickstart` trains a small language model in minutes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process.

    A ValueError or OSError ends it with a message and exit status 2, Ctrl-C, SIGTERM and SIGHUP with a message and 130, 143 or 129; no
    partial file is left. A closed output (`| head -1`) ends it silently with 141.
    """
    parser = build_parser()
    plain_output()
    try:
        try:
            arguments = parser.parse_args(argv)
            with _signals_raised():
                arguments.run(arguments)
        finally:
            flush_output()
    except BrokenPipeError:
        parser.exit(141)
    except (ValueError, OSError) as error:
        parser.exit(2, f"larp-mllm: {error_line(error)}\n")
    except _Terminated as stop:
        parser.exit(128 + stop.number, "larp-mllm: stopped\n")
    except KeyboardInterrupt:
        parser.exit(130, "larp-mllm: stopped\n")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, or the end of the terminal, as an exception, like KeyboardInterrupt."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise _Terminated in the block at SIGTERM or SIGHUP; no effect outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, _) -> None:
        raise _Terminated(number)

    before = {number: signal.signal(number, terminate) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class _Parser(argparse.ArgumentParser):
    """A parser, and so are those of its commands, that takes ~ in paths for the home folder."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register("type", Path, _user_path)


def _user_path(text: str) -> Path:
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="larp-mllm",
        description="Video as vocabulary: videos for text, text for videos, and videos as the codes of a tokenizer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
