"""What a policy says of the tokens of a rollout's rows.

The head is evaluated in chunks of tokens, and whatever needs logits is computed
within a chunk (chunks.py), so no [B, T, V] array exists. B sequences, T tokens,
D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import chunks
from dppo_jax import divergences
from dppo_jax import sampling
from dppo_jax.models import experts
from dppo_jax.models import products as products_lib
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import Divergence
from dppo_jax.types import given
from dppo_jax.types import of_shape
from dppo_jax.types import PyTree
from dppo_jax.types import Rows


class Anchor(NamedTuple):
  """The policy from which the divergence is measured."""

  logprobs: jax.Array  # [B, T] float32
  record: PyTree  # [B, T, ...]


class TargetStats(NamedTuple):
  """The target policy at the sampled tokens. All [b, T] or [n] float32."""

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
    chunk_size: tokens of a device whose logits exist at a time, and only of
      those that were sampled, made again in the backward pass; 0 for all tokens
      at once.
    prompt_length: P, if every row begins with so many tokens that were not
      sampled: no logits are made of what predicts them.

  Returns:
    `token_map(fn, params, rows, *extra, products)`, with `extra` pytrees of
    [b, T, ...], by which there is no gradient: the pytree of [b, T, ...] that
    `fn(logits [n, V], targets [n], *extra)` makes of n tokens at a time, each
    by itself; zeros for a prompt and, in chunks, for what was not sampled. For
    `products`, see `hidden_states`.
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


def make_head_map(model: CausalLM, **options) -> Callable[..., PyTree]:
  """`make_token_map` from hidden states on, with its options.

  Returns:
    `head_map(fn, params, hidden [b, T, D], rows, *extra, beside)`. With
    `beside`, parameters whose head `fn` needs too, they are its first argument.
  """
  run = _make_over_rows(model, chunks.mapped, **options)
  of_no_device = lambda out: ((), out)

  def head_map(fn, params, hidden, rows, *extra, beside=None):
    return run(of_no_device, fn, params, hidden, rows, extra, beside)[1]

  return head_map


def make_head_sum(model: CausalLM, **options) -> Callable[..., Any]:
  """A sum over sampled tokens, whose gradient needs their logits no more.

  Takes the options of `make_token_map`.

  Returns:
    `head_sum(fn, params, hidden [b, T, D], rows, *extra)` of a `fn(logits
    [n, V], targets [n], *extra)` that returns a term [n] of each of n tokens
    and beside it, without a gradient, a pytree of [n, ...]: the sum of the
    terms of sampled tokens, and a pytree of [b, T, ...].
  """
  run = _make_over_rows(model, chunks.summed, **options)
  of_device = lambda out: (out[0][None, None], out[1])

  def head_sum(fn, params, hidden, rows, *extra):
    sums, out = run(of_device, fn, params, hidden, rows, extra)
    return jnp.sum(sums), out

  return head_sum


def _make_over_rows(
    model, in_chunks, *, temperature, chunk_size=0, prompt_length=0
):
  """Runs a function of logits over the tokens of rows.

  What `in_chunks` makes of the tokens of a device `split` divides into what is
  of the device, [1, 1], and what is of its tokens, [n, ...].
  """
  first = max(prompt_length - 1, 0)  # Index of the first sampled token.

  def run(split, fn, params, hidden, rows, extra, beside=None):
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

    def of_rows(heads, *trees):  # Those of a device.
      shape = trees[0].shape
      mask, hidden, *trees = jax.tree.map(
          lambda x: x.reshape(-1, *x.shape[2:]), trees
      )
      at_a_time = chunk_size if chunk_size < mask.size else 0
      if at_a_time:
        # A sum of gradients would be rounded in bfloat16.
        heads = _exact(heads)
      of_device, out = split(
          in_chunks(of_tokens, at_a_time)(heads, mask, hidden, trees)
      )
      return of_device, jax.tree.map(
          lambda x: x.reshape(*shape, *x.shape[1:]), out
      )

    if model.by_tokens is not None:
      of_rows = model.by_tokens(of_rows)
    heads = [_head(x) for x in (params, beside) if x is not None]
    if model.by_tokens is not None:
      heads = _exact(heads)  # Gradients are summed over devices, too.
    of_device, out = of_rows(heads, *sampled)
    return of_device, jax.tree.map(
        lambda x: jnp.pad(x, [(0, 0), (first, 0)] + [(0, 0)] * (x.ndim - 2)),
        out,
    )

  return run


def _head(params):
  """What the head needs of them, if they have names."""
  if not isinstance(params, dict):
    return params
  others = {'layers', 'embed'} if 'head' in params else {'layers'}
  return {name: tree for name, tree in params.items() if name not in others}


def _exact(heads):
  """In float32, and so are their gradients."""
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
  recorded = given(rows.routing)
  if recorded or counted is not None:
    asked['routing'] = experts.Routing(
        replay=rows.routing if recorded else None, counted=counted
    )
  if given(rows.prompt_segments):
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


def make_summed_loss(
    model: CausalLM,
    divergence: Divergence,
    *,
    by_token: bool,
    measure_balance: bool = False,
    **options,
) -> Callable[..., tuple[jax.Array, TargetStats, PyTree]]:
  """The loss of rows, of what the target policy says of each token.

  Args:
    model: the architecture.
    divergence: measures against the anchor's record.
    by_token: whether the loss of a token depends on it alone. Then it is taken
      of any tokens of the rows at a time, chunk by chunk, and logits are made
      once; otherwise of all together, and logits of chunks are made again for
      the gradient.
    measure_balance: whether to measure how evenly sampled tokens use experts.
    **options: see `make_token_map`.

  Returns:
    `summed_loss(token_loss, params, rows, anchor, *extra, products) -> (loss,
    target, aux)` of a `token_loss(target, *extra)` that returns the loss of
    each token and a pytree beside it, [n] if `by_token` and else [b, T], as is
    all that it sees; `extra` are pytrees of [b, T, ...]. The sum is over
    sampled tokens. It carries a gradient, and so does the balance of experts;
    if not `by_token`, `logprobs` and `entropy` do, too.
  """
  head_map = make_head_map(model, **options)
  head_sum = make_head_sum(model, **options)

  def of_tokens(logits, targets, anchor):
    logprobs, entropy = divergences.logprobs_and_entropy(logits, targets)
    detached = jax.lax.stop_gradient(logits)
    measured = divergence.measure(detached, targets, anchor.record)
    of_shape('divergence', divergence.measure, measured, targets.shape)
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

  def summed_loss(token_loss, params, rows, anchor, *extra, products=()):
    hidden, routed = hidden_states(
        model,
        params,
        rows,
        counted=rows.token_mask if measure_balance else None,
        products=products,
    )

    def of_losses(logits, targets, anchor, *extra):
      target = of_tokens(logits, targets, anchor)
      losses, aux = token_loss(target, *extra)
      return losses, (target, aux)

    if by_token:
      loss, (target, aux) = head_sum(
          of_losses, params, hidden, rows, anchor, *extra
      )
    else:
      target = head_map(of_tokens, params, hidden, rows, anchor)
      losses, aux = token_loss(target, *extra)
      loss = jnp.sum(jnp.where(rows.token_mask, losses, 0.0))
    return loss, target._replace(routed=routed, hidden=hidden), aux

  return summed_loss
