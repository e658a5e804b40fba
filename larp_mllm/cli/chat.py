"""larp-mllm chat: a conversation whose messages hold text and videos."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from larp.files import user_path
from larp_mllm.cli import options

if TYPE_CHECKING:
    from larp_mllm.generation.progress import Progress
    from larp_mllm.pipeline import Mllm

DESCRIPTION = """\
Talk with a language model of training/train_mllm.py. Answers hold text and videos in any order. Text is printed as it is
generated. Videos are written to OUT as chat-0.mp4, chat-1.mp4, ..., existing files are not replaced, and the paths are
printed. With QUESTION there is one answer. Without, each line of the input is a message or one of these commands:
  /video PATH    show this video with the next message
  /new           start a new conversation
  /help          list these commands
  /quit          end the conversation, like Ctrl-D

examples:
  larp-mllm chat "what happens here?" --video clip.mp4
  larp-mllm chat "show me a person surfing" -o out/ --guidance-scale 3
  larp-mllm chat --text-temperature 0.7 --text-top-k 40
  printf '/video clip.mp4\\nwhat is it?\\nshow me another\\n' | larp-mllm chat -o out/"""
COMMANDS = "/video PATH shows a video with the next message, /new starts a new conversation, /quit or Ctrl-D ends it"


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "chat", help="talk in text and videos", description=DESCRIPTION, formatter_class=options.Defaults
    )
    parser.set_defaults(run=run)
    parser.add_argument("question", nargs="?", help="ask only this (default: read messages, one in a line)")
    parser.add_argument(
        "--video",
        dest="videos",
        type=Path,
        action="append",
        metavar="PATH",
        help="show a video with the question or the first message; may be repeated",
    )
    parser.add_argument("-o", "--out", type=Path, default=Path(), help="folder for the videos of answers")
    options.add_model(parser)
    texts = parser.add_argument_group("text")
    options.add_max_new_tokens(texts, 256)
    options.add_sampling(texts, options.TEXT_SAMPLING, prefix="text_", temperature=0.0)
    videos = parser.add_argument_group("videos")
    videos.add_argument("--max-videos", type=int, default=4, help="most videos in an answer; 0: text alone")
    options.add_seed(videos)
    options.add_sampling(videos, options.VIDEO_SAMPLING, guidance_scale=2.0, temperature=0.8)
    options.add_scale(videos)


def run(arguments: argparse.Namespace) -> None:
    """Answer the question, or each line of the input."""
    from larp.config import check_count
    from larp.files import check_writable

    if arguments.scale is not None:
        check_count("scale", arguments.scale)
    check_writable(next(path for path in _names(arguments.out) if not path.exists()))
    conversation = Conversation(arguments)
    for path in arguments.videos or ():
        conversation.show(path)
    if arguments.question is not None:
        conversation.say(arguments.question)
        return
    conversation.open()  # a model that cannot be loaded is an error before the first line
    for line in _lines():
        if line.strip() == "/quit":
            return
        try:
            conversation.handle(line)
        except BrokenPipeError:  # the output is closed
            raise
        except (ValueError, OSError) as error:
            print(f"larp-mllm: {error}", file=sys.stderr, flush=True)


class Conversation:
    """The messages so far, and the videos to show with the next one."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.messages: list[dict] = []
        self.shown: list[dict] = []
        self.model: Mllm | None = None

    def open(self) -> "Mllm":
        """Load the model, once."""
        from larp_mllm.api import open_model

        if self.model is None:
            self.model = open_model(**options.model_options(self.arguments))
        return self.model

    def handle(self, line: str) -> None:
        """Process a line of the input: a message or a command."""
        line = line.strip()
        name, _, argument = line.partition(" ")
        if name == "/video" and argument.strip():
            self.show(user_path(argument.strip()))
        elif line == "/new":
            self.messages, self.shown = [], []
        elif line == "/help":
            print(COMMANDS, file=sys.stderr)
        elif line.startswith("/"):
            raise ValueError(f"{line!r} is no command: {COMMANDS}")
        elif line:
            self.say(line)

    def show(self, path: Path) -> None:
        """Show a video with the next message. Raises VideoError."""
        from larp.data.video import probe

        probe(path)
        self.shown.append({"type": "video", "video": path})

    def say(self, text: str) -> None:
        """Send a message and print the answer.

        After a ValueError the conversation is unchanged, but a VideoError drops the videos to show with this message.
        """
        from larp.data.video import VideoError
        from larp_mllm.api import chat

        content = [*self.shown, {"type": "text", "text": text}]
        messages = [*self.messages, {"role": "user", "content": content}]
        printer = _Printer(self.arguments)
        try:
            answer = chat(
                messages,
                max_videos=self.arguments.max_videos,
                progress=printer,
                **options.values(self.arguments, "seed", "max_new_tokens", *options.VIDEO_SAMPLING),
                **options.values(self.arguments, *(f"text_{name}" for name in options.TEXT_SAMPLING)),
                model=self.model or self.open(),
            )
        except VideoError:  # which every further message would meet again
            self.shown = []
            raise
        finally:
            printer.close()
        self.messages, self.shown = [*messages, answer], []


class _Printer:
    """A progress callback that prints an answer as it is generated."""

    def __init__(self, arguments: argparse.Namespace):
        from tqdm import tqdm

        self.out, self.scale, self.in_line = arguments.out, arguments.scale, False
        self.bar = tqdm(desc="sampling codes", unit="code", delay=2, leave=False)

    def __call__(self, progress: "Progress") -> None:
        if progress.text:
            print(progress.text if self.in_line else progress.text.lstrip(), end="", flush=True)
            self.in_line = True
        if progress.kind == "codes":
            self.bar.total = progress.total
            self.bar.update(progress.done - self.bar.n)
        for video in progress.previews or ():
            self._end_line()
            print(options.save_under(video, _names(self.out), self.scale or options.visible_scale(video)), flush=True)

    def close(self) -> None:
        """End the line and the progress bar."""
        self.bar.close()
        self._end_line()

    def _end_line(self) -> None:
        if self.in_line:
            print(flush=True)
        self.in_line = False


def _names(folder: Path) -> Iterator[Path]:
    return (folder / f"chat-{number}.mp4" for number in itertools.count())


def _lines():
    """Yield the lines of the standard input, with a prompt at a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
