"""larp-mllm continue: longer videos from the frames of a video."""

import argparse
from pathlib import Path

from larp_mllm.cli import options

DESCRIPTION = """\
Continue a video with a language model of training/train_mllm.py that was trained on continuation (tokens extracted with
--condition-frames). The output holds the given frames, resized and cropped to the model's size, and then the new ones. They
are generated window by window: the last frames of each window are given to the next. As in training, every n-th frame of a
file is read if its frame rate is higher than that of the training clips. The sound is left out. A contact sheet (.png)
marks the given frames in blue.

examples:
  larp-mllm continue clip.mp4 --seconds 2                               # clip-continued.mp4
  larp-mllm continue clip.mp4 --seconds 2 -n 4 -o out/on.mp4            # four continuations: out/on-0.mp4 ... out/on-3.mp4
  larp-mllm continue clip.mp4 --seconds 1 --prompt "a person surfing" --guidance-scale 2"""


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "continue", help="continue a video", description=DESCRIPTION, formatter_class=options.Defaults
    )
    parser.set_defaults(run=run)
    parser.add_argument("video", type=Path, help="a video file, of any size")
    parser.add_argument("--seconds", type=float, required=True, help="seconds to add to the video")
    parser.add_argument("--prompt", default="", help="what the video shows")
    options.add_videos_out(parser, "the video's name-continued")
    options.add_seed(parser)
    options.add_sampling(parser, options.VIDEO_SAMPLING, guidance_scale=1.0, temperature=0.8)
    options.add_model(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the videos; print their paths."""
    from larp.codec.whole_video import check_paths
    from larp_mllm.api import continue_video

    stem = f"{arguments.video.stem}-continued"
    options.check_videos_out(arguments, stem)
    check_paths(arguments.video, arguments.out or f"{stem}.mp4")
    videos = continue_video(
        arguments.video,
        arguments.seconds,
        prompt=arguments.prompt,
        num_videos=arguments.num_videos,
        **options.values(arguments, "seed", *options.VIDEO_SAMPLING),
        **options.model_options(arguments),
    )
    options.save_videos(videos if isinstance(videos, list) else [videos], arguments, stem)
