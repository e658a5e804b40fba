"""Autoregressive decoding of a clip: prefill the condition, decode one code, decode the remaining codes.

A `Decoder` holds a generator's weights, fused and packed for few rows, and a preallocated key-value cache. On a GPU the step of
one code is captured in a CUDA graph.

Shapes: B clips, R rows (B, or 2 B with guidance), N codes, K codebook size, S new positions, D width.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from larp.kernels.packed_linear import PackedLinear, PlainLinear, Weights, choose_linear
from larp.kernels.threads import best_threads, threads

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from larp.models.generator import GeneratorBlock, GeneratorConfig, LarpGenerator

# On a GPU the attended length grows in steps of this many positions, because each length needs its own graph.
GPU_STRIDE = 256


class KeyValueCache(nn.Module):
    """Keys and values of all layers, preallocated for the maximum length.

    Args:
        layers, rows, heads, length, head_dim: the shape of the keys and of the values.
        dtype, device: of the keys and values.
    """

    def __init__(self, layers: int, rows: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device):
        super().__init__()
        shape = (layers, rows, heads, length, head_dim)
        for name in ("keys", "values"):
            # Zeros, because attention multiplies masked positions by 0, and 0 times NaN is NaN.
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device))

    def update(self, layer: int, positions: Tensor, key: Tensor, value: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """Store keys and values (R, H, S, head_dim) of a layer at `positions` (S,); return views of the first `span` positions."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, positions, key)
        values.index_copy_(2, positions, value)
        return keys[:, :, :span], values[:, :, :span]


class BlockWeights:
    """The layers of one block, with query, key and value fused, and SwiGLU's w1 and w3 fused."""

    def __init__(self, block: "GeneratorBlock", dtype: torch.dtype, linear: type[PlainLinear] | type[PackedLinear]):
        self.qkv, self.wo, self.w13, self.w2 = (linear(weight) for weight in self.fused(block, dtype))
        self.attention_norm = block.attention_norm.weight.detach().to(dtype)
        self.ffn_norm = block.ffn_norm.weight.detach().to(dtype)

    @staticmethod
    def fused(block: "GeneratorBlock", dtype: torch.dtype) -> list[Tensor]:
        """Return the four fused weights of a block, each (output width, input width)."""
        inner = block.feed_forward
        weights = [block.attention.wqkv.weight, block.attention.wo.weight]
        weights += [torch.cat([inner.w1.weight, inner.w3.weight]), inner.w2.weight]
        return [weight.detach().to(dtype) for weight in weights]


