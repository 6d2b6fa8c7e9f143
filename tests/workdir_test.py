"""A work directory belongs to one config and says what ran in it."""

import functools
import json
import os
import pathlib
import shutil

import pytest

from configs import default
from dppo_jax import workdir


def config_with(**changes):
  config = default.get_config()
  config.update_from_flattened_dict(changes)
  return config


def test_a_new_directory_is_made_and_described(tmp_path):
  folder = workdir.prepare(tmp_path / 'a' / 'b', default.get_config())
  described = json.loads((folder / 'config.json').read_text())
  assert described['divergence']['name'] == 'topk_tv'
  assert described['sampling']['temperature'] == 1.0
  run = described['run']
  assert set(run) >= {'command', 'commit', 'device', 'cpu_count', 'versions'}
  assert run['versions']['jax']
  assert [path.name for path in folder.iterdir()] == ['config.json']


def test_infinity_is_standard_json(tmp_path):
  config = default.get_config('pg_is')
  assert config.loss.ratio_cap == float('inf')
  folder = workdir.prepare(tmp_path, config)

  def refuse(constant):
    raise AssertionError(constant)

  text = (folder / 'config.json').read_text()
  described = json.loads(text, parse_constant=refuse)
  assert described['loss']['ratio_cap'] == 'inf'
  workdir.prepare(tmp_path, config)  # And is equal to itself.


