"""The benchmarks run and say what they promise; no test asserts a time."""

import json
import os
import pathlib
import subprocess
import sys

import many_devices
import pytest

from benchmarks import machine
from benchmarks import table

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def test_a_commit_is_dirty_for_changed_code_and_not_for_results(
    tmp_path, monkeypatch
):
  def git(*arguments):
    subprocess.run(
        ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *arguments],
        cwd=tmp_path, check=True, capture_output=True,
    )

  code = tmp_path / 'experiments' / 'x' / 'sweep.py'
  result = code.with_name('runs.csv')
  code.parent.mkdir(parents=True)
  for path in (code, result):
    path.write_text('1')
  git('init')
  git('add', '.')
  git('commit', '-m', 'a')
  monkeypatch.setattr(machine, '_ROOT', tmp_path)
  clean = machine.commit()
  assert clean and 'dirty' not in clean
  result.write_text('2')
  assert machine.commit() == clean
  code.write_text('2')
  assert machine.commit() == f'{clean}-dirty'


def test_a_result_is_kept_by_machine_name_and_date(
    tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(machine, 'RESULTS', tmp_path)
  cpu = {'cpus': 2, 'cpu': 'AMD EPYC', 'device': 'cpu', 'devices': 8}
  gpu = cpu | {'device': 'NVIDIA H100 80GB HBM3', 'devices': 1}
  date = {'date': '2026-11-23'}
  for described, folder in (
      (cpu, '2-amd-epyc'),
      (gpu, 'nvidia-h100-80gb-hbm3'),
      (gpu | {'devices': 4}, '4-nvidia-h100-80gb-hbm3'),
  ):
    result = {'machine': described | date}
    machine.report(result, 'step-tiny')
    kept = tmp_path / folder / 'step-tiny-2026-11-23.json'
    assert json.loads(kept.read_text()) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
  machine.report({'machine': cpu | date}, None)
  assert len(list(tmp_path.glob('*/*'))) == 3


def test_kept_results_lie_where_they_belong_and_have_a_headline():
  paths = list(machine.RESULTS.glob('**/*.json'))
  assert paths
  for path in paths:
    result = json.loads(path.read_text())
    name = path.stem.removesuffix(f'-{result["machine"]["date"]}')
    assert machine.path_of(name, result['machine']) == path
    assert table.headline(result)


def test_the_newest_result_is_shown_with_what_it_was_before(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(machine, 'RESULTS', tmp_path)
  spread = lambda x: dict.fromkeys(('median', 'min', 'max'), x)

  def keep(name, date, ratio, **changes):
    row = {
        'work': 'decode', **dict.fromkeys(('flops', 'bandwidth'), spread(1e9)),
        **dict.fromkeys(('seconds', 'floor_seconds'), spread(1)),
        'over_floor': spread(ratio),
    }
    about = machine.describe() | {'date': date, 'commit': f'of {date}'}
    machine.report({
        'benchmark': 'floor', 'sizes': {'length': 8}, 'rows': [row],
        'machine': about | changes,
    }, name)

  keep('floor', '2026-01-03', 1.5)
  keep('floor', '2026-01-02', 1.25)
  keep('floor', '2025-12-31', 1.75)
  keep('floor', '2026-01-01', 3.0, device='GPU')  # Another machine,
  keep('floor-small', '2026-01-01', 4.0)  # and another name.
  tables = table.tables_of(tmp_path)
  lines = tables.splitlines()
  assert sum(x.startswith('### ') for x in lines) == 3
  [before] = [x for x in lines if x.startswith('Before')]
  assert before == (
      'Before, 2026-01-02, commit of 2026-01-02: decode 1.25 (1.25 to 1.25) '
      'times the floor. Now: decode 1.5 (1.5 to 1.5) times the floor.'
  )
  title, gap, *_ = lines[lines.index(before) - 2 :]
  assert title.startswith('### ') and not gap
  assert 'commit of 2025-12-31' not in tables


def run(script, *options, data_dir):
  """The JSON object on the last line that a benchmark prints."""
  done = subprocess.run(
      [sys.executable, f'benchmarks/{script}', *options],
      cwd=ROOT,
      env=os.environ | {
          'TFDS_DATA_DIR': str(data_dir),
          'XLA_FLAGS': ' '.join(many_devices.QUICK_FLAGS),
      },
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


def test_step_splits_its_time_and_describes_the_machine(tmp_path):
  result = run(
      'step.py',
      '--config=configs/tv_topk.py',
      '--steps=1',
      '--config.num_prompts=4',
      '--config.group_size=2',
      '--config.max_completion_length=4',
      '--config.learner.num_minibatches=2',
      '--config.eval.num_prompts=2',
      '--config.eval.num_samples=2',
      data_dir=tmp_path / 'data',
  )
  assert result['algorithm'] == 'dppo_topk_tv'
  assert result['split'].keys() == {'learn_s', 'sample_s', 'score_s'}
  assert result['cold_start_s'].keys() >= {'first_update', 'total'}
  assert result['check'].keys() >= {'sample / blank', 'learn / (step - blank)'}
  assert result['tokens_per_s'].keys() == {'whole_step', 'sampled', 'learned'}
  assert result['memory']['peak_host_bytes'] > 0
  assert result['machine'].keys() >= {'cpu', 'device', 'versions', 'commit'}


def test_reading_a_model_holds_little_beside_its_parameters(tmp_path):
  result = run('load_memory.py', '--layers=4', data_dir=tmp_path)
  assert result['sizes']['files'] > 1
  cases = {(row['case'], row['dtype']) for row in result['rows']}
  assert len(cases) == 4
  for row in result['rows']:
    # Bytes, not seconds: the parameters and at most two copies of the largest,
    # with what the interpreter and the allocator take.
    room = 2 * row['largest_bytes'] + 150e6
    assert row['peak_bytes'] < row['parameters_bytes'] + room


def test_divergences_are_compared_or_say_why_not(tmp_path):
  from dppo_jax import divergences

  result = run(
      'divergences.py',
      '--tokens=16',
      '--vocab=64',
      '--hidden=4',
      '--chunk=8',
      '--rounds=1',
      '--record_limit=3e-6',  # GB; full records need 16 * 64 * 4 = 4096 bytes.
      data_dir=tmp_path / 'data',
  )
  rows = {row['divergence']: row for row in result['rows']}
  assert set(rows) == set(divergences.names())
  skipped = {name for name, row in rows.items() if 'skipped' in row}
  assert skipped == {
      'full_kl', 'full_tv', 'predictive_kl', 'topk_kl', 'topk_tv'
  }
  compared = rows['binary_tv']
  assert compared.keys() >= {'learn_ratio', 'sample_ratio', 'temporary_ratio'}
  assert compared['record_bytes_per_token'] == 4


def test_slots_draw_the_same_completions_and_are_timed_against_all_at_once(
    tmp_path,
):
  result = run(
      'rollout.py', '--prompts=4', '--group=2', '--length=8', '--mean=3',
      '--slots=2', '--halvings=0,1', '--rounds=1', data_dir=tmp_path / 'data',
  )
  everything, two, halved = result['rows']  # It compares the tokens itself.
  assert (everything['slots'], two['slots'], halved['slots']) == (8, 2, 2)
  assert (two['halvings'], halved['halvings']) == (0, 1)
  assert two['model_calls'] > everything['model_calls'] == result['longest']
  assert two['model_calls'] == halved['model_calls']
  assert result['tokens'] == round(8 * result['mean_length'])
  assert two['speedup']['median'] > 0


def test_the_learner_learns_from_the_completions_that_slots_draw(tmp_path):
  sizes = ('--prompts=4', '--group=2', '--length=8', '--mean=3', '--rounds=1')
  drawn = run(
      'rollout.py', *sizes, '--slots=2', '--halvings=0',
      data_dir=tmp_path / 'data',
  )
  learned = run(
      'learner.py', *sizes, '--microbatches=1,2', '--packed=96:2',
      data_dir=tmp_path / 'data',
  )
  assert learned['sizes'] == drawn['sizes']
  assert learned['tokens'] == drawn['tokens']
  assert [x['row_length'] for x in learned['rows']] == [0, 0, 96]


def test_an_accelerator_is_compared_with_what_it_could_do(tmp_path):
  result = run(
      'accelerator.py', '--size=tiny', '--prompts=4', '--group=2',
      '--prompt_length=8', '--length=8', '--microbatches=2', '--chunk=16',
      '--dtype=float32', '--rounds=1', '--peak_flops=1e12',
      data_dir=tmp_path / 'data',
  )
  assert result['sampled_tokens'] == 4 * 2 * 8
  work, rates = result['work'], result['rates']
  # 2 layers of 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48 weights, and a head.
  layers = 2 * (4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 48)
  rows, slots = 8, 15
  assert work['learn_flops'] == 3 * (
      2 * layers * rows * slots + 2 * 4 * 32 * rows * slots * (slots + 1) / 2
      + 2 * 32 * 64 * rows * 8
  )
  assert rates['published_flops'] == 1e12
  assert 'published_bandwidth' not in rates
  assert result['shares']['learn_of_published_flops'] == pytest.approx(
      work['learn_flops'] / result['seconds']['learn']['min'] / 1e12, rel=1e-3
  )


def test_attention_of_packed_rows_is_timed_against_that_of_whole_ones(tmp_path):
  result = run(
      'attention.py', '--size=tiny', '--prompts=4', '--group=2', '--length=8',
      '--mean=3', '--rows=96', '--cuts=16:1:32,16:0:8', '--rounds=1',
      data_dir=tmp_path / 'data',
  )
  whole, one, other = result['rows']  # It compares the gradients itself.
  assert whole['cut'] == 'whole rows'
  assert (one['cut'], other['cut']) == ('16:1:32', '16:0:8')
  assert one['speedup']['median'] > 0


def test_the_step_that_peers_are_compared_with_does_the_agreed_work(tmp_path):
  # The script itself checks lengths, updates and that it compiled once.
  output = tmp_path / 'ours.json'
  result = run(
      'peers/ours.py', '--lengths=geometric', '--microbatches=4',
      '--row_lengths=128', '--slots=16', '--halvings=2', '--part_halvings=1',
      '--halving_steps=2', '--reuses=1', '--steps=2', '--warmup=1',
      '--seed=1',
      f'--output={output}', data_dir=tmp_path / 'data',
  )
  assert result == json.loads(output.read_text())
  [row] = result['rows']
  assert row == result['best']
  assert (row['microbatch'], row['row_length'], row['slots']) == (4, 128, 16)
  assert result['versions'].keys() >= {'jax', 'flax'}


def test_a_commit_and_this_tree_take_the_same_steps_in_turns(tmp_path):
  result = run(
      'turns.py', '--base=HEAD', '--base_options=--slots=8 --halvings=0',
      '--pairs=2', '--warmup=0', '--lengths=geometric', '--microbatches=4',
      '--row_lengths=128', '--slots=16', '--halvings=1',
      data_dir=tmp_path / 'data',
  )
  head = subprocess.run(
      ['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, check=True
  ).stdout.decode()
  assert head.startswith(result['base'])
  # The number of slots changes no token.
  assert result['same_lengths']
  assert result['step_s']['ratio'] > 0
  assert result['memory']['this']['total'] > 0


def test_peers_must_draw_completions_of_the_agreed_lengths():
  import numpy as np

  from benchmarks.peers import work

  lengths = np.random.RandomState(0).geometric(1 / 16, (3, work.BATCH))
  work.check_lengths(np.minimum(lengths, work.MAX_LENGTH), 'geometric')
  work.check_lengths(np.full((3, work.BATCH), work.MAX_LENGTH), 'fixed')
  for wrong in ('fixed', 'geometric'):
    with pytest.raises(ValueError, match=f'{wrong} completions have 32.00'):
      work.check_lengths(np.full((3, work.BATCH), 32), wrong)