class Decoder(nn.Module):
    """Decodes codes with a generator's weights. Build a new one after the weights change.

    Called with one code per row, it is `decode_one`, which torch.compile(fullgraph=True) and torch.export take: a traced step
    attends to all positions under a mask, and an exported one has cache and position as buffers, as `prefill` left them.

    Fused and packed weights are copies; embeddings and some plain weights are shared with the model. After an in-place change
    they would not match.

    Args:
        model: the generator; it is not modified. Dropout is never applied.
        rows: R, the number of sequences decoded in parallel.
        weights: the implementation of the linear layers.
            "plain": `F.linear`.
            "packed": copies in a layout for few rows on a CPU; the bits of a row do not depend on the batch
            (see larp.kernels.packed_linear).
            "fused": for one or two rows on a GPU, kernels that each compute most of a block (see
            larp.sampling.decoder_kernels); the last bits differ from "plain". For a large model, launch parameters are first
            tuned for some seconds.
            "auto": "packed" where supported; "fused", without tuning, for bfloat16 where supported; else "plain".
        dtype: of the weights; by default the model's. bfloat16 is faster and changes the samples.
        stride: the attended length is rounded up to a multiple of this and masked; 1 needs no mask. By default 1 on a CPU,
            else `GPU_STRIDE`.

    Raises ValueError for weights that cannot be packed or fused.
    """

    def __init__(
        self,
        model: "LarpGenerator",
        rows: int,
        *,
        weights: Weights = "auto",
        dtype: torch.dtype | None = None,
        stride: int | None = None,
    ):
        super().__init__()
        like, config = model.output.weight, model.config
        # The method, since the model would be a part of this module.
        self.embed_condition = model.embed_condition
        self.config, self.dtype = config, dtype or like.dtype
        self.stride = stride or (1 if like.device.type == "cpu" else GPU_STRIDE)
        tuned = weights == "fused"
        if (
            weights == "auto"
            and stride is None
            and like.is_cuda
            and self.dtype == torch.bfloat16
            and _can_fuse(config, rows, like.device)
        ):
            weights = "fused"
        if weights == "fused":
            if not like.is_cuda:
                raise ValueError(f"weights='fused' needs a GPU, and these are on {like.device}: use 'auto'")
            # The kernels read the position on the device: one attended length, and so one graph, is enough.
            self.stride = config.positions
        with torch.no_grad():
            linear = choose_linear(like.detach().to(self.dtype), weights)
            self.blocks = [BlockWeights(block, self.dtype, linear) for block in model.layers]
            self.head, self.norm = linear(like.detach().to(self.dtype)), model.norm.weight.detach().to(self.dtype)
            # Of a codebook table both are computed once.
            self.code_embeddings = model.tok_embeddings.weight.detach()
            self.position_embeddings = model.abs_pe.detach().to(self.dtype)
        length = -(-config.positions // self.stride) * self.stride
        head_dim = config.width // config.heads
        # On a CPU attention in bfloat16 is half as fast as in float32.
        cache_dtype = torch.float32 if like.device.type == "cpu" and self.dtype == torch.bfloat16 else self.dtype
        self.cache = KeyValueCache(config.depth, rows, config.heads, length, head_dim, cache_dtype, like.device)
        self.fused = None
        if weights == "fused":
            from larp.sampling.decoder_kernels import FusedBlocks
            from larp.sampling.decoder_tuning import tune

            self.fused = FusedBlocks(config, self.blocks, self.norm, self.head.weight, self.cache)
            tune(self.fused, tuned)
        # Results of `make_step` with their tensors, stored by callers that reuse them.
        self.saved_steps: dict[Hashable, tuple] = {}
        # The number of positions in the cache, None after compiled steps, and the same on the device, where captured steps read it.
        self.filled: int | None = 0
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64, device=like.device))
        # The index of the newest code, on the device.
        self.code_index = torch.zeros_like(self.position)
        self.position_ids = torch.arange(length, device=like.device)

    @torch.no_grad()
    def prefill(self, condition: Tensor) -> Tensor:
        """Start new sequences with a condition per row (see `LarpGenerator`); return float32 logits (R, K) of the first code."""
        x = self.embed_condition(condition).to(self.dtype)
        length = x.shape[1]
        logits = self._forward(x + self.position_embeddings[:, :length], self.position_ids[:length], length)
        self.position.fill_(length)
        self.code_index.zero_()
        self.filled = length
        return logits

    @torch.no_grad()
    def decode_one(self, codes: Tensor) -> Tensor:
        """Append one code per row, int64 (R,); return float32 logits (R, K) of the next. Raises ValueError for another shape or dtype."""
        rows = self.cache.keys.shape[1]
        if codes.shape != (rows,) or codes.is_floating_point():
            raise ValueError(f"expected one code per row, integers ({rows},), got {codes.dtype} {tuple(codes.shape)}")
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                self.filled = None  # a number that changes would need a new graph
            return self._step(codes, self.position_ids.shape[0])
        logits = self._step(codes, self._span())
        self.filled += 1
        return logits

    forward = decode_one

    @torch.no_grad()
    def decode_n(self, codes: Tensor, choose: Callable[[Tensor, Tensor], Tensor], progress: bool = False) -> None:
        """Decode codes (B, N) from index 1 on, in place, after `prefill`. R is B, or 2 B for guidance.

        Args:
            choose: maps logits (R, K) and the index (1,), both on the device, to codes (B,).
            progress: show a progress bar.
        """
        self.run_steps(self.make_step(codes, choose, codes.is_cuda), codes.shape[1], progress)

    @torch.no_grad()
    def run_steps(self, step: Callable[[int], None], count: int, progress: bool = False) -> None:
        """Call a step of `make_step` for the codes 1 to `count` - 1, after `prefill`."""
        for _ in tqdm(range(1, count), desc="codes", disable=not progress, leave=False):
            step(self._span())
            self.filled += 1

    def make_step(
        self, codes: Tensor, choose: Callable[[Tensor, Tensor], Tensor], captured: bool
    ) -> Callable[[int], None]:
        """Return a function of the attended length that decodes the next index of codes (B, N) in place, from 1 on.

        `choose` is as in `decode_n`. `captured` replays a CUDA graph. The caller increments `filled`. After another `prefill`
        the function starts at index 1 again and reads the current contents of `codes` and of the tensors that `choose` uses.
        """
        index, copies = self.code_index.zero_(), self.cache.keys.shape[1] // codes.shape[0]

        def step(span: int) -> None:
            logits = self._step(codes.index_select(1, index)[:, 0].repeat(copies), span)
            index.add_(1)
            codes.index_copy_(1, index, choose(logits, index)[:, None])

        return CapturedSteps(step) if captured else step

    def best_threads(self) -> int:
        """Return the faster number of threads, 1 or torch's current one, for the linear layers of a block."""
        if self.position.device.type != "cpu":
            return torch.get_num_threads()
        block, rows = self.blocks[0], self.cache.keys.shape[1]
        x = torch.ones(rows, self.config.width, dtype=self.dtype)
        inner = torch.ones(rows, self.config.ffn_hidden, dtype=self.dtype)
        return best_threads(lambda: (block.qkv(x), block.wo(x), block.w13(x), block.w2(inner)))

    def _span(self) -> int:
        """Return the attended length of the next step; ValueError if all positions are filled."""
        if self.filled is None:
            self.filled = int(self.position)
        if self.filled >= self.config.positions:
            raise ValueError(
                f"all {self.config.positions} positions of this generator are filled: the clip is complete"
            )
        return -(-(self.filled + 1) // self.stride) * self.stride

    def _step(self, codes: Tensor, span: int) -> Tensor:
        """Run one code per row without reading values back from the device, so that a CUDA graph can capture it."""
        x = F.embedding(codes, self.code_embeddings)[:, None].to(self.dtype)
        x = x + self.position_embeddings.index_select(1, self.position)
        if self.fused is not None:
            logits = self.fused(x[:, 0], self.position)
        else:
            is_masked = self.stride > 1 or torch.compiler.is_compiling()
            mask = (self.position_ids[:span] <= self.position)[None] if is_masked else None
            logits = self._forward(x, self.position, span, mask)
        self.position.add_(1)
        return logits

    def _forward(self, x: Tensor, positions: Tensor, span: int, mask: Tensor | None = None) -> Tensor:
        """Run new inputs x (R, S, D) at `positions` (S,) through all blocks; return the logits (R, K) of the last position."""
        rows, length, width = x.shape
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(self._rms_norm(x, block.attention_norm)).to(self.cache.keys.dtype)
            query, key, value = qkv.view(rows, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
            keys, values = self.cache.update(layer, positions, key, value, span)
            mixed = attend(query, keys, values, mask)
            x = x.add_(block.wo(mixed.transpose(1, 2).reshape(rows, length, width).to(self.dtype)))
            x = x.add_(block.w2(swiglu(block.w13(self._rms_norm(x, block.ffn_norm)))))
        return self.head(self._rms_norm(x[:, -1], self.norm)).float()

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def _can_fuse(config: "GeneratorConfig", rows: int, device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16
        return False
    try:
        from larp.sampling.decoder_kernels import why_unsupported
    except ImportError:  # torch without Triton, or with too old a version
        return False
    return not why_unsupported(config, rows)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute attention of new positions (R, H, S, head_dim) to keys and values (R, H, span, head_dim), causal if S > 1.

    `mask`, bool (1, span), is True for the keys that a single position attends to; None means all.
    """
    length = query.shape[2]
    if length > 1 or mask is not None or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=length > 1)
    # For a single query torch's CPU kernel splits the keys among threads, so that a row's bits depend on their number and on
    # the other rows. Two matrix multiplications avoid that and are slightly faster.
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return scores.softmax(dim=-1) @ values


def swiglu(x: Tensor) -> Tensor:
    """Compute `silu(gate) * up` (..., F) from both concatenated (..., 2 F)."""
    gate, up = x.chunk(2, dim=-1)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.silu(gate).mul_(up)
    # One thread: the chunk of another may start inside a SIMD vector, whose rest a different implementation of exp computes.
    with threads(1):
        return F.silu(gate).mul_(up)


class CapturedSteps:
    """A step captured in one CUDA graph per attended length, so that a code costs one launch.

    The first step of a length runs eagerly, which also warms up its kernels. The second is captured; from then on it is replayed.
    """

    def __init__(self, step: Callable[[int], None]):
        self.step = step
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, span: int) -> None:
        """Run the step with an attended length."""
        if span not in self.graphs:
            self.graphs[span] = None
            self.step(span)
            return
        if self.graphs[span] is None:
            graph = torch.cuda.CUDAGraph()
            # Thread-local, because threads of a data loader may use the device at the same time.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(span)
            self.graphs[span] = graph
        self.graphs[span].replay()
