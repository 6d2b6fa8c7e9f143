"""A policy that is a table of logits, so that it says whatever a test wants.

The rows of the table are looked up by position, one for every token of a
rollout. It goes through the same objective as a transformer does. B sequences,
T tokens, V vocabulary.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import tiny_model

from dppo_jax import advantages as advantage_lib
from dppo_jax import divergences
from dppo_jax import rollout as rollout_lib
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout


class TableModel:
  """`models.causal_lm.CausalLM` as far as the objective knows it."""

  by_tokens = None  # A single device.

  def trunk(self, params, tokens, *, positions, segment_ids):
    """[b, T] positions -> [b, T, V]."""
    del tokens, segment_ids
    return params[positions], None

  def head(self, params, hidden):
    """The table holds logits already."""
    del params
    return hidden


MODEL = TableModel()


def make_rollout(
    divergence, *, behaviour, tokens, token_mask=None, segment_ids=None
):
  """A rollout of the table `behaviour` [B, T, V], one sequence a row."""
  behaviour, tokens = jnp.asarray(behaviour), jnp.asarray(tokens, jnp.int32)
  shape = tokens.shape
  first = jnp.zeros((shape[0], 1), jnp.int32)
  if token_mask is None:
    token_mask = np.ones(shape, bool)
  if segment_ids is None:
    segment_ids = np.ones(shape, np.int32)
  positions = jnp.arange(tokens.size).reshape(shape)
  return Rollout(
      tokens=jnp.concatenate([first, tokens], axis=1),
      segment_ids=jnp.concatenate([first, jnp.asarray(segment_ids)], axis=1),
      positions=jnp.concatenate([positions, first], axis=1),
      token_mask=jnp.asarray(token_mask),
      behaviour_logprobs=divergences.token_logprobs(behaviour, tokens),
      record=divergence.record(behaviour, tokens),
      policy_version=jnp.zeros(shape[:1], jnp.int32),
      truncated=jnp.zeros(shape[:1], bool),
  )


def make_rollout_fn(divergence, *, num_rows, length, vocabulary):
  """As `rollout.make_rollout_fn`; row i is drawn from rows of its own."""

  def rollout_fn(params, prompts, key, version, products=()):
    del prompts, products
    logits = params.reshape(num_rows, length, vocabulary)
    tokens = jax.random.categorical(key, logits)
    rollout = make_rollout(divergence, behaviour=logits, tokens=tokens)
    versions = jnp.full(num_rows, version, jnp.int32)
    aux = rollout_lib.SamplingAux(jnp.int32(length))
    return rollout._replace(policy_version=versions), aux

  return rollout_fn


def seen(
    name,
    *,
    behaviour,
    target,
    tokens,
    advantages,
    anchor=None,
    token_mask=None,
    segment_ids=None,
    **options,
):
  """Gradient and token stats of a row of the table of algorithms.

  Args:
    name: of the row.
    behaviour: [B, T, V] logits of the policy that sampled.
    target: [B, T, V] logits of the policy that is trained.
    tokens: [B, T], sampled.
    advantages: [B, T].
    anchor: [B, T, V] logits at the start of the step; behaviour if not given.
    token_mask: [B, T] bool, all if not given.
    segment_ids: [B, T] int32, one sequence a row if not given.
    **options: instead of what the row says, as in `tiny_model.make_objective`.

  Returns:
    the gradient of the summed loss by logits [B, T, V], and `TokenStats`.
  """
  divergence, gradient = _gradient(name, **options)
  rollout = make_rollout(
      divergence,
      behaviour=behaviour,
      tokens=tokens,
      token_mask=token_mask,
      segment_ids=segment_ids,
  )
  vocabulary = np.shape(target)[-1]
  table = lambda logits: jnp.asarray(logits).reshape(-1, vocabulary)
  by_table, stats = gradient(
      table(behaviour if anchor is None else anchor),
      table(target),
      ScoredRollout(rollout, jnp.zeros(len(rollout.tokens))),
      jnp.broadcast_to(
          jnp.asarray(advantages, jnp.float32), rollout.token_mask.shape
      ),
  )
  return by_table.reshape(np.shape(target)), stats


@functools.cache  # Compiled once for all tests of a row with the same shapes.
def _gradient(name, **options):
  """The divergence of a row, and the gradient of its loss by the table."""
  options = tiny_model.row_options(name) | {
      'advantage_fn': advantage_lib.build('raw'),
      'model': MODEL,
      **options,
  }
  divergence = options.pop('divergence')
  prepare, weighted_loss = tiny_model.make_objective(divergence, **options)
  dual = options['dual']

  def gradient(start, target, scored, advantages):
    state = types.SimpleNamespace(params=start, reference=())
    batch = prepare(state, scored)
    mask = scored.rollout.token_mask
    batch = batch._replace(
        advantages=jnp.where(mask, advantages, 0.0),
        weights=mask.astype(jnp.float32),
    )
    return jax.grad(weighted_loss, has_aux=True)(
        target, batch, (), jnp.int32(0),
        dual_state=dual.init() if dual else (),
    )

  return divergence, tiny_model.jit(gradient)


def slopes(name, **inputs):
  """Gradient of the summed loss by each logprob, arguments as `seen`. [B, T].

  By the logits it must be a multiple of (e_a - pi), a the sampled token.
  """
  by_logits, _ = seen(name, **inputs)
  by_logits = np.asarray(by_logits, np.float64)
  probabilities = jax.nn.softmax(np.asarray(inputs['target'], np.float64))
  along = np.eye(by_logits.shape[-1])[np.asarray(inputs['tokens'])]
  along = along - np.asarray(probabilities, np.float64)
  slope = np.sum(by_logits * along, -1) / np.sum(along * along, -1)
  np.testing.assert_allclose(
      by_logits, slope[..., None] * along, rtol=1e-3,
      atol=1e-5 * max(1, np.abs(slope).max()),
  )
  return slope

