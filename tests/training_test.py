"""A run in this process: what is on its devices, and what it says."""

import json
import re
import shutil
import types

import jax
import pytest
import tiny_model

from configs import default
from dppo_jax import checkpoint
from dppo_jax import main
from dppo_jax import meshes
from dppo_jax import tasks
from dppo_jax import tracing
from dppo_jax import trainable
from dppo_jax import training
from dppo_jax import workdir
from dppo_jax.models import load

COMPILED = re.compile(r'Finished XLA compilation of jit\(sample\)')
SMALL = {
    'num_prompts': 4, 'group_size': 4, 'max_completion_length': 8,
    'eval.num_prompts': 4, 'eval.num_samples': 1, 'eval.every': 10,
    'learner.num_minibatches': 1, 'divergence.k': 4, 'total_steps': 2,
    'extras.kl_coefficient': 0.1, 'replay.capacity': 2, 'replay.max_age': 8,
    'tensorboard': False, 'compilation_cache': '',
}
# Its layers stay as they are.
PARTLY = SMALL | {'learning_rates': (('layers', 0.0),)}


def deleted(tree):
  return [x.is_deleted() for x in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_what_a_run_starts_from_is_gone_once_its_checkpoint_is_read(tmp_path):
  config = default.get_config()
  config.update_from_flattened_dict(PARTLY)
  with tiny_model.quick_compilation():
    training.train(
        config, main.build(config), tmp_path, should_stop=lambda step: step == 1
    )
    held = []

    def ask(step):
      """Whether the state of the start is there, while a step waits."""
      held.append((step, deleted(parts.state._replace(frozen=()))))
      return False

    parts = main.build(config)
    assert not any(deleted(parts.state))
    assert training.train(config, parts, tmp_path, ask)
  [(step, gone)] = held
  assert step == 2
  assert gone and all(gone)
  # What is frozen is no part of a checkpoint: it was there to go on with.
  assert jax.tree.leaves(parts.state.frozen)


@pytest.mark.slow
@pytest.mark.parametrize('settings', [SMALL, PARTLY], ids=['all', 'partly'])
def test_an_evaluation_is_compiled_once(caplog, settings):
  config = default.get_config()
  config.update_from_flattened_dict(settings)
  with tiny_model.quick_compilation(), jax.log_compiles():
    parts = main.build(config)
    compiled = [x for x in caplog.messages if COMPILED.search(x)]
    assert len(compiled) == 1
    policy = training.policy(parts, parts.state)
    parts.evaluate_fn(policy)
    assert compiled == [x for x in caplog.messages if COMPILED.search(x)]
  # Who trains everything evaluates the very arrays of the state.
  whole = not jax.tree.leaves(parts.state.frozen)
  assert whole == (settings is SMALL)
  assert whole == (policy is parts.state.params)


def test_a_second_run_in_a_directory_changes_nothing_in_it(
    tmp_path, monkeypatch
):
  config = default.get_config()
  workdir.prepare(tmp_path, config)
  before = (tmp_path / 'config.json').read_bytes()
  config.checkpoint_every = 7  # Which may change between two starts.
  monkeypatch.setattr(main, 'build', lambda *_, **__: pytest.fail('compiled'))
  with workdir.locked(tmp_path):
    with pytest.raises(BlockingIOError, match='Another run is working in'):
      main.train(config, str(tmp_path))
  assert (tmp_path / 'config.json').read_bytes() == before


def test_other_rows_than_those_of_the_run_are_refused_before_it_compiles(
    tmp_path, monkeypatch
):
  config = default.get_config()
  workdir.prepare(tmp_path, config)
  host = {'prompts': {'rows': 3}}
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    saved.save(1, {'x': jax.numpy.ones(1)}, host)
  monkeypatch.setattr(
      main.fitting, 'make_program', lambda *_, **__: pytest.fail('compiled')
  )
  with pytest.raises(ValueError, match='saved with rows=3, now it is .* start'):
    main.train(config, str(tmp_path))


def test_a_prompt_that_the_model_of_a_run_does_not_embed_is_refused(
    tmp_path, monkeypatch
):
  model = tmp_path / 'model'
  shutil.copytree(load.EMBEDDED, model)
  size = load.read_config(model)[1].vocab_size
  tokenizer = load.load_tokenizer('embedded')
  tokenizer.add_tokens([f'<{i}>' for i in range(len(tokenizer), size + 1)])
  tokenizer.save_pretrained(model)
  for name, prompt in (('train', f'<{size}>'), ('test', '1+1=')):
    row = {'prompt': prompt, 'answer': '2'}
    (tmp_path / f'{name}.jsonl').write_text(json.dumps(row))
  config = default.get_config()
  config.model.name = str(model)
  config.eval.num_prompts = 1
  with config.unlocked():
    config.task = tasks.config('jsonl')
  config.task.train_path = str(tmp_path / 'train.jsonl')
  config.task.test_path = str(tmp_path / 'test.jsonl')
  monkeypatch.setattr(
      main.fitting, 'make_program', lambda *_, **__: pytest.fail('compiled')
  )
  with pytest.raises(ValueError, match=f"holds '<{size}>', token {size} of"):
    main.build(config)


@pytest.mark.slow
def test_a_run_stopped_at_its_last_step_has_the_plots_of_single_tokens(
    tmp_path
):
  config = default.get_config()
  config.update_from_flattened_dict(SMALL)
  with tiny_model.quick_compilation():
    for stopped in (True, False):
      ended = training.train(
          config, main.build(config), tmp_path,
          should_stop=lambda step, stopped=stopped: stopped and step == 2,
      )
      assert ended != stopped
  assert (tmp_path / 'report.html').exists()
  assert json.loads((tmp_path / 'scatter.json').read_text())


def test_the_run_that_is_read_may_be_in_the_home_directory(
    tmp_path, monkeypatch
):
  monkeypatch.setenv('HOME', str(tmp_path))
  where = re.escape(str(tmp_path / 'run' / 'checkpoints'))
  with pytest.raises(FileNotFoundError, match=f'{where} does not exist'):
    training.latest_state(default.get_config(), None, '~/run')


@pytest.mark.slow
def test_without_a_checkpoint_the_start_is_left_alone(tmp_path):
  config = default.get_config()
  config.update_from_flattened_dict(SMALL)
  with tiny_model.quick_compilation():
    parts = main.build(config, to_train=False)
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no checkpoint yet'):
      training.latest_state(config, parts, tmp_path)
  assert not any(deleted(parts.state))


@pytest.mark.slow
def test_a_save_that_a_skipped_update_forbids_is_made_up_for(
    tmp_path, monkeypatch, caplog
):
  config = default.get_config()
  config.update_from_flattened_dict(
      SMALL | {'total_steps': 5, 'checkpoint_every': 2, 'keep_checkpoints': 9}
  )
  monkeypatch.setattr(
      training, '_check_finite',
      lambda config, step, *_: step not in (2, 5),  # Whether it was taken.
  )
  with tiny_model.quick_compilation():
    training.train(
        config, main.build(config), tmp_path, should_stop=lambda step: False
    )
  kept = sorted(int(x.name) for x in (tmp_path / 'checkpoints').iterdir())
  assert kept == [3, 4]
  assert 'Step 5 is not saved, as its last update was skipped' in caplog.text
  assert 'Checkpoint: step 4 is kept' in caplog.text


@pytest.mark.parametrize('share, heard', [(1.0, True), (0.99, False)])
def test_who_never_ends_within_the_limit_is_told_what_it_costs(
    caplog, share, heard
):
  parts = types.SimpleNamespace(
      trainable=trainable.EVERYTHING,
      evaluate_fn=lambda params: ({'eval/truncated': share}, {}),
  )
  quiet = types.SimpleNamespace(
      add_scalars=lambda *_: None, add_samples=lambda *_, **__: None
  )
  training._evaluate(parts, types.SimpleNamespace(params=()), quiet, 7)
  said = 'No held-out completion of step 7 ended' in caplog.text
  assert said == heard
  assert ('config.max_completion_length' in caplog.text) == heard


def test_no_evaluation_leaves_a_program_behind():
  loaded = tiny_model.params()
  mesh = meshes.make_mesh(default.get_config())
  adapted = trainable.make_trainable(loaded, rank=2)
  params, frozen = adapted.split(loaded, jax.random.key(0))
  parts = types.SimpleNamespace(trainable=adapted, mesh=mesh)
  state = types.SimpleNamespace(params=params, frozen=frozen)
  first = training.policy(parts, state)

  def refuse(*args, **options):
    raise AssertionError('traced again')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'jit', refuse)
    patch.setattr(jax, 'eval_shape', refuse)
    second = training.policy(parts, state)
  tiny_model.assert_trees_equal(second, first)
  tiny_model.assert_trees_equal(first, adapted.merge(params, frozen))


def test_a_run_too_short_for_its_trace_says_so(tmp_path, caplog):
  tracer = tracing.Tracer(tmp_path / 'profile', num_steps=2, first=1)
  for step in (1, 2):
    tracer.at(step)
  tracer.close()
  assert 'Nothing was traced: config.profile_steps begins with step 3' in (
      caplog.text
  )
  assert not (tmp_path / 'profile').exists()


def test_who_asks_for_no_trace_hears_nothing(tmp_path, caplog):
  tracer = tracing.Tracer(tmp_path / 'profile', num_steps=0, first=1)
  tracer.at(1)
  tracer.close()
  assert not caplog.text
