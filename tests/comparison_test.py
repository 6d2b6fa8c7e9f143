"""The page of several runs: what it groups, averages, shows and refuses."""

import itertools
import json
import math
from pathlib import Path
import re
import sys

import numpy as np
import pytest
from report_runs import check_page
from report_runs import CONFIG
from report_runs import heights
from report_runs import KEYS
from report_runs import make_run
from report_runs import plot_of
from report_runs import sample

import dppo_jax
from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import metrics
from dppo_jax.report import __main__ as command
from dppo_jax.report import drawing
from dppo_jax.report import groups
from dppo_jax.report import page
from dppo_jax.report import plots
from dppo_jax.report import runs
from dppo_jax.report import write_comparison
from dppo_jax.report import write_report

NAN = math.nan


def log(workdir, values, *, config=None, key='reward/mean', first=1):
  """A run that logged these values of one key, one each step."""
  workdir.mkdir(parents=True, exist_ok=True)
  with metrics.MetricsWriter(workdir, tensorboard=False) as writer:
    for step, value in enumerate(values, start=first):
      writer.write(step, {key: value})
  if config is not None:
    (workdir / 'config.json').write_text(json.dumps(config))
  return workdir


def page_of(*directories, **options):
  path = Path(directories[0]).parent / 'compare.html'
  write_comparison(directories, path, **options)
  return path.read_text(encoding='utf-8')


def names_of(configs, folder):
  """Names of the groups of runs with these configs."""
  found = groups.of([
      runs.read(log(folder / str(i), [1.0], config=config))
      for i, config in enumerate(configs)
  ])
  return [group.name for group in found]


def text_of(html):
  """What a reader sees of a piece of a page."""
  return ' '.join(re.sub('<[^>]*>', ' ', html).split())


def band_heights(svg, color):
  """As `heights` of the corners of the bands of that color."""
  return [y for _, y in band_corners(svg, color)]


def band_corners(svg, color):
  """(x, y) of the bands of that color."""
  bands = re.findall(
      r'd="([^"]*)"\s*/>\s*</defs>\s*<g[^>]*>\s*'
      rf'<use[^>]* y="([\d.]+)" style="fill: var.--{color}', svg
  )
  return [(float(x), float(y) + float(offset)) for d, offset in bands
          for x, y in re.findall(r'[ML] (\S+) (\S+)', d)]


def row_of(html, name):
  """The text of the table's row that starts with that name."""
  rows = map(text_of, re.findall('<tr>(.*?)</tr>', html, re.DOTALL))
  return next(row for row in rows if row.startswith(name))


# --- A whole page -----------------------------------------------------------


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
  """Two algorithms, two seeds, everything that a run may log."""
  folder = tmp_path_factory.mktemp('sweep')
  for algorithm, seed in itertools.product(('ppo', 'dppo'), (0, 1)):
    run = make_run(
        folder / f'{algorithm}-{seed}',
        config=CONFIG | {'algorithm': algorithm, 'seed': seed},
        samples=[(20, [sample(f'{algorithm} says 2', 1.0)])],
    )
    counts = {'positive': [['2', 3 + seed]], 'negative': [[' \n', 1]]}
    (run / 'masked_tokens.json').write_text(json.dumps(counts))
    points = [[0.5, 1.0 + seed, 0.1, 0.0], [0.9, 0.5, 0.4, 1.0]]
    (run / 'scatter.json').write_text(json.dumps(points))
  return folder


@pytest.fixture(scope='module')
def swept(sweep, tmp_path_factory):
  path = tmp_path_factory.mktemp('page') / 'compare.html'
  return write_comparison([sweep], path).read_text(encoding='utf-8')


def test_the_page_is_well_formed_and_self_contained(swept):
  check_page(swept)


def test_the_same_logs_make_the_same_page(sweep, swept, tmp_path):
  again = write_comparison([sweep], tmp_path / 'again.html')
  assert again.read_text(encoding='utf-8') == swept


def test_every_plotted_key_has_a_figure_with_a_line_of_each_group(swept):
  for plot in plots.PLOTS:
    figures = [
        svg for svg in swept.split('<svg')[1:]
        if re.match(rf'[^>]*aria-label="{re.escape(plot.title)}[:"]', svg)
    ]
    # CONFIG's two held-out k: one key becomes two.
    expected = sum(key.endswith('*') + 1 for key in plot.curves)
    assert len(figures) == expected, plot.title
    for svg in figures:
      for color in ('c0', 'c1'):
        assert band_heights(svg, color), plot.title
        assert heights(svg, color), plot.title
  assert 'Not plotted' not in swept and 'Not logged' not in swept


