"""The `larp-mllm` command.

Each module of this package but `options` is one command: `add(commands)` makes its parser and sets `run`, a function of
the parsed arguments. What a command does lives in the libraries; they are imported by `run`, so that --help is quick.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from larp_mllm.cli import (
    chat,
    continue_,
    describe,
    detokenize,
    doctor,
    export,
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
    *(generate, describe, continue_, chat, export, sample, reconstruct, tokenize, detokenize, fetch, doctor),
    *(pack_clips, unpack_clips, train_info),
)
EXAMPLES = """\
examples:
  larp-mllm generate "a red circle moving left" -o circle.mp4
  larp-mllm generate "a person surfing" -n 8 --guidance-scale 2 --seed 3 -o surfing.png
  larp-mllm describe clip.mp4
  larp-mllm continue clip.mp4 --seconds 2 -o on.mp4
  larp-mllm chat "what happens here?" --video clip.mp4
  larp-mllm export --to out/stock
  larp-mllm sample --class Surfing -n 16 -o surfing/ --generator runs/ucf/generator
  larp-mllm sample --from clip.mp4 --seconds 8 -o on/ --generator runs/ucf/prediction
  larp-mllm reconstruct clip.mp4 -o again.mp4 --tokenizer runs/ucf/tokenizer
  larp-mllm tokenize clip.mp4 -o clip.larp --tokenizer runs/ucf/tokenizer
  larp-mllm detokenize clip.larp -o again.mp4 --tokenizer runs/ucf/tokenizer
  larp-mllm fetch lpips
  larp-mllm doctor --data ucf101:/path/to/UCF101
  larp-mllm pack-clips --data ucf101:/path/to/UCF101 -o ucf.clips
  larp-mllm unpack-clips ucf.clips -o clips/
  larp-mllm train-info runs/mllm

The model of generate, describe, continue and chat is --model FOLDER, else the environment variable LARP_MLLM_MODEL,
else the newest one trained on this machine. `make quickstart` trains a small one in minutes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (by default the program's own); a user's mistake ends it with a message, code 2.

    Ctrl-C and SIGTERM end it with a message too, codes 130 and 143, and nothing half-written stays behind. If nobody
    reads its output any more (`| head -1`) it ends in silence, code 141.
    """
    parser = build_parser()
    try:
        try:
            arguments = parser.parse_args(argv)
            with _sigterm_raised():
                arguments.run(arguments)
        finally:
            _flush()
    except BrokenPipeError:
        parser.exit(141)
    except (ValueError, OSError) as error:
        parser.exit(2, f"larp-mllm: {error}\n")
    except _Terminated:
        parser.exit(143, "larp-mllm: stopped\n")
    except KeyboardInterrupt:
        parser.exit(130, "larp-mllm: stopped\n")


def _flush() -> None:
    """Write out what was printed, now, while an error can be told."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try once more at its end, and complain again.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise ValueError(
            f"the output cannot be written ({error.strerror}): free space, or send it elsewhere"
        ) from error


class _Terminated(KeyboardInterrupt):
    """SIGTERM, on the way out as Ctrl-C is."""


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Raise _Terminated in the block at SIGTERM. Does nothing outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="larp-mllm",
        description="Video as vocabulary: videos for text, text for videos, and videos as the codes of a tokenizer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
