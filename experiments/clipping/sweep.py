"""Measures what clipping throws away; see README.md.

    python experiments/clipping/sweep.py --part=numerics
    python experiments/clipping/sweep.py --part=clipped
    python experiments/clipping/sweep.py --part=runs

`numerics` samples from SmolLM2-135M in one precision and asks another for the
probabilities: `numerics.csv`, `numerics.json`. `clipped` trains the embedded
model with the ratio clip and writes down the tokens that it drops:
`clipped.csv`, `clipped.json`. `runs` compares relaxed clips: `runs.csv`.
"""

import collections
import pathlib
import sys

from absl import app
from absl import flags
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
from experiments.lib import cells
from experiments.lib import probe
from experiments.lib import stability
from experiments.lib import sweep
from experiments.lib import table

_GROUP = flags.DEFINE_integer('group', 8, 'Completions of each question.')
_LENGTH = flags.DEFINE_integer('length', 32, 'Tokens of a completion.')
_POINTS = flags.DEFINE_integer('points', 2000, 'Tokens that are written down.')

HERE = pathlib.Path(__file__).parent
NUMERICS = {
    'bfloat16': {'dtype': 'bfloat16'},
    'int8 weights': {'weights_dtype': 'int8'},
    'float8 weights': {'weights_dtype': 'float8_e4m3fn'},
}
# Edges of the groups by probability under the sampler.
EDGES = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0)

SETTINGS = {'4 epochs': sweep.BINDING}
METHODS = {
    'clip 0.2, 0.28': sweep.Method('grpo_clip_higher'),
    'relaxed low': sweep.Method('relaxed_low'),
    'relaxed high': sweep.Method('relaxed_high'),
    'relaxed both': sweep.Method('relaxed_both'),
    'DPPO binary TV': sweep.Method('dppo_binary_tv'),
}
COLUMNS = {
    'reward': ('reward/mean', np.mean),
    'gap_mean': ('mismatch/prob_gap_mean', np.mean),
    'masked': ('mask/fraction', np.mean),
    'masked_positive': ('mask/positive', np.mean),
    'masked_negative': ('mask/negative', np.mean),
    'entropy': ('entropy/mean', np.mean),
}
SWEEP = sweep.Sweep(HERE, SETTINGS, METHODS, COLUMNS, stability.summarize)
STEPS_OF_CLIPPED = 40
SEEDS_OF_CLIPPED = (0, 1, 2, 3, 4)


def measure_numerics():
  """Ratio and total variation where only the numerics differ."""
  model, params, tokenizer, texts = probe.smollm2()
  measured = divergences.build('topk_tv')

  def look(logits, targets, record):
    logprobs = divergences.token_logprobs(logits, targets)
    every = jax.nn.log_softmax(logits)
    entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
    return logprobs, entropy, measured.measure(logits, targets, record)

  read = probe.make_reader(model, look)
  summary, rows = {}, []
  for name, numerics in tqdm.tqdm(NUMERICS.items()):
    rollout = probe.roll_out(
        model, params, tokenizer, texts, jax.random.key(0),
        group_size=_GROUP.value, length=_LENGTH.value,
        record=measured.record, **numerics,
    )
    log_pi, entropy, variation = read(params, rollout, rollout.record)
    mask = np.asarray(rollout.token_mask)
    log_mu = np.asarray(rollout.behaviour_logprobs)[mask]
    columns = {
        'mu': np.exp(log_mu),
        'ratio': np.exp(log_pi - log_mu),
        'gap': np.abs(np.exp(log_pi) - np.exp(log_mu)),
        'variation': variation,
        'entropy': entropy,
    }
    summary[name] = by_probability(columns)
    chosen = np.random.default_rng(0).permutation(len(log_mu))[:_POINTS.value]
    rows += [
        {'numerics': name}
        | {k: table.short(float(x[i])) for k, x in columns.items()}
        for i in chosen
    ]
  table.write(HERE / 'numerics.csv', rows)
  table.write_summary(
      HERE / 'numerics.json',
      {'machine': machine.describe(), 'completions': len(mask)} | summary,
  )


