"""larp-mllm export: a stock checkpoint for other programs."""

import argparse
from pathlib import Path

from larp_mllm.cli.options import Defaults


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "export",
        help="write a model as a checkpoint for transformers, and vLLM where it has no partial LoRA",
        description="Write a checkpoint of the base architecture (Qwen2ForCausalLM, LlamaForCausalLM, ...): the adapter's "
        "rows as rows of embedding and head, LoRA merged, the text tokenizer with tokens for video ids, the video tokenizer, "
        "and a README.md that shows its use. Partial LoRA cannot be merged: then the folder has Python code for transformers "
        "(trust_remote_code=True), and vLLM cannot load it.",
        formatter_class=Defaults,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model",
        help="folder of a trained model or of its run, or a hub name (default: see larp-mllm --help)",
    )
    parser.add_argument("--to", type=Path, required=True, help="folder to write; renamed into place when complete")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export there")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the written weights (default: the model's)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the folder; print its path, and on stderr where its use is explained."""
    import sys

    from larp_mllm.export.checkpoint import check_target, export
    from larp_mllm.locate import find_model

    import torch

    check_target(arguments.to, arguments.overwrite)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    folder = export(find_model(arguments.model), arguments.to, overwrite=arguments.overwrite, dtype=dtype)
    print(folder)
    print(f"how to use it: {folder / 'README.md'} (transformers, vLLM, from ids to frames)", file=sys.stderr)
