"""By which kernel is attended; and those of whole rows, which hold no scores.

On TPU splash attention, which comes with JAX; on NVIDIA's GPUs cuDNN's, behind
`jax.nn.dot_product_attention`. Both see what `attention.in_xla` sees, whose
place they take: a sight for layers of each window, and attention with it.

Neither can be partitioned by XLA, nor has all that a model may ask for:
`choose` says by which one rows are attended, and why not by the others.
B rows, T tokens, H query heads, K key and value heads, E width of a head.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
import jax.numpy as jnp

from dppo_jax.models import attention
from dppo_jax.models import decode_kernel
from dppo_jax.models import layers
from dppo_jax.models import platforms
from dppo_jax.models import products

NAMES = ('auto', 'xla', 'splash', 'cudnn')
# Of tokens that are decoded, see `decode_kernel`.
DECODE_NAMES = ('auto', 'xla', 'triton')

# Queries and keys that splash has on the chip at a time, in its lanes. Ours:
# nothing was measured.
_BLOCK, _LANES = 512, 128
# 'auto' has no kernel for shorter rows, which it would fill up. Ours as well.
SHORT_ROW = 512


class Asked(NamedTuple):
  """What a kernel would have to do."""

  whose: str  # 'learner', 'prefill' or 'decoding'.
  config: layers.ModelConfig
  dtype: Any
  dtype_name: str  # 'config.model.dtype', where it is set.
  length: int  # T, at most; of a completion that is decoded.
  mesh: Mapping[str, int]  # Sizes of axes.
  splits_rows: bool  # Over its axis `sequence`; the sampler has whole ones.
  # Where completions are decoded: P, of how many a step can read a prompt once,
  # and in what keys and values are kept.
  prompt_length: int = 0
  sharing: int = 1
  cache_dtype: Any = 'bfloat16'


class Chosen(NamedTuple):
  """A kernel, or XLA."""

  name: str  # One of the names, and not 'auto'.
  reason: str  # Why not the kernel of the platform; '' if it is, or has none.


def choose(name: str, asked: Asked, *, platform: str) -> Chosen:
  """By what rows are attended, or the tokens that a new one sees.

  Args:
    name: one of `NAMES`, or of `DECODE_NAMES`; 'auto' is the kernel of the
      platform, and XLA for what it cannot do.
    asked: of it.
    platform: from `platform_of`.

  Raises:
    ValueError: the kernel of that name cannot do it.
  """
  if name == 'xla':
    return Chosen('xla', '')
  if name == 'auto':
    decoding = asked.whose == 'decoding'
    kernels = (
        {'cuda': 'triton'} if decoding else {'tpu': 'splash', 'cuda': 'cudnn'}
    )
    name = kernels.get(platform)
    if name is None:
      known = platform in ('cpu', 'tpu')
      reason = '' if known else f'there is no kernel for {platform}'
      return Chosen('xla', reason)
    reason = _why_not(name, asked, platform)
    if not reason:
      reason = (_why_not_decode if decoding else _why_not_rows)(asked)
    return Chosen('xla', reason) if reason else Chosen(name, '')
  reason = _why_not(name, asked, platform)
  if reason:
    part = 'sampling' if asked.whose == 'decoding' else 'model'
    raise ValueError(
        f"config.{part}.attention='{name}' cannot serve the {asked.whose}: "
        f"{reason}; use 'auto' or 'xla'."
    )
  return Chosen(name, '')


def _why_not_rows(asked: Asked) -> str:
  """Why 'auto' does without a kernel that could do it; '' if it does not."""
  if asked.length < SHORT_ROW:
    return f'rows of {asked.length} tokens are short, below {SHORT_ROW}'
  return ''


def _why_not_decode(asked: Asked) -> str:
  """The same of tokens that are decoded."""
  capability = _capability()
  if capability is not None and capability < 9.0:
    return (
        f'the kernel has run on Hopper only, and this GPU is {capability:g}; '
        "config.sampling.attention='triton' takes it"
    )
  # Slots that a step reads for a completion, where all grow to the limit.
  prompt, own = asked.prompt_length, asked.length
  if prompt + own / 2 > prompt / asked.sharing + own:
    return (
        f'a prompt of {prompt} tokens is read once for {asked.sharing} '
        f'completions of {own} by XLA, and for each by the kernel'
    )
  return ''


def _capability() -> float | None:
  """Of this GPU of NVIDIA; None if there is none."""
  try:
    return float(jax.devices()[0].compute_capability)
  except (AttributeError, ValueError):
    return None


def platform_of() -> str:
  """'cpu', 'tpu', 'cuda', or another that programs are traced for.

  'cuda' if cuDNN's kernel runs on this one: on Ampere and later.
  """
  name = platforms.current()
  if name != 'gpu':
    return name
  # AMD's too are 'gpu', and have no compute capability that is a number.
  capability = _capability()
  return 'cuda' if capability is not None and capability >= 8.0 else name


def _why_not(name: str, asked: Asked, platform: str) -> str:
  """What of it the kernel cannot do; '' if it can do it."""
  config, dtype = asked.config, jnp.dtype(asked.dtype).name
  where, machine, dtypes = _NEEDS[name]
  heads, tensor = config.num_key_value_heads, asked.mesh.get('tensor', 1)
  sequence = asked.mesh.get('sequence', 1)
  if platform != where:
    return f'it needs {machine}, and programs are traced for {platform}'
  if dtype not in dtypes:
    return f'{asked.dtype_name}={dtype} is not one of {", ".join(dtypes)}'
  if asked.splits_rows and sequence > 1:
    return f'it takes whole rows, and config.mesh.sequence is {sequence}'
  if heads % tensor:
    return (
        f'the {heads} key and value heads do not divide over tensor={tensor}'
    )
  if name == 'cudnn' and config.attn_logit_softcapping is not None:
    return f'it does not cap scores, at {config.attn_logit_softcapping:g} here'
  # Wider ones need a Hopper, and are not tried.
  if name == 'cudnn' and (config.head_dim > 128 or config.head_dim % 8):
    return f'a head has {config.head_dim} numbers, not 8, 16, ... 128'
  if name == 'triton' and config.head_dim not in (16, 32, 64, 128, 256):
    return f'a head has {config.head_dim} numbers, not 16, 32, ... 256'
  # Two blocks of keys and values are on the chip, of 227 KB on Hopper.
  kept = jnp.dtype(asked.cache_dtype)
  if name == 'triton' and config.head_dim * kept.itemsize > 512:
    return f'a head of {config.head_dim} numbers in {kept.name} is too large'
  if name == 'triton' and decode_kernel.triton is None:
    return 'this version of JAX does not compile Pallas by Triton'
  return ''


_NEEDS = {
    'splash': ('tpu', 'a TPU', ('float32', 'bfloat16')),
    'cudnn': (
        'cuda', 'a GPU of NVIDIA, Ampere or later', ('bfloat16', 'float16')
    ),
    'triton': (
        'cuda', 'a GPU of NVIDIA, Ampere or later', ('bfloat16', 'float16')
    ),
}


def splash(
    share: attention.ShareFn = attention.alone, *, interpret: bool = False
) -> attention.RowAttention:
  """Splash attention, for TPU.

  Where each token sees its own segment only, the mask is made on the chip from
  slots and segment ids; it takes distances within a segment from slots, which
  have no gaps there. Packed rows that share prompts bring theirs: a byte for
  each pair of tokens, forward and for either gradient, and four while a kernel
  runs. In return, blocks of it that nobody sees are skipped.

  Args:
    share: see `attention.ShareFn`.
    interpret: runs anywhere, slowly, for tests.
  """

  def rows(where, windows: Sequence[int | None], *, scale, cap):
    length = where.segment_ids.shape[1]
    block = _block(length)
    where = attention.fill_up(where, block)
    make = functools.partial(
        splash_lib.make_splash_mha,
        block_sizes=splash_lib.BlockSizes(
            **dict.fromkeys(
                ('block_q', 'block_kv', 'block_q_dkv', 'block_kv_dkv',
                 'block_q_dq', 'block_kv_dq'), block,
            )
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )
    if where.prompt_ids is None:
      sights = [jnp.int32(index) for index in range(len(windows))]
      of_rows = functools.partial(_by_segments, make, windows)
      arguments = lambda sight: (where.segment_ids, sight)
    else:
      visible = functools.partial(attention.visible_within_segments, where)
      sights = [
          jax.vmap(lambda mask: make(mask[None]))(visible(window=window))
          for window in windows
      ]
      of_rows = _by_masks
      arguments = lambda sight: (sight, ())

    def attend_with(sight):
      def attend(q, k, v, tape=products.no_tape):
        del tape
        # The kernel does not scale; in bfloat16 that rounds queries once more.
        inputs = (attention.fill_up(x, block) for x in (q * scale, k, v))
        out = share(of_rows)(*inputs, *arguments(sight))
        return out[:, :length], (k, v)

      return attend

    return sights, attend_with

  return rows


def _by_segments(make, windows, q, k, v, segment_ids, which):
  """Of rows [B, T, ...] whose tokens see their segment. [B, T, H, E]."""
  length, heads = q.shape[1:3]

  def within(window):
    mask = (
        masks.CausalMask((length, length)) if window is None
        else masks.LocalMask((length, length), (window - 1, 0), 0)
    )
    kernel = make(masks.MultiHeadMask([mask] * heads))
    return jax.vmap(
        lambda q, k, v, ids: kernel(q, k, v, splash_lib.SegmentIds(ids, ids))
    )

  return _heads_first(
      functools.partial(jax.lax.switch, which, [within(x) for x in windows])
  )(q, k, v, segment_ids)


def _by_masks(q, k, v, kernels, _):
  """Of rows [B, T, ...] with a kernel for each, made of its mask."""

  def of_row(q, k, v, kernel):
    # As an array, as which it came here, the kernel cannot read it.
    dynamic = lambda info: info._replace(is_dynamic_mask=True)
    return splash_lib.SplashAttentionKernel(
        dynamic(kernel.fwd_mask_info),
        dynamic(kernel.dq_mask_info),
        dynamic(kernel.dkv_mask_info),
        **kernel.kwargs,
    )(q, k, v)

  return _heads_first(jax.vmap(of_row))(q, k, v, kernels)


def _heads_first(attend):
  """From and to [B, T, H, E], of an `attend` of [B, H, T, E]."""

  def attend_rows(q, k, v, rest):
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    return jnp.moveaxis(attend(q, k, v, rest), 1, 2)

  return attend_rows


def cudnn(
    share: attention.ShareFn = attention.alone, *, aligned: bool = False
) -> attention.RowAttention:
  """Fused attention of cuDNN, for NVIDIA's GPUs.

  Who sees whom is a bias of two bytes for each pair of tokens of a row, for all
  heads together; what is behind a query is skipped. Aligned rows need none: a
  token sees all that stands before it.

  Args:
    share: see `attention.ShareFn`.
    aligned: rows hold one sequence each, from their first slot on, and no
      window `narrows` them. Padding behind it sees it, and is not seen.
  """

  def rows(where, windows: Sequence[int | None], *, scale, cap):
    if cap is not None:
      raise ValueError(f'cuDNN does not cap scores, here at {cap}.')
    length = where.segment_ids.shape[1]
    # A bias of odd length has no gradients.
    where = attention.fill_up(where, 2)
    if aligned:
      sights = [None] * len(windows)
    else:
      sights = [
          attention.visible_within_segments(where, window=x) for x in windows
      ]

    def of_rows(q, k, v, visible, _):
      return jax.nn.dot_product_attention(
          q, k, v, mask=None if visible is None else visible[:, None],
          scale=scale, is_causal=True, implementation='cudnn',
      )

    def attend_with(visible):
      def attend(q, k, v, tape=products.no_tape):
        del tape
        inputs = (attention.fill_up(x, 2) for x in (q, k, v))
        return share(of_rows)(*inputs, visible, ())[:, :length], (k, v)

      return attend

    return sights, attend_with

  return rows


def narrows(window: int | None, length: int) -> bool:
  """Whether a window hides anything in rows of so many tokens."""
  return window is not None and window < length


def _block(length: int) -> int:
  """Of equal ones that fill up a row, a multiple of the lanes."""
  count = -(-length // _BLOCK)
  return -(-length // (count * _LANES)) * _LANES