def test_the_same_config_may_come_back(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  workdir.prepare(tmp_path, default.get_config())


def test_a_run_that_other_code_goes_on_with_keeps_what_began_it(
    tmp_path, monkeypatch
):
  def start(commit):
    monkeypatch.setattr(workdir, '_commit', lambda: commit)
    workdir.prepare(tmp_path, default.get_config())
    log.write_text('{"step": 0}\n')
    run = json.loads((tmp_path / 'config.json').read_text())['run']
    return run['commit'], [each['commit'] for each in run.get('before', [])]

  log = tmp_path / 'metrics.jsonl'
  log.touch()
  assert start('failed') == ('failed', [])
  log.write_text('')  # It failed before its first line.
  assert start('a') == ('a', [])
  assert start('a') == ('a', [])
  assert start('b') == ('b', ['a'])
  assert start('b') == ('b', ['a'])
  assert start('c') == ('c', ['a', 'b'])


@pytest.mark.parametrize('name, value', [
    ('seed', 1),
    ('divergence.threshold', 0.3),
    ('learner.num_minibatches', 8),
    ('eval.num_samples', 4),
    ('model.name', 'elsewhere'),
])
def test_another_config_is_refused_by_field_and_both_values(
    tmp_path, name, value
):
  first = default.get_config()
  workdir.prepare(tmp_path, first)
  before = (tmp_path / 'config.json').read_bytes()
  section, _, field = name.rpartition('.')
  old = (first[section] if section else first)[field]
  with pytest.raises(
      ValueError,
      match=f'belongs to a different config: {name} was {old!r} and is '
      f'{value!r} now.*--workdir',
  ):
    workdir.prepare(tmp_path, config_with(**{name: value}))
  assert (tmp_path / 'config.json').read_bytes() == before


def test_another_config_is_refused_without_touching_the_directory(tmp_path):
  workdir.check(tmp_path / 'new', default.get_config())
  assert not (tmp_path / 'new').exists()
  workdir.prepare(tmp_path, default.get_config())
  workdir.check(tmp_path, default.get_config())
  with pytest.raises(ValueError, match='seed was 0 and is 1 now'):
    workdir.check(tmp_path, config_with(seed=1))


def test_all_settings_that_differ_are_named(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  with pytest.raises(ValueError, match='group_size was 8 and is 4 now, seed '
                     'was 0 and is 1 now. Choose another'):
    workdir.check(tmp_path, config_with(seed=1, group_size=4))
  with pytest.raises(ValueError, match=', and [0-9]+ more. Choose another'):
    workdir.check(tmp_path, default.get_config('r2vpo'))


def test_who_wants_to_train_on_hears_why_not_and_how(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  with pytest.raises(ValueError, match="optimizer.schedule='linear'.*start "
                     f'another from --config.model.name={tmp_path}/model'):
    workdir.check(tmp_path, config_with(total_steps=200))


def test_another_algorithm_is_refused(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  with pytest.raises(ValueError, match="algorithm was 'dppo_topk_tv' and is "
                     "'grpo' now"):
    workdir.prepare(tmp_path, default.get_config('grpo'))


def test_a_run_from_before_a_setting_that_may_change_goes_on(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  path = tmp_path / 'config.json'
  described = json.loads(path.read_text())
  del described['sampling']['attention']
  path.write_text(json.dumps(described))
  workdir.check(tmp_path, default.get_config())


@pytest.mark.parametrize('name, value', [
    ('total_steps', 7),
    ('checkpoint_every', 1),
    ('keep_checkpoints', 1),
    ('eval.every', 5),
    ('tensorboard', False),
    ('scoring.num_workers', 2),
    ('mesh.fsdp', 2),
    ('mode', 'split'),
    ('model.attention', 'xla'),
    ('sampling.attention', 'xla'),
    ('sampling.num_stages', 2),
    ('sampling.num_devices', 2),
    ('sampling.mesh.tensor', 2),
    ('mesh.sequence', 2),
    ('model.remat', 'full'),
    ('model.unroll_layers', True),
    ('learner.num_microbatches', 2),
    ('learner.chunk_size', 64),
    ('sampling.num_slots', 64),
    ('sampling.num_halvings', 1),
    ('sampling.halving_steps', 2),
    ('eval.num_slots', 64),
])
def test_what_does_not_change_the_run_may_change(tmp_path, name, value):
  constant = {'optimizer.schedule': 'constant'}
  workdir.prepare(tmp_path, config_with(**constant))
  workdir.prepare(tmp_path, config_with(**constant, **{name: value}))
  described = json.loads((tmp_path / 'config.json').read_text())
  assert functools.reduce(dict.get, name.split('.'), described) == value


@pytest.mark.parametrize('name, value, because', [
    ('model.attention', 'xla', {'learner.reuse_forward': True}),
    ('sampling.num_slots', 64, {'learner.reuse_forward': True}),
    ('sampling.num_halvings', 1, {'learner.reuse_forward': True}),
    ('sampling.halving_steps', 2, {'learner.reuse_forward': True}),
    ('learner.num_microbatches', 2, {'extras.router_balance': 0.1}),
])
def test_what_a_setting_depends_on_may_not_change_with_it(
    tmp_path, name, value, because
):
  workdir.prepare(tmp_path, config_with(**because))
  with pytest.raises(ValueError, match=f'different config: {name} was'):
    workdir.prepare(tmp_path, config_with(**because, **{name: value}))


def test_settings_with_a_beginning_are_compared_alone(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  workdir.check(tmp_path, config_with(seed=7), only='lora.')
  with pytest.raises(ValueError, match='lora.alpha was .* now. Mind it.$'):
    workdir.check(
        tmp_path, config_with(**{'lora.alpha': 7.0}), only='lora.',
        way_out='Mind it.',
    )


def test_the_end_of_a_decaying_schedule_may_not_move(tmp_path):
  cosine = {'optimizer.schedule': 'cosine'}
  workdir.prepare(tmp_path, config_with(**cosine))
  with pytest.raises(ValueError, match='total_steps was .* and is 7 now'):
    workdir.prepare(tmp_path, config_with(total_steps=7, **cosine))


def beside(monkeypatch, **theirs):
  """As if process 1 had some things otherwise than this one, process 0."""

  def gather(value):
    if isinstance(value, str):  # The commit.
      return [value, theirs.get('commit', value)]
    theirs_of_it = {k: v for k, v in theirs.items() if k != 'commit'}
    if 'commit' in value:
      theirs_of_it['commit'] = theirs.get('commit', value['commit'])
    return [value, value | theirs_of_it]

  monkeypatch.setattr(workdir.processes, 'gather', gather)


def test_processes_with_other_settings_are_refused_with_both_values(
    monkeypatch
):
  config = config_with(seed=7)
  workdir.check_same_start(config)  # One process is like itself.
  beside(monkeypatch)
  workdir.check_same_start(config)
  beside(monkeypatch, **{'config.seed': 8})
  with pytest.raises(ValueError, match='^Process 1 has config.seed=8 and '
                     'process 0 7; start all with the same command.$'):
    workdir.check_same_start(config)
  beside(monkeypatch, **{f'config.{x}': -1 for x in ('seed', *'abcdef')})
  with pytest.raises(ValueError, match='config.a=-1 and process 0 None, .*'
                     'process 0 None, and 3 more; start'):
    workdir.check_same_start(config)
  beside(monkeypatch, **{'--workdir': 'not given'})
  with pytest.raises(
      ValueError, match="--workdir='not given' and process 0 'a folder'"
  ):
    workdir.check_same_start(config, **{'--workdir': 'a folder'})


def test_processes_may_have_caches_and_workers_of_their_own(monkeypatch):
  seen = []
  monkeypatch.setattr(
      workdir.processes, 'gather', lambda x: seen.append(x) or [x]
  )
  workdir.check_same_start(default.get_config())
  names = seen[-1]
  assert 'config.compilation_cache' not in names
  assert 'config.scoring.num_workers' not in names
  assert 'config.scoring.timeout_s' in names


def test_processes_of_another_commit_are_refused_where_it_is_known(
    monkeypatch
):
  monkeypatch.setattr(workdir, '_commit', lambda: 'abc')
  beside(monkeypatch, commit='')
  workdir.check_same_start(default.get_config())
  beside(monkeypatch, commit='abc+')
  with pytest.raises(ValueError, match="commit='abc[+]' and process 0 'abc'; "
                     'check the same one out for all'):
    workdir.check_same_start(default.get_config())


def test_a_directory_that_another_process_does_not_see_is_refused(
    tmp_path, monkeypatch
):
  workdir.check_shared(tmp_path / 'nowhere')  # One process asks nobody.
  theirs = []  # No failure, a name that nobody looks for, what it misses.

  def gather(value):
    if value is not None:
      assert [x.name for x in tmp_path.iterdir()] == [value]
    return [value, theirs.pop(0)]

  monkeypatch.setattr(workdir.processes, 'gather', gather)
  monkeypatch.setattr(workdir.jax, 'process_count', lambda: 2)
  theirs[:] = None, '.shared-1', None
  workdir.check_shared(tmp_path)
  assert not list(tmp_path.iterdir())
  theirs[:] = None, '.shared-1', '/there'
  with pytest.raises(OSError, match="'/there' of process 1 is not the folder "
                     'of process 0; it must be storage that all see'):
    workdir.check_shared(tmp_path)
  assert not list(tmp_path.iterdir())


def test_what_another_host_wrote_may_take_a_while_to_appear(
    tmp_path, monkeypatch
):
  monkeypatch.setattr(
      workdir.time, 'sleep', lambda _: (tmp_path / 'late').touch()
  )
  assert workdir._appears(tmp_path / 'late')
  monkeypatch.setattr(workdir, '_APPEARS_WITHIN_S', 0)
  assert not workdir._appears(tmp_path / 'never')


@pytest.mark.parametrize('theirs, holds', [
    ('{"seed": 1}', 'another run than for process 0'),
    ('', 'no run, but one for process 0'),
])
def test_who_reads_a_run_on_several_processes_reads_the_same(
    tmp_path, monkeypatch, theirs, holds
):
  workdir.check_same_run(tmp_path)
  workdir.prepare(tmp_path, default.get_config())
  workdir.check_same_run(tmp_path)
  monkeypatch.setattr(
      workdir.processes, 'gather',
      lambda x: [x, x and {'run': theirs}],
  )
  with pytest.raises(OSError, match=f'holds for process 1 {holds}; it must'):
    workdir.check_same_run(tmp_path)


def test_a_damaged_description_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{"seed": 0,')
  with pytest.raises(ValueError, match='config.json is damaged.*--workdir'):
    workdir.prepare(tmp_path, default.get_config())


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
  # Root may write anywhere, so a file stands where a directory should be.
  (tmp_path / 'file').write_text('')
  with pytest.raises(PermissionError, match='file/run.*--workdir'):
    workdir.prepare(tmp_path / 'file' / 'run', default.get_config())
  with pytest.raises(PermissionError, match='cannot be written'):
    workdir.prepare(tmp_path / 'file', default.get_config())


@pytest.mark.skipif(os.geteuid() == 0, reason='Root may write anywhere.')
def test_a_directory_without_permission_is_named(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(PermissionError, match='cannot be written'):
    workdir.prepare(tmp_path, default.get_config())
  tmp_path.chmod(0o700)


def test_a_url_is_refused_and_makes_no_folder_of_that_name(
    tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match="'gs://bucket/run' is a URL"):
    workdir.prepare('gs://bucket/run', default.get_config())
  assert not list(tmp_path.iterdir())


def test_two_runs_cannot_work_in_one_directory(tmp_path):
  with workdir.locked(tmp_path):
    with pytest.raises(BlockingIOError, match='Another run .* --workdir'):
      with workdir.locked(tmp_path):
        pass
  with workdir.locked(tmp_path):  # Free again.
    pass


def test_a_lock_leaves_no_directory_in_which_nothing_was_written(tmp_path):
  for kept in (False, True):
    folder = tmp_path / 'run'
    with workdir.locked(folder):
      assert folder.is_dir()
      if kept:
        (folder / 'config.json').write_text('{}')
    assert folder.exists() == kept


def test_a_lock_takes_away_nothing_that_was_there_and_hides_no_error(
    tmp_path, monkeypatch
):
  folder = tmp_path / 'empty'
  folder.mkdir()
  with workdir.locked(folder):
    pass
  assert folder.is_dir()  # It was somebody's.
  monkeypatch.chdir(folder)
  for name in ('.', 'vanishes'):
    with pytest.raises(ZeroDivisionError):
      with workdir.locked(pathlib.Path(name)):
        if name == 'vanishes':
          shutil.rmtree(name)
        raise ZeroDivisionError


def test_a_lock_that_was_taken_away_meanwhile_is_none(tmp_path, monkeypatch):
  flock = workdir.fcntl.flock

  def taken_away(file, how):
    flock(file, how)
    (tmp_path / '.lock').unlink()

  monkeypatch.setattr(workdir.fcntl, 'flock', taken_away)
  with pytest.raises(BlockingIOError, match='Another run is working'):
    with workdir.locked(tmp_path):
      pass


def test_a_run_that_failed_before_its_first_line_holds_nobody_up(tmp_path):
  workdir.prepare(tmp_path, default.get_config())
  metrics, checkpoints = tmp_path / 'metrics.jsonl', tmp_path / 'checkpoints'
  metrics.write_text('')
  checkpoints.mkdir()
  workdir.prepare(tmp_path, config_with(seed=1))
  assert json.loads((tmp_path / 'config.json').read_text())['seed'] == 1
  (checkpoints / '2').mkdir()
  with pytest.raises(ValueError, match='seed was 1 and is 2 now'):
    workdir.prepare(tmp_path, config_with(seed=2))
  (checkpoints / '2').rmdir()
  metrics.write_text('{"step": 0}\n')
  with pytest.raises(ValueError, match='seed was 1 and is 2 now'):
    workdir.prepare(tmp_path, config_with(seed=2))


def test_a_file_in_the_place_of_the_directory_is_named_so(tmp_path):
  (tmp_path / 'run').write_text('')
  with pytest.raises(PermissionError, match="run' cannot be written: there is "
                     'a file. Choose another'):
    with workdir.locked(tmp_path / 'run'):
      pass
