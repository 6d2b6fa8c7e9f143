"""Runs every trust region on rollouts of several ages; see README.md.

    python experiments/staleness/sweep.py

Results go to `runs.csv` and `runs.json`. What is in the file is not run again.
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

# Steps between sampling and learning, of 4 updates each.
AGES = (0, 4, 16, 32)
METHODS = {
    'PG-IS': sweep.Method('pg_is'),
    'GRPO': sweep.Method('grpo'),
    'GRPO clip-higher': sweep.Method('grpo_clip_higher'),
    'DPPO binary TV': sweep.Method('dppo_binary_tv'),
    'DPPO binary KL': sweep.Method('dppo_binary_kl'),
    'DPPO top-K TV': sweep.Method('dppo_topk_tv'),
    'DPPO top-K KL': sweep.Method('dppo_topk_kl'),
    'R2VPO': sweep.Method('r2vpo'),
    # The limit that is best in ../sensitivity.
    'R2VPO, limit 0.05': sweep.Method('r2vpo', {'dual__limit': 0.05}),
}
SWEEP = sweep.Sweep(
    HERE,
    {str(age): {'staleness': age} for age in AGES},
    METHODS,
    stability.COLUMNS,
    stability.summarize,
)

if __name__ == '__main__':
  app.run(lambda _: sweep.run(SWEEP))
