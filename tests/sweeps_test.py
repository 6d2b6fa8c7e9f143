"""Runs side by side in one program are the runs that `main` makes alone."""

import contextlib
import importlib
import json
import typing

from absl import flags
from absl.testing import flagsaver
import ml_collections
import numpy as np
import pytest

from dppo_jax import checks
from dppo_jax import main
from dppo_jax import metrics as metrics_lib
from experiments.lib import cells as cells_lib
from experiments.lib import command
from experiments.lib import options
from experiments.lib import pool
from experiments.lib import stability
from experiments.lib import sweep
from experiments.lib import table

SIZES = {
    'total_steps': 3,
    'num_prompts': 4,
    'group_size': 8,
    'learner__num_minibatches': 2,
    'learner__num_epochs': 2,
    'eval__every': 3,
    'eval__num_prompts': 4,
    'eval__num_samples': 2,
    'optimizer__learning_rate': 1e-3,
}
COLUMNS = {
    'loss': ('loss', np.mean),
    'reward': ('reward/mean', np.mean),
    'mask': ('mask/fraction', np.max),
    'rate': ('optimizer/learning_rate', np.min),
}


def make_cell(seed, **changes):
  options = SIZES | {'divergence__threshold': 0.15} | changes
  return cells_lib.make_cell('s', 'm', 'dppo_binary_tv', seed, **options)


# Each differs from the first in one thing that a program takes as an argument.
# The thresholds are low enough for tokens to be dropped.
CELLS = [
    make_cell(0, divergence__threshold=0.01),
    make_cell(1, divergence__threshold=0.01),
    make_cell(0, divergence__threshold=0.002),
    make_cell(0, divergence__threshold=0.01, optimizer__learning_rate=3e-3),
]


def observed(cells, how):
  """Rows, and [(tokens, loss) of each step], both [S, ...]."""
  seen = []

  def observe(step, rollout, metrics):
    del step
    seen.append((np.asarray(rollout.tokens), metrics['loss']))

  rows = cells_lib.run(cells, COLUMNS, how=how, observe=observe)
  return rows, [np.stack(x) for x in zip(*seen)]


@pytest.fixture(scope='module')
def alone():
  """Each cell in a program of its own."""
  return [observed([cell], 'map') for cell in CELLS]


@pytest.mark.slow
@pytest.mark.parametrize('how', ['vmap', 'map'])
def test_runs_in_one_program_are_the_single_runs(how, alone):
  _, (tokens, losses) = observed(CELLS, how)
  for number, (_, (own_tokens, own_losses)) in enumerate(alone):
    np.testing.assert_array_equal(tokens[:, number], own_tokens[:, 0])
    np.testing.assert_allclose(losses[:, number], own_losses[:, 0], atol=1e-5)
  # They are four different runs, so the comparison could fail.
  assert len({losses[-1, number] for number in range(len(CELLS))}) == 4


@pytest.mark.slow
@pytest.mark.parametrize('number', [2, 3])
def test_a_cell_is_the_run_of_main(number, alone, tmp_path):
  rows, (_, losses) = alone[number]
  main.train(cells_lib.config_of(CELLS[number]), str(tmp_path))
  log = metrics_lib.read(tmp_path)
  np.testing.assert_allclose(
      losses[:, 0], [row['loss'] for row in log[1:]], atol=1e-5
  )
  for row in rows:
    own = log[int(row['step'])]
    assert float(row['accuracy']) == pytest.approx(own['eval/avg@2'], rel=1e-4)
  rewards = [row['reward/mean'] for row in log[1:]]
  assert float(rows[-1]['reward']) == pytest.approx(np.mean(rewards), rel=1e-4)
  masked = max(row['mask/fraction'] for row in log[1:])
  assert float(rows[-1]['mask']) == pytest.approx(masked, rel=1e-4) and masked


@pytest.mark.slow
def test_stale_rollouts_are_those_of_main(tmp_path):
  cell = make_cell(1, staleness=2)
  rows, (_, losses) = observed([cell], 'vmap')
  main.train(cells_lib.config_of(cell), str(tmp_path))
  log = metrics_lib.read(tmp_path)
  np.testing.assert_allclose(
      losses[:, 0], [row['loss'] for row in log[1:]], atol=1e-5
  )
  assert rows[-1]['step'] == 3


