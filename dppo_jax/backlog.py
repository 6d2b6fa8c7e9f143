"""Rollouts on their way from the sampler to the learner, oldest first.

With a staleness of k steps, k + 1 of them are under way, so each is learned
from k steps later than it could be. From k = 1 on, the host scores the newest
one while the device learns from an older one.
"""

import collections
from collections.abc import Callable, Sequence
import time
from typing import Any, NamedTuple

import jax

from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout


class Scored(NamedTuple):
  """A rollout that the verifier has seen, and its texts."""

  batch: Any  # Its `PromptBatch`.
  texts: list[str]
  scored: ScoredRollout


class Backlog:
  """A queue that scores what waits in it."""

  def __init__(
      self, score: Callable[[Rollout, Any], tuple[ScoredRollout, list[str]]]
  ):
    """Makes an empty one; `score(rollout, batch)` is the verifier."""
    self._score = score
    self._ready: collections.deque[ScoredRollout] = collections.deque()
    self._waiting: tuple[Rollout, Any] | None = None
    self._newest: Scored | None = None
    self._seconds = 0.0

  def push(self, rollout: Rollout, batch: Any) -> None:
    """Takes a rollout that is not scored yet."""
    self.score()
    self._waiting = (rollout, batch)

  def pop(self) -> ScoredRollout:
    """Hands out the oldest rollout."""
    if not self._ready:
      self.score()
    return self._ready.popleft()

  def score(self) -> None:
    """Scores the rollout that waits, if one does."""
    if self._waiting is None:
      return
    rollout, batch = self._waiting
    self._waiting = None
    jax.block_until_ready(rollout)
    start = time.perf_counter()
    scored, texts = self._score(rollout, batch)
    self._seconds += time.perf_counter() - start
    self._newest = Scored(batch, texts, scored)
    self._ready.append(scored)

  def newest(self) -> Scored:
    """The rollout that was pushed last."""
    self.score()
    return self._newest

  def take_seconds(self) -> dict[str, float]:
    """Spent on scoring since the last call, as a metric."""
    seconds, self._seconds = self._seconds, 0.0
    return {'time/verifier_s': seconds}

  def get_state(self) -> list[ScoredRollout]:
    """Everything under way, scored, oldest first."""
    self.score()
    return list(self._ready)

  def set_state(self, ready: Sequence[ScoredRollout]) -> None:
    """Takes back what `get_state` returned."""
    self._waiting = None
    self._ready = collections.deque(ready)
