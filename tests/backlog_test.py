"""Rollouts come out in the order in which they went in, scored in time."""

import jax.numpy as jnp
import numpy as np
import pytest

from dppo_jax import backlog
from dppo_jax.types import ScoredRollout


class Verifier:
  """Scores a rollout, here a number, by itself; notes when."""

  def __init__(self):
    self.seen = []

  def __call__(self, rollout, batch):
    self.seen.append(rollout)
    rewards = jnp.full(2, rollout, jnp.float32)
    return ScoredRollout(rollout, rewards), [f'{batch}: {rollout}']


@pytest.fixture
def verifier():
  return Verifier()


@pytest.fixture
def queue(verifier):
  return backlog.Backlog(verifier)


@pytest.mark.parametrize('staleness', [0, 1, 3])
def test_a_rollout_is_learned_from_so_many_steps_later(
    queue, verifier, staleness
):
  # As in a run: k + 1 are under way, each step takes one and adds one.
  for sampled in range(staleness + 1):
    queue.push(sampled, 'batch')
  for step in range(8):
    taken = queue.pop()
    assert taken.rollout == step
    np.testing.assert_array_equal(taken.rewards, [step, step])
    queue.push(step + staleness + 1, 'batch')
  queue.score()
  assert verifier.seen == list(range(8 + staleness + 1))  # Each once, in order.


def test_without_staleness_the_learner_waits_for_the_verifier(queue, verifier):
  queue.push(1, 'batch')
  assert verifier.seen == []
  assert queue.pop().rollout == 1
  assert verifier.seen == [1]


def test_with_staleness_the_newest_is_scored_while_the_device_works(
    queue, verifier
):
  queue.push(1, 'batch')
  queue.push(2, 'batch')
  queue.pop()  # Handed to the device, which is at work from here on.
  assert verifier.seen == [1]
  queue.score()
  assert verifier.seen == [1, 2]
  queue.score()  # Nothing waits.
  assert verifier.seen == [1, 2]


def test_the_newest_is_the_one_pushed_last_with_its_texts(queue):
  queue.push(1, 'first')
  queue.push(2, 'second')
  newest = queue.newest()
  assert newest.scored.rollout == 2
  assert (newest.batch, newest.texts) == ('second', ['second: 2'])
  assert queue.pop().rollout == 1  # Looking took nothing away.


def test_its_state_is_everything_under_way_scored_oldest_first(queue, verifier):
  for rollout in (1, 2, 3):
    queue.push(rollout, 'batch')
  saved = queue.get_state()
  assert [scored.rollout for scored in saved] == [1, 2, 3]
  other = backlog.Backlog(verifier)
  other.push(9, 'batch')
  other.set_state(saved)
  other.push(4, 'batch')
  assert [other.pop().rollout for _ in range(4)] == [1, 2, 3, 4]
  assert 9 not in verifier.seen
  assert len(queue.get_state()) == 3  # Reading a state does not change it.


def test_all_that_the_verifier_takes_is_told_once(monkeypatch, queue, verifier):
  clock = iter([10.0, 12.0, 20.0, 23.0])
  monkeypatch.setattr(backlog.time, 'perf_counter', lambda: next(clock))
  queue.push(1, 'batch')
  queue.push(2, 'batch')  # Scores the first.
  queue.score()
  assert queue.take_seconds() == {'time/verifier_s': 5.0}
  queue.score()
  assert queue.take_seconds() == {'time/verifier_s': 0.0}
