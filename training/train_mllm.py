"""Train a language model to read and write videos: text and codes in any order, next-token prediction.

    deepspeed training/train_mllm.py                                      # tiny-qwen2 on runs/tokens
    deepspeed training/train_mllm.py --base Qwen2-0.5B --tokens runs/tokens/ucf101

Two stages by default: align (the language model frozen, the adapter trained), then joint (LoRA, or all weights). Needs a
token cache (training/extract_tokens.py) or records of text and videos; leaves OUT/model for larp_mllm.generate,
OUT/samples, OUT/report.json.
"""

import gc
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from larp.config import parse, to_dict
from larp.engine.backend import (
    Engine,
    Ranks,
    barrier,
    broadcast_object,
    finish,
    make_engine,
    micro_batch,
    reduce_sum,
    start,
    stop_requested,
)
from larp.engine.checkpoint import check_folder, load_state, newest_state, open_run, save_state
from larp.engine.clock import Clock
from larp.engine.distributed import main_first
from larp.engine.log import RunLog, check_wandb
from larp.engine.schedules import lr_factor
from larp.engine.signals import run_script
from larp_mllm.data.collate import pack
from larp_mllm.data.corpus import Corpus, Videos, open_corpus, open_videos
from larp_mllm.data.dataset import TrainingMix
from larp_mllm.engine.finetuning import optimizer, prepare, take_weights, write_model, wrong_tensor
from larp_mllm.engine.perplexity import score_text
from larp_mllm.engine.report import (
    ended,
    environment_info,
    going_on,
    nothing_to_do,
    refuse,
    summary,
    write_report,
    wrong_figures,
)
from larp_mllm.engine.samples import write_samples
from larp_mllm.engine.scoring import TALLY, micro_batches, rates, score_corpus, tally
from larp_mllm.engine.settings import TrainMllmConfig
from larp_mllm.engine.stages import Stage, load_adapter, save_adapter, stage_at, stages
from larp_mllm.locate import set_default_model
from larp_mllm.model.base_models import check_positions, check_rows, is_tiny, load_base
from larp_mllm.model.modeling import LarpMllmForCausalLM
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.processor import LarpMllmProcessor, text_tokenizer_hash
from larp_mllm.processing.sequence import TokenSequence

import torch
from torch import Tensor
from transformers.utils import logging

RECIPES = Path(__file__).parent / "recipes"
OLD_FPS = 8.0  # of token caches that do not know their clips' rate


