"""The poolings in the places of other libraries: ``zoo.pyg`` and ``zoo.schnetpack``.

Each submodule needs its library only where it says so; this package imports none of them.
"""
