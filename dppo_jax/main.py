"""Turns a config into a run: the only place where a name becomes a function.

    python -m dppo_jax.main --config=configs/tv_topk.py --workdir=DIR

A run that was stopped, however, continues when it is started again with the
same command.
"""

from collections.abc import Callable
import contextlib
import functools
import json
import pathlib
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from dppo_jax import advantages
from dppo_jax import checks
from dppo_jax import command_line
from dppo_jax import decoding
from dppo_jax import divergences
from dppo_jax import duals
from dppo_jax import evaluate
from dppo_jax import fitting
from dppo_jax import learner
from dppo_jax import losses
from dppo_jax import memory
from dppo_jax import normalizers
from dppo_jax import objective
from dppo_jax import optim
from dppo_jax import packing
from dppo_jax import processes
from dppo_jax import replay as replay_lib
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax import shaping
from dppo_jax import sharding
from dppo_jax import split_step
from dppo_jax import tasks
from dppo_jax import train_step as train_step_lib
from dppo_jax import trainable as trainable_lib
from dppo_jax import training
from dppo_jax import trust_regions
from dppo_jax import workdir as workdir_lib
from dppo_jax.models import attention
from dppo_jax.models import attention_kernels
from dppo_jax.models import decode_kernel
from dppo_jax.models import load
from dppo_jax.models import packed_attention
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.tasks.prompts import end_ids
from dppo_jax.tasks.prompts import evaluation_batches
from dppo_jax.tasks.prompts import prepare
from dppo_jax.tasks.prompts import PromptIterator
from dppo_jax.tasks.scoring import may_hang
from dppo_jax.tasks.scoring import Scorer
from dppo_jax.tasks.verify import make_verify_fn
from dppo_jax.types import Divergence
from dppo_jax.types import LossFn
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState


class Method(NamedTuple):
  """What the config says about learning, built before any weights are read."""

  divergence: Divergence
  region_fn: trust_regions.RegionFn
  loss_fn: LossFn
  advantage_fn: advantages.AdvantageFn
  shaping_fn: shaping.ShapingFn
  normalizer: normalizers.NormalizerFn
  dual: duals.Dual | None
  extras: objective.Extras
  optimizer: optim.Optimizer


