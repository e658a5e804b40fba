"""The report of a run of training/train_mllm.py: written, read, printed, and compared with the options of --resume.

It is OUT/report.json, and OUT/model/training.json beside the weights.
"""

import json
import math
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from larp.engine.checkpoint import CONFIG_FILE, changed_values, newest_state
from larp.engine.log import read_metrics
from larp.files import read_json, write_json
from larp.metrics.protocols import versions
from larp_mllm.locate import MODEL_TYPE, RUN_MODEL, TRAINING, clear_default_model, read_config

REPORT = "report.json"
CONFIG = "config.json"
_TOO_OFTEN = 0.01  # probability of video_start within plain text that is worth a warning


def write_report(report: dict[str, Any], run: Path) -> None:
    """Write the report into the run folder and, as training.json, into its model folder."""
    write_json(run / RUN_MODEL / TRAINING, report)
    write_json(run / REPORT, report)


def environment_info() -> dict[str, Any]:
    """Return the versions of the libraries and the peak memory of this process in GiB."""
    known = versions("transformers", "peft", "deepspeed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"versions": known, "peak_memory_gib": round(peak, 2)}


def read_training(folder: Path) -> dict[str, Any]:
    """Return what is known about the training of a model folder or a run folder.

    Keys: "report", once there is a model; for a run also "run" (its folder), "config" (its options) and "last" (its last
    line of metrics, or None). Raises ValueError for another folder, and for a model without training.json.
    """
    folder = Path(folder)
    if (report := _read(folder / TRAINING)) is not None:
        return {"report": report}
    options = _read(folder / CONFIG) or {}
    if "joint" in options and "align" in options:
        last = (read_metrics(folder) or [None])[-1]
        found: dict[str, Any] = {
            "run": str(folder),
            "config": _read(folder / "config.resumed.json") or options,
            "last": last,
        }
        report = _read(folder / RUN_MODEL / TRAINING)
        return found | ({"report": report} if report is not None else {})
    if (report := _read(folder / RUN_MODEL / TRAINING)) is not None:
        return {"report": report}
    places = (folder, folder / RUN_MODEL)
    kinds = [kind for place in places if (kind := (read_config(place / CONFIG) or {}).get("model_type"))]
    if any(kind != MODEL_TYPE for kind in kinds):
        raise ValueError(
            f"{folder} holds a {kinds[0]}, not a language model with video vocabulary: give OUT or OUT/{RUN_MODEL} of "
            "training/train_mllm.py"
        )
    if any((place / "model.safetensors").is_file() for place in places):
        raise ValueError(
            f"{folder} holds a model without {TRAINING}, so nothing is known about its training: copy that file as well, or "
            "train anew"
        )
    why = "" if folder.is_dir() else " (that is a file)" if folder.exists() else " (there is no such folder)"
    raise ValueError(
        f"{folder} is no folder of a model or of a run of training/train_mllm.py{why}: give OUT or OUT/{RUN_MODEL}"
    )


def describe_training(found: dict[str, Any]) -> str:
    """Return the result of `read_training` as text, one fact in a line; ValueError if a file lacks something."""
    report = found.get("report")
    try:
        lines = [] if report is None else _describe_report(report)
        # A finished run that was resumed for more steps is described by its report until it has metrics of new steps.
        if "config" in found and (report is None or report["steps"] < ((found["last"] or {}).get("step") or 0)):
            lines = [*_describe_progress(found), *lines]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{TRAINING} or {CONFIG} is not as training/train_mllm.py writes it ({type(error).__name__}: {error}): --json "
            "prints what is there"
        ) from error
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> list[str]:
    """Return the figures of a report, one kind in a line."""
    lines, scores = [], report.get("eval") or {}
    rows = (
        ("video_bits", "video_accuracy", ".2f", "bits per video token"),
        ("text_nll", "text_accuracy", ".3f", "nats per caption token"),
        ("chat_bits", "chat_accuracy", ".2f", "bits per video token in a chat"),
        ("continuation_bits", "continuation_accuracy", ".2f", "bits per video token after given frames"),
        ("records_video_bits", "records_video_accuracy", ".2f", "bits per video token of records"),
        ("records_text_nll", "records_text_accuracy", ".3f", "nats per text token of records"),
    )
    shown = [
        f"{_number(scores[name], form)} {unit}" + (f" ({_number(scores[hits], '.0%')} right)" if hits in scores else "")
        for name, hits, form, unit in rows
        if name in scores
    ]
    if shown:
        lines.append(f"held out: {', '.join(shown)}")
    if text := report.get("text"):
        before, after = text["before"], text.get("after")
        change = "" if after is None else f" -> {_number(after['perplexity'], '.4g')}"
        lines.append(
            f"text:     perplexity {_number(before['perplexity'], '.4g')}{change} "
            f"({before['tokens']} tokens of {text['data']})"
        )
        if (probability := (after or {}).get("video_start") or 0) > _TOO_OFTEN:
            lines.append(f"          in text, a video is expected next with {probability:.1%}: mix text in with --text")
    if skipped := report.get("skipped_updates"):
        lines.append(f"skipped:  {skipped} of {report['steps']} updates, whose gradients were not finite")
    return lines


def non_finite_figures(report: dict[str, Any]) -> list[str]:
    """Return the names of the figures of a report that are NaN or infinite."""
    after = {f"text.after.{name}": value for name, value in (report["text"].get("after") or {}).items()}
    found = {f"eval.{name}": value for name, value in (report.get("eval") or {}).items()} | after
    return [name for name, value in found.items() if not math.isfinite(value)]


