"""The kernel of decoding brings what products with the whole cache bring.

It runs in Pallas' interpreter here: its numbers are tested, its speed is not.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax.models import attention
from dppo_jax.models import decode_kernel

BLOCK = decode_kernel.BLOCK
in_kernel = decode_kernel.by_triton(interpret=True)


def attended(attend_to_cache, *, length, place, counts, window=None, cap=None,
             cache_dtype='float32', dtype='float32', heads=(6, 2), size=16):
  """Of three prompts and two completions of each, [B, H, E]; and log-sums."""
  random = np.random.RandomState(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)
  batch, prompts, (queries, keys) = 6, 3, heads
  cache, prompt = (
      attention.convert_cache(
          attention.cache_of(*(draw(count, n, keys, size) for _ in 'kv')),
          jnp.dtype(cache_dtype),
      ) for count, n in ((batch, length), (prompts, 5))
  )
  mask = jnp.arange(5)[None] >= jnp.asarray([[3], [0], [4]])
  counts = jnp.asarray(counts, jnp.int32)
  visible = attention.visible_in_cache(
      prompt_mask=mask,
      prompt_positions=jnp.cumsum(mask, axis=1) - 1,
      positions=jnp.sum(jnp.repeat(mask, 2, axis=0), axis=1) + counts - 1,
      length=length,
      place=jnp.int32(place),
      count=counts,
      window=window,
  )
  attend = attend_to_cache(
      prompt=prompt, cache=cache, visible=visible, scale=size**-0.5, cap=cap
  )
  out, _ = jax.jit(attend)(
      draw(batch, 1, queries, size), *(draw(batch, 1, keys, size) for _ in 'kv')
  )
  return out


@pytest.mark.parametrize('length', [BLOCK, 3 * BLOCK, 2 * BLOCK + 7, 5])
@pytest.mark.parametrize('place', [0, 4, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_a_kernel_sees_the_ring_that_xla_sees(length, place):
  counts = [1, 2, length // 2, length - 1, length, min(length, place + 2)]
  settings = {'length': length, 'place': place % length, 'counts': counts}
  np.testing.assert_allclose(
      attended(in_kernel, **settings),
      attended(attention.attend_to_cache, **settings), rtol=2e-5, atol=2e-6,
  )
