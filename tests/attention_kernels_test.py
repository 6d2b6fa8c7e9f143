"""Attention by kernels is attention by XLA, where the hardware lets us ask.

Splash attention runs in Pallas' interpreter here: its numbers are tested, its
speed is not. For TPU and CUDA, programs are compiled or lowered without one.
"""

import dataclasses
import functools
import json
import re

import jax
from jax._src.cudnn import fused_attention_stablehlo
import jax.numpy as jnp
import many_devices
import meshes_test
import numpy as np
import plan_test
import pytest
import tiny_model
import whole_step

from dppo_jax import checks
from dppo_jax import hlo
from dppo_jax import plan
from dppo_jax import program as program_lib
from dppo_jax import run_attention
from dppo_jax.models import attention
from dppo_jax.models import attention_kernels
from dppo_jax.models import platforms

WINDOWS = {'full': [None], 'sliding': [7], 'both': [7, None]}


def packed(length, *, shared, seed=0):
  """A left-padded sequence; and segments of all sizes, then padding."""
  random = np.random.RandomState(seed)
  segments = np.zeros((2, length), np.int32)
  prompts, positions = np.zeros_like(segments), np.zeros_like(segments)
  segments[0, length // 5:] = 1
  positions[0, length // 5:] = np.arange(length - length // 5)
  start, segment, prompt, size = 0, 0, 0, 0
  while start < 0.9 * length - 1:
    segment += 1
    if segment % 3 == 1:  # A prompt, and two that continue it.
      prompt, offset = 0, 0
    else:
      prompt = segment - (segment + 2) % 3
      offset = np.sum(segments[1] == prompt)
    size = min(random.randint(1, length // 4), length - start)
    where = slice(start, start + size)
    segments[1, where] = segment
    prompts[1, where] = prompt if shared else 0
    positions[1, where] = np.arange(size) + (offset if shared else 0)
    start += size
  return attention.Where(
      jnp.asarray(segments), jnp.asarray(positions),
      jnp.asarray(prompts) if shared else None,
  )


def numbers(rows, where, windows, *, heads=(4, 2), size=16, cap=None,
            dtype=jnp.float32):
  """What each window's real tokens get, and its gradients."""
  length = where.segment_ids.shape[1]
  random = np.random.RandomState(1)
  draw = lambda count: jnp.asarray(
      random.normal(size=(2, length, count, size)), dtype
  )
  q, k, v, weights = (draw(heads[i]) for i in (0, 1, 1, 0))
  weights *= (where.segment_ids > 0)[..., None, None]

  def total(inputs, which):
    sights, attend_with = rows(where, windows, scale=0.3, cap=cap)
    sight = jax.tree.map(lambda *x: jax.lax.select_n(which, *x), *sights)
    out, _ = attend_with(sight)(*inputs)
    return jnp.sum(out * weights), out

  both = jax.jit(jax.value_and_grad(total, has_aux=True))
  found = [both((q, k, v), jnp.int32(i)) for i in range(len(windows))]
  return [(out * (weights != 0), *gradient) for (_, out), gradient in found]


def assert_close(found, expected, tolerance):
  for one, other in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    scale = float(jnp.abs(other).max())
    assert scale > 0.1
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


in_splash = attention_kernels.splash(interpret=True)


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('name', WINDOWS)
def test_splash_sees_what_xla_sees(monkeypatch, name, shared):
  monkeypatch.setattr(attention_kernels, '_BLOCK', 128)
  # 300 tokens are filled up to three blocks.
  where, windows = packed(300, shared=shared), WINDOWS[name]
  assert_close(
      numbers(in_splash, where, windows),
      numbers(attention.in_xla(), where, windows), 1e-5,
  )


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('options', [
    {'cap': 2.0}, {'heads': (6, 1)}, {'heads': (3, 3)}, {'size': 72},
], ids=str)
def test_splash_caps_scores_and_shares_keys(options, shared):
  where = packed(130, shared=shared)
  assert_close(
      numbers(in_splash, where, [None], **options),
      numbers(attention.in_xla(), where, [None], **options), 1e-5,
  )


def assert_rounds_as_xla(rows, where):
  """In bfloat16; its distance from what XLA says in float32."""
  with jax.default_matmul_precision('highest'):
    exact = numbers(attention.in_xla(), where, [None])

  def distances(rows):
    rounded = numbers(rows, where, [None], dtype=jnp.bfloat16)
    return [
        float(jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32) - y))))
        for x, y in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact))
    ]

  pairs = zip(distances(rows), distances(attention.in_xla()), strict=True)
  for ours, theirs in pairs:
    assert 0 < ours < 2 * theirs