def test_cells_that_differ_in_free_numbers_share_a_program():
  others = [make_cell(0, staleness=1), make_cell(1, group_size=2)]
  groups = cells_lib.programs(CELLS + others, largest=3)
  assert groups == [CELLS[:3], CELLS[3:], others[:1], others[1:]]


def test_a_cell_goes_through_a_file_and_is_the_same_config(tmp_path):
  path = tmp_path / 'rows.csv'
  cell = make_cell(3, sampling__weights_dtype='int8', loss__ratio_cap=2.5)
  table.append(path, [cell._asdict() | {'step': 1}])
  [row] = table.read(path)
  again = cells_lib.Cell(*(row[x] for x in cells_lib.Cell._fields))
  config = cells_lib.config_of(again)
  assert again == cell
  assert config.sampling.weights_dtype == 'int8'
  assert (config.seed, config.loss.ratio_cap) == (3, 2.5)


def test_an_option_that_does_not_exist_is_refused():
  with pytest.raises(KeyError, match='num_epoch'):
    cells_lib.config_of(make_cell(0, learner__num_epoch=3))


def rows_of(batch):
  """What a sweep of nothing finds."""
  return [job._asdict() | {'value': 2 * int(job.seed)} for job in batch]


def test_a_sweep_runs_only_what_is_not_in_its_file(tmp_path):
  path = tmp_path / 'rows.csv'
  jobs = [make_cell(seed) for seed in range(4)]
  table.append(path, rows_of(jobs[1:2]))
  for _ in range(2):  # The second time there is nothing left to do.
    pool.run_missing([jobs[:2], jobs[2:]], rows_of, path, workers=1)
    rows = table.read(path)
    assert sorted(int(row['seed']) for row in rows) == [0, 1, 2, 3]
    assert {int(row['value']) for row in rows} == {0, 2, 4, 6}


def test_a_summary_knows_on_what_and_how_long_each_call_measured(tmp_path):
  path = tmp_path / 'rows.csv'
  jobs = [make_cell(seed) for seed in range(3)]
  summaries = []
  for batches in ([jobs[:2]], [jobs[:2]], [jobs[:2], jobs[2:]]):
    pool.measure(batches, rows_of, path, workers=1, summarize=len)
    summaries.append(table.read_summary(tmp_path / 'rows.json'))
  # The second call had nothing to do, and so says nothing of itself.
  assert summaries[1] == summaries[0]
  first, last = summaries[0], summaries[2]
  assert (first['results'], last['results']) == (2, 3)
  assert [call['runs'] for call in last['calls']] == [2, 1]
  assert last['calls'][0] == first['calls'][0]
  assert last['calls'][1]['seconds'] > 0
  assert last['calls'][1]['machine']['device'] == 'cpu'


def test_a_summary_knows_what_was_measured_before_something_failed(tmp_path):
  path = tmp_path / 'runs.csv'
  batches = [[make_cell(seed)] for seed in (2, 0, 1)]
  with pytest.raises(ExceptionGroup):
    pool.measure(batches, rows_but_of_2, path, workers=1, summarize=len)
  summary = table.read_summary(tmp_path / 'runs.json')
  assert summary['results'] == 2
  assert [call['runs'] for call in summary['calls']] == [2]


def rows_but_of_2(cells):
  if any(cell.seed == '2' for cell in cells):
    raise ValueError('Seed 2 cannot be run.')
  return rows_of(cells)


def test_what_fails_keeps_no_other_run_from_the_file(tmp_path):
  path = tmp_path / 'runs.csv'
  batches = [[make_cell(seed)] for seed in (2, 0, 1)]
  with pytest.raises(ExceptionGroup, match='1 of 3 failed') as caught:
    pool.run_missing(batches, rows_but_of_2, path, workers=1)
  assert 'Seed 2' in str(caught.value.exceptions[0])
  assert {row['seed'] for row in table.read(path)} == {'0', '1'}


