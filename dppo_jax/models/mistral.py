"""Mistral (arXiv:2310.06825): Llama with a sliding window in every layer."""

from typing import Any

from dppo_jax.models import hf
from dppo_jax.models import layers
from dppo_jax.models import llama

HF_LAYER_NAMES = llama.HF_LAYER_NAMES
Block = llama.Block


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `MistralConfig`; refuses what is not built."""
  # transformers ignores them for this architecture, other readers do not.
  hf.refuse_unless(hf_config, layer_types=None)
  return layers.ModelConfig(
      **hf.sizes(hf_config),
      **hf.activation(hf_config),
      **hf.rope_fields(hf_config.rope_parameters),
      **hf.one_window(hf_config),
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `MistralConfig` of these sizes."""
  return hf.make_config(
      'MistralConfig',
      config,
      architectures=['MistralForCausalLM'],
      hidden_act=config.hidden_act,
      sliding_window=config.sliding_window,
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