def test_splash_rounds_bfloat16_about_as_xla_does():
  assert_rounds_as_xla(in_splash, packed(130, shared=True))


@pytest.mark.skipif(
    attention_kernels.platform_of() != 'cuda', reason='there is no such GPU'
)
def test_aligned_rows_need_no_bias():
  segments = jnp.asarray([[1] * 1000 + [0] * 24, [1] * 517 + [0] * 507])
  positions = jnp.cumsum(segments, axis=1) - segments
  where = attention.Where(segments, positions)
  assert_rounds_as_xla(attention_kernels.cudnn(aligned=True), where)


KERNELS = {'tpu': attention_kernels.splash(), 'cuda': attention_kernels.cudnn()}


@pytest.mark.skipif(
    attention_kernels.platform_of() not in KERNELS,
    reason='there is no kernel for this device',
)
@pytest.mark.parametrize('shared', [False, True])
def test_the_kernel_of_this_device_sees_what_xla_sees(shared):
  kernel = KERNELS[attention_kernels.platform_of()]
  assert_rounds_as_xla(kernel, packed(1025, shared=shared))


def test_a_block_that_nobody_sees_is_left_out(monkeypatch):
  monkeypatch.setattr(attention_kernels, '_BLOCK', 128)
  segments = jnp.asarray([[1] * 128 + [2] * 256 + [3] * 128])
  positions = jnp.arange(512)[None]
  where = attention.Where(segments, positions, jnp.zeros_like(segments))
  [kernel], _ = in_splash(where, [None], scale=1.0, cap=None)
  # 0 is empty, 1 has both, 2 is full.
  np.testing.assert_array_equal(kernel.fwd_mask_info.block_mask[0, 0], [
      [1, 0, 0, 0], [0, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 1],
  ])


