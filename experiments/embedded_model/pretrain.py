"""Pretrains the small model that ships with dppo_jax, by supervised learning.

    python experiments/embedded_model/pretrain.py --output=/tmp/arithmetic_qwen3

A Qwen3 of 1.2 M parameters reads worked solutions of the training problems of
`dppo_jax.tasks.arithmetic`, in which every step goes wrong with probability
`--slip`: a result that is off by up to 15, after which the solution carries on
consistently. So the model knows the arithmetic (its most likely token is
nearly always right) but samples wrongly about as often as its corpus, which is
what reinforcement learning with a verifier is there to mend. Test problems are
never seen. README.md beside this file has the result.
"""

import json
import pathlib
import random
import time

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from make_tokenizer import make_tokenizer
import numpy as np
import optax

from dppo_jax import divergences
from dppo_jax.models import layers
from dppo_jax.models import load
from dppo_jax.models import qwen3
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.tasks import arithmetic

_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
_STEPS = flags.DEFINE_integer('steps', 2500, 'Optimizer updates.')
_BATCH = flags.DEFINE_integer('batch_size', 128, 'Solutions per update.')
_SLIP = flags.DEFINE_float('slip', 0.26, 'Chance that a step goes wrong.')
_RATE = flags.DEFINE_float('learning_rate', 3e-3, 'Peak learning rate.')
_WIDTH = flags.DEFINE_integer('width', 160, 'Of the model, a multiple of 32.')
_LAYERS = flags.DEFINE_integer('layers', 4, 'Of the model.')
_HEADS = flags.DEFINE_integer('heads', 4, 'That ask; half as many answer.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of everything random.')

LENGTH = 26  # Tokens of the longest prompt, solution and end token.
LARGEST_SLIP = 15


def worked_solution(prompt: str, slip: float, rng: random.Random) -> str:
  """A completion in up to three steps, each wrong with chance `slip`."""

  def result(value):
    if rng.random() >= slip:
      return value
    near = [
        value + gap
        for gap in range(-LARGEST_SLIP, LARGEST_SLIP + 1)
        if gap and 0 <= value + gap <= arithmetic.LARGEST
    ]
    return rng.choice(near)

  steps = []

  def step(left, sign, right):
    value = {'+': left + right, '-': left - right, '*': left * right}[sign]
    value = result(min(max(value, 0), arithmetic.LARGEST))
    steps.append(f'{left}{sign}{right}={value}')
    return value

  sign = next(s for s in '+-*' if s in prompt)
  left, right = (int(x) for x in prompt.rstrip('=').split(sign))
  if sign == '*':
    digit, number = min(left, right), max(left, right)
    tens, units = number - number % 10, number % 10
    high, low = step(digit, '*', tens), step(digit, '*', units)
    last = step(high, '+', low)
  else:
    tens, units = right - right % 10, right % 10
    last = step(step(left, sign, tens), sign, units)
  return ', '.join(steps) + f' #### {last}'


def make_batches(tokenizer, problems, rng):
  """Yields (tokens [B, LENGTH], mask of completion and end token)."""
  while True:
    tokens = np.full((_BATCH.value, LENGTH), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((_BATCH.value, LENGTH), bool)
    for row in range(_BATCH.value):
      prompt = rng.choice(problems)['prompt']
      start = tokenizer.encode(prompt)
      solution = worked_solution(prompt, _SLIP.value, rng)
      end = tokenizer.encode(solution) + [tokenizer.eos_token_id]
      ids = start + end
      tokens[row, : len(ids)] = ids
      mask[row, len(start) : len(ids)] = True
    yield tokens, mask


def make_config(tokenizer) -> layers.ModelConfig:
  return layers.ModelConfig(
      model_type='qwen3',
      vocab_size=len(tokenizer),
      hidden_size=_WIDTH.value,
      intermediate_size=3 * _WIDTH.value,
      num_hidden_layers=_LAYERS.value,
      num_attention_heads=_HEADS.value,
      num_key_value_heads=_HEADS.value // 2,
      head_dim=32,
      rope_theta=10_000.0,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      max_position_embeddings=512,
  )


def main(_):
  rng = random.Random(_SEED.value)
  tokenizer = make_tokenizer()
  model = CausalLM(config=make_config(tokenizer), family=qwen3)
  params = model.init(jax.random.key(_SEED.value))
  print('parameters:', sum(x.size for x in jax.tree.leaves(params)))
  schedule = optax.warmup_cosine_decay_schedule(
      0.0, _RATE.value, 100, _STEPS.value
  )
  optimizer = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(schedule, b2=0.98, weight_decay=0.01),
  )

  @jax.jit
  def update(params, opt_state, tokens, mask):
    def loss_fn(params):
      logits = model.apply(params, tokens[:, :-1])
      logprobs = divergences.token_logprobs(logits, tokens[:, 1:])
      return -jnp.sum(logprobs * mask[:, 1:]) / jnp.sum(mask)

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    changes, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, changes), opt_state, loss

  opt_state = optimizer.init(params)
  batches = make_batches(tokenizer, arithmetic.problems('train'), rng)
  start, history = time.time(), []
  for step in range(1, _STEPS.value + 1):
    params, opt_state, loss = update(params, opt_state, *next(batches))
    if step % 100 == 0:
      history.append((step, round(float(loss), 4)))
      print(*history[-1], f'{time.time() - start:.0f} s', flush=True)

  folder = pathlib.Path(_OUTPUT.value)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  load.save_pretrained(model, folder, params=params, tokenizer=tokenizer)
  # The name that every transformers version since 4 knows.
  path = folder / 'tokenizer_config.json'
  settings = json.loads(path.read_text())
  settings['tokenizer_class'] = 'PreTrainedTokenizerFast'
  settings['model_max_length'] = 512
  path.write_text(json.dumps(settings, indent=2) + '\n')


if __name__ == '__main__':
  app.run(main)