def test_heading_and_tables_name_the_groups(swept):
  assert '<h1>dppo / ppo</h1>' in swept
  assert '2 groups, 4 runs' in swept
  results = swept[swept.index('<h2>Results') : swept.index('<h2>What differs')]
  for name in ('dppo', 'ppo'):
    assert row_of(results, name).startswith(f'{name} 2 40 ')
  start, end = map(swept.index, ('<h2>What differs', 'Shared settings'))
  differs = swept[start:end]
  assert row_of(differs, 'algorithm') == 'algorithm dppo ppo'
  assert 'threshold' not in differs
  assert 'commit abc1234def567890 · device 1 x H200 · jax 0.10.2' in swept


def test_words_of_a_cloud_are_counted_over_the_seeds(swept):
  # 3 and 4 of seeds 0 and 1; the blank keeps its quotes, or nobody sees it.
  clouds = swept[swept.index('Most frequently masked tokens') :]
  assert clouds.count('<code>2</code><sub>7</sub>') == 2
  assert clouds.count(r'<code>&#x27; \n&#x27;</code><sub>2</sub>') == 2


def test_points_of_all_seeds_are_in_the_cloud_of_their_group(swept):
  for name in ('dppo', 'ppo'):
    svg = plot_of(swept, f'{name}: pi / mu against mu')
    # One token of each seed was kept, one dropped.
    assert svg.count('<use') == 4
  assert swept.count('kept <b>2</b>') == swept.count('dropped <b>2</b>') == 4


def test_text_from_outside_is_escaped_everywhere(tmp_path):
  attack = '"\'><script>alert(1)</script>$body\\1'
  for i, name in enumerate(('one', 'two')):
    config = {
        'algorithm': attack + name,
        'run': {'commit': attack + name, 'device': attack},
    }
    # A file name holds no slash.
    folder = tmp_path / f'<script>{i}'
    rows = [sample(attack, 1.0, prompt=attack)]
    run = make_run(
        folder, keys=['eval/avg@' + attack], num_steps=2, config=config,
        samples=[(1, rows)],
    )
    counts = {'positive': [[attack, 3]], 'negative': []}
    (run / 'masked_tokens.json').write_text(json.dumps(counts))
  html = page_of(*sorted(tmp_path.glob('<*')), title=attack)
  check_page(html)
  assert '<script' not in html
  assert html.count('<h1>') == 1  # $body was not filled in.


# --- Groups -----------------------------------------------------------------


GRPO = {
    'algorithm': 'grpo', 'optimizer': {'learning_rate': 0.1}, 'staleness': 1
}


def changed(**changes):
  return GRPO | changes


RATE = {'optimizer': {'learning_rate': 0.2}}


@pytest.mark.parametrize(
    'configs, names',
    [
        ([GRPO], ['grpo']),
        ([GRPO, changed(algorithm='dppo')], ['grpo', 'dppo']),
        (
            [GRPO, changed(**RATE)],
            ['learning_rate=0.1', 'learning_rate=0.2'],
        ),
        # What differs with the algorithm is not said a second time.
        ([GRPO, changed(algorithm='dppo', **RATE)], ['grpo', 'dppo']),
        # Only those that are still alike need more.
        (
            [GRPO, changed(**RATE), changed(algorithm='dppo')],
            ['grpo learning_rate=0.1', 'grpo learning_rate=0.2', 'dppo'],
        ),
        # One setting that tells all three apart, not two that do so together.
        (
            [GRPO, changed(staleness=2, **RATE), changed(staleness=3, **RATE)],
            ['staleness=1', 'staleness=2', 'staleness=3'],
        ),
        # A setting that one of them does not have.
        ([GRPO, changed(loss={'k': 1})], ['k=–', 'k=1']),
        # The same last word twice: the whole name.
        (
            [
                {'a': {'rate': 1}, 'b': {'rate': 1}},
                {'a': {'rate': 1}, 'b': {'rate': 2}},
                {'a': {'rate': 2}, 'b': {'rate': 1}},
            ],
            ['a.rate=1 b.rate=1', 'a.rate=1 b.rate=2', 'a.rate=2'],
        ),
    ],
    ids=lambda x: ', '.join(map(str, x)) if isinstance(x[0], str) else '',
)
def test_groups_are_named_by_what_tells_them_apart(configs, names, tmp_path):
  assert names_of(configs, tmp_path) == names


