"""What a run compiles, made of the functions that its config names.

Needs no weights and no devices, so a plan is of the same program.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from dppo_jax import advantages
from dppo_jax import checks
from dppo_jax import decoding
from dppo_jax import duals
from dppo_jax import evaluate
from dppo_jax import learner
from dppo_jax import meshes
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import replay as replay_lib
from dppo_jax import rollout as rollout_lib
from dppo_jax import run_attention
from dppo_jax import sampling
from dppo_jax import shaping
from dppo_jax import sharding
from dppo_jax import split_step
from dppo_jax import train_step as train_step_lib
from dppo_jax import trainable as trainable_lib
from dppo_jax import trust_regions
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.tasks.prompts import end_ids
from dppo_jax.types import Divergence
from dppo_jax.types import LossFn
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import ScoredRollout
from dppo_jax.types import Threshold
from dppo_jax.types import TrainState


class Method(NamedTuple):
  """What the config says about learning, built before any weights are read."""

  divergence: Divergence
  region_fn: trust_regions.RegionFn
  limits_tokens: bool  # Outside is whose divergence is above the threshold.
  loss_fn: LossFn
  advantage_fn: advantages.AdvantageFn
  shaping_fn: shaping.ShapingFn
  normalizer: normalizers.NormalizerFn
  dual: duals.Dual | None
  extras: objective.Extras
  optimizer: optim.Optimizer

  @property
  def outside_threshold(self) -> Threshold | None:
    """Above it a token counts as outside; None where the rule has no such."""
    return self.divergence.threshold if self.limits_tokens else None


class Program(NamedTuple):
  """What is compiled, and the shape of what it works on."""

  # From parameters, the state's key, and one for adapters.
  init: Callable[[PyTree, jax.Array, jax.Array], TrainState]
  trainable: trainable_lib.Trainable
  shardings: TrainState
  state: TrainState  # Shapes, placed by them.
  rollout_fn: rollout_lib.RolloutFn
  learn: Callable[..., Any]
  train_step: train_step_lib.TrainStep


def make_program(
    config: Any, mesh: Any, method: Method, model: CausalLM, tokenizer: Any
) -> Program:
  """The functions of a run. Needs no weights, and no devices in the mesh.

  Of the tokenizer only `eos_token_id` and `pad_token_id` are looked at.

  Raises:
    ValueError: if the number of micro-batches is still to be found, which is
      for `fitting.make_program`.
  """
  if not config.learner.num_microbatches:
    raise ValueError(
        'config.learner.num_microbatches=0 is found by fitting.make_program; '
        'a program needs a number.'
    )
  shapes = abstract_params(config, model)
  trainable = trainable_lib.make_trainable(
      shapes, rules=config.learning_rates, **config.lora
  )
  method = method._replace(
      optimizer=_for_trainable(config, method.optimizer, trainable)
  )
  spread, whole = run_attention.with_attention(config, mesh, model)
  rollout_fn = _make_rollout_fn(
      config, whole, tokenizer, method.divergence, mesh
  )
  place = functools.partial(
      jax.lax.with_sharding_constraint, shardings=sharding.tokens(mesh)
  )
  spread = spread.replace(
      place=place,
      by_tokens=sharding.by_tokens(mesh),
      by_experts=sharding.by_experts(mesh),
  )
  arrange = _make_arrange(config, mesh)
  learn = _make_learner(config, spread, method, trainable, arrange, place)
  replay = _make_replay(config, spread, method, arrange)

  def init(params, key, key_adapters):
    params, frozen = trainable.split(params, key_adapters)
    state = train_step_lib.init_state(
        params,
        method.optimizer,
        key,
        frozen=frozen,
        # Adapters stand beside what they started from.
        with_reference=method.extras.needs_reference and not config.lora.rank,
        dual=method.dual,
    )
    if config.learner.reuse_forward:
      state = state._replace(products=_empty_products(config, whole))
    if replay is None:
      return state
    return state._replace(replay=replay.init(train_step_lib.blank(
        rollout_fn, state, prompt_shapes(config), trainable
    )))

  key = jax.random.key(0)
  state = jax.eval_shape(init, shapes, key, key)
  shardings = train_step_lib.state_shardings(state, mesh)
  return Program(
      init=init,
      trainable=trainable,
      shardings=shardings,
      state=jax.tree.map(sharding.placed, state, shardings),
      rollout_fn=rollout_fn,
      learn=learn,
      train_step=_make_step(config, mesh)(
          learn=learn,
          rollout_fn=rollout_fn,
          threshold=method.outside_threshold,
          group_size=config.group_size,
          vocab_size=model.config.vocab_size,
          state_shardings=shardings,
          mesh=mesh,
          replay=replay,
          trainable=trainable,
      ),
  )


def _for_trainable(
    config: Any, optimizer: optim.Optimizer, trainable: trainable_lib.Trainable
) -> optim.Optimizer:
  """With the factors of its learning rate, and float32 masters if needed."""
  if trainable.factors is not None:
    optimizer = optim.scaled(optimizer, trainable.factors)
  # Adapters are float32 beside a model of any precision.
  if config.model.params_dtype != 'float32' and not config.lora.rank:
    optimizer = optim.with_master_weights(optimizer)
  return optimizer


def _make_rollout_fn(config, model, tokenizer, divergence: Divergence, mesh):
  settings = config.sampling.to_dict()
  for name in ('mesh', 'num_devices', 'attention', 'num_stages'):
    del settings[name]
  sampling_mesh = meshes.sampling_mesh(config, mesh)
  sampler = _make_sampler(
      config,
      model,
      tokenizer,
      mesh,
      group_size=config.group_size,
      record=divergence.record,
      record_routing=config.model.router_replay,
      **settings,
  )
  # Two programs move the parameters between them, one does so within.
  learner_mesh = mesh if config.mode == 'fused' else sampling_mesh
  return rollout_lib.make_rollout_fn(
      sharding.on_its_own_mesh(
          sampler,
          mesh=sampling_mesh,
          learner_mesh=learner_mesh,
          head_dim=model.config.head_dim,
      ),
      group_size=config.group_size,
  )


def _make_sampler(config, model, tokenizer, mesh, *, num_slots, **options):
  """What training and evaluation sample with; `options` are each one's own."""
  shards = sharding.num_row_shards(meshes.sampling_mesh(config, mesh))
  return sampling.make_sampler(
      model,
      max_completion_length=config.max_completion_length,
      eos_ids=end_ids(tokenizer, config.stop, model.config.eos_token_ids),
      pad_id=tokenizer.pad_token_id,
      num_slots=num_slots // shards,
      num_stages=run_attention.num_stages(config, mesh, model),
      **options,
  )


