"""What groups answered to the same prompts, in columns."""

from collections.abc import Sequence

from dppo_jax.report import page
from dppo_jax.report import runs as runs_lib
from dppo_jax.report.groups import Group
from dppo_jax.report.runs import Run

MAX_PROMPTS = 12
LONG = 300  # Characters; what is longer is folded,
SHOWN = 160  # behind the first of them.

# Split, prompt, and its how-manieth sample.
_Key = tuple[str, str, int]


def section(groups: Sequence[Group]) -> str:
  """Samples of the last step that all have: a row a prompt, a column a group.

  Of each group one run: of the lowest seed that all have if there is one, else
  of its lowest. A single group shows its seeds instead.
  """
  if len(groups) == 1:
    [group] = groups
    labels = [f'seed {seed}' for seed in group.seeds]
    chosen, note = list(group.runs), ''
  else:
    labels = [group.name for group in groups]
    chosen, note = _one_run_each(groups)
  step = _last_common_step(chosen)
  if step is None:
    if not any(run.sampled for run in chosen):
      return ''
    return _wrap('', 'There is no step at which all have logged samples.')
  samples = [_by_key(run, step) for run in chosen]
  keys = _shared(samples)
  if not keys:
    return _wrap('', f'At step {step}, no two have a prompt in common.')
  shown = keys[:MAX_PROMPTS]
  more = f', {len(shown)} of {len(keys)} prompts' if shown != keys else ''
  rows = ''.join(_row(key, samples, labels) for key in shown)
  head = ''.join(f'<th>{page.escape(x)}</th>' for x in ('Prompt', *labels))
  table = (
      '<div class="scroll"><table class="side"><thead><tr>'
      f'{head}</tr></thead><tbody>{rows}</tbody></table></div>'
  )
  return _wrap(table, f'Step {step}, the last that all have{note}{more}.')


def _wrap(table: str, note: str) -> str:
  return (
      '<section><h2>Samples side by side</h2>'
      f'<p class="note">{page.escape(note)}</p>{table}</section>'
  )


def _one_run_each(groups: Sequence[Group]) -> tuple[list[Run], str]:
  """A run of each group, and what is said of its choice."""
  common = set.intersection(*(set(group.seeds) for group in groups))
  seeds = [
      next((s for s in group.seeds if s in common), group.seeds[0])
      for group in groups
  ]
  runs = [
      group.runs[group.seeds.index(seed)]
      for group, seed in zip(groups, seeds, strict=True)
  ]
  if len(set(seeds)) == 1:
    return runs, f', of seed {seeds[0]}'
  return runs, f', of seeds {", ".join(seeds)}'


def _last_common_step(runs: Sequence[Run]) -> int | None:
  return max(
      set.intersection(*(set(run.sampled) for run in runs)), default=None
  )


def _by_key(run: Run, step: int) -> dict[_Key, dict]:
  """Samples of a step, held-out ones first, in the order logged."""
  found: dict[_Key, dict] = {}
  rows = runs_lib.samples(run, step)
  for row in sorted(rows, key=lambda row: row.get('split') != 'test'):
    split, prompt, number = row.get('split', ''), row.get('prompt', ''), 0
    while (key := (split, prompt, number)) in found:
      number += 1
    found[key] = row
  return found


def _shared(samples: Sequence[dict[_Key, dict]]) -> list[_Key]:
  """Keys of at least two, those of all first."""
  counts: dict[_Key, int] = {}
  for each in samples:
    for key in each:
      counts[key] = counts.get(key, 0) + 1
  shared = [key for key, count in counts.items() if count > 1]
  return sorted(shared, key=lambda key: counts[key] < len(samples))


def _row(
    key: _Key, samples: Sequence[dict[_Key, dict]], labels: Sequence[str]
) -> str:
  split, prompt, _ = key
  answer = next(each[key] for each in samples if key in each).get('answer')
  cells = ''.join(
      _cell(label, each.get(key))
      for label, each in zip(labels, samples, strict=True)
  )
  return (
      f'<tr><td data-label="Prompt">{_text(prompt)}'
      f'{page.note(f"answer {answer}, {split}")}</td>{cells}</tr>'
  )


def _cell(label: str, sample: dict | None) -> str:
  label = page.escape(label)
  if sample is None:
    return f'<td data-label="{label}">–</td>'
  return (
      f'<td data-label="{label}" class="{runs_lib.verdict(sample)}">'
      f'{_text(sample.get("completion", ""))}{page.reward(sample)}</td>'
  )


def _text(text: str) -> str:
  """All of it, folded if it is long."""
  if len(text) <= LONG:
    return f'<div class="text">{page.escape(text)}</div>'
  return (
      f'<details><summary class="text">{page.escape(text[:SHOWN])} … '
      f'<span class="note">{len(text):,} characters</span></summary>'
      f'<div class="text">… {page.escape(text[SHOWN:])}</div></details>'
  )