def test_a_curve_has_collapsed_if_it_was_far_below_its_best_until_then():
  rising = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9])
  # Means of three: 0.6, 0.7, 0.8, 0.867, 0.9.
  assert stability.outcome(rising) == pytest.approx(
      {'final': 0.9, 'best': 0.9, 'fall': 0.0, 'collapsed': False}
  )
  falling = np.array([0.5, 0.9, 0.9, 0.9, 0.6, 0.6, 0.6])
  assert stability.outcome(falling) == pytest.approx(
      {'final': 0.6, 'best': 0.9, 'fall': 0.3, 'collapsed': True}
  )
  # 0.9, 0.667, 0.467, 0.467, 0.7, 0.9: that it recovers does not undo it.
  recovered = np.array([0.9, 0.9, 0.9, 0.2, 0.3, 0.9, 0.9, 0.9])
  assert stability.outcome(recovered)['collapsed']
  # A single evaluation that falls out is noise: 0.9, 0.833 thrice, 0.9.
  dip = np.array([0.9, 0.9, 0.9, 0.7, 0.9, 0.9, 0.9])
  assert not stability.outcome(dip)['collapsed']


def test_a_summary_counts_seeds_and_leaves_out_what_was_not_measured():
  def rows(seed, accuracies):
    return [
        {
            'setting': 's', 'method': 'm', 'seed': seed, 'config': 'grpo',
            'step': str(step), 'accuracy': str(x),
            'gap_mean': '' if step == 0 else '0.01',
        }
        for step, x in enumerate(accuracies)
    ]

  found = stability.summarize(
      rows('0', (0.5, 0.8, 0.8, 0.8)) + rows('1', (0.8, 0.8, 0.8, 0.2))
  )['s']['m']
  assert found['seeds'] == 2
  assert found['collapsed'] == 0.5
  # (0.8 + 0.6) / 2; the second fell from 0.8 to 0.6.
  assert found['final_accuracy'] == pytest.approx(0.7)
  assert found['largest_fall'] == pytest.approx(0.2)
  assert found['largest_loss'] == pytest.approx(0.2)
  assert found['mean_gap'] == pytest.approx(0.01)


def test_a_summary_is_json_whatever_it_holds(tmp_path):
  path = tmp_path / 'summary.json'
  table.write_summary(path, {'a': float('nan'), 'b': [0.123456789, 1], 1: 'x'})
  assert json.loads(path.read_text()) == {
      'a': None, 'b': [0.12346, 1], '1': 'x'
  }


@pytest.mark.parametrize(
    'name', ['clipping', 'sensitivity', 'stability', 'staleness', 'topk']
)
def test_every_run_of_an_experiment_has_a_config_that_main_takes(name):
  module = importlib.import_module(f'experiments.{name}.sweep')
  cells = sweep.cells_of(module.SWEEP, seeds=['0'])
  assert len(set(cells)) == len(cells) > 1
  for cell in cells:
    config = cells_lib.config_of(cell)
    checks.check(config, num_batch_shards=1)
    main.make_method(config)


def test_measuring_anew_forgets_results_and_keeps_pilots(tmp_path):
  run_all = importlib.import_module('experiments.run_all')
  kept = {'pilots.csv', 'pilots.json', 'sweep.py', 'tables.md', 'curves.png'}
  for name in kept | {'runs.csv', 'runs.json', 'tightness.csv'}:
    (tmp_path / name).touch()
  run_all.forget(tmp_path)
  assert {x.name for x in tmp_path.iterdir()} == kept


@contextlib.contextmanager
def given(*arguments):
  """Flags as on a command line with these arguments, until the end."""
  with flagsaver.flagsaver():
    flags.FLAGS(['sweep.py', *arguments])
    yield


