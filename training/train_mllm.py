"""Train a language model to read and write videos: text and codes in any order, next-token prediction.

    deepspeed training/train_mllm.py                                      # tiny-qwen2 on runs/tokens
    deepspeed training/train_mllm.py --base SmolLM2-135M-Instruct
    deepspeed training/train_mllm.py --base Qwen2-0.5B --tokens runs/tokens/ucf101

Two stages by default: align (the language model frozen, the adapter trained), then joint (partial LoRA, LoRA, or all weights). Data are a
token cache (training/extract_tokens.py), by default one of the built-in captioned videos, which is made if it is missing, or
records of text and videos. Leaves OUT/model for larp_mllm.generate, OUT/samples, OUT/report.json.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from larp.config import parse, to_dict
from larp.engine.backend import Engine, Ranks, broadcast_object, finish, reduce_sum, start, stop_requested
from larp.engine.checkpoint import CONFIG_FILE, newest_state
from larp.engine.clock import Clock
from larp.engine.distributed import main_first
from larp.engine.launch import spread
from larp.engine.log import RunLog
from larp.engine.run import check_run, open_log, open_training, save_training, step_metrics, stopped
from larp.engine.signals import run_script
from larp.engine.untrusted import naming_damaged
from larp_mllm.data.collate import pack
from larp_mllm.data.corpus import Corpus, TokenCaches, open_corpus, open_token_caches
from larp_mllm.data.dataset import TrainingMix
from larp_mllm.data.records import RecordSet
from larp_mllm.engine.built_in_tokens import make_built_in_tokens
from larp_mllm.engine.own_answers import own_answers
from larp_mllm.engine.results import evaluate_text, finish_run, sample_on_the_way
from larp_mllm.engine.scoring import METRIC_SUMS, mean_metrics, metric_sums, micro_batches
from larp_mllm.engine.settings import TOKENS, TrainMllmConfig
from larp_mllm.engine.staged_run import StagedRun, build
from larp_mllm.engine.stages import stage_at, stages
from larp_mllm.engine.training_report import finished_message, finished_report, option_changes, summary
from larp_mllm.locate import read_config
from larp_mllm.model.base_models import check_at_hand, is_tiny
from larp_mllm.pipeline import Mllm
from larp_mllm.processing.chat import fixed_date, template_date
from larp_mllm.processing.token_sequence import TokenSequence

import torch
from torch import Tensor
from transformers.utils import logging

RECIPES = Path(__file__).parent / "recipes"


def main(argv: Sequence[str] | None = None) -> dict:
    """Train as the command line says and return the report; ValueError for bad input."""
    options = sys.argv[1:] if argv is None else list(argv)
    config, recipe = parse(
        TrainMllmConfig, options, RECIPES, "train_mllm.py", default_recipe(options), TrainMllmConfig.adjusted
    )
    if argv is None:
        spread(config.engine, config.batch_size)
    ranks = start(config.seed)
    try:
        # Some chat templates print the date, and --resume must see the same ids.
        with fixed_date(broadcast_object(run_date(config))):
            return fit(config, recipe, ranks)
    finally:
        finish()


def run_date(config: TrainMllmConfig) -> str:
    """Return the date of a run for chat templates: with --resume the one on which it began."""
    begun = read_config(config.out / CONFIG_FILE) if config.resume else None
    return (begun or {}).get("date") or f"{template_date():%Y-%m-%d}"


def default_recipe(argv: Sequence[str]) -> str | None:
    """Return a recipe whose learning rates suit a base from scratch; None if the command line names a pretrained base.

    That is mllm-shapes64 for clips of 128 codes or more in runs/tokens, such as those that are made there, else mllm-shapes32.
    """
    typed = " ".join(argv)
    named = re.search(r"--base[= ](\S+)", typed)
    if named is not None and not is_tiny(named[1]):
        return None
    index = read_config(TOKENS / "index.json")
    short = index is not None and index["key"]["num_tokens"] < 128
    return "mllm-shapes32" if short or re.search(r"--(tokens|tokenizer|records|text)[= ]", typed) else "mllm-shapes64"


def fit(config: TrainMllmConfig, recipe: str | None, ranks: Ranks) -> dict:
    """Open data and model, train the stages, evaluate, and return the report; of a stopped run, where it stopped."""
    logging.disable_progress_bar()  # of reading and writing weights
    check_run(config)
    plan = stages(config.align, config.joint)
    if (
        config.resume
        and (report := main_first(lambda: finished_report(config.out, plan[-1].last, config.minutes))) is not None
    ):
        if ranks.is_main:
            print("\n".join([finished_message(config.out, report), *summary(report)]))
        return report
    if config.tokens is None and config.token_folder is not None and not (TOKENS / "index.json").is_file():
        main_first(lambda: make_tokens(config) if ranks.is_main else None)
    videos = open_token_caches(
        config.token_folder, config.eval_tokens, config.tokenizer, ranks.device, config.more_tokens
    )
    mllm = build(config, videos, ranks)
    corpus = open_data(config, videos, mllm)
    mix = TrainingMix(config.tasks, corpus.videos, corpus.records, corpus.text, ask_base(config, mllm))
    before = newest_state(config.out) if config.resume else None
    named = before.loader_state.get("stage") if before and config.minutes is not None else None
    stage = stage_at(plan, before.step if before else 0, named)
    run = StagedRun(config, ranks, plan, videos, corpus, mix, stage, Clock(plan[-1].last, config.minutes))
    text = {"data": corpus.held_out_text_name, "before": evaluate_text(mllm, corpus, config, ranks)}
    run.begin(mllm)
    del mllm  # so that a later stage has no second copy of the base in memory
    about = {"recipe": recipe, "date": f"{template_date():%Y-%m-%d}", "data": dict(corpus.digests)}
    resume(run, about | to_dict(config))
    with open_log(config, ranks, run.clock, ("video_bits", "video_accuracy", "text_nll")) as log:
        log_setup(run, text, log)
        stop = loop(run, log)
        while not stop and run.stage is not plan[-1]:
            run.next_stage()
            stop = loop(run, log)
        if stop:
            return stopped(config, run.step, log)
    return finish_run(run, recipe, text)


def make_tokens(config: TrainMllmConfig) -> None:
    """Make the token cache of the built-in videos, after a look whether the base is at hand: it takes two minutes."""
    check_at_hand(config.base)
    make_built_in_tokens(RECIPES.parent / "extract_tokens.py", TOKENS, config.tokenizer)


def open_data(config: TrainMllmConfig, videos: TokenCaches, mllm: Mllm) -> Corpus:
    """Open all data as sequences of ids for this model."""
    return open_corpus(
        videos, mllm.processor, mllm.model.config.positions, tasks=config.tasks,
        records=config.records, data_root=config.data_root, allow_outside=config.allow_outside,
        stride=mllm.model.config.frame_stride, encoded=config.out / "records", text=config.text,
        eval_text=config.eval_text, sequence_length=config.sequence_length,
    )  # fmt: skip


def ask_base(config: TrainMllmConfig, mllm: Mllm) -> RecordSet | None:
    """Return the base's own answers to plain questions, if they are trained on; random weights have none. Collective."""
    if config.tasks.own_answers == 0 or is_tiny(config.base):
        return None
    return main_first(lambda: own_answers(mllm, config.out, config.sequence_length))


