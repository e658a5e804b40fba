"""larp-mllm train-info: how a model was trained, or the progress of a run."""

import argparse
from pathlib import Path

from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "train-info",
        help="print how a model was trained, or the progress of a run",
        description="Print the report of training/train_mllm.py: base, stages, data, figures on held-out videos, perplexity of "
        "held-out text before and after. For a run that is still training or was stopped: its step and its last metrics.",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model", nargs="?", type=Path, help="folder of a model or of a run (default: the model that generate would use)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Print the report or the progress."""
    import json

    from larp_mllm.engine.training_report import describe_training, read_training
    from larp_mllm.locate import find_model

    found = read_training(find_model() if arguments.model is None else arguments.model)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else describe_training(found))
