"""A run in this process: what is on its devices, and what it says."""

import re

import jax
import pytest
import tiny_model

from configs import default
from dppo_jax import main
from dppo_jax import tracing
from dppo_jax import training

COMPILED = re.compile(r'Finished XLA compilation of jit\(sample\)')
SMALL = {
    'num_prompts': 4, 'group_size': 4, 'max_completion_length': 8,
    'eval.num_prompts': 4, 'eval.num_samples': 1, 'eval.every': 10,
    'learner.num_minibatches': 1, 'divergence.k': 4, 'total_steps': 2,
    'extras.kl_coefficient': 0.1, 'replay.capacity': 2, 'replay.max_age': 8,
    'tensorboard': False, 'compilation_cache': '',
}


def deleted(tree):
  return [x.is_deleted() for x in jax.tree.leaves(tree)]


@pytest.mark.slow
def test_what_a_run_starts_from_is_gone_once_its_checkpoint_is_read(tmp_path):
  config = default.get_config()
  config.update_from_flattened_dict(SMALL)
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
  assert all(gone)
  assert not any(deleted(parts.state.frozen))


@pytest.mark.slow
def test_an_evaluation_is_compiled_once(caplog):
  config = default.get_config()
  config.update_from_flattened_dict(SMALL)
  with tiny_model.quick_compilation(), jax.log_compiles():
    parts = main.build(config)
    compiled = [x for x in caplog.messages if COMPILED.search(x)]
    assert len(compiled) == 1
    parts.evaluate_fn(training.policy(parts, parts.state))
    assert compiled == [x for x in caplog.messages if COMPILED.search(x)]


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
