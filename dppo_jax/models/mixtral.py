"""Mixtral (arXiv:2401.04088): Mistral with experts in every layer."""

from typing import Any

from flax import nnx

from dppo_jax.models import experts
from dppo_jax.models import hf
from dppo_jax.models import layers

HF_LAYER_NAMES = hf.ATTENTION | hf.PRE_NORMS | {
    'mlp/router/kernel': 'block_sparse_moe.gate.weight',
    'mlp/experts/gate/kernel': 'block_sparse_moe.experts.{}.w1.weight',
    'mlp/experts/up/kernel': 'block_sparse_moe.experts.{}.w3.weight',
    'mlp/experts/down/kernel': 'block_sparse_moe.experts.{}.w2.weight',
}


class Block(experts.ExpertBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(config, rngs=rngs),
        mlp=experts.MixtureOfExperts(config, rngs=rngs),
    )


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `MixtralConfig`; refuses what is not built."""
  hf.refuse_unless(hf_config, router_jitter_noise=0)
  return layers.ModelConfig(
      **hf.sizes(hf_config),
      **hf.activation(hf_config),
      **hf.rope_fields(hf_config.rope_parameters),
      **hf.one_window(hf_config),
      num_experts=hf_config.num_local_experts,
      num_experts_per_tok=hf_config.num_experts_per_tok,
      moe_intermediate_size=hf_config.intermediate_size,
      norm_topk_prob=True,
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `MixtralConfig` of these sizes."""
  return hf.make_config(
      'MixtralConfig',
      config,
      architectures=['MixtralForCausalLM'],
      hidden_act=config.hidden_act,
      sliding_window=config.sliding_window,
      num_local_experts=config.num_experts,
      num_experts_per_tok=config.num_experts_per_tok,
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
