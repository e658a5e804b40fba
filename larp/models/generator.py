"""The autoregressive generator: a LLaMA-like transformer with learned positions over the codes of a clip.

Source: LARP (arXiv 2410.21264), section 3.4 and appendix. The tensor names are those of the published checkpoints.

Shapes: B batch, N codes of a clip, K codebook size, C condition positions, S sequence, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from larp.config import check_positive
from larp.hub import CheckpointError, LarpModel
from larp.models.class_names import class_number, unknown_class
from larp.models.codebook_table import CodebookEmbedding, CodebookHead
from larp.models.layers import BaseBlock, RMSNorm, SwiGLU
from larp.models.published_fields import read_bool, read_float, read_int, warn_of_unknown

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Task = Literal["class", "frame-prediction"]

# (layers, heads, width). S to XXXL are the published sizes; tiny and mini are for small clips on a CPU.
SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (4, 4, 128),
    "mini": (6, 6, 192),
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
    """Shape and task of a `LarpGenerator`. Raises ValueError, naming the field, for an invalid value."""

    task: Task = "class"
    """The condition: `class`, a class embedding; `frame-prediction`, the codes of the given frames and a separator."""
    num_tokens: int = 1024
    """Codes of a clip, N, as in the tokenizer."""
    codebook_size: int = 8192
    """K, as in the tokenizer."""
    depth: int = 12
    heads: int = 12
    width: int = 768
    """D, a multiple of `heads`."""
    num_classes: int = 101
    """Number of classes without the unconditional one; not used for frame prediction."""
    class_names: tuple[str, ...] = ()
    """Names of the classes by number, or empty."""
    tokenizer_hash: str = ""
    """`weight_hash()` of the tokenizer that made the codes; empty if unknown, as in published checkpoints."""
    ffn_multiplier: float = 1.0
    """Multiplies the SwiGLU width of 8/3 D."""
    ffn_multiple: int = 256
    """The SwiGLU width is rounded up to a multiple of this."""
    null_condition: bool = False
    """Frame prediction: a learned unconditional token, which guidance needs. Published checkpoints have none. Class
    conditions always have an unconditional class."""
    code_dim: int = 0
    """d of the tokenizer's codebook where the rows of codes, in input and output, are computed from it (`CodebookTable`); 0, as
    published: learned tables."""
    dropout: float = 0.1
    """Of the input embeddings, the attention output and the feed-forward output."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.task not in ("class", "frame-prediction"):
            raise ValueError(f"task is {self.task!r}; it must be 'class' or 'frame-prediction'")
        check_positive(self, "num_tokens", "codebook_size", "depth", "heads", "width", "num_classes", "ffn_multiple")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.code_dim < 0:
            raise ValueError(f"code_dim is {self.code_dim}; it must be 0 or more")
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
        """C: 1 for a class, N + 1 for given codes and the separator."""
        return 1 if self.task == "class" else self.num_tokens + 1

    @property
    def positions(self) -> int:
        """Maximum input length, C + N - 1: the last code is never an input."""
        return self.condition_length + self.num_tokens - 1

    @property
    def ffn_hidden(self) -> int:
        """Inner width of SwiGLU: 8/3 D times the multiplier, rounded up."""
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


class GeneratorBlock(BaseBlock):
    """Pre-norm block: RMSNorm and attention, then RMSNorm and SwiGLU, each with a residual connection."""

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
    """Class embeddings, the last of which is the unconditional class of guidance and condition dropout."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map labels int64 (B,) in [0, num_classes] to (B, 1, D)."""
        return self.embedding_table(labels)[:, None]


