"""What the compiled step costs, in numbers that no machine changes.

`program_facts.json` keeps them, as XLA counts them for a CPU. After a change
that is meant to change them:

    PYTHONPATH=. python tests/program_facts_test.py

writes them anew; the difference belongs into the commit.
"""

import collections
import functools
import json
import pathlib
import re

import decoding_test
import jax
import pytest
import tiny_model
import whole_step

from benchmarks import shapes

FILE = pathlib.Path(__file__).with_name('program_facts.json')
SIZES = {
    'num_prompts': 32,
    'max_prompt_length': 16,
    'max_completion_length': 48,
    'learner__num_minibatches': 2,
    'learner__num_microbatches': 4,
    'learner__chunk_size': 512,
}
CASES = {
    'grpo': {'algorithm': 'grpo'},
    'dppo_topk_tv': {},
    'dppo_topk_tv, 64 slots': {'sampling__num_slots': 64},
    'dppo_topk_tv, packed': {'learner__row_length': 128},
    'dppo_topk_tv, shared prompts': {'learner__share_prompts': True},
    'dppo_topk_tv, halved and packed, forward pass reused': {
        'sampling__num_slots': 64,
        'sampling__num_halvings': 1,
        'learner__row_length': 128,
        'learner__num_halvings': 1,
        'learner__num_minibatches': 1,
        'learner__reuse_forward': True,
        'learner__chunk_size': 0,
    },
    'dppo_binary_tv_recompute': {
        'algorithm': 'dppo_binary_tv_recompute'
    },
    'r2vpo': {'algorithm': 'r2vpo'},
}


@functools.cache
def facts(case):
  """Operations, loops counted once, and bytes of the step."""
  compiled = whole_step.compile_step(
      tiny_model.MODEL, optimized=True, **SIZES | CASES[case]
  )
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  return {
      'flops': int(compiled.cost_analysis()['flops']),
      'temporary_bytes': memory.temp_size_in_bytes,
      'argument_bytes': memory.argument_size_in_bytes,
      # What is donated is written in place.
      'aliased_bytes': memory.alias_size_in_bytes,
      'loops': len(re.findall(r' while\(', text)),
  }


@functools.cache
def executables(case):
  """Programs of a run of three steps, whose lengths are not the same."""
  options = CASES[case]
  if 'learner__row_length' in options:
    options = options | {
        'learner__row_length': 32, 'learner__num_microbatches': 4
    }
  if 'sampling__num_slots' in options:
    options = options | {'sampling__num_slots': 8}
  model = tiny_model.MODEL
  model = shapes.Stopping(model.config, model.family, stop=0.9)
  config, mesh, _ = whole_step.make_small(model, **options)
  program = whole_step.make_program(config, mesh, model)
  steps = whole_step.take_steps(config, mesh, program, tiny_model.params())
  assert len({step['tokens/sampled'] for step in steps['metrics']}) > 1
  return program.train_step._cache_size()


def decode_collectives():
  """{layout: {collective: how often}} of the sampler's loops on 8 devices."""
  return {
      name: dict(sorted(collections.Counter(
          kind for kind, _ in loops['collectives']
      ).items()))
      for name, loops in decoding_test.loops_of_layouts().items()
  }


def kept():
  """The file, if it was made with this jax."""
  found = json.loads(FILE.read_text())
  if found['jax'] != jax.__version__:
    pytest.skip(f'kept with jax {found["jax"]}, this is {jax.__version__}')
  return found


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_a_run_has_as_many_executables_as_it_did(case):
  assert executables(case) == kept()['executables'][case] == 1


@pytest.mark.several_devices
@pytest.mark.slow
def test_the_decode_loop_has_the_collectives_that_it_had():
  assert decode_collectives() == kept()['decode_collectives']


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_the_step_costs_what_it_did(case):
  before, now = kept()['cases'][case], facts(case)
  assert now.keys() == before.keys()
  for name, value in now.items():
    assert value == pytest.approx(before[name], rel=0.03), name


@pytest.mark.slow
def test_the_costs_are_in_proportion():
  cases = {x: facts(x) for x in CASES}
  grpo, topk = cases['grpo'], cases['dppo_topk_tv']
  assert topk['temporary_bytes'] <= 1.02 * grpo['temporary_bytes']
  # Rows of twice the length: attention has as many scores again.
  packed = cases['dppo_topk_tv, packed']
  assert packed['temporary_bytes'] <= 1.5 * topk['temporary_bytes']
  # 15 of a row's 63 slots are needed once in 8 rows.
  shared = cases['dppo_topk_tv, shared prompts']
  assert shared['temporary_bytes'] <= 0.9 * topk['temporary_bytes']


if __name__ == '__main__':
  FILE.write_text(json.dumps({
      'jax': jax.__version__,
      'cases': {case: facts(case) for case in CASES},
      'executables': {case: executables(case) for case in CASES},
      'decode_collectives': decode_collectives(),
  }, indent=2) + '\n')
