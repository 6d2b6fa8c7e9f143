"""A named algorithm is a row: divergence, thresholds, ratio cap, advantage.

All rows share the loss `losses.policy_gradient` and the anchor: the policy that
really sampled (Sec. 5.2 of arXiv:2602.04879 shows that a recomputed anchor
drifts and collapses). Thresholds are written out where a paper sets them for
the row; otherwise the divergence's own default holds.
"""

import dataclasses
import math

from dppo_jax import advantages
from dppo_jax import divergences
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import registry


@dataclasses.dataclass(frozen=True)
class Algorithm:
  """One row. `source` says where its numbers come from."""

  source: str
  divergence: str
  divergence_options: dict = dataclasses.field(default_factory=dict)
  ratio_cap: float = math.inf
  advantage: str = 'group_mean'
  normalizer: str = 'constant'

  def config(self) -> dict:
    """The row as entries of a training config."""
    return {
        'divergence': divergences.config(
            self.divergence, **self.divergence_options
        ),
        'loss': losses.config('policy_gradient', ratio_cap=self.ratio_cap),
        'advantage': advantages.config(self.advantage),
        'normalizer': normalizers.config(self.normalizer),
    }


_DPPO = 'arXiv:2602.04879'

TABLE = {
    'dppo_topk_tv': Algorithm(
        source=f'{_DPPO} Eq. 15, App. F.3 (threshold 0.2, K 20, C 5)',
        divergence='topk_tv',
        ratio_cap=5.0,
    ),
    'dppo_topk_kl': Algorithm(
        source=f'{_DPPO} Eq. 16, App. F.3 (threshold 0.05, K 20, C 5)',
        divergence='topk_kl',
        ratio_cap=5.0,
    ),
    'dppo_binary_tv': Algorithm(
        source=f'{_DPPO} Eq. 13, App. C.1 (threshold 0.15, no cap)',
        divergence='binary_tv',
    ),
    'dppo_binary_kl': Algorithm(
        source=f'{_DPPO} Eq. 14, App. C.1 (threshold 0.05, no cap)',
        divergence='binary_kl',
    ),
    'dppo_full_tv': Algorithm(
        source='ours: what topk_tv approximates, with its threshold and cap',
        divergence='full_tv',
        ratio_cap=5.0,
    ),
    'dppo_full_kl': Algorithm(
        source='ours: what topk_kl approximates, with its threshold and cap',
        divergence='full_kl',
        ratio_cap=5.0,
    ),
    'grpo': Algorithm(
        source='arXiv:2402.03300 clip 0.2; advantage without division by the '
        f'standard deviation, as {_DPPO} App. C.1',
        divergence='ratio_gap',
    ),
    'grpo_clip_higher': Algorithm(
        source=f'arXiv:2503.14476; {_DPPO} App. C.1 (0.2 and 0.28)',
        divergence='ratio_gap',
        divergence_options={'threshold_low': 0.2, 'threshold_high': 0.28},
    ),
    'cispo': Algorithm(
        source=f'arXiv:2506.13585; PG-TIS of {_DPPO} App. C.1 (C 3)',
        divergence='none',
        ratio_cap=3.0,
    ),
    'pg_is': Algorithm(
        source=f'{_DPPO} App. C.1: importance weights alone',
        divergence='none',
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
