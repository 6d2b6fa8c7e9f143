"""Rotary position embeddings (arXiv:2104.09864) and how they are stretched.

B sequences, T tokens, H heads, E width of a head.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """Positions divided by `factor` (arXiv:2306.15595)."""

  factor: float

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

  def __call__(self, frequencies: jax.Array) -> jax.Array:
    fits = self.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = self.low_freq_factor, self.high_freq_factor
    kept = jnp.clip((fits - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / self.factor


# rope_type of config.json -> its parameters, named as there.
SCALINGS = {'linear': LinearScaling, 'llama3': Llama3Scaling}
Scaling = LinearScaling | Llama3Scaling


def angles(
    positions: jax.Array,
    *,
    head_dim: int,
    theta: float,
    scaling: Scaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of the angles that positions are rotated by.

  Args:
    positions: [B, T] int32.
    head_dim: E.
    theta: base of the geometric series of wavelengths.
    scaling: of the frequencies, for contexts longer than those trained on.

  Returns:
    two [B, T, 1, E / 2] float32.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = theta**-exponents  # [E / 2]
  if scaling is not None:
    frequencies = scaling(frequencies)
  turns = positions.astype(jnp.float32)[..., None, None] * frequencies.reshape(
      1, 1, 1, -1
  )
  return jnp.cos(turns), jnp.sin(turns)


def rotate(
    x: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotates the halves of each head against each other. [B, T, H, E]."""
  cos, sin = rotation
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
