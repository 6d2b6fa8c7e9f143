"""The parts that model families are made of.

B sequences, T tokens, D width, H query heads, K key and value heads, E width of
a head. A family is a thin `Block` over these parts (see llama.py).
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from dppo_jax.models import products
from dppo_jax.models import rope
from dppo_jax.models.attention import AttendFn
from dppo_jax.types import PyTree

ACTIVATIONS = {
    'silu': jax.nn.silu,
    'gelu_pytorch_tanh': functools.partial(jax.nn.gelu, approximate=True),
}
SLIDING, FULL = 'sliding_attention', 'full_attention'


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What layers that share one compiled block may differ in.

  Attributes:
    window: a token sees itself and the `window - 1` before it; None is all.
    rope_theta: base of the rotary embedding.
    rope_scaling: of its frequencies.
  """

  window: int | None
  rope_theta: float
  rope_scaling: rope.Scaling | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes of a causal language model. Names follow Hugging Face's configs.

  What a family does not have keeps its default.

  Attributes:
    layer_types: 'sliding_attention' or 'full_attention' of each layer; all
      full if empty.
    rope_theta: of all layers, or of the full ones if `rope_local_base_freq`
      is set.
    rope_scaling: of the same layers.
    rope_local_base_freq: theta of sliding layers, where it is another.
    hidden_act: a key of `ACTIVATIONS`.
    query_pre_attn_scalar: scores are divided by its root; head_dim if None.
    embedding_multiplier: embeddings are multiplied by it.
    moe_intermediate_size: inner width of one expert.
    norm_topk_prob: the weights of a token's experts add up to 1.
    eos_token_ids: tokens that end what the model says, beside the tokenizer's
      own, for example of a turn.
  """

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
  hidden_act: str = 'silu'
  rope_scaling: rope.Scaling | None = None
  rope_local_base_freq: float | None = None
  sliding_window: int | None = None
  layer_types: tuple[str, ...] = ()
  query_pre_attn_scalar: float | None = None
  attn_logit_softcapping: float | None = None
  final_logit_softcapping: float | None = None
  embedding_multiplier: float = 1.0
  num_experts: int = 0
  num_experts_per_tok: int = 0
  moe_intermediate_size: int = 0
  norm_topk_prob: bool = False
  eos_token_ids: tuple[int, ...] = ()

  @property
  def attention_scale(self) -> float:
    """What scores are multiplied by."""
    return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The different kinds of layers, in the order of `layer_kinds`."""
    full = LayerKind(None, self.rope_theta, self.rope_scaling)
    sliding = dataclasses.replace(full, window=self.sliding_window)
    if self.rope_local_base_freq is not None:
      sliding = LayerKind(self.sliding_window, self.rope_local_base_freq, None)
    known = {FULL: full, SLIDING: sliding}
    return tuple(known[name] for name in self._distinct_layer_types)

  @property
  def layer_kinds(self) -> tuple[int, ...]:
    """Which of `kinds` each layer is."""
    names = self._distinct_layer_types
    types = self.layer_types or (FULL,) * self.num_hidden_layers
    return tuple(names.index(name) for name in types)

  @property
  def _distinct_layer_types(self) -> tuple[str, ...]:
    return tuple(sorted(set(self.layer_types or (FULL,))))


