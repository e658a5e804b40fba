"""A tokenizer as two ONNX models, encode.onnx and decode.onnx, for onnxruntime and other runtimes.

Needs the packages onnx and onnxscript (pip install 'larp-mllm[onnx]'). Values are not checked by the models: a runtime gives some
codes for any clip; onnxruntime refuses codes above the highest itself, and counts codes from -1 down from the end of the codebook.

Shapes: B clips (any number), T frames, H, W pixels, N codes.
"""

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from larp.files import check_writable, user_path
from larp.hub import make_folder
from larp.models.tokenizer import LarpTokenizer

import torch
from torch import Tensor, nn

# Weights up to this size are inside of the model's file, which is limited to 2 GiB; larger ones go beside it.
_INSIDE = 2**30
PARTS = {"encode": ("clip", "codes"), "decode": ("codes", "clip")}
"""The models, each with the name of its input and of its output."""


class _Part(nn.Module):
    """`encode` or `decode` of a tokenizer as a module."""

    def __init__(self, tokenizer: LarpTokenizer, name: str):
        super().__init__()
        # Of the other network no weight is written.
        self.tokenizer, self.run = tokenizer, getattr(tokenizer, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def export_onnx(tokenizer: LarpTokenizer, folder: str | Path) -> list[Path]:
    """Write encode.onnx and decode.onnx into `folder` and return their paths; each is written whole or not at all.

    encode.onnx maps "clip", float32 (B, 3, T, H, W) in [0, 1], to "codes", int64 (B, N); decode.onnx maps "codes" to "clip", clamped
    to [0, 1]. Both hold the tokenizer's `weight_hash` as metadata "larp.weight_hash". Raises ValueError if a package is missing, the
    tokenizer is not in float32 on the CPU, or the files cannot be written.
    """
    if missing := [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise ValueError(f"ONNX needs the package {' and '.join(missing)}: pip install 'larp-mllm[onnx]'")
    if (tokenizer.dtype, tokenizer.device.type) != (torch.float32, "cpu"):
        raise ValueError(
            f"the tokenizer is in {tokenizer.dtype} on {tokenizer.device}: load it in float32 on the CPU, and convert the models"
        )
    for name in PARTS:
        check_writable(user_path(folder) / f"{name}.onnx")  # before the work of minutes
    folder, config = make_folder(folder), tokenizer.config
    # Two rows, since a size of 1 may be taken for a constant.
    inputs = {
        "encode": torch.zeros(2, 3, *config.clip_shape),
        "decode": torch.zeros(2, config.num_tokens, dtype=torch.int64),
    }
    weight_hash, written = tokenizer.weight_hash(), []
    for name, (given, result) in PARTS.items():
        with _quiet():
            program = torch.onnx.export(
                _Part(tokenizer, name),
                (inputs[name],),
                input_names=[given],
                output_names=[result],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
        program.model.metadata_props["larp.weight_hash"] = weight_hash
        beside = sum(p.nbytes for p in tokenizer.parameters()) > _INSIDE
        with tempfile.TemporaryDirectory(dir=folder, prefix=".onnx-") as temporary:
            try:
                program.save(Path(temporary, f"{name}.onnx"), external_data=beside)
            except OSError as error:  # without the name of a file
                raise OSError(error.errno, error.strerror, str(folder / f"{name}.onnx")) from error
            # The weights first: the model names their file.
            for part in sorted(Path(temporary).iterdir(), key=lambda path: path.suffix == ".onnx"):
                part.replace(folder / part.name)
        written.append(folder / f"{name}.onnx")
    return written


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter logs about packages that are not needed, and its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
