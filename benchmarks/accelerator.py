"""What a GPU or TPU makes of a step: tokens a second, and shares of its rates.

    python benchmarks/accelerator.py --name=accelerator

A Qwen3 of 0.6 B parameters with random weights in bfloat16, 64 prompts x 8
completions that never end, at most 1,024 tokens: sampling and one update, each
compiled and timed alone, on one device. Operations are those of products with
weights, of the head where a token was sampled, and of visible pairs, three
times for an update; recomputation is not counted. Bytes of decoding are the
weights, and keys and values as they are visible, once for each token drawn.
Rates are those of a large product and of a large array, measured here, and the
published ones if --peak_flops and --peak_bandwidth give them.
"""

import pathlib
import sys
import time
import types

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

# ruff: noqa: E402
from absl import app
from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from benchmarks import shapes
from configs import default
from dppo_jax import main as main_lib
from dppo_jax import program as program_lib
from dppo_jax import sharding
from dppo_jax.models import attention_kernels
from dppo_jax.models import causal_lm
from dppo_jax.models import layers
from dppo_jax.models import qwen3
from dppo_jax.types import Prompts
from dppo_jax.types import ScoredRollout

# layers, width, heads, key heads, width of a head, inner width, vocabulary
_SIZES = {
    'tiny': (2, 32, 4, 2, 8, 48, 64),
    'qwen3_0.6b': (28, 1024, 16, 8, 128, 3072, 151936),
}
_SIZE = flags.DEFINE_enum('size', 'qwen3_0.6b', list(_SIZES), 'Of the model.')
_PROMPTS = flags.DEFINE_integer('prompts', 64, 'Prompts.')
_GROUP = flags.DEFINE_integer('group', 8, 'Completions of each.')
_PROMPT_LENGTH = flags.DEFINE_integer('prompt_length', 128, 'Of each prompt.')
_LENGTH = flags.DEFINE_integer('length', 1024, 'Of each completion.')
_MICROBATCHES = flags.DEFINE_integer('microbatches', 16, 'Parts of an update.')
_CHUNK = flags.DEFINE_integer('chunk', 8192, 'Tokens of the head at a time.')
_REMAT = flags.DEFINE_enum('remat', 'none', causal_lm.REMAT, 'Of a layer.')
_UNROLL = flags.DEFINE_bool(
    'unroll', True, 'config.model.unroll_layers, layers one by one.'
)
_DECODE = flags.DEFINE_enum(
    'decode', 'auto', attention_kernels.DECODE_NAMES,
    'config.sampling.attention, by which tokens are decoded.',
)
_STAGES = flags.DEFINE_integer(
    'stages', 0, 'config.sampling.num_stages, for a cache that is read whole.'
)
_DTYPE = flags.DEFINE_string('dtype', 'bfloat16', 'Of model and sampler.')
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Runs of each.', lower_bound=1)
_PEAK_FLOPS = flags.DEFINE_float(
    'peak_flops', None, 'Operations a second that the maker publishes.'
)
_PEAK_BANDWIDTH = flags.DEFINE_float(
    'peak_bandwidth', None, 'Bytes a second that the maker publishes.'
)
_NAME = flags.DEFINE_string('name', None, 'Keeps the result under it.')


def make_model() -> causal_lm.CausalLM:
  depth, width, heads, key_heads, size, inner, vocab = _SIZES[_SIZE.value]
  config = layers.ModelConfig(
      model_type='qwen3', vocab_size=vocab, hidden_size=width,
      intermediate_size=inner, num_hidden_layers=depth,
      num_attention_heads=heads, num_key_value_heads=key_heads,
      head_dim=size, rope_theta=1e6, rms_norm_eps=1e-6,
      tie_word_embeddings=True, max_position_embeddings=40960,
  )
  return causal_lm.CausalLM(
      config, qwen3, dtype=jnp.dtype(_DTYPE.value), remat=_REMAT.value,
      unrolls_layers=_UNROLL.value,
  )


def make_config():
  """GRPO with one update for each rollout, of rows as they were sampled."""
  config = default.get_config('grpo')
  config.update_from_flattened_dict({
      'num_prompts': _PROMPTS.value,
      'group_size': _GROUP.value,
      'max_prompt_length': _PROMPT_LENGTH.value,
      'max_completion_length': _LENGTH.value,
      'model.dtype': _DTYPE.value,
      'sampling.dtype': _DTYPE.value,
      'sampling.attention': _DECODE.value,
      'sampling.num_stages': _STAGES.value,
      'model.remat': _REMAT.value,
      'model.unroll_layers': _UNROLL.value,
      'learner.num_minibatches': 1,
      'learner.num_microbatches': _MICROBATCHES.value,
      'learner.chunk_size': _CHUNK.value,
  })
  return config


