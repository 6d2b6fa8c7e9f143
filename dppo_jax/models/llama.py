"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783): the shared parts."""

from typing import Any

from flax import nnx

from dppo_jax.models import hf
from dppo_jax.models import layers

HF_LAYER_NAMES = hf.ATTENTION | hf.GATED_MLP | hf.PRE_NORMS


class Block(layers.PreNormBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(config, rngs=rngs),
        mlp=layers.GatedMLP(config, rngs=rngs),
    )


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `LlamaConfig`; refuses what is not built."""
  hf.refuse_unless(hf_config, attention_bias=False, mlp_bias=False)
  return layers.ModelConfig(
      **hf.sizes(hf_config),
      **hf.activation(hf_config),
      **hf.rope_fields(hf_config.rope_parameters),
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `LlamaConfig` of these sizes."""
  return hf.make_config(
      'LlamaConfig',
      config,
      architectures=['LlamaForCausalLM'],
      hidden_act=config.hidden_act,
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
