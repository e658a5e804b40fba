"""The `larp-mllm` command: videos from text, and text from videos."""

import argparse
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  larp-mllm generate "a red circle moving left" -o circle.mp4
  larp-mllm generate "a person surfing" -n 8 --guidance-scale 2 --seed 3 -o surfing.png
  larp-mllm describe clip.mp4

The model is --model FOLDER, else the environment variable LARP_MLLM_MODEL, else the newest one trained on this machine.
`make quickstart` trains a small one in minutes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (by default the program's own); a user's mistake ends it with a message, code 2."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"larp-mllm: {error}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser; each command sets `run`, a function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="larp-mllm",
        description="A language model with video vocabulary: it writes videos for text, and text for videos.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_describe(commands)
    return parser


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="write videos for a sentence", formatter_class=_Defaults)
    parser.set_defaults(run=_generate)
    parser.add_argument("prompt", help='what the video shows, such as "a person surfing"')
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        help=".mp4, .gif, or .png for a contact sheet; replaced if it exists (default: the prompt, .mp4; numbered "
        "rather than replaced)",
    )
    parser.add_argument(
        "-n", "--num-videos", type=int, default=1, help="how many; they are numbered behind the name of OUT"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same videos")
    parser.add_argument(
        "--guidance-scale", type=float, default=2.0, help="1 is off; more follows the prompt more closely"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="0 always takes the likeliest code")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest codes; 0 is off")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw among the likeliest codes that reach this probability"
    )
    parser.add_argument(
        "--scale", type=int, help="repeat each pixel so often (default: so that the video is at least 256 high)"
    )
    _add_model(parser)


def _add_describe(commands) -> None:
    parser = commands.add_parser("describe", help="write a caption for a video file", formatter_class=_Defaults)
    parser.set_defaults(run=_describe)
    parser.add_argument("video", type=Path, help="a video file; of a longer one the frames around its middle are read")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="length of the caption at most")
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="folder of a trained model or of its run (default: see larp-mllm --help)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: the GPU if there is one)")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Show the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _generate(arguments: argparse.Namespace) -> None:
    from larp.engine.log import check_writable
    from larp_mllm.generation import check_count, generate
    from larp_mllm.video import check_suffix

    check_count("num_videos", arguments.num_videos)
    if arguments.scale is not None:
        check_count("scale", arguments.scale)
    if arguments.out is not None:
        check_suffix(arguments.out)
    for path in _targets(arguments):
        check_writable(path)
    videos = generate(
        [arguments.prompt],
        arguments.num_videos,
        model=arguments.model,
        device=arguments.device,
        seed=arguments.seed,
        guidance_scale=arguments.guidance_scale,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
    )
    scale = max(1, 256 // videos[0].frames.shape[1]) if arguments.scale is None else arguments.scale
    # Asked for again: a file may have appeared in the meantime.
    for video, path in zip(videos, _targets(arguments), strict=True):
        print(video.save(path, scale))


def _targets(arguments: argparse.Namespace) -> list[Path]:
    """One path for each video: OUT, numbered if there are several; without OUT the prompt, past what exists already."""
    count, out = arguments.num_videos, arguments.out
    if out is not None:
        return [out] if count == 1 else [out.with_stem(f"{out.stem}-{number}") for number in range(count)]
    stem = re.sub(r"[^a-z0-9]+", "-", arguments.prompt.lower())[:60].strip("-") or "video"
    numbered = (Path(f"{stem}-{number}.mp4") for number in itertools.count())
    names = itertools.chain([Path(f"{stem}.mp4")], numbered) if count == 1 else numbered
    return list(itertools.islice((path for path in names if not path.exists()), count))


def _describe(arguments: argparse.Namespace) -> None:
    from larp_mllm.generation import describe

    text = describe(
        arguments.video, model=arguments.model, device=arguments.device, max_new_tokens=arguments.max_new_tokens
    )
    print(text)


if __name__ == "__main__":
    sys.exit(main())