def test_a_row_is_filled_up_by_less_than_the_lanes_of_each_block():
  for length in range(1, 3000):
    block = attention_kernels._block(length)
    count = -(-length // block)
    assert block % 128 == 0 and block <= attention_kernels._BLOCK
    assert count * block - length < 128 * count


def asked(**changes):
  """What 2,048 tokens of a Llama in bfloat16 need, on one device."""
  return attention_kernels.Asked(**{
      'whose': 'learner',
      'config': dataclasses.replace(tiny_model.CONFIG, head_dim=128),
      'dtype': 'bfloat16',
      'dtype_name': 'config.model.dtype',
      'length': 2048,
      'mesh': {'tensor': 1, 'sequence': 1},
      'splits_rows': True,
  } | changes)


@pytest.mark.parametrize('platform, chosen', [
    ('tpu', 'splash'), ('cuda', 'cudnn'), ('cpu', 'xla'), ('gpu', 'xla'),
])
def test_auto_is_the_kernel_of_the_platform(platform, chosen):
  found = attention_kernels.choose('auto', asked(), platform=platform)
  assert found.name == chosen
  assert bool(found.reason) == (platform == 'gpu')


@pytest.mark.parametrize('platform, chosen', [
    ('tpu', 'xla'), ('cuda', 'triton'), ('cpu', 'xla'), ('gpu', 'xla'),
])
def test_auto_decodes_by_the_kernel_of_the_platform(platform, chosen):
  decoding = asked(whose='decoding', length=20)  # However short.
  found = attention_kernels.choose('auto', decoding, platform=platform)
  assert found.name == chosen
  assert bool(found.reason) == (platform == 'gpu')


def test_auto_decodes_by_what_reads_less_and_by_what_has_been_tried(
    monkeypatch
):
  choose = lambda **changes: attention_kernels.choose(
      'auto', asked(whose='decoding', **changes), platform='cuda'
  )
  long = {'prompt_length': 2048, 'sharing': 16}
  assert choose(**long, length=4096).name == 'triton'
  found = choose(**long, length=256)
  assert found.name == 'xla'
  assert found.reason.startswith('a prompt of 2048 tokens is read once for 16')
  # In slots each has its own prompt.
  assert choose(**long | {'sharing': 1}, length=256).name == 'triton'
  monkeypatch.setattr(attention_kernels, '_capability', lambda: 8.6)
  found = choose(length=4096)
  assert found.name == 'xla' and 'this GPU is 8.6' in found.reason
  named = attention_kernels.choose(
      'triton', asked(whose='decoding'), platform='cuda'
  )
  assert named == ('triton', '')


def with_model(**changes):
  return {'config': dataclasses.replace(tiny_model.CONFIG, **changes)}


@pytest.mark.parametrize('name, platform, changes, reason', [
    ('splash', 'cpu', {}, 'needs a TPU, and programs are traced for cpu'),
    ('cudnn', 'tpu', {}, 'needs a GPU of NVIDIA'),
    ('splash', 'tpu', {'dtype': 'float16'}, 'config.model.dtype=float16'),
    ('cudnn', 'cuda', {'dtype': 'float32'}, 'not one of bfloat16, float16'),
    ('splash', 'tpu', {'mesh': {'sequence': 2}}, 'config.mesh.sequence is 2'),
    ('splash', 'tpu', {'mesh': {'tensor': 4}}, '2 key and value heads'),
    ('cudnn', 'cuda', with_model(attn_logit_softcapping=50.0), 'at 50 here'),
    ('cudnn', 'cuda', with_model(head_dim=256), '256 numbers'),
    ('cudnn', 'cuda', with_model(head_dim=36), '36 numbers'),
    ('triton', 'tpu', {}, 'needs a GPU of NVIDIA'),
    ('triton', 'cuda', with_model(head_dim=80), '80 numbers, not 16, 32'),
    ('triton', 'cuda', with_model(head_dim=512), '512 numbers, not 16, 32'),
    ('triton', 'cuda', with_model(head_dim=256) | {'cache_dtype': 'float32'},
     'a head of 256 numbers in float32 is too large'),
    ('triton', 'cuda', {'dtype': 'float32'}, 'not one of bfloat16, float16'),
])
def test_what_a_kernel_cannot_do_is_refused_and_auto_says_so(
    name, platform, changes, reason
):
  setting = 'model'
  if name == 'triton':
    changes, setting = changes | {'whose': 'decoding'}, 'sampling'
  with pytest.raises(ValueError, match=reason) as error:
    attention_kernels.choose(name, asked(**changes), platform=platform)
  message = str(error.value)
  assert '\n' not in message
  assert f"config.{setting}.attention='{name}'" in message
  if 'traced for' not in message and 'needs' not in message:
    auto = attention_kernels.choose('auto', asked(**changes), platform=platform)
    assert auto.name == 'xla' and reason in auto.reason


def test_a_sampler_has_whole_rows_whatever_splits_the_learners():
  prefill = asked(mesh={'sequence': 2}, splits_rows=False)
  found = attention_kernels.choose('auto', prefill, platform='tpu')
  assert found == attention_kernels.Chosen('splash', '')


def test_short_rows_are_not_filled_up_unless_asked_for():
  short = asked(length=attention_kernels.SHORT_ROW - 1)
  found = attention_kernels.choose('auto', short, platform='tpu')
  assert found == ('xla', 'rows of 511 tokens are short, below 512')
  named = attention_kernels.choose('splash', short, platform='tpu')
  assert named == ('splash', '')


def test_a_run_says_once_where_auto_has_no_kernel(caplog):
  config = whole_step.make_config(learner__row_length=600)
  model = tiny_model.MODEL.replace(dtype=jnp.bfloat16)
  mesh = whole_step.make_mesh()
  with platforms.traced_for('cuda'):
    run_attention.warn_of_no_kernel(config, mesh, model)
  assert [record.getMessage() for record in caplog.records] == [
      f'Attention of the {part} by XLA: config.sampling.dtype=float32 is not '
      'one of bfloat16, float16.' for part in ('prefill', 'decoding')
  ]
  caplog.clear()
  run_attention.warn_of_no_kernel(config, mesh, model)  # On a CPU.
  assert not caplog.records


@pytest.mark.parametrize('part, name, misspelt', [
    ('model', 'splash', 'slash'), ('sampling', 'triton', 'tritium')
])
def test_a_run_refuses_a_kernel_that_is_not_for_its_device(
    part, name, misspelt
):
  config = whole_step.make_config(**{f'{part}__attention': name})
  with pytest.raises(ValueError, match=f"attention='{name}' cannot serve the"):
    whole_step.make_program(config, whole_step.make_mesh(), tiny_model.MODEL)
  config[part].attention = misspelt
  with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
    checks.check(config, num_batch_shards=1)


@pytest.fixture
def cudnn_version(monkeypatch):
  """JAX asks the library, which is not here, for its version."""
  monkeypatch.setattr(
      fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000
  )


def traced_step(**options):
  """A whole step."""
  config = whole_step.make_config(num_prompts=4, group_size=2, **options)
  mesh = whole_step.make_mesh()
  model = tiny_model.MODEL.replace(
      dtype=jnp.dtype(config.model.dtype), remat=config.model.remat
  )
  program = whole_step.make_program(config, mesh, model)
  arguments = program_lib.abstract_arguments(config, mesh, program)
  return program.train_step.trace(*arguments)


def lowered_step(platform=None, **options):
  """Its text before it is compiled, for a platform."""
  traced = traced_step(**options)
  return traced.lower(lowering_platforms=platform and (platform,)).as_text()


def test_auto_on_a_cpu_is_xla():
  assert lowered_step() == lowered_step(model__attention='xla')


PACKED = {'learner__row_length': 49, 'learner__num_microbatches': 2}
SHARED = {'learner__share_prompts': True, 'learner__num_minibatches': 1}


@pytest.mark.parametrize(
    'options', [{}, PACKED, SHARED], ids=['rows', 'packed', 'shared']
)
def test_a_step_for_cuda_calls_cudnn(cudnn_version, options):
  with platforms.traced_for('cuda'):
    text = lowered_step(
        'cuda', model__attention='cudnn', model__dtype='bfloat16',
        sampling__dtype='bfloat16', **options,
    )
  # Rows as sampled are aligned, and need no bias to say who sees whom.
  bias = 'ScaleBias' if options else ''
  assert set(re.findall(r'__cudnn\$fmha\w*', text)) == {
      '__cudnn$fmhaScaleBiasSoftmax',  # Of the prompts.
      f'__cudnn$fmha{bias}Softmax', f'__cudnn$fmha{bias}SoftmaxBackward'
  }


@pytest.mark.parametrize('window, bias', [(20, 'ScaleBias'), (21, '')])
def test_rows_need_a_bias_for_a_window_that_hides_something(
    monkeypatch, cudnn_version, window, bias
):
  sizes = dataclasses.replace(
      tiny_model.CONFIG, sliding_window=window,
      layer_types=('sliding_attention', 'full_attention'),
  )
  model = tiny_model.MODEL.replace(config=sizes)
  monkeypatch.setattr(tiny_model, 'MODEL', model)
  with platforms.traced_for('cuda'):
    text = lowered_step(
        'cuda', model__attention='cudnn', model__dtype='bfloat16',
        sampling__dtype='bfloat16', max_prompt_length=6,
        max_completion_length=16,
    )
  found = set(re.findall(r'__cudnn\$fmha\w*Backward', text))
  assert found == {f'__cudnn$fmha{bias}SoftmaxBackward'}


@pytest.mark.parametrize('remat, calls', [
    ('none', 1), ('products', 1), ('full', 2)
])
def test_what_attention_made_is_among_the_products_that_are_kept(
    cudnn_version, remat, calls
):
  with platforms.traced_for('cuda'):
    jaxpr = traced_step(
        model__attention='cudnn', model__dtype='bfloat16',
        sampling__dtype='bfloat16', model__remat=remat,
    ).jaxpr
  # And one of the prompts.
  assert str(jaxpr).count('= dot_product_attention_fwd_wrapper[') == calls + 1


@pytest.mark.parametrize('options, learner', [
    ({}, '_segmented'), (PACKED, ''), (SHARED, '_segmented')
], ids=['rows', 'packed', 'shared'])
def test_a_step_for_tpu_calls_splash(options, learner):
  with platforms.traced_for('tpu'):
    text = lowered_step('tpu', model__attention='splash', **options)
  assert set(re.findall(r'kernel_name = "(splash\w*)"', text)) == {
      'splash_mha_fwd_segmented_no_residuals',  # Of the prompts.
      f'splash_mha_fwd{learner}_residuals',
      f'splash_mha_dq{learner}_no_residuals',
      f'splash_mha_dkv{learner}_no_residuals',
  }


def steps_on_eight_devices():
  """Prints three steps by XLA on one device, and by splash on eight."""
  model = tiny_model.MODEL
  params = tiny_model.params()
  for options in ({}, PACKED | {'learner__row_length': 25}, SHARED):
    options = options | {'num_prompts': 8, 'learner__num_minibatches': 1}
    one = whole_step.three_steps(model, params, **options)
    with platforms.traced_for('tpu'), pytest.MonkeyPatch.context() as patch:
      patch.setattr(attention_kernels, 'splash', functools.partial(
          attention_kernels.splash, interpret=True
      ))
      many = whole_step.three_steps(
          model, params, mesh={'data': 2, 'fsdp': 2, 'tensor': 2},
          model__attention='splash', **options,
      )
    print(json.dumps([one, many]))


def aligned_on_eight_devices():
  """The same, of rows that are aligned there; by XLA, as if by cuDNN."""
  model, params = tiny_model.MODEL, tiny_model.params()
  options = {'num_prompts': 8, 'learner__num_minibatches': 1}
  one = whole_step.three_steps(model, params, **options)

  def choose(_, asked):
    name = 'cudnn' if asked.whose == 'learner' else 'xla'
    return attention_kernels.Chosen(name, '')

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_attention, '_choose_attention', choose)
    patch.setattr(
        attention_kernels, 'cudnn', lambda share, aligned: attention.in_xla()
    )
    many = whole_step.three_steps(
        model, params, mesh={'data': 2, 'fsdp': 2, 'tensor': 2},
        model__remat='products', **options,
    )
  print(json.dumps([one, many]))


