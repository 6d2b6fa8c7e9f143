"""Measures what the top K leaves out; see README.md.

    python experiments/topk/sweep.py --part=tightness
    python experiments/topk/sweep.py --part=runs

`tightness` measures the same two policies with every divergence:
`tightness.csv`, `tightness.json`. `runs` trains with each: `runs.csv`.
"""

import pathlib
import sys

from absl import app
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from benchmarks import machine
from dppo_jax import divergences
from dppo_jax import main
from dppo_jax.models import quantization
from experiments.lib import cells
from experiments.lib import probe
from experiments.lib import stability
from experiments.lib import sweep
from experiments.lib import table

HERE = pathlib.Path(__file__).parent
KS = (1, 2, 5, 10, 20, 50, 100)
STEPS_OF_TIGHTNESS = 30
SEEDS_OF_TIGHTNESS = (0, 1, 2, 3, 4)
# Of App. F.3 of arXiv:2602.04879.
THRESHOLDS = {'tv': 0.2, 'kl': 0.05}

SETTINGS = {
    kind: sweep.BINDING | {'divergence__threshold': threshold}
    for kind, threshold in THRESHOLDS.items()
}


def _methods(kind):
  """Every partition of one divergence, with the cap of the table's rows."""
  capped = {'loss__ratio_cap': 5.0}
  return {
      f'binary {kind}': sweep.Method(f'dppo_binary_{kind}', capped, (kind,)),
      **{
          f'top-{k} {kind}': sweep.Method(
              f'dppo_topk_{kind}', {'divergence__k': k}, (kind,)
          )
          for k in (5, 20)
      },
      f'full {kind}': sweep.Method(f'dppo_full_{kind}', {}, (kind,)),
  }


METHODS = _methods('tv') | _methods('kl')
COLUMNS = {
    'reward': ('reward/mean', np.mean),
    'gap_mean': ('mismatch/prob_gap_mean', np.mean),
    'masked': ('mask/fraction', np.mean),
    'divergence_mean': ('divergence/mean', np.mean),
    'divergence_max': ('divergence/max', np.max),
    'mass_mean': ('topk/mass_mean', np.mean),
    'mass_min': ('topk/mass_min', np.min),
}
SWEEP = sweep.Sweep(HERE, SETTINGS, METHODS, COLUMNS, stability.summarize)


def partitions():
  """{(kind, name): divergence}."""
  found = {}
  for kind in THRESHOLDS:
    found[kind, 'binary'] = divergences.build(f'binary_{kind}')
    for k in KS:
      found[kind, f'{k}'] = divergences.build(f'topk_{kind}', k=k)
    found[kind, 'full'] = divergences.build(f'full_{kind}')
  return found


def look(logits, targets, behaviour):
  """Every divergence, and the mass of every top K, from logits of both."""
  measured = {
      '/'.join(name): x.measure(logits, targets, x.record(behaviour, targets))
      for name, x in partitions().items()
  }
  # As in Fig. 12 of the paper: without the sampled token.
  ordered = jax.lax.top_k(jax.nn.softmax(behaviour), max(KS))[0]
  masses = jnp.cumsum(ordered, axis=-1)
  return measured | {f'mass/{k}': masses[..., k - 1] for k in KS}


def of_training():
  """Tokens of the embedded model before and after 16 updates, by step."""
  everything = []
  for seed in SEEDS_OF_TIGHTNESS:
    cell = cells.make_cell('', '', 'dppo_full_tv', seed, **sweep.BINDING)
    parts = main.build(cells.config_of(cell), to_train=False)
    read = probe.make_reader(parts.model, look)
    for rollout, state, _ in tqdm.tqdm(
        probe.learn(parts, STEPS_OF_TIGHTNESS), total=STEPS_OF_TIGHTNESS
    ):
      everything.append(read(state.params, rollout, rollout.record))
    parts.scorer.close()
  return jax.tree.map(lambda *x: np.concatenate(x), *everything)


def of_numerics(dtype):
  """Tokens of SmolLM2 as it is, and with its kernels in eight bits."""
  model, params, tokenizer, texts = probe.smollm2()
  rollout = probe.roll_out(
      model, params, tokenizer, texts, jax.random.key(0), group_size=2,
      length=48,
  )
  rounded = quantization.widen(
      quantization.convert_kernels(params, jnp.float32, dtype), jnp.float32
  )

  def both(logits, targets, hidden):
    return look(logits, targets, model.head(params, hidden))

  # The head is the same; so are the numbers of rows and of their tokens.
  return probe.make_reader(model, both)(
      rounded, rollout, probe.hidden(model, params, rollout)
  )


def rows_of(name, tokens):
  """A row for each partition: bound, and how often it says the same."""
  rows = []
  for kind, threshold in THRESHOLDS.items():
    full = tokens[f'{kind}/full']
    outside = full > threshold
    for partition in ('binary', *map(str, KS)):
      part = tokens[f'{kind}/{partition}']
      mass = tokens.get(f'mass/{partition}')
      rows.append({
          'policies': name,
          'kind': kind,
          'partition': partition,
          'tokens': len(full),
          'bound': float(part.sum() / full.sum()),
          'outside': int(outside.sum()),
          'found': float(np.mean(part[outside] > threshold))
          if outside.any() else float('nan'),
          'mass_mean': '' if mass is None else float(mass.mean()),
          'mass_q01': '' if mass is None else float(np.quantile(mass, 0.01)),
      })
  return [{k: table.short(x) for k, x in row.items()} for row in rows]


def measure_tightness():
  rows = rows_of('embedded, 16 updates apart', of_training())
  for dtype in ('int8', 'float8_e4m3fn'):
    rows += rows_of(f'SmolLM2, {dtype} kernels', of_numerics(dtype))
  table.write(HERE / 'tightness.csv', rows)
  table.write_summary(
      HERE / 'tightness.json', {'machine': machine.describe(), 'rows': rows}
  )


if __name__ == '__main__':
  app.run(lambda _: sweep.run_part(HERE, {
      'tightness': measure_tightness,
      'runs': lambda: sweep.run(SWEEP),
  }))
