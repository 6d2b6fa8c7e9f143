"""Mixture of experts: a router sends each token to a few of E gated MLPs.

Dropless: every token reaches all the experts it chose, however many others
chose them too. Tokens are sorted by expert and multiplied group by group
(`jax.lax.ragged_dot`), so there is neither a capacity nor padding, and a
sequence's result does not depend on its batch mates. XLA has a grouped product
for it on TPU; on CPU it multiplies all rows with all experts, which is good for
tests only. M tokens, D width, E experts, k experts of a token, F inner width of
an expert.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from dppo_jax.models import layers


class Router(nnx.Module):
  """The k most likely experts of a token and their weights.

  Softmax over all experts, then top-k (Qwen3-MoE, arXiv:2505.09388); with
  `norm_topk_prob` the k weights are divided by their sum, which equals softmax
  over the k largest logits (Mixtral, arXiv:2401.04088).
  """

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    self.num_chosen = config.num_experts_per_tok
    self.normalize = config.norm_topk_prob
    shape = (config.hidden_size, config.num_experts)
    scale = config.hidden_size**-0.5
    self.kernel = nnx.Param(
        scale * jax.random.normal(rngs.params(), shape)
    )

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[M, D] -> choices [M, k] int32, weights [M, k]."""
    logits = x @ self.kernel[...].astype(x.dtype)  # [M, E]
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, choices = jax.lax.top_k(probs, self.num_chosen)
    if self.normalize:
      weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return choices, weights.astype(x.dtype)


class ExpertLinear(nnx.Module):
  """x @ kernel[expert], rows sorted by expert. [M, inputs] -> [M, outputs]."""

  def __init__(
      self, num_experts: int, inputs: int, outputs: int, *, rngs: nnx.Rngs
  ):
    shape = (num_experts, inputs, outputs)
    scale = inputs**-0.5
    self.kernel = nnx.Param(
        scale * jax.random.normal(rngs.params(), shape)
    )

  def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    kernel = self.kernel[...].astype(x.dtype)
    return jax.lax.ragged_dot(x, kernel, group_sizes)


class Experts(nnx.Module):
  """E gated MLPs; each token's result is the weighted sum over its choices."""

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    count, size = config.num_experts, config.hidden_size
    inner = config.moe_intermediate_size
    self.gate = ExpertLinear(count, size, inner, rngs=rngs)
    self.up = ExpertLinear(count, size, inner, rngs=rngs)
    self.down = ExpertLinear(count, inner, size, rngs=rngs)
    self.activation = layers.ACTIVATIONS[config.hidden_act]
    self.num_experts = count

  def __call__(
      self, x: jax.Array, choices: jax.Array, weights: jax.Array
  ) -> jax.Array:
    """[M, D], [M, k] int32, [M, k] -> [M, D]."""
    num_chosen = choices.shape[1]
    flat = choices.reshape(-1)  # [M * k]
    order = jnp.argsort(flat)  # Stable: ties stay in the order of tokens.
    sizes = jnp.bincount(flat, length=self.num_experts).astype(jnp.int32)
    rows = jnp.take(x, order // num_chosen, axis=0)
    inner = self.activation(self.gate(rows, sizes)) * self.up(rows, sizes)
    out = self.down(inner, sizes)  # [M * k, D], sorted by expert.
    out = jnp.take(out, jnp.argsort(order), axis=0)
    out = out.reshape(*choices.shape, -1)  # [M, k, D]
    return jnp.einsum('mkd,mk->md', out, weights)


class MixtureOfExperts(nnx.Module):
  """A router and its experts, in the place of an MLP. [..., D] -> [..., D].

  `choices` between the two is what a replay of the sampler's routing would
  record there and put in here.
  """

  def __init__(self, config: layers.ModelConfig, *, rngs: nnx.Rngs):
    self.router = Router(config, rngs=rngs)
    self.experts = Experts(config, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1])  # [M, D]
    choices, weights = self.router(flat)
    return self.experts(flat, choices, weights).reshape(x.shape)