@pytest.mark.several_devices
@pytest.mark.slow
def test_three_steps_of_aligned_rows_on_a_mesh_are_those_of_one_device():
  [line] = many_devices.run(
      'import attention_kernels_test as t; t.aligned_on_eight_devices()',
      optimized=False,
  )
  meshes_test.check(*json.loads(line))


@pytest.mark.several_devices
@pytest.mark.slow
def test_three_steps_by_splash_on_a_mesh_are_those_of_one_device():
  lines = many_devices.run(
      'import attention_kernels_test as test; test.steps_on_eight_devices()',
      optimized=False,
  )
  whole, packed_rows, shared = map(json.loads, lines)
  meshes_test.check(*whole)
  meshes_test.check(*packed_rows, apart_from='learner/')
  meshes_test.check(*shared)


@plan_test.needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('options, learner', [
    ({}, '_segmented'),
    ({'learner.row_length': 600, 'learner.num_microbatches': 2}, ''),
    ({'learner.share_prompts': True}, '_segmented'),
], ids=['rows', 'packed', 'shared'])
def test_the_compiler_for_tpu_takes_the_kernels(monkeypatch, options, learner):
  """Mosaic compiles them, forwards and backwards, in a step on four chips."""
  texts, parse = [], hlo.parse
  monkeypatch.setattr(hlo, 'parse', lambda x: texts.append(x) or parse(x))
  config = plan_test.tiny_config(**{
      'model.attention': 'splash', 'max_completion_length': 250, **options,
  })
  sizes = dataclasses.replace(
      tiny_model.CONFIG, head_dim=64, max_position_embeddings=1024,
      sliding_window=100, layer_types=('sliding_attention', 'full_attention'),
      attn_logit_softcapping=30.0,
  )
  found = plan.make_plan(
      config, plan.make_topology('v5p:2x2x1'),
      tiny_model.MODEL.replace(config=sizes, dtype=jnp.bfloat16),
  )
  assert found.mesh['fsdp'] == found.mesh['tensor'] == 2
  [text] = texts
  assert 'tpu_custom_call' in text
  assert set(re.findall(r'/(splash_mha_\w+)/', text)) == {
      'splash_mha_fwd_segmented_no_residuals',  # Of the prompts.
      f'splash_mha_fwd{learner}_residuals',
      f'splash_mha_dq{learner}_no_residuals',
      f'splash_mha_dkv{learner}_no_residuals',
  }
