"""A named algorithm is a row: what is measured, from where, and what follows.

    python -m dppo_jax.algorithms             # the table
    python -m dppo_jax.algorithms --markdown  # docs/algorithms.md

A row names a divergence and its thresholds, the rule that turns it into a trust
region, the anchor it is measured from, the loss with its ratio cap, advantage
and normaliser. Numbers are written out where a source sets them for the row;
otherwise the option's own default holds. The anchor is the policy that really
sampled, or 'recomputed': the learner's own numerics at the start of the step,
which drifts and collapses (Sec. 5.2 of arXiv:2602.04879). The importance ratio
is against the policy that sampled in every row.
"""

import dataclasses
import sys
from typing import Any

from dppo_jax import advantages
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import registry
from dppo_jax import trust_regions

_DPPO = 'arXiv:2602.04879'
_CPPO = 'arXiv:2606.10968'
_DRPO = 'arXiv:2606.09821'


def _options(name: str, **options) -> dict[str, Any]:
  return {'name': name} | options


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One row.

  Attributes:
    source: where the method and its numbers come from.
    keeps: which tokens may push the policy, as a formula.
    weight: what multiplies A grad log pi of a kept token.
    divergence: name and options, and likewise the next ones.
    trust_region: rule.
    loss: per token.
    anchor: 'behaviour' or 'recomputed'.
    advantage: of a completion.
    normalizer: of the tokens' losses.
    dual: rule for the multiplier of the loss's constraint.
  """

  source: str
  keeps: str
  weight: str = 'r'
  divergence: dict = dataclasses.field(default_factory=lambda: _options('none'))
  trust_region: dict = dataclasses.field(
      default_factory=lambda: _options('outward')
  )
  loss: dict = dataclasses.field(
      default_factory=lambda: _options('policy_gradient')
  )
  anchor: str = 'behaviour'
  advantage: dict = dataclasses.field(
      default_factory=lambda: _options('group_mean')
  )
  normalizer: dict = dataclasses.field(
      default_factory=lambda: _options('constant')
  )
  dual: dict = dataclasses.field(default_factory=lambda: _options('none'))

  def config(self) -> dict:
    """The row as entries of a training config."""
    return {
        'divergence': divergences.config(**self.divergence),
        'trust_region': trust_regions.config(**self.trust_region),
        'loss': losses.config(**self.loss),
        'anchor': self.anchor,
        'advantage': advantages.config(**self.advantage),
        'normalizer': normalizers.config(**self.normalizer),
        'dual': duals.config(**self.dual),
    }


_CAP_3 = _options('policy_gradient', ratio_cap=3.0)
_CAP_5 = _options('policy_gradient', ratio_cap=5.0)
_CLIP_HIGHER = _options('ratio_gap', threshold_low=0.2, threshold_high=0.28)
_OUT = 'unless D > d and moving out'


def _dppo(divergence, source, *, cap=False, **changes) -> Algorithm:
  row = Algorithm(
      source=source,
      keeps=_OUT,
      weight='min(r, 5)' if cap else 'r',
      divergence=_options(divergence),
      loss=_CAP_5 if cap else _options('policy_gradient'),
  )
  return dataclasses.replace(row, **changes)


def _relaxed(side: str) -> Algorithm:
  return Algorithm(
      source=f'{_DPPO} Sec. 6 (0.2 and 0.28, alpha 0.1)',
      keeps='as grpo_clip_higher, but always where mu < 0.1'
      + {'both': '', 'high': ' and A > 0', 'low': ' and A < 0'}[side],
      divergence=_CLIP_HIGHER,
      trust_region=_options('relaxed', alpha=0.1, side=side),
  )


def _cppo(soft: bool) -> Algorithm:
  return Algorithm(
      source=f'{_CPPO} Eq. 8 to 10, dense models (0.15, budget 0.015, w 0.8)'
      + (', App. C' if soft else ''),
      keeps='all, those moving out beyond a limit weighed down by min(1, 1/x)'
      if soft
      else 'unless moving out and (w D > d or prefix sum of w D > d + 0.015 '
      'times prefix sum of w)',
      weight='g r' if soft else 'r',
      divergence=_options('topk_tv', threshold=0.15),
      trust_region=_options('cumulative_prefix', soft=soft),
      advantage=_options('group_zscore'),
  )


def _minimal(anchor: str) -> Algorithm:
  return Algorithm(
      source=f'{_DPPO} Sec. 5.3, Fig. 5 (0.5)',
      keeps='unless A < 0 and '
      + ('q' if anchor == 'recomputed' else 'mu') + ' - pi >= 0.5',
      divergence=_options('binary_tv', threshold=0.5),
      trust_region=_options('minimal'),
      anchor=anchor,
  )


TABLE = {
    'dppo_topk_tv': _dppo(
        'topk_tv', f'{_DPPO} Eq. 15, App. F.3 (0.2, K 20, C 5)', cap=True
    ),
    'dppo_topk_kl': _dppo(
        'topk_kl', f'{_DPPO} Eq. 16, App. F.3 (0.05, K 20, C 5)', cap=True
    ),
    'dppo_binary_tv': _dppo(
        'binary_tv', f'{_DPPO} Eq. 13, App. C.1 (0.15, no cap)'
    ),
    'dppo_binary_kl': _dppo(
        'binary_kl', f'{_DPPO} Eq. 14, App. C.1 (0.05, no cap)'
    ),
    'dppo_full_tv': _dppo(
        'full_tv', 'ours: what topk_tv approximates', cap=True
    ),
    'dppo_full_kl': _dppo(
        'full_kl', 'ours: what topk_kl approximates', cap=True
    ),
    'dppo_binary_tv_recompute': _dppo(
        'binary_tv',
        'ours: the ablation of Fig. 4 with total variation',
        anchor='recomputed',
    ),
    'dppo_binary_kl_recompute': _dppo(
        'binary_kl',
        f'{_DPPO} Sec. 5.2, Fig. 4 (0.05); collapses there',
        anchor='recomputed',
    ),
    'predictive_kl': _dppo(
        'predictive_kl',
        'arXiv:2607.10848; threshold of dppo_topk_kl, ours',
        keeps='unless D > d and the update would raise D',
    ),
    'grpo': Algorithm(
        source='arXiv:2402.03300 (0.2); advantage without division by the '
        f'standard deviation, as {_DPPO} App. C.1',
        keeps=_OUT + ', D = |r - 1|',
        divergence=_options('ratio_gap', threshold=0.2),
    ),
    'grpo_clip_higher': Algorithm(
        source=f'arXiv:2503.14476; {_DPPO} App. C.1 (0.2 and 0.28)',
        keeps=_OUT + ', D = |r - 1|',
        divergence=_CLIP_HIGHER,
    ),
    'ppo_dual_clip': Algorithm(
        source='arXiv:1912.09729 Eq. 5 (0.2, c 3)',
        keeps='as grpo, unless A < 0 and r > 3',
        divergence=_options('ratio_gap', threshold=0.2),
        trust_region=_options('dual_clip', ratio_limit=3.0),
    ),
    'pg_is': Algorithm(
        source=f'{_DPPO} App. C.1: importance weights alone', keeps='all'
    ),
    'cispo': Algorithm(
        source=f'arXiv:2506.13585; PG-TIS of {_DPPO} App. C.1 (C 3)',
        keeps='all',
        weight='min(r, 3)',
        loss=_CAP_3,
    ),
    'pg_sequence_tis': Algorithm(
        source='ours: truncated importance sampling of whole sequences, with '
        'the cap of cispo',
        keeps='all',
        weight='min(product of r, 3)',
        loss=_options('policy_gradient', ratio_cap=3.0, ratio='sequence'),
    ),
    'minirl': Algorithm(
        source=f'{_DPPO} App. C.1 (0.2 and 0.28)',
        keeps=_OUT + ', D = |pi / q - 1|',
        divergence=_CLIP_HIGHER,
        anchor='recomputed',
    ),
    'minirl_tis': Algorithm(
        source=f'{_DPPO} App. C.1 (0.2 and 0.28, C 3)',
        keeps='as minirl',
        weight='min(r, 3)',
        divergence=_CLIP_HIGHER,
        anchor='recomputed',
        loss=_CAP_3,
    ),
    'minimal_mask': _minimal('behaviour'),
    'minimal_mask_recompute': _minimal('recomputed'),
    'relaxed_high': _relaxed('high'),
    'relaxed_low': _relaxed('low'),
    'relaxed_both': _relaxed('both'),
    'gspo': Algorithm(
        source='arXiv:2507.18071 Eq. 5 to 7, Sec. 5.1 (3e-4 and 4e-4)',
        keeps=_OUT + ' by s, D = |s - 1|, s geometric mean of r',
        weight='s',
        divergence=_options(
            'ratio_gap', threshold_low=3e-4, threshold_high=4e-4
        ),
        trust_region=_options('sequence_ratio'),
        loss=_options('policy_gradient', ratio='geometric'),
        advantage=_options('group_zscore'),
        normalizer=_options('sequence_mean'),
    ),
    'spo': Algorithm(
        source=f'arXiv:2401.16025; {_DRPO} Sec. 4 (12.5)',
        keeps='all',
        weight='r (1 - sign(A) (r - 1) / 12.5)',
        loss=_options('spo', epsilon=12.5),
    ),
    'drpo': Algorithm(
        source=f'{_DRPO} Eq. 8 and 9, Sec. 4 (12.5)',
        keeps='all',
        weight='r (1 - sign(A) (pi - mu) / 12.5)',
        loss=_options('drpo', delta=12.5),
    ),
    'r2vpo': Algorithm(
        source='arXiv:2601.03320 (abstract); limit 0.01 and rule of the '
        'multiplier l, ours',
        keeps='all, so that mean (r - 1)^2 <= 0.01',
        weight='r (1 - 2 l (r - 1) / A)',
        loss=_options('r2vpo'),
        dual=_options('projected_ascent', limit=0.01),
    ),
    'r2vpo_fixed': Algorithm(
        source='ours: r2vpo as a plain penalty (l 0.04)',
        keeps='all',
        weight='r (1 - 0.08 (r - 1) / A)',
        loss=_options('r2vpo'),
        dual=_options('fixed', multiplier=0.04),
    ),
    'cppo': _cppo(soft=False),
    'cppo_soft': _cppo(soft=True),
    'trm_max': Algorithm(
        source=f'baseline of {_CPPO}; its threshold is not stated, 0.1 is ours',
        keeps='sequences with max D <= 0.1',
        divergence=_options('topk_kl', threshold=0.1),
        trust_region=_options('sequence_divergence', statistic='max'),
        advantage=_options('group_zscore'),
    ),
    'trm_mean': Algorithm(
        source=f'baseline of {_CPPO} (0.002)',
        keeps='sequences with mean D <= 0.002',
        divergence=_options('topk_kl', threshold=0.002),
        trust_region=_options('sequence_divergence', statistic='mean'),
        advantage=_options('group_zscore'),
    ),
    'icepop': Algorithm(
        source='arXiv:2510.18855 (band 0.5 to 5)',
        keeps='0.5 <= r <= 5',
        trust_region=_options('band', lowest=0.5, highest=5.0),
    ),
    'm2po': Algorithm(
        source='arXiv:2510.01161 (0.04); per sequence, ours',
        keeps='until mean (log r)^2 <= 0.04, largest outward ones dropped',
        trust_region=_options('second_moment', limit=0.04),
    ),
}


def names() -> list[str]:
  """All rows, in the order of the table."""
  return list(TABLE)


def row(name: str) -> Algorithm:
  """The row called `name`, or a ValueError that suggests one."""
  if name not in TABLE:
    raise ValueError(registry.unknown('algorithm', name, TABLE))
  return TABLE[name]


def config(name: str) -> dict:
  """The entries that a training config takes from row `name`."""
  return row(name).config() | {'algorithm': name}


def thresholds(name: str) -> str:
  """The thresholds of a row as text, by the sign of A where they differ."""
  options = {k: v for k, v in row(name).divergence.items() if k != 'name'}
  low, high = divergences.low_high(
      divergences.build(row(name).divergence['name'], **options).threshold
  )
  if low == float('inf'):
    return ''
  return f'{low:g}' if low == high else f'{low:g} / {high:g}'


def _columns(name: str) -> list[str]:
  algorithm = row(name)
  return [
      name,
      algorithm.divergence['name'],
      thresholds(name),
      algorithm.keeps,
      algorithm.weight,
      algorithm.anchor,
      f'{algorithm.advantage["name"]}, {algorithm.normalizer["name"]}',
      algorithm.source,
  ]


_HEADER = [
    'name', 'D', 'd', 'keeps a token', 'weight of A grad log pi', 'anchor',
    'advantage, normaliser', 'source',
]

_INTRODUCTION = """\
# Algorithms

