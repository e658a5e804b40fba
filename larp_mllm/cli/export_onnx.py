"""larp-mllm export-onnx: the video tokenizer as ONNX models."""

import argparse
from pathlib import Path

from larp_mllm.cli import options


def add(commands) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "export-onnx",
        help="write the video tokenizer as ONNX models",
        description="Write encode.onnx (clip, float32 (B, 3, T, H, W) in [0, 1], to codes, int64 (B, N)) and decode.onnx (codes to\n"
        "clip) in float32, for any number of clips. Needs: pip install 'larp-mllm[onnx]'.",
        formatter_class=options.Defaults,
    )
    parser.set_defaults(run=run, device="cpu")
    parser.add_argument("--to", type=Path, required=True, help="folder to write into; both files are replaced")
    options.add_tokenizer_name(parser)


def run(arguments: argparse.Namespace) -> None:
    """Write the two files; print their paths."""
    from larp.models.onnx_export import export_onnx

    for path in export_onnx(options.load_tokenizer(arguments), arguments.to):
        print(path)
