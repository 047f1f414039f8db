"""Scaling study: time and memory of set attention against the number of atoms.

``python -m benchmarks.run --help`` is the way in; ``python -m benchmarks.report`` makes the page.
Packages, each of which may import those before it: ``workloads``, ``contenders``, ``measuring``,
``reporting``, ``studies``. ``tests/test_architecture.py`` holds them to that.
"""
