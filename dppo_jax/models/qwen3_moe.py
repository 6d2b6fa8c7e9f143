"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with experts in every layer."""

from typing import Any

from flax import nnx

from dppo_jax.models import experts
from dppo_jax.models import hf
from dppo_jax.models import layers

HF_LAYER_NAMES = hf.ATTENTION | hf.QK_NORM | hf.PRE_NORMS | {
    'mlp/router/kernel': 'mlp.gate.weight',
    'mlp/experts/gate/kernel': 'mlp.experts.{}.gate_proj.weight',
    'mlp/experts/up/kernel': 'mlp.experts.{}.up_proj.weight',
    'mlp/experts/down/kernel': 'mlp.experts.{}.down_proj.weight',
}


class Block(experts.ExpertBlock):
  """One layer."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    super().__init__(
        config,
        attention=layers.GroupedQueryAttention(
            config, qk_norm=layers.RMSNorm, rngs=rngs
        ),
        mlp=experts.MixtureOfExperts(config, rngs=rngs),
    )


def from_hf_config(hf_config: Any) -> layers.ModelConfig:
  """Sizes from a transformers `Qwen3MoeConfig`; refuses what is not built."""
  hf.refuse_unless(
      hf_config, attention_bias=False, decoder_sparse_step=1, mlp_only_layers=()
  )
  return layers.ModelConfig(
      **hf.sizes(hf_config),
      **hf.activation(hf_config),
      **hf.rope_fields(hf_config.rope_parameters),
      **hf.one_window(hf_config),
      num_experts=hf_config.num_experts,
      num_experts_per_tok=hf_config.num_experts_per_tok,
      moe_intermediate_size=hf_config.moe_intermediate_size,
      norm_topk_prob=hf_config.norm_topk_prob,
  )


def to_hf_config(config: layers.ModelConfig) -> Any:
  """The transformers `Qwen3MoeConfig` of these sizes."""
  return hf.make_config(
      'Qwen3MoeConfig',
      config,
      architectures=['Qwen3MoeForCausalLM'],
      hidden_act=config.hidden_act,
      use_sliding_window=config.sliding_window is not None,
      sliding_window=config.sliding_window,
      num_experts=config.num_experts,
      num_experts_per_tok=config.num_experts_per_tok,
      moe_intermediate_size=config.moe_intermediate_size,
      norm_topk_prob=config.norm_topk_prob,
      rope_parameters=hf.rope_parameters(
          config.rope_theta, config.rope_scaling
      ),
  )