def settings_of(name, **changes):
  """What the table says of an algorithm, with other parts."""
  parts = {
      part: value if isinstance(value, str) else value.to_dict()
      for part, value in (algorithms.config(name) | changes).items()
  }
  return parts | {'optimizer': {'learning_rate': 0.1}, 'task': {'name': 'math'}}


def test_a_method_with_another_part_is_not_called_by_its_row_alone(tmp_path):
  kl = {'divergence': divergences.config('topk_kl')}
  assert names_of(
      [
          settings_of('grpo'),
          settings_of('dppo_topk_tv', **kl),
          settings_of('dppo_topk_tv', **kl) | RATE,
          settings_of('dppo_topk_tv'),
          settings_of('dppo_topk_tv', **kl, anchor='recomputed'),
      ],
      tmp_path,
  ) == [
      'grpo',
      'dppo_topk_tv with divergence topk_kl learning_rate=0.1',
      'dppo_topk_tv with divergence topk_kl learning_rate=0.2',
      'dppo_topk_tv',
      'dppo_topk_tv with divergence topk_kl, anchor recomputed',
  ]


@pytest.mark.parametrize('name', algorithms.names())
def test_a_row_is_called_by_its_name(name):
  described = groups.algorithm(groups._flat(settings_of(name)))
  assert described == name


def test_a_page_without_jax_calls_a_method_by_its_row(monkeypatch):
  groups._parts.cache_clear()
  monkeypatch.setitem(sys.modules, 'dppo_jax.algorithms', None)
  monkeypatch.delattr(dppo_jax, 'algorithms', raising=False)
  settings = {'algorithm': 'grpo', 'divergence.name': 'topk_tv'}
  assert groups.algorithm(settings) == 'grpo'
  groups._parts.cache_clear()


def test_the_head_says_the_method_that_all_share(tmp_path):
  for i, rate in enumerate((0.0003, 0.003)):
    config = settings_of(
        'dppo_topk_tv', divergence=divergences.config('topk_kl')
    ) | {'optimizer': {'learning_rate': rate}, 'model': {'name': 'embedded'}}
    log(tmp_path / 'runs' / str(i), [1.0], config=config)
  html = page_of(tmp_path / 'runs')
  assert '<h1>learning_rate=0.0003 / learning_rate=0.003</h1>' in html
  assert (
      'Shared by all: algorithm dppo_topk_tv with divergence topk_kl · '
      'divergence topk_kl, threshold 0.05 · loss policy_gradient · '
      'model embedded · task math<'
  ) in html
  shared = html[html.index('<summary>Shared settings') :]
  assert row_of(shared, 'loss.ratio_cap') == 'loss.ratio_cap 5.0'
  assert 'learning_rate' not in shared[: shared.index('</details>')]


def test_the_head_says_of_different_methods_only_what_is_the_same(tmp_path):
  tighter = divergences.config('topk_tv', threshold=0.1)
  configs = [
      settings_of('dppo_topk_tv'),
      settings_of('dppo_topk_tv', divergence=tighter),
      settings_of('cispo'),
  ]
  for i, config in enumerate(configs):
    log(tmp_path / str(i), [1.0], config=config)
  two = page_of(tmp_path / '0', tmp_path / '1')
  assert 'algorithm dppo_topk_tv · divergence topk_tv · loss' in two
  three = page_of(*(tmp_path / str(i) for i in range(3)))
  assert 'Shared by all: loss policy_gradient · task math<' in three


def test_seeds_and_what_changes_no_number_make_one_group(tmp_path):
  configs = [
      changed(seed=10, compilation_cache='/a', tensorboard=True),
      changed(seed=2, compilation_cache='/b', tensorboard=False),
  ]
  [group] = groups.of([
      runs.read(log(tmp_path / str(i), [1.0], config=config))
      for i, config in enumerate(configs)
  ])
  assert group.seeds == ['2', '10']  # By number.


