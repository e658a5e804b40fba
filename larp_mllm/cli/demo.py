"""larp-mllm demo: a page in the browser to try the models on."""

import argparse
import os
import tempfile
import threading
from importlib.util import find_spec

from larp_mllm.cli import options

DESCRIPTION = """\
Show a page in the browser: text to video, chat, reconstruction, continuation, description, and videos of a class. Each model
is loaded at its first use. A tab whose model is missing says how it is made. One job runs at a time, and all files are
deleted when the page is closed with Ctrl-C. Needs Gradio: pip install 'larp-mllm[demo]'.

examples:
  larp-mllm demo
  larp-mllm demo --model runs/mllm --generator runs/generator --port 8000"""


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "demo",
        help="a page in the browser to try the models on",
        description=DESCRIPTION,
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run)
    options.add_model(parser)
    parser.add_argument(
        "--generator",
        help="folder or hub name of a generator for classes, or the folder of its run (default: the newest one trained on this "
        "machine, else the one that comes with larp-mllm)",
    )
    parser.add_argument(
        "--tokenizer",
        help="folder or hub name of the tokenizer that reconstructs and decodes the generator's codes (default: that of the "
        "language model, else the one that comes with larp-mllm; for the generator, the one that it was trained with)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets in everybody who reaches this machine, without a password",
    )
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860 on)")


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    if find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'larp-mllm[demo]'")
    with tempfile.TemporaryDirectory(prefix="larp-mllm-demo-") as folder:
        # Gradio reads these when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from larp_mllm.demo.models import Models
        from larp_mllm.demo.page import serve

        models = Models(**options.values(arguments, "model", "tokenizer", "generator", "device", "dtype"))
        models.check()
        with serve(models, folder, arguments.host, arguments.port) as url:
            print(f"{url} (Ctrl-C closes the page)", flush=True)
            threading.Event().wait()
