"""Scaling study: time and memory of set attention against the number of atoms.

``python -m benchmarks.run --help`` is the way in. Files: ``cases`` (workloads), ``providers`` and
``baselines`` (contenders), ``gate`` (float64 oracle), ``measure`` and ``memory`` (clock, peak
memory), ``sheet`` (CSV), ``tables`` and ``plot`` and ``report`` (what people read).
"""
