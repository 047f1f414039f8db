"""PyG, SchNetPack and vesin, imported where they are needed; errors say how to get them."""

from __future__ import annotations

import importlib
import typing
from types import ModuleType

import torch


def pyg(module: str) -> ModuleType:
    """``torch_geometric.nn.models.<module>``; ImportError."""
    return _library(
        f"torch_geometric.nn.models.{module}", "torch_geometric", "pip install torch_geometric"
    )


def schnetpack(module: str | None = None) -> ModuleType:
    """SchNetPack, or a module of it; ImportError.

    Its versions up to 2.1.1 import the type variable ``T_co`` from torch's loader, where torch has
    none from 2.13 on: it is there while they are imported.
    """
    loader = torch.utils.data.dataloader
    missing = not hasattr(loader, "T_co")
    if missing:
        loader.T_co = typing.TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]
    try:
        return _library(
            "schnetpack" if module is None else f"schnetpack.{module}",
            "schnetpack",
            "pip install h5py hydra-core hydra-colorlog fasteners dirsync torch-ema matscipy "
            "tensorboardX && pip install --no-deps schnetpack (it asks for an old sympy that it "
            "does not need)",
        )
    finally:
        if missing:
            del loader.T_co  # type: ignore[attr-defined]


def vesin() -> ModuleType:
    """vesin, which finds neighbours in periodic cells; ImportError."""
    return _library("vesin", "vesin", "pip install vesin")


def _library(module: str, package: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise ImportError(
                f"{package} needs {error.name}, which is missing: {install}"
            ) from error
        raise ImportError(f"this needs {package}: {install}") from error