@dataclass
class Run:
    """What the functions below share: data for the whole run, and the model of the current stage in its engine."""

    config: TrainMllmConfig
    ranks: Ranks
    plan: list[Stage]
    videos: Videos
    corpus: Corpus
    mix: TrainingMix
    stage: Stage
    clock: Clock
    mllm: Mllm | None = None
    engine: Engine | None = None
    skipped: int = 0  # updates, in earlier stages
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, until `since`
    steps: dict[str, int] = field(default_factory=dict)  # done in each stage
    since: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)  # trained in each stage
    rates: dict[str, dict[str, float]] = field(default_factory=dict)  # learning rates that each stage began with
    resumed: list[dict[str, Any]] = field(default_factory=list)  # see `going_on`

    @property
    def step(self) -> int:
        """Steps done, over all stages."""
        return self.clock.step

    @property
    def stage_done(self) -> bool:
        """Whether the stage has its length."""
        return self.clock.position >= self.stage.last

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of this object; the time until now is added to that of the stage."""
        now = time.monotonic()
        self.steps[self.stage.name] = self.engine.step_count
        self.seconds[self.stage.name] = self.seconds.get(self.stage.name, 0.0) + now - self.since
        self.since = now
        names = ("step", "steps", "skipped", "seconds", "parameters", "rates", "resumed")
        return {"stage": self.stage.name, "elapsed": self.clock.elapsed} | {name: getattr(self, name) for name in names}


def main(argv: Sequence[str] | None = None) -> dict:
    """Train as the command line says and return the report; ValueError for bad input."""
    argv = sys.argv[1:] if argv is None else list(argv)
    config, recipe = parse(TrainMllmConfig, argv, RECIPES, "train_mllm.py", default_recipe(argv))
    ranks = start(config.seed)
    try:
        return fit(config, recipe, ranks)
    finally:
        finish()


def default_recipe(argv: Sequence[str]) -> str | None:
    """mllm-shapes32, whose rates suit a base from scratch, unless the command line names a pretrained base."""
    named = re.search(r"--base[= ](\S+)", " ".join(argv))
    return "mllm-shapes32" if named is None or is_tiny(named[1]) else None


def fit(config: TrainMllmConfig, recipe: str | None, ranks: Ranks) -> dict:
    """The whole run: data, model, stages, evaluation, samples, report."""
    logging.disable_progress_bar()  # over reading and writing weights: the run has one of its own
    check_folder(config.out, config.resume)  # before a base is read that will not be needed
    plan = stages(config.align, config.joint)
    if config.resume and (report := main_first(lambda: ended(config.out, plan[-1].last, config.minutes))) is not None:
        if ranks.is_main:
            print("\n".join([nothing_to_do(config.out, report), *summary(report)]))
        return report
    videos = open_videos(config.token_folder, config.eval_tokens, config.tokenizer, ranks.device)
    mllm = build(config, videos, ranks)
    corpus = open_data(config, videos, mllm)
    mix = TrainingMix(config.tasks, corpus.videos, corpus.records, corpus.text)
    check_wandb(config.wandb)
    before = newest_state(config.out) if config.resume else None
    clock = Clock(plan[-1].last, config.minutes)
    named = before.loader_state.get("stage") if before and config.minutes is not None else None
    stage = stage_at(plan, before.step if before else 0, named)
    run = Run(config, ranks, plan, videos, corpus, mix, stage, clock)
    text = {"data": corpus.held_out_text_name, "before": evaluate_text(mllm, corpus, config, ranks)}
    begin(run, mllm)
    del mllm  # of which a later stage must not find a second copy in memory
    engines, options = {"model": run.engine}, {"recipe": recipe, **to_dict(config)}
    state = open_run(config.out, options, config.resume, clock.total, engines, identity(run))
    if state is not None:
        load_state(engines, state, identity(run))
        run.skipped, run.seconds = state.loader_state["skipped"], state.loader_state["seconds"]
        run.parameters = state.loader_state["parameters"] | run.parameters
        run.rates |= state.loader_state.get("rates", {})
        run.steps = state.loader_state.get("steps", {})
    clock.start(state.step if state else 0, state.loader_state.get("elapsed", 0.0) if state else 0.0)
    if config.resume:
        kept = state.loader_state.get("resumed", []) if state is not None else []
        run.resumed = going_on(config.out, options, run.step, kept)
    shown = ("video_bits", "video_accuracy", "text_nll")
    with RunLog(config.out, ranks, clock.total, run.step, shown, config.wandb, to_dict(config)) as log:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in mix.shares.items())
        log.say(
            f"{config.base}: {shares}; perplexity {text['before']['perplexity']:.4g} of held-out text ({text['data']})"
        )
        for note in corpus.notes:
            log.say(f"note: {note}")
        stopped = loop(run, log)
        while not stopped and run.stage is not plan[-1]:
            next_stage(run)
            stopped = loop(run, log)
        if stopped:
            log.say(f"stopped at step {run.step}; go on with --resume")
            return {"stopped_at": run.step}
    return finish_run(run, {"recipe": recipe}, text)


# --------------------------------------------------------------------------------------------------------- data and model


def open_data(config: TrainMllmConfig, videos: Videos, mllm: Mllm) -> Corpus:
    """All data as sequences for this model."""
    return open_corpus(
        videos, mllm.processor, mllm.model.config.text_config.max_position_embeddings, tasks=config.tasks,
        records=config.records, data_root=config.data_root, allow_outside=config.allow_outside,
        stride=mllm.model.config.frame_stride, encoded=config.out / "records", text=config.text,
        eval_text=config.eval_text, sequence_length=config.sequence_length,
    )  # fmt: skip


def build(config: TrainMllmConfig, videos: Videos, ranks: Ranks) -> Mllm:
    """The base with a fresh adapter, and its processor; the same weights at every call."""
    torch.manual_seed(config.seed)
    tiny = config.tiny
    base, tokenizer = load_base(
        config.base, videos.captions, tiny.layers, tiny.width, tiny.heads, trust_remote_code=config.trust_remote_code
    )
    clips = videos.tokenizer
    check_positions(base, clips.num_tokens, config.base)
    check_rows(base, tokenizer, config.base)
    cache = videos.train if videos.train is not None else videos.held_out
    fps = config.fps or (OLD_FPS if cache is None else cache.frame_rate(OLD_FPS))
    stride = config.stride or (1 if cache is None else cache.key["stride"])
    model = LarpMllmForCausalLM.from_base(
        base, len(tokenizer), clips.codebook.cpu(), clips.num_tokens, config.adapter,
        video_tokenizer_hash=clips.weight_hash(), fps=fps, frame_stride=stride,
    )  # fmt: skip
    mllm = Mllm(model.to(ranks.device), LarpMllmProcessor(tokenizer, clips, model.vocabulary, stride))
    if config.start_from is not None:
        take_weights(mllm, config.start_from)
    return mllm


def begin(run: Run, mllm: Mllm) -> None:
    """Put a model, built for the run's stage, under DeepSpeed."""
    config, stage = run.config, run.stage
    # So that LoRA begins alike whether the stage is reached by training or by --resume.
    torch.manual_seed(config.seed)
    prepare(mllm.model, stage.trained, stage.lora_rank, stage.lora_alpha)
    # Counted before the engine may shard them.
    run.parameters[stage.name] = sum(p.numel() for p in mllm.model.parameters() if p.requires_grad)
    run.rates[stage.name] = stage.rates
    if "continuation" in run.mix.shares:
        mllm.model.config.given_frames = run.corpus.videos.cache.key["condition_frames"]
    schedule = lr_factor(config.schedule, stage.steps, stage.warmup, config.final_lr)
    factor = run.clock.on_schedule(schedule, stage.first)
    updates = optimizer(mllm.model, stage.adapter_lr, stage.llm_lr, config.weight_decay)
    run.mllm, run.since = mllm, time.monotonic()
    run.engine = make_engine(mllm.model, updates, factor, config.engine, config.batch_size, run.ranks)


