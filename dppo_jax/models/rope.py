"""Rotary position embeddings (arXiv:2104.09864) and how they are stretched.

B sequences, T tokens, H heads, E width of a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dppo_jax.models import platforms


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Positions divided by `factor` (arXiv:2306.15595)."""

  factor: float
  magnitude = 1.0  # Of rotated queries and keys.

  def __call__(self, frequencies: jax.Array) -> jax.Array:
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Long waves stretched by `factor`, short ones kept (Llama 3.1).

  A wave that fits `low_freq_factor` times or less into the original context is
  stretched, one that fits `high_freq_factor` times or more is kept, and those
  in between are interpolated.
  """

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_position_embeddings: int
  magnitude = 1.0

  def __call__(self, frequencies: jax.Array) -> jax.Array:
    fits = self.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = self.low_freq_factor, self.high_freq_factor
    kept = jnp.clip((fits - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (arXiv:2309.00071): `Llama3Scaling` with a ramp over the dimensions.

  A wave that fits `beta_fast` times or more into the original context is kept,
  one that fits `beta_slow` times or less is stretched by `factor`. Queries and
  keys are multiplied by `attention_factor`, 0.1 ln(factor) + 1 if None (Sec.
  3.4), so that attention stays as sharp. `truncate` takes whole dimensions as
  the ends of the ramp.
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  @property
  def magnitude(self) -> float:
    """Of rotated queries and keys."""
    if self.attention_factor is not None:
      return self.attention_factor
    return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

  def __call__(self, frequencies: jax.Array) -> jax.Array:
    last = 2 * len(frequencies) - 1
    # From one wave to the next, log frequency falls by this much; log theta
    # over half of the head's width.
    step = jnp.log(frequencies[0] / frequencies[1])

    def dimension(turns):
      """Of the wave that fits so many times into the original context."""
      context = self.original_max_position_embeddings
      return math.log(context / (turns * 2 * math.pi)) / step

    low, high = dimension(self.beta_fast), dimension(self.beta_slow)
    if self.truncate:
      low, high = jnp.floor(low), jnp.ceil(high)
    low, high = jnp.maximum(low, 0), jnp.minimum(high, last)
    ramp = (jnp.arange(len(frequencies)) - low) / jnp.maximum(high - low, 1e-3)
    stretched = jnp.clip(ramp, 0, 1)
    return frequencies * (1 - stretched + stretched / self.factor)


# rope_type of config.json -> its parameters, named as there.
SCALINGS = {
    'linear': LinearScaling, 'llama3': Llama3Scaling, 'yarn': YarnScaling
}
Scaling = LinearScaling | Llama3Scaling | YarnScaling


def angles(
    positions: jax.Array,
    *,
    head_dim: int,
    theta: float,
    scaling: Scaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the angles that positions are rotated by.

  Times the magnitude that the scaling gives to queries and keys.

  Args:
    positions: [B, T] int32.
    head_dim: E.
    theta: base of the geometric series of wavelengths.
    scaling: of the frequencies, for contexts longer than those trained on.

  Returns:
    two [B, T, 1, E / 2] float32.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies, magnitude = theta**-exponents, 1.0  # [E / 2]
  if scaling is not None:
    frequencies, magnitude = scaling(frequencies), scaling.magnitude
  turns = positions.astype(jnp.float32)[..., None, None] * frequencies.reshape(
      1, 1, 1, -1
  )
  return magnitude * jnp.cos(turns), magnitude * jnp.sin(turns)


def rotate(
    x: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotates the halves of each head against each other. [B, T, H, E]."""
  turn = _by_halves if platforms.current() == 'cpu' else _by_turning
  return turn(x.astype(jnp.float32), *rotation).astype(x.dtype)


def _by_halves(x, cos, sin):
  first, second = jnp.split(x, 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1)


def _by_turning(x, cos, sin):
  """The same, where halves would be written to be put together.

  A GPU then needs a kernel for each and one more; a CPU reads an axis backwards
  element by element.
  """
  halves = x.reshape(*x.shape[:-1], 2, -1)
  of_others = jnp.stack([-sin, sin], axis=-2)
  rotated = halves * cos[..., None, :] + halves[..., ::-1, :] * of_others
  return rotated.reshape(x.shape)
