"""What the documentation says can be run is run; what it points to exists."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from dppo_jax import diagnostics
from dppo_jax import tasks
from dppo_jax import trainable
from dppo_jax import workdir
from dppo_jax.models import load
from dppo_jax.tasks import scoring

ROOT = pathlib.Path(__file__).parents[1]
TRAINER = ROOT / 'docs' / 'use_in_your_trainer.md'
TASKS = ROOT / 'docs' / 'tasks.md'
RUNS = ROOT / 'docs' / 'runs.md'
MODELS = ROOT / 'docs' / 'models.md'
METRICS = ROOT / 'docs' / 'metrics.md'
OWN_PARTS = ROOT / 'docs' / 'own_parts.md'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]

PYTHON = re.compile(r'^```python\n(.*?)^```', re.MULTILINE | re.DOTALL)
ANY_BLOCK = re.compile(r'^```.*?^```', re.MULTILINE | re.DOTALL)
# [text](target "title"), ![text](target); the fragment is not looked at.
LINK = re.compile(r'\]\(([^)#\s]+)')
IMPORT = re.compile(r'^from (dppo_jax[\w.]*) import (.+)$', re.MULTILINE)
# A metric in the source, * where its name is put together at run time.
METRIC = re.compile(r'[a-z_]+(/[a-z0-9_@*]*[a-z0-9_*])+')

# What the README's block takes for granted: [B, T] arrays and logits.
README_ARRAYS = """
import jax
import jax.numpy as jnp

B, T, V = 2, 3, 30
key_mu, key_pi = jax.random.split(jax.random.key(0))
behaviour_logits = jax.random.normal(key_mu, (B, T, V))
target_logits = jax.random.normal(key_pi, (B, T, V))
tokens = jnp.arange(B * T).reshape(B, T)
advantages = jnp.array([[1.0], [-1.0]]) * jnp.ones((B, T))
token_mask = jnp.ones((B, T), bool)

def token_logprobs(logits):
  chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
  return chosen - jax.nn.logsumexp(logits, axis=-1)

