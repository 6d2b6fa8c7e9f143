"""What a policy says of the tokens of a rollout.

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
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import Divergence
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout


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


def make_token_map(
    model: CausalLM,
    *,
    temperature: float,
    chunk_size: int = 0,
    prompt_length: int = 0,
) -> Callable[..., PyTree]:
  """Maps a function over the tokens of a rollout and the policy's logits.

  Args:
    model: the architecture.
    temperature: that of the sampler.
    chunk_size: tokens whose logits exist at a time, recomputed in the backward
      pass; 0 for all at once.
    prompt_length: P, if every row begins with so many tokens that were not
      sampled: no logits are made of what predicts them.

  Returns:
    `token_map(fn, params, rollout, *extra)`, with `extra` pytrees of [b, T,
    ...]: the pytree of [b, T, ...] that `fn(logits [n, V], targets [n],
    *extra)` makes of n tokens at a time, zeros for a prompt.
  """
  head_map = _make_head_map(
      model,
      temperature=temperature,
      chunk_size=chunk_size,
      prompt_length=prompt_length,
  )

  def token_map(fn, params, rollout, *extra):
    hidden, _ = hidden_states(model, params, rollout)
    return head_map(fn, params, hidden, rollout.tokens[:, 1:], *extra)

  return token_map


def _make_head_map(model, *, temperature, chunk_size, prompt_length):
  """`make_token_map` from hidden states on."""
  first = max(prompt_length - 1, 0)  # Index of the first sampled token.

  def head_map(fn, params, *trees):
    hidden, targets, *extra = jax.tree.map(lambda x: x[:, first:], trees)
    shape, count = targets.shape, targets.size  # [b, T - first]

    def body(params, hidden, targets, *extra):
      logits = sampling.process_logits(
          model.head(params, hidden), temperature=temperature
      )
      return fn(logits, targets, *extra)

    flat = jax.tree.map(
        lambda x: x.reshape(count, *x.shape[2:]), (hidden, targets, *extra)
    )
    if not chunk_size or chunk_size >= count:
      out = body(params, *flat)
    else:
      out = _in_chunks(body, params, flat, count, chunk_size)
    return jax.tree.map(
        lambda x: jnp.pad(
            x.reshape(*shape, *x.shape[1:]),
            [(0, 0), (first, 0)] + [(0, 0)] * (x.ndim - 1),
        ),
        out,
    )

  return head_map


def hidden_states(
    model: CausalLM,
    params: PyTree,
    rollout: Rollout,
    *,
    counted: jax.Array | None = None,
) -> tuple[jax.Array, experts.Routed]:
  """What the head makes logits of, and what routers did.

  Args:
    model: the architecture.
    params: of a policy.
    rollout: tokens go to the experts that it recorded, if it did.
    counted: [b, T] bool, tokens over which the use of experts is measured; not
      measured if None.

  Returns:
    [b, T, D]; [b, T, L] and [L].
  """
  asked = {}
  recorded = not isinstance(rollout.routing, tuple)
  if recorded or counted is not None:
    asked['routing'] = experts.Routing(
        replay=rollout.routing if recorded else None, counted=counted
    )
  hidden, kept = model.trunk(
      params,
      rollout.tokens[:, :-1],
      positions=rollout.positions[:, :-1],
      segment_ids=rollout.segment_ids[:, :-1],
      **asked,
  )
  return hidden, kept.routed if asked else experts.Routed()


def make_target_fn(
    model: CausalLM,
    divergence: Divergence,
    *,
    temperature: float,
    chunk_size: int = 0,
    prompt_length: int = 0,
    measure_balance: bool = False,
) -> Callable[[PyTree, Rollout, Anchor], TargetStats]:
  """What the target policy says of a rollout's tokens.

  Args:
    model: the architecture.
    divergence: measures against the anchor's record.
    temperature: that of the sampler.
    chunk_size: see `make_token_map`.
    prompt_length: see `make_token_map`.
    measure_balance: whether to measure how evenly sampled tokens use experts.

  Returns:
    `target_fn(params, rollout, anchor) -> TargetStats`. Only `logprobs`,
    `entropy` and the balance of experts carry a gradient.
  """
  head_map = _make_head_map(
      model,
      temperature=temperature,
      chunk_size=chunk_size,
      prompt_length=prompt_length,
  )

  def of_tokens(logits, targets, anchor):
    logprobs = divergences.token_logprobs(logits, targets)
    every = jax.nn.log_softmax(logits, axis=-1)
    detached = jax.lax.stop_gradient(logits)
    measured = divergence.measure(detached, targets, anchor.record)
    if divergence.direction is None:
      direction = logprobs - anchor.logprobs
    else:
      direction = divergence.direction(detached, targets, anchor.record)
    return TargetStats(
        logprobs,
        -jnp.sum(jnp.exp(every) * every, axis=-1),
        jax.lax.stop_gradient(measured),
        jax.lax.stop_gradient(direction),
    )

  def target_fn(params, rollout, anchor):
    hidden, routed = hidden_states(
        model,
        params,
        rollout,
        counted=rollout.token_mask if measure_balance else None,
    )
    stats = head_map(of_tokens, params, hidden, rollout.tokens[:, 1:], anchor)
    return stats._replace(routed=routed)

  return target_fn


def _in_chunks(body, params, flat, count, chunk_size):
  """Maps over chunks of tokens, so that no [count, V] array exists."""
  num_chunks = -(-count // chunk_size)
  extra = num_chunks * chunk_size - count  # Zeros, cut off again at the end.
  chunks = jax.tree.map(
      lambda x: jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)).reshape(
          num_chunks, chunk_size, *x.shape[1:]
      ),
      flat,
  )
  body = jax.checkpoint(body, prevent_cse=False)
  # The head's gradient is a sum over chunks, which bfloat16 would round.
  params = {
      name: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
      for name, tree in params.items()
      if name != 'layers'  # The head needs none of them.
  }
  _, out = jax.lax.scan(
      lambda _, chunk: (None, body(params, *chunk)), None, chunks
  )
  return jax.tree.map(
      lambda x: x.reshape(-1, *x.shape[2:])[:count], out
  )
