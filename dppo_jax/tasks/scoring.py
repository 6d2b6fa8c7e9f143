"""Verifiers, and the processes that run them.

A verifier is `score(completion, answer) -> reward`. It runs on the host between
two calls of the compiled step, so it may be any Python. One that may hang or
crash belongs into worker processes: `Scorer(score, num_workers=8)`.
"""

from collections.abc import Callable
import functools
import importlib.machinery
import multiprocessing
import numbers
import os
import pickle
import re
import sys

from absl import logging
import numpy as np

from dppo_jax import registry
from dppo_jax.tasks import base

ScoreFn = Callable[[str, str], float]

# Bounded, because int() refuses more than 4300 digits with an exception, and a
# policy that repeats itself does write them.
_MAX_DIGITS = 1000
_ANSWER = re.compile(rf'####\s*(-?[0-9]{{1,{_MAX_DIGITS}}})\s*\Z')
# In a row, on all of which the verifier fails in one process and not in others.
_FAILING_BATCHES = 4
# Reward; a larger one is infinite in float32.
_LARGEST = float(np.finfo(np.float32).max)


def answer_after_hashes(completion: str, answer: str) -> float:
  """1 if the completion ends in `#### answer`, compared as integers, else 0.

  Args:
    completion: any text. Nothing but white space may follow the number, so
      `#### 85 or 86` earns nothing; `#### 085` is 85.
    answer: an integer of at most 1,000 digits; anything else is a ValueError.
  """
  digits = answer.strip().lstrip('+-')
  if len(digits) > _MAX_DIGITS and digits.isdigit():
    raise ValueError(
      f'it has {len(digits):,} digits, and of a completion at most '
      f'{_MAX_DIGITS:,} are read'
    )
  expected = int(answer)
  match = _ANSWER.search(completion)
  return float(match is not None and int(match[1]) == expected)


def exact(completion: str, answer: str) -> float:
  """1 if completion and answer are equal but for white space around them."""
  return float(completion.strip() == answer.strip())


def _boxed_math() -> ScoreFn:
  try:
    from dppo_jax.tasks import math_verifier  # Slow to import, and optional.
  except ImportError as error:
    raise ImportError(
      "Scorer 'boxed_math' needs the package math-verify; "
      "pip install 'dppo_jax[verifiers]'."
    ) from error
  return math_verifier.boxed_math


_SCORERS: dict[str, Callable[[], ScoreFn]] = {
  'answer_after_hashes': lambda: answer_after_hashes,
  'boxed_math': _boxed_math,
  'exact': lambda: exact,
}


def names() -> list[str]:
  """The verifiers that have a name."""
  return sorted(_SCORERS)


def scorer(name: str) -> ScoreFn:
  """The verifier called `name`.

  Raises:
    ValueError: there is none; the message suggests one.
    ImportError: it needs a package that is not installed; says which.
  """
  if name not in _SCORERS:
    raise ValueError(registry.unknown('scorer', name, _SCORERS))
  return _SCORERS[name]()


def may_hang(score: ScoreFn) -> bool:
  """Whether what a policy writes can keep this verifier busy for ever.

  A verifier says so by an attribute `may_hang`; it then runs in workers only.
  """
  return getattr(score, 'may_hang', False)


