"""Hugging Face folders in and out; what is wrong with one is named."""

import dataclasses
import functools
import json
import shutil

from golden import make_embedded_logits
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_model

from dppo_jax.models import load
from dppo_jax.models import weights
from dppo_jax.tasks import prompts

FIRST = 'model.layers.0.self_attn.q_proj.weight'
EMBEDDING = 'model.embed_tokens.weight'


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
  """Nothing here may ask the Hugging Face hub."""
  import huggingface_hub

  def refuse(*args, **kwargs):
    raise AssertionError(f'The hub was asked: {args} {kwargs}')

  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', refuse)


@pytest.fixture(params=[True, False], ids=['tied', 'untied'])
def folder(request, tmp_path):
  """A tiny model, written by hand."""
  make_embedded_logits.write_tiny(tmp_path / 'model', tied=request.param)
  return tmp_path / 'model'


@pytest.fixture
def tied(tmp_path):
  make_embedded_logits.write_tiny(tmp_path / 'model', tied=True)
  return tmp_path / 'model'


def edit_config(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, edit):
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def loaded(folder):
  with np.errstate(all='raise'):
    return load.from_pretrained(folder)


# In and out.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_load_save_load_keeps_every_bit(folder, tmp_path, dtype):
  first = load.from_pretrained(folder, dtype=dtype)
  assert {x.dtype for x in jax.tree.leaves(first.params)} == {jnp.dtype(dtype)}
  load.save_pretrained(first, tmp_path / 'copy')
  second = load.from_pretrained(tmp_path / 'copy', dtype=dtype)
  tiny_model.assert_trees_equal(second.params, first.params)
  assert second.config == first.config


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_embedded_model_survives_a_round_trip(tmp_path, dtype):
  first = load.from_pretrained('embedded', dtype=dtype)
  load.save_pretrained(first, tmp_path, tokenizer=load.EMBEDDED)
  second = load.from_pretrained(tmp_path, dtype=dtype)
  tiny_model.assert_trees_equal(second.params, first.params)
  ours, theirs = load.load_tokenizer(tmp_path), load.load_tokenizer('embedded')
  assert ours.encode('47+38=') == theirs.encode('47+38=')
  assert ours.eos_token_id == theirs.eos_token_id


def test_a_saved_file_holds_what_the_loaded_one_held(folder, tmp_path):
  load.save_pretrained(loaded(folder), tmp_path / 'copy')
  before, after = (
      safetensors.numpy.load_file(path / 'model.safetensors')
      for path in (folder, tmp_path / 'copy')
  )
  assert before.keys() == after.keys()
  for name, tensor in before.items():
    assert tensor.tobytes() == after[name].tobytes(), name


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_transformers_reads_a_saved_folder_back(tmp_path, dtype):
  import transformers

  model = load.from_pretrained('embedded', dtype=dtype)
  tokenizer = load.load_tokenizer('embedded')
  load.save_pretrained(model, tmp_path, tokenizer=tokenizer)
  config = transformers.AutoConfig.from_pretrained(tmp_path)
  original = transformers.AutoConfig.from_pretrained(load.EMBEDDED)
  ignored = {'dtype', '_name_or_path', 'transformers_version'}
  ours, theirs = (
      {k: v for k, v in x.to_dict().items() if k not in ignored}
      for x in (config, original)
  )
  assert ours == theirs
  assert str(config.dtype).removeprefix('torch.') == dtype
  again = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert again.decode(again.encode('9*9=81')) == '9*9=81'
  assert again.eos_token_id == config.eos_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_is_copied_keeps_its_chat_template(tmp_path):
  model, tokenizer = (
      load.from_pretrained('embedded'), load.load_tokenizer('embedded')
  )
  tokenizer.chat_template = '{{ messages[0].content }}'
  tokenizer.save_pretrained(tmp_path / 'first')
  # What tokenizers without a tokenizer.json are made of.
  for name in ('vocab.json', 'merges.txt'):
    (tmp_path / 'first' / name).write_text('{}')
  load.save_pretrained(
      model, tmp_path / 'copy', tokenizer=tmp_path / 'first'
  )
  assert {x.name for x in (tmp_path / 'first').iterdir()} < {
      x.name for x in (tmp_path / 'copy').iterdir()
  }
  again = load.load_tokenizer(tmp_path / 'copy')
  assert again.chat_template == tokenizer.chat_template


