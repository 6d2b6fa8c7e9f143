"""Reruns the small experiments, figures and tables included, one by one.

    python experiments/run_all.py [--only=stability,topk] [--fresh]

A sweep runs only what its file does not hold; `--fresh` removes the results of
an experiment before, to measure it anew. Its tables go to its `tables.md`.
"""

import pathlib
import subprocess
import sys
import time

from absl import app
from absl import flags

HERE = pathlib.Path(__file__).parent
# experiments/ is not installed.
sys.path.insert(0, str(HERE.parent))

# ruff: noqa: E402
from experiments.lib import options

options.define('workers')
_ONLY = flags.DEFINE_list('only', [], 'Only these; all if empty.')
_FRESH = flags.DEFINE_bool('fresh', False, 'Measure anew what is there.')

# What each experiment calls before its plot.
EXPERIMENTS = {
    'clipping': [
        ['sweep.py', '--part=numerics'],
        ['sweep.py', '--part=clipped'],
        ['sweep.py', '--part=runs'],
    ],
    'topk': [['sweep.py', '--part=tightness'], ['sweep.py', '--part=runs']],
    'sensitivity': [['sweep.py']],
    'stability': [['sweep.py']],
    'staleness': [['sweep.py']],
    'r2vpo_sample_efficiency': [['sweep.py']],
    'real_model': [['sweep.py']],
    'main_job': [['sweep.py']],
    'smollm2': [['sweep.py']],
}


def forget(folder: pathlib.Path) -> None:
  """Removes what the sweeps of an experiment measured, but for pilots."""
  for path in (*folder.glob('*.csv'), *folder.glob('*.json')):
    if path.stem != 'pilots':
      path.unlink()


def main(_):
  for name in options.chosen('only', _ONLY.value, EXPERIMENTS):
    start = time.perf_counter()
    if _FRESH.value:
      forget(HERE / name)
    for script, *flags_of in EXPERIMENTS[name]:
      subprocess.run(
          [
              sys.executable, HERE / name / script, *flags_of,
              '--workers', str(options.given('workers')),
          ],
          check=True,
      )
    tables = subprocess.run(
        [sys.executable, HERE / name / 'plot.py'], check=True,
        stdout=subprocess.PIPE, text=True,
    ).stdout
    (HERE / name / 'tables.md').write_text(tables)
    minutes = (time.perf_counter() - start) / 60
    print(f'{name}: {minutes:.1f} minutes', flush=True)


if __name__ == '__main__':
  app.run(main)