def rates() -> dict[str, float]:
  """Operations and bytes a second of large arrays, and the published ones."""
  # Many in one program, or the time to start it would count.
  side, count = (8192, 16) if jax.default_backend() != 'cpu' else (1024, 2)
  repeat = lambda fn: jax.jit(
      lambda x, y: jax.lax.fori_loop(0, count, lambda _, x: fn(x, y), x)
  )
  key = jax.random.key(0)
  x = jax.random.normal(key, (side, side), _DTYPE.value)
  product = machine.best_of(repeat(lambda x, y: x @ y), x, x / side**0.5)
  array = jnp.ones(side * side * 4, jnp.float32)
  copy = machine.best_of(repeat(jnp.add), array, jnp.float32(1))
  found = {
      'measured_flops': count * 2 * side**3 / product,
      'measured_bandwidth': count * 2 * array.nbytes / copy,
      'published_flops': _PEAK_FLOPS.value,
      'published_bandwidth': _PEAK_BANDWIDTH.value,
  }
  return {name: value for name, value in found.items() if value}


def timed(fn, *arguments):
  """Seconds of each round, after one to compile, and what it returned."""
  out = jax.block_until_ready(fn(*arguments))
  seconds = []
  for _ in range(_ROUNDS.value):
    start = time.perf_counter()
    out = jax.block_until_ready(fn(*arguments))
    seconds.append(time.perf_counter() - start)
  return seconds, out


def work(config) -> dict[str, float]:
  """Operations of an update and of a rollout, and bytes of decoding."""
  rows, prompt, length = (
      _PROMPTS.value * _GROUP.value, _PROMPT_LENGTH.value, _LENGTH.value
  )
  slots = prompt + length - 1
  pairs = rows * slots * (slots + 1) / 2
  forward = shapes.operations(config, rows * slots, rows * length, pairs)
  of_prompts = shapes.operations(
      config, _PROMPTS.value * prompt, _PROMPTS.value,
      _PROMPTS.value * prompt * (prompt + 1) / 2,
  )
  params = jax.eval_shape(make_model().init, jax.random.key(0))
  weights = sum(x.size for x in jax.tree.leaves(params))
  kv = 2 * config.num_hidden_layers * (
      config.num_key_value_heads * config.head_dim
  )
  size = jnp.dtype(_DTYPE.value).itemsize
  # A token drawn reads the prompts once, and what was drawn before it.
  visible = _PROMPTS.value * prompt * length + rows * length * length / 2
  decode = shapes.operations(
      config, rows * length, rows * length,
      rows * (prompt * length + length * length / 2),
  )
  return {
      'learn_flops': 3 * forward,
      'sample_flops': of_prompts + decode,
      'decode_bytes': size * (weights * length + kv * visible),
  }


def measure() -> dict:
  model, config = make_model(), make_config()
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, expert=1)
  program = program_lib.make_program(
      config, mesh, main_lib.make_method(config), model,
      # No token ends a completion.
      types.SimpleNamespace(
          eos_token_id=model.config.vocab_size, pad_token_id=0
      ),
  )
  key = jax.random.key(0)
  state = jax.jit(program.init)(model.init(key), key, key)
  tokens = np.random.RandomState(0).randint(
      2, model.config.vocab_size, (_PROMPTS.value, _PROMPT_LENGTH.value)
  ).astype(np.int32)
  prompts = Prompts(tokens, np.ones(tokens.shape, bool))
  sample, (rollout, _) = timed(
      jax.jit(program.rollout_fn), state.params, prompts, key, 0
  )
  sampled = int(rollout.token_mask.sum())
  rewards = jax.random.bernoulli(key, 0.5, rollout.truncated.shape)
  scored = ScoredRollout(rollout, rewards.astype(jnp.float32))
  learn, _ = timed(jax.jit(program.learn), state, scored, key)
  peaks, done = rates(), work(model.config)
  typical = {'sample': np.median(sample), 'learn': np.median(learn)}
  shares = {}
  for kind in ('measured', 'published'):
    if f'{kind}_flops' in peaks:
      shares[f'learn_of_{kind}_flops'] = (
          done['learn_flops'] / typical['learn'] / peaks[f'{kind}_flops']
      )
    if f'{kind}_bandwidth' in peaks:
      shares[f'decode_of_{kind}_bandwidth'] = (
          done['decode_bytes'] / typical['sample'] / peaks[f'{kind}_bandwidth']
      )
  return {
      'sampled_tokens': sampled,
      'seconds': {
          'sample': machine.spread(sample), 'learn': machine.spread(learn)
      },
      'tokens_per_s': {
          'sample': sampled / typical['sample'],
          'learn': sampled / typical['learn'],
          'both': sampled / sum(typical.values()),
      },
      'work': done,
      'rates': peaks,
      'shares': shares,
      'peak_device_bytes': machine.peak_device_bytes(),
  }


def main(_):
  result = {
      'benchmark': 'accelerator',
      'sizes': {
          'model': _SIZE.value, 'prompts': _PROMPTS.value,
          'group': _GROUP.value, 'prompt_length': _PROMPT_LENGTH.value,
          'length': _LENGTH.value, 'dtype': _DTYPE.value,
          'microbatches': _MICROBATCHES.value, 'remat': _REMAT.value,
          'unroll': _UNROLL.value, 'chunk': _CHUNK.value,
          'decode': _DECODE.value, 'stages': _STAGES.value,
      },
      **measure(),
      'machine': machine.describe(),
  }
  machine.report(result, _NAME.value)


if __name__ == '__main__':
  app.run(main)
