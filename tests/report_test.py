"""The page of a run: complete, self-contained, never the cause of a crash."""

import html.parser
import json
import math
from pathlib import Path
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from dppo_jax import metrics
from dppo_jax import report

# Keys with * become the two that a run would log.
KEYS = [
    key.replace('*', k)
    for plot in report.PLOTS
    for curve in plot.curves
    for key in [curve.key]
    for k in (('8', '16') if key.endswith('*') else ('',))
]

CONFIG = {
    'name': 'gsm8k_tv_topk',
    'algorithm': 'dppo_topk_tv',
    'divergence': {'name': 'topk_tv', 'threshold': 0.125},
    'run': {
        'command': 'python -m dppo_jax.main --config=configs/tv_topk.py',
        'commit': 'abc1234def567890',
        'device': '1 x H200',
        'versions': {'jax': '0.10.2'},
    },
}


def make_run(workdir, *, keys=KEYS, num_steps=40, samples=(), config=None):
  rng = np.random.default_rng(0)
  with metrics.MetricsWriter(workdir, tensorboard=False) as writer:
    for step in range(1, num_steps + 1):
      writer.write(step, {key: rng.uniform(0.1, 0.9) for key in keys})
    for step, rows in samples:
      writer.write_samples(step, rows)
  if config is not None:
    (workdir / 'config.json').write_text(json.dumps(config))
  return workdir


def sample(completion, reward, prompt='What is 1 + 1?'):
  return {
      'split': 'eval',
      'prompt': prompt,
      'completion': completion,
      'answer': '2',
      'reward': reward,
  }


def page_of(workdir, **options):
  return report.write_report(workdir, **options).read_text(encoding='utf-8')


class Tags(html.parser.HTMLParser):
  """Collects tags with attributes, and checks that they close in order."""

  VOID = ('meta', 'link', 'img', 'br')

  def __init__(self, page):
    super().__init__()
    self.tags, self._open = [], []
    self.feed(page)
    assert self._open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag


def test_contains_every_plot_when_its_keys_exist(tmp_path):
  page = page_of(make_run(tmp_path, config=CONFIG))
  for plot in report.PLOTS:
    assert f'aria-label="{plot.title}"' in page
  assert page.count('<svg') == len(report.PLOTS)
  assert 'Not plotted' not in page and 'Not logged' not in page
  for label in ('avg@8', 'avg@16', 'pass@8', 'pass@16'):
    assert label in page


def test_is_self_contained(tmp_path):
  link = '<img src="https://example.com/x.png"> url(https://example.com)'
  run = make_run(tmp_path, config=CONFIG, samples=[(1, [sample(link, 1.0)])])
  page = page_of(run)
  for tag, attributes in Tags(page).tags:
    assert tag not in ('script', 'link', 'iframe', 'img', 'object', 'use')
    for name, value in attributes.items():
      assert name not in ('src', 'href', 'srcset', 'data', 'xlink:href')
      assert 'url(' not in (value or '')
  style = page[page.index('<style>') : page.index('</style>')]
  assert 'url(' not in style and '@import' not in style and 'http' not in style


def test_escapes_html_wherever_text_comes_from_outside(tmp_path):
  attack = '"\'><script>alert(1)</script>$body'
  config = {'name': attack, 'run': {'command': attack, 'device': attack}}
  rows = [sample(attack, 1.0, prompt=attack)]
  run = make_run(
      tmp_path,
      keys=['eval/avg@' + attack],
      samples=[(1, rows)],
      config=config,
  )
  tokens = {'positive': [[attack, 3]]}
  (run / 'masked_tokens.json').write_text(json.dumps(tokens))
  page = page_of(run, title=attack)
  assert '<script' not in page
  assert page.count('<h1>') == 1  # $body was not filled in.
  assert 'script' not in {tag for tag, _ in Tags(page).tags}
  assert '&lt;script&gt;alert(1)&lt;/script&gt;' in page


def test_skips_a_plot_without_data_and_names_the_missing_keys(tmp_path):
  keys = [key for key in KEYS if not key.startswith(('entropy/', 'eval/'))]
  page = page_of(make_run(tmp_path, keys=keys))
  assert 'aria-label="Entropy"' not in page
  assert '<li>Entropy: <code>entropy/mean</code></li>' in page
  assert '<code>eval/avg@*</code>, <code>eval/pass@*</code>' in page
  assert page.count('<svg') == len(report.PLOTS) - 2


def test_draws_what_there_is_and_names_the_rest(tmp_path):
  page = page_of(make_run(tmp_path, keys=['divergence/mean', 'time/score_s']))
  assert page.count('<svg') == 2
  assert 'Not logged: divergence/max.' in page
  assert 'Not logged: time/learn_s, time/sample_s.' in page


@pytest.mark.parametrize(
    'values',
    [
        [],
        [0.5],
        [math.nan] * 3,
        [math.inf, 1.0, -math.inf],
        [0.0] * 50,
        [-1.0, 1.0] * 30,
        [1e-9, 1e9] * 30,
        [1e30] * 2,
        [1.0] + [math.nan] * 3000 + [1.0],
    ],
    ids=str,
)
def test_survives_odd_values_in_every_plot(tmp_path, values):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step, value in enumerate(values):
      writer.write(step, dict.fromkeys(KEYS, value))
  page = page_of(tmp_path)
  for _, attributes in Tags(page).tags:
    drawn = attributes.get('d', '') + attributes.get('cy', '')
    assert 'nan' not in drawn and 'inf' not in drawn


