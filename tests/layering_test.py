"""Who may import whom: a module stands in a layer and looks only downwards."""

import ast
import graphlib
import pathlib
import sys

import pytest

import dppo_jax

# Lowest first; `models.*` is the package and everything in it. A new file in
# `dppo_jax/` must be given its place here.
LAYERS = (
    ('types', 'masking', 'segments', 'groups', 'registry', 'ages', 'halvings',
     'loops', 'chunks'),
    ('divergences', 'trust_regions', 'losses', 'penalties', 'advantages',
     'shaping', 'normalizers', 'algorithms', 'diagnostics', 'duals'),
    ('models.*', 'tasks.*', 'lora', 'optim', 'processes', 'sharding',
     'trainable'),
    ('decoding', 'meshes', 'packing', 'replay'),
    ('run_attention', 'sampling'),
    ('rollout', 'target', 'evaluate'),
    ('objective',),
    ('learner',),
    ('train_step',),
    ('backlog', 'checkpoint', 'checks', 'chips', 'fitting', 'hlo', 'logbook',
     'maintenance', 'memory', 'metrics', 'operations', 'report.*',
     'tracing', 'workdir'),
    ('split_step',),
    ('program',),
    ('command_line', 'roofline', 'training'),
    ('main', 'plan_search', 'plan_text', 'plan_types'),
    ('plan', 'export'),
)
MATHEMATICS = LAYERS[0] + LAYERS[1]

# Slow to import or not installed everywhere: only where they are used.
ONLY_INSIDE_FUNCTIONS = {
    'datasets', 'grain', 'math_verify', 'pyarrow', 'reasoning_gym',
    'tensorflow_datasets', 'transformers',
}
NEVER = {'torch'}
# Wholly about one of these packages, so imported only inside functions itself.
BEHIND_A_FUNCTION = {'tasks.arithmetic_tfds', 'tasks.math_verifier'}

ROOT = pathlib.Path(dppo_jax.__file__).parent


def module_name(path):
  """'models.qwen3' of dppo_jax/models/qwen3.py, 'models' of its __init__."""
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob('*.py'))}
MODULES = [name for name in FILES if name]  # '' is dppo_jax/__init__.py.
each_module = pytest.mark.parametrize('module', MODULES)


def layer_of(module):
  for height, layer in enumerate(LAYERS):
    for name in layer:
      if module == name.removesuffix('.*'):
        return height
      if name.endswith('.*') and module.startswith(name.removesuffix('*')):
        return height
  return None


def is_command_line(node):
  """`if __name__ == '__main__':`, which may use whatever it likes."""
  return isinstance(node, ast.If) and '__name__' in ast.unparse(node.test)


def imports(node, *, package, lazy=False):
  """Yields (absolute dotted name, inside a function?) of all imports."""
  for child in ast.iter_child_nodes(node):
    if isinstance(child, ast.Import):
      for alias in child.names:
        yield alias.name, lazy
    elif isinstance(child, ast.ImportFrom):
      base = child.module or ''
      if child.level:
        above = package.split('.')[: len(package.split('.')) - child.level + 1]
        base = '.'.join(above + ([base] if base else []))
      for alias in child.names:
        yield f'{base}.{alias.name}', lazy
    elif not is_command_line(child):
      inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
      yield from imports(child, package=package, lazy=lazy or inside)


def imports_of(module):
  path = FILES[module]
  parent = module if path.stem == '__init__' else module.rpartition('.')[0]
  package = f'dppo_jax.{parent}'.rstrip('.')
  return list(imports(ast.parse(path.read_text()), package=package))


def own_imports_of(module, *, lazy=True):
  """Modules of this package that `module` imports, lazily too or not."""
  found = set()
  for name, is_lazy in imports_of(module):
    if name.split('.')[0] != 'dppo_jax' or (is_lazy and not lazy):
      continue
    parts = name.split('.')[1:]
    # `from dppo_jax.types import Rollout`: the longest part that is a file.
    while parts and '.'.join(parts) not in FILES:
      parts.pop()
    found.add('.'.join(parts))
  return found - {'', module}


@each_module
def test_module_has_its_place_in_a_layer(module):
  assert layer_of(module) is not None, (
      f'dppo_jax/{module.replace(".", "/")} stands in no layer; add it to '
      'LAYERS in tests/layering_test.py.'
  )


@each_module
def test_module_imports_nothing_from_above(module):
  height = layer_of(module)
  above = {m for m in own_imports_of(module) if layer_of(m) > height}
  assert not above, f'{module} imports {above} from a higher layer'


def test_no_import_goes_round_in_a_circle():
  graph = {module: own_imports_of(module, lazy=False) for module in MODULES}
  list(graphlib.TopologicalSorter(graph).static_order())  # Raises CycleError.


@each_module
def test_heavy_packages_are_imported_where_they_are_used(module):
  for name, lazy in imports_of(module):
    package = name.split('.')[0]
    assert package not in NEVER, f'{module} imports {package}'
    if package in ONLY_INSIDE_FUNCTIONS and module not in BEHIND_A_FUNCTION:
      assert lazy, f'{module} imports {package} at its top'
  slow = own_imports_of(module, lazy=False) & BEHIND_A_FUNCTION
  assert not slow, f'{module} imports {slow} at its top'


@pytest.mark.parametrize('module', [m for m in MODULES if m in MATHEMATICS])
def test_mathematics_imports_nothing_but_jax(module):
  free = {'jax', 'dppo_jax'} | sys.stdlib_module_names
  foreign = {n for n, _ in imports_of(module) if n.split('.')[0] not in free}
  if module == 'registry':  # Inside `config`, which only configs call.
    foreign -= {n for n, lazy in imports_of(module)
                if lazy and n == 'ml_collections'}
  assert not foreign, f'{module} imports {foreign}'


@each_module
def test_no_function_is_longer_than_a_hundred_lines(module):
  lengths = {
      node.name: node.end_lineno - node.lineno + 1
      for node in ast.walk(ast.parse(FILES[module].read_text()))
      if isinstance(node, ast.FunctionDef)
  }
  assert not {name: x for name, x in lengths.items() if x > 100}


def test_the_walk_sees_every_form_of_import():
  source = '''
import dppo_jax.main
from dppo_jax import losses as l
from . import qwen3
from ..types import Rollout
def f():
  import torch
class A:
  import grain
if __name__ == '__main__':
  from dppo_jax import main
'''
  assert list(imports(ast.parse(source), package='dppo_jax.models')) == [
      ('dppo_jax.main', False),
      ('dppo_jax.losses', False),
      ('dppo_jax.models.qwen3', False),
      ('dppo_jax.types.Rollout', False),
      ('torch', True),
      ('grain', False),
  ]