def _make_arrange(config: Any, mesh: Any) -> packing.ArrangeFn:
  """How the learner lays out rows."""
  if config.learner.share_prompts:
    return packing.make_grouped(
        prompt_length=config.max_prompt_length, group_size=config.group_size
    )
  if not config.learner.row_length:
    return packing.as_sampled
  return packing.make_packed(
      row_length=config.learner.row_length,
      prompt_length=config.max_prompt_length,
      group_size=config.group_size,
      row_multiple=sharding.num_batch_shards(mesh),
      num_halvings=config.learner.num_halvings,
      halving_steps=config.learner.halving_steps,
  )


def _make_learner(
    config, model: CausalLM, method: Method, trainable, arrange, place
):
  sizes = config.learner
  options = {
      'model': model,
      'divergence': method.divergence,
      'extras': method.extras,
      'temperature': config.sampling.temperature,
      'chunk_size': sizes.chunk_size,
      'prompt_length': _unpredicted(config),
  }
  return learner.make_learner(
      weighted_loss=objective.make_loss_fn(
          region_fn=method.region_fn,
          loss_fn=method.loss_fn,
          dual=method.dual,
          **options,
      ),
      prepare=objective.make_prepare_fn(
          advantage_fn=method.advantage_fn,
          shaping_fn=method.shaping_fn,
          normalizer=method.normalizer,
          anchor=config.anchor,
          group_size=config.group_size,
          num_groups=config.num_groups,
          drop_groups_without_spread=config.drop_groups_without_spread,
          mask_truncated=config.mask_truncated,
          num_parts=sizes.num_minibatches * sizes.num_microbatches,
          arrange=arrange,
          **options,
      ),
      optimizer=method.optimizer,
      num_epochs=sizes.num_epochs,
      num_minibatches=sizes.num_minibatches,
      num_microbatches=sizes.num_microbatches,
      dual=method.dual,
      trainable=trainable,
      arrange=arrange,
      rows_together=config.group_size if sizes.share_prompts else 1,
      place=place,
  )


def _unpredicted(config: Any) -> int:
  """Slots of a prompt at the start of every row of the learner."""
  return 0 if config.learner.row_length else config.max_prompt_length


