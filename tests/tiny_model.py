"""A random Qwen3 that compiles in seconds, and what runs on it.

N prompts, G completions of each, P prompt tokens, C completion tokens.
"""

import contextlib
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import many_devices
import numpy as np
import optax

from dppo_jax import advantages
from dppo_jax import algorithms
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import learner
from dppo_jax import losses
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import rollout
from dppo_jax import sampling
from dppo_jax import shaping
from dppo_jax import target
from dppo_jax import train_step
from dppo_jax import trainable as trainable_lib
from dppo_jax import trust_regions
from dppo_jax.models import layers
from dppo_jax.models import products
from dppo_jax.models import qwen3
from dppo_jax.models import qwen3_moe
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.types import Prompts
from dppo_jax.types import ScoredRollout

CONFIG = layers.ModelConfig(
    model_type='qwen3',
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
MODEL = CausalLM(config=CONFIG, family=qwen3)
WITH_EXPERTS = CausalLM(
    config=dataclasses.replace(
        CONFIG,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=6,
        norm_topk_prob=True,
    ),
    family=qwen3_moe,
)
jit = functools.partial(jax.jit, compiler_options=many_devices.QUICK)
# Many, so that completions have different lengths.
EOS_IDS, PAD_ID = tuple(range(1, 9)), 0
NUM_PROMPTS, GROUP_SIZE = 4, 4
PROMPT_LENGTH, COMPLETION_LENGTH = 5, 6


@contextlib.contextmanager
def quick_compilation():
  """What `jit` does, for code that calls `jax.jit` itself."""
  jax.config.update('jax_disable_most_optimizations', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_most_optimizations', False)


@functools.cache
def params():
  """Random ones; logits spread by about 2, as those of a trained model do."""
  tree = jit(MODEL.init)(jax.random.key(0))
  tree['embed']['embedding'] *= 20
  return tree


def prompts(num_prompts=NUM_PROMPTS, seed=0):
  """Left-padded prompts of 1 to P tokens. NumPy, [N, P]."""
  rng = np.random.RandomState(seed)
  shape = (num_prompts, PROMPT_LENGTH)
  lengths = 1 + np.arange(num_prompts)[:, None] % PROMPT_LENGTH
  mask = np.arange(PROMPT_LENGTH) >= PROMPT_LENGTH - lengths
  tokens = rng.randint(9, CONFIG.vocab_size, shape)
  return Prompts(np.where(mask, tokens, PAD_ID).astype(np.int32), mask)


def make_sampler(**options):
  """`sampling.make_sampler` with the sizes above."""
  return sampling.make_sampler(
      MODEL,
      **{
          'group_size': GROUP_SIZE,
          'max_completion_length': COMPLETION_LENGTH,
          'eos_ids': EOS_IDS,
          'pad_id': PAD_ID,
          'temperature': 1.0,
          **options,
      },
  )


def make_rollout_fn(divergence, **options):
  """`rollout.make_rollout_fn` that records for a divergence."""
  sampler = make_sampler(record=divergence.record, **options)
  return rollout.make_rollout_fn(sampler, group_size=GROUP_SIZE)


def make_scored(divergence, **options):
  """A rollout of `params()` in which every group has both rewards."""
  rolled, _ = jit(make_rollout_fn(divergence, **options))(
      params(), prompts(), jax.random.key(1), jnp.int32(0)
  )
  rewards = jnp.tile(jnp.array([1.0, 0.0, 0.0, 1.0]), NUM_PROMPTS)
  return ScoredRollout(rolled, rewards)


def sgd(learning_rate=0.5):
  """Parameters move by the gradient itself: no moment hides a difference."""
  return optim.Optimizer(
      optax.sgd(learning_rate), optax.constant_schedule(learning_rate)
  )


def make_objective(divergence, **options):
  """(prepare, weighted_loss): the loss of DPPO, unless told otherwise."""
  options = {
      'model': MODEL,
      'region_fn': trust_regions.build('outward'),
      'loss_fn': losses.build('policy_gradient'),
      'advantage_fn': advantages.build('group_mean', group_size=GROUP_SIZE),
      'shaping_fn': shaping.build('unshaped'),
      'normalizer': normalizers.build('token_mean'),
      'anchor': 'behaviour',
      'extras': objective.Extras(),
      'group_size': GROUP_SIZE,
      'num_groups': 0,
      'drop_groups_without_spread': False,
      'mask_truncated': False,
      'num_parts': 1,
      'temperature': 1.0,
      'chunk_size': 0,
      'prompt_length': 0,
      **options,
      'divergence': divergence,
  }
  fns = objective.make_prepare_fn, objective.make_loss_fn
  takes = [inspect.signature(fn).parameters for fn in fns]
  unknown = [name for name in options if not any(name in t for t in takes)]
  assert not unknown, f'options that nothing takes: {unknown}'
  return tuple(
      fn(**{k: v for k, v in options.items() if k in t})
      for fn, t in zip(fns, takes)
  )


def make_learner(
    divergence,
    *,
    optimizer=None,
    num_epochs=1,
    num_minibatches=1,
    num_microbatches=1,
    dual=None,
    trainable=trainable_lib.EVERYTHING,
    arrange=packing.as_sampled,
    rows_together=1,
    **options,
):
  """`learner.make_learner` with one update, unless told otherwise."""
  num_parts = num_minibatches * num_microbatches
  prepare, weighted_loss = make_objective(
      divergence,
      num_parts=num_parts,
      dual=dual,
      arrange=arrange,
      **options,
  )
  return learner.make_learner(
      weighted_loss=weighted_loss,
      prepare=prepare,
      optimizer=optimizer or sgd(),
      num_epochs=num_epochs,
      num_minibatches=num_minibatches,
      num_microbatches=num_microbatches,
      dual=dual,
      trainable=trainable,
      arrange=arrange,
      rows_together=rows_together,
  )


def row_options(name, **known):
  """What `make_learner` takes for a row of the table of algorithms.

  Built from names as a run does it; `known` are options that no config sets.
  """
  known = {'group_size': GROUP_SIZE, 'horizon': COMPLETION_LENGTH, **known}
  row = algorithms.config(name)

  def build(module, section):
    options = section.to_dict()
    factory = options.pop('name')
    for option in module.register.required(factory):
      options[option] = known[option]
    return module.build(factory, **options)

  return {
      'divergence': build(divergences, row['divergence']),
      'region_fn': build(trust_regions, row['trust_region']),
      'loss_fn': build(losses, row['loss']),
      'anchor': row['anchor'],
      'advantage_fn': build(advantages, row['advantage']),
      'normalizer': build(normalizers, row['normalizer']),
      'dual': build(duals, row['dual']),
  }


def make_state(params, **options):
  """The state before the first update of `sgd()`."""
  return train_step.init_state(params, sgd(), jax.random.key(0), **options)


def make_target_fn(divergence, *, model=MODEL, temperature=1.0, **options):
  """What a policy says of tokens, measured from the one that sampled them."""
  summed_loss = target.make_summed_loss(
      model, divergence, by_token=False, temperature=temperature, **options
  )
  token_loss = lambda stats: (jnp.zeros(stats.logprobs.shape), ())

  def fn(params, rollout):
    anchor = target.Anchor(rollout.behaviour_logprobs, rollout.record)
    return summed_loss(token_loss, params, packing.rows_of(rollout), anchor)[1]

  return fn


def topk_tv():
  """The default divergence, with a K that leaves a rest of the vocabulary."""
  return divergences.build('topk_tv', k=8)


def assert_trees_close(actual, expected, **tolerance):
  """Every leaf within a tolerance, named where it is not."""
  flat, _ = jax.tree_util.tree_flatten_with_path(actual)
  others = jax.tree.leaves(expected)
  assert len(flat) == len(others)
  for (path, a), b in zip(flat, others, strict=True):
    np.testing.assert_allclose(
        a, b, err_msg=jax.tree_util.keystr(path), **tolerance
    )


def assert_trees_equal(actual, expected):
  """Every leaf bit for bit; keys by their numbers."""

  def number(x):
    is_key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)

  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
  for a, b in zip(*leaves, strict=True):
    a, b = number(a), number(b)
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.tobytes() == b.tobytes()


def selection(made):
  """Products [L, B, T, F] that a pass has kept, for one over its tokens."""
  batch, length = jax.tree.leaves(made)[0].shape[1:3]
  return products.Selection(
      jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), made),
      jnp.arange(batch * length).reshape(batch, length),
  )


def all_products(made, entries):
  """Of tokens [B, T] and all layers. [L, E, F] -> [L, B, T, F]."""
  of = products.Selection(made, entries).of
  layers = [of(i) for i in range(len(jax.tree.leaves(made)[0]))]
  return jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *layers)
