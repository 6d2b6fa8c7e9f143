"""The page of a run: complete, self-contained, never the cause of a crash."""

import json
import math
from pathlib import Path
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from report_runs import check_page
from report_runs import CONFIG
from report_runs import heights
from report_runs import KEYS
from report_runs import make_run
from report_runs import plot_of
from report_runs import sample
from report_runs import Tags

from dppo_jax import evaluate
from dppo_jax import metrics
from dppo_jax import report
from dppo_jax.report import __main__ as command
from dppo_jax.report import plots


def page_of(workdir, **options):
  return report.write_report(workdir, **options).read_text(encoding='utf-8')


def test_contains_every_plot_when_its_keys_exist(tmp_path):
  page = page_of(make_run(tmp_path, config=CONFIG))
  for plot in plots.PLOTS:
    assert f'aria-label="{plot.title}"' in page
  assert page.count('<svg') == len(plots.PLOTS)
  assert 'Not plotted' not in page and 'Not logged' not in page
  for label in ('avg@8', 'avg@16', 'pass@8', 'pass@16'):
    assert label in page


def test_a_page_goes_to_a_file_in_a_folder_that_is_there(tmp_path, capsys):
  for output in (tmp_path, tmp_path / 'none' / 'page.html'):
    with pytest.raises(SystemExit):
      command.main([str(tmp_path), f'--output={output}'])
    assert f'--output={output} must be a file' in capsys.readouterr().err


def test_is_well_formed_and_self_contained(tmp_path):
  link = '<img src="https://example.com/x.png"> url(https://example.com)'
  run = make_run(tmp_path, config=CONFIG, samples=[(1, [sample(link, 1.0)])])
  page = page_of(run)
  check_page(page)
  assert page.count('var(--c0)') > page.count('<svg')


def test_the_same_logs_make_the_same_page(tmp_path):
  run = make_run(tmp_path, config=CONFIG)
  assert page_of(run) == page_of(run)


def test_escapes_html_wherever_text_comes_from_outside(tmp_path):
  attack = '"\'><script>alert(1)</script>$body'
  config = {
      'algorithm': attack + '2',
      'run': {'command': attack, 'device': attack},
  }
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
  assert page.count('<svg') == len(plots.PLOTS) - 2
  assert f'Not plotted: 2 of {len(plots.PLOTS)} plots' in page


def test_draws_what_there_is_and_names_the_rest(tmp_path):
  page = page_of(make_run(tmp_path, keys=['divergence/mean', 'time/score_s']))
  assert page.count('<svg') == 2
  assert 'Not logged: divergence/max.' in page
  assert 'Not logged: time/learn_s, time/sample_s.' in page


ODD_VALUES = {
    'none': [],
    'one': [0.5],
    'only nan': [math.nan] * 3,
    'infinite': [math.inf, 1.0, -math.inf],
    'only zero': [0.0] * 50,
    'both signs': [-1.0, 1.0] * 30,
    'many decades': [1e-9, 1e9] * 30,
    'huge': [1e30] * 2,
    'long gap': [1.0] + [math.nan] * 3000 + [1.0],
}


@pytest.mark.parametrize('values', ODD_VALUES.values(), ids=ODD_VALUES.keys())
def test_survives_odd_values_in_every_plot(tmp_path, values):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step, value in enumerate(values):
      writer.write(step, dict.fromkeys(KEYS, value))
  page = page_of(tmp_path)
  for _, attributes in Tags(page).tags:
    for name in ('d', 'x', 'y', 'transform'):
      value = attributes.get(name, '')
      assert 'nan' not in value and 'inf' not in value


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


def test_headline_time_is_compilation_steps_and_evaluations(tmp_path):
  # 3 rows, each for 10 steps of 60 s: 30 min; 90 s + 2 * 15 s: 2 min.
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    writer.write(0, {'time/compile_s': 90.0, 'time/eval_s': 15.0})
    for step in (10, 20, 30):
      writer.write(step, {'time/step_s': 60.0})
    writer.write(30, {'time/eval_s': 15.0})
  assert '>32.0 min<' in page_of(tmp_path)


