"""What the kernels of a layer make of a token, kept to be used again.

An update of the parameters that sampled begins with the very forward pass that
sampled. A layer hands each of its products to a tape, by name: a `Recorder`
keeps them while sampling, a `Player` gives them back while learning, so that
only the backward pass multiplies by kernels. Attention may hand over what it
brings, too, for one that can go on from it (packed_attention.py). B rows, T
tokens of each, L layers, E entries, one for each token that was read, F
features of a product, H heads.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# By name: [..., F].
Products = dict[str, jax.Array]


class Attended(NamedTuple):
  """What attention brought, and the logarithm of what it divided by."""

  out: jax.Array  # [B, T, H, F / H]
  log_sum: jax.Array  # [B, T, H] float32, of the exponentials of scores.


class Tape:
  """Neither keeps products nor has kept any."""

  # What attention brought before, of the layer that is run; None if anew.
  attended: Attended | None = None

  def __call__(self, name: str, product: jax.Array) -> jax.Array:
    """What the layer goes on with in the place of a product [..., F]."""
    del name
    return product

  def attends(self, attended: Attended) -> None:
    """Hears what attention brings."""


no_tape = Tape()


class Recorder(Tape):
  """Keeps the products of one layer, and what its attention brings."""

  def __init__(self, *, attention: bool = False):
    self.products: Products = {}
    self._attention = attention

  def __call__(self, name: str, product: jax.Array) -> jax.Array:
    self.products[name] = product
    return product

  def attends(self, attended: Attended) -> None:
    if self._attention:
      out, log_sum = attended
      self.products |= {
          'attended': out.reshape(*out.shape[:-2], -1),
          'log_sum': log_sum.astype(jnp.float32),
      }


class Player(Tape):
  """Gives back those of one layer; their gradient is that of new ones."""

  def __init__(self, products: Products):
    self.products = products
    if 'attended' in products:
      out, log_sum = products['attended'], products['log_sum']
      heads = log_sum.shape[-1]
      self.attended = Attended(
          out.reshape(*out.shape[:-1], heads, -1), log_sum
      )

  def __call__(self, name: str, product: jax.Array) -> jax.Array:
    return _in_place_of(product, self.products[name])


@jax.custom_vjp
def _in_place_of(product, kept):
  """What was kept. Nothing needs the product, so no program computes it."""
  return kept.astype(product.dtype)


def _in_place_of_forward(product, kept):
  # Not by a call of it, behind which a product would look needed.
  return kept.astype(product.dtype), None


def _in_place_of_backward(_, gradient):
  return gradient, None


_in_place_of.defvjp(_in_place_of_forward, _in_place_of_backward)


class Buffer(NamedTuple):
  """Products of all layers, written one step after the other."""

  products: Products  # [L, E, F] each.
  used: Any  # [] int32, the first entries hold something.

  def add(self, products: Products) -> tuple['Buffer', jax.Array]:
    """With those of n more tokens [L, n, F], and their entries [n]."""
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), self.used, axis=1
    )
    count = jax.tree.leaves(products)[0].shape[1]
    return (
        Buffer(jax.tree.map(put, self.products, products), self.used + count),
        self.used + jnp.arange(count),
    )


def begin(over: Products, products: Products) -> tuple[Buffer, jax.Array]:
  """Those of prompts [L, N, P, F], over what was there; entries [N, P]."""
  rows = jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), products)
  buffer, entries = Buffer(over, jnp.int32(0)).add(rows)
  return buffer, entries.reshape(jax.tree.leaves(products)[0].shape[1:3])


class Selection(NamedTuple):
  """Products of tokens that are read again, to be taken layer by layer.

  Of all layers at once, they would be copied for all layers at once.
  """

  products: Products  # [L, E, F] each.
  entries: jax.Array  # [B, T] int32, of the tokens.

  def of(self, layer: jax.Array) -> Products:
    """Those of one layer, [] int32. [B, T, F] each."""

    def take(x):
      rows = x.reshape(-1, x.shape[-1])  # [L * E, F]
      # All are there; a check would select each number.
      return jnp.take(
          rows, layer * x.shape[1] + self.entries, axis=0, mode='clip'
      )

    return jax.tree.map(take, self.products)
