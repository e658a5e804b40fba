"""Train a language model to read and write videos: captions and codes, next-token prediction.

    deepspeed training/train_mllm.py                                      # tiny-qwen2 on the tokens of the quickstart
    deepspeed training/train_mllm.py --base Qwen2-0.5B --tokens runs/tokens/ucf101

Needs a token cache (training/extract_tokens.py); leaves OUT/model for larp_mllm.generate, OUT/samples, OUT/report.json.
"""

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from larp.config import parse, run_script, to_dict
from larp.data.clips import contact_sheet
from larp.data.tokens import TokenCache
from larp.engine.backend import (
    Engine,
    EngineConfig,
    Ranks,
    barrier,
    finish,
    make_engine,
    micro_batch,
    reduce_sum,
    start,
    stop_requested,
)
from larp.engine.log import RunLog, check_wandb, write_json
from larp.engine.schedules import lr_factor
from larp.engine.sharding import whole
from larp.engine.state import load_state, open_run, save_state
from larp.tokenizer import LarpTokenizer
from larp_mllm.bases import is_tiny, load_base
from larp_mllm.collate import collate
from larp_mllm.dataset import CaptionedVideos, Tasks, caption_phrases, evaluation_rows
from larp_mllm.finetuning import TrainedPart, optimizer, prepare
from larp_mllm.generation import Mllm
from larp_mllm.home import remember_newest
from larp_mllm.modeling import LarpMllmForCausalLM
from larp_mllm.processing import LarpMllmProcessor
from larp_mllm.sequence import IGNORE, TokenSequence

import torch
from torch import Tensor

RECIPES = Path(__file__).parent / "recipes"
TALLY = ("video_nll", "video_correct", "video_count", "text_nll", "text_correct", "text_count")


@dataclass(frozen=True)
class TinyConfig:
    """The size of the bases tiny-qwen2 and tiny-llama; others have their own."""

    layers: int = 4
    width: int = 192
    heads: int = 4


