"""Is a step faster than another one? One of each, in turns.

    python benchmarks/turns.py --base=HEAD~1 --pairs=30 --size=small \
        --lengths=geometric --microbatches=4 --row_lengths=640 --slots=64 \
        --halvings=4 --part_halvings=3 --halving_steps=2 --reuses=1

compares this working tree with a commit, step by step, in two processes that
wait for each other: what slows a shared machine down for minutes slows both.
`--base_options='--slots=96'` gives the base another setting and `--base_env`
another environment; HEAD is the base that differs in nothing else.

All other flags are those of peers/ours.py, every list with one value. The
ours.py of this tree runs both, so a base must still have what it calls.

Below 1, this is less than the base: `ratio` of the sums over all pairs, the
median of the pairs, and `error`, the standard error of their mean. Memory is
what XLA plans for the step: arguments, temporary and results. `same_lengths`
says whether both drew the same; if not, chance is in the ratio, too.
"""

import argparse
import io
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

import numpy as np

_ROOT = pathlib.Path(__file__).parents[1]


def unpack(commit: str, folder: str) -> str:
  """Writes the files of a commit to a folder; returns its short name."""
  git = lambda *arguments: subprocess.run(
      ['git', '--no-optional-locks', *arguments],
      cwd=_ROOT, capture_output=True, check=False,
  )
  name = git('rev-parse', '--short', f'{commit}^{{commit}}')
  if name.returncode:
    raise SystemExit(f'--base={commit}: {name.stderr.decode().strip()}')
  archive = git('archive', commit)
  archive.check_returncode()
  with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
    files.extractall(folder, filter='data')
  return name.stdout.decode().strip()


def work(code: str, options: list[str], pipe) -> None:
  """Takes a step of the code in a folder whenever it is told to."""
  # First, so that ours.py, of here, finds these and not those beside it.
  sys.path.insert(0, code)
  from configs import default
  from dppo_jax import main as main_lib
  for module in (default, main_lib):
    if pathlib.Path(module.__file__).parents[1] != pathlib.Path(code):
      raise ImportError(f'{module.__file__} is not of {code}')
  sys.path.insert(0, str(_ROOT))
  from benchmarks.peers import ours

  args = ours.parser().parse_args(options)
  settings = ours.settings(args)
  if len(settings) > 1:
    raise SystemExit(f'One value of each flag, not {settings}')
  run = ours.Run(args, **settings[0])
  while pipe.recv():
    clocks = np.array([time.perf_counter(), time.process_time()])
    lengths = run.step()
    taken = [time.perf_counter(), time.process_time()] - clocks
    pipe.send((taken, lengths))
  pipe.send(run.memory())


def start(code: str, options: list[str], environment: dict[str, str]):
  """A process of its own, and the pipe to it."""
  before = dict(os.environ)
  context = multiprocessing.get_context('spawn')
  pipe, other = context.Pipe()
  process = context.Process(
      target=work, args=(code, options, other), daemon=True
  )
  try:
    os.environ.update(environment)  # What it is started with.
    process.start()
  finally:
    os.environ.clear()
    os.environ.update(before)
  other.close()  # Or the end of the process would not be heard of.
  return process, pipe


def ask(pipe, go_on: bool):
  """Of a step: (seconds and CPU seconds [2], lengths [B]); or the memory."""
  try:
    pipe.send(go_on)
    return pipe.recv()
  except (EOFError, OSError):
    raise SystemExit('A process has ended; it says why above.') from None


def compare(taken: np.ndarray) -> dict[str, Any]:
  """What [pairs, (base, this), (seconds, CPU seconds)] come to."""
  result = {}
  for name, values in zip(('step_s', 'cpu_s'), np.moveaxis(taken, -1, 0)):
    base, this = values.T
    pairs = this / base
    result[name] = {
        'ratio': round(float(this.sum() / base.sum()), 4),
        'median_of_pairs': round(float(np.median(pairs)), 4),
        'error': round(float(np.std(pairs) / max(len(pairs) - 1, 1) ** 0.5), 4),
        'base_median': round(float(np.median(base)), 4),
        'this_median': round(float(np.median(this)), 4),
    }
  return result


def measure(args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
  """Pairs of steps, and what both need."""
  with tempfile.TemporaryDirectory() as folder:
    # Without links, as modules tell their paths.
    folder = str(pathlib.Path(folder).resolve())
    base = unpack(args.base, folder)
    processes, pipes = zip(
        start(
            folder, [*options, *args.base_options.split()],
            dict(x.split('=', 1) for x in args.base_env.split()),
        ),
        start(str(_ROOT.resolve()), options, {}),
    )
    taken, same = [], True
    # The first step compiles, and learns from nothing.
    for pair in range(1 + args.warmup + args.pairs):
      # Who is first changes.
      order = (0, 1) if pair % 2 else (1, 0)
      steps = {i: ask(pipes[i], True) for i in order}
      taken.append([steps[0][0], steps[1][0]])
      same &= np.array_equal(steps[0][1], steps[1][1])
      seconds = [f'{x[0]:.3f}' for x in taken[-1]]
      print('base, this:', *seconds, flush=True)
    memory = [ask(pipe, False) for pipe in pipes]
    for process in processes:
      process.join()
  return {
      'base': base,
      'same_lengths': bool(same),
      **compare(np.array(taken[-args.pairs :])),
      'memory_ratio': {
          kind: round(memory[1][kind] / size, 4) if size else None
          for kind, size in memory[0].items()
      },
      'memory': dict(zip(('base', 'this'), memory)),
  }


def main():
  flags = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument('--base', default='HEAD', help='A commit.')
  flags.add_argument(
      '--base_options', default='', help='More flags, of the base only.'
  )
  flags.add_argument(
      '--base_env', default='', help='A=1 B=2, variables of the base only.'
  )
  flags.add_argument('--pairs', type=int, default=30, help='Timed.')
  flags.add_argument('--warmup', type=int, default=2, help='Pairs before.')
  flags.add_argument('--name', help='Keeps the result under it.')
  args, options = flags.parse_known_args()
  if args.pairs < 1:
    flags.error(f'--pairs={args.pairs} is not positive.')
  result = measure(args, options)
  sys.path.insert(0, str(_ROOT))
  from benchmarks import machine
  machine.report(
      {
          'benchmark': 'turns',
          'sizes': {'pairs': args.pairs, 'warmup': args.warmup},
          'options': ' '.join(options),
          'base_options': args.base_options,
          'base_env': args.base_env,
          **result,
          'machine': machine.describe(),
      },
      args.name,
  )


if __name__ == '__main__':
  main()
