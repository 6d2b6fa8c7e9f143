"""The command line: `python -m dppo_jax.report DIR [DIR ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
import sys

from dppo_jax.report import comparison
from dppo_jax.report import groups
from dppo_jax.report import one_run


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the page of a run, or the one that compares several."""
  # argparse, not absl: a module that defines flags cannot be imported next to
  # another that defines --workdir.
  parser = argparse.ArgumentParser(
      prog='python -m dppo_jax.report',
      description='The page of a run, or one page that compares several.',
  )
  parser.add_argument(
      'directories', metavar='DIR', nargs='+',
      help='directory of a run, or one that holds such directories',
  )
  parser.add_argument(
      '--output',
      help='file to write; by default DIR/report.html for one run, '
      'compare.html for several',
  )
  parser.add_argument('--title', help='heading of the page')
  options = parser.parse_args(argv)
  try:
    print(_write(options.directories, options.output, options.title))
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def _write(
    directories: Sequence[str], output: str | None, title: str | None
) -> Path:
  if output and (Path(output).is_dir() or not Path(output).parent.is_dir()):
    raise ValueError(
        f'--output={output} must be a file in a folder that is there, for '
        'example compare.html.'
    )
  found = [run for each in directories for run in groups.find(Path(each))]
  if len(found) == 1:
    return one_run.write_report(found[0], output=output, title=title)
  return comparison.write_comparison(
      directories, output or 'compare.html', title=title
  )


if __name__ == '__main__':
  main()
