"""What a policy says of the tokens of a rollout's rows.

The head is evaluated in chunks of tokens under rematerialisation, and whatever
needs logits is computed within a chunk, so no [B, T, V] array exists. B
sequences, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import divergences
from dppo_jax import sampling
from dppo_jax.models import experts
from dppo_jax.models import products as products_lib
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import Divergence
from dppo_jax.types import PyTree
from dppo_jax.types import Rows


class Anchor(NamedTuple):
  """The policy from which the divergence is measured."""

  logprobs: jax.Array  # [B, T] float32
  record: PyTree  # [B, T, ...]


class TargetStats(NamedTuple):
  """The target policy at the sampled tokens. All [b, T] float32."""

  logprobs: jax.Array
  entropy: jax.Array
  divergence: jax.Array
  direction: jax.Array
  routed: experts.Routed = experts.Routed()  # [b, T, L], [L].
  hidden: PyTree = ()  # [b, T, D], what the head makes logits of.


def make_token_map(
    model: CausalLM,
    *,
    temperature: float,
    chunk_size: int = 0,
    prompt_length: int = 0,
) -> Callable[..., PyTree]:
  """Maps a function over the tokens of rows and the policy's logits.

  Args:
    model: the architecture.
    temperature: that of the sampler.
    chunk_size: tokens of a device whose logits exist at a time, recomputed in
      the backward pass, but at least one of each row; 0 for all at once. Chunks
      without a sampled token are left out.
    prompt_length: P, if every row begins with so many tokens that were not
      sampled: no logits are made of what predicts them.

  Returns:
    `token_map(fn, params, rows, *extra, products)`, with `extra` pytrees of
    [b, T, ...]: the pytree of [b, T, ...] that `fn(logits [n, V], targets [n],
    *extra)` makes of n tokens at a time, zeros for a prompt. For `products`,
    see `hidden_states`.
  """
  head_map = make_head_map(
      model,
      temperature=temperature,
      chunk_size=chunk_size,
      prompt_length=prompt_length,
  )

  def token_map(fn, params, rows, *extra, products=()):
    hidden, _ = hidden_states(model, params, rows, products=products)
    return head_map(fn, params, hidden, rows, *extra)

  return token_map


def make_head_map(
    model: CausalLM,
    *,
    temperature: float,
    chunk_size: int = 0,
    prompt_length: int = 0,
) -> Callable[..., PyTree]:
  """`make_token_map` from hidden states on.

  Returns:
    `head_map(fn, params, hidden [b, T, D], rows, *extra, beside)`. With
    `beside`, parameters whose head `fn` needs too, they are its first argument.
  """
  first = max(prompt_length - 1, 0)  # Index of the first sampled token.

  def head_map(fn, params, hidden, rows, *extra, beside=None):
    def of_tokens(heads, hidden, targets, *extra):
      head, *others = heads
      logits = sampling.process_logits(
          model.head(head, hidden), temperature=temperature
      )
      return fn(*others, logits, targets, *extra)

    sampled = jax.tree.map(
        lambda x: x[:, first:],
        (rows.token_mask, hidden, rows.targets, *extra),
    )

    def of_rows(heads, mask, *trees):  # Those of a device.
      if 0 < chunk_size < mask.size:
        return _in_chunks(of_tokens, heads, mask, trees, chunk_size)
      return _over_tokens(of_tokens, heads, trees)

    if model.by_tokens is not None:
      of_rows = model.by_tokens(of_rows)
    heads = [_head(x) for x in (params, beside) if x is not None]
    if model.by_tokens is not None:
      heads = _exact(heads)  # Gradients are summed over devices, too.
    out = of_rows(heads, *sampled)
    return jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (first, 0)] + [(0, 0)] * (x.ndim - 2)),
        out,
    )

  return head_map


def _head(params):
  """What the head needs of them, if they have names."""
  if not isinstance(params, dict):
    return params
  others = {'layers', 'embed'} if 'head' in params else {'layers'}
  return {name: tree for name, tree in params.items() if name not in others}


def _exact(heads):
  """In float32: a sum of gradients would be rounded in bfloat16."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), heads)


