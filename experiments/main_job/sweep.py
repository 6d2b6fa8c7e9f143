"""Runs every algorithm's config with several seeds and writes `results.csv`.

    python experiments/main_job/run.py --runs=runs/main_job --seeds=0,1,2

Each run is a process of its own with the command that a user would type. Runs
that are complete are not repeated, so the sweep may be stopped and started.
"""

import pathlib
import sys

from absl import app
from absl import flags

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from dppo_jax import metrics
from experiments.lib import command
from experiments.lib import table

_RUNS = flags.DEFINE_string('runs', 'runs/main_job', 'Where the runs go.')
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds of every config.')
_CONFIGS = flags.DEFINE_list(
    'configs',
    [
        'tv_topk', 'kl_topk', 'tv_binary', 'kl_binary', 'grpo',
        'grpo_clip_higher', 'cispo', 'pg_is',
    ],
    'Names in configs/.',
)

HERE = pathlib.Path(__file__).parent
COLUMNS = (
    'reward/mean', 'eval/avg@8', 'eval/pass@8', 'divergence/mean',
    'divergence/max', 'mismatch/prob_gap_mean', 'mask/fraction',
    'entropy/mean', 'tokens/s', 'time/step_s', 'time/compile_s',
)


def main(_):
  runs = pathlib.Path(_RUNS.value)
  for seed in _SEEDS.value:
    for name in _CONFIGS.value:
      workdir = runs / f'{name}-{seed}'
      print(f'{name}, seed {seed} -> {workdir}', flush=True)
      if not (workdir / 'report.html').exists():
        command.train(
            f'configs/{name}.py', {'seed': seed, 'tensorboard': False}, workdir
        )
  collect(runs)


def collect(runs):
  """All complete runs of the folder, whichever call made them."""
  rows = []
  for report in sorted(runs.glob('*/report.html')):
    name, _, seed = report.parent.name.rpartition('-')
    for row in metrics.read(report.parent):
      kept = {key: row.get(key, '') for key in COLUMNS}
      row = {'config': name, 'seed': seed, 'step': row['step']} | kept
      rows.append({k: table.short(v, 6) for k, v in row.items()})
  table.write(HERE / 'results.csv', rows)


if __name__ == '__main__':
  app.run(main)
