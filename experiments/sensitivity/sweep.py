"""Runs every divergence with several thresholds; see README.md.

    python experiments/sensitivity/sweep.py

Results go to `runs.csv` and `runs.json`. Thresholds and seeds of a divergence
share a program.
"""

import pathlib
import sys

from absl import app

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import stability
from experiments.lib import sweep

HERE = pathlib.Path(__file__).parent

# The middle one is the paper's where it has one (App. F.3 and F.4).
THRESHOLDS = {
    'dppo_binary_tv': (0.05, 0.15, 0.2, 0.4),
    'dppo_binary_kl': (0.01, 0.05, 0.1, 0.3),
    'dppo_topk_tv': (0.05, 0.15, 0.2, 0.4),
    'dppo_topk_kl': (0.01, 0.05, 0.1, 0.3),
    'dppo_full_tv': (0.05, 0.15, 0.2, 0.4),
    'dppo_full_kl': (0.01, 0.05, 0.1, 0.3),
    'predictive_kl': (0.01, 0.05, 0.1, 0.3),
    'grpo': (0.1, 0.2, 0.4, 0.8),
}
LIMITS = (0.002, 0.01, 0.05)


def _methods():
  methods = {
      f'{algorithm} {threshold}': sweep.Method(
          algorithm, {'divergence__threshold': threshold}
      )
      for algorithm, thresholds in THRESHOLDS.items()
      for threshold in thresholds
  }
  return methods | {
      f'r2vpo {limit}': sweep.Method('r2vpo', {'dual__limit': limit})
      for limit in LIMITS
  }


SWEEP = sweep.Sweep(
    HERE,
    {'4 epochs': sweep.BINDING},
    _methods(),
    stability.COLUMNS,
    stability.summarize,
)

if __name__ == '__main__':
  app.run(lambda _: sweep.run(SWEEP))