def hidden_states(
    model: CausalLM,
    params: PyTree,
    rows: Rows,
    *,
    counted: jax.Array | None = None,
    products: PyTree = (),
) -> tuple[jax.Array, experts.Routed]:
  """What the head makes logits of, and what routers did.

  Args:
    model: the architecture.
    params: of a policy.
    rows: tokens go to the experts that they recorded, if they did.
    counted: [b, T] bool, tokens over which the use of experts is measured; not
      measured if None.
    products: `TrainState.products` of the same parameters; () computes anew.

  Returns:
    [b, T, D]; [b, T, L] and [L].
  """
  asked = {}
  recorded = not isinstance(rows.routing, tuple)
  if recorded or counted is not None:
    asked['routing'] = experts.Routing(
        replay=rows.routing if recorded else None, counted=counted
    )
  if not isinstance(rows.prompt_segments, tuple):
    asked['prompt_ids'] = rows.prompt_segments
  if products:
    asked['products'] = products_lib.Selection(products, rows.entries)
  hidden, kept = model.trunk(
      params,
      rows.inputs,
      positions=rows.positions,
      segment_ids=rows.input_segments,
      **asked,
  )
  return hidden, kept.routed if 'routing' in asked else experts.Routed()


def make_target_fn(
    model: CausalLM,
    divergence: Divergence,
    *,
    temperature: float,
    chunk_size: int = 0,
    prompt_length: int = 0,
    measure_balance: bool = False,
) -> Callable[[PyTree, Rows, Anchor], TargetStats]:
  """What the target policy says of the tokens of rows.

  Args:
    model: the architecture.
    divergence: measures against the anchor's record.
    temperature: that of the sampler.
    chunk_size: see `make_token_map`.
    prompt_length: see `make_token_map`.
    measure_balance: whether to measure how evenly sampled tokens use experts.

  Returns:
    `target_fn(params, rows, anchor) -> TargetStats`. Only `logprobs`,
    `entropy` and the balance of experts carry a gradient.
  """
  head_map = make_head_map(
      model,
      temperature=temperature,
      chunk_size=chunk_size,
      prompt_length=prompt_length,
  )

  def of_tokens(logits, targets, anchor):
    logprobs, entropy = divergences.logprobs_and_entropy(logits, targets)
    detached = jax.lax.stop_gradient(logits)
    measured = divergence.measure(detached, targets, anchor.record)
    if divergence.direction is None:
      direction = logprobs - anchor.logprobs
    else:
      direction = divergence.direction(detached, targets, anchor.record)
    return TargetStats(
        logprobs,
        entropy,
        jax.lax.stop_gradient(measured),
        jax.lax.stop_gradient(direction),
    )

  def target_fn(params, rows, anchor, products=()):
    hidden, routed = hidden_states(
        model,
        params,
        rows,
        counted=rows.token_mask if measure_balance else None,
        products=products,
    )
    stats = head_map(of_tokens, params, hidden, rows, anchor)
    return stats._replace(routed=routed, hidden=hidden)

  return target_fn


def _in_chunks(body, heads, mask, trees, chunk_size):
  """Maps over some columns of all rows at a time, so no [b, T, V] exists.

  A chunk without a sampled token costs nothing and gives zeros.
  """
  num_rows, length = mask.shape
  width = max(chunk_size // num_rows, 1)
  num_chunks = -(-length // width)
  # Zeros, cut off again at the end.
  extra = num_chunks * width - length

  def split(x):  # [b, T, ...] -> [number of chunks, b, width, ...]
    x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(num_rows, num_chunks, width, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def of_chunk(heads, mask, trees):
    run = lambda: _over_tokens(body, heads, trees)
    skip = lambda: jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run)
    )
    return jax.lax.cond(jnp.any(mask), run, skip)

  keeps = jax.checkpoint_policies.save_only_these_names(divergences.OF_ROWS)
  of_chunk = jax.checkpoint(of_chunk, prevent_cse=False, policy=keeps)
  heads = _exact(heads)
  _, out = jax.lax.scan(
      lambda _, chunk: (None, of_chunk(heads, *chunk)),
      None,
      jax.tree.map(split, (mask, trees)),
  )

  def join(x):  # [number of chunks, b, width, ...] -> [b, T, ...]
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(num_rows, -1, *x.shape[3:])[:, :length]

  return jax.tree.map(join, out)


def _over_tokens(body, heads, trees):
  """`body` of [b * T, ...], for trees of [b, T, ...]."""
  shape = jax.tree.leaves(trees)[0].shape[:2]
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trees)
  return jax.tree.map(
      lambda x: x.reshape(*shape, *x.shape[1:]), body(heads, *flat)
  )
