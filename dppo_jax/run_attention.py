"""Which attention a run computes with, in the learner and in the sampler.

The config asks for it, by name or with 'auto'; what there is depends on the
model, on the lengths of rows and on the mesh.
"""

import functools
from typing import Any

from absl import logging

from dppo_jax import decoding
from dppo_jax import meshes
from dppo_jax import sharding
from dppo_jax.models import attention
from dppo_jax.models import attention_kernels
from dppo_jax.models import decode_kernel
from dppo_jax.models import packed_attention
from dppo_jax.models.causal_lm import CausalLM


def warn_of_no_kernel(config: Any, mesh: Any, model: CausalLM) -> None:
  """Says where 'auto' does without the platform's kernel; refuses another."""
  for asked in _asked_of_attention(config, mesh, model):
    chosen = _choose_attention(config, asked)
    if chosen.reason:
      logging.warning(
          'Attention of the %s by XLA: %s.', asked.whose, chosen.reason
      )


def with_attention(
    config: Any, mesh: Any, model: CausalLM
) -> tuple[CausalLM, CausalLM]:
  """The model as the learner runs it, and as the sampler does."""
  learning, sampling_mesh = meshes.both(config, mesh)
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


def _asked_of_attention(
    config: Any, mesh: Any, model: CausalLM
) -> tuple[attention_kernels.Asked, ...]:
  """What the learner's rows need, the sampler's prompts, its completions."""
  prompt = config.max_prompt_length
  learning, sampling_mesh = meshes.both(config, mesh)
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
