"""What a row of the table learns does not depend on how its data are laid out.

Every row of `algorithms.TABLE` goes through the objective of a run, with a
transformer: eight devices compute what one does, and packed rows (packing.py)
what one completion a row does. The transformer below the head is the same for
all rows, so it is compiled once: the objective has its gradient by the hidden
states, and the chain rule does the rest. B sequences in groups of G, P prompt
and C completion tokens, T predicted ones, D width, V vocabulary.
"""

import functools
import json
import types

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import pytest
import tiny_model

from dppo_jax import algorithms
from dppo_jax import diagnostics
from dppo_jax import divergences
from dppo_jax import objective
from dppo_jax import packing
from dppo_jax import rollout
from dppo_jax import sampling
from dppo_jax import sharding
from dppo_jax import target
from dppo_jax.types import ScoredRollout

NUM_ROWS = tiny_model.NUM_PROMPTS * tiny_model.GROUP_SIZE


# --- the transformer, below the head and above it ----------------------------


def hidden_of(params, rows):
  """Hidden states [B, T, D]."""
  return target.hidden_states(tiny_model.MODEL, params, rows)[0]


trunk = tiny_model.jit(hidden_of)


@tiny_model.jit
def pull_back(params, rows, by_hidden):
  """From the gradient by the hidden states to that by the parameters."""
  _, vjp = jax.vjp(lambda params: hidden_of(params, rows), params)
  return vjp(by_hidden)[0]


def above(params, rows):
  """The parameters of the head, and what it reads."""
  head = {name: params[name] for name in ('embed', 'norm')}
  return head | {'hidden': trunk(params, rows)}


def whole_gradient(params, rows, gradient):
  """By the parameters, from that by what `above` returns."""
  by_params = pull_back(params, rows, gradient['hidden'])
  own = {name: gradient[name] for name in ('embed', 'norm')}
  return by_params | jax.tree.map(
      jnp.add, {name: by_params[name] for name in own}, own
  )


class Above:
  """`models.causal_lm.CausalLM` of the parameters that `above` returns."""

  by_tokens = None

  def trunk(self, params, tokens, **where):
    del tokens, where
    return params['hidden'], None

  def head(self, params, hidden):
    return tiny_model.MODEL.head(params, hidden)


# --- three policies and a rollout --------------------------------------------


@functools.cache
def policies():
  """Parameters at the start of the step and of the policy being trained."""

  def near(params, seed, scale):
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten([
        x + scale * jnp.std(x) * jax.random.normal(key, x.shape)
        for x, key in zip(leaves, keys, strict=True)
    ])

  start = tiny_model.params()
  return start, near(start, seed=1, scale=0.1)


@functools.cache
def unrecorded():
  """A rollout without log-probs and record, and the logits it came from.

  Prompts have 1 to P tokens and completions 1 to C. The first row was sampled
  nearly by the policy being trained, the last by one far away, and a third of
  the tokens was nearly certain: every trust region has some inside and outside.
  """
  rng = np.random.RandomState(0)
  shape = (NUM_ROWS, tiny_model.COMPLETION_LENGTH)
  lengths = 1 + rng.permutation(NUM_ROWS)[:, None] % shape[1]
  mask = jnp.asarray(np.arange(shape[1]) < lengths)
  tokens = rng.randint(9, tiny_model.CONFIG.vocab_size, shape)
  rolled = rollout.assemble(
      tiny_model.prompts(),
      sampling.Completions(
          tokens=jnp.where(mask, tokens, tiny_model.PAD_ID).astype(jnp.int32),
          mask=mask,
          logprobs=jnp.zeros(shape),
          record=(),
          truncated=jnp.zeros(NUM_ROWS, bool),
          num_steps=jnp.int32(shape[1]),
      ),
      group_size=tiny_model.GROUP_SIZE,
  )
  return rolled, noisy_logits(rolled)


def noisy_logits(rolled):
  """[B, T, V] of behaviour policies near and far, see `unrecorded`."""
  rng = np.random.RandomState(0)
  params = policies()[1]
  hidden = trunk(params, packing.rows_of(rolled))
  logits = tiny_model.MODEL.head(params, hidden)
  far = jnp.linspace(0.01, 0.6, NUM_ROWS)[:, None, None]
  noise = far * jax.random.normal(jax.random.key(2), logits.shape)
  certain = jnp.asarray(rng.choice([0.0, 0.0, 8.0], logits.shape[:2]))
  certain = certain.at[0].set(0.0)
  at_token = jax.nn.one_hot(rolled.tokens[:, 1:], logits.shape[-1])
  return logits + noise + certain[..., None] * at_token