def _make_replay(
    config: Any, model: CausalLM, method: Method, arrange: packing.ArrangeFn
) -> replay_lib.Replay | None:
  sizes, settings = config.learner, config.replay
  return replay_lib.make_replay(
      capacity=settings.capacity,
      num_groups=checks.num_replayed_groups(config),
      group_size=config.group_size,
      sampling=settings.sampling,
      max_age=settings.max_age,
      num_updates=sizes.num_epochs * sizes.num_minibatches,
      logprobs_fn=objective.make_logprobs_fn(
          model=model,
          num_parts=sizes.num_minibatches * sizes.num_microbatches,
          temperature=config.sampling.temperature,
          chunk_size=sizes.chunk_size,
          prompt_length=_unpredicted(config),
          arrange=arrange,
      ),
      shaping_fn=method.shaping_fn,
  )


def _empty_products(config: Any, model: CausalLM) -> PyTree:
  """A buffer for what the sampler's kernels make."""
  entries = decoding.num_entries(
      num_prompts=config.num_prompts,
      prompt_length=config.max_prompt_length,
      batch=config.num_prompts * config.group_size,
      num_slots=config.sampling.num_slots,
      length=config.max_completion_length,
  )
  return model.empty_products(entries)


def _make_step(
    config: Any, mesh: Any
) -> Callable[..., train_step_lib.TrainStep]:
  if config.mode == 'fused':
    return train_step_lib.make_train_step
  return functools.partial(
      split_step.make_split_step,
      sampling_mesh=meshes.sampling_mesh(config, mesh),
  )


def evaluation_program(
    config: Any, mesh: Any, model: CausalLM, tokenizer: Any
) -> evaluate.Program:
  """What held-out evaluation compiles. Needs no weights, and no devices.

  Of the tokenizer only `pad_token_id` and what tells ends is looked at, see
  `end_ids`.
  """
  settings = config.eval
  sampling_mesh = meshes.sampling_mesh(config, mesh)
  _, whole = run_attention.with_attention(config, mesh, model)
  sampler = _make_sampler(
      config,
      whole,
      tokenizer,
      mesh,
      group_size=settings.num_samples,
      num_slots=settings.num_slots,
      temperature=settings.temperature,
      top_p=settings.top_p,
      top_k=settings.top_k,
      dtype=config.sampling.dtype,
  )
  sample = evaluate.make_sample(
      sharding.by_rows(sampler, sampling_mesh, head_dim=model.config.head_dim),
      sampling_mesh,
  )
  inputs = evaluate.abstract_inputs(
      num_prompts=settings.num_prompts,
      num_samples=settings.num_samples,
      prompt_length=config.max_prompt_length,
      mesh=sampling_mesh,
  )

  def there(params):
    if mesh == sampling_mesh:
      return params
    return jax.tree.map(
        sharding.placed, params, sharding.of_params(params, sampling_mesh)
    )

  return evaluate.Program(
      sample=sample,
      lower=lambda params: sample.lower(there(params), *inputs),
      there=there,
      copies=mesh != sampling_mesh,
      apart=sharding.apart(mesh, sampling_mesh),
  )


def architecture(config: Any, family: Any, sizes: Any) -> CausalLM:
  """The model without parameters; refuses what it cannot do.

  Args:
    config: of the run.
    family: module of the architecture.
    sizes: a `layers.ModelConfig`.
  """
  checks.check_model(
      config,
      vocab_size=sizes.vocab_size,
      max_positions=sizes.max_position_embeddings,
      num_experts=sizes.num_experts,
  )
  return CausalLM(
      config=sizes,
      family=family,
      dtype=jax.numpy.dtype(config.model.dtype),
      remat=config.model.remat,
      unrolls_layers=config.model.unroll_layers,
  )


def abstract_arguments(
    config: Any, mesh: Any, program: Program
) -> tuple[TrainState, ScoredRollout, Prompts]:
  """Shapes of what a run calls its step with, where they will be."""
  rows = sharding.batch(mesh)
  place = functools.partial(sharding.placed, where=rows)
  prompts = jax.tree.map(place, prompt_shapes(config))
  blank = functools.partial(
      train_step_lib.blank, program.rollout_fn, trainable=program.trainable
  )
  scored = jax.eval_shape(blank, program.state, prompts)
  return program.state, jax.tree.map(place, scored), prompts


def abstract_params(config: Any, model: CausalLM) -> PyTree:
  """Shapes and dtypes of the parameters."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  dtype = jax.numpy.dtype(config.model.params_dtype)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def prompt_shapes(config: Any) -> Prompts:
  shape = (config.num_prompts, config.max_prompt_length)
  return Prompts(
      jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, bool)
  )
