"""Functions of tokens of which they make too much to do all of them at once.

A head makes V logits of a token. So it is run over a chunk of tokens at a time,
and whatever needs logits is done with them there; only over tokens that were
sampled, however they are spread. A gradient needs the logits again. Where it is
that of a sum over tokens, it is made while they are there (`summed`); where it
depends on what was made of other tokens, a second time (`mapped`).

n tokens, c in a chunk, k chunks at most.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import loops
from dppo_jax.types import PyTree

# `jax.named_scope` of the loops over chunks.
CHUNKS = 'chunks'

_is_none = lambda x: x is None


class _Chunks(NamedTuple):
  """Where the tokens are that were sampled."""

  tokens: jax.Array  # [k, c] int32, their index; n where there is none.
  count: jax.Array  # [] int32, chunks that hold any.
  places: jax.Array  # [n] int32 in [k * c]; k * c if it was not sampled.

  @classmethod
  def of(cls, mask: jax.Array, chunk_size: int) -> '_Chunks':
    num_chunks = -(-mask.size // chunk_size)
    end = num_chunks * chunk_size
    [tokens] = jnp.nonzero(mask, size=end, fill_value=mask.size)
    before = jnp.cumsum(mask, dtype=jnp.int32)
    return cls(
        tokens=tokens.reshape(num_chunks, chunk_size),
        count=-(-before[-1] // chunk_size),
        places=jnp.where(mask, before - 1, end),
    )

  def take(self, index: jax.Array, tree: PyTree) -> PyTree:
    """Those of a chunk. [n, ...] -> [c, ...], 0 where there is none."""
    return _pick(tree, self.tokens[index])

  def put_back(self, tree: PyTree) -> PyTree:
    """[k, c, ...] -> [n, ...], 0 where a token was not sampled."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return _pick(jax.tree.map(flat, tree), self.places)

  def over(self, fn: Callable, zeros: PyTree) -> tuple[PyTree, PyTree]:
    """Sums of `fn(index)`, and its arrays of [c, ...] as [n, ...]."""
    with jax.named_scope(CHUNKS):
      sums, out = loops.over_first(fn, self.count, len(self.tokens), zeros)
    return sums, self.put_back(out)


def mapped(
    fn: Callable[..., PyTree], chunk_size: int = 0
) -> Callable[..., PyTree]:
  """`fn` of each token; 0 for those that were not sampled, if in chunks.

  Args:
    fn: `fn(heads, hidden [c, D], *trees of [c, ...])` of some tokens, a pytree
      of float32 [c, ...] that says of each what depends on it alone.
    chunk_size: c; 0 for all n at once.

  Returns:
    `run(heads, mask [n] bool, hidden [n, D], trees of [n, ...])`, a pytree of
    [n, ...]. Its gradient is by heads and hidden, of those that have one; in
    chunks it runs `fn` once more.
  """
  if not chunk_size:
    return lambda heads, mask, hidden, trees: fn(heads, hidden, *_fixed(trees))

  def of_all(heads, mask, hidden, trees):
    chunks = _Chunks.of(mask, chunk_size)

    def of_chunk(index):
      hidden_part, trees_part = chunks.take(index, (hidden, trees))
      return (), fn(heads, hidden_part, *trees_part)

    return chunks.over(of_chunk, ())[1]

  def forward(heads, mask, hidden, trees):
    moving, fixed = _split((heads, hidden))
    mask, trees = _values((mask, trees))
    heads, hidden = _merge(moving, fixed)
    return of_all(heads, mask, hidden, trees), (moving, fixed, mask, trees)

  def backward(kept, of_out):
    (heads, hidden), fixed, mask, trees = kept
    chunks = _Chunks.of(mask, chunk_size)
    of_out = jax.tree.map(_instantiate, of_out)

    def of_chunk(index):
      moving = heads, chunks.take(index, hidden)
      fixed_part = fixed[0], chunks.take(index, fixed[1])
      trees_part, of_part = chunks.take(index, (trees, of_out))
      _, pullback = jax.vjp(
          lambda moving: fn(*_merge(moving, fixed_part), *trees_part), moving
      )
      [gradients] = pullback(of_part)
      return gradients

    of_heads, of_hidden = chunks.over(of_chunk, _zeros(heads))
    return of_heads, None, of_hidden, None

  run = jax.custom_vjp(of_all)
  run.defvjp(forward, backward, symbolic_zeros=True)
  return lambda heads, mask, hidden, trees: run(
      heads, mask, hidden, _fixed(trees)
  )