def build(config: Any, *, to_train: bool = True) -> training.Parts:
  """Turns names into functions and puts the parameters on their devices.

  Args:
    config: of the run.
    to_train: False if no step will be taken: it is not compiled then.

  Raises:
    ValueError: something cannot work, or has no room on the devices.
  """
  _use_compilation_cache(config.compilation_cache)
  checks.check_mode(
      config,
      num_devices=jax.device_count(),
      num_processes=jax.process_count(),
  )
  mesh = make_mesh(config)
  rows = sharding.batch(mesh)
  checks.check(
      config,
      num_batch_shards=sharding.num_batch_shards(mesh),
      **row_shards(config, mesh),
  )
  method = make_method(config)
  task = _build(tasks, config, 'task')
  checks.check_verifier(config, may_hang=may_hang(task.score))
  tokenizer = load.load_tokenizer(config.model.name)
  task = prepare(
      task, tokenizer, max_prompt_length=config.max_prompt_length
  )
  model = architecture(
      config, *load.read_config(load.resolve(config.model.name))
  )
  _warn_of_undivided(config, mesh, model)
  warn_of_no_kernel(config, mesh, model)
  if config.sampling.num_devices and not config.staleness:
    logging.warning(
        'Learner and sampler have devices of their own, but with '
        'config.staleness=0 each waits for the other; from 1 on they overlap.'
    )
  scorer = Scorer(task.score, **config.scoring, total=processes.total)
  verify = make_verify_fn(tokenizer, scorer)
  key_state, key_eval, key_adapters = jax.random.split(
      jax.random.key(config.seed), 3
  )
  share = processes.share(rows, config.num_prompts)
  prompts = PromptIterator(
      task.train,
      tokenizer,
      num_prompts=config.num_prompts,
      max_prompt_length=config.max_prompt_length,
      seed=config.seed,
      share=share,
      place=lambda x: processes.place(x, rows, config.num_prompts),
      add_special_tokens=task.chat is None,
  )
  evaluate_fn = _make_evaluation(
      config, mesh, model, tokenizer, task, verify, key_eval
  )
  program, compile_s = fitting.make_program(
      config,
      lambda config: make_program(config, mesh, method, model, tokenizer),
      lambda x: x.train_step.lower(*abstract_arguments(config, mesh, x)),
      limit=memory.limit(),
      num_batch_shards=sharding.num_batch_shards(mesh),
      to_train=to_train,
  )
  params = load.from_pretrained(
      config.model.name,
      dtype=config.model.params_dtype,
      shardings=lambda tree: sharding.of_params(tree, mesh),
  ).params
  parts = training.Parts(
      method=method,
      model=model,
      trainable=program.trainable,
      tokenizer=tokenizer,
      scorer=scorer,
      verify=verify,
      prompts=prompts,
      evaluate_fn=evaluate_fn,
      rollout_fn=program.rollout_fn,
      learn=program.learn,
      train_step=program.train_step,
      # Parameters keep their memory; all else is made where it belongs.
      state=jax.jit(
          program.init, out_shardings=program.shardings, donate_argnums=0
      )(params, key_state, key_adapters),
      prompt_shapes=_prompt_shapes(config),
      own=processes.of_groups(share.own, config.group_size),
      mesh=mesh,
      compile_s=compile_s,
  )
  if to_train:
    _, pending, _ = abstract_arguments(config, mesh, program)
    training.check_evaluation(
        config, parts, parts.state, [pending] * (1 + config.staleness)
    )
  return parts


def make_mesh(config: Any) -> Any:
  """The learner's: of all devices but those that only sample."""
  devices = jax.devices()
  learning = devices[:len(devices) - config.sampling.num_devices]
  return sharding.make_mesh(**config.mesh, devices=learning)


def _sampling_mesh(config: Any, mesh: Any) -> Any:
  number = config.sampling.num_devices
  return sharding.sampling_mesh(
      mesh,
      **config.sampling.mesh,
      devices=jax.devices()[-number:] if number else None,
  )


def row_shards(config: Any, mesh: Any) -> dict[str, int]:
  """Over how many devices rows are split; arguments of `checks.check`."""
  learning, sampling = map(sharding.num_row_shards, _meshes(config, mesh))
  return {'num_row_shards': learning, 'num_sampler_shards': sampling}


def _meshes(config: Any, mesh: Any) -> tuple[Any, Any]:
  return mesh, _sampling_mesh(config, mesh)


def _warn_of_undivided(config: Any, mesh: Any, model: CausalLM) -> None:
  """Says which axes of parameters stay whole where a rule would split them."""
  params = abstract_params(config, model)
  names = [
      x for mesh in _meshes(config, mesh)
      for x in sharding.undivided(params, mesh)
  ]
  for name in dict.fromkeys(names):
    logging.warning('Not split, as it does not divide: %s', name)


def warn_of_no_kernel(config: Any, mesh: Any, model: CausalLM) -> None:
  """Says where 'auto' does without the platform's kernel; refuses another."""
  for asked in _asked_of_attention(config, mesh, model):
    chosen = _choose_attention(config, asked)
    if chosen.reason:
      logging.warning(
          'Attention of the %s by XLA: %s.', asked.whose, chosen.reason
      )


