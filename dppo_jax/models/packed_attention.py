"""Attention among the tokens of packed rows, of what each stretch can see.

A packed row holds several groups one after the other, and a token sees its own
prompt and its own sequence: most of what stands before it is of others. Here a
row is cut into stretches. At once, all stretches attend to themselves, to what
stands right before them, and to as much of what they see as stands farthest
away, where the prompt of their first tokens is. Those that see something in
between walk there backwards, and how far that is, the program finds out as it
runs. The weights of a softmax are computed again in the backward pass, so that
no array of all pairs is made or kept (arXiv:2205.14135); with what attention
brought while sampling, there is no forward pass at all.

B rows, T slots of a row in N stretches of n, W keys at a time; H query heads,
K key and value heads, E width of a head.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax.models import attention
from dppo_jax.models import products
from dppo_jax.types import PyTree

# Scope of the walks, whose length no program knows.
WALK = 'walk'


class Sizes(NamedTuple):
  """How a row is cut."""

  queries: int = 64  # n, slots of a stretch.
  behind: int = 1  # Stretches before its own that it attends to at once.
  far: int = 32  # Slots, from the first that it sees.

  @property
  def near(self) -> int:
    """Slots of a stretch and of those before it, and of a step of a walk."""
    return self.queries * (1 + self.behind)


def sizes_for(*, prompt_length: int, completion_length: int) -> Sizes:
  """Of rows that hold such groups: what most stretches see, and little more.

  Ours; `benchmarks/attention.py` compares some where completions are short.
  """
  queries = min(max(64, _up_to(completion_length, 32)), 256)
  return Sizes(queries, 1, min(_up_to(prompt_length - 1, 32), 256))


def pays(length: int, sizes: Sizes) -> bool:
  """Whether a stretch of a row of so many slots meets less than all of it."""
  return length > sizes.near + sizes.far


def _up_to(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


class Sight(NamedTuple):
  """What layers of a window have to know of N stretches."""

  far: jax.Array  # [B, N] int32, the first of the farthest slots.
  walks: jax.Array  # [B, N] int32, steps between these and the nearest.
  window: jax.Array | None  # [] int32, see `LayerKind`; None for none.


class _Row(NamedTuple):
  """Rows, of a length that can be cut, and how to attend to them."""

  where: attention.Where  # [B, T]
  far: jax.Array  # [N, B] int32, see `Sight`.
  walks: jax.Array  # [N] int32, of the row that walks farthest.
  window: jax.Array | None  # [] int32, see `LayerKind`; None for none.


class _Parts(NamedTuple):
  """Who asks in one stretch, or in all with N in front."""

  index: jax.Array  # [] int32
  queries: jax.Array  # [B, K, H / K, n, E]
  where: attention.Where  # [B, n], of the queries.


class _Keys(NamedTuple):
  """W keys and values, of one step of a stretch or of all stretches."""

  cache: attention.Cache
  where: attention.Where  # [B, W]
  places: jax.Array  # [B, W] int32, slots of the row.


class _Softmax(NamedTuple):
  """What is known of a stretch before all of its keys were met."""

  largest: jax.Array  # [B, K, H / K, n, 1] float32, as all of these.
  total: jax.Array
  out: jax.Array  # [..., E], not yet divided by the total.


class _Kept(NamedTuple):
  """What the backward pass needs, N in front."""

  queries: jax.Array  # [B, K, H / K, n, E]
  out: jax.Array  # [B, K, H / K, n, E] float32
  log_sum: jax.Array  # [B, K, H / K, n, 1] float32


def in_stretches(
    sizes: Sizes = Sizes(), share: attention.ShareFn = attention.alone
) -> attention.RowAttention:
  """Attention of packed rows without a kernel, see `attention.in_xla`.

  It is right for all rows, and saves nothing where a row is one sequence. What
  a tape holds of attention is not computed again. Short rows are attended to as
  a whole, see `pays`.

  Args:
    sizes: of a cut.
    share: see `attention.ShareFn`. Rows are taken apart by number, for
      which XLA would bring all of them to every device.
  """

  def attention_of(where, windows: Sequence[int | None], **scores):
    length = where.segment_ids.shape[1]
    if not pays(length, sizes):
      return attention.in_xla()(where, windows, **scores)
    cut = _cut(length, sizes)
    whole = attention.fill_up(where, cut.queries)
    sights = [_look(whole, x, cut) for x in attention.limits_of(windows)]

    def of_rows(asking, k, v, rows, window):
      (q, made), (where, far, walks) = asking, rows
      row = _Row(where, far.T, jnp.max(walks, axis=0), window)
      return _attend(tuple(scores.items()), cut, q, k, v, row, made)

    def attend_with(sight):
      def attend(q, k, v, tape=products.no_tape):
        made = tape.attended if tape.attended is not None else ()
        *asking, keys, values = attention.fill_up((q, made, k, v), cut.queries)
        out = share(of_rows)(
            tuple(asking), keys, values, (whole, sight.far, sight.walks),
            sight.window,
        )
        return out[:, : q.shape[1]], (k, v)

      return attend

    return sights, attend_with

  return attention_of


def _cut(length: int, sizes: Sizes) -> Sizes:
  """Equal stretches, none longer than asked for."""
  count = -(-length // sizes.queries)
  return sizes._replace(queries=-(-length // count))


def _look(where, window, cut) -> Sight:
  """Finds out what each stretch sees that does not stand near it."""
  length = where.segment_ids.shape[1]
  slots = jnp.arange(length)[None]

  def of_stretch(stretch):
    index, queries = stretch
    own = index * cut.queries + jnp.arange(cut.queries)[None]
    near = (index + 1) * cut.queries - cut.near
    seen = attention.sees(
        queries, own, where, attention.slots_of(where), window
    ) & (queries.segment_ids > 0)[..., None]
    seen = jnp.any(seen, axis=1) & (slots < near)  # [B, T]
    far = jnp.minimum(jnp.argmax(seen, axis=-1), length - cut.far)
    between = seen & (slots >= far[:, None] + cut.far)
    first = jnp.min(jnp.where(between, slots, near), axis=-1)
    return far.astype(jnp.int32), -(-(near - first) // cut.near)

  queries = _in_stretches(where, cut)
  count = jnp.arange(len(queries.segment_ids))
  far, steps = _of_all(of_stretch, (count, queries), cut)
  return Sight(far.T, steps.T, window)


def _of_all(fn, stretches: PyTree, cut: Sizes) -> PyTree:
  """`fn` of all stretches, so many of them at once that scores stay small."""
  return jax.lax.map(
      fn, stretches, batch_size=max(attention.LONG_ROW // cut.queries, 1)
  )


def _in_stretches(tree: PyTree, cut: Sizes, axis: int = 1) -> PyTree:
  """T of [..., T, ...] -> [N, ..., n, ...]."""

  def split(x):
    x = x.reshape(*x.shape[:axis], -1, cut.queries, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  return jax.tree.map(split, tree)


def _near(x: jax.Array, cut: Sizes, axis: int) -> jax.Array:
  """Of each stretch, its own slots behind those before it. [N, ..., W, ...].

  In front of a row stand zeros: padding, which only padding sees.
  """
  blocks = _in_stretches(x, cut, axis)
  front = jnp.zeros((cut.behind, *blocks.shape[1:]), x.dtype)
  longer, count = jnp.concatenate([front, blocks]), len(blocks)
  return jnp.concatenate(
      [longer[i : i + count] for i in range(cut.behind + 1)], axis=axis + 1
  )


def _from_near(x: jax.Array, cut: Sizes, axis: int) -> jax.Array:
  """Adds up what `_near` took apart. [N, ..., W, ...] -> [..., T, ...]."""
  terms = jnp.split(x, cut.behind + 1, axis=axis + 1)
  pad = lambda x, ahead: jnp.pad(
      x[ahead:], [(0, ahead)] + [(0, 0)] * (x.ndim - 1)
  )
  blocks = sum(pad(x, cut.behind - i) for i, x in enumerate(terms))
  blocks = jnp.moveaxis(blocks, 0, axis)
  return blocks.reshape(*blocks.shape[:axis], -1, *blocks.shape[axis + 2 :])


def _at_once(cache, row, cut) -> _Keys:
  """What all stretches meet at once, the farthest first; N in front."""
  count, batch = row.far.shape
  near = jnp.arange(count)[:, None, None] * cut.queries + jnp.arange(
      -cut.behind * cut.queries, cut.queries
  )[None, None]
  far = row.far[..., None] + jnp.arange(cut.far)[None, None]

  def of_row(where_from):
    number, start = where_from
    at = lambda axis: lambda x: _slice(x, number, start, cut.far, axis)
    return (
        at(3)(cache.keys), at(2)(cache.values),
        jax.tree.map(at(1), row.where),
    )

  keys, values, where = jax.tree.map(
      lambda x: x.reshape(count, batch, *x.shape[2:]),
      jax.lax.map(of_row, _rows_of_stretches(row)),
  )
  # What is near already is met there.
  where = where._replace(
      segment_ids=jnp.where(far >= near[..., :1], -1, where.segment_ids)
  )
  with_near = lambda x, y, axis: jnp.concatenate(
      [x, _near(y, cut, axis)], axis=axis + 1
  )
  return _Keys(
      attention.Cache(
          with_near(keys, cache.keys, 3), with_near(values, cache.values, 2)
      ),
      jax.tree.map(lambda x, y: with_near(x, y, 1), where, row.where),
      jnp.concatenate(
          [far, jnp.broadcast_to(near, (count, batch, cut.near))], axis=-1
      ),
  )


def _rows_of_stretches(row) -> tuple[jax.Array, jax.Array]:
  """Number of a row, and its farthest slot in a stretch. [N * B] each."""
  count, batch = row.far.shape
  return jnp.tile(jnp.arange(batch), count), row.far.ravel()


def _slice(x, number, start, size, axis):
  """Some slots of a row: [B, ..., T, ...] -> [1, ..., size, ...]."""
  row = jax.lax.dynamic_slice_in_dim(x, number, 1, 0)
  return jax.lax.dynamic_slice_in_dim(row, start, size, axis)


def _from_at_once(x, row, cut):
  """Gradients [N, B, K, E, W] added up to [B, K, E, T]."""
  far, near = jnp.split(x, [cut.far], axis=-1)
  numbers, starts = _rows_of_stretches(row)
  far = far.reshape(len(numbers), 1, *far.shape[2:])

  def add(index, sums):
    return _add_at(sums, far[index], starts[index], numbers[index])

  return jax.lax.fori_loop(0, len(far), add, _from_near(near, cut, 3))


def _add_at(sums, terms, start, number=0):
  """Adds [b, K, E, W] to [B, K, E, T], from a slot and a row on."""
  place = (number, 0, 0, start)
  terms += jax.lax.dynamic_slice(sums, place, terms.shape)
  return jax.lax.dynamic_update_slice(sums, terms, place)


def _keys_of_step(cache, row, index, step, cut) -> tuple[_Keys, jax.Array]:
  """What a stretch meets in a step of its walk, 1 the first; their start."""
  end = (index + 1) * cut.queries - step * cut.near
  # The first slots of a row may stand in two steps, and count in one.
  start = jnp.maximum(end - cut.near, 0)
  at = lambda axis: lambda x: jax.lax.dynamic_slice_in_dim(
      x, start, cut.near, axis
  )
  places = (start + jnp.arange(cut.near))[None]
  far_end = row.far[index][:, None] + cut.far
  new = (places < end) & (places >= far_end)
  where = jax.tree.map(at(1), row.where)
  return _Keys(
      attention.Cache(at(3)(cache.keys), at(2)(cache.values)),
      where._replace(segment_ids=jnp.where(new, where.segment_ids, -1)),
      places,
  ), start


def _parts(queries, row, cut) -> _Parts:
  return _Parts(
      jnp.arange(len(queries)), queries, _in_stretches(row.where, cut)
  )


def _scores(parts: _Parts, keys: _Keys, window, *, scale, cap):
  """[B, K, H / K, n, W], what of it is visible, and with the rest hidden."""
  length = parts.queries.shape[-2]
  own = parts.index * length + jnp.arange(length)[None]
  visible = attention.sees(
      parts.where, own, keys.where, keys.places, window
  )[:, None, None]
  scores = attention.product(
      'bkhte,bkes->bkhts', parts.queries, keys.cache.keys
  )
  scores = attention.softcap(scores * scale, cap)
  return scores, visible, attention.hide(scores, visible)


def _walk(row: _Row, body, carry):
  """Runs body(index, step, carry) for every step of every stretch's walk."""
  walks = row.walks
  ends = jnp.cumsum(walks)

  def step(number, carry):
    index = jnp.sum(ends <= number)
    return body(index, number - (ends - walks)[index] + 1, carry)

  with jax.named_scope(WALK):
    return jax.lax.fori_loop(0, ends[-1], step, carry)


