"""Reference implementation of the tokenizer, as the paper describes it, which eval/speed.py compares ours with.

All positions go through every layer, the patch embedding is a convolution, codes are the argmax of a softmax, and every matmul is
torch's own. It uses the weights of our models and must return what they return.

Shapes: B batch, T frames, H, W pixels, N tokens, K codebook size, d code dimension, S sequence, D width.
"""

from larp.models.discriminator import Discriminator
from larp.models.layers import Attention, Block
from larp.models.noise import BatchNoise
from larp.models.prior import ARPrior, PriorResult, cross_entropy
from larp.models.quantizer import Quantized, sample_codes
from larp.models.tokenizer import LarpTokenizer, TokenizerOutput

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class ReferenceTokenizer:
    """The reference implementation of a `LarpTokenizer`, on its weights; called as it is called in training."""

    def __init__(self, model: LarpTokenizer):
        self.model = model

    @torch.inference_mode()
    def encode(self, clip: Tensor) -> Tensor:
        """Map clips (B, 3, T, H, W) to codes (B, N)."""
        return self.probabilities(self.project(clip)).argmax(-1)

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Map codes (B, N) to clips (B, 3, T, H, W) in [0, 1]."""
        return self.decode_latents(self.model.quantizer.lookup(codes)).float().clamp(0, 1)

    def __call__(self, clip: Tensor, noise: BatchNoise | None = None, mix: float = 0.0) -> TokenizerOutput:
        """Run a training pass, as `LarpTokenizer.forward` does."""
        latents, prior = self.project(clip), None
        uniform = noise.uniform(self.model.num_tokens) if noise is not None and self.model.config.stochastic else None
        with torch.autocast(clip.device.type, enabled=False):
            quantized = self.quantize(latents.float(), uniform)
        if self.model.prior is not None:
            prior = _prior(self.model.prior, quantized.latents, quantized.codes, self.model.codebook, mix, noise)
        return TokenizerOutput(self.decode_latents(quantized.latents), latents, quantized, prior)

    def project(self, clip: Tensor) -> Tensor:
        """Map clips (B, 3, T, H, W) to latents (B, N, d)."""
        model = self.model
        x = _patches(model.x_embedder, clip) + model.encoder_positions
        x = _blocks(model.encoder.blocks, torch.cat([x, model.queries.expand(len(x), -1, -1)], dim=1))
        return F.linear(x[:, -model.num_tokens :], model.in_linear.weight, model.in_linear.bias)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Map quantised latents (B, N, d) to unclamped clips (B, 3, T, H, W)."""
        model = self.model
        t, h, w = model.config.grid(model.decoder_patch_size)
        pt, ph, pw = model.decoder_patch_size
        x = model.out_linear(latents) + model.latent_positions
        queries = (model.decoder_positions + model.patch_type).expand(len(x), -1, -1)
        x = _blocks(model.decoder.blocks, torch.cat([x, queries], dim=1))
        pixels = model.head(model.norm_final(x[:, model.num_tokens :]))
        return rearrange(
            pixels, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
        )

    def probabilities(self, latents: Tensor) -> Tensor:
        """Softmax over all codes, (B, N, K)."""
        quantizer = self.model.quantizer
        return (F.normalize(latents.float(), dim=-1) @ quantizer.codebook().T / quantizer.temperature).softmax(-1)

    def quantize(self, latents: Tensor, uniform: Tensor | None) -> Quantized:
        """Quantize latents (B, N, d): the argmax of the probabilities, or a sample from them."""
        normal = F.normalize(latents, dim=-1)
        with torch.no_grad():
            probabilities = self.probabilities(latents)
            codes = probabilities.argmax(-1) if uniform is None else sample_codes(probabilities, uniform)
        chosen = self.model.quantizer.lookup(codes)
        losses = F.mse_loss(chosen, normal.detach()), F.mse_loss(normal, chosen.detach())
        return Quantized(normal + (chosen - normal).detach(), codes, *losses)


def reference_discriminator(discriminator: Discriminator, clip: Tensor) -> Tensor:
    """Map clips (B, 3, T, H, W) to the discriminator's logits (B, 1)."""
    x = _patches(discriminator.x_embedder, clip) + discriminator.positions
    x = _blocks(discriminator.encoder.blocks, torch.cat([discriminator.cls_token.expand(len(x), -1, -1), x], dim=1))
    return discriminator.fc(discriminator.norm_final(x[:, 0]))


def _prior(
    prior: ARPrior, latents: Tensor, codes: Tensor, codebook: Tensor, mix: float, noise: BatchNoise | None
) -> PriorResult:
    """The prior's result, as `ARPrior.forward` gives it."""

    def logits(inputs: Tensor) -> Tensor:
        x = F.linear(inputs, prior.input_proj.weight, prior.input_proj.bias) + prior.pos_emb[:, : inputs.shape[1]]
        x = _blocks(prior.blocks, F.dropout(x, prior.config.dropout, prior.training))
        return F.normalize(prior.head(prior.ln_f(x)).float(), dim=-1) @ codebook.T / prior.config.temperature

    inputs, targets = latents[:, :-1], codes[:, 1:]
    first = logits(inputs)
    loss = cross_entropy(first, targets)
    top5 = first.detach().topk(min(5, first.shape[-1]), dim=-1).indices == targets[..., None]
    if prior.config.rounds == 2 and mix > 0:
        length = inputs.shape[1] - 1
        sampled = sample_codes(first[:, :-1].detach().softmax(-1), noise.uniform(length))
        replace = (noise.uniform(length) < mix)[..., None]
        mixed = torch.where(replace, codebook[sampled].to(inputs), inputs[:, 1:])
        loss = (loss + cross_entropy(logits(torch.cat([inputs[:, :1], mixed], dim=1)), targets)) / 2
    return PriorResult(loss, top5[..., 0].float().mean(), top5.any(-1).float().mean())


def _patches(conv: nn.Conv3d, clip: Tensor) -> Tensor:
    """Embed patches by the convolution: (B, P, D), t-major."""
    return conv(clip).flatten(2).transpose(1, 2)


def _blocks(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Run all positions (B, S, D) through all blocks."""
    for block in blocks:
        x = _block(block, x)
    return x


def _block(block: Block, x: Tensor) -> Tensor:
    mlp = block.mlp
    x = x + _attention(block.attn, block.norm1(x))
    hidden = F.gelu(F.linear(block.norm2(x), mlp.fc1.weight, mlp.fc1.bias))
    return x + F.dropout(F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias), mlp.dropout, mlp.training)


def _attention(attn: Attention, x: Tensor) -> Tensor:
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias)
    q, k, v = rearrange(qkv, "b s (three h d) -> three b h s d", three=3, h=attn.heads)
    dropout = attn.dropout if attn.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, is_causal=attn.causal, dropout_p=dropout)
    out = F.linear(rearrange(out, "b h s d -> b s (h d)"), attn.proj.weight, attn.proj.bias)
    return F.dropout(out, attn.dropout, attn.training)
