"""One step of dppo_jax against one of TRL and one of Tunix, in turns.

    python benchmarks/peers/run.py --envs=ENVIRONMENTS --name=peers

Run it with the Python that has dppo_jax. The peers get a virtual environment
each under --envs, made with the same Python when it is not there; --pip adds
options of `pip install`, for example where a CPU build of torch is found, and
--trl_python and --tunix_python take environments that exist.

For each size and kind of lengths, every script first tries its settings alone.
With its best one it then runs in turns with the others, each time in a new
process: A B C A B C. A round has its own seed: lengths that are drawn decide
what a step of ours costs. A ratio compares medians of the same round, so
what slows the machine down for minutes slows all three; above 1, dppo_jax is
faster.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Any
import venv

_HERE = pathlib.Path(__file__).parent
# benchmarks/ is not installed.
sys.path.insert(0, str(_HERE.parents[1]))

# ruff: noqa: E402
import numpy as np

from benchmarks import machine
from benchmarks.peers import work

PACKAGES = {
    'trl': ('torch==2.13.0', 'transformers==5.23.0', 'trl==1.16.0'),
    'tunix': ('google-tunix==0.1.7', 'jax'),
}
SCRIPTS = {
    'dppo_jax': 'ours.py', 'trl': 'trl_grpo.py', 'tunix': 'tunix_grpo.py'
}
# What is tried, by the kind of lengths, unless other values are given.
OURS = {
    'fixed': {
        'microbatches': [8, 16, 32], 'row_lengths': [0], 'slots': [0],
        'halvings': [0], 'part_halvings': [0], 'halving_steps': [1],
        'reuses': [1], 'chunk_sizes': [0], 'unrolls': [0],
    },
    'geometric': {
        'microbatches': [4, 8], 'row_lengths': [128, 256], 'slots': [32, 96],
        'halvings': [4], 'part_halvings': [1], 'halving_steps': [1],
        'reuses': [1], 'chunk_sizes': [0], 'unrolls': [0],
    },
}
PEERS = [8, 16, 32, 64]  # Micro-batches.
# What one of the values is called.
SETTING = {
    'microbatches': 'microbatch', 'row_lengths': 'row_length',
    'slots': 'slots', 'halvings': 'halvings',
    'part_halvings': 'part_halvings', 'halving_steps': 'halving_steps',
    'reuses': 'reuse', 'chunk_sizes': 'chunk_size', 'unrolls': 'unroll',
}


def make_env(folder: pathlib.Path, packages: tuple[str, ...], pip: str) -> str:
  """The Python of a virtual environment with these packages."""
  python = folder / 'bin' / 'python'
  done = folder / 'installed.json'
  if not done.exists() or json.loads(done.read_text()) != list(packages):
    venv.create(folder, with_pip=True, clear=True)
    command = [python, '-m', 'pip', 'install', '-q', *shlex.split(pip)]
    subprocess.run([*command, *packages], check=True)
    done.write_text(json.dumps(packages))
  return str(python)


def pythons(args: argparse.Namespace) -> dict[str, str]:
  """Whose Python runs which script."""
  given = {'trl': args.trl_python, 'tunix': args.tunix_python}
  made = {
      name: given[name] or make_env(args.envs / name, packages, args.pip)
      for name, packages in PACKAGES.items()
  }
  return {'dppo_jax': sys.executable} | made


def call(
    name: str, python: str, cell: dict[str, str], tried: dict[str, list[int]],
    *, steps: int, warmup: int, seed: int = 0,
) -> dict[str, Any]:
  """The result of one script, in a process of its own."""
  lists = {k: ','.join(map(str, v)) for k, v in tried.items()}
  options = cell | lists | {'steps': steps, 'warmup': warmup, 'seed': seed}
  with tempfile.TemporaryDirectory() as folder:
    output = pathlib.Path(folder) / 'result.json'
    command = [python, str(_HERE / SCRIPTS[name]), f'--output={output}']
    command += [f'--{k}={v}' for k, v in options.items()]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ
    )
    if done.returncode:
      raise RuntimeError(
          f'{shlex.join(command)} failed:\n{done.stderr[-4000:]}'
      )
    result = json.loads(output.read_text())
  best = result['best']
  print(name, *cell.values(), best, flush=True)
  return result


def measure(
    cell: dict[str, str], environments: dict[str, str], args: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
  """One row of the result, and the versions of everybody."""
  sweeps, chosen = {}, {}
  for name, python in environments.items():
    tried = {'microbatches': args.peer_microbatches}
    if name == 'dppo_jax':
      tried = OURS[cell['lengths']] | args.ours
    if args.quick:
      tried = {option: values[:1] for option, values in tried.items()}
    sweeps[name] = call(
        name, python, cell, tried, steps=args.sweep_steps, warmup=1
    )
    best = sweeps[name]['best']
    chosen[name] = {option: [best[SETTING[option]]] for option in tried}
  rounds = [
      {
          name: call(
              name, python, cell, chosen[name], warmup=args.warmup,
              steps=args.our_steps if name == 'dppo_jax' else args.steps,
              seed=seed,
          )['best']
          for name, python in environments.items()
      }
      for seed in range(args.rounds)
  ]
  row = {
      **cell,
      'settings': {
          name: {SETTING[option]: value for option, [value] in options.items()}
          for name, options in chosen.items()
      },
      **compare(rounds),
      'tried': {name: result['rows'] for name, result in sweeps.items()},
  }
  versions = {
      name: {'python': result['python']} | result['versions']
      for name, result in sweeps.items()
  }
  return row, versions


def compare(rounds: list[dict[str, Any]]) -> dict[str, Any]:
  """Seconds of each, ratios to dppo_jax within a round, and mean lengths."""
  names = list(rounds[0])
  seconds = {
      name: np.array([turn[name]['step_s']['median'] for turn in rounds])
      for name in names
  }
  lengths = {name: [turn[name]['mean_length'] for turn in rounds]
             for name in names}
  return {
      'step_s': {name: work.spread(seconds[name]) for name in names},
      'times_as_fast': {
          name: work.spread(seconds[name] / seconds['dppo_jax'])
          for name in names if name != 'dppo_jax'
      },
      'mean_length': {
          name: round(float(np.mean(lengths[name])), 2) for name in names
      },
  }


def parse() -> argparse.Namespace:
  flags = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument('--envs', type=pathlib.Path, help='Of the peers.')
  flags.add_argument('--pip', default='', help='Options of pip install.')
  flags.add_argument('--trl_python', help='Of an environment that exists.')
  flags.add_argument('--tunix_python', help='Of an environment that exists.')
  flags.add_argument(
      '--peer_microbatches', type=work.integers, default=PEERS,
      help='That the peers try.',
  )
  for option in SETTING:
    flags.add_argument(
        f'--{option}', type=work.integers,
        help='That ours tries, for all of --lengths.',
    )
  names = lambda text: text.split(',')
  flags.add_argument('--sizes', type=names, default=list(work.SIZES))
  flags.add_argument('--lengths', type=names, default=list(work.STOP))
  flags.add_argument('--rounds', type=int, default=3, help='A B C, so often.')
  flags.add_argument('--steps', type=int, default=3, help='Timed, of a turn.')
  flags.add_argument(
      '--our_steps', type=int,
      help='Of ours, whose cost follows the lengths that are drawn; --steps if '
      'not given.',
  )
  flags.add_argument('--warmup', type=int, default=2, help='Before, of a turn.')
  flags.add_argument('--sweep_steps', type=int, default=2, help='Of a trial.')
  flags.add_argument(
      '--quick', action='store_true', help='Try one setting of each only.'
  )
  flags.add_argument('--name', help='Keeps the result under it.')
  args = flags.parse_args()
  if not args.envs and not (args.trl_python and args.tunix_python):
    flags.error('--envs, or both --trl_python and --tunix_python')
  if args.our_steps is None:
    args.our_steps = args.steps
  given = {option: getattr(args, option) for option in SETTING}
  args.ours = {option: values for option, values in given.items() if values}
  return args


def main():
  args = parse()
  environments = pythons(args)
  cells = [(size, kind) for size in args.sizes for kind in args.lengths]
  rows, date = [], machine.describe()['date']
  for size, kind in cells:
    row, versions = measure(
        {'size': size, 'lengths': kind}, environments, args
    )
    rows.append(row)
    result = {
        'benchmark': 'peers',
        'sizes': {
            'prompts': work.NUM_PROMPTS,
            'group': work.GROUP_SIZE,
            'prompt_length': work.PROMPT_LENGTH,
            'length': work.MAX_LENGTH,
            'rounds': args.rounds,
            'steps': args.steps,
            'our_steps': args.our_steps,
        },
        'rows': rows,
        'versions': versions,
        'machine': machine.describe() | {'date': date},
    }
    # After every row, to one file: a long measurement may be stopped.
    machine.report(result, args.name)


if __name__ == '__main__':
  main()
