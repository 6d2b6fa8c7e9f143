"""What slots save when completions differ in length.

    python benchmarks/rollout.py --output=benchmarks/results/rollout.json

The same completions, token for token, by the loop that ends with the longest
and by loops with fewer slots, which take the next of the queue when a completion
ends. Lengths are geometric: a Llama with random weights whose end token has
probability 1 / mean everywhere. Runs alternate with the loop that takes all at
once, A B A C; a ratio is the median over rounds of A over the run after it, so
above 1 is faster.
"""

import dataclasses
import pathlib
import sys
import time

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# ruff: noqa: E402
from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from dppo_jax import sampling
from dppo_jax.models import causal_lm
from dppo_jax.models import layers
from dppo_jax.models import llama
from dppo_jax.types import Prompts

_SIZE = flags.DEFINE_enum('size', 'tiny', ['tiny', 'small'], 'Of the model.')
_PROMPTS = flags.DEFINE_integer('prompts', 64, 'Prompts of 32 tokens.')
_GROUP = flags.DEFINE_integer('group', 8, 'Completions of each.')
_LENGTH = flags.DEFINE_integer('length', 64, 'Longest completion.')
_MEAN = flags.DEFINE_float('mean', 16.0, 'Mean length before it is cut.')
_SLOTS = flags.DEFINE_list('slots', ['32', '64', '128'], 'Numbers of slots.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Runs of each.', lower_bound=1)
_OUTPUT = flags.DEFINE_string('output', None, 'File of the result, JSON.')

PROMPT_LENGTH = 32
EOS_ID, PAD_ID = 1, 0
# layers, width, heads, key heads, inner width, vocabulary
SIZES = {
    'tiny': (4, 128, 4, 2, 384, 512),
    'small': (8, 512, 8, 4, 1408, 8192),
}


@dataclasses.dataclass(frozen=True)
class Geometric(causal_lm.CausalLM):
  """Ends a completion with the same probability after every token."""

  stop: float = 0.0

  def head(self, params, hidden):
    logits = super().head(params, hidden)
    others = logits.at[..., EOS_ID].set(-jnp.inf)
    odds = np.log(self.stop / (1 - self.stop))
    end = jax.nn.logsumexp(others, axis=-1) + odds
    return logits.at[..., EOS_ID].set(end)


def make_model(size: str, mean: float) -> Geometric:
  """A Llama of some size, without parameters."""
  depth, width, heads, key_heads, inner, vocab = SIZES[size]
  config = layers.ModelConfig(
      model_type='llama', vocab_size=vocab, hidden_size=width,
      intermediate_size=inner, num_hidden_layers=depth,
      num_attention_heads=heads, num_key_value_heads=key_heads,
      head_dim=width // heads, rope_theta=10_000.0, rms_norm_eps=1e-6,
      tie_word_embeddings=True, max_position_embeddings=4096,
  )
  return Geometric(config, llama, stop=1 / mean)


def make_prompts(num_prompts: int, vocab: int) -> Prompts:
  """Random tokens, without padding."""
  rng = np.random.RandomState(0)
  tokens = rng.randint(2, vocab, (num_prompts, PROMPT_LENGTH), np.int32)
  return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def measure() -> dict:
  """One row for each number of slots."""
  model = make_model(_SIZE.value, _MEAN.value)
  params = model.init(jax.random.key(0))
  prompts = make_prompts(_PROMPTS.value, model.config.vocab_size)
  batch = _PROMPTS.value * _GROUP.value
  keys = sampling.row_keys(jax.random.key(1), batch)

  def compile_for(num_slots):
    sampler = sampling.make_sampler(
        model, group_size=_GROUP.value, max_completion_length=_LENGTH.value,
        eos_ids=(EOS_ID,), pad_id=PAD_ID, temperature=1.0, num_slots=num_slots,
    )
    return jax.jit(sampler).lower(params, prompts, keys).compile()

  def run(program):
    start = time.perf_counter()
    out = jax.block_until_ready(program(params, prompts, keys))
    return time.perf_counter() - start, out

  slots = [0, *map(int, _SLOTS.value)]
  programs = {count: compile_for(count) for count in slots}
  outputs = {count: run(program)[1] for count, program in programs.items()}
  lengths = np.asarray(outputs[0].mask.sum(-1))
  rows = []
  for count, program in programs.items():
    np.testing.assert_array_equal(outputs[count].tokens, outputs[0].tokens)
    pairs = np.array([
        (run(programs[0])[0], run(program)[0]) for _ in range(_ROUNDS.value)
    ])
    rows.append({
        'slots': count or batch,
        'seconds': machine.spread(pairs[:, 1]),
        'speedup': machine.spread(pairs[:, 0] / pairs[:, 1]),
        'model_calls': int(outputs[count].num_steps),
        'temporary_bytes': program.memory_analysis().temp_size_in_bytes,
    })
  return {
      'tokens': int(lengths.sum()),
      'mean_length': round(float(lengths.mean()), 2),
      'longest': int(lengths.max()),
      'rows': rows,
  }


def main(_):
  result = {
      'benchmark': 'rollout',
      'sizes': {
          'model': _SIZE.value, 'prompts': _PROMPTS.value,
          'group': _GROUP.value, 'prompt_length': PROMPT_LENGTH,
          'length': _LENGTH.value, 'mean': _MEAN.value,
      },
      **measure(),
      'machine': machine.describe(),
  }
  machine.report(result, _OUTPUT.value)


if __name__ == '__main__':
  app.run(main)
