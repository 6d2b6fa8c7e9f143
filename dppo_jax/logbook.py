"""From the arrays of a step to what is written down about it.

The compiled step learns and samples in one program, so nobody can stop a watch
between the two. What sampling costs is measured before training, by a call that
only samples, per decode step; of each later call, decode steps times that is
counted as sampling and the rest as learning. Two programs on devices of their
own work at the same time: then learning is what the loop waited for it.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np

from dppo_jax.metrics import MetricsWriter

_NUM_SAMPLES = 8
_NUM_MASKED_TOKENS = 50


class Logbook:
  """Writes a step down while the device works on the next one."""

  def __init__(
      self,
      writer: MetricsWriter,
      *,
      vocab_size: int,
      seconds_per_decode_step: float,
      overlapping: bool = False,
  ):
    """Makes an empty one.

    Args:
      writer: of the run.
      vocab_size: V.
      seconds_per_decode_step: what sampling alone takes.
      overlapping: whether it goes on while the next step learns.
    """
    self._overlapping = overlapping
    self._writer = writer
    self._seconds_per_decode_step = seconds_per_decode_step
    self._masked = np.zeros((2, vocab_size), np.int64)
    self._scatter = np.zeros((0, 4), np.float32)
    self._waiting: dict[int, dict[str, float]] = {}
    # Step -> decode steps, which may not be there yet, and seconds.
    self._sampling: dict[int, tuple[jax.Array, float]] = {}

  def add(
      self,
      step: int,
      metrics: dict[str, jax.Array],
      *,
      device_s: float,
      score_s: float,
  ) -> dict[str, float]:
    """Takes a step's metrics, on the device or not, and its times.

    Args:
      step: number of the step.
      metrics: what `train_step` returned.
      device_s: seconds of the compiled call.
      score_s: seconds of decoding text and verifying it.

    Returns:
      its scalars, as they will be written but for those of sampling, which may
      still go on.
    """
    metrics = dict(metrics)
    self._sampling[step] = metrics.pop('sample/decode_steps'), device_s
    metrics = jax.device_get(metrics)
    self._masked += metrics.pop('masked_tokens')
    self._scatter = metrics.pop('scatter')
    scalars = {
        name: float(value)
        for name, value in metrics.items()
        if not _of_no_tokens(name, metrics)
    }
    scalars |= {
        'time/step_s': device_s + score_s,
        'time/score_s': score_s,
        'tokens/s': scalars['tokens/sampled'] / (device_s + score_s),
    }
    self.add_scalars(step, scalars)
    return scalars

  def add_scalars(self, step: int, scalars: dict[str, float]) -> None:
    """Takes scalars that are on the host; a step is one line in the end."""
    self._waiting.setdefault(step, {}).update(scalars)

  def flush(self) -> None:
    """Writes what was added since the last call; waits for its sampling."""
    for step, sampling in self._sampling.items():
      self.add_scalars(step, self._of_sampling(*sampling))
    self._sampling.clear()
    for step, scalars in self._waiting.items():
      self._writer.write(step, scalars)
    self._waiting.clear()

  def _of_sampling(self, decode_steps, device_s: float) -> dict[str, float]:
    decode_steps = float(decode_steps)
    sample_s = self._seconds_per_decode_step * decode_steps
    if self._overlapping:
      learn_s = device_s
    else:
      sample_s = min(device_s, sample_s)
      learn_s = device_s - sample_s
    return {
        'sample/decode_steps': decode_steps,
        'time/learn_s': learn_s,
        'time/sample_s': sample_s,
    }

  def add_samples(
      self, step: int, split: str, *, prompts, completions, answers, rewards
  ) -> None:
    """Writes some completions down, from different prompts where possible."""
    stride = max(1, len(completions) // _NUM_SAMPLES)
    columns = (prompts, completions, answers, rewards)
    rows = list(zip(*(column[::stride] for column in columns), strict=True))
    self._writer.write_samples(step, [
        {
            'split': split,
            'prompt': prompt,
            'completion': completion,
            'answer': answer,
            'reward': float(reward),
        }
        for prompt, completion, answer, reward in rows[:_NUM_SAMPLES]
    ])

  def get_state(self) -> dict[str, Any]:
    """What a resumed run must know; goes through JSON."""
    return {
        sign: {str(i): int(row[i]) for i in np.flatnonzero(row)}
        for sign, row in zip(('positive', 'negative'), self._masked)
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Takes back what `get_state` returned."""
    for sign, row in zip(('positive', 'negative'), self._masked):
      row[:] = 0
      for token, count in state[sign].items():
        row[int(token)] = count

  def write_scatter(self, path: pathlib.Path) -> None:
    """Rows [mu, ratio, |pi - mu|, dropped] of the last step's tokens."""
    path.write_text(json.dumps(np.round(self._scatter, 6).tolist()) + '\n')

  def write_masked_tokens(self, path: pathlib.Path, tokenizer: Any) -> None:
    """The most frequently masked tokens as text, by sign of the advantage."""
    most_frequent = {}
    for sign, row in zip(('positive', 'negative'), self._masked):
      ids = np.argsort(-row, kind='stable')[:_NUM_MASKED_TOKENS]
      most_frequent[sign] = [
          [tokenizer.decode([i]), int(row[i])] for i in ids if row[i]
      ]
    path.write_text(json.dumps(most_frequent, indent=2) + '\n')


def _of_no_tokens(name: str, metrics: dict[str, Any]) -> bool:
  """Whether a metric is about tokens of an age that no token has."""
  group, _, age = name.rpartition('/')[0].partition('/')
  return group == 'by_age' and not metrics[f'by_age/{age}/tokens']