def test_weights_may_be_split_over_several_files(folder):
  whole = loaded(folder)
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  path.unlink()
  names, weight_map = sorted(tensors), {}
  for i, part in enumerate((names[::2], names[1::2])):
    file = f'model-0000{i + 1}-of-00002.safetensors'
    chosen = {name: tensors[name] for name in part}
    safetensors.numpy.save_file(chosen, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  tiny_model.assert_trees_equal(loaded(folder).params, whole.params)

  (folder / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='no model-00002-of-00002'):
    load.from_pretrained(folder)
  index.write_text('{"weight_map":')
  with pytest.raises(ValueError, match='index.json'):
    load.from_pretrained(folder)
  index.write_text('{}')
  with pytest.raises(ValueError, match='index.json'):
    load.from_pretrained(folder)


def test_large_weights_are_saved_in_several_files(folder, tmp_path):
  model, copy = loaded(folder), tmp_path / 'copy'
  load.save_pretrained(model, copy, max_shard_bytes=20_000)
  files = sorted(copy.glob('*.safetensors'))
  assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors'
  index = json.loads((copy / 'model.safetensors.index.json').read_text())
  total = sum(x.nbytes for x in jax.tree.leaves(model.params))
  assert index['metadata']['total_size'] == total
  for file in files:
    tensors = safetensors.numpy.load_file(file)
    assert sum(x.nbytes for x in tensors.values()) <= 20_000
    assert {index['weight_map'][name] for name in tensors} == {file.name}
  tiny_model.assert_trees_equal(loaded(copy).params, model.params)


def test_saving_again_leaves_nothing_of_the_files_before(tied):
  model = loaded(tied)
  double = jax.tree.map(lambda x: 2 * x, model.params)
  for limit in (20_000, 10**9, 30_000):
    load.save_pretrained(model, tied, params=double, max_shard_bytes=limit)
    tiny_model.assert_trees_equal(loaded(tied).params, double)
  load.save_pretrained(model, tied)
  assert sorted(x.name for x in tied.iterdir()) == [
      'config.json', 'model.safetensors'
  ]
  tiny_model.assert_trees_equal(loaded(tied).params, model.params)


def test_params_of_another_architecture_are_not_saved(tied, tmp_path):
  model = loaded(tied)
  wrong = {k: v for k, v in model.params.items() if k != 'norm'}
  with pytest.raises(ValueError, match="'norm/scale' is in one of them only"):
    load.save_pretrained(model, tmp_path / 'copy', params=wrong)


def test_tensors_that_are_not_needed_are_ignored(tied):
  plain = loaded(tied)
  # What torch writes when it does not know that the head is tied.
  edit_tensors(
      tied, lambda x: x.update({'lm_head.weight': x[EMBEDDING].copy()})
  )
  tiny_model.assert_trees_equal(loaded(tied).params, plain.params)


# What is wrong is named.


@pytest.mark.parametrize('name', ['/no/such/folder', './nowhere', 'embeded'])
def test_a_folder_that_does_not_exist_is_named(name):
  with pytest.raises(FileNotFoundError, match=name) as error:
    load.from_pretrained(name)
  assert "'embedded'" in str(error.value)


def test_a_hub_name_that_cannot_be_downloaded_is_named(monkeypatch):
  import huggingface_hub

  def offline(name, **_):
    raise OSError('no network')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
  with pytest.raises(FileNotFoundError, match="'Qwen/Qwen3-0.6B'.*no network"):
    load.from_pretrained('Qwen/Qwen3-0.6B')


def test_a_folder_without_config_is_named(tied):
  (tied / 'config.json').unlink()
  with pytest.raises(FileNotFoundError, match='no config.json') as error:
    load.from_pretrained(tied)
  assert str(tied) in str(error.value)


def test_a_folder_without_weights_is_named(tied):
  (tied / 'model.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='no model.safetensors') as error:
    load.from_pretrained(tied)
  assert str(tied) in str(error.value)


@pytest.mark.parametrize('text', ['', '{"model_type": "qwe', '[]', '"qwen3"'])
def test_a_corrupt_config_is_named(tied, text):
  (tied / 'config.json').write_text(text)
  with pytest.raises(ValueError, match='config.json'):
    load.from_pretrained(tied)


def test_an_unsupported_architecture_lists_the_supported(tied):
  edit_config(tied, model_type='qwen4')
  with pytest.raises(
      ValueError, match="'qwen4'. Did you mean 'qwen3'. Known: .*qwen3"
  ):
    load.from_pretrained(tied)
  edit_config(tied, model_type='bloom')
  with pytest.raises(ValueError, match="'bloom'. Known: .*qwen3"):
    load.from_pretrained(tied)


@pytest.mark.parametrize('change, message', [
    ({'layer_types': ['full_attention', 'chunked_attention']}, 'layer_types'),
    ({'attention_bias': True}, 'attention_bias'),
    ({'is_causal': False}, 'is_causal=False'),
    ({'model_type': 'llama', 'is_causal': False}, 'is_causal=False'),
    ({'hidden_act': 'relu'}, "hidden_act='relu'"),
    ({'model_type': 'llama', 'mlp_bias': True}, 'mlp_bias'),
    ({'model_type': 'qwen3_moe', 'mlp_only_layers': [0]}, 'mlp_only_layers'),
    ({'model_type': 'gemma3_text', 'attn_logit_softcapping': 50.0,
      'hidden_activation': 'silu', 'rope_parameters': None}, 'softcapping'),
    ({'model_type': 'gemma3_text', 'hidden_activation': 'silu',
      'rope_parameters': {'full_attention': {
          'rope_type': 'yarn',
          'factor': 4.0,
          'original_max_position_embeddings': 16,
          'truncate': False,
      }}}, 'truncate=False'),
    ({'model_type': 'qwen3', 'rope_parameters': {
        'full_attention': {'rope_type': 'default', 'rope_theta': 1e4},
     }}, 'rope_parameters with full_attention'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config'),
    ({'transformers_weights': 'b.safetensors'}, "='b.safetensors'"),
    (
        {'rope_parameters': {
            'rope_type': 'dynamic',
            'rope_theta': 1e4,
            'factor': 4.0,
        }},
        "rope_type='dynamic'",
    ),
    (
        {'rope_parameters': {
            'rope_type': 'yarn',
            'rope_theta': 1e4,
            'factor': 4.0,
            'original_max_position_embeddings': 16,
            'mscale': 0.7,
        }},
        'mscale=0.7',
    ),
])
def test_a_variant_that_is_not_built_is_refused(tied, change, message):
  edit_config(tied, **change)
  with pytest.raises(ValueError, match=f'{message}.*not supported') as error:
    load.from_pretrained(tied)
  assert str(tied / 'config.json') in str(error.value)


def test_null_in_a_rope_scaling_is_as_if_it_were_not_given(tied):
  yarn = {
      'rope_type': 'yarn', 'rope_theta': 1e4, 'factor': 4.0,
      'original_max_position_embeddings': 16,
  }
  edit_config(tied, rope_parameters=yarn)
  plain = loaded(tied).config
  nulls = dict.fromkeys(['beta_fast', 'beta_slow', 'attention_factor'])
  edit_config(tied, rope_parameters=yarn | nulls)
  assert loaded(tied).config == plain
  # But null is false where true is what is not given.
  edit_config(tied, rope_parameters=yarn | {'truncate': None})
  assert not loaded(tied).config.rope_scaling.truncate
  edit_config(tied, rope_parameters=yarn | {'factor': None})
  with pytest.raises(ValueError, match="rope_type='yarn' needs factor"):
    load.from_pretrained(tied)


def test_a_config_that_transformers_refuses_is_named_in_one_line(tied):
  edit_config(tied, hidden_size='wide')
  with pytest.raises(ValueError, match='hidden_size') as error:
    load.from_pretrained(tied)
  assert str(tied / 'config.json') in str(error.value)
  assert '\n' not in str(error.value)


def test_a_missing_tensor_is_named(tied):
  edit_tensors(tied, lambda tensors: tensors.pop(FIRST))
  # 2 layers of 11 tensors, embedding and last norm: 24.
  with pytest.raises(ValueError, match=f"1 of 24 .*'{FIRST}'"):
    load.from_pretrained(tied)


def test_a_tensor_of_another_shape_is_named(tied):
  edit_tensors(
      tied, lambda tensors: tensors.update({FIRST: np.zeros((3, 32), 'f4')})
  )
  # 4 heads of 16.
  with pytest.raises(ValueError, match=rf"'{FIRST}'.*\(3, 32\).*\(64, 32\)"):
    load.from_pretrained(tied)


@pytest.mark.parametrize('rows', [1, 63, 64])
def test_a_tied_head_that_is_not_the_embedding_is_named(
    tied, monkeypatch, rows
):
  monkeypatch.setattr(weights, '_ROWS_AT_ONCE', rows)

  def edit(tensors):
    head = tensors[EMBEDDING].copy()
    head[-1, -1] += 1
    tensors['lm_head.weight'] = head

  edit_tensors(tied, edit)
  with pytest.raises(
      ValueError, match="'lm_head.weight' is not the embedding"
  ) as error:
    load.from_pretrained(tied)
  assert str(tied / 'model.safetensors') in str(error.value)


def test_tensors_that_the_architecture_does_not_have_are_named(tied):
  extra = {'model.layers.0.self_attn.q_proj.bias': np.zeros(64, 'f4'),
           'model.layers.1.self_attn.q_proj.bias': np.zeros(64, 'f4')}
  edit_tensors(tied, lambda tensors: tensors.update(extra))
  with pytest.raises(
      ValueError, match="model.safetensors: 2 tensors .*layers.0.*q_proj.bias'"
  ):
    load.from_pretrained(tied)


def test_quantised_tensors_are_refused(tied):
  edit_tensors(
      tied, lambda tensors: tensors.update({FIRST: np.zeros((64, 32), 'i1')})
  )
  with pytest.raises(ValueError, match=f"'{FIRST}' has dtype I8.*original"):
    load.from_pretrained(tied)


def test_pickled_weights_are_never_read(tied):
  (tied / 'model.safetensors').unlink()
  (tied / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n.')
  with pytest.raises(
      FileNotFoundError, match='pytorch_model.bin is never read.*convert'
  ):
    load.from_pretrained(tied)


@pytest.mark.parametrize('file', ['pytorch_model.bin', '../model.safetensors'])
def test_an_index_names_safetensors_of_its_own_folder_only(tied, file):
  index = tied / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': {FIRST: file}}))
  with pytest.raises(ValueError, match=f'index.json names .{file}'):
    load.from_pretrained(tied)


def test_a_tied_head_of_other_tokens_is_named(tied):
  edit_tensors(
      tied, lambda x: x.update({'lm_head.weight': x[EMBEDDING][:-1].copy()})
  )
  with pytest.raises(ValueError, match="'lm_head.weight' is not the embedding"):
    load.from_pretrained(tied)


def test_two_sets_of_weights_in_a_folder_are_refused(tied):
  index = tied / 'model.safetensors.index.json'
  other = 'model-00001-of-00001.safetensors'
  shutil.copy(tied / 'model.safetensors', tied / other)
  index.write_text(json.dumps({'weight_map': {FIRST: other}}))
  with pytest.raises(ValueError, match=f'has model.safetensors and.* {other}'):
    load.from_pretrained(tied)
  index.write_text(json.dumps({'weight_map': {FIRST: 'model.safetensors'}}))
  load.from_pretrained(tied)


@pytest.mark.parametrize('keep', [0, 5, 0.5, 0.999])
def test_truncated_weights_are_named(tied, keep):
  path = tied / 'model.safetensors'
  data = path.read_bytes()
  path.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
  with pytest.raises(ValueError, match='model.safetensors is damaged'):
    load.from_pretrained(tied)


def test_a_tokenizer_that_cannot_end_is_refused(tmp_path):
  for source in load.EMBEDDED.iterdir():
    shutil.copy(source, tmp_path / source.name)
  path = tmp_path / 'tokenizer_config.json'
  settings = json.loads(path.read_text())
  del settings['eos_token']
  path.write_text(json.dumps(settings))
  with pytest.raises(ValueError, match='no eos_token.*tokenizer_config.json'):
    load.load_tokenizer(tmp_path)


@pytest.mark.parametrize('config, generation, ends', [
    (None, None, ()),
    (3, None, (3,)),
    ([4, 3], None, (3, 4)),
    (3, 5, (3, 5)),
    (None, [5, 3], (3, 5)),
    (3, -1, (3,)),
])
def test_end_tokens_are_those_that_the_files_name(
    tied, tmp_path, config, generation, ends
):
  edit_config(tied, eos_token_id=config)
  if generation is not None:
    (tied / 'generation_config.json').write_text(
        json.dumps({'eos_token_id': generation})
    )
  model = loaded(tied)
  assert model.config.eos_token_ids == ends
  load.save_pretrained(model, tmp_path / 'saved')
  assert loaded(tmp_path / 'saved').config == model.config


def test_a_trained_model_is_saved_with_all_its_end_tokens(tmp_path):
  model = load.from_pretrained('embedded')
  tokenizer = load.load_tokenizer('embedded')
  model = model.replace(
      config=dataclasses.replace(model.config, eos_token_ids=(5,))
  )
  load.save_pretrained(model, tmp_path, tokenizer=tokenizer)
  ends = json.loads((tmp_path / 'config.json').read_text())['eos_token_id']
  assert ends == sorted({5, tokenizer.eos_token_id})


@pytest.mark.parametrize('wrong', ['10000000', '"x"'])
def test_an_end_token_that_is_none_is_named(tied, wrong):
  path = tied / 'generation_config.json'
  path.write_text(f'{{"eos_token_id": {wrong}}}')
  with pytest.raises(ValueError, match='eos_token_id=.* is no token of') as e:
    load.from_pretrained(tied)
  assert str(e.value).startswith(f'{path}: eos_token_id=')


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
  for source in load.EMBEDDED.iterdir():
    shutil.copy(source, tmp_path / source.name)
  edit_config(tmp_path, vocab_size=5)
  with pytest.raises(ValueError, match='tokens, the embedding only 5') as error:
    load.load_tokenizer(tmp_path)
  assert str(tmp_path) in str(error.value)


def test_an_added_token_may_lie_behind_the_embedding(tmp_path):
  # As <image_soft_token> does in the text models of Gemma 3.
  for source in load.EMBEDDED.iterdir():
    shutil.copy(source, tmp_path / source.name)
  size = load.read_config(load.EMBEDDED)[1].vocab_size
  tokenizer = load.load_tokenizer('embedded')
  filled = [f'<filling {i}>' for i in range(len(tokenizer), size)]
  tokenizer.add_tokens([*filled, '<image>'], special_tokens=True)
  tokenizer.save_pretrained(tmp_path)
  read = load.load_tokenizer(tmp_path)
  assert read.convert_tokens_to_ids('<image>') == size
  encode = functools.partial(
      prompts.encode, tokenizer=read, max_prompt_length=8, vocab_size=size
  )
  assert encode(['1+2=']).mask.any()
  with pytest.raises(
      ValueError, match=f"'1<image>2' holds '<image>', token {size} of"
  ):
    encode(['1<image>2'])
  # What ends completions must be embedded.
  read.eos_token = '<image>'
  read.save_pretrained(tmp_path)
  with pytest.raises(ValueError, match=f'tokens, the embedding only {size}'):
    load.load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_named(tied):
  with pytest.raises(FileNotFoundError, match='tokenizer.json'):
    load.load_tokenizer(tied)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
  for source in load.EMBEDDED.iterdir():
    shutil.copy(source, tmp_path / source.name)
  path = tmp_path / 'tokenizer_config.json'
  settings = json.loads(path.read_text())
  del settings['pad_token']
  path.write_text(json.dumps(settings))
  tokenizer = load.load_tokenizer(tmp_path)
  assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_saving_a_model_without_params_is_refused(tmp_path):
  with pytest.raises(ValueError, match='params'):
    load.save_pretrained(tiny_model.MODEL, tmp_path / 'model')
  assert not (tmp_path / 'model').exists()


def test_a_bare_parameter_tree_is_refused_with_the_way_out(tmp_path):
  with pytest.raises(TypeError, match='params='):
    load.save_pretrained({'embed': {}}, tmp_path)
