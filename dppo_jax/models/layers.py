"""The parts that model families are made of, and attention.

B sequences, T tokens, D width, H query heads, K key and value heads, E width of
a head. A family is a thin `Block` over these parts (see qwen3.py).
"""

from collections.abc import Callable
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

# attend(q [B, T, H, E], k [B, T, K, E], v [B, T, K, E])
#   -> (out [B, T, H, E], whatever should be kept, usually keys and values).
AttendFn = Callable[
    [jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]
]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of a causal language model. Names follow Hugging Face's configs."""

  model_type: str
  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  rope_theta: float
  rms_norm_eps: float
  tie_word_embeddings: bool
  max_position_embeddings: int


class Linear(nnx.Module):
  """x @ kernel, in the dtype of x."""

  def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
    scale = inputs**-0.5
    kernel = scale * jax.random.normal(rngs.params(), (inputs, outputs))
    self.kernel = nnx.Param(kernel)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x @ self.kernel[...].astype(x.dtype)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, computed in float32 (arXiv:1910.07467)."""

  def __init__(self, size: int, *, epsilon: float):
    self.scale = nnx.Param(jnp.ones(size))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(mean_square + self.epsilon)
    scale = self.scale[...].astype(x.dtype)
    return wide.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


class GatedMLP(nnx.Module):
  """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    size, inner = config.hidden_size, config.intermediate_size
    self.gate = Linear(size, inner, rngs=rngs)
    self.up = Linear(size, inner, rngs=rngs)
    self.down = Linear(inner, size, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GroupedQueryAttention(nnx.Module):
  """Attention whose H query heads share K key and value heads.

  Args:
    qk_norm: normalise queries and keys per head before the rotation.
  """

  def __init__(self, config: ModelConfig, *, qk_norm: bool, rngs: nnx.Rngs):
    self.head_dim = config.head_dim
    size = config.hidden_size
    queries = config.num_attention_heads * self.head_dim
    keys = config.num_key_value_heads * self.head_dim
    self.q = Linear(size, queries, rngs=rngs)
    self.k = Linear(size, keys, rngs=rngs)
    self.v = Linear(size, keys, rngs=rngs)
    self.o = Linear(queries, size, rngs=rngs)
    if qk_norm:
      self.q_norm = RMSNorm(self.head_dim, epsilon=config.rms_norm_eps)
      self.k_norm = RMSNorm(self.head_dim, epsilon=config.rms_norm_eps)
    self.qk_norm = qk_norm

  def __call__(
      self, x: jax.Array, *, rotation: tuple[jax.Array, jax.Array],
      attend: AttendFn
  ) -> tuple[jax.Array, Any]:
    heads = (*x.shape[:-1], -1, self.head_dim)
    q = self.q(x).reshape(heads)  # [B, T, H, E]
    k = self.k(x).reshape(heads)  # [B, T, K, E]
    v = self.v(x).reshape(heads)
    if self.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    out, kept = attend(rotate(q, rotation), rotate(k, rotation), v)
    return self.o(out.reshape(*x.shape[:-1], -1)), kept


def rope(
    positions: jax.Array, *, head_dim: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines of rotary embeddings (arXiv:2104.09864).

  Args:
    positions: [B, T] int32.
    head_dim: E.
    theta: base of the geometric series of wavelengths.

  Returns:
    two [B, T, 1, E / 2] float32.
  """
  exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequencies = theta**-exponents  # [E / 2]
  angles = positions.astype(jnp.float32)[..., None, None] * frequencies.reshape(
      1, 1, 1, -1
  )
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: jax.Array, rotation: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Rotates the halves of each head against each other. [B, T, H, E]."""
  cos, sin = rotation
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attend_within_segments(segment_ids: jax.Array) -> AttendFn:
  """Causal attention in which a token sees its own segment only.

  Args:
    segment_ids: [B, T] int32. Padding is segment 0 and sees itself, which
      keeps its rows finite; nothing else sees it.
  """
  length = segment_ids.shape[1]
  causal = jnp.tril(jnp.ones((1, length, length), bool))
  same = segment_ids[:, :, None] == segment_ids[:, None, :]
  mask = (causal & same)[:, None]  # [B, 1, T, T]

  def attend(q, k, v):
    out = jax.nn.dot_product_attention(q, k, v, mask=mask)
    return out, (k, v)

  return attend


def attend_to_cache(
    *,
    prompt: tuple[jax.Array, jax.Array],
    prompt_mask: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    index: jax.Array,
) -> AttendFn:
  """Attention of one new token to its prompt and its own completion.

  The prompt's keys and values exist once per prompt and are shared by its G
  completions; B = N * G.

  Args:
    prompt: keys and values [N, P, K, E].
    prompt_mask: [N, P] bool.
    cache: keys and values [B, C, K, E] of the completions so far.
    index: [] int32, where in the completion the new token stands.
  """
  num_prompts = prompt_mask.shape[0]

  def attend(q, k, v):  # [B, 1, H or K, E]
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(old, new, index, axis=1)
        for old, new in zip(cache, (k, v), strict=True)
    )
    batch, _, heads, size = q.shape
    num_keys = k.shape[2]
    # [N, G, K, queries of a key, E]
    q = q.reshape(num_prompts, -1, num_keys, heads // num_keys, size)
    own_shape = (num_prompts, q.shape[1], *keys.shape[1:])
    own_keys, own_values = keys.reshape(own_shape), values.reshape(own_shape)
    scores_prompt = jnp.einsum('ngkhe,npke->ngkhp', q, prompt[0])
    scores_own = jnp.einsum('ngkhe,ngcke->ngkhc', q, own_keys)
    written = jnp.arange(keys.shape[1]) <= index
    masks = (prompt_mask[:, None, None, None, :],
             written[None, None, None, None, :])
    scores = [
        jnp.where(mask, score.astype(jnp.float32) * size**-0.5, -jnp.inf)
        for mask, score in zip(masks, (scores_prompt, scores_own), strict=True)
    ]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    weights = weights.astype(q.dtype)
    split = prompt_mask.shape[1]
    out = jnp.einsum('ngkhp,npke->ngkhe', weights[..., :split], prompt[1])
    out += jnp.einsum('ngkhc,ngcke->ngkhe', weights[..., split:], own_values)
    return out.reshape(batch, 1, heads, size), (keys, values)

  return attend
