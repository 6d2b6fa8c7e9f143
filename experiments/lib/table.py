"""Raw results of an experiment: rows of a CSV file, and a summary beside it."""

from collections.abc import Sequence
import csv
import json
import math
import pathlib
from typing import Any


def read(path: pathlib.Path) -> list[dict[str, str]]:
  """Rows of a file as dicts of strings; none if it is not there."""
  if not path.exists():
    return []
  with open(path, newline='') as file:
    return list(csv.DictReader(file))


def append(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """Adds rows to a file, which gets their names as its header if it is new."""
  new = not path.exists()
  with open(path, 'a', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    if new:
      writer.writeheader()
    writer.writerows(rows)


def write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
  """A file of these rows and no others."""
  path.unlink(missing_ok=True)
  append(path, rows)


def short(value: Any, digits: int = 5) -> Any:
  """A float with so many digits as text; everything else as it is."""
  return f'{value:.{digits}g}' if isinstance(value, float) else value


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  """What `write_summary` wrote; nothing if it is not there."""
  return json.loads(path.read_text()) if path.exists() else {}


def write_summary(path: pathlib.Path, summary: dict[str, Any]) -> None:
  """A JSON file that any parser reads: what is not finite is null."""
  path.write_text(
      json.dumps(_finite(summary), indent=2, allow_nan=False) + '\n'
  )


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {str(k): _finite(x) for k, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(x) for x in value]
  if isinstance(value, float):
    return float(short(value)) if math.isfinite(value) else None
  return value
