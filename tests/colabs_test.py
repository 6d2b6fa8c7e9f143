"""Notebooks run from top to bottom, and tell nothing of where they last ran.

They run as plain Python: no Jupyter is needed, and lines that only Jupyter
understands (`%pip`, `!git`) are skipped. NOTEBOOK_STEPS makes runs short.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import many_devices
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colabs').glob('*.ipynb'))

# /home/me, /tmp/x, C:\Users\me; not https://host/path, </b>, or 'a/b'.
ABSOLUTE_PATH = re.compile(
    r'(?<![\w./:<])/(home|root|tmp|usr|var|work|opt|mnt|Users|private|content)/'
    r'|[A-Z]:\\'
)
JUPYTER_ONLY = re.compile(r'^(\s*)[%!].*$', re.MULTILINE)

pytestmark = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda x: x.stem)


def cells(path):
  return json.loads(path.read_text())['cells']


def source(path):
  """All code of a notebook, without what only Jupyter understands."""
  code = [''.join(x['source']) for x in cells(path) if x['cell_type'] == 'code']
  # Not deleted: the line may be all that stands in an `if`.
  return '\n\n'.join(JUPYTER_ONLY.sub(r'\1pass', x) for x in code)


def text(value):
  """All strings of a cell but its images."""
  if isinstance(value, dict):
    return '\n'.join(
        text(x) for key, x in value.items() if not key.startswith('image/')
    )
  if isinstance(value, list):
    return ''.join(text(x) for x in value)
  return value if isinstance(value, str) else ''


def test_names_no_file_of_the_machine_it_ran_on(path):
  for cell in cells(path):
    assert not ABSOLUTE_PATH.search(text(cell)), text(cell)


def test_stored_outputs_are_those_of_one_clean_run(path):
  code = [x for x in cells(path) if x['cell_type'] == 'code']
  assert [x['execution_count'] for x in code] == list(range(1, len(code) + 1))
  for output in (x for cell in code for x in cell['outputs']):
    assert output['output_type'] != 'error'
    assert output.get('name') != 'stderr'


@pytest.mark.slow
def test_runs_from_top_to_bottom(path, tmp_path):
  script = tmp_path / f'{path.stem}.py'
  script.write_text(source(path))
  environment = {
      'MPLBACKEND': 'Agg',
      'NOTEBOOK_STEPS': '6',
      'PYTHONPATH': str(ROOT),
      'TFDS_DATA_DIR': str(tmp_path / 'data'),
      'TMPDIR': str(tmp_path),
      'XLA_FLAGS': ' '.join(many_devices.QUICK_FLAGS),
  }
  done = subprocess.run(
      [sys.executable, '-c', f'exec(open({str(script)!r}).read(), {{}})'],
      cwd=tmp_path,
      env=os.environ | environment,
      capture_output=True,
      text=True,
      check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
