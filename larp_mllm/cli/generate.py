"""larp-mllm generate: videos for a sentence."""

import argparse
import itertools
import re
from pathlib import Path

from larp_mllm.cli.options import Defaults, add_model


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("generate", help="write videos for a sentence", formatter_class=Defaults)
    parser.set_defaults(run=run)
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
    add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the videos; print their paths."""
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