@dataclass(frozen=True)
class TrainMllmConfig:
    """Train a language model with video vocabulary on a token cache."""

    base: str = "Qwen2-0.5B"
    """Hub name, alias (Qwen2-0.5B, Llama-3.2-1B, ...), folder, or tiny-qwen2 / tiny-llama (random, no network)."""
    tokens: Path = Path("runs/tokens")
    """Token cache to train on, from training/extract_tokens.py."""
    eval_tokens: Path | None = None
    """Token cache to evaluate on; by default every 20th video of `tokens`, which is then not trained on."""
    tokenizer: str | None = None
    """Folder or hub name of the LARP tokenizer; by default the one that the cache names."""
    out: Path = Path("runs/mllm")
    """Run folder."""
    train: TrainedPart = "lora"
    """What is trained: the adapter alone (text logits stay the base's), adapter and LoRA, or everything."""
    adapter: Literal["codebook", "free"] = "codebook"
    """Video rows made from the codebook, or free rows (the baseline)."""
    steps: int = 2000
    batch_size: int = 64
    """Sequences per optimizer step, all ranks together."""
    adapter_lr: float = 1e-3
    llm_lr: float = 1e-4
    weight_decay: float = 0.01
    """Of matrices; norms, biases and embeddings have none."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    warmup: int = 50
    final_lr: float = 0.02
    """The last learning rate as a fraction of the first."""
    lora_rank: int = 32
    text_weight: float = 1.0
    """Weight of a text target against a video target in the loss."""
    fps: float = 8.0
    """Frames per second of the generated videos."""
    eval_videos: int = 256
    samples: int = 8
    """Videos to generate at the end, for captions of the evaluation set."""
    log_every: int = 10
    save_every: int = 500
    seed: int = 0
    resume: bool = False
    """Go on with the run in `out`."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the metrics as well (pip install 'larp-mllm[wandb]')."""
    tasks: Tasks = field(default_factory=Tasks)
    tiny: TinyConfig = field(default_factory=TinyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self):
        if is_tiny(self.base) and self.train != "full":
            raise ValueError(
                f"--train {self.train} trains beside a base that knows nothing: --base {self.base} needs --train full"
            )
        for name in ("steps", "log_every", "save_every", "lora_rank", "eval_videos"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


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
    """The whole run: data, model, loop, evaluation, samples, report."""
    began = time.monotonic()
    train_cache, eval_cache, video_tokenizer = open_tokens(config)
    mllm = build(config, train_cache, video_tokenizer, ranks)
    lora = prepare(mllm.model, config.train, config.lora_rank)
    train_set, eval_set = (dataset(cache, mllm) for cache in (train_cache, eval_cache))
    factor = lr_factor(config.schedule, config.steps, config.warmup, config.final_lr)
    updates = optimizer(mllm.model, config.adapter_lr, config.llm_lr, config.weight_decay)
    # Counted before the engine may shard them.
    trained = sum(p.numel() for p in mllm.model.parameters() if p.requires_grad)
    engine = make_engine(mllm.model, updates, factor, config.engine, config.batch_size, ranks)
    model_key = model_identity(config, mllm)
    check_wandb(config.wandb)
    state = open_run(config.out, {"recipe": recipe, **to_dict(config)}, config.resume, config.steps)
    if state is not None:
        load_state({"model": engine}, state, model_key)
    shown = ("video_bits", "video_accuracy", "text_nll")
    with RunLog(config.out, ranks, config.steps, engine.step_count, shown, config.wandb, to_dict(config)) as log:
        log.say(
            f"{config.base}, {trained:,} parameters trained, on {len(train_set)} clips of {train_cache.num_tokens} codes"
        )
        stopped = loop(config, engine, train_set, ranks, log, model_key)
        if stopped:
            log.say(f"stopped at step {engine.step_count}; go on with --resume")
            return {"stopped_at": engine.step_count}
        scores = evaluate(engine, eval_set, config, ranks)
    cost = {"trained_parameters": trained, "seconds": round(time.monotonic() - began, 1)}
    return finish_run(config, mllm, lora, engine, eval_cache, {**cost, "eval": scores})


def open_tokens(config: TrainMllmConfig) -> tuple[TokenCache, TokenCache, LarpTokenizer]:
    """The caches to train and evaluate on, and the tokenizer that made both; ValueError if they do not fit together."""
    cache = TokenCache.open(config.tokens)
    tokenizer = cache.load_tokenizer(config.tokenizer)
    if config.eval_tokens is None:
        return (*cache.hold_out(), tokenizer)
    return cache, TokenCache.open(config.eval_tokens, {"tokenizer": cache.key["tokenizer"]}), tokenizer


def build(config: TrainMllmConfig, cache: TokenCache, tokenizer: LarpTokenizer, ranks: Ranks) -> Mllm:
    """The base with a fresh adapter, and its processor."""
    captions = {text for phrases in caption_phrases(cache) for text in phrases}
    base, text_tokenizer = load_base(config.base, captions, config.tiny.layers, config.tiny.width, config.tiny.heads)
    model = LarpMllmForCausalLM.from_base(
        base,
        len(text_tokenizer),
        tokenizer.codebook.cpu(),
        tokenizer.num_tokens,
        config.adapter,
        video_tokenizer_hash=tokenizer.weight_hash(),
        fps=config.fps,
        frame_stride=cache.key["stride"],
    )
    return Mllm(model.to(ranks.device), LarpMllmProcessor(text_tokenizer, tokenizer.to(ranks.device), model.vocabulary))


def model_identity(config: TrainMllmConfig, mllm: Mllm) -> dict:
    """What a checkpoint must agree in to be resumed: everything that decides the shapes or the meaning of the ids."""
    words = sorted(mllm.processor.text_tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return {
        "base": config.base,
        "train": config.train,
        "adapter": config.adapter,
        "vocabulary": mllm.model.vocabulary.size,
        "video_tokenizer": mllm.model.config.video_tokenizer_hash[:16],
        "text_tokenizer": hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16],
        **({"tiny": asdict(config.tiny)} if is_tiny(config.base) else {}),
        **({"lora_rank": config.lora_rank} if config.train == "lora" else {}),
    }


def dataset(cache: TokenCache, mllm: Mllm) -> CaptionedVideos:
    """The cache as sequences for this model."""
    positions = mllm.model.config.text_config.max_position_embeddings
    return CaptionedVideos(cache, mllm.processor.layout, mllm.processor.encode_text, positions)


def loop(
    config: TrainMllmConfig, engine: Engine, data: CaptionedVideos, ranks: Ranks, log: RunLog, model_key: dict
) -> bool:
    """Train to the last step, which is always saved; True if asked to stop before it.

    The position in the data is the step alone. Asked to stop at the last step, the run goes on to its end: what is
    left takes little, and killed in it, `--resume` repeats that and trains nothing.
    """
    tally = torch.zeros(len(TALLY), dtype=torch.float64)
    engine.module.train()
    while engine.step_count < config.steps:
        sequences = data.batch(engine.step_count, config.batch_size, config.seed, config.tasks)
        tally += train_step(engine, sequences, config, ranks)
        step = engine.step_count
        if step % config.log_every == 0 or step == config.steps:
            log.metrics(step, {**rates(reduce_sum(tally)), "lr": engine.lr, "grad_norm": engine.grad_norm or 0.0})
            tally.zero_()
        stop = step % config.log_every == 0 and stop_requested()
        if stop or step % config.save_every == 0 or step == config.steps:
            save_state({"model": engine}, config.out, step, {"step": step}, model=model_key)
        if stop and step < config.steps:
            return True
    return False


def train_step(engine: Engine, sequences: list[TokenSequence], config: TrainMllmConfig, ranks: Ranks) -> Tensor:
    """One optimizer step on a global batch, of which this rank takes its rows; returns the sums named in TALLY."""
    accumulation = config.engine.accumulation
    size = micro_batch(config.batch_size, accumulation, ranks)
    # One divisor for all micro batches and ranks: their mean is then the mean over the targets of the global batch.
    items = max(1, sum(sequence.targets for sequence in sequences)) / (accumulation * ranks.world_size)
    tally = torch.zeros(len(TALLY), dtype=torch.float64)
    for part in range(accumulation):
        first = (part * ranks.world_size + ranks.rank) * size
        batch = {name: value.to(ranks.device) for name, value in collate(sequences[first : first + size]).items()}
        out = engine(**batch, num_items_in_batch=items, text_weight=config.text_weight)
        engine.backward(out.loss)
        engine.step()
        tally += torch.stack([out[name].double() for name in TALLY]).cpu()
    return tally


def rates(tally: Tensor) -> dict[str, float]:
    """Sums named in TALLY -> bits per video token, nats per text token, and how often the likeliest was right."""
    total = dict(zip(TALLY, tally.tolist(), strict=True))
    videos, texts = max(1.0, total["video_count"]), max(1.0, total["text_count"])
    return {
        "video_bits": total["video_nll"] / videos / math.log(2),
        "video_accuracy": total["video_correct"] / videos,
        "text_nll": total["text_nll"] / texts,
        "text_accuracy": total["text_correct"] / texts,
    }


@torch.no_grad()
def evaluate(engine: Engine, data: CaptionedVideos, config: TrainMllmConfig, ranks: Ranks) -> dict[str, float]:
    """Bits per video token of text-to-video, and nats per text token of video-to-text, on held-out videos."""
    rows = evaluation_rows(len(data), config.eval_videos)
    sequences = [data.fixed(row, task) for task in ("text_to_video", "video_to_text") for row in rows]
    # Each task scores its own kind: in text-to-video the only text target is the start of the video.
    for sequence in sequences[: len(rows)]:
        sequence.labels[~data.layout.vocabulary.is_code(sequence.labels)] = IGNORE
    nothing = TokenSequence(sequences[0].ids, torch.full_like(sequences[0].ids, IGNORE))
    size = micro_batch(config.batch_size, config.engine.accumulation, ranks)
    tally = torch.zeros(len(TALLY), dtype=torch.float64)
    engine.module.eval()
    for first in range(0, len(sequences), size * ranks.world_size):
        # All ranks pass the same number of times, as sharded parameters need; the last ones may have nothing left.
        mine = sequences[first + ranks.rank * size :][:size] or [nothing]
        out = engine(**{name: value.to(ranks.device) for name, value in collate(mine).items()})
        tally += torch.stack([out[name].double() for name in TALLY]).cpu()
    engine.module.train()
    return {"videos": len(rows), **rates(reduce_sum(tally))}


def finish_run(config: TrainMllmConfig, mllm: Mllm, lora, engine: Engine, held_out: TokenCache, figures: dict) -> dict:
    """Save the model, generate samples, write the report and the pointer; the report is returned on every rank."""
    report = {
        "base": config.base,
        "train": config.train,
        "adapter": config.adapter,
        "steps": engine.step_count,
        "skipped_updates": engine.skipped_count,
        **figures,
        "model": str(config.out / "model"),
    }
    with whole(mllm.model, config.engine.zero_stage):
        if engine.ranks.is_main:
            if lora is not None:
                lora.merge_and_unload()
            mllm.save(config.out / "model")
    if engine.ranks.is_main:
        # What is sampled is what was saved: the engine's own module may still be sharded, and on other ranks too.
        report["samples"] = write_samples(Mllm.load(config.out / "model", str(engine.ranks.device)), held_out, config)
        write_json(config.out / "report.json", report)
        remember_newest(config.out / "model")
        print_report(report)
    barrier()
    return report


def write_samples(mllm: Mllm, held_out: TokenCache, config: TrainMllmConfig) -> list[str]:
    """Generate for captions of the evaluation set; returns the files, the contact sheet first."""
    texts = list(dict.fromkeys(phrases[0] for phrases in caption_phrases(held_out)))[: config.samples]
    if not texts:
        return []
    videos = mllm.generate(texts, seed=config.seed)
    folder = config.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet([video.frames for video in videos], texts, folder / "sheet.png")
    names = [f"{i:02d}-{re.sub(r'[^a-z0-9]+', '-', text.lower())[:60].strip('-')}.mp4" for i, text in enumerate(texts)]
    scale = max(1, 256 // videos[0].frames.shape[1])
    return [
        str(folder / "sheet.png"),
        *(str(v.save(folder / name, scale)) for v, name in zip(videos, names, strict=True)),
    ]


def print_report(report: dict) -> None:
    """Say what came out, in a few lines."""
    score = report["eval"]
    print(f"held-out: {score['video_bits']:.2f} bits per video token, {score['text_nll']:.3f} nats per text token")
    print(f"model:    {report['model']}   (larp_mllm.generate finds it by itself)")
    if report["samples"]:
        print(f"samples:  {report['samples'][0]}")


if __name__ == "__main__":
    run_script("train_mllm.py", main)
