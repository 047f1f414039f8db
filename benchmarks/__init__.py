"""Scaling study: time and memory of set attention against the number of atoms.

``python -m benchmarks.run --help`` is the way in; ``python -m benchmarks.report`` makes the page.
Packages: ``workloads``, ``contenders``, ``measuring``, ``reporting``, ``studies``.
"""