def resume(run: StagedRun, options: dict) -> None:
    """Open the run folder, and with --resume go on from its newest checkpoint. Collective."""
    config = run.config
    state = open_training(config, options, run.clock, {"model": run.engine}, run.identity)
    if state is not None:
        with naming_damaged(state.folder):
            run.load_state_dict(state.loader_state)
    if config.resume:
        earlier = state.loader_state.get("resumed", []) if state is not None else []
        run.resumed = option_changes(config.out, options, run.step, earlier)


def log_setup(run: StagedRun, text: dict, log: RunLog) -> None:
    """Log what is about to be trained, and on what."""
    shares = ", ".join(f"{name} {share:.0%}" for name, share in run.mix.shares.items())
    perplexity = text["before"]["perplexity"]
    log.say(f"{run.config.base}: {shares}; perplexity {perplexity:.4g} of held-out text ({text['data']})")
    if not run.mllm.model.config.packing:
        log.say("note: this base does not keep records apart that share a row, so each has a row of its own")
    for note in run.corpus.notes:
        log.say(f"note: {note}")
    if changed := [
        name[5:] for name in (run.resumed[-1]["changed"] if run.resumed else ()) if name.startswith("data.")
    ]:
        log.say(f"note: other data than those that the run began with: {', '.join(changed)}")


# --------------------------------------------------------------------------------------------------------------- training


def loop(run: StagedRun, log: RunLog) -> bool:
    """Train to the last step of the stage, which is always saved; True if the run was asked to stop before its end. Collective.

    The step alone decides which data it trains on. A run that is asked to stop at its very last step goes on to evaluation
    and report; if it is killed there, `--resume` repeats these and trains nothing.
    """
    config, engine, clock = run.config, run.engine, run.clock
    sums = torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=run.ranks.device)
    engine.module.train()
    while not run.stage_done:
        sequences = run.mix.batch(run.step, config.batch_size, config.seed)
        sums += train_step(engine, sequences, config, run.ranks, run.mllm.model.config.packing)
        clock.advance()
        step, end = clock.step, clock.done
        if step % config.log_every == 0 or run.stage_done:
            log.metrics(step, mean_metrics(reduce_sum(sums)) | step_metrics(engine, clock), stage=run.stage.name)
            sums.zero_()
        log.progress(step)
        if config.sampling.every and clock.due(config.sampling.every) and not end:
            sample_on_the_way(run, config.out / "samples" / f"step-{step:08d}")
        stop = stop_requested()
        if stop or run.stage_done or (clock.due(config.save_every) and not engine.is_skipping):
            save_training(config, clock, {"model": engine}, run.identity, run.state_dict())
        if stop and not end:
            return True
    return False


def train_step(
    engine: Engine, sequences: list[TokenSequence], config: TrainMllmConfig, ranks: Ranks, packing: bool = True
) -> Tensor:
    """Train one step on a global batch, of which this rank takes its rows; return the sums named in METRIC_SUMS, float64 (6,).

    packing: whether the base keeps records apart that share a row.
    """
    parts = config.engine.accumulation
    rows = pack(sequences, config.sequence_length, multiple=parts * ranks.world_size, together=packing)
    # One divisor for all micro batches and ranks: their mean is then the mean over the targets of the global batch.
    items = max(1, sum(sequence.targets for sequence in sequences)) / (parts * ranks.world_size)
    weights = {"text_weight": config.text_weight, "z_loss": config.z_loss, "head_chunk": config.head_chunk}
    sums = torch.zeros(len(METRIC_SUMS), dtype=torch.float64, device=ranks.device)
    for batch in micro_batches(rows, parts, ranks):
        out = engine(**batch, num_items_in_batch=items, **weights)
        engine.backward(out.loss)
        engine.step()
        sums += metric_sums(out)
    return sums


if __name__ == "__main__":
    run_script("train_mllm.py", main)
