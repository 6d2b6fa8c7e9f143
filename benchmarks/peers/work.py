"""The step that all three are timed on, in words that none of them owns.

16 prompts of 32 tokens, 8 completions of each, at most 64 tokens; then one
AdamW update of all weights with GRPO's loss, without a reference policy. The
model is a Llama of random float32 weights with tied embeddings. `lengths` says
when completions end: 'fixed' never draws the end token, 'geometric' draws it
with probability 1 / 16 at every position.

Only the standard library and NumPy: every environment has these.
"""

import argparse
from collections.abc import Callable, Iterable
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from typing import Any, NamedTuple

import numpy as np

NUM_PROMPTS, GROUP_SIZE = 16, 8
BATCH = NUM_PROMPTS * GROUP_SIZE
PROMPT_LENGTH, MAX_LENGTH = 32, 64
STOP = {'fixed': 0.0, 'geometric': 1 / 16}
EOS_ID, PAD_ID, FIRST_ID = 1, 0, 2
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-6, 0.01, 1.0


class Size(NamedTuple):
  """Of the model."""

  layers: int
  width: int
  heads: int
  key_heads: int
  inner: int
  vocab: int


SIZES = {
    'tiny': Size(4, 128, 4, 2, 384, 512),
    'small': Size(8, 512, 8, 4, 1408, 8192),
}


class Steps:
  """Whole steps, warm-up included: how long, and what they drew."""

  def __init__(self):
    self._marks = []
    self._lengths = []

  def mark(self) -> None:
    """A step ends here and the next one begins; also before the first."""
    self._marks.append((time.perf_counter(), time.process_time()))

  def drew(self, lengths: Iterable[int]) -> None:
    """Takes the lengths of completions, of a step or of a part of it."""
    self._lengths.extend(lengths)

  def last(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds [S], CPU seconds [S] and lengths [S, B] of so many."""
    seconds, cpu = np.diff(np.array(self._marks), axis=0).T
    lengths = np.reshape(self._lengths, (-1, BATCH))
    assert len(lengths) == len(seconds), (len(lengths), len(seconds))
    return seconds[-count:], cpu[-count:], lengths[-count:]


def parser(doc: str) -> argparse.ArgumentParser:
  """The flags that all three scripts take."""
  flags = argparse.ArgumentParser(
      description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument('--size', choices=SIZES, default='tiny')
  flags.add_argument('--lengths', choices=STOP, default='fixed')
  flags.add_argument(
      '--microbatches', type=integers, default=[8, 16, 32],
      help='Completions of a forward and backward pass, to try one by one.',
  )
  flags.add_argument('--steps', type=int, default=3, help='Timed, of each.')
  flags.add_argument('--warmup', type=int, default=2, help='Before, of each.')
  flags.add_argument('--seed', type=int, default=0, help='Of what is drawn.')
  flags.add_argument('--output', help='File of the result, JSON.')
  return flags


def integers(text: str) -> list[int]:
  """'8,16' -> [8, 16]."""
  return [int(x) for x in text.split(',')]


def make_prompts(vocab: int, num_prompts: int = NUM_PROMPTS) -> np.ndarray:
  """Random tokens, [N, P] int32."""
  rng = np.random.RandomState(0)
  return rng.randint(FIRST_ID, vocab, (num_prompts, PROMPT_LENGTH), np.int32)


def reward(tokens: np.ndarray) -> float:
  """The share of even tokens: cheap, and different within a group."""
  return float(np.sum(np.asarray(tokens) % 2 == 0)) / max(len(tokens), 1)


def spread(values: np.ndarray) -> dict[str, float]:
  """Median, smallest and largest."""
  fns = {'median': np.median, 'min': np.min, 'max': np.max}
  return {name: float(f'{fn(values):.4g}') for name, fn in fns.items()}


def measure(
    name: str,
    args: argparse.Namespace,
    settings: list[dict[str, Any]],
    run: Callable[..., Steps],
    packages: tuple[str, ...],
) -> None:
  """Times every setting and prints the result as one line of JSON.

  Args:
    name: whose step it is.
    args: of `parser`.
    settings: options of `run`, each with a `microbatch`.
    run: `(args, **setting)` to steps, the warm-up first.
    packages: whose versions belong to the result.
  """
  rows = []
  for setting in settings:
    seconds, cpu_seconds, lengths = run(args, **setting).last(args.steps)
    check_lengths(lengths, args.lengths)
    rows.append({
        **setting,
        'step_s': spread(seconds),
        'cpu_s': spread(cpu_seconds),
        'mean_length': round(float(lengths.mean()), 2),
    })
    print(name, args.size, args.lengths, rows[-1], flush=True)
  result = {
      'name': name,
      'size': args.size,
      'lengths': args.lengths,
      'rows': rows,
      'best': min(rows, key=lambda row: row['step_s']['median']),
      'load_average': round(os.getloadavg()[0], 2),
      'python': platform.python_version(),
      'versions': {x: importlib.metadata.version(x) for x in packages},
  }
  if args.output:
    path = pathlib.Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result), flush=True)


def check_lengths(lengths: np.ndarray, kind: str) -> None:
  """Refuses a run whose completions were not as long as they should be."""
  assert lengths.shape[1:] == (BATCH,), lengths.shape
  assert lengths.min() >= 1 and lengths.max() <= MAX_LENGTH, lengths
  stop = STOP[kind]
  # Of a geometric length that is cut: sum over n < C of (1 - stop)^n.
  expected = sum((1 - stop) ** n for n in range(MAX_LENGTH))
  # Five standard errors; a geometric length spreads about as wide as its mean.
  room = 5 * expected / np.sqrt(lengths.size) if stop else 0
  if abs(lengths.mean() - expected) > room:
    raise ValueError(
        f'{kind} completions have {lengths.mean():.2f} tokens on average, not '
        f'{expected:.2f}: this is not the work that was agreed on.'
    )