def test_one_seed_before_and_after_a_commit_is_two_groups(tmp_path):
  configs = [changed(seed=0, run={'commit': c}) for c in ('abc', 'def')]
  assert names_of(configs, tmp_path) == ['commit=abc', 'commit=def']


def test_seeds_of_two_commits_are_one_group_and_the_page_says_so(tmp_path):
  for seed, commit in enumerate(('abc', 'def')):
    config = changed(seed=seed, run={'commit': commit, 'device': 'cpu'})
    log(tmp_path / 'runs' / str(seed), [1.0], config=config)
  html = page_of(tmp_path / 'runs')
  assert '1 group, 2 runs' in html
  differs = html[html.index('<h2>What differs') :]
  assert row_of(differs, 'commit') == 'commit abc / def'
  assert '<p class="note">device cpu</p>' in html


def test_what_was_otherwise_at_earlier_starts_is_said(tmp_path):
  now = {'commit': 'new', 'device': 'cpu', 'versions': {'jax': '2', 'x': '1'}}
  before = [now | {'commit': c, 'versions': {'jax': '1', 'x': '1'}}
            for c in ('old', 'older')]
  run = now | {'before': before}
  log(tmp_path / 'a', [1.0], config=changed(seed=0, run=run))
  log(tmp_path / 'b', [1.0], config=changed(seed=1, run=now))
  told = 'commit old, jax 1, commit older'
  html = page_of(tmp_path / 'a', tmp_path / 'b')
  assert row_of(html, 'before') == f'before {told} / –'
  assert f'earlier starts: {told}' in write_report(tmp_path / 'a').read_text()


# --- Mean and range ---------------------------------------------------------


def steps(*values, first=1):
  numbers = np.array(values, np.float64)
  return np.arange(first, first + len(values)), numbers


def test_mean_and_range_over_seeds():
  # Step 1: 1, 2, 6 -> 3 in 1 to 6. Step 2: 0, 0, 3 -> 1 in 0 to 3.
  curve = groups.curve([steps(1, 0), steps(2, 0), steps(6, 3)])
  assert curve.mean.tolist() == [3, 1]
  assert curve.low.tolist() == [1, 0]
  assert curve.high.tolist() == [6, 3]


def test_mean_ends_with_the_first_seed_and_has_a_gap_at_nan():
  curve = groups.curve([steps(1, NAN, 5), steps(3, 4, 7, 9)])
  assert curve.steps.tolist() == [1, 2, 3]
  np.testing.assert_equal(curve.mean, [2, NAN, 6])
  np.testing.assert_equal(curve.low, [1, NAN, 5])


def test_mean_of_seeds_that_log_at_different_steps_is_where_both_do():
  every_second = np.array([2, 4]), np.array([1.0, 3.0])
  curve = groups.curve([every_second, steps(0, 3, 0, 5)])
  assert curve.steps.tolist() == [2, 4]
  assert curve.mean.tolist() == [2, 4]


@pytest.mark.parametrize('length', [1, 2, 3, 10, 1000])
def test_smoothing_keeps_a_constant_however_early_it_ends(length):
  smooth = drawing.smooth(np.full(length, 3.0), num_points=1000)
  assert smooth.tolist() == pytest.approx([3.0] * length)


def test_a_long_curve_is_smoothed_as_by_all_of_its_points():
  length = 20_123
  rng = np.random.default_rng(0)
  values = np.sin(np.arange(length) / 1_000) + rng.normal(0, 1, length)
  values[5_000:5_100] = NAN
  distance = np.arange(-1_200, 1_201) / (length / 50)
  kernel = np.exp(-0.5 * distance**2)
  finite = np.isfinite(values)
  total, weight = (
      np.convolve(x, kernel, mode='same')
      for x in (np.where(finite, values, 0.0), finite.astype(float))
  )
  smooth = drawing.smooth(values, length)
  assert smooth.shape == values.shape
  np.testing.assert_allclose(smooth, total / weight, atol=0.01)