def scored_for(divergence, source=unrecorded):
  """The rollout of a source with what `divergence` remembers of it."""
  rolled, logits = source()
  targets = rolled.tokens[:, 1:]
  rolled = rolled._replace(
      behaviour_logprobs=divergences.token_logprobs(logits, targets),
      record=divergence.record(logits, targets),
  )
  rewards = jnp.tile(jnp.array([1.0, 0.0, 0.3, 0.8]), tiny_model.NUM_PROMPTS)
  return ScoredRollout(rolled, rewards)


def objective_of(name, **changes):
  """(divergence, prepare, weighted_loss) of a row of the table."""
  options = tiny_model.row_options(name) | {'model': Above()} | changes
  divergence, dual = options.pop('divergence'), options['dual']
  prepare, weighted_loss = tiny_model.make_objective(divergence, **options)
  state = dual.init() if dual else ()

  def loss(params, batch, reference, version):
    return weighted_loss(
        params, batch, reference, version, dual_state=state
    )

  return divergence, prepare, loss


def test_the_chain_rule_gives_the_gradient_of_the_whole_transformer():
  divergence, prepare, weighted_loss = objective_of('dppo_topk_tv')
  scored, params = scored_for(divergence), policies()[1]
  batch = prepare(types.SimpleNamespace(params=(), reference=()), scored)
  run = lambda fn, params: tiny_model.jit(jax.grad(fn, has_aux=True))(
      params, batch, (), jnp.int32(0)
  )[0]
  got = whole_gradient(
      params, batch.rows, run(weighted_loss, above(params, batch.rows))
  )
  _, _, whole_loss = objective_of('dppo_topk_tv', model=tiny_model.MODEL)
  expected = run(whole_loss, params)
  tiny_model.assert_trees_close(got, expected, rtol=1e-4, atol=1e-6)


# --- eight devices -----------------------------------------------------------


@tiny_model.jit
def metrics_of(stats, threshold):
  """Compiled once for all rows."""
  stats = jax.tree.map(lambda x: x[None], stats)
  return diagnostics.token_metrics(stats, threshold=threshold)


def on_eight_devices():
  """Prints, for each row, what one device and what a mesh of eight computes."""
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, expert=1)
  by_rule = lambda tree: jax.device_put(tree, sharding.of_params(tree, mesh))
  split = tuple(by_rule(params) for params in policies())
  kernel = split[0]['layers']['mlp']['up']['kernel'].sharding
  assert kernel.spec == jax.sharding.PartitionSpec(None, 'fsdp', 'tensor')
  for name in algorithms.names():
    divergence, prepare, weighted_loss = objective_of(name)
    scored = scored_for(divergence)
    threshold = divergences.low_high(divergence.threshold)

    @tiny_model.jit
    def learn(start, moved, scored, prepare=prepare, loss=weighted_loss):
      batch = prepare(types.SimpleNamespace(params=start, reference=()), scored)
      return jax.value_and_grad(loss, has_aux=True)(
          moved, batch, (), jnp.int32(0)
      )

    def summary(start, moved, scored, learn=learn, threshold=threshold):
      rows = packing.rows_of(scored.rollout)
      (loss, stats), gradient = learn(
          above(start, rows), above(moved, rows), scored
      )
      metrics = metrics_of(stats, threshold)
      gradient = whole_gradient(moved, rows, gradient)
      devices = {
          d for x in jax.tree.leaves(gradient) for d in x.sharding.device_set
      }
      return gradient, {
          'devices': len(devices),
          'loss': float(loss),
          'metrics': {k: float(v) for k, v in metrics.items()},
      }

    gradient, one = summary(*policies(), scored)
    parts, eight = summary(*split, jax.device_put(scored, sharding.batch(mesh)))
    pairs = [
        (np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(parts))
    ]
    line = {
        'name': name,
        'one': one,
        'eight': eight,
        'gradient': float(max(np.abs(a).max() for a, _ in pairs)),
        'difference': float(max(np.abs(a - b).max() for a, b in pairs)),
    }
    print(json.dumps(line))


@pytest.fixture(scope='module')
def eight_devices():
  printed = many_devices.run(
      'import invariance_test; invariance_test.on_eight_devices()',
      optimized=False,
  )
  lines = map(json.loads, printed)
  return {line.pop('name'): line for line in lines}