def by_probability(columns):
  """Quantiles of tokens with about the same probability."""
  group = np.clip(np.digitize(columns['mu'], EDGES) - 1, 0, len(EDGES) - 2)
  rows = {}
  for number, (low, high) in enumerate(zip(EDGES, EDGES[1:])):
    chosen = group == number
    if not chosen.any():
      continue
    ratio = columns['ratio'][chosen]
    rows[f'{low:g} to {high:g}'] = {
        'tokens': int(chosen.sum()),
        'ratio_gap_q99': float(np.quantile(np.abs(ratio - 1), 0.99)),
        'ratio_min': float(ratio.min()),
        'ratio_max': float(ratio.max()),
        'outside_clip': float(np.mean((ratio < 0.8) | (ratio > 1.28))),
        'gap_q99': float(np.quantile(columns['gap'][chosen], 0.99)),
        'variation_q99': float(np.quantile(columns['variation'][chosen], 0.99)),
        'variation_max': float(columns['variation'][chosen].max()),
    }
  return rows


def measure_clipped():
  """Trains with the ratio clip; the tokens that it drops, and all others."""
  rows = []
  counts = collections.defaultdict(collections.Counter)
  totals = collections.Counter()
  numbers = collections.defaultdict(list)
  for seed in SEEDS_OF_CLIPPED:
    cell = cells.make_cell(
        '4 epochs', 'clip 0.2, 0.28', 'grpo_clip_higher', seed,
        **sweep.BINDING | {'total_steps': STEPS_OF_CLIPPED},
    )
    parts = main.build(cells.config_of(cell), to_train=False)
    for step, (_, _, stats) in enumerate(tqdm.tqdm(
        probe.learn(parts, STEPS_OF_CLIPPED), total=STEPS_OF_CLIPPED
    )):
      mask = stats.token_mask & (stats.advantages != 0)
      dropped = mask & ~(stats.trust_region > 0)
      totals.update(parts.tokenizer.batch_decode(
          stats.targets[mask][:, None]
      ))
      for kind, chosen in (
          ('A > 0', dropped & (stats.advantages > 0)),
          ('A < 0', dropped & (stats.advantages < 0)),
          ('kept', mask & ~dropped),
      ):
        mu = np.exp(stats.behaviour_logprobs[chosen])
        gap = np.exp(stats.logprobs[chosen]) - mu
        found = np.stack([mu, gap, stats.entropy[chosen]], axis=-1)
        numbers[kind].append(found)
        if kind != 'kept':
          counts[kind].update(parts.tokenizer.batch_decode(
              stats.targets[chosen][:, None]
          ))
        few = np.random.default_rng(step).permutation(len(found))[:4]
        rows += [
            dict(zip(
                ('seed', 'step', 'kind', 'mu', 'gap', 'entropy'),
                (seed, step, kind, *(table.short(float(x)) for x in found[i])),
            ))
            for i in few
        ]
    parts.scorer.close()
  table.write(HERE / 'clipped.csv', rows)
  table.write_summary(
      HERE / 'clipped.json', summarize_clipped(numbers, counts, totals)
  )


def summarize_clipped(numbers, counts, totals):
  kinds = {}
  for kind, found in numbers.items():
    mu, gap, entropy = np.concatenate(found).T
    kinds[kind] = {
        'tokens': len(mu),
        'mu_median': float(np.median(mu)),
        'mu_below_0.1': float(np.mean(mu < 0.1)),
        'entropy_mean': float(entropy.mean()),
        'gap_abs_median': float(np.median(np.abs(gap))),
        'gap_within_0.15': float(np.mean(np.abs(gap) <= 0.15)),
    }
  return {
      'machine': machine.describe(),
      'kinds': kinds,
      'most_frequent': {
          kind: [
              {'token': token, 'dropped': count, 'of': totals[token]}
              for token, count in of_kind.most_common(15)
          ]
          for kind, of_kind in counts.items()
      },
  }


if __name__ == '__main__':
  app.run(lambda _: sweep.run_part(HERE, {
      'numerics': measure_numerics,
      'clipped': measure_clipped,
      'runs': lambda: sweep.run(SWEEP),
  }))
