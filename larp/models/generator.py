"""The autoregressive generator: a LLaMA-like transformer with learned positions that writes the codes of a clip.

Source: LARP (arXiv 2410.21264), section 3.4 and appendix. Tensor names are those of the published checkpoints, so one
file layout serves published models and ours.

Shapes: B batch, N codes of a clip, K codebook size, C condition positions, S sequence, D width.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from larp.hub import CheckpointError, LarpModel
from larp.models.layers import Repeated, RMSNorm, SwiGLU
from larp.models.published_fields import flag, number, warn_of_unknown, whole

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Task = Literal["class", "frame-prediction"]

# (layers, heads, width). S to XXXL are the published sizes; tiny and mini serve small clips on a CPU.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (4, 4, 128),
    "mini": (6, 8, 256),
    "S": (12, 6, 384),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "LP": (30, 20, 1280),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "XXXL": (48, 40, 2560),
}


@dataclass(frozen=True)
class GeneratorConfig:
    """Shape and task of a `LarpGenerator`; a ValueError names the field that does not fit."""

    task: Task = "class"
    """class: a class embedding comes first. frame-prediction: the codes of the given frames and a separator."""
    num_tokens: int = 1024
    """N, codes of a clip; the tokenizer's."""
    codebook_size: int = 8192
    """K; the tokenizer's."""
    depth: int = 12
    heads: int = 12
    width: int = 768
    """D, a multiple of `heads`."""
    num_classes: int = 101
    """Classes without the unconditional one; not used for frame prediction."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers, or empty."""
    tokenizer_hash: str = ""
    """`weight_hash()` of the tokenizer that made the codes; empty when unknown (published checkpoints do not say)."""
    ffn_multiplier: float = 1.0
    """Factor on the SwiGLU width of 8/3 D."""
    ffn_multiple: int = 256
    """The SwiGLU width is rounded up to a multiple of this."""
    null_condition: bool = False
    """Frame prediction: a learned "no given frames", shown in training now and then, which guidance needs; published
    checkpoints have none. Class conditions always have their own."""
    dropout: float = 0.1
    """On the input embeddings, the attention output and the feed-forward output, while training."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.task not in ("class", "frame-prediction"):
            raise ValueError(f"task is {self.task!r}; it must be 'class' or 'frame-prediction'")
        for name in ("num_tokens", "codebook_size", "depth", "heads", "width", "num_classes", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.null_condition and self.task == "class":
            raise ValueError(
                "null_condition is for frame prediction: a class condition always has its unconditional class"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names, but num_classes is {self.num_classes}")

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "GeneratorConfig":
        """Return the configuration of a row of `SIZES`, with the other fields given by name."""
        if size not in SIZES:
            raise ValueError(f"unknown generator size {size!r}; the sizes are {', '.join(SIZES)}")
        depth, heads, width = SIZES[size]
        return cls(depth=depth, heads=heads, width=width, **fields)

    @property
    def condition_length(self) -> int:
        """C: 1 class position, or N condition codes and the separator."""
        return 1 if self.task == "class" else self.num_tokens + 1

    @property
    def positions(self) -> int:
        """Length of the longest input: the condition and all codes but the last, which is never an input."""
        return self.condition_length + self.num_tokens - 1

    @property
    def ffn_hidden(self) -> int:
        """Width inside SwiGLU: 2/3 of 4 D times the multiplier, rounded up."""
        hidden = int(int(2 * 4 * self.width / 3) * self.ffn_multiplier)
        return -(-hidden // self.ffn_multiple) * self.ffn_multiple


class CausalAttention(nn.Module):
    """Causal self-attention without biases."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        rows, length, width = x.shape
        query, key, value = self.wqkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(rows, length, width))


class GeneratorBlock(Repeated):
    """Pre-norm block: RMSNorm and attention, RMSNorm and SwiGLU, each added to the stream."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.attention = CausalAttention(config)
        self.feed_forward = SwiGLU(config.width, config.ffn_hidden)
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


class ClassEmbedding(nn.Module):
    """One vector for each class and a last one for "no class", which guidance and class dropout use."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels int64 (B,) in [0, num_classes] to (B, 1, D)."""
        return self.embedding_table(labels)[:, None]