def reject_non_finite(name: str | None, report: dict[str, Any]) -> None:
    """Raise FloatingPointError if a tensor or figure of the trained model is not finite; None: all are finite.

    The model is then no longer the default of `generate`, not even if an earlier one in the same folder was.
    """
    if name is not None:
        clear_default_model(report["model"])
        raise FloatingPointError(
            f"{report['model']} is written, but of no use: its {name} is not finite ({report['skipped_updates']} of "
            f"{report['steps']} updates were skipped). Train anew in another folder, with lower learning rates or with "
            "--engine.precision fp32"
        )


def finished_report(run: Path, steps: int, minutes: float | None = None) -> dict[str, Any] | None:
    """Return the report of a run if it is finished, else None.

    A finished run has trained for `steps`, or for `minutes` if given, and has written, evaluated and sampled its model.
    """
    report, state = _read_or_none(run / REPORT), newest_state(run)
    # "samples" is the last key that a report gets.
    complete = report is not None and "samples" in report and any((run / RUN_MODEL).glob("*.safetensors"))
    if not complete or state is None or report.get("steps") != state.step:
        return None
    trained = state.step == steps if minutes is None else state.loader_state.get("elapsed", 0.0) >= 60 * minutes
    return report if trained else None


def finished_message(run: Path, report: Mapping[str, Any]) -> str:
    """Return the message of --resume for a finished run."""
    return (
        f"{run} is finished, at step {report['steps']}: its report and {run / RUN_MODEL} stay as they are. Give more steps to "
        "continue it"
    )


def option_changes(run: Path, options: Mapping[str, Any], step: int, earlier: list[dict]) -> list[dict[str, Any]]:
    """Return the changes of options over a run and its resumptions, for the report.

    Args:
        run: the run folder, whose config file holds the first options.
        options: of the resumed run, as plain values.
        step: of the checkpoint that it continues from.
        earlier: the changes that this checkpoint holds.

    An item is {"step", "changed": {option: [first value, present value]}}; an empty "changed" means the first options.
    """
    now = json.loads(json.dumps(options))
    found = changed_values(_read_or_none(run / CONFIG_FILE) or {}, now)
    # Runs of earlier versions did not note their data.
    changed = {
        name: values
        for name, values in found.items()
        if name not in ("resume", "out", "date") and (name.partition(".")[0] != "data" or None not in values)
    }
    before = earlier[-1]["changed"] if earlier else {}
    return earlier if changed == before else [*earlier, {"step": step, "changed": changed}]


_TRAINED = {
    "adapter": "adapter alone",
    "partial-lora": "partial LoRA of rank {}",
    "lora": "LoRA of rank {}",
    "full": "everything",
}


def _describe_report(report: dict[str, Any]) -> list[str]:
    quantized = f", dequantized from {report['dequantized_from']}" if "dequantized_from" in report else ""
    lines = [f"base:     {report['base']}{quantized}, {report['adapter']} adapter"]
    for stage in report["stages"]:
        rates = ", ".join(f"{name} {stage[name]:g}" for name in ("adapter_lr", "llm_lr") if name in stage)
        what = _TRAINED[stage["trained"]].format(stage.get("lora_rank"))
        what += f" of {', '.join(stage['layers'])}" if "layers" in stage else ""
        time = f", {stage['seconds']:.0f} s" if "seconds" in stage else ""
        lines.append(
            f"stage:    {stage['name']}, {stage['steps']} steps, {what} ({stage['parameters']:,} parameters), {rates}{time}"
        )
    for resumed in report.get("resumed", ()):
        changed = {
            name: ["default" if value is None else value for value in both] for name, both in resumed["changed"].items()
        }
        changes = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changed.items())
        lines.append(f"resumed:  at step {resumed['step']} with {changes or 'its first options'}")
    lines.append("tasks:    " + ", ".join(f"{name} {share:.0%}" for name, share in report["tasks"].items() if share))
    for name, text in (("tokens", "clips of"), ("eval_tokens", "held-out clips of")):
        if part := report["data"].get(name):
            lines.append(f"data:     {part['clips']} {text} {part.get('data', 'a token cache')}")
    if records := report["data"].get("records"):
        lines.append(f"data:     {records['trained_on']} records, {records['held_out']} held out")
    if pieces := report["data"].get("text_pieces"):
        lines.append(f"data:     {pieces} pieces of text")
    lines += summary(report)
    lines.append(f"took:     {report['steps']} steps of {report['batch_size']} records, {report['seconds']:.0f} s, "
                 f"{report['peak_memory_gib']:.1f} GiB at most in one process")  # fmt: skip
    lines.append("with:     " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return lines


def _describe_progress(found: dict[str, Any]) -> list[str]:
    last, config = found["last"], found["config"]
    minutes = config.get("minutes")
    total = (
        f"{config['align']['steps'] + config['joint']['steps']} steps" if minutes is None else f"{minutes:g} minutes"
    )
    if last is None:
        return [f"run:      {found['run']} has written no metrics yet, of {total}"]
    shown = [
        f"{name} {last[name]:.4g}"
        for name in ("video_bits", "video_accuracy", "text_nll", "text_accuracy")
        if last.get(name) is not None
    ]
    done = f"of {total.removesuffix(' steps')}" if minutes is None else f"after {last['minutes']:.3g} of {total}"
    return [
        f"run:      {found['run']} is at step {last['step']} {done}, in the stage {last.get('stage', '?')}; still "
        "training, or stopped (--resume continues it)",
        f"last:     {', '.join(shown)}",
    ]


def _number(value: float | None, form: str) -> str:
    # JSON files hold null for NaN and infinity.
    return "not a number" if value is None or not math.isfinite(value) else format(value, form)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object of a file, None if there is no file; ValueError if it is damaged."""
    if not path.is_file():
        return None
    found = read_json(path, "copy the folder again")
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: copy the folder again")
    return found


def _read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (OSError, ValueError):  # a damaged file is written anew
        return None