def _asked_of_attention(
    config: Any, mesh: Any, model: CausalLM
) -> tuple[attention_kernels.Asked, ...]:
  """What the learner's rows need, the sampler's prompts, its completions."""
  prompt = config.max_prompt_length
  learning, sampling_mesh = _meshes(config, mesh)
  prefill = attention_kernels.Asked(
      whose='prefill',
      config=model.config,
      dtype=config.sampling.dtype,
      dtype_name='config.sampling.dtype',
      length=prompt,
      mesh=sampling_mesh.shape,
      splits_rows=False,
  )
  together = not (config.sampling.num_slots or config.sampling.num_halvings)
  decoding = prefill._replace(
      whose='decoding',
      length=config.max_completion_length,
      prompt_length=prompt,
      # In slots each completion has a copy of its prompt.
      sharing=config.group_size if together else 1,
      cache_dtype=config.sampling.cache_dtype or config.sampling.dtype,
  )
  return attention_kernels.Asked(
      whose='learner',
      config=model.config,
      dtype=model.dtype,
      dtype_name='config.model.dtype',
      length=config.learner.row_length
      or prompt + config.max_completion_length - 1,
      mesh=learning.shape,
      splits_rows=True,
  ), prefill, decoding


def _choose_attention(
    config: Any, asked: attention_kernels.Asked
) -> attention_kernels.Chosen:
  decoding = asked.whose == 'decoding'
  return attention_kernels.choose(
      config.sampling.attention if decoding else config.model.attention,
      asked,
      platform=attention_kernels.platform_of(),
  )


def _with_attention(
    config: Any, mesh: Any, model: CausalLM
) -> tuple[CausalLM, CausalLM]:
  """The model as the learner runs it, and as the sampler does."""
  learning, sampling_mesh = _meshes(config, mesh)
  parts = learning.shape['sequence']
  split = sharding.by_queries(learning)
  asked = _asked_of_attention(config, mesh, model)
  names = {x.whose: _choose_attention(config, x).name for x in asked}
  length = asked[0].length  # Of the learner's rows.
  # Rows as sampled hold one sequence each.
  aligns = (
      names['learner'] == 'cudnn'
      and not (config.learner.row_length or config.learner.share_prompts)
      and not any(
          attention_kernels.narrows(kind.window, length)
          for kind in model.config.kinds
      )
  )

  def make(whose, mesh, in_xla):
    share = sharding.by_rows_and_heads(mesh)
    of_decoded = sharding.by_rows_and_heads(mesh, axis=1)
    return {
        'xla': in_xla,
        'splash': lambda: attention_kernels.splash(share),
        'cudnn': lambda: attention_kernels.cudnn(
            share, aligned=aligns and whose == 'learner'
        ),
        'triton': lambda: decode_kernel.by_triton(of_decoded),
    }[names[whose]]()

  sizes = packed_attention.sizes_for(
      prompt_length=config.max_prompt_length,
      completion_length=config.max_completion_length,
  )
  sequence = config.max_prompt_length + config.max_completion_length - 1
  in_stretches = (
      split is None
      and config.learner.row_length >= 2 * sequence
      and packed_attention.pays(config.learner.row_length, sizes)
  )
  if in_stretches:
    of_rows = functools.partial(
        packed_attention.in_stretches,
        sizes,
        sharding.by_rows_and_heads(
            learning, num_heads=model.config.num_key_value_heads
        ),
    )
  else:
    of_rows = functools.partial(attention.in_xla, parts=parts, split=split)
  of_learner = make('learner', learning, of_rows)
  if config.learner.share_prompts:
    groups = attention.Groups(config.max_prompt_length - 1, config.group_size)
    if names['learner'] == 'xla' and length <= attention.LONG_ROW:
      of_learner = attention.in_merged_groups(groups)
    else:
      of_learner = attention.in_groups(of_learner, groups)
  # What attention brings is only of use where it is not computed again.
  by_xla = names['learner'] == names['prefill'] == 'xla'
  short = config.max_prompt_length <= attention.LONG_ROW
  return (
      model.replace(row_attention=of_learner, aligns_rows=aligns),
      # The sampler has its own rows already, and whole ones.
      model.replace(
          row_attention=make('prefill', sampling_mesh, attention.in_xla),
          attend_to_cache=make(
              'decoding', sampling_mesh, lambda: attention.attend_to_cache
          ),
          keeps_attention=in_stretches and by_xla and short,
      ),
  )


