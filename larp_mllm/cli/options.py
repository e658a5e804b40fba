"""Options and checks that several commands share."""

import argparse
import ast
import inspect
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from larp.sampling.options import GuidedSampling

if TYPE_CHECKING:
    from larp.codec.whole_video import Encoding
    from larp.models.tokenizer import LarpTokenizer
    from larp_mllm.video import Video

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
    """--model, --dtype, --device: for `model_options`."""
    parser.add_argument(
        "--model", help="folder of a trained model or of its run, or a hub name (default: see larp-mllm --help)"
    )
    parser.add_argument(
        "--dtype", help="float32, bfloat16 or float16, of the language model's weights (default: as they were saved)"
    )
    add_device(parser)


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_model`, as the functions of `larp_mllm.api` take them."""
    return values(arguments, "model", "dtype", "device")


VIDEO_SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")
TEXT_SAMPLING = ("temperature", "top_k", "top_p")


def add_sampling(parser: argparse.ArgumentParser, names: Iterable[str], prefix: str = "", **defaults: Any) -> None:
    """Add an option for each named field of `GuidedSampling`, with its help text; `defaults` replace those of the class."""
    fields, texts = GuidedSampling.__dataclass_fields__, field_texts(GuidedSampling)
    for name in names:
        default = defaults.get(name, fields[name].default)
        kind, option = int if fields[name].type is int else float, f"--{prefix}{name}".replace("_", "-")
        parser.add_argument(option, type=kind, default=default, help=texts[name])


def add_seed(parser: argparse.ArgumentParser) -> None:
    """--seed."""
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same result")


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """--max-new-tokens."""
    parser.add_argument(
        "--max-new-tokens", type=int, default=default, help="length of the text at most, in word pieces"
    )


def values(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named options, as the functions of `larp_mllm.api` take them."""
    return {name: getattr(arguments, name) for name in names}


def field_texts(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those that it derives from, as argparse's help texts look."""
    texts = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = inspect.cleandoc(text.value.value).removesuffix(".")
                texts[field.target.id] = words[:1].lower() + words[1:]
    return texts


def add_videos_out(parser: argparse.ArgumentParser, default: str) -> None:
    """-o, -n, --scale: for `check_videos_out` and `save_videos`; `default` says what the name is without -o."""
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help=f".mp4, .gif, or .png for a contact sheet; replaced if it exists (default: {default}, .mp4; numbered rather "
        "than replaced)",
    )
    parser.add_argument(
        "-n", "--num-videos", type=int, default=1, help="how many; they are numbered behind the name of OUT"
    )
    add_scale(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """--scale."""
    parser.add_argument(
        "--scale", type=int, help="repeat each pixel so often (default: so that the video is at least 256 high)"
    )


def check_videos_out(arguments: argparse.Namespace, stem: str) -> None:
    """ValueError unless the videos that the options of `add_videos_out` ask for can be written; for use before long work."""
    from larp.config import check_count
    from larp.files import check_writable
    from larp_mllm.video import check_suffix

    check_count("num_videos", arguments.num_videos)
    if arguments.scale is not None:
        check_count("scale", arguments.scale)
    if arguments.out is not None:
        check_suffix(arguments.out)
    for path in _targets(arguments, stem):
        check_writable(path)


def save_videos(videos: "list[Video]", arguments: argparse.Namespace, stem: str) -> None:
    """Write videos where the options of `add_videos_out` say; print their paths."""
    # Asked for again: a file may have appeared in the meantime.
    for video, path in zip(videos, _targets(arguments, stem), strict=True):
        print(video.save(path, visible_scale(video) if arguments.scale is None else arguments.scale))


def visible_scale(video: "Video") -> int:
    """How often each pixel is repeated by default: so that the video is at least 256 high."""
    return max(1, 256 // video.frames.shape[1])


def _targets(arguments: argparse.Namespace, stem: str) -> list[Path]:
    """One path for each video: OUT, numbered if there are several; without OUT the stem, past what exists already."""
    count, out = arguments.num_videos, arguments.out
    if out is not None:
        return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(count)]
    numbered = (Path(f"{stem}-{number}.mp4") for number in itertools.count())
    names = itertools.chain([Path(f"{stem}.mp4")], numbered) if count == 1 else numbered
    return list(itertools.islice((path for path in names if not path.exists()), count))


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
    from larp.codec.whole_video import Encoding

    return Encoding(arguments.fit, arguments.num_tokens, arguments.target_psnr, arguments.batch_size)


def load_tokenizer(arguments: argparse.Namespace) -> "LarpTokenizer":
    """The tokenizer that the options of `add_tokenizer` name, `arguments.tokenizer` from then on; ValueError if it cannot be loaded."""
    from larp.hub import choose_device
    from larp.models.tokenizer import LarpTokenizer
    from larp_mllm.locate import find_model, find_tokenizer

    if arguments.tokenizer is None:
        try:
            arguments.tokenizer = str(find_model())
        except ValueError as error:
            raise ValueError(f"give --tokenizer, or a language model whose own is taken: {error}") from error

    device = choose_device(arguments.device)
    return LarpTokenizer.from_pretrained(find_tokenizer(arguments.tokenizer), device=device, variant=arguments.variant)


def check_movie(path: Path) -> None:
    """ValueError unless a video (no still picture) can be written under this name, and there."""
    from larp.files import check_writable
    from larp_mllm.video import SUFFIXES

    movies = [suffix for suffix in SUFFIXES if suffix != ".png"]
    if path.suffix.lower() not in movies:
        still = path.suffix.lower() == ".png"
        reason = "a .png holds no video" if still else f"no video can be written with the suffix {path.suffix!r}"
        raise ValueError(f"{path}: {reason}; choose one of {', '.join(movies)}")
    check_writable(path)