logprobs = token_logprobs(target_logits)
behaviour_logprobs = token_logprobs(behaviour_logits)
"""
README_CHECKS = """
assert measured.shape == region.shape == loss.shape == (B, T)
assert (measured > 0).all() and jnp.isfinite(loss).all()
"""


def blocks(page):
  """The Python blocks of a page, in order."""
  return PYTHON.findall(page.read_text())


def run(code, folder):
  """Runs `code` as a user would, in a process and a folder of its own."""
  script = folder / 'block.py'
  script.write_text(code)
  done = subprocess.run(
      [sys.executable, '-W', 'error:::dppo_jax', str(script)],
      cwd=folder,
      env=os.environ | {'PYTHONPATH': str(ROOT)},
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def test_plain_optax_loop_learns(tmp_path):
  # The block ends with an assert of its own.
  last = run(blocks(TRAINER)[0], tmp_path).splitlines()[-1]
  assert 'divergence' in last


def test_block_of_the_readme_runs(tmp_path):
  run(README_ARRAYS + blocks(ROOT / 'README.md')[0] + README_CHECKS, tmp_path)


@pytest.mark.parametrize('page', PAGES, ids=lambda x: x.stem)
def test_blocks_parse_and_their_imports_exist(page):
  for block in blocks(page):
    compile(block, str(page), 'exec')
    for module, names in IMPORT.findall(block):
      for name in names.split(', '):
        # A submodule is no attribute before somebody imported it.
        found = hasattr(importlib.import_module(module), name)
        assert found or importlib.util.find_spec(f'{module}.{name}')


def test_blocks_on_tasks_run_and_the_verifier_judges(tmp_path):
  verifier, *configs = blocks(TASKS)
  run(verifier + "assert is_right('It is 8', '8') == 1 != is_right('', '8')",
      tmp_path)
  for block in configs:
    run(block, tmp_path)


@pytest.mark.slow
def test_a_config_with_parts_of_its_own_trains(tmp_path):
  [config] = blocks(OWN_PARTS)
  (tmp_path / 'hellinger.py').write_text(config)
  command = OWN_PARTS.read_text().partition('python -m dppo_jax.main ')[2]
  metrics = 'runs/hellinger/metrics.jsonl'
  small = ('--config.total_steps=1', '--config.eval.num_prompts=8')
  run(f'''
import sys
from dppo_jax import main
sys.argv[1:] = {[*command.partition(chr(10))[0].split(), *small]}
try:
  main.run_train()
except SystemExit as done:
  assert not done.code
assert '"loss/abs_advantage"' in open({metrics!r}).read()
''', tmp_path)


@pytest.mark.parametrize('name', ['jsonl', 'math', 'reasoning_gym'])
def test_every_option_of_a_task_is_on_its_page_with_its_default(name):
  page = TASKS.read_text()
  section = page.partition(f'## `{name}`')[2].partition('\n## ')[0]
  config = tasks.config(name)
  for option, default in config.items():
    if option in ('name', 'train', 'test'):
      continue
    assert f'`{option}`' in section, option
    [row] = [x for x in section.splitlines()
             if x.startswith('|') and f'`{option}`' in x.split('|')[1]]
    if isinstance(default, bool | int | float) and 'see above |' not in row:
      assert str(default) in row, row
  if name == 'math':
    for option in config.train:
      assert f'| `{option}` |' in section, option
    for preset in tasks.math.presets():
      assert f'| `{preset}` |' in section, preset


def test_rates_of_the_page_on_models_suit_the_model_that_ships():
  section = MODELS.read_text().partition('## Frozen layers')[2]
  lines = re.findall(r'^(.*)--config.learning_rates="(.*)"$', section, re.M)
  shapes = load.from_pretrained('embedded').params
  for before, rules in lines:
    rank = 16 if 'lora.rank=16' in before else 0
    trainable.make_trainable(shapes, rules=ast.literal_eval(rules), rank=rank)
  assert len(lines) == 2


def test_every_verifier_with_a_name_is_on_the_page():
  for name in scoring.names():
    assert f'| `{name}` |' in TASKS.read_text()
  for name in tasks.names():
    assert f'| `{name}` |' in TASKS.read_text()


def test_what_may_change_between_two_starts_is_on_the_page_of_runs():
  section = RUNS.read_text().partition('## Stop')[2].partition('\n## ')[0]
  assert set(re.findall(r'`([\w.]+)`', section)) == set(workdir.FREE)


def metrics_in(module):
  """What a module writes that looks like the name of a metric."""
  for node in ast.walk(ast.parse(module.read_text())):
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = ''.join(
        str(x.value) if isinstance(x, ast.Constant) else '*' for x in parts
    )
    if METRIC.fullmatch(text):
      yield text


def test_every_metric_is_on_its_page_and_no_other():
  modules = {x.stem: x for x in (ROOT / 'dppo_jax').glob('*.py')}
  del modules['memory']  # Names files of Linux.
  known = {name for x in modules.values() for name in metrics_in(x)}
  known |= {'loss', *scoring.Scorer(scoring.exact).take_counts()}
  page = METRICS.read_text()
  rows = re.findall(r'^\| `([^`]+)` \|', page, re.MULTILINE)
  assert len(rows) == len(set(rows))
  assert {re.sub('[A-Z]+|(?<=@)k', '*', x) for x in rows} == known
  assert set(re.findall(r'`([a-z_]+/[\w@]+)`', page)) <= set(rows)


def test_page_says_which_metrics_are_there_by_age():
  of = functools.partial(jax.ShapeDtypeStruct, (1, 2, 3))
  stats = dict.fromkeys(diagnostics.TokenStats._fields, of(jnp.float32))
  stats |= diagnostics.TokenStats._field_defaults | {
      'targets': of(jnp.int32), 'token_mask': of(bool), 'age': of(jnp.int32)
  }
  metrics = jax.eval_shape(
      functools.partial(diagnostics.token_metrics, threshold=0.2),
      diagnostics.TokenStats(**stats),
  )
  by_age = {x.rpartition('/')[2] for x in metrics if x.startswith('by_age/')}
  section = METRICS.read_text().partition('## By age')[2].partition('\n## ')[0]
  assert set(re.findall(r'`([a-z]\w+)`', section)) == by_age - {'tokens'}


@pytest.mark.parametrize('page', PAGES, ids=lambda x: x.stem)
def test_relative_links_point_to_files(page):
  text = ANY_BLOCK.sub('', page.read_text())
  for target in LINK.findall(text):
    if not re.match(r'[a-z]+:', target):
      assert (page.parent / target).exists(), f'{page.name}: {target}'