class Linear(nnx.Module):
  """x @ kernel (+ bias), in the dtype of x."""

  def __init__(
      self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs
  ):
    scale = inputs**-0.5
    kernel = scale * jax.random.normal(rngs.params(), (inputs, outputs))
    self.kernel = nnx.Param(kernel)
    self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    out = times(x, self.kernel[...].astype(x.dtype))
    if self.bias is None:
      return out
    return _shifted(out, self.bias[...].astype(x.dtype))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, computed in float32 (arXiv:1910.07467)."""

  def __init__(self, size: int, *, epsilon: float):
    self.scale = nnx.Param(jnp.ones(size))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.scale[...].astype(x.dtype)
    return _scaled(_unit_rms(x, self.epsilon).astype(x.dtype), scale)


class OffsetRMSNorm(nnx.Module):
  """x / rms(x) * (1 + scale), all in float32 (Gemma)."""

  def __init__(self, size: int, *, epsilon: float):
    self.scale = nnx.Param(jnp.zeros(size))
    self.epsilon = epsilon

  def __call__(self, x: jax.Array) -> jax.Array:
    scale = 1 + self.scale[...].astype(jnp.float32)
    wide = _scaled(_unit_rms(x, self.epsilon), scale)
    return wide.astype(x.dtype)


class GatedMLP(nnx.Module):
  """down(act(gate(x)) * up(x)) (arXiv:2002.05202)."""

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    size, inner = config.hidden_size, config.intermediate_size
    self.gate = Linear(size, inner, rngs=rngs)
    self.up = Linear(size, inner, rngs=rngs)
    self.down = Linear(inner, size, rngs=rngs)
    self.activation = ACTIVATIONS[config.hidden_act]

  def __call__(
      self, x: jax.Array, tape: products.Tape = products.no_tape
  ) -> jax.Array:
    if isinstance(self.gate.kernel[...], Turned):
      return self._turned(x, tape)
    # In the backward pass, what is between the products is computed again.
    rest = lambda gate, up: self.down(self.activation(gate) * up)
    rest = jax.checkpoint(rest, prevent_cse=False)
    out = rest(tape('gate', self.gate(x)), tape('up', self.up(x)))
    return tape('down', out)

  def _turned(self, x: jax.Array, tape: products.Tape) -> jax.Array:
    """The same, with a column for each token between the products."""
    gate, up, down = (
        part.kernel[...].kernel.astype(x.dtype)
        for part in (self.gate, self.up, self.down)
    )
    rows = x.reshape(-1, x.shape[-1])
    rows_of = lambda columns: columns.T.reshape(*x.shape[:-1], -1)
    gate, up = columns(gate, rows, axis=1), columns(up, rows, axis=1)
    # What decodes keeps products, and is given none.
    tape('gate', rows_of(gate))
    tape('up', rows_of(up))
    inner = self.activation(gate) * up
    return tape('down', rows_of(columns(down, inner, axis=0)))


class GroupedQueryAttention(nnx.Module):
  """Attention whose H query heads share K key and value heads.

  Args:
    qk_norm: normalises queries and keys per head before the rotation.
    qkv_bias: queries, keys and values have a bias.
  """

  def __init__(
      self,
      config: ModelConfig,
      *,
      qk_norm: type[nnx.Module] | None = None,
      qkv_bias: bool = False,
      rngs: nnx.Rngs,
  ):
    self.head_dim = config.head_dim
    size = config.hidden_size
    queries = config.num_attention_heads * self.head_dim
    keys = config.num_key_value_heads * self.head_dim
    self.q = Linear(size, queries, bias=qkv_bias, rngs=rngs)
    self.k = Linear(size, keys, bias=qkv_bias, rngs=rngs)
    self.v = Linear(size, keys, bias=qkv_bias, rngs=rngs)
    self.o = Linear(queries, size, rngs=rngs)
    self.qk_norm = qk_norm is not None
    if qk_norm is not None:
      self.q_norm = qk_norm(self.head_dim, epsilon=config.rms_norm_eps)
      self.k_norm = qk_norm(self.head_dim, epsilon=config.rms_norm_eps)

  def __call__(
      self, x: jax.Array, *, rotation: tuple[jax.Array, jax.Array],
      attend: AttendFn, tape: products.Tape = products.no_tape
  ) -> tuple[jax.Array, Any]:
    heads = (*x.shape[:-1], -1, self.head_dim)
    q = tape('q', self.q(x)).reshape(heads)  # [B, T, H, E]
    k = tape('k', self.k(x)).reshape(heads)  # [B, T, K, E]
    v = tape('v', self.v(x)).reshape(heads)
    if self.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
    out, kept = attend(q, k, v, tape)
    return tape('o', self.o(out.reshape(*x.shape[:-1], -1))), kept


class PreNormBlock(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)).

  [B, T, D] -> [B, T, D] and what `attend` kept. A family's block is this with
  its own attention and mlp. `Norm` also makes the norm after the last layer.
  """

  Norm = RMSNorm

  def __init__(
      self, config: ModelConfig, *, attention: nnx.Module, mlp: nnx.Module
  ):
    norm = lambda: self.Norm(config.hidden_size, epsilon=config.rms_norm_eps)
    self.norm_attention = norm()
    self.attention = attention
    self.norm_mlp = norm()
    self.mlp = mlp

  def __call__(
      self, x: jax.Array, *, rotation, attend: AttendFn,
      tape: products.Tape = products.no_tape
  ) -> tuple[jax.Array, Any]:
    change, kept = self.attention(
        self.norm_attention(x), rotation=rotation, attend=attend, tape=tape
    )
    x = x + change
    return x + self.mlp(self.norm_mlp(x), tape), kept