def test_headline_speed_is_that_of_a_typical_step(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step, speed in enumerate((10.0, 5000.0, 5200.0, 5100.0, 5300.0)):
      writer.write(step, {'tokens/s': speed})
  assert re.search('>5,100</div><div class="note">Tokens/s<', page_of(tmp_path))


def test_header_says_where_the_run_comes_from(tmp_path):
  page = page_of(make_run(tmp_path, config=CONFIG), title='first try')
  header = page[page.index('<header>') : page.index('</header>')]
  for text in (
      'first try',
      'algorithm dppo_topk_tv · divergence topk_tv · threshold 0.125',
      '1 x H200',
      'commit abc1234def56',
      'jax 0.10.2',
      CONFIG['run']['command'],
  ):
    assert text in header
  assert '&quot;threshold&quot;: 0.125' in page[page.index('<details>') :]


def test_heading_is_the_directory_and_subtitle_does_not_repeat_it(tmp_path):
  run = tmp_path / 'dppo_topk_tv'
  page = page_of(make_run(run, config=CONFIG))
  assert '<h1>dppo_topk_tv</h1>' in page
  assert 'algorithm' not in page[: page.index('</header>')]


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


@pytest.mark.parametrize('reward, verdict', [
    (-1.0, 'wrong'), (0.0, 'wrong'), (math.nan, 'wrong'),
    (0.1, 'partly'), (0.6, 'partly'), (0.99, 'partly'),
    (1.0, 'correct'), (1.1, 'correct'),
])
def test_a_sample_is_correct_where_it_counts_for_pass_at_k(
    tmp_path, reward, verdict
):
  run = make_run(tmp_path, samples=[(1, [sample('this', reward)])])
  page = page_of(run)
  row = next(row for row in page.split('<tr')[1:] if '>this<' in row)
  assert f'class="{verdict}"' in row and verdict in row.split('</b>')[1]
  counted = evaluate.summarize(np.array([[reward]]))['eval/pass@1']
  assert counted == (verdict == 'correct')
  assert f'{counted:.0f} of 1 correct' in page


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
  rng = np.random.default_rng(0)
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in range(5_000):
      values = dict.fromkeys(KEYS, rng.uniform(0.4, 0.6))
      writer.write(step, values | {'reward/mean': 1.0 + 9 * (step == 1234)})
  page = page_of(tmp_path)
  assert len(page) < 1_000_000
  # The axis ends a twentieth above the spike, on a canvas 187 high.
  assert min(heights(plot_of(page, 'Reward'), 'c0')) < 20


def test_zeros_of_a_logarithmic_plot_lie_on_its_lower_edge(tmp_path):
  with metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
    for step in range(40):
      writer.write(
          step,
          {
              'on_policy/prob_gap_mean': 0.0,
              'mismatch/prob_gap_mean': 0.01,
              'mismatch/prob_gap_max': 0.5,
          },
      )
  figure = plot_of(page_of(tmp_path), 'Policy gap |pi - mu|')
  assert 'A value of 0 or less lies on the lower edge.' in figure
  first, mean, largest = (heights(figure, f'c{i}') for i in range(3))
  assert min(first) == max(first) > max(mean) > max(largest)


@pytest.mark.parametrize('num_steps', [1, 2])
def test_the_first_steps_are_drawn_with_markers(tmp_path, num_steps):
  page = page_of(make_run(tmp_path, num_steps=num_steps, keys=['reward/mean']))
  assert plot_of(page, 'Reward').count('<use') == num_steps


def test_importing_the_report_waits_for_no_big_package():
  # The package is entered by its path, so that only the report's own imports
  # count and not those of `dppo_jax/__init__.py`.
  code = textwrap.dedent(f"""
      import sys, types
      package = types.ModuleType('dppo_jax')
      package.__path__ = [{str(Path(report.__file__).parents[1])!r}]
      sys.modules['dppo_jax'] = package
      import dppo_jax.report
      assert not {{'jax', 'matplotlib'}} & set(sys.modules)
  """)
  subprocess.run([sys.executable, '-c', code], check=True)


def test_the_command_line_rewrites_the_page(tmp_path, capsys):
  make_run(tmp_path, keys=['reward/mean'])
  command.main([str(tmp_path), '--title=again'])
  assert capsys.readouterr().out.strip() == str(tmp_path / 'report.html')
  assert '<h1>again</h1>' in (tmp_path / 'report.html').read_text()


def test_the_command_line_refuses_a_directory_that_is_not_there(
    tmp_path, capsys
):
  with pytest.raises(SystemExit):
    command.main([str(tmp_path / 'typo')])
  assert 'typo is not a directory' in capsys.readouterr().err