def _at(tree: PyTree, index: jax.Array) -> PyTree:
  """Of all stretches, one."""
  return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), tree
  )


def _put(tree: PyTree, values: PyTree, index: jax.Array) -> PyTree:
  """All stretches with another one."""
  return jax.tree.map(
      lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0),
      tree, values,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(options, cut, q, k, v, row, made):
  """[B, T, H, E] of q among k and v [B, T, K, E], `made` before or not."""
  return _attend_forward(options, cut, q, k, v, row, made)[0]


def _attend_forward(options, cut, q, k, v, row, made):
  parts = _parts(_heads_first(q, k.shape[2], cut), row, cut)
  cache = attention.cache_of(k, v)
  if made:
    first = lambda x: _heads_first(x, k.shape[2], cut).astype(jnp.float32)
    kept = _Kept(
        parts.queries, first(made.out), first(made.log_sum[..., None])
    )
    return made.out.astype(q.dtype), (kept, cache, row)
  options, window = dict(options), row.window

  def meet(parts, keys):
    _, _, scores = _scores(parts, keys, window, **options)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    out = attention.product(
        'bkhts,bkse->bkhte', weights.astype(q.dtype), keys.cache.values
    )
    return _Softmax(largest, jnp.sum(weights, axis=-1, keepdims=True), out)

  def meet_more(index, step, softmax):
    keys, _ = _keys_of_step(cache, row, index, step, cut)
    before, new = _at(softmax, index), meet(_at(parts, index), keys)
    return _put(softmax, _merged(before, new), index)

  met = _of_all(lambda x: meet(*x), (parts, _at_once(cache, row, cut)), cut)
  largest, total, out = _walk(row, meet_more, met)
  out /= total
  kept = _Kept(parts.queries, out, largest + jnp.log(total))
  return _heads_last(out).astype(q.dtype), (kept, cache, row)


