"""Whether a run collapsed, and where it ended."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.lib import figures

# Evaluations that are averaged, against the noise of a single one.
WINDOW = 3
# A run that is so far below its best until then has collapsed, even if it
# recovers.
FALL = 0.1
# What a sweep keeps of a run, if it asks for no more.
COLUMNS = {
    'reward': ('reward/mean', np.mean),
    'gap_mean': ('mismatch/prob_gap_mean', np.mean),
    'masked': ('mask/fraction', np.mean),
    'ratio_second_moment': ('ratio/second_moment', np.mean),
}

Curves = Mapping[tuple[str, str], Mapping[str, Mapping[str, np.ndarray]]]


def curves(rows: Sequence[Mapping[str, str]]) -> Curves:
  """{(setting, method): {seed: {column: values by step}}} of rows.

  A value that was not measured, as of the step before the first, is NaN.
  """
  found = collections.defaultdict(lambda: collections.defaultdict(list))
  for row in rows:
    found[row['setting'], row['method']][row['seed']].append(row)
  return {
      key: {
          seed: {
              column: np.array([_number(row[column]) for row in sorted(
                  of_seed, key=lambda row: int(row['step'])
              )])
              for column in of_seed[0]
              if column not in ('setting', 'method', 'seed', 'config')
          }
          for seed, of_seed in sorted(seeds.items())
      }
      for key, seeds in found.items()
  }


def _number(text: str) -> float:
  return float(text) if text else np.nan


def smooth(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
  """Running means of [n], [n - window + 1]."""
  return np.convolve(values, np.ones(window) / window, 'valid')


def outcome(accuracy: np.ndarray) -> dict[str, Any]:
  """How a curve of held-out accuracy goes, by running means."""
  means = smooth(accuracy)
  fall = float(np.max(np.maximum.accumulate(means) - means))
  return {
      'final': float(means[-1]),
      'best': float(means.max()),
      'fall': fall,
      'collapsed': fall > FALL,
  }


def summarize(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
  """{setting: {method: numbers over seeds}}."""
  results = collections.defaultdict(dict)
  for (setting, method), seeds in curves(rows).items():
    ends = [outcome(x['accuracy']) for x in seeds.values()]
    finals = [x['final'] for x in ends]
    results[setting][method] = {
        'seeds': len(ends),
        'collapsed': float(np.mean([x['collapsed'] for x in ends])),
        'final_accuracy': float(np.mean(finals)),
        'final_accuracy_min': min(finals),
        'final_accuracy_max': max(finals),
        'largest_fall': max(x['fall'] for x in ends),
        'largest_loss': max(x['best'] - x['final'] for x in ends),
        'mean_gap': float(np.nanmean(
            [x['gap_mean'][-WINDOW:] for x in seeds.values()]
        )),
    }
  return results


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
  """A table for each setting of what `summarize` returned."""
  parts = []
  for setting, methods in results.items():
    parts.append(f'### {setting}\n\n' + figures.markdown(
        [
            'method', 'collapsed', 'final accuracy (lowest to highest)',
            'largest fall', 'final below best, at most',
            'mean abs(pi - mu) at the end',
        ],
        [
            [
                method,
                f'{x["collapsed"] * x["seeds"]:.0f} of {x["seeds"]}',
                f'{x["final_accuracy"]:.3f} ({x["final_accuracy_min"]:.3f} to '
                f'{x["final_accuracy_max"]:.3f})',
                f'{x["largest_fall"]:.3f}',
                f'{x["largest_loss"]:.3f}',
                f'{x["mean_gap"]:.4f}',
            ]
            for method, x in methods.items()
        ],
    ))
  return '\n\n'.join(parts)
