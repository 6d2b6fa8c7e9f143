"""Which tokens the trust region drops, group by group: points and words."""

from collections.abc import Sequence
import itertools
import math

import numpy as np

from dppo_jax.report import drawing
from dppo_jax.report import page
from dppo_jax.report.groups import Group

MAX_POINTS = 512  # Per figure.
MAX_WORDS = 30  # Per cloud.
_SMALLEST, _LARGEST = 11, 28  # Pixels of a word.


def section(groups: Sequence[Group]) -> str:
  """Clouds of each group beside those of the others; '' if none has any."""
  known = [group for group in groups if any(r.points for r in group.runs)]
  counted = [g for g in groups if any(r.masked_tokens for r in g.runs)]
  if not known and not counted:
    return ''
  missing = [g.name for g in groups if g not in known or g not in counted]
  note = (
      page.note(
          'A run writes these when it ends; not all are there for: '
          f'{", ".join(missing)}.'
      )
      if missing
      else ''
  )
  return (
      f'<section><h2>Masked tokens</h2>{note}{_points(known)}'
      f'{_words(counted)}</section>'
  )


def _points(groups: Sequence[Group]) -> str:
  """Two figures of each group, with the same axes in all (Fig. 2)."""
  if not groups:
    return ''
  points = [_pooled(group) for group in groups]
  parts = []
  for column, what, caption in (
      (1, 'pi / mu against mu', 'Tokens of the last step, of all seeds: half '
       'of them those that moved most, half spread evenly.'),
      (2, '|pi - mu| against mu', 'Of the same tokens.'),
  ):
    top = _top(np.concatenate(points)[:, column])
    figures = ''.join(
        drawing.scatter(
            f'{group.name}: {what}', caption, mu=each[:, 0],
            values=each[:, column], dropped=each[:, 3] > 0, top=top,
        )
        for group, each in zip(groups, points, strict=True)
    )
    parts.append(f'<div class="plots">{figures}</div>')
  return ''.join(parts)


def _top(values: np.ndarray) -> float:
  """The largest value, unless it would flatten nearly all others."""
  most = float(np.quantile(values, 0.99))
  return most if values.max() > 2 * most > 0 else float(values.max())


def _pooled(group: Group) -> np.ndarray:
  """[at most MAX_POINTS, 4] points of all runs, a share of each."""
  points = [point for run in group.runs for point in run.points]
  stride = math.ceil(len(points) / MAX_POINTS)
  return np.array(points[::stride], np.float64)


def _words(groups: Sequence[Group]) -> str:
  """A cloud of the tokens of each sign of the advantage, for each group."""
  cards = ''.join(
      f'<figure><h2>{page.escape(group.name)}</h2>'
      + _cloud('A > 0', _counts(group, 'positive'), 'c0')
      + _cloud('A < 0', _counts(group, 'negative'), 'c1')
      + '</figure>'
      for group in groups
  )
  return cards and (
      '<h3>Most frequently masked tokens</h3><p class="note">By the sign of '
      'the advantage A, in the order of the alphabet, with their number over '
      'all steps and seeds; the area of a word is its number, relative to the '
      f'most frequent of the cloud.</p><div class="plots">{cards}</div>'
  )


def _counts(group: Group, sign: str) -> list[tuple[str, int]]:
  """The most frequent tokens over all runs of a group."""
  total: dict[str, int] = {}
  pairs = (run.masked_tokens.get(sign) or [] for run in group.runs)
  for token, count in itertools.chain.from_iterable(pairs):
    total[token] = total.get(token, 0) + count
  return sorted(total.items(), key=lambda pair: -pair[1])[:MAX_WORDS]


def _cloud(label: str, counts: Sequence[tuple[str, int]], color: str) -> str:
  most = max((count for _, count in counts), default=1)
  words = ' '.join(
      f'<span style="font-size:{_size(count / most):.0f}px">'
      f'<code>{page.escape(_word(token))}</code><sub>{count:,}</sub></span>'
      for token, count in sorted(counts)
  )
  return (
      f'<div class="note">{page.escape(label)}{"" if words else ": none"}</div>'
      f'<div class="cloud" style="color:var(--{color})">{words}</div>'
  )


def _word(token: str) -> str:
  """As Python writes it, in quotes only if a space would be lost."""
  quoted = repr(token)
  return quoted if not token or token != token.strip() else quoted[1:-1]


def _size(share: float) -> float:
  return max(_SMALLEST, _LARGEST * math.sqrt(share))
