"""Qwen2 and 2.5 (arXiv:2407.10671, arXiv:2412.15115): biased q, k and v."""

from typing import Any

from flax import nnx

from dppo_jax.models import hf
from dppo_jax.models import layers

HF_LAYER_NAMES = hf.ATTENTION | hf.QKV_BIAS | hf.GATED_MLP | hf.PRE_NORMS


class Block(layers.PreNormBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(
            config, qkv_bias=True, rngs=rngs
        ),
        mlp=layers.GatedMLP(config, rngs=rngs),
    )


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `Qwen2Config`; refuses what is not built."""
  return layers.ModelConfig(
      **hf.sizes(hf_config),
      **hf.activation(hf_config),
      **hf.rope_fields(hf_config.rope_parameters),
      **hf.listed_windows(hf_config),
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `Qwen2Config` of these sizes."""
  return hf.make_config(
      'Qwen2Config',
      config,
      architectures=['Qwen2ForCausalLM'],
      hidden_act=config.hidden_act,
      use_sliding_window=config.sliding_window is not None,
      sliding_window=config.sliding_window,
      layer_types=list(config.layer_types) or None,
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