def test_the_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path):
  for seed, value in enumerate((1.0, 2.0, 6.0)):
    values = [value] * 20
    log(tmp_path / 'runs' / str(seed), values, config=changed(seed=seed))
  html = page_of(tmp_path / 'runs')
  svg = plot_of(html, 'Reward')
  band = band_heights(svg, 'c0')
  lines = sorted(set(heights(svg, 'c0')))  # From 6 at the top to 1.
  assert len(lines) == 4  # 6, the mean 3, 2, 1.
  assert min(band) == pytest.approx(lines[0], abs=0.02)
  assert max(band) == pytest.approx(lines[-1], abs=0.02)
  top, mean, _, bottom = lines
  expected = bottom + (3 - 1) / (6 - 1) * (top - bottom)
  assert mean == pytest.approx(expected, abs=0.02)  # Of 187.
  legend = html[html.index('<h2>Reward') : html.index('<svg')]
  assert text_of(legend).endswith('grpo 3')


def test_the_band_of_a_long_run_is_small_and_keeps_every_spike(tmp_path):
  key = 'eval/avg@8'  # Drawn as it was logged.
  for seed in range(2):
    values = np.full(3_000, 0.5)
    values[1_234] = seed
    log(tmp_path / 'runs' / str(seed), values, config=changed(seed=seed),
        key=key)
  svg = plot_of(page_of(tmp_path / 'runs'), 'Held-out accuracy: avg@8')
  band = band_heights(svg, 'c0')
  assert len(band) < 1_000
  lines = heights(svg, 'c0')
  assert min(band) == pytest.approx(min(lines), abs=0.02)
  assert max(band) == pytest.approx(max(lines), abs=0.02)


def test_the_band_of_a_long_run_reaches_from_its_first_to_its_last_step(
    tmp_path
):
  def ends(length):
    folder = tmp_path / str(length)
    for seed in range(2):
      log(folder / str(seed), np.full(length, seed), config=changed(seed=seed))
    svg = plot_of(page_of(folder), 'Reward')
    across = [x for x, _ in band_corners(svg, 'c0')]
    return min(across), max(across)

  assert ends(3_000) == pytest.approx(ends(100), abs=0.02)


def test_a_group_of_one_seed_has_a_line_and_no_band(tmp_path):
  log(tmp_path / 'a', [1.0, 2.0], config=GRPO)
  log(tmp_path / 'b', [3.0, 4.0], config=changed(staleness=2))
  svg = plot_of(page_of(tmp_path / 'a', tmp_path / 'b'), 'Reward')
  assert not band_heights(svg, 'c0') and not band_heights(svg, 'c1')
  assert heights(svg, 'c0') and heights(svg, 'c1')


def test_an_early_end_is_said_and_the_seed_drawn(tmp_path):
  log(tmp_path / 'runs' / '0', [1.0] * 20, config=changed(seed=0))
  log(tmp_path / 'runs' / '1', [2.0] * 5, config=changed(seed=1))
  html = page_of(tmp_path / 'runs')
  assert 'the last step is 20, but of seed 1 at step 5' in html
  assert '<b>12</b><div class="note">5 to 20</div>' in html  # (20 + 5) / 2


def test_a_key_that_only_some_have_is_drawn_and_the_others_named(tmp_path):
  key = 'entropy/mean'
  for seed in range(2):
    log(tmp_path / 'runs' / f'a{seed}', [1.0], config=changed(seed=seed))
    config = changed(seed=seed, algorithm='dppo')
    log(tmp_path / 'runs' / f'b{seed}', [1.0], config=config)
  log(tmp_path / 'runs' / 'a0', [0.5], key=key)
  html = page_of(tmp_path / 'runs')
  assert 'Not logged: grpo (1 of 2 seeds), dppo.' in (
      plot_of(html, 'Entropy')
  )
  assert f'Not plotted: {len(plots.PLOTS) - 2} of {len(plots.PLOTS)}' in html


@pytest.mark.parametrize('value', [NAN, math.inf, 0.0, -1.0, 1e30])
def test_a_seed_with_odd_values_does_not_break_the_page(tmp_path, value):
  for seed, last in enumerate((value, 1.0)):
    with metrics.MetricsWriter(tmp_path / str(seed), tensorboard=False) as out:
      for step, x in enumerate((1.0, last, value)):
        out.write(step, dict.fromkeys(KEYS, x))
    config = json.dumps(changed(seed=seed))
    (tmp_path / str(seed) / 'config.json').write_text(config)
  html = page_of(tmp_path / '0', tmp_path / '1')
  check_page(html)
  for d in re.findall(' d="([^"]*)"', html):
    assert 'nan' not in d and 'inf' not in d