def num_stages(config: Any, mesh: Any, model: CausalLM) -> int:
  """Loops that decode all completions at once, see `decoding.together`.

  As config.sampling.num_stages says; as many as pay if it is 0, one where a
  kernel reads only what is visible.
  """
  if config.sampling.num_stages:
    return config.sampling.num_stages
  asked = _asked_of_attention(config, mesh, model)[-1]
  if _choose_attention(config, asked).name != 'xla':
    return 1
  return decoding.default_stages(config.max_completion_length)


def _use_compilation_cache(folder: str) -> None:
  """Keeps compiled programs for the next start; '' does not.

  What JAX_COMPILATION_CACHE_DIR says goes before.
  """
  if folder and not jax.config.jax_compilation_cache_dir:
    folder = pathlib.Path(folder).expanduser()
    jax.config.update('jax_compilation_cache_dir', str(folder))


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
  spread, whole = _with_attention(config, mesh, model)
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
        rollout_fn, state, _prompt_shapes(config), trainable
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
          threshold=method.divergence.threshold
          if trust_regions.limits_tokens(config.trust_region.name) else None,
          group_size=config.group_size,
          vocab_size=model.config.vocab_size,
          state_shardings=shardings,
          mesh=mesh,
          replay=replay,
          trainable=trainable,
      ),
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
      split_step.make_split_step, sampling_mesh=_sampling_mesh(config, mesh)
  )


def abstract_arguments(
    config: Any, mesh: Any, program: Program
) -> tuple[TrainState, ScoredRollout, Prompts]:
  """Shapes of what a run calls its step with, where they will be."""
  rows = sharding.batch(mesh)
  place = functools.partial(sharding.placed, where=rows)
  prompts = jax.tree.map(place, _prompt_shapes(config))
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


