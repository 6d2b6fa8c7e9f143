"""Qwen3 (arXiv:2505.09388): grouped queries, normalised queries and keys."""

from typing import Any

from flax import nnx

from dppo_jax.models import hf
from dppo_jax.models import layers

HF_LAYER_NAMES = hf.ATTENTION | hf.QK_NORM | hf.GATED_MLP | hf.PRE_NORMS


class Block(layers.PreNormBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(
            config, qk_norm=layers.RMSNorm, rngs=rngs
        ),
        mlp=layers.GatedMLP(config, rngs=rngs),
    )


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `Qwen3Config`; refuses what is not built."""
  hf.refuse_unless(hf_config, attention_bias=False)
  return layers.ModelConfig(
      **hf.sizes(hf_config),
      **hf.activation(hf_config),
      **hf.rope_fields(hf_config.rope_parameters),
      **hf.listed_windows(hf_config),
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `Qwen3Config` of these sizes."""
  return hf.make_config(
      'Qwen3Config',
      config,
      architectures=['Qwen3ForCausalLM'],
      hidden_act=config.hidden_act,
      use_sliding_window=config.sliding_window is not None,
      sliding_window=config.sliding_window,
      layer_types=list(config.layer_types) or None,
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