def summed(
    fn: Callable[..., tuple[jax.Array, PyTree]], chunk_size: int = 0
) -> Callable[..., tuple[jax.Array, PyTree]]:
  """The sum of a term of each sampled token, whose gradient comes with it.

  Args:
    fn: `fn(heads, hidden [c, D], *trees of [c, ...])` of some tokens, the term
      [c] of each; and beside it a pytree of [c, ...]. Both say of a token what
      depends on it alone, and may be anything where none was sampled.
    chunk_size: c; 0 for all n at once.

  Returns:
    `run(heads, mask [n] bool, hidden [n, D], trees of [n, ...])`, the sum over
    sampled tokens; and a pytree of [n, ...] without a gradient, in chunks 0 for
    those that were not. The sum has a gradient by heads and hidden, of those
    that have one: in chunks it is kept from then on, as large as they are.
  """

  def at_once(heads, mask, hidden, trees):
    terms, out = fn(heads, hidden, *trees)
    return jnp.sum(jnp.where(mask, terms, 0)), out

  def of_all(heads, mask, hidden, trees):
    chunks = _Chunks.of(mask, chunk_size)

    def of_chunk(index):
      return at_once(heads, *chunks.take(index, (mask, hidden, trees)))

    return chunks.over(of_chunk, jnp.float32(0))

  def forward(heads, mask, hidden, trees):
    (heads, hidden), fixed = _split((heads, hidden))
    mask, trees = _values((mask, trees))
    chunks = _Chunks.of(mask, chunk_size)

    def of_chunk(index):
      moving = heads, chunks.take(index, hidden)
      fixed_part = fixed[0], chunks.take(index, fixed[1])
      mask_part, trees_part = chunks.take(index, (mask, trees))

      def sum_of(moving):
        heads, hidden = _merge(moving, fixed_part)
        return at_once(heads, mask_part, hidden, trees_part)

      (total, out), (of_heads, of_hidden) = jax.value_and_grad(
          sum_of, has_aux=True
      )(moving)
      return (total, of_heads), (out, of_hidden)

    (total, of_heads), (out, of_hidden) = chunks.over(
        of_chunk, (jnp.float32(0), _zeros(heads))
    )
    return (total, out), (of_heads, of_hidden)

  def backward(gradients, of_both):
    of_total = _instantiate(of_both[0])
    of_heads, of_hidden = jax.tree.map(
        lambda x: (x * of_total).astype(x.dtype), gradients
    )
    return of_heads, None, of_hidden, None

  in_chunks = jax.custom_vjp(of_all)
  in_chunks.defvjp(forward, backward, symbolic_zeros=True)

  def run(heads, mask, hidden, trees):
    of_tokens = in_chunks if chunk_size else at_once
    total, out = of_tokens(heads, mask, hidden, _fixed(trees))
    return total, _fixed(out)

  return run


def _fixed(tree: PyTree) -> PyTree:
  """Without a gradient."""
  return jax.lax.stop_gradient(tree)


def _pick(tree: PyTree, indices: jax.Array) -> PyTree:
  """At `indices` of the first axis, 0 for one that is beyond."""
  pick = lambda x: jnp.take(x, indices, axis=0, mode='fill', fill_value=0)
  return jax.tree.map(pick, tree)


def _zeros(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def _values(primals: PyTree) -> PyTree:
  return jax.tree.map(lambda x: x.value, primals)


def _split(primals: PyTree) -> tuple[PyTree, PyTree]:
  """What a gradient is asked for, and what is fixed; None in the other one."""
  of = lambda moves: jax.tree.map(
      lambda x: x.value if x.perturbed == moves else None, primals
  )
  return of(True), of(False)


def _merge(moving: PyTree, fixed: PyTree) -> PyTree:
  return jax.tree.map(
      lambda x, y: y if x is None else x, moving, fixed, is_leaf=_is_none
  )


def _instantiate(gradient):
  """Zeros where a gradient is known to be 0."""
  if isinstance(gradient, jax.custom_derivatives.SymbolicZero):
    return jnp.zeros(gradient.shape, gradient.dtype)
  return gradient