class Scorer:
  """Scores batches, here or in a pool of processes.

  With `num_workers=0` the verifier is called in this process and nothing can
  interrupt it. Otherwise each completion has `timeout_s` of its own, counted
  from when a worker takes it up; then the worker is killed and replaced, the
  reward is 0 and `timeouts` goes up by one. A worker that dies on a completion
  is replaced too, and counted in `crashes`. A verifier that raises, or asks to
  exit, earns 0 in both cases, and is counted in `errors`. The first of each
  kind is logged.

  Workers are spawned, never forked: a fork copies the locks of JAX's threads
  but not the threads. So `score` must be picklable, and a script that makes a
  Scorer needs the usual `if __name__ == '__main__':`.
  """

  def __init__(
    self,
    score: ScoreFn,
    num_workers: int = 0,
    timeout_s: float = 10.0,
    *,
    total: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
  ):
    """Starts the workers.

    Args:
      score: the verifier; a ValueError if workers cannot have it.
      num_workers: see above.
      timeout_s: see above.
      total: adds up counts over the processes of a run, which call `score` at
        the same time, each with its part of a batch.
    """
    if num_workers < 0:
      raise ValueError(f'num_workers={num_workers} must be 0 or more.')
    if timeout_s <= 0:
      raise ValueError(f'timeout_s={timeout_s} must be positive.')
    if may_hang(score) and not num_workers:
      raise ValueError(
        'num_workers=0, but this verifier may hang on what a policy writes; '
        'use workers, for example num_workers=4.'
      )
    self.timeouts = 0
    self.crashes = 0
    self.errors = 0
    self._counted = (0, 0, 0)
    self._last_failure = ''
    self._failing: list[list[str]] = []  # See `_all_fails_here`.
    self._score = score
    self._total = total
    self._timeout_s = timeout_s
    self._pool = _make_pool(num_workers, score) if num_workers else None

  def score(self, completions: list[str], answers: list[str]) -> np.ndarray:
    """Rewards of a batch.

    Args:
      completions: B texts.
      answers: B answers, one for each.

    Returns:
      [B] float32.

    Raises:
      ValueError: lengths differ, a reward is not a finite number, or the
        verifier raised, died or ran out of time on every one of several
        completions; or on all of this process, batch after batch, while it
        does not on others.
    """
    if len(completions) != len(answers):
      raise ValueError(
        f'{len(completions)} completions but {len(answers)} answers.'
      )
    calls = self._calls(list(zip(completions, answers, strict=True)))
    before = self._counts()
    self._last_failure = 'in another process'  # If there is none in this one.
    rewards = [
      self._reward(call, *pair)
      for call, *pair in zip(calls, completions, answers, strict=True)
    ]
    new = [now - then for now, then in zip(self._counts(), before)]
    broken = self._all_fails_here(sum(new), answers)
    *new, count, num_broken, of_broken = self._total(np.array(
      [*new, len(rewards), broken, broken * len(rewards)], np.int32
    )).tolist()
    self.timeouts, self.errors, self.crashes = map(sum, zip(before, new))
    # One alone says little: all others of the batch may have been cut off.
    if sum(new) == count > 1:
      timeouts = new[0]
      raise ValueError(
        f'The verifier of config.task failed on all {count} completions that '
        f'it was shown of a batch; the last time {self._last_failure}. '
        + (
          f'{timeouts} took more than config.scoring.timeout_s='
          f'{self._timeout_s:g} seconds; raise it if the verifier needs more. '
          if timeouts else ''
        )
        + 'Call it by hand on such a completion and answer.'
      )
    # One that raises on most of what it is shown is no fault of a host.
    if 2 * (sum(new) - of_broken) < (count - of_broken) * bool(num_broken):
      last = self._last_failure if broken else 'in another process'
      raise ValueError(
        f'The verifier of config.task fails on all completions of {num_broken} '
        f'of the processes, and not on others; the last time {last}. Call it '
        'by hand on that host: a package or file may be missing there.'
      )
    return np.array(rewards, np.float32)

  def _all_fails_here(self, num_failed: int, answers: list[str]) -> bool:
    """Whether the verifier has failed on all in this process for some time.

    A process may have few completions of a batch, all of a bad row even, so
    batches in a row count, and more than one answer.
    """
    if num_failed < len(answers):
      self._failing = []
    elif answers:
      self._failing = [*self._failing, answers][-_FAILING_BATCHES:]
    different = {answer for batch in self._failing for answer in batch}
    return len(self._failing) == _FAILING_BATCHES and len(different) > 1

  def _calls(
    self, pairs: list[tuple[str, str]]
  ) -> list[Callable[[], float]]:
    """For each completion what returns its reward, or raises."""
    if self._pool is None:
      return [functools.partial(self._score, *pair) for pair in pairs]
    return [
      self._pool.schedule(
        _score_in_worker, args=pair, timeout=self._timeout_s
      ).result
      for pair in pairs
    ]

  def _reward(
    self, call: Callable[[], float], completion: str, answer: str
  ) -> float:
    """One reward; 0 for what goes wrong, which is counted."""
    try:
      reward = call()
    except (Exception, SystemExit) as error:  # An exit would end the run.
      self._count(error, completion, answer)
      return 0.0
    # A scalar of NumPy or JAX is an array, or like one.
    value = reward.item() if getattr(reward, 'shape', None) == () else reward
    if not isinstance(value, numbers.Real) or not (
      abs(float(value)) <= _LARGEST
    ):
      raise ValueError(
        f'The reward is {reward!r} for completion {base.shown(completion)} '
        f'and answer {base.shown(answer)}; the verifier of config.task must '
        'return a number that is finite in float32.'
      )
    return float(value)

  def _count(self, error: BaseException, completion: str, answer: str) -> None:
    kind, what = 'errors', f'it raised {type(error).__name__}: {error}'
    if self._pool is not None:
      import pebble  # Needed by pools only.

      if isinstance(error, TimeoutError):
        kind = 'timeouts'
        what = f'it took more than config.scoring.timeout_s={self._timeout_s:g}'
      elif isinstance(error, pebble.ProcessExpired):
        kind, what = 'crashes', f'its process died ({error})'
    self._last_failure = (
      f'{what}, for completion {base.shown(completion)} and answer '
      f'{base.shown(answer)}'
    )
    if not getattr(self, kind):
      logging.warning(
        'The verifier failed: %s, which earns 0. Further %s are only counted, '
        'in verifier/%s.', self._last_failure, kind, kind,
        exc_info=error if kind == 'errors' else None,
      )
    setattr(self, kind, getattr(self, kind) + 1)

  def take_counts(self) -> dict[str, float]:
    """What went wrong since the last call, as metrics."""
    counts = self._counts()
    new = [now - then for now, then in zip(counts, self._counted)]
    self._counted = counts
    names = ('timeouts', 'errors', 'crashes')
    return {f'verifier/{n}': float(x) for n, x in zip(names, new)}

  def _counts(self) -> tuple[int, int, int]:
    return self.timeouts, self.errors, self.crashes

  def close(self) -> None:
    """Ends the workers. Closing twice does nothing."""
    if self._pool is not None:
      self._pool.stop()
      self._pool.join()

  def __enter__(self) -> 'Scorer':
    return self

  def __exit__(self, *_) -> None:
    self.close()