class SandwichBlock(nnx.Module):
  """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (Gemma 2)."""

  Norm = OffsetRMSNorm

  def __init__(
      self, config: ModelConfig, *, attention: nnx.Module, mlp: nnx.Module
  ):
    norm = lambda: self.Norm(config.hidden_size, epsilon=config.rms_norm_eps)
    self.norm_attention = norm()
    self.attention = attention
    self.norm_attention_out = norm()
    self.norm_mlp = norm()
    self.mlp = mlp
    self.norm_mlp_out = norm()

  def __call__(
      self, x: jax.Array, *, rotation, attend: AttendFn,
      tape: products.Tape = products.no_tape
  ) -> tuple[jax.Array, Any]:
    change, kept = self.attention(
        self.norm_attention(x), rotation=rotation, attend=attend, tape=tape
    )
    x = x + self.norm_attention_out(change)
    change = self.mlp(self.norm_mlp(x), tape)
    return x + self.norm_mlp_out(change), kept


def times(x: jax.Array, kernel: Any) -> jax.Array:
  """A product whose gradient is the one that it is written as.

  That of `x @ kernel` is a transposed product that is transposed back: XLA's
  CPU then moves the largest factor for it, a sixth of the backward pass.

  Args:
    x: [..., in].
    kernel: [in, out]; or what multiplies itself, as `lora.LowRankSum`.
  """
  return _times(x, kernel) if isinstance(kernel, jax.Array) else x @ kernel


