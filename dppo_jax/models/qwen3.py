"""Qwen3 (arXiv:2505.09388): grouped queries, normalised queries and keys."""

from typing import Any

from flax import nnx
import jax

from dppo_jax.models import hf
from dppo_jax.models import layers

HF_ARCHITECTURE = 'Qwen3ForCausalLM'

# Path in our tree below `layers` -> name in a Hugging Face layer.
HF_LAYER_NAMES = {
    'attention/q/kernel': 'self_attn.q_proj.weight',
    'attention/k/kernel': 'self_attn.k_proj.weight',
    'attention/v/kernel': 'self_attn.v_proj.weight',
    'attention/o/kernel': 'self_attn.o_proj.weight',
    'attention/q_norm/scale': 'self_attn.q_norm.weight',
    'attention/k_norm/scale': 'self_attn.k_norm.weight',
    'mlp/gate/kernel': 'mlp.gate_proj.weight',
    'mlp/up/kernel': 'mlp.up_proj.weight',
    'mlp/down/kernel': 'mlp.down_proj.weight',
    'norm_attention/scale': 'input_layernorm.weight',
    'norm_mlp/scale': 'post_attention_layernorm.weight',
}


class Block(nnx.Module):
  """One layer. [B, T, D] -> [B, T, D] and what `attend` kept."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    norm = lambda: layers.RMSNorm(
        config.hidden_size, epsilon=config.rms_norm_eps
    )
    self.norm_attention = norm()
    self.attention = layers.GroupedQueryAttention(
        config, qk_norm=True, rngs=rngs
    )
    self.norm_mlp = norm()
    self.mlp = layers.GatedMLP(config, rngs=rngs)

  def __call__(
      self, x: jax.Array, *, rotation, attend: layers.AttendFn
  ) -> tuple[jax.Array, Any]:
    change, kept = self.attention(
        self.norm_attention(x), rotation=rotation, attend=attend
    )
    x = x + change
    return x + self.mlp(self.norm_mlp(x)), kept


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `Qwen3Config`; refuses what is not built."""
  if getattr(hf_config, 'use_sliding_window', False):
    raise ValueError('use_sliding_window=true is not supported for Qwen3.')
  if getattr(hf_config, 'attention_bias', False):
    raise ValueError('attention_bias=true is not supported for Qwen3.')
  rope = hf_config.rope_parameters
  if rope.get('rope_type', 'default') != 'default':
    raise ValueError(
        f'rope_type={rope["rope_type"]!r} is not supported for Qwen3.'
    )
  return layers.ModelConfig(
      model_type='qwen3',
      vocab_size=hf_config.vocab_size,
      hidden_size=hf_config.hidden_size,
      intermediate_size=hf_config.intermediate_size,
      num_hidden_layers=hf_config.num_hidden_layers,
      num_attention_heads=hf_config.num_attention_heads,
      num_key_value_heads=hf_config.num_key_value_heads,
      head_dim=hf_config.head_dim,
      rope_theta=float(rope['rope_theta']),
      rms_norm_eps=hf_config.rms_norm_eps,
      tie_word_embeddings=bool(hf_config.tie_word_embeddings),
      max_position_embeddings=hf_config.max_position_embeddings,
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `Qwen3Config` of these sizes."""
  return hf.transformers().Qwen3Config(
      vocab_size=config.vocab_size,
      hidden_size=config.hidden_size,
      intermediate_size=config.intermediate_size,
      num_hidden_layers=config.num_hidden_layers,
      num_attention_heads=config.num_attention_heads,
      num_key_value_heads=config.num_key_value_heads,
      head_dim=config.head_dim,
      rope_parameters={
          'rope_type': 'default', 'rope_theta': config.rope_theta,
      },
      rms_norm_eps=config.rms_norm_eps,
      tie_word_embeddings=config.tie_word_embeddings,
      max_position_embeddings=config.max_position_embeddings,
      architectures=[HF_ARCHITECTURE],
  )