def next_stage(run: Run) -> None:
    """Go from the end of one stage to the start of the next. Collective.

    The base is built anew: it was frozen, and what an engine made of a module (hooks, shards) cannot be undone.
    """
    save_adapter(run.mllm.model, run.config.out, run.config.engine.zero_stage, run.ranks.is_main)
    barrier()
    elapsed = run.clock.elapsed
    run.skipped += run.engine.skipped_count
    run.engine.close()
    run.mllm = run.engine = None
    gc.collect()
    run.stage = run.plan[run.plan.index(run.stage) + 1]
    mllm = build(run.config, run.videos, run.ranks)
    load_adapter(mllm.model, run.config.out)
    begin(run, mllm)
    run.clock.start(run.step, elapsed)


def identity(run: Run) -> dict:
    """What a checkpoint must agree in to be resumed: everything that decides the shapes or the meaning of the ids."""
    config, model = run.config, run.mllm.model.config
    return {
        "base": config.base,
        **run.stage.identity,
        "adapter": config.adapter,
        "vocabulary": model.vocabulary.size,
        "video_tokenizer": model.video_tokenizer_hash[:16],
        "text_tokenizer": text_tokenizer_hash(run.mllm.processor.tokenizer)[:16],
        **({"tiny": asdict(config.tiny)} if is_tiny(config.base) else {}),
        # Checkpoints leave out what is frozen.
        **({"start_from": config.start_from} if config.start_from is not None else {}),
    }


# --------------------------------------------------------------------------------------------------------------- training


def loop(run: Run, log: RunLog) -> bool:
    """Train to the last step of the stage, which is always saved; True if asked to stop before the run's end.

    The position in the data is the step alone. Asked to stop at the last step of all, the run goes on to its end: what is
    left takes little, and killed in it, `--resume` repeats that and trains nothing.
    """
    config, engine, stage, clock = run.config, run.engine, run.stage, run.clock
    sums = torch.zeros(len(TALLY), dtype=torch.float64, device=run.ranks.device)
    engine.module.train()
    while not run.stage_done:
        sequences = run.mix.batch(run.step, config.batch_size, config.seed)
        sums += train_step(engine, sequences, config, run.ranks)
        clock.advance()
        step, end = clock.step, clock.done
        if step % config.log_every == 0 or run.stage_done:
            values = {**rates(reduce_sum(sums)), **engine.learning_rates, "grad_norm": engine.grad_norm or 0.0}
            log.metrics(step, values | clock.metrics, stage=stage.name)
            sums.zero_()
        log.progress(step)
        if config.sampling.every and clock.due(config.sampling.every) and not end:
            sample_on_the_way(run, config.out / "samples" / f"step-{step:08d}")
        stop = stop_requested()
        if stop or clock.due(config.save_every) or run.stage_done:
            save_state({"model": engine}, config.out, step, run.progress(), model=identity(run))
        if stop and not end:
            return True
    return False