def wide_times(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  """A product of factors of a type that is summed, and stays, in float32.

  So are those of its gradient: that of JAX would take the gradient of the
  product as it comes, in float32, and multiply at that type's lower rate.

  Args:
    x: [..., in].
    kernel: [in, out].
    dtype: of the factors.
  """
  return _wide_times(x, kernel, jnp.dtype(dtype).name)


@jax.custom_vjp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Rows of a table, whose gradient is summed in float32, and rounded once.

  That of JAX adds up in the table's type. In bfloat16 a row stops growing when
  it is 256 times as large as what is added: that of a frequent token soon.

  Args:
    table: [V, D].
    ids: [...] int32.

  Returns:
    [..., D].
  """
  return jnp.take(table, ids, axis=0)


def _lookup_forward(table, ids):
  return lookup(table, ids), (table, ids)  # Of the table, what it is like.


def _lookup_backward(kept, gradient):
  table, ids = kept
  [total] = jax.linear_transpose(
      lambda table: jnp.take(table, ids, axis=0),
      jax.ShapeDtypeStruct(table.shape, jnp.float32),
  )(gradient.astype(jnp.float32))
  return total.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=['kernel'], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Turned:
  """A kernel of a `GatedMLP` or a head that is kept as [out, in], for a CPU.

  There, each product packs its second factor anew. In `kernel @ x.T` that is
  the few rows of a decode step, in `x @ kernel` it would be the kernel.
  """

  kernel: Any

  def __getitem__(self, index: Any) -> 'Turned':
    """What reading a parameter does: `kernel[...]`."""
    if index is not Ellipsis:
      raise TypeError('Only the whole of a Turned can be read.')
    return self


def columns(kernel: jax.Array, of: jax.Array, *, axis: int) -> jax.Array:
  """A column for each token of what a `Turned` kernel makes.

  Args:
    kernel: [out, in].
    of: [tokens, in] or [in, tokens].
    axis: which one of it is `in`.

  Returns:
    [out, tokens], of the factors' type.
  """
  # Or the compiler turns the product round again.
  return jax.lax.optimization_barrier(
      jax.lax.dot_general(kernel, of, (((1,), (axis,)), ((), ())))
  )


def turned(mlp: PyTree) -> PyTree:
  """Parameters of a `GatedMLP` with its kernels [..., in, out] `Turned`."""
  turn = lambda x: jnp.swapaxes(x, -1, -2)
  return {
      name: {'kernel': Turned(jax.tree.map(turn, part['kernel']))}
      for name, part in mlp.items()
  }


@jax.custom_vjp
def _times(x, kernel):
  return x @ kernel


def _times_forward(x, kernel):
  # What the gradient of the other one needs, if that is wanted at all.
  kept = (
      x.value if kernel.perturbed else None,
      kernel.value if x.perturbed else None,
  )
  return x.value @ kernel.value, kept


def _times_backward(kept, gradient):
  x, kernel = kept
  of_x = of_kernel = None
  if kernel is not None:
    of_x = gradient @ kernel.T
  if x is not None:
    every = tuple(range(x.ndim - 1))
    of_kernel = jax.lax.dot_general(x, gradient, ((every, every), ((), ())))
  return of_x, of_kernel


_times.defvjp(_times_forward, _times_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_times(x, kernel, dtype):
  return jnp.matmul(
      x.astype(dtype), kernel.astype(dtype),
      preferred_element_type=jnp.float32,
  )


def _wide_times_forward(x, kernel, dtype):
  # As above. What is left of a factor that is not needed is its type.
  factors = x.value, kernel.value
  needed = kernel.perturbed, x.perturbed
  kept = [
      factor if keep else jnp.zeros(0, factor.dtype)
      for factor, keep in zip(factors, needed, strict=True)
  ]
  return _wide_times(*factors, dtype), kept


def _wide_times_backward(dtype, kept, gradient):
  x, kernel = kept
  gradient = gradient.astype(dtype)
  product = functools.partial(
      jax.lax.dot_general, preferred_element_type=jnp.float32
  )
  of_x = of_kernel = None
  if kernel.size:
    last = ((gradient.ndim - 1,), (1,))
    of_x = product(gradient, kernel.astype(dtype), (last, ((), ())))
    of_x = of_x.astype(x.dtype)
  if x.size:
    every = tuple(range(gradient.ndim - 1))
    both = ((every, every), ((), ()))
    of_kernel = product(x.astype(dtype), gradient, both).astype(kernel.dtype)
  return of_x, of_kernel


_wide_times.defvjp(
    _wide_times_forward, _wide_times_backward, symbolic_zeros=True
)


@jax.custom_vjp
def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
  """[..., D] times [D], whose gradient sums over all tokens at once.

  That of a broadcast sums axis by axis, which takes a CPU longer where the
  leading one is 1.
  """
  return x * _over_last(scale, x)


def _scaled_forward(x, scale):
  kept = x.value if scale.perturbed else None, scale.value
  return _scaled(x.value, scale.value), kept


def _scaled_backward(kept, gradient):
  x, scale = kept
  of_scale = None
  if x is not None:
    of_scale = jnp.sum(gradient * x, axis=tuple(range(x.ndim - 1)))
  return gradient * _over_last(scale, gradient), of_scale


_scaled.defvjp(_scaled_forward, _scaled_backward, symbolic_zeros=True)


@jax.custom_vjp
def _shifted(x: jax.Array, shift: jax.Array) -> jax.Array:
  """[..., D] plus [D], whose gradient is summed in float32.

  That of a broadcast is summed in its own type, see `lookup`.
  """
  return x + _over_last(shift, x)


def _shifted_forward(x, shift):
  return _shifted(x, shift), None


def _shifted_backward(_, gradient):
  # In float32, as all that `jnp.sum` adds up, and rounded once.
  of_shift = jnp.sum(gradient, axis=tuple(range(gradient.ndim - 1)))
  return gradient, of_shift


_shifted.defvjp(_shifted_forward, _shifted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
  """Divides x by its root mean square over the last axis, in float32.

  The sum of its gradient is a product of vectors: with a leading axis of 1, a
  CPU takes ten times as long for that of a broadcast.
  """
  return _unit_rms_forward(x, epsilon)[0]


def _unit_rms_forward(x, epsilon):
  wide = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(mean_square + epsilon)
  return wide * inverse, (x, inverse)


def _unit_rms_backward(epsilon, kept, gradient):
  del epsilon  # It is in what was kept.
  x, inverse = kept
  unit = x.astype(jnp.float32) * inverse
  along = jnp.einsum(
      '...d,...d->...', gradient, unit, precision=jax.lax.Precision.HIGHEST
  ) / x.shape[-1]
  change = (gradient - unit * along[..., None]) * inverse
  return (change.astype(x.dtype),)


_unit_rms.defvjp(_unit_rms_forward, _unit_rms_backward)


def _over_last(vector: jax.Array, like: jax.Array) -> jax.Array:
  """[D] -> [1, ..., D], so that the broadcast is written down."""
  return vector.reshape((1,) * (like.ndim - 1) + (-1,))
