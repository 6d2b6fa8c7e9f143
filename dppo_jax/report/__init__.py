"""Runs as pages of HTML, made from the logs in their workdirs.

A page is a single file without scripts and without the network, so it opens
anywhere and goes with a mail. `one_run` makes the page of a run, `comparison`
that of several; every plot is a row of `plots.PLOTS`.

    python -m dppo_jax.report DIR [DIR ...]
"""

from dppo_jax.report.comparison import write_comparison
from dppo_jax.report.one_run import write_report

__all__ = ['write_comparison', 'write_report']
