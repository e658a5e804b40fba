"""larp-mllm train-info: how a model was trained, or how far a run has come."""

import argparse
from pathlib import Path

from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "train-info",
        help="say how a model was trained, or how far a run has come",
        description="Print what training/train_mllm.py wrote down: base, stages, data, figures on held-out videos, the "
        "perplexity of held-out text before and after. Of a run that is still training or was stopped: its step and its last metrics.",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model", nargs="?", type=Path, help="folder of a model or of a run (default: the model that generate would use)"
    )
    parser.add_argument("--json", action="store_true", help="print it for machines")


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    import json

    from larp_mllm.engine.report import describe_training, read_training
    from larp_mllm.locate import find_model

    found = read_training(find_model() if arguments.model is None else arguments.model)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else describe_training(found))