def train_step(engine: Engine, sequences: list[TokenSequence], config: TrainMllmConfig, ranks: Ranks) -> Tensor:
    """One optimizer step on a global batch, of which this rank takes its rows; returns the sums named in TALLY."""
    parts = config.engine.accumulation
    rows = pack(sequences, config.sequence_length, multiple=parts * ranks.world_size)
    # One divisor for all micro batches and ranks: their mean is then the mean over the targets of the global batch.
    items = max(1, sum(sequence.targets for sequence in sequences)) / (parts * ranks.world_size)
    weights = {"text_weight": config.text_weight, "z_loss": config.z_loss, "head_chunk": config.head_chunk}
    sums = torch.zeros(len(TALLY), dtype=torch.float64, device=ranks.device)
    for batch in micro_batches(rows, parts, ranks):
        out = engine(**batch, num_items_in_batch=items, **weights)
        engine.backward(out.loss)
        engine.step()
        sums += tally(out)
    return sums


def sample_on_the_way(run: Run, folder: Path) -> None:
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


# ---------------------------------------------------------------------------------------------------------------- results


def evaluate_text(mllm: Mllm, corpus: Corpus, config: TrainMllmConfig, ranks: Ranks) -> dict[str, float]:
    """The perplexity of the held-out text before training, measured by the first rank. Collective.

    ValueError if it is no number: nothing could be learned then.
    """

    def judge() -> dict[str, float] | None:
        return score_text(mllm.model, corpus.held_out_text, config.eval_videos) if ranks.is_main else None

    found = broadcast_object(main_first(judge))
    if not math.isfinite(found["nll"]):
        raise ValueError(
            f"--base {config.base} gives {found['nll']} nats per token of held-out text, though its weights are finite: "
            "it is damaged, or its config.json is not its own; copy it again or take another"
        )
    return found


def evaluate(run: Run) -> dict[str, float]:
    """Figures of the trained tasks on held-out videos and records. Collective."""
    config, engine = run.config, run.engine
    size = micro_batch(config.batch_size, config.engine.accumulation, run.ranks)
    engine.module.eval()
    found = score_corpus(engine, run.corpus, run.mix.shares, config.eval_videos, size, run.ranks)
    engine.module.train()
    return found


def write_current(run: Run, folder: Path) -> None:
    """Write the model as it is now. Collective."""
    lora = run.stage.trained == "lora"
    write_model(run.mllm.model, run.mllm.processor, lora, folder, run.config.engine.zero_stage, run.ranks)


def finish_run(run: Run, report: dict, text: dict) -> dict:
    """Save the model, then evaluate it, generate samples, and write the report, which is returned on every rank."""
    config, folder = run.config, run.config.out / "model"
    told = run.progress()
    report |= {
        "base": config.base,
        "adapter": config.adapter,
        "steps": run.step,
        "batch_size": config.batch_size,
        "skipped_updates": run.skipped + run.engine.skipped_count,
        "stages": [
            {
                **stage.summary,
                "steps": told["steps"].get(stage.name, stage.steps),
                **told["rates"].get(stage.name, {}),
                "parameters": told["parameters"][stage.name],
                "seconds": round(told["seconds"][stage.name], 1),
            }
            for stage in run.plan
        ],
        "tasks": run.mix.shares,
        "data": run.corpus.summary,
        "seed": config.seed,
        **({"resumed": run.resumed} if run.resumed else {}),
        "text_tokenizer": text_tokenizer_hash(run.mllm.processor.tokenizer),
        "video_tokenizer": run.mllm.model.config.video_tokenizer_hash,
        "seconds": round(sum(told["seconds"].values()), 1),
        **environment_info(),
        "text": text,
        "model": str(folder),
    }
    write_current(run, folder)
    if run.ranks.is_main:
        # Before anything else can fail: what was trained is there to be used.
        write_report(report, config.out)
    refuse(broadcast_object(wrong_tensor(folder) if run.ranks.is_main else None), report)
    try:
        mllm = evaluate_model(run, report, folder)
    finally:
        if run.ranks.is_main and not wrong_figures(report):
            set_default_model(folder)
    report = broadcast_object(report)
    refuse(next(iter(wrong_figures(report)), None), report)
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


def evaluate_model(run: Run, report: dict, folder: Path) -> Mllm | None:
    """Put the figures of what was trained into the report; returns the saved model, on the first rank. Collective."""
    report["eval"] = evaluate(run)
    run.mllm, run.engine = None, run.engine.close()
    gc.collect()
    if not run.ranks.is_main:
        return None
    # What is judged and sampled is what was saved: the engine's own module may be sharded, and on other ranks too.
    mllm = Mllm.load(folder, str(run.ranks.device))
    report["text"]["after"] = score_text(mllm.model, run.corpus.held_out_text, run.config.eval_videos)
    write_report(report, run.config.out)
    return mllm


if __name__ == "__main__":
    run_script("train_mllm.py", main)
