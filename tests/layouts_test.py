"""Every algorithm learns the same from every layout of a rollout's rows.

The learner of a run takes two updates from rows as they were sampled, and again
from packed rows in parts, some of them halved, from groups that share a prompt,
and with a head that is run over a few tokens at a time; and one that takes the
forward pass from the sampler. B sequences in groups of G, P prompt and C
completion tokens.
"""

import functools

import invariance_test
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from dppo_jax import algorithms
from dppo_jax import decoding
from dppo_jax import divergences
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import train_step
from dppo_jax.models import attention

G, P = tiny_model.GROUP_SIZE, tiny_model.PROMPT_LENGTH
C = tiny_model.COMPLETION_LENGTH
NUM_ROWS = tiny_model.NUM_PROMPTS * G
NUM_SLOTS, ROW_LENGTH = 8, 30
PACKED, SHARED, CHUNKS, REUSED = WAYS = (
    'packed, in parts and halved',
    'shared prompts, in parts',
    'in chunks of the head, in parts',
    'forward pass reused, in parts',
)
# Of a whole sequence, which is not where it was; and of tokens by themselves.
QUICK = 'gspo', 'dppo_topk_tv'


@functools.cache
def sampled():
  """A rollout and its products, by the policy that is trained."""
  roll_out = tiny_model.make_rollout_fn(
      divergences.build('none'), num_slots=NUM_SLOTS, num_halvings=1
  )
  room = decoding.num_entries(
      num_prompts=tiny_model.NUM_PROMPTS, prompt_length=P, batch=NUM_ROWS,
      num_slots=NUM_SLOTS, length=C,
  )
  rolled, aux = tiny_model.jit(roll_out)(
      invariance_test.policies()[1], tiny_model.prompts(), jax.random.key(3),
      jnp.int32(0), tiny_model.MODEL.empty_products(room),
  )
  return rolled, aux.products


@functools.cache
def unrecorded():
  """As `invariance_test.unrecorded`, of tokens that the sampler drew."""
  rolled, _ = sampled()
  return rolled, invariance_test.noisy_logits(rolled)


def remembering(num_updates, learning_rate=0.3):
  """SGD whose state keeps the gradient of each update, [U, ...]."""

  def init(params):
    room = lambda x: jnp.zeros((num_updates, *x.shape))
    return jnp.int32(0), jax.tree.map(room, params)

  def update(gradients, state, params=None):
    del params
    count, kept = state
    kept = jax.tree.map(lambda x, g: x.at[count].set(g), kept, gradients)
    changes = jax.tree.map(lambda g: -learning_rate * g, gradients)
    return changes, (count + 1, kept)

  return optim.Optimizer(
      optax.GradientTransformation(init, update),
      optax.constant_schedule(learning_rate),
  )


def options_of(way):
  """Of `tiny_model.make_learner`."""
  if way == PACKED:
    arrange = packing.make_packed(
        row_length=ROW_LENGTH, prompt_length=P, group_size=G, num_halvings=1
    )
    return {'arrange': arrange, 'num_microbatches': 6}
  if way == SHARED:
    attend = attention.in_merged_groups(attention.Groups(P - 1, G))
    return {
        'arrange': packing.make_grouped(prompt_length=P, group_size=G),
        'rows_together': G,
        'num_microbatches': 2,
        'model': tiny_model.MODEL.replace(row_attention=attend),
    }
  if way == CHUNKS:  # No multiple of a sequence's tokens.
    return {'chunk_size': 5, 'num_microbatches': 2}
  return {'num_microbatches': 2} if way == REUSED else {}


def learn(name, way=''):
  """(gradients [U, ...], token stats, metrics [U]) of an algorithm."""
  # The sampler's forward pass is that of the first update only.
  num_updates = 1 if way == REUSED else 2
  optimizer = remembering(num_updates)
  options = tiny_model.row_options(name) | options_of(way)
  scored = invariance_test.scored_for(options['divergence'], unrecorded)
  state = train_step.init_state(
      invariance_test.policies()[1], optimizer, jax.random.key(0),
      dual=options['dual'],
  )
  if way == REUSED:
    state = state._replace(products=sampled()[1])
  learn_fn = tiny_model.jit(tiny_model.make_learner(
      optimizer=optimizer, num_epochs=num_updates, **options
  ))
  state, stats, metrics = learn_fn(state, scored, jax.random.key(7))
  _, gradients = state.opt_state
  return gradients, stats, metrics


as_sampled = functools.lru_cache(maxsize=1)(learn)  # For one name at a time.


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in algorithms.names()
])
def test_loss_and_gradients_of_every_layout_are_those_of_rows_as_sampled(
    name, way
):
  expected, stats, metrics = as_sampled(name)
  gradients, _, other_metrics = learn(name, way)
  if way == REUSED:
    expected, metrics = jax.tree.map(lambda x: x[:1], (expected, metrics))
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  assert largest > 1e-2
  tiny_model.assert_trees_close(
      gradients, expected, rtol=1e-4, atol=1e-5 * largest
  )
  parts = other_metrics['learner/microbatches']
  assert (parts > 1).all() and (metrics['learner/microbatches'] == 1).all()
  for metric, value in metrics.items():
    if not metric.startswith('learner/'):
      np.testing.assert_allclose(
          other_metrics[metric], value, rtol=1e-5, atol=1e-6, err_msg=metric
      )
  sampled_tokens = np.asarray(stats.token_mask)
  if way == PACKED:  # A part of one row is halved.
    slots = sampled_tokens[0].sum() / other_metrics['learner/sampled_share']
    assert (slots < parts * ROW_LENGTH - 1).all()
  row, region = algorithms.row(name), np.asarray(stats.trust_region)
  everywhere = {'name': 'none'}, {'name': 'outward'}
  if (row.divergence, row.trust_region) != everywhere:
    region = region[sampled_tokens]
    assert region.min() < 1 and region.max() == 1  # Both are there.
