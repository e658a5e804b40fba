"""Options and checks that several commands share."""

import argparse
import ast
import inspect
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from larp.sampling.options import GuidedSampling

if TYPE_CHECKING:
    from larp.codec.whole_video import Encoding
    from larp.models.tokenizer import LarpTokenizer
    from larp_mllm.video import Video

VIDEO_SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")
TEXT_SAMPLING = ("temperature", "top_k", "top_p")
WINDOWS = """\
Every frame is resized to the tokenizer's size; T frames (the tokenizer's clip length) make a window. The last window is
padded by repeating the last frame; the padding is cut off after decoding. The frame rate is kept; a variable one becomes
its average. Videos may have any length; memory use does not grow with it."""


class Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults other than None, False and empty ones, and keep the line breaks of descriptions."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default is None or action.default is False or action.default in ("", [])
        return action.help if hidden else super()._get_help_string(action)


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device: for `model_options`."""
    parser.add_argument(
        "--model", help="folder of a trained model or of its run, or a hub name (default: see larp-mllm --help)"
    )
    parser.add_argument(
        "--dtype", help="type of the language model's weights: float32, bfloat16 or float16 (default: as saved)"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


def model_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_model` as arguments of the functions of `larp_mllm.api`."""
    return values(arguments, "model", "dtype", "device")


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
    parser.add_argument("--max-new-tokens", type=int, default=default, help="most tokens of the text")


def values(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the named options as arguments of the functions of `larp_mllm.api`."""
    return {name: getattr(arguments, name) for name in names}


def field_texts(config: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass and its bases, in the style of argparse's help texts."""
    texts = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = inspect.cleandoc(text.value.value).removesuffix(".")
                texts[field.target.id] = words[:1].lower() + words[1:]
    return texts


def add_videos_out(parser: argparse.ArgumentParser, default: str) -> None:
    """-o, -n, --scale: for `check_videos_out` and `save_videos`; `default` describes the name without -o."""
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help=f".mp4, .gif, or .png for a contact sheet; replaced if it exists (default: {default}, .mp4; numbered, so "
        "that nothing is replaced)",
    )
    parser.add_argument(
        "-n", "--num-videos", type=int, default=1, help="number of videos; several are numbered after the name of OUT"
    )
    add_scale(parser)


def add_scale(parser: argparse.ArgumentParser) -> None:
    """--scale."""
    parser.add_argument("--scale", type=int, help="enlargement factor (default: for a height of at least 256 pixels)")


def check_videos_out(arguments: argparse.Namespace, stem: str) -> None:
    """Raise ValueError unless the videos of the options of `add_videos_out` can be written; called before long work."""
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
    """Write videos to the paths of the options of `add_videos_out`; print the paths."""
    for number, video in enumerate(videos):
        scale = visible_scale(video) if arguments.scale is None else arguments.scale
        if arguments.out is None:
            print(save_under(video, _names(arguments.num_videos, stem), scale))
        else:
            print(video.save(_targets(arguments, stem)[number], scale))


def save_under(video: "Video", names: Iterable[Path], scale: int) -> Path:
    """Write a video under the first name that no file has, also if other programs write at the same time; return its path."""
    from larp.files import claim

    path = claim(names)
    try:
        return video.save(path, scale)
    except BaseException:
        if not path.stat().st_size:
            path.unlink()
        raise


