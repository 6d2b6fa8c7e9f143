"""The buffer by itself, and in the compiled step of a table of logits.

S slots, N groups of G rows, T tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import table_model
import tiny_model

from dppo_jax import algorithms
from dppo_jax import diagnostics
from dppo_jax import duals
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import replay
from dppo_jax import shaping
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState

N, G, T, V = 4, 2, 3, 8
ROWS = N * G
SPREAD = np.tile([1.0, 0.0], N)

close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


# --- the buffer by itself ----------------------------------------------------


def scored_of(number, version=0, rewards=SPREAD):
  """The rollout of that number: row i holds tokens 100 * number + i."""
  ids = 100 * number + jnp.arange(ROWS)
  tokens = jnp.broadcast_to(ids[:, None], (ROWS, T + 1)).astype(jnp.int32)
  rollout = Rollout(
      tokens=tokens,
      segment_ids=jnp.ones_like(tokens),
      positions=jnp.zeros_like(tokens),
      token_mask=jnp.ones((ROWS, T), bool),
      behaviour_logprobs=-jnp.ones((ROWS, T)),
      record=(),
      policy_version=jnp.full(ROWS, version, jnp.int32),
      truncated=jnp.zeros(ROWS, bool),
  )
  return ScoredRollout(rollout, jnp.asarray(rewards, jnp.float32))


def make_replay(**options):
  return replay.make_replay(**{
      'capacity': 3,
      'num_groups': 3,
      'group_size': G,
      'sampling': 'uniform',
      'max_age': 10**6,
      'num_updates': 1,
      'logprobs_fn': None,
      'shaping_fn': shaping.build('unshaped'),
      **options,
  })


def state_at(version, params=None):
  """Only what the buffer looks at."""
  nothing = dict.fromkeys(TrainState._fields, ())
  return TrainState(**nothing | {
      'policy_version': jnp.int32(version), 'params': params
  })


def filled(buffers, *pushed):
  """A buffer after these were pushed."""
  buffer = buffers.init(pushed[0])
  for scored in pushed:
    buffer = buffers.push(buffer, scored)
  return buffer


def replayed_rows(mixed):
  """Ids of the replayed rows that count. [R * G], -1 where none does."""
  ids = mixed.rollout.tokens[ROWS:, 0]
  return np.where(mixed.rollout.token_mask[ROWS:, 0], ids, -1)


def groups_of(mixed):
  """(number, group) of what was replayed, in order."""
  ids = replayed_rows(mixed).reshape(-1, G)
  return [divmod(int(i), 100) for i in ids[:, 0] if i >= 0]


def test_without_capacity_there_is_no_buffer():
  assert make_replay(capacity=0) is None
  with pytest.raises(ValueError, match="'resent'. Did you mean 'recent'"):
    make_replay(sampling='resent')


def test_a_push_overwrites_the_oldest():
  buffers = make_replay()
  buffer = buffers.init(scored_of(0))
  held = []
  for number in range(5):
    buffer = buffers.push(buffer, scored_of(number, version=number))
    held.append(buffer.scored.rollout.tokens[:, 0, 0] // 100)
  np.testing.assert_array_equal(
      held, [[0, 0, 0], [0, 1, 0], [0, 1, 2], [3, 1, 2], [3, 4, 2]]
  )
  np.testing.assert_array_equal(
      buffer.scored.rollout.policy_version[:, 0], [3, 4, 2]
  )
  assert int(buffer.num_pushed) == 5


def test_an_empty_buffer_replays_rows_in_which_nothing_counts():
  buffers = make_replay()
  fresh = scored_of(7)
  mixed, metrics = tiny_model.jit(buffers.mix)(
      buffers.init(fresh), fresh, state_at(0), jax.random.key(0)
  )
  assert mixed.rewards.shape == (ROWS + 3 * G,)
  assert not mixed.rollout.token_mask[ROWS:].any()
  assert not mixed.rewards[ROWS:].any()
  assert mixed.replayed.tolist() == [False] * ROWS + [True] * 3 * G
  for name in ('groups', 'tokens', 'age_mean', 'age_max', 'slots_filled'):
    assert metrics[f'replay/{name}'] == 0
  # The fresh ones stay in front and as they were.
  first = jax.tree.map(lambda x: x[:ROWS], mixed)._replace(replayed=())
  tiny_model.assert_trees_equal(first, fresh)


def test_groups_stay_whole_and_keep_what_belongs_to_them():
  # Rewards differ from group to group: (0, 1), (2, 3), ...
  buffers = make_replay(num_groups=5)
  buffer = filled(buffers, *(
      scored_of(i, version=i, rewards=np.arange(ROWS) + 10 * i)
      for i in range(3)
  ))
  mixed, metrics = tiny_model.jit(buffers.mix)(
      buffer, scored_of(9), state_at(4), jax.random.key(1)
  )
  rows = replayed_rows(mixed).reshape(-1, G)
  assert np.all(rows[:, 0] % G == 0) and np.all(rows[:, 1] == rows[:, 0] + 1)
  numbers, places = np.divmod(rows.ravel(), 100)
  np.testing.assert_array_equal(mixed.rewards[ROWS:], 10 * numbers + places)
  versions = mixed.rollout.policy_version[ROWS:]
  np.testing.assert_array_equal(versions, numbers)
  assert len(set(groups_of(mixed))) == 5  # Without replacement.
  close(metrics['replay/age_mean'], np.mean(4 - numbers))
  assert metrics['replay/age_max'] == np.max(4 - numbers)
  assert metrics['replay/groups'] == 5
  assert metrics['replay/tokens'] == 5 * G * T
  assert metrics['replay/slots_filled'] == 3


def test_only_groups_with_spread_are_replayed():
  rewards = [1, 1, 0, 1, 0, 0, 1, 0]
  buffers = make_replay(capacity=1)
  buffer = filled(buffers, scored_of(0, rewards=rewards))
  mix = tiny_model.jit(buffers.mix)
  for seed in range(5):
    mixed, metrics = mix(
        buffer, scored_of(1), state_at(0), jax.random.key(seed)
    )
    assert sorted(groups_of(mixed)) == [(0, 2), (0, 6)]
    assert metrics['replay/groups'] == 2  # Three were asked for.
    assert not mixed.rewards[ROWS + 2 * G:].any()


def test_spread_of_replayed_groups_is_that_of_their_shaped_rewards():
  # Of four groups of equal rewards, one has completions of two lengths.
  scored = scored_of(0, rewards=[1] * ROWS)
  mask = scored.rollout.token_mask.at[2, 1:].set(False)
  scored = scored._replace(rollout=scored.rollout._replace(token_mask=mask))
  for name, options, expected in (
      ('unshaped', {}, []), ('overlong', {'horizon': T, 'buffer': 1}, [(0, 2)]),
  ):
    buffers = make_replay(
        capacity=1, shaping_fn=shaping.build(name, **options)
    )
    mixed, metrics = tiny_model.jit(buffers.mix)(
        filled(buffers, scored), scored_of(1), state_at(0), jax.random.key(0)
    )
    assert metrics['replay/groups'] == len(expected)
    assert groups_of(mixed) == expected


def many_draws(buffers, buffer, state, count):
  """Ids of the replayed rows of `count` draws. [count, R * G]."""
  fresh = scored_of(99)

  def draw(key):
    mixed, _ = buffers.mix(buffer, fresh, state, key)
    return jnp.where(
        mixed.rollout.token_mask[ROWS:, 0], mixed.rollout.tokens[ROWS:, 0], -1
    )

  keys = jax.random.split(jax.random.key(0), count)
  return np.asarray(jax.jit(jax.vmap(draw))(keys))


def test_uniform_draws_every_group_equally_often():
  # 3 of 12 groups, 600 times: 150 each, +- 4 sqrt(600 * .25 * .75) = 42.
  buffers = make_replay()
  buffer = filled(buffers, scored_of(0), scored_of(1), scored_of(2))
  ids = many_draws(buffers, buffer, state_at(0), 600)[:, ::G]
  assert all(len(set(row)) == 3 for row in ids)
  _, counts = np.unique(ids, return_counts=True)
  assert len(counts) == 12 and np.all(np.abs(counts - 150) < 42)


def test_recent_draws_the_latest_rollouts_first():
  # Four of the latest, in slot 0, then two of the one before, in slot 2.
  buffers = make_replay(num_groups=6, sampling='recent')
  buffer = filled(buffers, *(scored_of(i) for i in range(4)))
  ids = many_draws(buffers, buffer, state_at(0), 20)
  np.testing.assert_array_equal(ids // 100, [[3] * 4 * G + [2] * 2 * G] * 20)
  assert len({tuple(row) for row in ids}) > 1  # In any order among equals.


def test_ess_draws_the_groups_with_the_largest_effective_samples():
  # The policy has moved the first row of group g of rollout i by steps[i, g].
  steps = np.asarray([[0.3, 2.0, 0.1, 1.0], [0.0, 3.0, 0.5, 0.2]])

  def logprobs_fn(params, rollout):
    number, row = jnp.divmod(rollout.tokens[:, 0], 100)
    moved = jnp.where(row % G == 0, params[number, row // G], 0.0)
    return rollout.behaviour_logprobs + moved[:, None]

  buffers = make_replay(
      capacity=2, num_groups=4, sampling='ess', logprobs_fn=logprobs_fn
  )
  buffer = filled(buffers, scored_of(0), scored_of(1))
  # Twice four are all eight, so chance has no say.
  mixed, _ = tiny_model.jit(buffers.mix)(
      buffer, scored_of(9), state_at(0, jnp.asarray(steps)), jax.random.key(0)
  )
  assert groups_of(mixed) == [(1, 0), (0, 4), (1, 6), (0, 0)]


def test_ess_takes_what_may_be_drawn_before_what_may_not():
  buffers = make_replay(
      capacity=2, num_groups=4, sampling='ess',
      logprobs_fn=lambda params, rollout: rollout.behaviour_logprobs,
  )
  rewards = [1, 0, 1, 1, 0, 0, 0, 1]
  buffer = filled(buffers, scored_of(0, rewards=rewards))
  mixed, metrics = tiny_model.jit(buffers.mix)(
      buffer, scored_of(9), state_at(0), jax.random.key(0)
  )
  assert sorted(groups_of(mixed)) == [(0, 0), (0, 6)]
  assert metrics['replay/groups'] == 2


def test_effective_sample_size_by_hand():
  nan = np.nan
  ratios = np.asarray([
      # r 1 1 | 1 3: 6^2 / (4 * 12).
      [1, 1], [1, 3],
      # All 5: a factor cancels.
      [5, 5], [5, 5],
      # r 1 3, the others padding: 4^2 / (2 * 10).
      [1, nan], [nan, 3],
      # One of e^200 e^0 e^0 e^0: 1 / 4.
      [np.exp(200), 1], [1, 1],
      [nan, nan], [nan, nan],
  ])
  mask = ~np.isnan(ratios)
  rollout = Rollout(**dict.fromkeys(Rollout._fields, ()))._replace(
      token_mask=jnp.asarray(mask),
      behaviour_logprobs=jnp.where(mask, -1.0, np.nan),
  )
  got = replay.effective_sample_size(
      logprobs=jnp.asarray(np.log(ratios) - 1, jnp.float32),
      rollout=rollout,
      group_size=2,
  )
  close(got, [0.75, 1, 0.8, 0.25, 0])


@pytest.mark.parametrize('sampling', replay.SAMPLING)
def test_no_update_of_a_long_run_sees_an_age_above_the_maximum(sampling):
  # Two updates a step, now and then skipped; rollouts wait one step.
  max_age, num_updates = 9, 2
  buffers = make_replay(
      capacity=6, num_groups=8, sampling=sampling, max_age=max_age,
      num_updates=num_updates,
      logprobs_fn=lambda params, rollout: rollout.behaviour_logprobs,
  )

  def step(carry, inputs):
    buffer, version, waiting = carry
    number, applied, key = inputs
    key_rewards, key_mix = jax.random.split(key)
    rewards = jax.random.bernoulli(key_rewards, 0.5, (ROWS,))
    scored = scored_of(number, rewards=rewards)
    versions = jnp.full(ROWS, waiting, jnp.int32)
    scored = scored._replace(
        rollout=scored.rollout._replace(policy_version=versions)
    )
    state = state_at(0)._replace(policy_version=version)
    mixed, metrics = buffers.mix(buffer, scored, state, key_mix)
    last = version + num_updates - 1 - mixed.rollout.policy_version[ROWS:]
    used = mixed.rollout.token_mask[ROWS:].any(1)
    seen = jnp.max(jnp.where(used, last, -1))
    buffer = buffers.push(buffer, scored)
    return (buffer, version + applied, version), (
        seen, metrics['replay/age_max'], metrics['replay/groups']
    )

  steps = 300
  rng = np.random.RandomState(0)
  inputs = (
      jnp.arange(steps),
      jnp.asarray(rng.choice([0, 1, 2, 2, 2], steps), jnp.int32),
      jax.random.split(jax.random.key(0), steps),
  )
  start = buffers.init(scored_of(0)), jnp.int32(0), jnp.int32(0)
  _, (seen, age_max, groups) = jax.jit(
      lambda: jax.lax.scan(step, start, inputs)
  )()
  assert np.max(seen) == max_age  # Reached and never passed.
  assert np.max(age_max) == max_age - num_updates + 1
  assert groups[0] == 0 and np.mean(groups) > 2
  assert np.min(groups) < 8  # Sometimes fewer may be drawn than asked for.


def test_shares_of_what_was_replayed_by_hand():
  # Two rows, the second from the buffer; the last token was not sampled.
  nothing = jnp.zeros((1, 2, 3))
  stats = diagnostics.TokenStats(**{
      name: nothing for name in diagnostics.TokenStats._fields
  } | {
      'token_mask': jnp.asarray([[[1, 1, 1], [1, 1, 0]]], bool),
      'replayed': jnp.asarray([[[0, 0, 0], [1, 1, 1]]], bool),
      'gradient_weight': jnp.asarray([[[1.0, 0, 2], [3, 1, 7]]]),
      'weights': jnp.asarray([[[0.2, 0.2, 0.3], [0.1, 0.4, 0.9]]]),
      'age': jnp.zeros((1, 2, 3), jnp.int32),
      'targets': jnp.zeros((1, 2, 3), jnp.int32),
      'constraint': (),
      'router': diagnostics.Router(),
      'own': (),
  })
  metrics = tiny_model.jit(
      functools.partial(diagnostics.token_metrics, threshold=0.1)
  )(stats)
  close(metrics['replay/token_share'], 2 / 5)
  # .2 + .6 of the fresh row, .3 + .4 of the other.
  close(metrics['replay/gradient_share'], 0.7 / 1.5)


# --- in the compiled step ----------------------------------------------------


class Run:
  """A step of a table of logits that learns by a row of the table."""

  def __init__(
      self, name, *, dual=None, optimizer=None, num_minibatches=2,
      normalizer=None, **settings,
  ):
    options = tiny_model.row_options(name, group_size=G, horizon=T)
    divergence = options.pop('divergence')
    if normalizer:
      options['normalizer'] = normalizers.build(normalizer)
    options['dual'] = dual or options['dual']
    optimizer = optimizer or tiny_model.sgd(10.0)
    self.rollout_fn = table_model.make_rollout_fn(
        divergence, num_rows=ROWS, length=T, vocabulary=V
    )
    self.replay = make_replay(
        num_updates=num_minibatches,
        logprobs_fn=objective.make_logprobs_fn(
            model=table_model.MODEL, num_parts=1, temperature=1.0, chunk_size=0
        ),
        **settings,
    )
    self.mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
    params = jax.random.normal(jax.random.key(3), (ROWS * T, V))
    make = lambda: train_step.init_state(
        jnp.copy(params), optimizer, jax.random.key(0), dual=options['dual']
    )
    self.blank = train_step.blank(self.rollout_fn, make(), ())
    replayed = () if self.replay is None else self.replay.init(self.blank)
    self.make_state = lambda: make()._replace(
        replay=jax.tree.map(jnp.copy, replayed)
    )
    self.shardings = train_step.state_shardings(self.make_state(), self.mesh)
    self.step = train_step.make_train_step(
        learn=tiny_model.make_learner(
            divergence, model=table_model.MODEL, group_size=G,
            optimizer=optimizer, num_minibatches=num_minibatches, **options,
        ),
        rollout_fn=self.rollout_fn,
        threshold=divergence.threshold,
        group_size=G,
        vocab_size=V,
        state_shardings=self.shardings,
        mesh=self.mesh,
        replay=self.replay,
    )

  def __call__(self, num_steps, state=None, pending=None):
    """State, what waits, and the metrics of each step that learned."""
    first = state is None
    state = jax.device_put(
        self.make_state() if first else state, self.shardings
    )
    pending = self.blank if first else pending
    rows = []
    with tiny_model.quick_compilation():
      for _ in range(num_steps + first):
        pending = jax.device_put(pending, sharding.batch(self.mesh))
        state, rollout, metrics = self.step(state, pending, ())
        rewards = np.asarray(rollout.tokens[:, 1] % 2 == 0, np.float32)
        pending = ScoredRollout(rollout, jnp.asarray(rewards))
        rows.append({k: np.asarray(v) for k, v in metrics.items()})
    return state, pending, rows[first:]


@pytest.fixture(scope='module')
def by_age():
  """R2VPO with a multiplier for each age, and what eight steps of it gave."""
  run = Run(
      'r2vpo', capacity=2, max_age=6,
      dual=duals.build('projected_ascent', by_age=True),
  )
  return run, run(8)


ROW_NAMES = ('grpo', 'cispo', 'dppo_binary_tv', 'r2vpo')


@pytest.mark.parametrize('name', ROW_NAMES)
def test_every_kind_of_row_learns_from_the_same_stale_data(name, by_age):
  if name == 'r2vpo':
    run, (state, _, rows) = by_age
  else:
    sampling = {'grpo': 'uniform', 'cispo': 'recent', 'dppo_binary_tv': 'ess'}
    # ESS looks at twice as many as it takes.
    run = Run(name, capacity=2, max_age=6, sampling=sampling[name])
    state, _, rows = run(4)
  assert run.step._cache_size() == 1  # Empty, filling and full.
  filled_slots = [int(row['replay/slots_filled']) for row in rows]
  assert filled_slots[:4] == [0, 1, 2, 2]
  assert rows[0]['replay/groups'] == 0 == rows[0]['replay/gradient_share']
  for row in rows[1:]:
    assert 1 <= row['replay/groups'] <= 3
    assert row['replay/tokens'] == row['replay/groups'] * G * T
    # Beside them, all of the fresh ones.
    share = row['replay/tokens'] / (row['replay/tokens'] + ROWS * T)
    close(row['replay/token_share'], share)
    assert 0 < row['replay/gradient_share'] < 1
    # Two updates a step, so 2 or 4 at its start and one more at its end.
    assert 2 <= row['replay/age_mean'] <= row['replay/age_max'] <= 5
    assert row['policy/age_max'] == 0  # Of what is fresh.
    assert all(np.isfinite(x).all() for x in row.values())
  assert not jnp.array_equal(state.params, run.make_state().params)
  assert algorithms.row(name).dual['name'] == 'none' or state.dual


def test_the_buffer_holds_the_last_rollouts_as_they_were_learned_from(by_age):
  run, _ = by_age
  state, pending, _ = run(2)
  kept = []
  for _ in range(3):
    kept.append(jax.device_get(pending))
    state, pending, _ = run(1, state, pending)
  slots = jax.device_get(state.replay.scored)
  # Rollouts 2 3 4 of steps 3 4 5: slots 0 1 0.
  tiny_model.assert_trees_equal(jax.tree.map(lambda x: x[0], slots), kept[2])
  tiny_model.assert_trees_equal(jax.tree.map(lambda x: x[1], slots), kept[1])


def test_a_multiplier_for_each_age_rises_where_data_of_that_age_have_moved(
    by_age,
):
  _, (state, _, rows) = by_age
  assert state.dual.multiplier.shape == (8,)
  # Ages 0 to 5 are seen: fresh data at 0 and 1, replayed ones from 2 on.
  unmoved = np.full(4, 0.04, np.float32)
  np.testing.assert_array_equal(state.dual.multiplier[4:], unmoved)
  # At age 0 every ratio is 1: nothing is violated.
  assert state.dual.multiplier[0] < 0.04 < state.dual.multiplier[3]
  for row in rows:
    known = {k: v for k, v in row.items() if k.endswith('/multiplier')}
    assert len(known) == 8 + 1  # And their mean.
    assert {'constraint/violation', 'constraint/value',
            'constraint/beyond_turning_point'} <= set(row)
  assert rows[0]['dual/multiplier'] <= 0.04


def test_an_empty_buffer_teaches_what_no_buffer_does():
  # One mini-batch of a token mean: silent rows have no weight.
  options = {'num_minibatches': 1, 'normalizer': 'token_mean'}
  with_buffer, without = (
      Run('r2vpo', capacity=capacity, **options) for capacity in (2, 0)
  )
  assert without.replay is None and without.make_state().replay == ()
  (state, _, rows), (other, _, others) = with_buffer(1), without(1)
  close(state.params, other.params, atol=1e-6)
  assert not jnp.array_equal(other.params, without.make_state().params)
  close(state.dual.multiplier, other.dual.multiplier)
  # What a buffer adds to the metrics, and nothing else.
  assert {k for k in rows[0] if k not in others[0]} == {
      k for k in rows[0] if k.startswith('replay/')
  }
