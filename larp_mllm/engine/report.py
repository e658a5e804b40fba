"""What a run of training/train_mllm.py says about itself: training.json in the model folder, and how to read it."""

import json
import math
import resource
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from larp.engine.checkpoint import CONFIG_FILE, changed_values, newest_state
from larp.engine.log import read_metrics
from larp.files import write_json
from larp.metrics.protocols import versions
from larp_mllm.locate import MODEL_TYPE, RUN_MODEL, clear_default_model, read_config

TRAINING = "training.json"
REPORT = "report.json"
CONFIG = "config.json"
_TOO_OFTEN = 0.01  # probability of a video in the midst of plain text


def environment_info() -> dict[str, Any]:
    """What a report says about the machine: versions, and the most memory that this process has had, in GiB."""
    known = versions() | {name: metadata.version(name) for name in ("transformers", "peft", "deepspeed")}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"versions": known, "peak_memory_gib": round(most, 2)}


def write_report(report: dict[str, Any], run: Path) -> None:
    """Write the report into the run folder and, as training.json, into its model folder."""
    write_json(run / RUN_MODEL / TRAINING, report)
    write_json(run / REPORT, report)


def wrong_figures(report: dict[str, Any]) -> list[str]:
    """The names of the figures of a report that are no numbers (NaN, infinity)."""
    after = {f"text.after.{name}": value for name, value in (report["text"].get("after") or {}).items()}
    found = {f"eval.{name}": value for name, value in (report.get("eval") or {}).items()} | after
    return [name for name, value in found.items() if not math.isfinite(value)]


def refuse(wrong: str | None, report: dict[str, Any]) -> None:
    """FloatingPointError if something of a trained model is named, a tensor or a figure, that is no number any more.

    `generate` without a model does not find it then, not even if it found an earlier one in the same folder.
    """
    if wrong is not None:
        clear_default_model(report["model"])
        raise FloatingPointError(
            f"{report['model']} is written, but of no use: its {wrong} is not finite ({report['skipped_updates']} of "
            f"{report['steps']} updates were skipped). generate does not find it by itself; train anew in another folder, with "
            "lower learning rates or with --engine.precision fp32"
        )


