"""Gemma 3, text only (arXiv:2503.19786): Gemma 2 with normalised queries and
keys, five sliding layers to a full one, and a rotary base for each.
"""

from typing import Any

from flax import nnx

from dppo_jax.models import gemma2
from dppo_jax.models import hf
from dppo_jax.models import layers

HF_LAYER_NAMES = gemma2.HF_LAYER_NAMES | hf.QK_NORM


class Block(layers.SandwichBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(
            config, qk_norm=layers.OffsetRMSNorm, rngs=rngs
        ),
        mlp=layers.GatedMLP(config, rngs=rngs),
    )


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `Gemma3TextConfig`; refuses what is not built."""
  # transformers has the fields and ignores them.
  hf.refuse_unless(hf_config, attn_logit_softcapping=None)
  if not hf_config.rope_parameters[layers.FULL].get('truncate', True):
    raise ValueError(
        f'truncate=False of rope is not supported for {hf_config.model_type}.'
    )
  local = hf.rope_fields(hf_config.rope_parameters[layers.SLIDING])
  if local['rope_scaling'] is not None:
    raise ValueError(
        'A rope_type of sliding_attention other than default is not supported '
        f'for {hf_config.model_type}.'
    )
  return layers.ModelConfig(
      **gemma2.shared_fields(hf_config),
      **hf.rope_fields(hf_config.rope_parameters[layers.FULL]),
      rope_local_base_freq=local['rope_theta'],
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `Gemma3TextConfig` of these sizes."""
  return hf.make_config(
      'Gemma3TextConfig',
      config,
      architectures=['Gemma3ForCausalLM'],
      **gemma2.shared_hf_fields(config),
      rope_parameters={
          layers.FULL: hf.rope_parameters(
              config.rope_theta, config.rope_scaling
          ),
          layers.SLIDING: hf.rope_parameters(config.rope_local_base_freq),
      },
  )