def flatten(config, prefix=''):
  """(name, value) of every field, with '.' in names."""
  for name, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from flatten(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


COMMANDS = {
    'main_job': lambda module: map(module.command_of, module.jobs()),
    'real_model': lambda module: map(module.command_of, module.jobs()),
    'r2vpo_sample_efficiency': lambda module: map(
        module.command_of,
        module.final(dict.fromkeys(module.METHODS, '3e-4'), module.METHODS)
        + module.grid(module.METHODS),
    ),
    'smollm2': lambda module: (
        module.command_of(module.Job(seed), task)
        for task in module.TASKS for seed in module.SEEDS
    ),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_of_an_experiment_has_a_config_that_main_takes(name):
  module = importlib.import_module(f'experiments.{name}.sweep')
  with given():
    commands = list(COMMANDS[name](module))
  seen = set()
  for line in commands:
    file, _, argument = line.config.partition(':')
    config = importlib.import_module(
        file.removesuffix('.py').replace('/', '.')
    ).get_config(*[argument] * bool(argument))
    plain = dict(flatten(config))
    config.update_from_flattened_dict({
        # As the flags of ml_collections read a text.
        option: value == 'True'
        if isinstance(plain[option], bool) and isinstance(value, str)
        else type(plain[option])(value)
        for option, value in line.flags.items()
    })
    checks.check(config, num_batch_shards=1)
    main.make_method(config)
    seen.add((line.config, str(sorted(line.flags.items()))))
  assert len(seen) == len(commands) > 1


TINY = {
    'total_steps': 2, 'num_prompts': 4, 'group_size': 8, 'eval.every': 2,
    'eval.num_prompts': 4, 'learner.num_minibatches': 1, 'tensorboard': False,
}


def tiny_command(job):
  return command.Command(
      config='configs/tv_topk.py',
      flags=TINY | {'seed': job.seed},
      columns={'accuracy': 'eval/avg@8', 'reward': 'reward/mean'},
      only='eval/avg@8' if job.method == 'evaluations' else '',
      workdir_stays=job.method == 'all steps',
  )


def broken_command(job):
  return command.Command('configs/tv_topk.py', {'group_size': 0}, {})


class Job(typing.NamedTuple):
  method: str
  seed: str


@pytest.mark.slow
def test_a_sweep_of_commands_keeps_the_metrics_of_its_runs(tmp_path):
  path = tmp_path / 'runs.csv'
  jobs = [Job('all steps', '0'), Job('evaluations', '0')]
  with given(f'--runs={tmp_path / "runs"}'):
    command.measure(jobs, tiny_command, path, summarize=len)
  workdir = tmp_path / 'runs' / 'all_steps-0'
  log = metrics_lib.read(workdir)
  rows = table.read(path)
  by = {job: [r for r in rows if r['method'] == job.method] for job in jobs}
  assert [row['step'] for row in by[jobs[0]]] == ['0', '1', '2']
  assert [row['step'] for row in by[jobs[1]]] == ['0', '2']
  for row in by[jobs[0]][1:]:
    wanted = log[int(row['step'])]['reward/mean']
    assert float(row['reward']) == pytest.approx(wanted, rel=1e-4)
  # The same config and seed.
  assert [x['accuracy'] for x in by[jobs[1]]] == [
      x['accuracy'] for x in by[jobs[0]] if x['accuracy']
  ]
  assert not (tmp_path / 'runs' / 'evaluations-0').exists()
  # Without their rows they are measured anew, though a run has ended there.
  (workdir / 'of the first run').touch()
  table.write(path, [row for row in rows if row['method'] != jobs[0].method])
  with given(f'--runs={tmp_path / "runs"}'):
    command.measure(jobs, tiny_command, path, summarize=len)
  assert not (workdir / 'of the first run').exists()
  assert len(table.read(path)) == len(rows)
  summary = table.read_summary(tmp_path / 'runs.json')
  assert summary['results'] == 5
  assert [call['runs'] for call in summary['calls']] == [2, 1]


def test_a_command_that_fails_names_its_log(tmp_path):
  with given(f'--runs={tmp_path / "runs"}', '--workers=1'):
    with pytest.raises(ExceptionGroup) as caught:
      command.measure(
          [Job('x', '0')], broken_command, tmp_path / 'a.csv', summarize=len
      )
  said = str(caught.value.exceptions[0])
  log = tmp_path / 'runs' / 'x-0.log'
  assert said == f'Exit code 2; {log} says why.'
  assert 'group_size=0' in log.read_text()


def test_a_name_that_is_given_twice_runs_once():
  options.define('methods')
  with given('--methods=grpo,cispo,grpo'):
    assert options.given('methods') == ['grpo', 'cispo']


def test_an_unknown_setting_is_an_error_that_names_the_known_ones():
  module = importlib.import_module('experiments.stability.sweep')
  with pytest.raises(ValueError, match="'stale99', which is none of"):
    sweep.cells_of(module.SWEEP, seeds=['0'], settings=['stale99'])
