"""Verifiers, and the processes that run them.

A verifier is `score(completion, answer) -> reward`. It runs on the host between
two calls of the compiled step, so it may be any Python. One that may hang or
crash belongs into worker processes: `Scorer(score, num_workers=8)`.
"""

from collections.abc import Callable
import multiprocessing
import re

import numpy as np

from dppo_jax import registry

ScoreFn = Callable[[str, str], float]

# Bounded, because int() refuses more than 4300 digits with an exception, and a
# policy that repeats itself does write them.
_ANSWER = re.compile(r'####\s*(-?[0-9]{1,1000})\s*\Z')


def answer_after_hashes(completion: str, answer: str) -> float:
  """1 if the completion ends in `#### answer`, compared as integers, else 0.

  Args:
    completion: any text. Nothing but white space may follow the number, so
      `#### 85 or 86` earns nothing; `#### 085` is 85.
    answer: an integer; anything else is a ValueError.
  """
  expected = int(answer)
  match = _ANSWER.search(completion)
  return float(match is not None and int(match[1]) == expected)


def exact(completion: str, answer: str) -> float:
  """1 if completion and answer are equal but for white space around them."""
  return float(completion.strip() == answer.strip())


_SCORERS: dict[str, ScoreFn] = {
  'answer_after_hashes': answer_after_hashes,
  'exact': exact,
}


def names() -> list[str]:
  """The verifiers that have a name."""
  return sorted(_SCORERS)


def scorer(name: str) -> ScoreFn:
  """The verifier called `name`, or a ValueError that suggests one."""
  if name not in _SCORERS:
    raise ValueError(registry.unknown('scorer', name, _SCORERS))
  return _SCORERS[name]


class Scorer:
  """Scores batches, here or in a pool of processes.

  With `num_workers=0` the verifier is called in this process and nothing can
  interrupt it. Otherwise each completion has `timeout_s` of its own, counted
  from when a worker takes it up; then the worker is killed and replaced, the
  reward is 0 and `timeouts` goes up by one. A worker that dies on a completion
  is replaced too, and counted in `crashes`.

  Workers are spawned, never forked: a fork copies the locks of JAX's threads
  but not the threads. So `score` must be picklable, and a script that makes a
  Scorer needs the usual `if __name__ == '__main__':`.
  """

  def __init__(
    self, score: ScoreFn, num_workers: int = 0, timeout_s: float = 10.0
  ):
    if num_workers < 0:
      raise ValueError(f'num_workers={num_workers} must be 0 or more.')
    if timeout_s <= 0:
      raise ValueError(f'timeout_s={timeout_s} must be positive.')
    self.timeouts = 0
    self.crashes = 0
    self._score = score
    self._timeout_s = timeout_s
    self._pool = _make_pool(num_workers) if num_workers else None

  def score(self, completions: list[str], answers: list[str]) -> np.ndarray:
    """Rewards of a batch.

    Args:
      completions: B texts.
      answers: B answers, one for each.

    Returns:
      [B] float32.

    Raises:
      ValueError: lengths differ, or a reward is not finite.
      RuntimeError: the worker died on every completion of the batch.
    """
    if len(completions) != len(answers):
      raise ValueError(
        f'{len(completions)} completions but {len(answers)} answers.'
      )
    pairs = list(zip(completions, answers, strict=True))
    if self._pool is None:
      rewards = [self._score(*pair) for pair in pairs]
    else:
      rewards = self._score_in_pool(pairs)
    rewards = np.array(rewards, np.float32)
    for reward, answer in zip(rewards, answers, strict=True):
      if not np.isfinite(reward):
        raise ValueError(
          f'The reward is {reward} for answer {answer!r}; '
          'a score function must return a finite number.'
        )
    return rewards

  def _score_in_pool(self, pairs: list[tuple[str, str]]) -> list[float]:
    import pebble  # Needed by pools only.

    futures = [
      self._pool.schedule(self._score, args=pair, timeout=self._timeout_s)
      for pair in pairs
    ]
    rewards, crashes = [], 0
    for future in futures:
      try:
        rewards.append(future.result())
      except TimeoutError:
        self.timeouts += 1
        rewards.append(0.0)
      except pebble.ProcessExpired:
        crashes += 1
        rewards.append(0.0)
    self.crashes += crashes
    if crashes and crashes == len(pairs):
      raise RuntimeError(
        f'The verifier killed its process on all {crashes} completions of a '
        'batch. Try num_workers=0 to see why.'
      )
    return rewards

  def close(self) -> None:
    """Ends the workers. Closing twice does nothing."""
    if self._pool is not None:
      self._pool.stop()
      self._pool.join()

  def __enter__(self) -> 'Scorer':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _make_pool(num_workers: int):
  try:
    import pebble  # Needed by pools only.
  except ImportError as error:
    raise ImportError(
      'Scoring in worker processes needs the package pebble; '
      'pip install pebble, or use num_workers=0.'
    ) from error
  return pebble.ProcessPool(
    max_workers=num_workers,
    context=multiprocessing.get_context('spawn'),
    initializer=_stay_off_accelerators,
  )


def _stay_off_accelerators() -> None:
  """A verifier that uses JAX must not claim the memory of the trainer's GPU."""
  import jax

  jax.config.update('jax_platforms', 'cpu')