Generated by `python -m dppo_jax.algorithms --markdown`; do not edit.

Run any row with `python -m dppo_jax.main --config=configs/default.py:NAME`.
pi is the policy being trained, mu the one that sampled, r = pi / mu of the
sampled token, A its advantage, D the divergence and d its threshold (for A < 0
/ A > 0 where they differ). D is measured from the anchor, which is mu or the
recomputed policy q; a token moves out if A and the logarithm of pi over the
anchor have the same sign. The importance ratio r is against mu in every row,
whatever the anchor of D.
"""


def as_text() -> str:
  """The table for a terminal."""
  rows = [_HEADER] + [_columns(name) for name in TABLE]
  widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
  lines = (
      '  '.join(cell.ljust(width) for cell, width in zip(cells, widths))
      for cells in rows
  )
  return '\n'.join(line.rstrip() for line in lines)


def as_markdown() -> str:
  """The page docs/algorithms.md."""
  lines = [_HEADER, ['---'] * len(_HEADER)]
  for name in TABLE:
    first, *others = (
        cell.replace('|', r'\|') for cell in _columns(name)
    )
    lines.append([f'`{first}`', *others])
  table = '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in lines)
  return f'{_INTRODUCTION}\n{table}\n'


if __name__ == '__main__':
  markdown = '--markdown' in sys.argv[1:]
  sys.stdout.write(as_markdown() if markdown else as_text() + '\n')