def _merged(one: _Softmax, other: _Softmax) -> _Softmax:
  """The softmax over the keys of both."""
  largest = jnp.maximum(one.largest, other.largest)
  shares = [jnp.exp(x.largest - largest) for x in (one, other)]
  add = lambda x, y: x * shares[0] + y * shares[1]
  return _Softmax(
      largest, add(one.total, other.total), add(one.out, other.out)
  )


def _attend_backward(options, cut, kept, gradient):
  kept, cache, row = kept
  options, dtype = dict(options), kept.queries.dtype
  scale, cap = options['scale'], options['cap']
  parts = _parts(kept.queries, row, cut)
  gradient = _heads_first(gradient, kept.queries.shape[2], cut)
  # What the gradient of a weight loses, as those of a query add up to 1.
  mean = jnp.sum(gradient.astype(jnp.float32) * kept.out, -1, keepdims=True)
  stretches = parts, gradient, mean, kept.log_sum

  def meet(stretch, keys):
    """Gradients of queries, [..., E], and of keys and values, [..., E, W]."""
    parts, gradient, mean, log_sum = stretch
    capped, visible, _ = _scores(parts, keys, row.window, **options)
    # Of padding, a tape may hold any sum: no weight is more than 1.
    weights = jnp.exp(jnp.minimum(capped - log_sum, 0.0))
    weights = jnp.where(visible, weights, 0.0)
    of_scores = weights * scale * (attention.product(
        'bkhte,bkse->bkhts', gradient, keys.cache.values
    ) - mean)
    if cap is not None:
      of_scores *= 1 - jnp.square(capped / cap)
    of_scores = of_scores.astype(dtype)
    # The small factor is turned, not that of all pairs.
    turned = lambda x, of_pairs: attention.product(
        'bkhte,bkhts->bkes', x, of_pairs
    )
    return (
        attention.product('bkhts,bkes->bkhte', of_scores, keys.cache.keys),
        turned(parts.queries, of_scores),
        turned(gradient, weights.astype(dtype)),
    )

  def meet_more(index, step, sums):
    keys, start = _keys_of_step(cache, row, index, step, cut)
    of_queries, *terms = meet(_at(stretches, index), keys)
    return (
        _put(sums[0], _at(sums[0], index) + of_queries, index),
        *(_add_at(x, y, start) for x, y in zip(sums[1:], terms, strict=True)),
    )

  of_queries, *of_keys = _of_all(
      lambda x: meet(*x), (stretches, _at_once(cache, row, cut)), cut
  )
  of_keys = (_from_at_once(x, row, cut) for x in of_keys)
  of_queries, *of_keys = _walk(row, meet_more, (of_queries, *of_keys))
  rows = lambda x: jnp.moveaxis(x, 3, 1).astype(dtype)  # [B, T, K, E]
  return (
      _heads_last(of_queries).astype(dtype), *map(rows, of_keys), None, None
  )


_attend.defvjp(_attend_forward, _attend_backward)


def _heads_first(q, num_keys, cut):
  """[B, T, H, E] -> [N, B, K, H / K, n, E]."""
  q = _in_stretches(q, cut)
  q = q.reshape(*q.shape[:3], num_keys, -1, q.shape[-1])
  return jnp.moveaxis(q, 2, 4)


def _heads_last(x):
  """[N, B, K, H / K, n, E] -> [B, T, H, E]."""
  x = jnp.moveaxis(x, (1, 0, 4), (0, 1, 2))  # [B, N, n, K, H / K, E]
  return x.reshape(len(x), -1, x.shape[3] * x.shape[4], x.shape[5])
