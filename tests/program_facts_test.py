"""What the compiled step costs, in numbers that no machine changes.

`program_facts.json` keeps them, as XLA counts them for a CPU. After a change
that is meant to change them:

    PYTHONPATH=. python tests/program_facts_test.py

writes them anew; the difference belongs into the commit.
"""

import functools
import json
import pathlib
import re

import jax
import pytest
import tiny_model
import whole_step

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


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_the_step_costs_what_it_did(case):
  kept = json.loads(FILE.read_text())
  if kept['jax'] != jax.__version__:
    pytest.skip(f'kept with jax {kept["jax"]}, this is {jax.__version__}')
  now = facts(case)
  assert now.keys() == kept['cases'][case].keys()
  for name, value in now.items():
    assert value == pytest.approx(kept['cases'][case][name], rel=0.03), name


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
      'jax': jax.__version__, 'cases': {case: facts(case) for case in CASES}
  }, indent=2) + '\n')
