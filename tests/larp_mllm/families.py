"""Configs of tiny random language models of each family that the plugin takes as a base: two layers, width 32 or 48."""

from collections.abc import Callable

import transformers
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

VOCAB_SIZE = 99
POSITIONS = 128


def _make(kind: type[PreTrainedConfig], tied: bool, **fields) -> Callable[[], PreTrainedConfig]:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, vocab_size=VOCAB_SIZE, max_position_embeddings=POSITIONS)
    sizes |= dict(tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=None) | fields
    return lambda: kind(**sizes)


_LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip

# As published: small Qwen2 and Qwen2.5 have tied heads, large ones untied; Llama 2 has as many key-value heads as heads;
# Llama 3.2-1B is tied; Mistral 7B v0.1 has a sliding window; SmolLM is a tied Llama with an odd number of heads.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen2-tied": _make(Qwen2Config, True, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-untied": _make(Qwen2Config, False),
    "qwen2-sliding": _make(Qwen2Config, False, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3-tied": _make(Qwen3Config, True, head_dim=16),
    "qwen3-untied": _make(Qwen3Config, False, head_dim=16),
    "llama2": _make(LlamaConfig, False, num_key_value_heads=4, rms_norm_eps=1e-5),
    "llama3-tied": _make(LlamaConfig, True, rope_parameters=_LLAMA3),
    "llama3-untied": _make(LlamaConfig, False, rope_parameters=_LLAMA3),
    "mistral": _make(MistralConfig, False, sliding_window=None),
    "mistral-sliding": _make(MistralConfig, False, sliding_window=5),
    "smollm": _make(LlamaConfig, True, hidden_size=48, num_attention_heads=3, num_key_value_heads=1),
}

_HYBRID = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_expand=2)
_QWEN35 = dict(
    num_hidden_layers=4, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
    linear_num_value_heads=4,
)  # fmt: skip


def _renamed(kind: type[PreTrainedConfig], **fields) -> Callable[[], PreTrainedConfig]:
    """For configs with names of their own for the sizes."""
    return lambda: kind(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=None, **fields)


# Bases of other kinds: with recurrent layers or other positions, with a scaled embedding, with fused projections.
OTHERS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3.5": _make(transformers.Qwen3_5TextConfig, True, **_QWEN35),
    "qwen3-next": _make(
        transformers.Qwen3NextConfig, False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, **_QWEN35,
    ),
    "granite-hybrid": _make(
        transformers.GraniteMoeHybridConfig, True, layer_types=["mamba", "attention"], num_local_experts=0,
        num_experts_per_tok=0, shared_intermediate_size=64, embedding_multiplier=12.0, **_HYBRID,
    ),
    "lfm2": _make(transformers.Lfm2Config, True, layer_types=["conv", "full_attention"]),
    "falcon-h1": _make(transformers.FalconH1Config, False, mamba_d_ssm=64, **_HYBRID),
    "opt": _make(transformers.OPTConfig, True, ffn_dim=64, word_embed_proj_dim=32),
    "falcon": _make(transformers.FalconConfig, True),
    "mpt": _renamed(transformers.MptConfig, d_model=32, n_heads=4, n_layers=2, max_seq_len=POSITIONS),
    "xglm": _renamed(transformers.XGLMConfig, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4),
    "gemma": _make(transformers.GemmaConfig, True, head_dim=8),
    "gemma2": _make(
        transformers.Gemma2Config, True, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=None
    ),
    "gemma3": _make(transformers.Gemma3TextConfig, True, head_dim=8, query_pre_attn_scalar=8, sliding_window=5),
    "phi3": _make(transformers.Phi3Config, False),
    "glm4": _make(transformers.Glm4Config, False, head_dim=8),
    "starcoder2": _make(transformers.Starcoder2Config, True),
    "smollm3": _make(transformers.SmolLM3Config, True),
    "olmo2": _make(transformers.Olmo2Config, False),
}  # fmt: skip