class LarpGenerator(LarpModel):
    """Autoregressive transformer over the codes of a clip, conditioned on a class or on the codes of given frames.

    A condition is int64. For task "class": labels (B,), where `num_classes` is the unconditional class. For
    "frame-prediction": the codes of the given frames and the separator (B, N + 1), see `frame_condition`.
    """

    model_type = "larp-generator"
    config_class = GeneratorConfig

    @classmethod
    def from_published(cls, config: dict, tensors: dict[str, Tensor]) -> tuple[GeneratorConfig, dict[str, Tensor]]:
        """Convert the config of a published checkpoint; the tensor names are the same."""
        return config_from_published(config), tensors

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        # Ids after the codebook: the separator and the unconditional token.
        extra_ids = 0 if config.task == "class" else 1 + config.null_condition
        if config.task == "class":
            self.cls_embedding = ClassEmbedding(config.num_classes, config.width)
        size = config.codebook_size, config.code_dim, config.width
        self.tok_embeddings = (
            CodebookEmbedding(*size, extra_ids)
            if config.code_dim
            else nn.Embedding(config.codebook_size + extra_ids, config.width)
        )
        self.abs_pe = nn.Parameter(torch.empty(1, config.positions, config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(GeneratorBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.output = (
            CodebookHead(*size) if config.code_dim else nn.Linear(config.width, config.codebook_size, bias=False)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: weights normal with std 0.02, norms 1, output head 0, so that the loss starts at log K."""
        for name, parameter in self.named_parameters():
            if name == "output.weight":
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.ones_(parameter)
        if self.config.code_dim:
            self.take_codebook(torch.zeros(self.config.codebook_size, self.config.code_dim))

    @torch.no_grad()
    def take_codebook(self, codebook: Tensor) -> None:
        """Compute the rows of codes from this codebook (K, d), of an untrained model with `code_dim`; the head stays 0."""
        self.tok_embeddings.initialize(codebook, std=0.02)
        self.output.initialize(codebook, std=0.02)
        nn.init.zeros_(self.output.mlp[2].weight)

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Return teacher-forced logits (B, N, K) for codes int64 (B, N): position i depends on the codes before i."""
        if codes.shape[1] != self.config.num_tokens:
            raise ValueError(f"clips have {codes.shape[1]} codes, but this generator has {self.config.num_tokens}")
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
        """Return the unconditional condition (no class, or no given frames) in the shape of `condition`.

        Raises ValueError for frame prediction without `null_condition`.
        """
        config = self.config
        if config.task == "class":
            return torch.full_like(condition, config.num_classes)
        if not config.null_condition:
            raise ValueError(
                "this generator was trained without null_condition, which guidance of frame prediction needs: use guidance_scale "
                "1.0, or train one with null_condition and condition dropout"
            )
        return self.frame_condition(torch.full_like(condition[:, :-1], config.codebook_size + 1))

    def class_labels(self, classes: Sequence[str | int]) -> Tensor:
        """Return labels int64 (B,) for class names, see `class_number`, or numbers; ValueError for an unknown one."""
        return torch.tensor([self._class_label(name) for name in classes], dtype=torch.int64)

    def _class_label(self, name: str | int) -> int:
        config = self.config
        if config.task != "class":
            raise ValueError("this generator predicts frames; it has no classes")
        if isinstance(name, str) and (number := class_number(name, config.class_names)) is not None:
            return number
        if str(name).removeprefix("-").isdecimal():
            if 0 <= int(name) < config.num_classes:
                return int(name)
            raise ValueError(
                f"class {name} is out of range: this generator has the classes 0 to {config.num_classes - 1}"
            )
        raise ValueError(unknown_class(str(name), config.class_names))

    def check_tokenizer(self, num_tokens: int, codebook_size: int, weight_hash: str) -> None:
        """Raise ValueError unless the generator was trained on codes of the tokenizer with these properties."""
        config = self.config
        if (num_tokens, codebook_size) != (config.num_tokens, config.codebook_size):
            raise ValueError(
                f"the tokenizer makes {num_tokens} codes of {codebook_size} values, but the generator was trained on"
                f" {config.num_tokens} codes of {config.codebook_size} values: use the tokenizer that made its tokens"
            )
        if config.tokenizer_hash and weight_hash != config.tokenizer_hash:
            raise ValueError(
                f"the generator was trained on codes of the tokenizer {config.tokenizer_hash[:12]}, but this one is"
                f" {weight_hash[:12]} (hashes of the weights): use that tokenizer, or train again"
            )


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per code of logits (B, N, K) against codes int64 (B, N), in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())


# All fields of a published config.json. In the second list null counts as absent.
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
    """Convert the config.json of a published LARP generator.

    Raises CheckpointError, naming the field, for a missing one, a wrong type or an unsupported variant. Warns of unknown
    fields.
    """
    warn_of_unknown(values, dict.fromkeys((*_PUBLISHED, *_NULLABLE)))
    defaults = {"num_classes": 101, "multiple_of": 256, "norm_eps": 1e-5, "drop_path_rate": 0, "attn_dropout_p": 0}
    defaults |= {"ffn_dim_multiplier": 1, "use_fixed_pe": False, "frame_prediction": False}
    dropouts = ("token_dropout_p", "resid_dropout_p", "ffn_dropout_p")
    given = {name: value for name, value in values.items() if name not in _NULLABLE or value is not None}
    given = defaults | dict.fromkeys(dropouts, 0.1) | given
    try:
        unsupported = {
            "n_kv_head": "n_kv_head" in given and read_int(given, "n_kv_head") != read_int(given, "n_head"),
            "drop_path_rate": read_float(given, "drop_path_rate") != 0,
            "attn_dropout_p": read_float(given, "attn_dropout_p") != 0,
            "use_fixed_pe": read_bool(given, "use_fixed_pe"),
        }
        dropout = read_float(given, "token_dropout_p")
        unsupported |= {name: read_float(given, name) != dropout for name in dropouts}
        for name in (name for name, differs in unsupported.items() if differs):
            raise CheckpointError(
                f"config.json: {name} = {given[name]!r} is not supported, because no published generator uses it"
            )
        return GeneratorConfig(
            task="frame-prediction" if read_bool(given, "frame_prediction") else "class",
            num_tokens=read_int(given, "max_seq_len"),
            codebook_size=read_int(given, "vocab_size"),
            depth=read_int(given, "n_layer"),
            heads=read_int(given, "n_head"),
            width=read_int(given, "dim"),
            num_classes=read_int(given, "num_classes"),
            ffn_multiplier=read_float(given, "ffn_dim_multiplier"),
            ffn_multiple=read_int(given, "multiple_of"),
            dropout=dropout,
            norm_eps=read_float(given, "norm_eps"),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json is not that of a generator: {error} is missing") from error
