"""Workdirs of runs that nobody ran, and what holds for every page of them."""

import html.parser
import json
import re

import numpy as np

from dppo_jax import metrics
from dppo_jax.report import plots

# Keys with * become the two that a run would log.
KEYS = [
    key.replace('*', k)
    for plot in plots.PLOTS
    for key in plot.curves
    for k in (('8', '16') if key.endswith('*') else ('',))
]

CONFIG = {
    'algorithm': 'dppo_topk_tv',
    'divergence': {'name': 'topk_tv', 'threshold': 0.125},
    'run': {
        'command': 'python -m dppo_jax.main --config=configs/tv_topk.py',
        'commit': 'abc1234def567890',
        'device': '1 x H200',
        'versions': {'jax': '0.10.2'},
    },
}


def make_run(workdir, *, keys=KEYS, num_steps=40, samples=(), config=None):
  """Random values of some keys, samples by step, and a config."""
  rng = np.random.default_rng(0)
  with metrics.MetricsWriter(workdir, tensorboard=False) as writer:
    for step in range(1, num_steps + 1):
      writer.write(step, {key: rng.uniform(0.1, 0.9) for key in keys})
    for step, rows in samples:
      writer.write_samples(step, rows)
  if config is not None:
    (workdir / 'config.json').write_text(json.dumps(config))
  return workdir


def sample(completion, reward, prompt='What is 1 + 1?'):
  """A row of samples.jsonl."""
  return {
      'split': 'eval',
      'prompt': prompt,
      'completion': completion,
      'answer': '2',
      'reward': reward,
  }


class Tags(html.parser.HTMLParser):
  """Collects tags with attributes, and checks that they close in order."""

  VOID = ('meta', 'link', 'img', 'br')

  def __init__(self, page):
    super().__init__()
    self.tags, self._open = [], []
    self.feed(page)
    assert self._open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self.VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag


def plot_of(page, title):
  """The figure from its drawing on."""
  start = page.index(f'aria-label="{title}"')
  return page[start : page.index('</figure>', start)]


def heights(svg, color):
  """The y coordinates of all lines of that color, larger further down."""
  paths = re.findall(f'd="([^"]*)"[^>]*stroke: var.--{color}', svg)
  return [float(y) for d in paths for y in re.findall(r'[ML] \S+ (\S+)', d)]


def check_page(page):
  """Asserts that a page is well-formed, complete, and loads nothing."""
  tags = Tags(page).tags
  for tag, attributes in tags:
    assert tag not in ('script', 'link', 'iframe', 'img', 'object', 'metadata')
    for name, value in attributes.items():
      assert name not in ('src', 'srcset', 'data', 'xmlns', 'xlink:href')
      assert 'http' not in (value or '')
      # A plot may refer to its own parts and to nothing else.
      if name == 'href' or 'url(' in (value or ''):
        assert re.fullmatch(r'#[\w-]+|url\(#[\w-]+\)', value)
  assert page.count('<style') == 1  # One inside a plot would be everybody's.
  style = page[page.index('<style>') : page.index('</style>')]
  assert 'url(' not in style and '@import' not in style and 'http' not in style
  ids = [attributes['id'] for _, attributes in tags if 'id' in attributes]
  assert len(ids) == len(set(ids))
  values = ' '.join(v or '' for _, attributes in tags
                    for name, v in attributes.items() if name != 'id')
  # Curves with markers refer to their shape.
  referred = set(re.findall(r'#(p\w+-[mp]\w+)', values))
  assert referred and referred <= set(ids)
  for svg in re.findall('<svg.*?</svg>', page, re.DOTALL):
    assert not re.search(r'(fill|stroke|color): *(#|rgb|black|white)', svg)
    assert 'var(--soft)' in svg