def read_training(folder: Path) -> dict[str, Any]:
    """What is known of the training of a model folder or a run folder: its report, or how far the run has come.

    A run has "run" (its folder), "config" (its options) and "last" (its last line of metrics); "report" is there once
    the model is. Raises ValueError for a folder that is neither, and for a model without training.json.
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
            f"{folder} holds a {kinds[0]}, and this tells of language models with video vocabulary alone: give OUT or "
            f"OUT/{RUN_MODEL} of training/train_mllm.py"
        )
    if any((place / "model.safetensors").is_file() for place in places):
        raise ValueError(
            f"{folder} holds a model without {TRAINING}: it was trained before that file was written, or copied without it; "
            "nothing is known about its training"
        )
    why = "" if folder.is_dir() else " (that is a file)" if folder.exists() else " (there is no such folder)"
    raise ValueError(
        f"{folder} is no folder of a model or of a run of training/train_mllm.py{why}: give OUT or OUT/{RUN_MODEL}"
    )


def describe_training(found: dict[str, Any]) -> str:
    """`read_training` in words, a fact a line. ValueError if what was written down is not whole."""
    report = found.get("report")
    try:
        lines = [] if report is None else _finished(report)
        # Of an ended run that was asked for more steps, the report tells until there are some.
        if "config" in found and (report is None or report["steps"] < ((found["last"] or {}).get("step") or 0)):
            lines = [*_under_way(found), *lines]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{TRAINING} or {CONFIG} is not as training/train_mllm.py writes it ({type(error).__name__}: {error}): --json "
            "prints what is there"
        ) from error
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> list[str]:
    """The figures of a report in a few lines."""
    lines, score = [], report.get("eval") or {}
    named = (
        ("video_bits", "video_accuracy", ".2f", "bits per video token"),
        ("text_nll", "text_accuracy", ".3f", "nats per caption token"),
        ("chat_bits", "chat_accuracy", ".2f", "bits per video token in a chat"),
        ("continuation_bits", "continuation_accuracy", ".2f", "bits per video token after given frames"),
        ("records_video_bits", "records_video_accuracy", ".2f", "bits per video token of records"),
        ("records_text_nll", "records_text_accuracy", ".3f", "nats per text token of records"),
    )
    told = [
        f"{_number(score[name], form)} {words}" + (f" ({_number(score[hits], '.0%')} right)" if hits in score else "")
        for name, hits, form, words in named
        if name in score
    ]
    if told:
        lines.append(f"held out: {', '.join(told)}")
    if text := report.get("text"):
        before, after = text["before"], text.get("after")
        change = "" if after is None else f" -> {_number(after['perplexity'], '.4g')}"
        lines.append(
            f"text:     perplexity {_number(before['perplexity'], '.4g')}{change} "
            f"({before['tokens']} tokens of {text['data']})"
        )
        if (expected := (after or {}).get("video_start") or 0) > _TOO_OFTEN:
            lines.append(
                f"          in it, a video is expected next with {expected:.1%}: mix text in with --text to unlearn that"
            )
    if skipped := report.get("skipped_updates"):
        lines.append(f"skipped:  {skipped} of {report['steps']} updates, whose gradients were not finite")
    return lines


def _number(value: float | None, form: str) -> str:
    # What is no number stands in a file as null.
    return "not a number" if value is None or not math.isfinite(value) else format(value, form)


def _finished(report: dict[str, Any]) -> list[str]:
    lines = [f"base:     {report['base']}, {report['adapter']} adapter"]
    for stage in report["stages"]:
        rates = ", ".join(f"{name} {stage[name]:g}" for name in ("adapter_lr", "llm_lr") if name in stage)
        what = {"adapter": "adapter alone", "full": "everything"}.get(
            stage["trained"], f"LoRA of rank {stage.get('lora_rank')}"
        )
        time = f", {stage['seconds']:.0f} s" if "seconds" in stage else ""
        lines.append(
            f"stage:    {stage['name']}, {stage['steps']} steps, {what} ({stage['parameters']:,} parameters), {rates}{time}"
        )
    for leg in report.get("resumed", ()):
        named = {
            name: ["default" if value is None else value for value in both] for name, both in leg["changed"].items()
        }
        changes = ", ".join(f"{name} {began} -> {now}" for name, (began, now) in named.items())
        lines.append(f"resumed:  at step {leg['step']} with {changes or 'the options it began with'}")
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


def _under_way(found: dict[str, Any]) -> list[str]:
    last, config = found["last"], found["config"]
    minutes = config.get("minutes")
    total = (
        f"{config['align']['steps'] + config['joint']['steps']} steps" if minutes is None else f"{minutes:g} minutes"
    )
    if last is None:
        return [f"run:      {found['run']} has written no metrics yet, of {total}"]
    told = [
        f"{name} {last[name]:.4g}"
        for name in ("video_bits", "video_accuracy", "text_nll", "text_accuracy")
        if last.get(name) is not None
    ]
    far = f"of {total.removesuffix(' steps')}" if minutes is None else f"after {last['minutes']:.3g} of {total}"
    return [
        f"run:      {found['run']} is at step {last['step']} {far}, in the stage {last.get('stage', '?')}; still "
        "training, or stopped (go on with it with --resume)",
        f"last:     {', '.join(told)}",
    ]


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file is not there. ValueError if it is damaged."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy the folder again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: copy the folder again")
    return found


def ended(run: Path, steps: int, minutes: float | None = None) -> dict[str, Any] | None:
    """The report of a run that trained all of its `steps`, or all of its `minutes` where it has them, and wrote, judged and sampled its
    model; else None.
    """
    report, state = _read_if_whole(run / REPORT), newest_state(run)
    # The samples are what a report gets last.
    whole = report is not None and "samples" in report and any((run / RUN_MODEL).glob("*.safetensors"))
    if not whole or state is None or report.get("steps") != state.step:
        return None
    full = state.step == steps if minutes is None else state.loader_state.get("elapsed", 0.0) >= 60 * minutes
    return report if full else None


def nothing_to_do(run: Path, report: Mapping[str, Any]) -> str:
    """What is said of a run that `ended`."""
    return (
        f"{run} finished before, at step {report['steps']}: nothing to do, its report and {run / RUN_MODEL} stay as they are, "
        "whatever options are given now; it goes on if they ask for more steps"
    )


def going_on(run: Path, options: Mapping[str, Any], step: int, earlier: list[dict]) -> list[dict[str, Any]]:
    """For the report: at which steps a run went on with other options than it had until then, and with which.

    options: all of them now, as plain values. earlier: what this gave when the checkpoint was saved that the run goes on from, at
    `step`. An item is {"step", "changed": {option: [the value that the run began with, now]}}; nothing in "changed" means
    that the run went back to the options that it began with.
    """
    now = json.loads(json.dumps(options))
    found = changed_values(_read_if_whole(run / CONFIG_FILE) or {}, now)
    changed = {name: values for name, values in found.items() if name not in ("resume", "out")}
    before = earlier[-1]["changed"] if earlier else {}
    return earlier if changed == before else [*earlier, {"step": step, "changed": changed}]


def _read_if_whole(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing, or damaged: then it is written anew
        return None
