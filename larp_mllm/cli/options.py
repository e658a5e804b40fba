"""Options and checks that several commands share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from larp.longvideo import Encoding
    from larp.tokenizer import LarpTokenizer

WINDOWS = """\
Every picture is brought into the tokenizer's size; each T pictures (the tokenizer's number of frames) make a window.
The last window is completed by repeating the last picture, and what was repeated is cut off again. The frame rate is
kept; one that varies becomes its average. Any length, in little memory."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show the defaults that say something, and descriptions as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --device: for `larp_mllm.generation`."""
    parser.add_argument(
        "--model", type=Path, help="folder of a trained model or of its run (default: see larp-mllm --help)"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """--tokenizer, --variant, --device, --batch-size: for `load_tokenizer`."""
    parser.add_argument(
        "--tokenizer",
        help="folder or hub name of a trained tokenizer, or the folder of its run, or of a language model, for its own "
        "(default: that of the language model that generate would use)",
    )
    parser.add_argument("--variant", choices=["ema"], help="ema: the averaged weights, where training kept them")
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time")


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """--fit, --num-tokens, --target-psnr: for `encoding`."""
    parser.add_argument(
        "--fit",
        choices=["crop", "stretch", "pad"],
        default="crop",
        help="how a picture is brought into the tokenizer's size. crop: resized so that it just covers it, then the "
        "centre is cut out, as in training. stretch: everything is kept but the aspect ratio. pad: everything is kept, "
        "with black bars around it",
    )
    parser.add_argument(
        "--num-tokens",
        type=int,
        help="codes of each window, for a tokenizer trained with --model.nested (default: all)",
    )
    parser.add_argument(
        "--target-psnr",
        type=float,
        help="the fewest codes for each window that give it back at so many dB, neither bars nor what completes the last "
        "window counted, and all where that is out of reach; for a tokenizer trained with --model.nested",
    )


def add_original_size(parser: argparse.ArgumentParser) -> None:
    """--original-size."""
    parser.add_argument(
        "--original-size",
        action="store_true",
        help="scale the output back to the size that the pictures had (of a crop: the part that is left), without bars; "
        "an odd side gets one more pixel (default: the tokenizer's size)",
    )


def encoding(arguments: argparse.Namespace) -> "Encoding":
    """The options of `add_encoding`; ValueError for values that no tokenizer takes."""
    from larp.longvideo import Encoding

    return Encoding(arguments.fit, arguments.num_tokens, arguments.target_psnr, arguments.batch_size)


def load_tokenizer(arguments: argparse.Namespace) -> "LarpTokenizer":
    """The tokenizer that the options of `add_tokenizer` name, `arguments.tokenizer` from then on; ValueError if it cannot be loaded."""
    from larp.tokenizer import LarpTokenizer
    from larp_mllm.device import choose_device
    from larp_mllm.home import find_model, find_tokenizer

    if arguments.tokenizer is None:
        try:
            arguments.tokenizer = str(find_model())
        except ValueError as error:
            raise ValueError(f"give --tokenizer, or a language model whose own is taken: {error}") from error

    device = choose_device(arguments.device)
    return LarpTokenizer.from_pretrained(find_tokenizer(arguments.tokenizer), device=device, variant=arguments.variant)


def check_movie(path: Path) -> None:
    """ValueError unless a video (no still picture) can be written under this name, and there."""
    from larp.engine.log import check_writable
    from larp_mllm.video import SUFFIXES

    movies = [suffix for suffix in SUFFIXES if suffix != ".png"]
    if path.suffix.lower() not in movies:
        still = path.suffix.lower() == ".png"
        reason = "a .png holds no video" if still else f"no video can be written with the suffix {path.suffix!r}"
        raise ValueError(f"{path}: {reason}; choose one of {', '.join(movies)}")
    check_writable(path)
