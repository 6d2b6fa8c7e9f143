"""Gemma 2 (arXiv:2408.00118): sandwich norms, soft-capping, every other layer
with a sliding window, scaled embeddings.
"""

from typing import Any

from flax import nnx

from dppo_jax.models import hf
from dppo_jax.models import layers

SANDWICH_NORMS = {
    'norm_attention/scale': 'input_layernorm.weight',
    'norm_attention_out/scale': 'post_attention_layernorm.weight',
    'norm_mlp/scale': 'pre_feedforward_layernorm.weight',
    'norm_mlp_out/scale': 'post_feedforward_layernorm.weight',
}
HF_LAYER_NAMES = hf.ATTENTION | hf.GATED_MLP | SANDWICH_NORMS


class Block(layers.SandwichBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(config, rngs=rngs),
        mlp=layers.GatedMLP(config, rngs=rngs),
    )


def shared_fields(hf_config: Any) -> dict[str, Any]:
  """What Gemma 2 and 3 read in the same way; refuses what is not built."""
  hf.refuse_unless(
      hf_config, attention_bias=False, use_bidirectional_attention=False
  )
  names = (
      'query_pre_attn_scalar',
      'attn_logit_softcapping',
      'final_logit_softcapping',
  )
  return {
      **hf.sizes(hf_config),
      **hf.activation(hf_config, 'hidden_activation'),
      **hf.listed_windows(hf_config),
      **{name: getattr(hf_config, name) for name in names},
      'embedding_multiplier': hf_config.hidden_size**0.5,
  }


def shared_hf_fields(config: layers.ModelConfig) -> dict[str, Any]:
  """What `shared_fields` reads."""
  return {
      'hidden_activation': config.hidden_act,
      'sliding_window': config.sliding_window,
      'layer_types': list(config.layer_types),
      'query_pre_attn_scalar': config.query_pre_attn_scalar,
      'attn_logit_softcapping': config.attn_logit_softcapping,
      'final_logit_softcapping': config.final_logit_softcapping,
  }


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `Gemma2Config`; refuses what is not built."""
  return layers.ModelConfig(
      **shared_fields(hf_config), **hf.rope_fields(hf_config.rope_parameters)
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `Gemma2Config` of these sizes."""
  return hf.make_config(
      'Gemma2Config',
      config,
      architectures=['Gemma2ForCausalLM'],
      **shared_hf_fields(config),
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
