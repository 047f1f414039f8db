"""Trained models from their checkpoints, and what they predict for molecules."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .datasets.files import check_archive
from .defaults import plain_defaults
from .molecules import Molecules

if TYPE_CHECKING:
    import ase

    from .task import PoolingTask

BEST = "best.ckpt"


def checkpoint_file(path: str | Path) -> Path:
    """The file itself, or the best checkpoint of the folder of a run; FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        if not (path / BEST).is_file():
            raise FileNotFoundError(f"ckpt_path must have a {BEST}, got the folder {path} without")
        return path / BEST
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path must be a file or the folder of a run, got {path}")
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of this program as ``torch.load`` gives it, without running code from it.

    Raises ValueError for files that are damaged or of another program.
    """
    file = checkpoint_file(path)
    if not zipfile.is_zipfile(file):  # torch would advise to load it as a pickle, which runs code
        raise ValueError(f"{file} is damaged or no checkpoint: it is not a zip archive")
    check_archive(file)
    try:
        with zipfile.ZipFile(file) as archive:  # torch does not look at the checksums
            if wrong := archive.testzip():
                raise zipfile.BadZipFile(f"the checksum of {wrong} is wrong")
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its bytes spell
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{file} is damaged or no checkpoint: {reason}") from error
    wanted = {"zoo", "hyper_parameters", "state_dict"}
    missing = wanted - found.keys() if isinstance(found, dict) else wanted
    if missing:
        raise ValueError(
            f"{file} is a checkpoint of another program: it has no {', '.join(sorted(missing))}"
        )
    if not all(isinstance(found[name], Mapping) for name in wanted) or not _says(found["zoo"]):
        raise ValueError(
            f"{file} is a checkpoint of another program: its {', '.join(sorted(wanted))} are others"
        )
    return found


def _says(zoo: Mapping[str, Any]) -> bool:
    """Whether it tells the targets, the elements and the data, as ``PoolingTask`` writes them."""
    targets, elements, data = (zoo.get(name) for name in ("targets", "elements", "data"))
    if not (isinstance(targets, list | tuple) and isinstance(elements, list | tuple)):
        return False
    pairs = all(
        isinstance(x, list | tuple) and len(x) == 2 and all(isinstance(y, str) for y in x)
        for x in targets
    )
    return pairs and isinstance(data, Mapping) and all(type(z) is int for z in elements)


def load_task(path: str | Path) -> PoolingTask:
    """The model of a checkpoint, in evaluation mode, on the CPU.

    In float32, or in float64 where its weights are so, whatever the process's default dtype is.

    Raises ValueError for files that are damaged, of another program or of another model.
    """
    from .task import PoolingTask

    file, found = checkpoint_file(path), read_checkpoint(path)
    try:
        with plain_defaults():
            task = PoolingTask(**found["hyper_parameters"])
        state = found["state_dict"]
        if any(name in state and state[name].dtype == torch.float64 for name in _weights(task)):
            task = task.double()
        task.load_state_dict(state)
        task.on_load_checkpoint(found)
        if len(task.targets) != len(task.model.std):
            raise ValueError(f"{len(task.targets)} targets with {len(task.model.std)} results")
    except Exception as error:  # whatever its contents lead to
        lines = str(error).splitlines() or [type(error).__name__]
        raise ValueError(
            f"{file} holds the weights of another model: {' '.join(x.strip() for x in lines[:2])}"
        ) from error
    return task.eval()


def _weights(task: torch.nn.Module) -> list[str]:
    """Names of the parameters: the statistics beside them are in float64 in any model."""
    return [name for name, _ in task.named_parameters()]


def check_elements(frames: Sequence[ase.Atoms], known: Sequence[int], first: int = 0) -> None:
    """ValueError for the first molecule with an element the model has not been trained on.

    first: number of ``frames[0]`` in its file.
    """
    from ase.data import chemical_symbols

    for number, atoms in enumerate(frames, first):
        unknown = sorted(set(atoms.numbers.tolist()) - set(known))
        if unknown:
            names = ", ".join(chemical_symbols[z] for z in unknown)
            trained = ", ".join(chemical_symbols[z] for z in known)
            raise ValueError(
                f"molecule {number} ({atoms.get_chemical_formula()}) has {names}; the model was "
                f"trained on {trained}"
            )


def predicted(
    task: PoolingTask, frames: Sequence[ase.Atoms], batch_size: int = 128
) -> torch.Tensor:
    """Predictions [B, T], float64, in the units of ``task.targets``; charges are not looked at."""
    molecules = Molecules.from_ase(frames, warn=False)
    parts = torch.arange(len(molecules), device="cpu").split(batch_size)
    with torch.no_grad():
        found = [task(molecules.select(part).to(task.device)) for part in parts]
    return torch.cat(found).double().cpu()