@pytest.mark.several_devices
@pytest.mark.slow
@pytest.mark.parametrize('name', algorithms.names())
def test_eight_devices_learn_what_one_does(eight_devices, name):
  row = eight_devices[name]
  one, eight = row['one'], row['eight']
  assert (one['devices'], eight['devices']) == (1, 8)
  np.testing.assert_allclose(eight['loss'], one['loss'], rtol=1e-5, atol=1e-6)
  assert row['difference'] < 1e-5 + 1e-4 * row['gradient']
  assert row['gradient'] > 1e-3
  assert one['metrics'].keys() == eight['metrics'].keys()
  for metric, value in one['metrics'].items():
    np.testing.assert_allclose(
        eight['metrics'][metric], value, rtol=1e-4, atol=1e-5, err_msg=metric
    )


# --- packed rows -------------------------------------------------------------

# Room for three of the longest sequences, so prompts are shared by some.
ROW_LENGTH = 30
arrange = packing.make_packed(
    row_length=ROW_LENGTH,
    prompt_length=tiny_model.PROMPT_LENGTH,
    group_size=tiny_model.GROUP_SIZE,
)


def check_packed(name, extras):
  """Compares both layouts; returns the trust region of the sampled tokens."""
  divergence, prepare, weighted_loss = objective_of(name, extras=extras)
  start, params = policies()
  scored = scored_for(divergence)
  rows = packing.rows_of(scored.rollout)
  batch = tiny_model.jit(
      lambda start, scored: prepare(
          types.SimpleNamespace(params=start, reference=start), scored
      )
  )(above(start, rows), scored)
  # Rows in another order, so that a part of every group comes late.
  order = jnp.asarray(np.random.RandomState(0).permutation(NUM_ROWS))
  layout = jax.jit(arrange, static_argnums=2)(batch.rows, order, 1)
  assert layout.num_parts == 1
  packed_rows, packed = packing.take(
      layout, 0, batch.rows, batch._replace(rows=())
  )
  packed = packed._replace(rows=packed_rows)
  real = np.asarray(packed.rows.input_segments) > 0
  assert 0 < real.sum() < 0.75 * (np.asarray(rows.input_segments) > 0).sum()
  value_and_grad = tiny_model.jit(
      jax.value_and_grad(weighted_loss, has_aux=True)
  )

  def run(batch):
    (loss, stats), gradient = value_and_grad(
        above(params, batch.rows),
        batch,
        above(start, batch.rows),
        jnp.int32(0),
    )
    return loss, stats, whole_gradient(params, batch.rows, gradient)

  expected, stats, gradient = run(batch)
  loss, packed_stats, packed_gradient = run(packed)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
  assert largest > 1e-3
  tiny_model.assert_trees_close(
      packed_gradient, gradient, rtol=1e-4, atol=1e-5 * largest
  )
  mask = np.asarray(stats.token_mask)
  stats_back = packing.put_back(
      layout, jax.tree.map(lambda x: x[None], packed_stats), stats.token_mask
  )
  np.testing.assert_array_equal(stats_back.token_mask, mask)
  for field, values in stats_back._asdict().items():
    for x, alone in zip(
        jax.tree.leaves(values), jax.tree.leaves(getattr(stats, field)),
        strict=True,
    ):
      np.testing.assert_allclose(
          x[mask], alone[mask], rtol=1e-4, atol=1e-5, err_msg=field
      )
  return np.asarray(stats.trust_region)[mask]


# Fast rows stand for the rules; the others wait for a run with slow tests.
_FAST = ('dppo_topk_tv', 'gspo', 'm2po')


@pytest.mark.parametrize('name', [
    name if name in _FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in algorithms.names()
])
def test_packed_sequences_teach_what_they_teach_alone(name):
  region = check_packed(name, objective.Extras())
  row = algorithms.row(name)
  everywhere = {'name': 'none'}, {'name': 'outward'}
  if (row.divergence, row.trust_region) != everywhere and (
      row.anchor == 'behaviour'  # The other stands too near.
  ):
    assert region.min() < 1 and region.max() == 1  # Both are there.


@pytest.mark.parametrize('estimator', [
    'k3', pytest.param('full', marks=pytest.mark.slow)
])
def test_packed_sequences_have_the_extra_terms_they_have_alone(estimator):
  check_packed('dppo_topk_tv', objective.Extras(
      entropy_bonus=0.1, kl_coefficient=0.1, kl_estimator=estimator
  ))