def test_survives_an_empty_workdir(tmp_path):
  page = page_of(tmp_path, title='nothing yet')
  assert '<h1>nothing yet</h1>' in page
  assert 'Not plotted' in page


def test_survives_parts_of_the_step_time_logged_at_different_steps(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {'time/learn_s': 1.0})
    writer.write(2, {'time/sample_s': 2.0})
    writer.write(3, {'time/learn_s': 1.0})
  assert 'aria-label="Step time"' in page_of(tmp_path)


def test_headline_is_accuracy_before_and_after(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step, accuracy in ((0, 0.25), (50, 0.75), (100, 0.5)):
      writer.write(step, {'eval/avg@8': accuracy, 'eval/avg@16': 0.1})
  page = page_of(tmp_path)
  assert '25.0% → 50.0%' in page
  assert 'Held-out avg@8' in page


def test_headline_time_counts_the_steps_between_logged_ones(tmp_path):
  # 3 rows, each for 10 steps of 60 s: 30 min.
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in (10, 20, 30):
      writer.write(step, {'time/step_s': 60.0})
  assert '>30 min<' in page_of(tmp_path)


def test_header_says_where_the_run_comes_from(tmp_path):
  page = page_of(make_run(tmp_path, config=CONFIG))
  header = page[page.index('<header>') : page.index('</header>')]
  for text in (
      'gsm8k_tv_topk',
      'dppo_topk_tv',
      '1 x H200',
      'commit abc1234def56',
      'jax 0.10.2',
      CONFIG['run']['command'],
  ):
    assert text in header
  assert '&quot;threshold&quot;: 0.125' in page[page.index('<details>') :]


@pytest.mark.parametrize(
    'divergence, labels',
    [
        ({'threshold': 0.125}, ['0.125']),
        (
            {'threshold': 1, 'threshold_low': 0.2, 'threshold_high': 0.28},
            ['0.2', '0.28'],
        ),
        ({'threshold': 0.2, 'threshold_low': None}, ['0.2']),
        ({'threshold': math.inf}, []),
        ({'name': 'none'}, []),
    ],
    ids=str,
)
def test_draws_the_thresholds_of_the_config(tmp_path, divergence, labels):
  run = make_run(
      tmp_path, keys=['divergence/mean'], config={'divergence': divergence}
  )
  assert re.findall('threshold <b>([0-9.]+)<', page_of(run)) == labels


def test_samples_show_first_and_last_step_and_who_is_right(tmp_path):
  run = make_run(
      tmp_path,
      samples=[
          (0, [sample('before', 0.0), sample('lucky', 1.0)]),
          (20, [sample('halfway', 1.0)]),
          (40, [sample('after', 1.0), sample('still off', -1.0)]),
      ],
  )
  page = page_of(run)
  assert 'halfway' not in page
  assert page.index('Step 0') < page.index('>before<') < page.index('Step 40')
  for text, verdict in (
      ('before', 'wrong'),
      ('lucky', 'correct'),
      ('after', 'correct'),
      ('still off', 'wrong'),
  ):
    row = next(row for row in page.split('<tr')[1:] if f'>{text}<' in row)
    assert f'class="{verdict}"' in row and verdict in row.split('</b>')[1]


def test_lists_the_most_frequently_masked_tokens(tmp_path):
  counts = {
      'positive': [['</answer>', 7], ['\n', 70]],
      'negative': [[' wait', 3]],
  }
  (tmp_path / 'masked_tokens.json').write_text(json.dumps(counts))
  page = page_of(tmp_path)
  assert page.index(r'&#x27;\n&#x27;') < page.index('&lt;/answer&gt;')
  assert '&#x27; wait&#x27;' in page


def test_a_long_run_makes_a_small_page_that_keeps_every_spike(tmp_path):
  y = np.sin(np.arange(20_000.0))
  y[12_345] = 100.0
  kept = report._thinned(y)
  assert len(kept) <= report.MAX_POINTS
  assert {0, 12_345, 19_999} <= set(kept.tolist())


def test_reading_a_run_does_not_wait_for_jax():
  # The package is entered by its path, so that only the report's own imports
  # count and not those of `dppo_jax/__init__.py`.
  code = textwrap.dedent(f"""
      import sys, types
      package = types.ModuleType('dppo_jax')
      package.__path__ = [{str(Path(report.__file__).parent)!r}]
      sys.modules['dppo_jax'] = package
      import dppo_jax.report
      assert 'jax' not in sys.modules
  """)
  subprocess.run([sys.executable, '-c', code], check=True)


def test_the_command_line_rewrites_the_page(tmp_path, capsys):
  make_run(tmp_path, keys=['reward/mean'])
  report.main([f'--workdir={tmp_path}', '--title=again'])
  assert capsys.readouterr().out.strip() == str(tmp_path / 'report.html')
  assert '<h1>again</h1>' in (tmp_path / 'report.html').read_text()


def test_the_command_line_refuses_a_directory_that_is_not_there(
    tmp_path, capsys
):
  with pytest.raises(SystemExit):
    report.main([f'--workdir={tmp_path / "typo"}'])
  assert 'typo is not a directory' in capsys.readouterr().err
