"""Attention of tokens that are decoded, by a kernel that reads what they see.

By XLA a step reads the whole cache, room for tokens to come included. This
kernel, for GPUs, reads for each completion the blocks that hold something
visible, once for all its heads of a key: a softmax is kept running over them
(arXiv:2205.14135). XLA reads a prompt once for its group, where completions
advance together; this reads it for each of them.

It is written in Pallas and compiled by Triton, which JAX has deprecated in
version 0.11 and means to take out.

B completions, G of each prompt, P slots of a prompt, C of the ring; K key and
value heads with R query heads each, E width of a head.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from dppo_jax.models import attention
from dppo_jax.models import products
from dppo_jax.models import quantization

try:
  from jax.experimental.pallas import triton
except ImportError:  # Later versions of JAX; `choose` says so.
  triton = None

# Slots that are read at a time, blocks on their way, and warps. Of a few that
# were tried, the fastest on an H200 for 512 completions of 128 to 1,024 tokens.
BLOCK, STAGES, WARPS = 64, 3, 4
# A product of Triton has so many, and a power of two.
_FEWEST_ROWS = 16


def by_triton(
    share: Callable[..., Any] = lambda attend: attend,
    *,
    interpret: bool = False,
) -> Callable[..., attention.AttendFn]:
  """`attention.attend_to_cache` as a kernel.

  Args:
    share: see `sharding.by_rows_and_heads`, with heads on axis 1.
    interpret: runs anywhere, slowly, for tests.
  """

  def attend_to_cache(*, prompt, cache, visible, scale, cap):
    of_heads = share(functools.partial(
        _of_heads, scale=scale, cap=cap, interpret=interpret
    ))

    def attend(q, k, v, tape=products.no_tape):  # [B, 1, H or K, E]
      kept = attention.insert(cache, k, v, visible.place)
      batch, _, heads, size = q.shape
      by_key = q.reshape(batch, k.shape[2], -1, size)
      out, log_sum = of_heads(
          by_key, prompt, kept, (visible.first, visible.count),
          visible.place.reshape(1),
      )
      out = out.reshape(batch, 1, heads, size)
      tape.attends(products.Attended(out, log_sum.reshape(out.shape[:3])))
      return out, kept

    return attend

  return attend_to_cache


def _of_heads(q, prompt, cache, seen, place, *, scale, cap, interpret):
  """Of q [B, K, R, E], as it, and the log-sum [B, K, R, 1] float32."""
  batch, num_keys, num_rows, size = q.shape
  group_size = batch // prompt.values.shape[0]
  rows = max(_FEWEST_ROWS, pl.next_power_of_2(num_rows))
  of_row = lambda width: pl.BlockSpec(
      (None, None, rows, width), lambda b, k: (b, k, 0, 0)
  )
  of_prompt = lambda shape: pl.BlockSpec(
      (None, None, *shape), lambda b, k: (b // group_size, k, 0, 0)
  )
  of_ring = lambda shape: pl.BlockSpec(
      (None, None, *shape), lambda b, k: (b, k, 0, 0)
  )
  one = pl.BlockSpec((1,), lambda b, k: (b,))
  arrays, specs = [], []
  for kept, spec in ((prompt, of_prompt), (cache, of_ring)):
    for x in _parts(kept):
      slots = pl.cdiv(x.shape[2], BLOCK) * BLOCK
      arrays.append(x)
      specs.append(spec((slots, x.shape[3])))
  return pl.pallas_call(
      functools.partial(
          _kernel,
          num_rows=num_rows,
          lengths=(prompt.values.shape[2], cache.values.shape[2]),
          scale=scale,
          cap=cap,
      ),
      grid=(batch, num_keys),
      in_specs=[
          one, one, pl.BlockSpec((1,), lambda b, k: (0,)), of_row(size), *specs
      ],
      out_specs=[of_row(size), of_row(1)],
      out_shape=[
          jax.ShapeDtypeStruct(q.shape, q.dtype),
          jax.ShapeDtypeStruct((*q.shape[:3], 1), jnp.float32),
      ],
      compiler_params=triton.CompilerParams(
          num_warps=WARPS, num_stages=STAGES
      ),
      interpret=interpret,
      name='attend_to_cache',
  )(*(x.astype(jnp.int32) for x in (*seen, place)), q, *arrays)


def _parts(cache: attention.Cache) -> list[jax.Array]:
  """Keys, values, and what scales them: a row for each slot."""
  # The compiler keeps keys that way, if this is how they are read.
  keys = jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3), cache.keys)
  whole = [
      x if isinstance(x, quantization.Quantized) else (x,)
      for x in (keys, cache.values)
  ]
  return [*whole[0], *whole[1]]


def _kernel(
    first_ref, count_ref, place_ref, q_ref, *refs,
    num_rows, lengths, scale, cap,
):
  """A key head of a completion: what R queries take from prompt and ring."""
  *cached, out_ref, log_sum_ref = refs
  half = len(cached) // 2
  of_prompt, of_ring = cached[:half], cached[half:]
  prompt_length, length = lengths
  first, place = first_ref[0], place_ref[0]
  count = jnp.minimum(count_ref[0], length)
  rows, size = q_ref.shape
  real = (jnp.arange(rows) < num_rows)[:, None]
  q = triton.load(q_ref, mask=real, other=0.0)
  begin, num_blocks = _blocks(place, count, length)

  def age(slots):
    ago = place - slots
    return jnp.where(ago < 0, ago + length, ago)

  over = functools.partial(_over_blocks, q, scale=scale, cap=cap)
  # Not -inf, as the difference of two is not a number.
  lowest = jnp.full((rows, 1), jnp.finfo(jnp.float32).min)
  nothing = jnp.zeros((rows, size)), lowest, jnp.zeros((rows, 1))
  seen = over(
      of_prompt, jax.lax.div(first, BLOCK), pl.cdiv(prompt_length, BLOCK),
      lambda slots: slots >= first, prompt_length, nothing,
  )
  out, largest, sums = over(
      of_ring, begin, begin + num_blocks,
      lambda slots: age(slots) < count, length, seen,
  )
  triton.store(out_ref, (out / sums).astype(out_ref.dtype), mask=real)
  triton.store(log_sum_ref, largest + jnp.log(sums), mask=real)


def _over_blocks(q, refs, begin, end, is_seen, length, before, *, scale, cap):
  """Goes on with a softmax over some blocks; after the last comes the first.

  Args:
    q: [rows, E].
    refs: of `_parts`.
    begin: the first block.
    end: the one after the last, counted on beyond the end of the slots.
    is_seen: of slots.
    length: how many slots there are.
    before: what values weigh [rows, E], the largest score and the sum of
      exponentials [rows, 1] so far.
    scale: of the scores.
    cap: see `attention.softcap`; of the scores.
  """
  half = len(refs) // 2

  def step(index, carry):
    out, largest, sums = carry
    block = jax.lax.rem(index, pl.cdiv(length, BLOCK))
    slots = block * BLOCK + jnp.arange(BLOCK)
    visible, inside = is_seen(slots), None
    if length % BLOCK:  # The last block ends behind the slots.
      inside = (slots < length)[:, None]
      visible &= slots < length
    read = functools.partial(_read, block=block, inside=inside)
    keys, *key_scale = map(read, refs[:half])
    values, *value_scale = map(read, refs[half:])
    scores = triton.dot(q, keys.astype(q.dtype), trans_b=True) * scale
    for x in key_scale:  # Of each slot, where they are quantized.
      scores *= x.reshape(1, BLOCK)
    scores = jnp.where(
        visible[None], attention.softcap(scores, cap), -jnp.inf
    )
    highest = jnp.maximum(largest, jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp(scores - highest)
    share = jnp.exp(largest - highest)
    sums = sums * share + jnp.sum(weights, axis=1, keepdims=True)
    for x in value_scale:
      weights *= x.reshape(1, BLOCK)
    brought = triton.dot(weights.astype(q.dtype), values.astype(q.dtype))
    return out * share + brought, highest, sums

  return jax.lax.fori_loop(begin, end, step, before)


def _blocks(place, count, length):
  """The first block of the ring that holds a visible slot, and how many do.

  They follow each other, from the last block to the first one; none is met
  twice, also if visible slots begin and end in it.
  """
  in_ring = pl.cdiv(length, BLOCK)
  start = place - count + 1
  wraps = start < 0
  begin = jax.lax.div(jnp.where(wraps, start + length, start), BLOCK)
  end = jax.lax.div(place, BLOCK)
  return begin, jnp.where(
      wraps, jnp.minimum(in_ring - begin + end + 1, in_ring), end - begin + 1
  )


def _read(ref, *, block, inside):
  """A block of slots, 0 where they are not `inside`."""
  part = ref.at[pl.ds(block * BLOCK, BLOCK), :]
  if inside is None:
    return triton.load(part)
  zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
  return triton.load(
      part, mask=jnp.broadcast_to(inside, part.shape), other=zero
  )
