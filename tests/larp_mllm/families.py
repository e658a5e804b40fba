"""Configs of tiny random language models of each family that the plugin takes as a base: two layers, width 32 or 48."""

from collections.abc import Callable

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
