"""No array of the size of all logits exists in the compiled step."""

import dataclasses
import math
import re
import types

import jax
import numpy as np
import pytest
import tiny_model

from configs import default
from dppo_jax import main
from dppo_jax import sharding
from dppo_jax import train_step
from dppo_jax.types import Prompts

VOCAB, CHUNK = 151_936, 32
NUM_PROMPTS, G, P, C = 4, 4, 8, 40


def largest_array(chunk_size, num_slots):
  """Elements of the largest array in the program of a whole step."""
  config = default.get_config('dppo_topk_tv')
  config.num_prompts, config.group_size = NUM_PROMPTS, G
  config.max_prompt_length, config.max_completion_length = P, C
  config.learner.num_minibatches = 1
  config.learner.chunk_size = chunk_size
  config.sampling.num_slots = num_slots
  model = tiny_model.MODEL.replace(
      config=dataclasses.replace(tiny_model.CONFIG, vocab_size=VOCAB)
  )
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
  program = main.make_program(
      config, mesh, main.make_method(config), model,
      types.SimpleNamespace(eos_token_id=1, pad_token_id=0),
  )
  key = jax.random.key(0)
  state = jax.eval_shape(
      program.init, main.abstract_params(config, model), key, key
  )
  shape = (NUM_PROMPTS, P)
  prompts = Prompts(
      jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, bool)
  )
  scored = jax.eval_shape(
      lambda *x: train_step.blank(program.rollout_fn, *x, program.trainable),
      state, prompts,
  )
  with tiny_model.quick_compilation():
    compiled = program.train_step.lower(state, scored, prompts).compile()
  shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', compiled.as_text())
  return max(math.prod(map(int, x.split(','))) for x in set(shapes))


@pytest.mark.slow
@pytest.mark.parametrize('num_slots', [0, 8])
def test_only_a_chunk_of_logits_exists_at_a_time(num_slots):
  all_logits = NUM_PROMPTS * G * C * VOCAB
  # The embedding is the largest array, then the logits of a chunk.
  limit = VOCAB * max(CHUNK, tiny_model.CONFIG.hidden_size)
  assert largest_array(CHUNK, num_slots) == limit == all_logits / 20


@pytest.mark.slow
def test_without_chunks_they_all_exist():
  # So the test above can fail.
  all_logits = NUM_PROMPTS * G * C * VOCAB
  assert largest_array(0, 0) >= all_logits