def _make_rollout_fn(config, model, tokenizer, divergence: Divergence, mesh):
  settings = config.sampling.to_dict()
  for name in ('mesh', 'num_devices', 'attention', 'num_stages'):
    del settings[name]
  sampling_mesh = _sampling_mesh(config, mesh)
  num_slots = settings.pop('num_slots')
  sampler = sampling.make_sampler(
      model,
      group_size=config.group_size,
      max_completion_length=config.max_completion_length,
      eos_ids=end_ids(tokenizer, config.stop, model.config.eos_token_ids),
      pad_id=tokenizer.pad_token_id,
      record=divergence.record,
      num_slots=num_slots // sharding.num_row_shards(sampling_mesh),
      num_stages=num_stages(config, mesh, model),
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


def make_method(config: Any) -> Method:
  """Builds what the config names."""
  known = {
      'group_size': config.group_size,
      'horizon': config.max_completion_length,
  }
  updates = config.learner.num_epochs * config.learner.num_minibatches
  return Method(
      divergence=_build(divergences, config, 'divergence'),
      region_fn=_build(trust_regions, config, 'trust_region'),
      loss_fn=_build(losses, config, 'loss'),
      advantage_fn=_build(advantages, config, 'advantage', **known),
      shaping_fn=_build(shaping, config, 'shaping', **known),
      normalizer=_build(normalizers, config, 'normalizer', **known),
      dual=_build(duals, config, 'dual'),
      extras=objective.Extras(**config.extras),
      optimizer=_build(
          optim, config, 'optimizer',
          total_updates=config.total_steps * updates
      ),
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


def _unpredicted(config: Any) -> int:
  """Slots of a prompt at the start of every row of the learner."""
  return 0 if config.learner.row_length else config.max_prompt_length


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


def evaluation_program(
    config: Any, mesh: Any, model: CausalLM, tokenizer: Any
) -> evaluate.Program:
  """What held-out evaluation compiles. Needs no weights, and no devices.

  Of the tokenizer only `pad_token_id` and what tells ends is looked at, see
  `end_ids`.
  """
  settings = config.eval
  sampling_mesh = _sampling_mesh(config, mesh)
  _, whole = _with_attention(config, mesh, model)
  sampler = sampling.make_sampler(
      whole,
      group_size=settings.num_samples,
      max_completion_length=config.max_completion_length,
      eos_ids=end_ids(tokenizer, config.stop, model.config.eos_token_ids),
      pad_id=tokenizer.pad_token_id,
      temperature=settings.temperature,
      top_p=settings.top_p,
      top_k=settings.top_k,
      dtype=config.sampling.dtype,
      num_slots=settings.num_slots // sharding.num_row_shards(sampling_mesh),
      num_stages=num_stages(config, mesh, model),
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


def _make_evaluation(
    config: Any, mesh: Any, model: CausalLM, tokenizer: Any, task: Any,
    verify: Any, key: jax.Array,
) -> evaluate.Evaluation:
  settings, sampling_mesh = config.eval, _sampling_mesh(config, mesh)
  [batch] = evaluation_batches(
      task.test,
      tokenizer,
      num_prompts=settings.num_prompts,
      max_prompt_length=config.max_prompt_length,
      add_special_tokens=task.chat is None,
  )
  program = evaluation_program(config, mesh, model, tokenizer)
  evaluate_fn = evaluate.make_evaluate_fn(
      sample=program.sample,
      batch=batch,
      num_samples=settings.num_samples,
      verify=verify,
      key=key,
      mesh=sampling_mesh,
  )
  bring = functools.partial(
      sharding.bring, mesh=mesh, sampling_mesh=sampling_mesh
  )
  return evaluate.Evaluation(lambda params: evaluate_fn(bring(params)), program)


def _build(module: Any, config: Any, section: str, **known) -> Any:
  """Builds what a section of the config names.

  `known` are options that no config sets, for factories that require them.
  """
  options = config[section].to_dict()
  name = options.pop('name')
  required = module.register.required(name)
  known = {k: v for k, v in known.items() if k in required}
  try:
    return module.build(name, **options, **known)
  except ValueError as error:
    if 'config.' in str(error):
      raise
    raise ValueError(f'config.{section}: {error}') from error


def _prompt_shapes(config: Any) -> Prompts:
  shape = (config.num_prompts, config.max_prompt_length)
  return Prompts(
      jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, bool)
  )


def train(config: Any, workdir: str) -> bool:
  """Trains until `config.total_steps`; False if a signal ended it before."""
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(command_line.stop_on_signals())
    with processes.failing_together():  # Before anything compiles.
      if processes.is_main():
        workdir_lib.check(workdir, config)
        folder = pathlib.Path(workdir).expanduser()
        stack.enter_context(workdir_lib.locked(folder))
    parts = build(config)
    return training.train(config, parts, workdir, stop.after)


def run_train() -> None:
  """Command line of `dppo_jax.main`."""
  command_line.run(lambda config, workdir: train(
      config, workdir or command_line.default_workdir()
  ))


def run_evaluate() -> None:
  """Command line of `dppo_jax.evaluate`.

  With --workdir it evaluates the latest checkpoint there, without it the model
  that the config starts from. The last line printed is a JSON object.
  """

  def body(config, workdir):
    parts = build(config, to_train=False)
    with contextlib.closing(parts.scorer):
      state = parts.state
      if workdir:
        try:
          state = training.latest_state(config, parts, pathlib.Path(workdir))
        except FileNotFoundError as error:
          raise FileNotFoundError(
              f'{error} Leave out --workdir to evaluate the model that the '
              'config starts from.'
          ) from error
      training.check_evaluation(config, parts, state)
      metrics, _ = parts.evaluate_fn(training.policy(parts, state))
    metrics |= parts.scorer.take_counts()
    if processes.is_main():
      print(json.dumps({'step': int(state.step)} | metrics), flush=True)
    return True

  command_line.run(body)


if __name__ == '__main__':
  run_train()