def _make_pool(num_workers: int, score: ScoreFn):
  try:
    import pebble  # Needed by pools only.
  except ImportError as error:
    raise ImportError(
      'Scoring in worker processes needs the package pebble; '
      "pip install 'dppo_jax[verifiers]', or use num_workers=0."
    ) from error
  if reason := _no_import(score):
    raise ValueError(
      f'config.scoring.num_workers={num_workers}, but a worker cannot import '
      f'the verifier {getattr(score, "__name__", score)!r} by its name '
      f'({reason}). Put it into a module, or a file that holds no config, and '
      'name that in config.task.verifier if the task has it; or use '
      'num_workers=0.'
    )
  return pebble.ProcessPool(
    max_workers=num_workers,
    context=multiprocessing.get_context('spawn'),
    # It goes to a worker once, and not with each completion; what it imports
    # is imported before the time of the first completion counts.
    initializer=_start_worker,
    initargs=(score,),
  )


def _no_import(score: ScoreFn) -> str:
  """Why another process cannot import a verifier; '' if it can."""
  try:
    pickle.dumps(score)
  except Exception as error:  # Of three kinds at least.
    return f'{type(error).__name__}: {error}'
  package = getattr(score, '__module__', '__main__').partition('.')[0]
  # A config file is a module here, under a name that no path has.
  finder = importlib.machinery.PathFinder
  if package != '__main__' and finder.find_spec(package) is None:
    return f'there is no module {package}'
  return ''


class _Worker:
  """What a process of the pool was started with."""

  score: ScoreFn


def _start_worker(score: ScoreFn) -> None:
  """A verifier that uses JAX must not claim the memory of the trainer's GPU."""
  _Worker.score = staticmethod(score)
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if 'jax' in sys.modules:  # Then it has read the variable already.
    sys.modules['jax'].config.update('jax_platforms', 'cpu')


def _score_in_worker(completion: str, answer: str) -> float:
  return _Worker.score(completion, answer)
