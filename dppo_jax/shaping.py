"""What happens to rewards before they become advantages.

Of B sequences. Lengths are in sampled tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dppo_jax import registry

register = registry.Registry('shaping')
build = register.build
names = register.names
config = register.config

# (rewards [B], lengths [B]) -> rewards [B]
ShapingFn = Callable[[jax.Array, jax.Array], jax.Array]


@register
def unshaped() -> ShapingFn:
  """Rewards as the verifier gave them."""

  def shaping_fn(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    del lengths
    return rewards

  return shaping_fn


@register
def overlong(
    *, horizon: int, buffer: int = 4, penalty: float = 1.0
) -> ShapingFn:
  """Takes off up to `penalty` over the last `buffer` tokens before the limit.

  Soft overlong punishment, Eq. 13 of arXiv:2503.14476 (there 4,096 tokens of
  20,480 and penalty 1).

  Args:
    horizon: longest completion.
    buffer: tokens over which the penalty grows linearly.
    penalty: at the limit.
  """
  if not 0 < buffer <= horizon:
    raise ValueError(
        f'buffer={buffer} must be at least 1 and at most the longest '
        f'completion, {horizon}.'
    )

  def shaping_fn(rewards: jax.Array, lengths: jax.Array) -> jax.Array:
    share = (lengths - (horizon - buffer)) / buffer
    return rewards - penalty * jnp.clip(share, 0.0, 1.0)

  return shaping_fn