class LarpGenerator(LarpModel):
    """Autoregressive transformer over the codes of a clip, conditioned on a class or on the codes of given frames.

    A condition is int64: class labels (B,) where `num_classes` stands for "no class"; or, for frame prediction, the
    codes of the given frames and the separator (B, N + 1), see `frame_condition`.
    """

    model_type = "larp-generator"
    config_class = GeneratorConfig

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[GeneratorConfig, dict[str, Tensor]]:
        """Map the config of a published checkpoint; its tensors have our names."""
        return config_from_published(config), tensors

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        # Ids behind the codebook: the separator, and what stands in the place of given codes where there are none.
        more_ids = 0 if config.task == "class" else 1 + config.null_condition
        if config.task == "class":
            self.cls_embedding = ClassEmbedding(config.num_classes, config.width)
        self.tok_embeddings = nn.Embedding(config.codebook_size + more_ids, config.width)
        self.abs_pe = nn.Parameter(torch.empty(1, config.positions, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(GeneratorBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = nn.Linear(config.width, config.codebook_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from a normal of std 0.02; norms are 1 and the output head is 0, so training starts at log K."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.ones_(parameter)

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return teacher-forced logits (B, N, K) for codes int64 (B, N): position i has seen the codes before i."""
        if codes.shape[1] != self.config.num_tokens:
            raise ValueError(f"clips have {codes.shape[1]} codes, but this generator writes {self.config.num_tokens}")
        x = torch.cat([self.embed_condition(condition), self.tok_embeddings(codes[:, :-1])], dim=1)
        x = self.dropout(x) + self.abs_pe
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x)[:, self.config.condition_length - 1 :])

    def embed_condition(self, condition: Tensor) -> Tensor:
        """Map a condition (see the class) to embeddings (B, C, D)."""
        expected = 1 if self.config.task == "class" else 2
        if condition.dim() != expected or (expected == 2 and condition.shape[1] != self.config.condition_length):
            wanted = "labels (B,)" if expected == 1 else f"codes and separator (B, {self.config.condition_length})"
            raise ValueError(f"condition has shape {tuple(condition.shape)}; task {self.config.task!r} needs {wanted}")
        return self.cls_embedding(condition) if expected == 1 else self.tok_embeddings(condition)

    def frame_condition(self, codes: Tensor) -> Tensor:
        """Append the separator to the codes (B, N) of the given frames: a frame-prediction condition (B, N + 1)."""
        separator = torch.full_like(codes[:, :1], self.config.codebook_size)
        return torch.cat([codes, separator], dim=1)

    def unconditional(self, condition: Tensor) -> Tensor:
        """Return the condition "no class" or "no given frames" in the shape of `condition`.

        Raises ValueError for a frame prediction without `null_condition`.
        """
        config = self.config
        if config.task == "class":
            return torch.full_like(condition, config.num_classes)
        if not config.null_condition:
            raise ValueError(
                "this generator has never seen a frame prediction without given frames, so it has no unconditional rows: "
                "use guidance 1.0, or train one with null_condition and condition dropout"
            )
        return self.frame_condition(torch.full_like(condition[:, :-1], config.codebook_size + 1))

    def class_labels(self, classes: Sequence[str | int]) -> Tensor:
        """Return labels int64 (B,) for class names or numbers; ValueError names the nearest to an unknown one."""
        return torch.tensor([self._class_label(name) for name in classes], dtype=torch.int64)

    def _class_label(self, name: str | int) -> int:
        config = self.config
        if config.task != "class":
            raise ValueError("this generator predicts frames; it has no classes")
        if name in config.class_names:
            return config.class_names.index(name)
        if str(name).removeprefix("-").isdecimal():
            if 0 <= int(name) < config.num_classes:
                return int(name)
            raise ValueError(
                f"class {name} is out of range: this generator has the classes 0 to {config.num_classes - 1}"
            )
        near = difflib.get_close_matches(str(name), config.class_names, n=3, cutoff=0.4) or config.class_names[:5]
        hint = f"nearest: {', '.join(near)}" if near else "this checkpoint stores no class names: use numbers"
        raise ValueError(f"unknown class {name!r}; {hint}")

    def check_tokenizer(self, num_tokens: int, codebook_size: int, weight_hash: str) -> None:
        """Raise a ValueError if codes of this tokenizer are not the ones that the generator was trained on."""
        config = self.config
        if (num_tokens, codebook_size) != (config.num_tokens, config.codebook_size):
            raise ValueError(
                f"the tokenizer makes {num_tokens} codes of {codebook_size} values, but the generator was trained on"
                f" {config.num_tokens} codes of {config.codebook_size} values: use the tokenizer that made its tokens"
            )
        if config.tokenizer_hash and weight_hash != config.tokenizer_hash:
            raise ValueError(
                f"the generator was trained on codes of the tokenizer {config.tokenizer_hash[:12]}, not"
                f" {weight_hash[:12]} (hashes of the weights): codes mean something else there; use that tokenizer,"
                " or train again"
            )


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per code of logits (B, N, K) against codes int64 (B, N), in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())


# Every field of a published config.json. Null in the second group is the same as absent.
_PUBLISHED = [
    "vocab_size",
    "max_seq_len",
    "n_layer",
    "n_head",
    "dim",
    "num_classes",
    "multiple_of",
    "norm_eps",
    "token_dropout_p",
    "resid_dropout_p",
    "ffn_dropout_p",
    "model_type",
    "class_dropout_prob",
    "cls_token_num",
    "initializer_range",
    "max_batch_size",
    "rope_base",
]
_NULLABLE = ["n_kv_head", "drop_path_rate", "attn_dropout_p", "use_fixed_pe", "ffn_dim_multiplier", "frame_prediction"]


def config_from_published(values: dict[str, Any]) -> GeneratorConfig:
    """Map the config.json of a published LARP generator.

    CheckpointError for a field that is missing, of the wrong type or of a variant that is not supported; a warning for one
    that is not known.
    """
    warn_of_unknown(values, dict.fromkeys((*_PUBLISHED, *_NULLABLE)))
    absent = {"num_classes": 101, "multiple_of": 256, "norm_eps": 1e-5, "drop_path_rate": 0, "attn_dropout_p": 0}
    absent |= {"ffn_dim_multiplier": 1, "use_fixed_pe": False, "frame_prediction": False}
    dropouts = ("token_dropout_p", "resid_dropout_p", "ffn_dropout_p")
    given = {name: value for name, value in values.items() if name not in _NULLABLE or value is not None}
    given = absent | dict.fromkeys(dropouts, 0.1) | given
    try:
        unsupported = {
            "n_kv_head": "n_kv_head" in given and whole(given, "n_kv_head") != whole(given, "n_head"),
            "drop_path_rate": number(given, "drop_path_rate") != 0,
            "attn_dropout_p": number(given, "attn_dropout_p") != 0,
            "use_fixed_pe": flag(given, "use_fixed_pe"),
        }
        dropout = number(given, "token_dropout_p")
        unsupported |= {name: number(given, name) != dropout for name in dropouts}
        for name in (name for name, refused in unsupported.items() if refused):
            raise CheckpointError(
                f"config.json: {name} = {given[name]!r} is a variant that no published generator uses"
            )
        return GeneratorConfig(
            task="frame-prediction" if flag(given, "frame_prediction") else "class",
            num_tokens=whole(given, "max_seq_len"),
            codebook_size=whole(given, "vocab_size"),
            depth=whole(given, "n_layer"),
            heads=whole(given, "n_head"),
            width=whole(given, "dim"),
            num_classes=whole(given, "num_classes"),
            ffn_multiplier=number(given, "ffn_dim_multiplier"),
            ffn_multiple=whole(given, "multiple_of"),
            dropout=dropout,
            norm_eps=number(given, "norm_eps"),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json is no generator's: {error} is missing") from error
