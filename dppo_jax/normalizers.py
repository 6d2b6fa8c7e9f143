"""What a token counts in the loss, as a weight computed once per rollout.

The learner only ever sums `loss * weight`, so mini-batches, micro-batches,
packing and sharding cannot change the loss. The weights of a whole rollout of B
sequences make its loss; the learner scales them so that every mini-batch has
the same expectation.

A mean is over what teaches something: a sequence (or group) of which no token
is masked in, truncated or without spread, is not counted. The public trainers
differ here; dividing by B all the same would shrink the step by the share that
was left out.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax import registry

register = registry.Registry('normalizer')
build = register.build
names = register.names
config = register.config

# (token_mask [B, T]) -> weights [B, T] float32, 0 where the mask is False.
NormalizerFn = Callable[[jax.Array], jax.Array]


def counts_alike(name: str) -> str:
  """'tokens', 'sequences' whatever their length, or '' if it is neither."""
  return register.fact(name, 'counts_alike') or ''


def _count(rows: jax.Array) -> jax.Array:
  """Rows [R, T] with anything in them, 1 at least. [] float32."""
  count = jnp.sum(jnp.any(rows, axis=-1))
  return jnp.maximum(count, 1).astype(jnp.float32)


@register.with_facts(counts_alike='tokens')
def constant(*, horizon: int) -> NormalizerFn:
  """Token sum over a constant horizon, mean over sequences.

  `seq-mean-token-sum-norm` of the DPPO authors' script, with the longest
  allowed completion as horizon. Every token counts the same in every rollout,
  so a long completion is neither favoured nor punished (Dr. GRPO,
  arXiv:2503.20783). The paper does not say which normaliser it uses.
  """

  def normalizer(token_mask: jax.Array) -> jax.Array:
    return token_mask / (_count(token_mask) * float(horizon))

  return normalizer


@register.with_facts(counts_alike='tokens')
def token_mean() -> NormalizerFn:
  """Mean over all sampled tokens of the rollout (DAPO, arXiv:2503.14476)."""

  def normalizer(token_mask: jax.Array) -> jax.Array:
    return token_mask / jnp.maximum(jnp.sum(token_mask), 1).astype(jnp.float32)

  return normalizer


@register.with_facts(counts_alike='sequences')
def sequence_mean() -> NormalizerFn:
  """Mean over the tokens of a sequence, then over sequences (GRPO)."""

  def normalizer(token_mask: jax.Array) -> jax.Array:
    lengths = jnp.sum(token_mask, axis=-1, keepdims=True)
    lengths = jnp.maximum(lengths, 1).astype(jnp.float32)
    return token_mask / (lengths * _count(token_mask))

  return normalizer


@register.with_facts(counts_alike='tokens')
def sequence_sum() -> NormalizerFn:
  """Token sum, then mean over sequences: Eq. 12 of arXiv:2602.04879 as it is.

  `constant` without the division, so its learning rate is another.
  """

  def normalizer(token_mask: jax.Array) -> jax.Array:
    return token_mask / _count(token_mask)

  return normalizer


@register
def prompt_mean(*, group_size: int) -> NormalizerFn:
  """Mean over all tokens of a prompt's completions, then over prompts."""

  def normalizer(token_mask: jax.Array) -> jax.Array:
    batch, length = token_mask.shape
    groups = token_mask.reshape(-1, group_size * length)
    counts = jnp.maximum(jnp.sum(groups, axis=-1, keepdims=True), 1)
    weights = groups / (counts.astype(jnp.float32) * _count(groups))
    return weights.reshape(batch, length)

  return normalizer
