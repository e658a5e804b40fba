"""The tokenizer's ONNX models in onnxruntime beside the tokenizer in torch, on a CPU in float32."""

from __future__ import annotations

import tempfile
from typing import Any

from bench.timing import alternate, describe_ratios, ratios, summary
from larp.models.onnx_export import export_onnx
from larp.models.tokenizer import LarpTokenizer

import torch
from torch import Tensor


def measure_onnx(model: LarpTokenizer, clips: Tensor, pairs: int) -> dict[str, Any]:
    """Time encode and decode of both, alternating, with as many threads as torch has. Ratios are of torch's time over onnxruntime's.

    Raises ValueError unless codes differ only where two are equally near, and clips by rounding.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        encoder, decoder = (
            onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for path in export_onnx(model, folder)
        )
    codes, found = model.encode(clips), torch.from_numpy(encoder.run(None, {"clip": clips.numpy()})[0])
    with torch.no_grad():
        cosines = model.quantizer.similarities(model.project(clips))
    gap = (cosines.gather(-1, codes[..., None]) - cosines.gather(-1, found[..., None])).abs().amax().item()
    decoded = torch.from_numpy(decoder.run(None, {"codes": codes.numpy()})[0])
    error = (model.decode(codes) - decoded).abs().amax().item()
    if gap > 1e-5 or not error <= 1e-4:
        raise ValueError(
            f"onnxruntime differs: codes by a cosine of {gap:.2g}, clips by {error:.2g}; nothing was timed"
        )
    works = [lambda: model.encode(clips), lambda: encoder.run(None, {"clip": clips.numpy()})]
    works += [lambda: model.decode(codes), lambda: decoder.run(None, {"codes": codes.numpy()})]
    alternate(works, 1, torch.device("cpu"))
    laps = alternate(works, pairs, torch.device("cpu"))
    report: dict[str, Any] = {
        "onnxruntime": onnxruntime.__version__,
        "codes_that_differ": int((codes != found).sum()),
        "codes": codes.numel(),
        "largest_difference_of_clips": error,
    }
    for name, (ours, theirs) in {"encode": laps[:2], "decode": laps[2:]}.items():
        report[name] = {"ours": summary(ours), "onnxruntime": summary(theirs), **ratios(ours, theirs)}
    return report


def describe_onnx(report: dict[str, Any]) -> list[str]:
    """Return the figures in words."""
    lines = [f"onnxruntime {report['onnxruntime']}: {report['codes_that_differ']} of {report['codes']} codes differ"]
    for name in ("encode", "decode"):
        ours, theirs = (report[name][way]["cpu_seconds"] for way in ("ours", "onnxruntime"))
        times = f"torch {ours:.3f} CPU s, onnxruntime {theirs:.3f}"
        lines.append(f"{name}: {times}, {describe_ratios(report[name])}")
    return lines