def test_a_resumed_log_counts_each_step_once(tmp_path):
  run = log(tmp_path / 'a', [1.0, 2.0, 9.0], config=GRPO)
  with metrics.MetricsWriter(run, tensorboard=False) as writer:
    writer.truncate_after(2)
    writer.write(3, {'reward/mean': 3.0})
  with open(run / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 4, "rew')  # Killed within a line.
  log(tmp_path / 'b', [1.0, 2.0, 3.0], config=changed(staleness=2))
  svg = plot_of(page_of(tmp_path / 'a', tmp_path / 'b'), 'Reward')
  assert heights(svg, 'c0') == heights(svg, 'c1')


# --- Tables and notes -------------------------------------------------------


def test_results_are_first_best_and_final_accuracy(tmp_path):
  # best - final: 0.4 and 0.0.
  for seed, values in enumerate(([0.1, 0.8, 0.4], [0.3, 0.4, 0.6])):
    config = changed(seed=seed)
    log(tmp_path / 'runs' / str(seed), values, key='eval/avg@8', config=config)
  html = page_of(tmp_path / 'runs')
  row = row_of(html[html.index('<h2>Results') :], 'grpo')
  assert row.startswith(
      'grpo 2 3 0.200 0.100 to 0.300 0.700 0.600 to 0.800 '
      '0.500 0.400 to 0.600 0.200 0.000 to 0.400 –'
  )


def test_a_number_that_a_seed_lacks_has_no_mean(tmp_path):
  log(tmp_path / 'runs' / '0', [0.5], config=changed(seed=0))
  log(tmp_path / 'runs' / '1', [0.5], key='loss', config=changed(seed=1))
  html = page_of(tmp_path / 'runs')
  row = row_of(html[html.index('<h2>Results') :], 'grpo')
  assert row.startswith('grpo 2 1 – 1 of 2 seeds –')
  assert 'No held-out accuracy is logged.' in html


def test_divergences_of_two_kinds_are_said_to_have_two_units(tmp_path):
  for name, threshold in (('binary_tv', 0.15), ('ratio_gap', 0.2)):
    divergence = {'name': name, 'threshold': threshold}
    config = changed(algorithm=name, divergence=divergence)
    log(tmp_path / name, [0.1], key='divergence/mean', config=config)
  html = page_of(tmp_path / 'binary_tv', tmp_path / 'ratio_gap')
  assert 'Not in one unit: binary_tv, ratio_gap.' in html
  assert 'threshold, binary_tv <b>0.15</b>' in html
  assert 'threshold, ratio_gap <b>0.2</b>' in html


def test_a_threshold_that_all_have_is_drawn_once(tmp_path):
  divergence = {'name': 'binary_tv', 'threshold': 0.15}
  for i in range(2):
    config = changed(staleness=i, divergence=divergence)
    log(tmp_path / str(i), [0.1], key='divergence/mean', config=config)
  html = page_of(tmp_path / '0', tmp_path / '1')
  assert html.count('threshold <b>0.15</b>') == 1
  assert 'Not in one unit' not in html


# --- Samples ----------------------------------------------------------------


def with_samples(workdir, samples, **changes):
  make_run(workdir, keys=['reward/mean'], num_steps=2, samples=samples,
           config=changed(**changes))


def test_samples_of_one_prompt_stand_in_one_row(tmp_path):
  p, q = '1 + 1 =', '2 + 2 ='
  with_samples(tmp_path / 'a', [
      (0, [sample('early', 0.0, p)]),
      (10, [sample('right', 1.0, p), sample('only here', 0.0, 'other')]),
      (20, [sample('too late', 1.0, p)]),
  ], algorithm='grpo')
  with_samples(tmp_path / 'b', [
      (0, [sample('early', 0.0, p)]),
      (10, [sample('beside', 0.0, q), sample('left', 0.0, p)]),
  ], algorithm='dppo')
  html = page_of(tmp_path / 'a', tmp_path / 'b')
  part = html[html.index('Samples side by side') :]
  assert 'Step 10, the last that all have' in part
  row = row_of(part, p)
  assert row == f'{p} answer 2, eval right 1 ✓ correct left 0 ✗ wrong'
  for text in ('early', 'only here', 'beside', 'too late'):
    assert text not in part


def test_samples_come_from_a_seed_that_all_groups_have(tmp_path):
  for name, seeds in (('grpo', (0, 1)), ('dppo', (1, 2))):
    for seed in seeds:
      rows = [(5, [sample(f'{name} of seed {seed}', 1.0)])]
      with_samples(tmp_path / 'runs' / f'{name}{seed}', rows, seed=seed,
                   algorithm=name)
  html = page_of(tmp_path / 'runs')
  assert 'grpo of seed 1' in html and 'dppo of seed 1' in html
  assert 'grpo of seed 0' not in html and 'dppo of seed 2' not in html
  assert 'of seed 1, ' not in html.split('Samples side by side')[0]


def test_a_single_group_shows_its_seeds_side_by_side(tmp_path):
  for seed in range(2):
    rows = [(5, [sample(f'from {seed}', 1.0)])]
    with_samples(tmp_path / 'runs' / str(seed), rows, seed=seed)
  part = page_of(tmp_path / 'runs').split('Samples side by side')[1]
  assert '<th>seed 0</th><th>seed 1</th>' in part
  assert 'from 0' in part and 'from 1' in part


def test_a_long_sample_is_folded_and_complete(tmp_path):
  long = 'first ' + 1000 * 'x' + ' last'
  for name in ('grpo', 'dppo'):
    with_samples(tmp_path / name, [(5, [sample(long, 1.0)])], algorithm=name)
  html = page_of(tmp_path / 'grpo', tmp_path / 'dppo')
  part = html[html.index('Samples side by side') :]
  folded = re.findall('<details><summary class="text".*?</details>', part)
  assert len(folded) == 2
  for each in folded:
    shown, hidden = each.split('</summary>')
    assert 'first' in shown and 'last' in hidden
    assert each.count('x') >= 1000


@pytest.mark.parametrize(
    'one, two, said',
    [
        ([(1, [sample('a', 1.0)])], [(2, [sample('a', 1.0)])], 'no step at'),
        (
            [(1, [sample('a', 1.0, 'p')])],
            [(1, [sample('a', 1.0, 'q')])],
            'At step 1, no two have a prompt in common.',
        ),
    ],
    ids=['no common step', 'no common prompt'],
)
def test_samples_with_nothing_in_common_are_said(tmp_path, one, two, said):
  with_samples(tmp_path / 'a', one, algorithm='grpo')
  with_samples(tmp_path / 'b', two, algorithm='dppo')
  assert said in page_of(tmp_path / 'a', tmp_path / 'b')


# --- Lines that can be told apart -------------------------------------------

# Linear RGB as the three kinds of color-blind eyes see it: severity 1.0 of
# Machado, Oliveira, Fernandes, IEEE TVCG 15 (2009) 1291, doi
# 10.1109/TVCG.2009.113.
EYES = {
    'all cones': np.eye(3),
    'no red': [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    'no green': [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    'no blue': [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(ink):
  srgb = np.array([int(ink[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  curved = ((srgb + 0.055) / 1.055) ** 2.4
  return np.where(srgb <= 0.04045, srgb / 12.92, curved)


def lab(rgb):
  """CIE 1976 L*a*b* under D65, of linear RGB."""
  xyz = np.array([
      [0.4124, 0.3576, 0.1805],
      [0.2126, 0.7152, 0.0722],
      [0.0193, 0.1192, 0.9505],
  ]) @ np.clip(rgb, 0, 1) / [0.9505, 1, 1.089]
  x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize('eyes', EYES.values(), ids=EYES.keys())
@pytest.mark.parametrize('scheme', [0, 1], ids=['light', 'dark'])
def test_colors_of_curves_stay_apart_for_all_eyes(eyes, scheme):
  inks = [page.COLORS[f'c{i}'][scheme] for i in range(page.NUM_CURVE_COLORS)]
  seen = [lab(np.array(eyes) @ linear(ink)) for ink in inks]
  for a, b in itertools.combinations(seen, 2):
    assert np.linalg.norm(a - b) > 25


@pytest.mark.parametrize('scheme', [0, 1], ids=['light', 'dark'])
def test_curves_stand_out_from_the_card(scheme):
  luminance = lambda name: (
      linear(page.COLORS[name][scheme]) @ [0.2126, 0.7152, 0.0722]
  )
  for i in range(page.NUM_CURVE_COLORS):
    dark, light = sorted((luminance('card'), luminance(f'c{i}')))
    assert (light + 0.05) / (dark + 0.05) > 2.7  # WCAG's contrast ratio.


def test_no_two_groups_have_color_and_dash_in_common():
  styles = [drawing.style(i) for i in range(drawing.NUM_STYLES)]
  assert len(set(styles)) == len(styles)
  for one, next_one in itertools.pairwise(styles):
    assert one[0] != next_one[0] and one[1] != next_one[1]


def test_more_groups_than_lines_that_differ_are_refused(tmp_path):
  for i in range(drawing.NUM_STYLES + 1):
    log(tmp_path / 'runs' / str(i), [1.0], config=changed(staleness=i))
  with pytest.raises(ValueError, match='19 groups of runs are more than'):
    page_of(tmp_path / 'runs')


# --- The command line -------------------------------------------------------


def run_command(*arguments):
  command.main([str(argument) for argument in arguments])


def test_several_directories_become_one_page_in_this_one(
    tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  log(tmp_path / 'a', [1.0], config=GRPO)
  log(tmp_path / 'b', [1.0], config=changed(staleness=2))
  run_command('a', 'b', '--title=mine')
  assert capsys.readouterr().out.strip() == 'compare.html'
  assert '<h1>mine</h1>' in (tmp_path / 'compare.html').read_text()


def test_a_directory_of_runs_is_searched_and_hidden_ones_are_not(
    tmp_path, capsys
):
  log(tmp_path / 'deep' / 'er' / 'a', [1.0], config=GRPO)
  log(tmp_path / 'b', [1.0], config=changed(staleness=2))
  log(tmp_path / '.trash' / 'c', [1.0], config=changed(staleness=3))
  output = tmp_path / 'page.html'
  run_command(tmp_path, f'--output={output}')
  assert capsys.readouterr().out.strip() == str(output)
  assert '2 groups, 2 runs' in output.read_text()


def test_one_run_in_a_directory_gets_its_own_page(tmp_path, capsys):
  run = log(tmp_path / 'a', [1.0], config=GRPO)
  run_command(tmp_path)
  assert capsys.readouterr().out.strip() == str(run / 'report.html')


def test_a_run_of_a_sweep_without_a_step_is_left_out_and_named(tmp_path):
  log(tmp_path / 'runs' / 'a', [1.0], config=GRPO)
  log(tmp_path / 'runs' / 'begun', [], config=changed(staleness=2))
  html = page_of(tmp_path / 'runs')
  assert '1 group, 1 run.' in html
  assert f'Left out, no step logged yet: {tmp_path / "runs" / "begun"}' in html


def damage(folder, name):
  (folder / name).write_text('{"seed": 0,\n')


@pytest.mark.parametrize(
    'spoil, culprit, why',
    [
        (lambda bad: None, 'bad', 'is not a directory'),
        (lambda bad: bad.mkdir(), 'bad', 'no metrics.jsonl in it or below it'),
        (lambda bad: log(bad, [], config=GRPO), 'bad', 'no step yet'),
        (lambda bad: log(bad, [1.0]), 'bad', 'has no config.json'),
        (
            lambda bad: damage(log(bad, [1.0]), 'config.json'),
            'bad/config.json',
            'is damaged',
        ),
        (
            lambda bad: log(bad, [1.0], config=changed(seed=1)),
            'bad',
            'cannot be told apart: the same config, seed (1)',
        ),
    ],
    ids=[
        'missing', 'empty', 'no step', 'no config', 'damaged', 'the same twice'
    ],
)
def test_what_cannot_be_compared_is_named_in_one_line(
    tmp_path, capsys, spoil, culprit, why
):
  good = log(tmp_path / 'good', [1.0], config=changed(seed=1))
  spoil(tmp_path / 'bad')
  output = tmp_path / 'compare.html'
  with pytest.raises(SystemExit) as stopped:
    run_command(good, tmp_path / 'bad', f'--output={output}')
  assert stopped.value.code == 2
  error = capsys.readouterr().err
  assert str(tmp_path / culprit) in error and why in error
  assert error.count('\n') == 1
  assert not output.exists()
