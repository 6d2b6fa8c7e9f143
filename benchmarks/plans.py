"""Plans of the full-scale configs for TPU slices, each kept as it was printed.

    python benchmarks/plans.py                # All of them, which takes long.
    python benchmarks/plans.py 30b_a3b 8b_64  # Some.

A process each, so that the peak of its memory is its own; the output goes to
`benchmarks/results/plans/NAME.txt`, which `python experiments/full_size/cost.py
--write` then copies into the READMEs. docs/plans.md says what the numbers are.
Weak scaling keeps 8 prompts of 8 completions for each chip: groups of 8 chips
split the parameters, and copies of them are added.
"""

import datetime
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import machine  # noqa: E402

RESULTS = ROOT / 'benchmarks' / 'results' / 'plans'
# Chips -> shape of a v5p slice.
SLICES = {
    8: '2x2x2', 16: '2x2x4', 32: '2x4x4', 64: '4x4x4', 128: '4x4x8',
    256: '4x8x8', 512: '8x8x8',
}


def _command(config: str, chips: int, *flags: str) -> list[str]:
  return [
      'python', '-m', 'dppo_jax.plan', f'--config=configs/{config}',
      f'--topology=v5p:{SLICES[chips]}', *flags,
  ]


def _weak(chips: int) -> list[str]:
  return _command(
      'qwen3_8b.py',
      chips,
      '--config.mesh.data=-1',
      '--config.mesh.fsdp=8',
      f'--config.num_prompts={8 * chips}',
      f'--config.eval.num_prompts={8 * chips}',
      f'--config.sampling.num_slots={32 * chips}',
  )


PLANS = {
    '30b_a3b': _command('qwen3_30b_a3b.py', 64),
    **{f'8b_{chips}': _weak(chips) for chips in SLICES},
    'sanity': _command('paper/sanity.py', 8),
    'dense_base': _command('paper/scaling.py:dense_base', 64),
    'moe_base': _command('paper/scaling.py:moe_base', 256),
    'moe_base_r3': _command('paper/scaling.py:moe_base_r3', 256),
    'moe_base_lora': _command('paper/scaling.py:moe_base_lora', 64),
}


def make(name: str, commit: str | None) -> int:
  """Runs one plan and keeps what it says; returns its exit status."""
  command = PLANS[name]
  print(shlex.join(command), flush=True)
  done = subprocess.run(
      [sys.executable, *command[1:]],
      cwd=ROOT, capture_output=True, text=True, check=False,
  )
  # What libtpu says on the way matters only if it fails.
  said = done.stdout + (done.stderr if done.returncode else '')
  RESULTS.mkdir(parents=True, exist_ok=True)
  (RESULTS / f'{name}.txt').write_text('\n'.join([
      shlex.join(command),
      f'{datetime.date.today().isoformat()}, commit {commit}',
      said,
  ]))
  print(said, flush=True)
  return done.returncode


if __name__ == '__main__':
  chosen = sys.argv[1:] or list(PLANS)
  if unknown := [name for name in chosen if name not in PLANS]:
    sys.exit(f'error: no plan {unknown[0]!r}; known: {", ".join(PLANS)}.')
  measured = machine.commit()  # Before results change the files.
  sys.exit(max(make(name, measured) for name in chosen))
