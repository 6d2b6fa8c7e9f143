"""Weights and caches in fewer bits than what is computed in.

A kernel has a scale for each output, a cached key or value one for each token
and head: value * scale, with the largest value at the end of the range. Arrays
of a floating-point type need no scale; they are cast.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax.types import PyTree

# With a scale; all others are cast.
SCALED = ('int8', 'float8_e4m3fn')
# The projections of a layer. Embedding, head, norms and routers stay as they
# are: they are small, or all tokens pass them.
KERNELS = re.compile(r'layers/.*/(q|k|v|o|gate|up|down)/kernel$')


class Quantized(NamedTuple):
  """An array as values times scale."""

  values: jax.Array  # [..., N], of eight bits.
  scale: jax.Array  # float32, as `values` with one axis of length 1.

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape


def quantize(x: jax.Array, dtype: Any, *, axis: int) -> Quantized:
  """Values that share a scale along `axis`.

  Args:
    x: of any floating-point type.
    dtype: int8, or a float8.
    axis: the scale is the same along it.
  """
  x = x.astype(jnp.float32)
  is_integer = jnp.issubdtype(dtype, jnp.integer)
  limit = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.0) / limit
  values = x / scale
  if is_integer:
    values = jnp.round(values)
  # A float8 has no infinity: what rounds past its end is NaN.
  values = jnp.clip(values, -limit, limit)
  return Quantized(values.astype(dtype), scale)


def convert(x: jax.Array, dtype: Any, *, axis: int) -> jax.Array | Quantized:
  """Quantized where the type needs a scale, cast where it does not."""
  if jnp.dtype(dtype).name in SCALED:
    return quantize(x, dtype, axis=axis)
  return x.astype(dtype)


def zeros(
    shape: tuple[int, ...], dtype: Any, *, axis: int
) -> jax.Array | Quantized:
  """Zeros in the form that `convert` makes, which XLA computes for long."""
  values = jnp.zeros(shape, dtype)
  if jnp.dtype(dtype).name not in SCALED:
    return values
  of_scale = [1 if i == axis else size for i, size in enumerate(shape)]
  return Quantized(values, jnp.ones(of_scale))


def widen(tree: PyTree, dtype: Any) -> PyTree:
  """A tree whose quantized arrays are multiplied out, in `dtype`."""

  def of(x):
    if isinstance(x, Quantized):
      # A small scale would lose its digits in float16.
      return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
    return x

  return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Quantized))


def convert_kernels(params: PyTree, dtype: Any, kernel_dtype: Any) -> PyTree:
  """Parameters in `dtype`, those that `KERNELS` finds in `kernel_dtype`."""

  def of(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if KERNELS.search(name):
      return convert(x, kernel_dtype, axis=-2)
    return x.astype(dtype)

  return jax.tree_util.tree_map_with_path(of, params)


def dtype_of(x: jax.Array | Quantized) -> Any:
  """In which an array is kept."""
  return x.values.dtype if isinstance(x, Quantized) else x.dtype
