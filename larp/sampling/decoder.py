"""Writing clips code by code: prefill the condition, decode one code, decode the other codes.

A `Decoder` holds what a generator's blocks need, fused and laid out for few rows, beside a preallocated cache. On a GPU the step of one code is captured in a CUDA graph.

Shapes: B clips, R rows (B, or 2 B with guidance), N codes, K codebook size, S new positions, P positions, D width.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

from larp.kernels.packed_linear import PackedLinear, PlainLinear, Weights, choose_linear
from larp.kernels.threads import best_threads, threads

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

if TYPE_CHECKING:
    from larp.models.generator import GeneratorBlock, GeneratorConfig, LarpGenerator

# On a GPU the attended length grows by this many positions at a time: each length is a graph of its own.
GPU_STRIDE = 256


class KeyValueCache:
    """Keys and values of the positions read so far, preallocated for the length that one generation needs.

    Args:
        layers, rows, heads, length, head_dim: the shape of the keys, and of the values.
        dtype, device: those of the keys that will be written.
        masked: positions that are not yet filled will be attended to, under a mask.
    """

    def __init__(
        self, layers: int, rows: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device, masked: bool
    ):
        # Zeros: a position under a mask still takes part in a product, and zero times a NaN is NaN.
        allocate = torch.zeros if masked else torch.empty
        shape = (layers, rows, heads, length, head_dim)
        self.keys, self.values = (allocate(shape, dtype=dtype, device=device) for _ in range(2))

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor, span: int) -> tuple[Tensor, Tensor]:
        """Write keys and values (R, H, S, head_dim) of a layer at `places` (S,); return views of its first `span` positions."""
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, places, key)
        values.index_copy_(2, places, value)
        return keys[:, :, :span], values[:, :, :span]


class BlockWeights:
    """The weights of one block, ready for products: query, key and value in one, and the two inner ones of SwiGLU in one."""

    def __init__(self, block: "GeneratorBlock", dtype: torch.dtype, product: type[PlainLinear] | type[PackedLinear]):
        self.qkv, self.wo, self.w13, self.w2 = (product(weight) for weight in self.fused(block, dtype))
        self.attention_norm = block.attention_norm.weight.detach().to(dtype)
        self.ffn_norm = block.ffn_norm.weight.detach().to(dtype)

    @staticmethod
    def fused(block: "GeneratorBlock", dtype: torch.dtype) -> list[Tensor]:
        """Return the weights (O, I) of the four products of a block."""
        inner = block.feed_forward
        weights = [block.attention.wqkv.weight, block.attention.wo.weight]
        weights += [torch.cat([inner.w1.weight, inner.w3.weight]), inner.w2.weight]
        return [weight.detach().to(dtype) for weight in weights]


class Decoder:
    """A generator made ready to write clips. Make it anew after a change of the weights.

    Fused and packed weights are copies of what they were; embeddings, and plain weights that need no fusing nor another dtype,
    are the model's own. After a change in place the two would no longer belong together.

    Args:
        model: the generator; it is not changed, and dropout does not act whatever its mode.
        rows: R, how many sequences are written side by side.
        weights: "packed" copies them into the layout that a CPU reads fastest for few rows, and gives a row the same bits
            in any batch; "plain" uses `F.linear`. "fused" is for one or two rows on a GPU: kernels that do most of a block at once
            (see larp.sampling.decoder_kernels), whose last bits are others; for a large model it tries at first, for some seconds, how to
            launch them. "auto" packs where that is possible (see larp.kernels.packed_linear), and fuses bfloat16 where that is, without trying.
        dtype: of the weights; by default the model's. bfloat16 is faster, and changes what is sampled.
        stride: the attended length is a multiple of this, and masked; 1 attends to what is filled, without a mask. By
            default 1 on a CPU, and `GPU_STRIDE` elsewhere.

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
        like, config = model.output.weight, model.config
        self.model, self.config, self.dtype = model, config, dtype or like.dtype
        self.stride = stride or (1 if like.device.type == "cpu" else GPU_STRIDE)
        searched = weights == "fused"
        if (
            weights == "auto"
            and stride is None
            and like.is_cuda
            and self.dtype == torch.bfloat16
            and _fusable(config, rows, like.device)
        ):
            weights = "fused"
        if weights == "fused":
            if not like.is_cuda:
                raise ValueError(f"weights='fused' needs a GPU, and these are on {like.device}: use 'auto'")
            # The kernels know what is filled: one attended length, and so one graph, serves all positions.
            self.stride = config.positions
        with torch.no_grad():
            product = choose_linear(like.detach().to(self.dtype), weights)
            self.blocks = [BlockWeights(block, self.dtype, product) for block in model.layers]
            self.head, self.norm = product(like.detach().to(self.dtype)), model.norm.weight.detach().to(self.dtype)
            self.positions = model.abs_pe.detach().to(self.dtype)
        length = -(-config.positions // self.stride) * self.stride
        head_dim = config.width // config.heads
        # A CPU attends to bfloat16 at half the speed at which it attends to float32.
        kept = torch.float32 if like.device.type == "cpu" and self.dtype == torch.bfloat16 else self.dtype
        masked = self.stride > 1
        self.cache = KeyValueCache(config.depth, rows, config.heads, length, head_dim, kept, like.device, masked)
        self.fused = None
        if weights == "fused":
            from larp.sampling.decoder_kernels import FusedBlocks
            from larp.sampling.decoder_tuning import tune

            self.fused = FusedBlocks(config, self.blocks, self.norm, self.head.weight, self.cache)
            tune(self.fused, searched)
        # What `steps` returned, and what belongs to it, for whoever wants to run it again.
        self.runs: dict[Hashable, tuple] = {}
        self.filled = 0
        # Where the next position goes, also as a tensor: a captured step reads it there.
        self.place = torch.zeros(1, dtype=torch.int64, device=like.device)
        # The index that `steps` filled last.
        self.newest = torch.zeros_like(self.place)
        self.counted = torch.arange(length, device=like.device)

    @torch.no_grad()
    def prefill(self, condition: Tensor) -> Tensor:
        """Read the condition of each row, see `LarpGenerator`; return the float32 logits (R, K) of the first code.

        Whatever was read before is forgotten.
        """
        x = self.model.embed_condition(condition).to(self.dtype)
        length = x.shape[1]
        logits = self._read(x + self.positions[:, :length], self.counted[:length], length)
        self.place.fill_(length)
        self.newest.zero_()
        self.filled = length
        return logits

    @torch.no_grad()
    def decode_one(self, codes: Tensor) -> Tensor:
        """Read one more code of each row, int64 (R,); return the float32 logits (R, K) of the next."""
        logits = self._step(codes, self._span())
        self.filled += 1
        return logits

    @torch.no_grad()
    def decode_n(self, codes: Tensor, choose: Callable[[Tensor, Tensor], Tensor], progress: bool = False) -> None:
        """Fill codes (B, N) from index 1 on, in place; R is B, or 2 B when `choose` mixes conditional and unconditional.

        `choose(logits (R, K), index (1,))` picks the codes (B,) of an index, which it is given on the device.
        """
        self.run(self.steps(codes, choose, codes.is_cuda), codes.shape[1], progress)

    @torch.no_grad()
    def run(self, run: Callable[[int], None], count: int, progress: bool = False) -> None:
        """Take what `steps` returned through a clip of `count` codes, after a prefill."""
        for _ in tqdm(range(1, count), desc="codes", disable=not progress, leave=False):
            run(self._span())
            self.filled += 1

    def steps(self, codes: Tensor, choose: Callable[[Tensor, Tensor], Tensor], captured: bool) -> Callable[[int], None]:
        """Return what, at each call, fills the next index of codes (B, N), from 1 on, and attends to so many positions.

        `choose` is as in `decode_n`; `captured` (on a GPU) replays a graph. `filled` is the caller's to count. After another
        prefill it begins again, with what lies in `codes` and in what `choose` reads by then.
        """
        newest, copies = self.newest.zero_(), self.cache.keys.shape[1] // codes.shape[0]

        def step(span: int) -> None:
            logits = self._step(codes.index_select(1, newest)[:, 0].repeat(copies), span)
            newest.add_(1)
            codes.index_copy_(1, newest, choose(logits, newest)[:, None])

        return CapturedSteps(step) if captured else step

    def best_threads(self) -> int:
        """Return the number of threads, 1 or the present one, that does a block's products faster at this moment."""
        if self.place.device.type != "cpu":
            return torch.get_num_threads()
        block, rows = self.blocks[0], self.cache.keys.shape[1]
        wide = torch.ones(rows, self.config.width, dtype=self.dtype)
        inner = torch.ones(rows, self.config.ffn_hidden, dtype=self.dtype)
        return best_threads(lambda: (block.qkv(wide), block.wo(wide), block.w13(wide), block.w2(inner)))

    def _span(self) -> int:
        """How many positions the next step attends to, and what does not fit: ValueError."""
        if self.filled >= self.config.positions:
            raise ValueError(f"all {self.config.positions} positions of this generator are read: the clip is complete")
        return -(-(self.filled + 1) // self.stride) * self.stride

    def _step(self, codes: Tensor, span: int) -> Tensor:
        """Read one code of each row with what lies on the device alone: what a graph can capture."""
        x = F.embedding(codes, self.model.tok_embeddings.weight)[:, None].to(self.dtype)
        x = x + self.positions.index_select(1, self.place)
        if self.fused is not None:
            logits = self.fused(x[:, 0], self.place)
        else:
            mask = None if self.stride == 1 else (self.counted[:span] <= self.place)[None]
            logits = self._read(x, self.place, span, mask)
        self.place.add_(1)
        return logits

    def _read(self, x: Tensor, places: Tensor, span: int, mask: Tensor | None = None) -> Tensor:
        """Run the new positions x (R, S, D) at `places` (S,) through all blocks; return the last one's logits (R, K)."""
        rows, length, width = x.shape
        for layer, block in enumerate(self.blocks):
            fused = block.qkv(self._normed(x, block.attention_norm)).to(self.cache.keys.dtype)
            query, key, value = fused.view(rows, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
            keys, values = self.cache.write(layer, places, key, value, span)
            mixed = attend(query, keys, values, mask)
            x = x.add_(block.wo(mixed.transpose(1, 2).reshape(rows, length, width).to(self.dtype)))
            x = x.add_(block.w2(gated(block.w13(self._normed(x, block.ffn_norm)))))
        return self.head(self._normed(x[:, -1], self.norm)).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_eps)


def _fusable(config: "GeneratorConfig", rows: int, device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < (8, 0):  # no bfloat16
        return False
    try:
        from larp.sampling.decoder_kernels import refusal
    except ImportError:  # a build of torch without Triton, or with one that is too old
        return False
    return not refusal(config, rows)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of new positions (R, H, S, head_dim) to keys and values (R, H, span, head_dim): causal if S > 1.

    `mask` bool (1, span) says which keys a single position sees; None: all.
    """
    length = query.shape[2]
    if length > 1 or mask is not None or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=length > 1)
    # For a single query torch's CPU kernel splits the keys among the threads, and a row's bits would depend on their number
    # and on the rows beside it. With two products they do not, and it is a little faster.
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    return scores.softmax(dim=-1) @ values


def gated(x: Tensor) -> Tensor:
    """Return the inner values of SwiGLU (..., O) from both their products (..., 2 O)."""
    gate, up = x.chunk(2, dim=-1)
    if x.device.type != "cpu":
        return F.silu(gate).mul_(up)
    # On one thread: another's share may begin inside a vector, of which the rest is then done by another exp.
    with threads(1):
        return F.silu(gate).mul_(up)


class CapturedSteps:
    """A step captured in one CUDA graph for each span, so that a code costs one launch.

    The first step of a span runs as it is, which also warms up its kernels; the second is captured, and from there on replayed.
    """

    def __init__(self, step: Callable[[int], None]):
        self.step = step
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, span: int) -> None:
        """Do the step for an attended length."""
        if span not in self.graphs:
            self.graphs[span] = None
            self.step(span)
            return
        if self.graphs[span] is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads, of a loader for instance, may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(span)
            self.graphs[span] = graph
        self.graphs[span].replay()