def visible_scale(video: "Video") -> int:
    """Return the default enlargement factor: for a height of at least 256 pixels."""
    return max(1, 256 // video.frames.shape[1])


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """--tokenizer, --variant, --device, --batch-size: for `load_tokenizer`."""
    add_tokenizer_name(parser)
    add_device(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="windows in one pass")


def add_tokenizer_name(parser: argparse.ArgumentParser) -> None:
    """--tokenizer, --variant: for `load_tokenizer`, which also reads `device`."""
    parser.add_argument(
        "--tokenizer",
        help="folder or hub name of a trained tokenizer, or the folder of its run, or of a language model that has one "
        "(default: the tokenizer of the language model that generate would use, else the one that comes with larp-mllm)",
    )
    parser.add_argument("--variant", choices=["ema"], help="ema: the averaged weights of a training with --ema")


def add_encoding(parser: argparse.ArgumentParser) -> None:
    """--fit, --num-tokens, --target-psnr: for `encoding`."""
    parser.add_argument(
        "--fit",
        choices=["crop", "stretch", "pad"],
        default="crop",
        help="how a frame gets the tokenizer's size. crop: resized to cover it, then centre-cropped, as in training. "
        "stretch: the aspect ratio changes. pad: resized to fit into it, with black bars",
    )
    parser.add_argument(
        "--num-tokens",
        type=int,
        help="codes of each window, for a tokenizer trained with --model.nested (default: all)",
    )
    parser.add_argument(
        "--target-psnr",
        type=float,
        help="the fewest codes of each window that reach this PSNR in dB (without bars and padding), or all codes if none "
        "do; for a tokenizer trained with --model.nested",
    )


def add_original_size(parser: argparse.ArgumentParser) -> None:
    """--original-size."""
    parser.add_argument(
        "--original-size",
        action="store_true",
        help="scale the output to the size of the input (for a crop: of its centre), without bars; odd sides get one more "
        "pixel (default: the tokenizer's size)",
    )


def encoding(arguments: argparse.Namespace) -> "Encoding":
    """Return the options of `add_encoding`; ValueError for values out of range."""
    from larp.codec.whole_video import Encoding

    return Encoding(arguments.fit, arguments.num_tokens, arguments.target_psnr, arguments.batch_size)


def load_tokenizer(arguments: argparse.Namespace) -> "LarpTokenizer":
    """Load the tokenizer of the options of `add_tokenizer`, and set `arguments.tokenizer` to its name.

    Says so on stderr where it is the one that comes with the package. Raises ValueError if it cannot be loaded.
    """
    from larp.hub import choose_device
    from larp.models.tokenizer import LarpTokenizer
    from larp_mllm.locate import find_tokenizer, has_default_model

    ours = arguments.tokenizer is None and not has_default_model()
    if arguments.tokenizer is None:
        arguments.tokenizer = find_tokenizer()
    device = choose_device(arguments.device)
    tokenizer = LarpTokenizer.from_pretrained(
        find_tokenizer(arguments.tokenizer), device=device, variant=arguments.variant
    )
    if ours:
        frames, height, width = tokenizer.config.clip_shape
        print(
            f"the tokenizer is the one that comes with larp-mllm: {frames} frames of {height}x{width} become "
            f"{tokenizer.config.num_tokens} codes; another: --tokenizer",
            file=sys.stderr,
        )
    return tokenizer


def check_movie(path: Path) -> None:
    """Raise ValueError unless a video, not a still image, can be written to `path`."""
    from larp.files import check_writable
    from larp_mllm.video import SUFFIXES

    movies = [suffix for suffix in SUFFIXES if suffix != ".png"]
    if path.suffix.lower() not in movies:
        still = path.suffix.lower() == ".png"
        reason = "a .png holds no video" if still else f"no video can be written with the suffix {path.suffix!r}"
        raise ValueError(f"{path}: {reason}; choose one of {', '.join(movies)}")
    check_writable(path)


def _targets(arguments: argparse.Namespace, stem: str) -> list[Path]:
    """Return a path for each video: OUT, numbered if there are several; without OUT the stem, numbered past existing files."""
    count, out = arguments.num_videos, arguments.out
    if out is not None:
        return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(count)]
    return list(itertools.islice((path for path in _names(count, stem) if not path.exists()), count))


def _names(count: int, stem: str) -> Iterator[Path]:
    """Yield the names of `count` videos of the stem, in order, and further ones."""
    numbered = (Path(f"{stem}-{number}.mp4") for number in itertools.count())
    return itertools.chain([Path(f"{stem}.mp4")], numbered) if count == 1 else numbered
