"""What a training of a language model measures and writes: held-out text, samples on the way, and at the end model and report."""

import gc
import math
import shutil
from pathlib import Path

from larp.engine.backend import Ranks, barrier, broadcast_object, micro_batch
from larp.engine.distributed import main_first
from larp_mllm.data.corpus import Corpus
from larp_mllm.engine.finetuning import non_finite_tensor, write_model
from larp_mllm.engine.perplexity import score_text
from larp_mllm.engine.report import environment_info, non_finite_figures, reject_non_finite, summary, write_report
from larp_mllm.engine.samples import write_samples
from larp_mllm.engine.scoring import score_corpus
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.engine.staged_run import StagedRun
from larp_mllm.locate import set_default_model
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import text_tokenizer_hash

import torch


def evaluate_text(mllm: Mllm, corpus: Corpus, config: TrainMllmConfig, ranks: Ranks) -> dict[str, float]:
    """Return the perplexity of the held-out text before training, measured by the first rank. Collective.

    ValueError if it is no number: nothing could be learned then.
    """

    def score() -> dict[str, float] | None:
        return score_text(mllm.model, corpus.held_out_text, config.eval_videos) if ranks.is_main else None

    found = broadcast_object(main_first(score))
    if not math.isfinite(found["nll"]):
        raise ValueError(
            f"--base {config.base} gives {found['nll']} nats per token of held-out text, though its weights are finite: "
            "it is damaged, or its config.json is not its own; copy it again or take another"
        )
    return found


def sample_on_the_way(run: StagedRun, folder: Path) -> None:
    """Write samples of the weights of this moment; those of the first rank, the others wait. Collective."""
    held_out, config, zero_stage = run.corpus.held_out_videos, run.config, run.config.engine.zero_stage
    if held_out is None:
        return
    module = run.engine.module
    if zero_stage == 3:
        # No rank has a whole model that could be called: one is written and read.
        write_current(run, folder / "model")
    if run.ranks.is_main:
        module.eval()
        # Training must sample the numbers that it would have sampled without.
        with torch.random.fork_rng([run.ranks.device] if run.ranks.device.type == "cuda" else []):
            mllm = Mllm.load(folder / "model", str(run.ranks.device)) if zero_stage == 3 else run.mllm
            write_samples(mllm, held_out, config.sampling, config.seed, folder, movies=False)
        module.train()
        shutil.rmtree(folder / "model", ignore_errors=True)
    barrier()


def write_current(run: StagedRun, folder: Path) -> None:
    """Write the model as it is now. Collective."""
    lora = run.stage.trained == "lora"
    write_model(run.mllm.model, run.mllm.processor, lora, folder, run.config.engine.zero_stage, run.ranks)


def finish_run(run: StagedRun, recipe: str | None, text: dict) -> dict:
    """Save the model, then evaluate it, generate samples, and write the report, which is returned on every rank.

    text: of the report, {"data", "before"}.
    """
    config, folder = run.config, run.config.out / "model"
    report = training_report(run, recipe) | {"text": text, "model": str(folder)}
    write_current(run, folder)
    if run.ranks.is_main:
        # Before anything else can fail: what was trained is there to be used.
        write_report(report, config.out)
    reject_non_finite(broadcast_object(non_finite_tensor(folder) if run.ranks.is_main else None), report)
    try:
        mllm = evaluate_model(run, report, folder)
    finally:
        if run.ranks.is_main and not non_finite_figures(report):
            set_default_model(folder)
    report = broadcast_object(report)
    reject_non_finite(next(iter(non_finite_figures(report)), None), report)
    if mllm is not None:
        held_out = run.corpus.held_out_videos
        report["samples"] = (
            write_samples(mllm, held_out, config.sampling, config.seed, config.out / "samples", movies=True)
            if held_out is not None
            else []
        )
        report |= environment_info()
        write_report(report, config.out)
        print("\n".join(summary(report)))
        print(f"model:    {folder}   (larp_mllm.generate finds it by itself)")
        if report["samples"]:
            print(f"samples:  {report['samples'][0]}")
    return broadcast_object(report)


def training_report(run: StagedRun, recipe: str | None) -> dict:
    """Return what a report says of the training itself, before anything is evaluated."""
    config, state = run.config, run.state_dict()
    return {
        "recipe": recipe,
        "base": config.base,
        "adapter": config.adapter,
        "steps": run.step,
        "batch_size": config.batch_size,
        "skipped_updates": run.skipped + run.engine.skipped_count,
        "stages": [
            {
                **stage.summary,
                "steps": state["steps"].get(stage.name, stage.steps),
                **state["rates"].get(stage.name, {}),
                "parameters": state["parameters"][stage.name],
                "seconds": round(state["seconds"][stage.name], 1),
            }
            for stage in run.plan
        ],
        "tasks": run.mix.shares,
        "data": run.corpus.summary,
        "seed": config.seed,
        **({"resumed": run.resumed} if run.resumed else {}),
        "text_tokenizer": text_tokenizer_hash(run.mllm.processor.tokenizer),
        "video_tokenizer": run.mllm.model.config.video_tokenizer_hash,
        "seconds": round(sum(state["seconds"].values()), 1),
        **environment_info(),
    }


def evaluate_model(run: StagedRun, report: dict, folder: Path) -> Mllm | None:
    """Put the figures of what was trained into the report; returns the saved model, on the first rank. Collective."""
    report["eval"] = evaluate(run)
    run.mllm, run.engine = None, run.engine.close()
    gc.collect()
    if not run.ranks.is_main:
        return None
    # What is evaluated and sampled is what was saved: the engine's own module may be sharded, and on other ranks too.
    mllm = Mllm.load(folder, str(run.ranks.device))
    report["text"]["after"] = score_text(mllm.model, run.corpus.held_out_text, run.config.eval_videos)
    write_report(report, run.config.out)
    return mllm


def evaluate(run: StagedRun) -> dict[str, float]:
    """Return the figures of the trained tasks on held-out videos and records. Collective."""
    config, engine = run.config, run.engine
    size = micro_batch(config.batch_size, config.engine.accumulation, run.ranks)
    engine.module.eval()
    found = score_corpus(engine, run.corpus, run.mix.shares, config.eval_videos, size, run.ranks)
    engine.module.train()
    return found
