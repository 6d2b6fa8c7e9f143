"""Runs the sweep of stability; see README.md.

    python experiments/stability/sweep.py

Results go to `runs.csv` and `runs.json`. What is in the file is not run again.
"""

import pathlib
import sys

from absl import app
import numpy as np

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from experiments.lib import stability
from experiments.lib import sweep

HERE = pathlib.Path(__file__).parent

LOW_PRECISION = {
    'sampling__weights_dtype': 'int8',
    'sampling__cache_dtype': 'float8_e4m3fn',
}
_LONG = {'total_steps': 200, 'eval__every': 20}
# Rates, ages and passes are those of the pilots, see ../LOG.md.
SETTINGS = {
    'low_precision': LOW_PRECISION,
    'stale16': {'staleness': 16},
    'epochs8': {
        'learner__num_epochs': 8, 'optimizer__learning_rate': 1e-4,
    },
    'all8': LOW_PRECISION | {'staleness': 8, 'learner__num_epochs': 2},
    'all32': LOW_PRECISION | _LONG | {
        'staleness': 32,
        'learner__num_epochs': 2,
        'optimizer__learning_rate': 2e-4,
    },
}
METHODS = {
    'PG-IS': sweep.Method('pg_is'),
    'CISPO': sweep.Method('cispo'),
    'GRPO clip-higher': sweep.Method('grpo_clip_higher'),
    'MiniRL': sweep.Method('minirl'),
    'MiniRL-TIS': sweep.Method('minirl_tis'),
    'DPPO binary TV': sweep.Method('dppo_binary_tv'),
    'DPPO binary KL': sweep.Method('dppo_binary_kl'),
    'DPPO top-K TV': sweep.Method('dppo_topk_tv'),
    'DPPO top-K KL': sweep.Method('dppo_topk_kl'),
    'R2VPO': sweep.Method('r2vpo'),
    'DPPO binary TV, recomputed': sweep.Method(
        'dppo_binary_tv_recompute', {}, ('all32',)
    ),
    'DPPO binary KL, recomputed': sweep.Method(
        'dppo_binary_kl_recompute', {}, ('all32',)
    ),
    'mask 0.5': sweep.Method('minimal_mask', {}, ('all32',)),
    'mask 0.8': sweep.Method(
        'minimal_mask', {'divergence__threshold': 0.8}, ('all32',)
    ),
    'mask 0.5, recomputed': sweep.Method(
        'minimal_mask_recompute', {}, ('all32',)
    ),
}
COLUMNS = {
    'reward': ('reward/mean', np.mean),
    'gap_mean': ('mismatch/prob_gap_mean', np.mean),
    'gap_max': ('mismatch/prob_gap_max', np.max),
    'gap_min': ('mismatch/prob_gap_min', np.min),
    'same_weights_gap': ('on_policy/prob_gap_mean', np.mean),
    'ratio_max': ('ratio/max', np.max),
    'masked': ('mask/fraction', np.mean),
    'bad_updates': ('mask/bad_updates', np.mean),
    'entropy': ('entropy/mean', np.mean),
    'truncated': ('completion/truncated', np.mean),
    'grad_norm': ('optimizer/grad_norm', np.mean),
    'skipped': ('optimizer/skipped', np.sum),
}

SWEEP = sweep.Sweep(HERE, SETTINGS, METHODS, COLUMNS, stability.summarize)

if __name__ == '__main__':
  app.run(lambda _: sweep.run(SWEEP))
