"""Nothing depends on the default dtype and the default device of the process.

Every entry is called once as in a fresh process and once under each setting, with the same inputs
and modules, and has to give the same bits on the same device. What makes modules is tested in
``test_default_construction``.
"""

import contextlib
import importlib.util
import io
import itertools

import numpy as np
import pytest
import torch

from attnpool_kernels import Ragged, compat, explain, ragged, seed_pool, set_attention
from attnpool_kernels import testing as cases
from attnpool_kernels.dropout import draw_seed, keep_mask
from attnpool_kernels.nn import (
    ISAB,
    MAB,
    PAPER,
    PMA,
    SAB,
    AttentionalPooling,
    AttentionPooling,
    MaxPooling,
    MeanPooling,
    OrbitalWeightedAverage,
    SeedPooling,
    SetAttention,
    SetTransformer,
    SoftmaxPooling,
    SumPooling,
    WeightedAverage,
)

COUNTS = (3, 0, 5, 2)
C = 8
DTYPES = (torch.float32, torch.float64)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "other device": lambda: default_device("meta"),  # a stand-in for any that is not the inputs'
    "device context": lambda: torch.device("meta"),
}


def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape, dtype):
    return torch.randn(*shape, generator=generator(), dtype=torch.float64).to(dtype)


def leaves(*tensors):
    return [x.detach().requires_grad_() for x in tensors]


def derivatives(out, inputs):
    """The first derivatives and, of their squares, the second ones where there are any."""
    first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True, allow_unused=True)
    first = [x for x in first if x is not None]
    loss = sum(x.square().sum() for x in first)
    if not loss.requires_grad:
        return [x.detach() for x in first]
    second = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [x.detach() for x in first] + [x for x in second if x is not None]


def operators(dtype, backend=None):
    """Both operators with all of their options on the CPU."""
    q, k, v = (randn(sum(COUNTS), 2, 4, dtype=dtype) for _ in range(3))
    q, v = q.flip(0).contiguous(), v.roll(1, 0)
    ptr = Ragged.from_counts(torch.tensor(COUNTS))
    seeds = randn(2, 2, 4, dtype=dtype)
    bias = randn(sum(n * n for n in COUNTS), 2, dtype=dtype)
    seed_bias = randn(2 * sum(COUNTS), 2, dtype=dtype)

    def run():
        found = []
        for dropout in (0.0, 0.4):
            torch.manual_seed(1)
            inputs = leaves(q, k, v, bias)
            out = set_attention(*inputs[:3], ptr, bias=inputs[3], dropout=dropout, backend=backend)
            found += [out.detach(), *derivatives(out, inputs)]
            inputs = leaves(seeds, k, v, seed_bias)
            out, lse = seed_pool(
                *inputs[:3], ptr, bias=inputs[3], dropout=dropout, backend=backend, return_lse=True
            )
            found += [out.detach(), lse.detach(), *derivatives(out, inputs)]
        return found

    return run


def adapter(name):
    """A backend that is another library's attention: first derivative only."""
    q, k, v = (randn(sum(COUNTS), 2, 16, dtype=torch.float32) for _ in range(3))
    ptr = torch.tensor([0, 3, 3, 8, 10])
    seeds, bias = randn(2, 2, 16, dtype=torch.float32), randn(38, 2, dtype=torch.float32)

    def run():
        out = [set_attention(q, k, v, ptr, bias=bias, backend=name)]
        out += [seed_pool(seeds, k, v, ptr, backend=name)]
        if name == "sdpa":
            inputs = leaves(q, k, v)
            out += torch.autograd.grad(
                set_attention(*inputs, ptr, backend=name).square().sum(), inputs
            )
        return out

    return run


def flash_attn():
    q = randn(sum(COUNTS), 4, 4, dtype=torch.float32)
    k = randn(sum(COUNTS), 2, 4, dtype=torch.float32)
    ptr = torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)

    def run():
        torch.manual_seed(2)
        inputs = leaves(q, k)
        out = compat.flash_attn_varlen_func(
            inputs[0], inputs[1], inputs[1], ptr, ptr, 5, 5, dropout_p=0.3, return_attn_probs=True
        )
        return [x.detach() for x in out] + derivatives(out[0], inputs)

    return run


def boundaries():
    ptr, batch = torch.tensor([0, 3, 3, 8, 10]), torch.tensor([0, 0, 2, 2, 3])

    def run():
        made = [
            Ragged(ptr), Ragged.from_ptr(ptr), Ragged.from_counts(COUNTS),
            Ragged.from_counts(np.array(COUNTS)), Ragged.from_counts(torch.diff(ptr)),
            Ragged.from_batch(batch), Ragged.from_batch(batch, 5),
        ]  # fmt: skip
        found = []
        for each in made:
            ragged.check(each, 12)
            found += [each.ptr, each.pairs(), each.batch(), each.batch(12), each.counts()]
            found += [torch.full((1,), len(each), device="cpu"), each.to("cpu").ptr]
        return found

    return run


def dropout_and_explain():
    q = randn(10, 2, 4, dtype=torch.float32)
    ptr = torch.tensor([0, 3, 3, 8, 10])

    def run():
        torch.manual_seed(3)
        seed = draw_seed(torch.device("cpu"))
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            explain(q, q, q, ptr, bias=None, dropout=0.2)
        words = torch.frombuffer(bytearray(text.getvalue().encode()), dtype=torch.uint8)
        return [seed, keep_mask(seed, 3, 2, 4, 5, 0.4), words]

    return run


def checks_of_a_backend():
    chosen = [case for case in cases.CASES if case.name in ("dropout", "mask", "seeds")]

    def run():
        found = []
        for case in (*cases.CASES[:2], *chosen):
            cases.judge(case, torch.float32, lambda batch: cases.run_public(batch, "reference"))
            batch = case.make(torch.float32)
            found += [x for x in vars(batch).values() if isinstance(x, torch.Tensor)]
        return [x.detach() for x in found]

    return run


def modules(dtype):
    rows = {"x": randn(sum(COUNTS) + 1, C, dtype=dtype)}
    ptr = torch.tensor([0, 3, 3, 8, 10])
    y, y_ptr = randn(6, C, dtype=dtype), torch.tensor([0, 2, 3, 4, 6])
    options = {"heads": 2, "seeds": 2}
    pools = [
        SetAttention(C, 2), MAB(C, 2, dropout=0.3), SAB(C, 2, activation="shifted_softplus"),
        ISAB(C, 3, 2), PMA(C, 2, 2, **PAPER), PMA(C, 1, 1), SetTransformer(C, C, 3, **options),
        AttentionPooling(C, C, **options), AttentionPooling(C, C, phantom=6, **options),
        AttentionPooling(C, C, phantom="batch_max", **options), SeedPooling(C, C, **options),
        SumPooling(), MeanPooling(), MaxPooling(), SoftmaxPooling(),
        AttentionalPooling(C, 3, hidden=4), WeightedAverage(C, 2, mean=0.3, std=1.7),
        OrbitalWeightedAverage(C, 2),
    ]  # fmt: skip
    pools = [pool.to(dtype) for pool in pools]

    def run():
        found = []
        torch.manual_seed(4)
        for pool in pools:
            (x,) = leaves(rows["x"])
            out = pool(x, ptr)
            found += [out.detach(), *derivatives(out, [x, *pool.parameters()])]
        average = pools[-1]
        found += average.with_weights(rows["x"], ptr)
        found.append(average.loss(rows["x"], ptr, found[-2].detach(), found[-1].detach()))
        found.append(pools[1](rows["x"][:10], ptr, y, y_ptr))
        return [x.detach() for x in found]

    return run


def aggregations(dtype):
    pyg = pytest.importorskip("attnpool_kernels.zoo.pyg")
    rows, index = randn(10, C, dtype=dtype), torch.tensor([0, 2, 2, 0, 4, 4, 4, 1, 0, 2])
    ptr = torch.tensor([0, 3, 3, 8, 10])
    pools = [
        pyg.SetTransformerAggregation(C, heads=2, num_seed_points=2, dropout=0.2),
        pyg.SetTransformerAggregation(C, layer_norm=True, concat=False, empty="zero"),
        pyg.PoolingAggregation(MeanPooling(), torch.nn.Linear(C, 2)),
        pyg.AttentionPoolingAggregation(C, C, heads=2, seeds=2),
    ]
    pools = [pool.to(dtype) for pool in pools]
    graph, pos = pyg.MoleculeGraph(2.5), randn(10, 3, dtype=dtype)
    z, batch = torch.arange(1, 11), torch.tensor([0] * 3 + [1] * 5 + [2] * 2)
    from torch_geometric.nn import SchNet

    schnet = SchNet(C, C, 2, num_gaussians=6, cutoff=2.5, interaction_graph=graph)
    schnet = pyg.pooled_schnet(schnet, AttentionPooling(C, C, heads=2, seeds=2)).to(dtype)

    def run():
        torch.manual_seed(5)
        found = list(graph(pos, batch))
        for pool in pools:
            (x,) = leaves(rows)
            for groups in ({"index": index}, {"ptr": ptr}, {}):
                out = pool(x, **groups)
                found += [out.detach(), *derivatives(out, [x, *pool.parameters()])]
        (moved,) = leaves(pos)
        out = schnet(z, moved, batch)
        return [*found, out.detach(), *derivatives(out, [moved])]

    return run


def schnetpack_output():
    from attnpool_kernels.zoo.schnetpack import PooledAtomwise

    pool = PooledAtomwise(SeedPooling(C), torch.nn.Linear(C, 1))
    rows, index = randn(10, C, dtype=torch.float32), torch.tensor([0] * 3 + [1] * 5 + [2] * 2)
    counts = torch.tensor([3, 5, 2, 0])

    def run():
        given = {"scalar_representation": rows, "_idx_m": index}
        return [pool(x)["y"].detach() for x in (dict(given), given | {"_n_atoms": counts})]

    return run


BACKBONES = {
    "schnet": {"hidden_channels": 16, "num_filters": 12, "num_interactions": 2, "cutoff": 5.0},
    "schnetpack_schnet": {"n_atom_basis": 16, "n_interactions": 2, "n_rbf": 8},
    "dimenet": {"hidden_channels": 12, "num_blocks": 1, "num_bilinear": 3, "latent": 16},
    "dimenet++": {"hidden_channels": 12, "num_blocks": 1, "int_emb_size": 6, "latent": 16},
    "painn": {"n_atom_basis": 16, "n_interactions": 2, "n_rbf": 8},
}


def pooled(name, pooling="abp", **options):
    pytest.importorskip("torch_geometric")
    library = name in ("painn", "schnetpack_schnet")
    if library and importlib.util.find_spec("schnetpack") is None:
        pytest.skip("schnetpack is not installed")
    from attnpool_kernels.zoo.model import PooledModel

    small = {"hidden": C, "heads": 2, "seeds": 2, "activation": "silu"} if pooling == "abp" else {}
    config = {"backbone": name, "backbone_options": BACKBONES[name], "pooling": pooling}
    return PooledModel.from_config(config | {"pooling_options": small} | options)


def water(dtype=torch.float64):
    """Three molecules; no two atoms nearer than 0.9 Å."""
    from attnpool_kernels.zoo.molecules import Molecules

    pos = torch.tensor([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]], dtype=torch.float64)
    pos = torch.cat([pos, 1.1 * pos, pos[:1]])
    ptr = torch.tensor([0, 3, 6, 7])
    y = torch.tensor([[-2038.1], [-2037.9], [-75.3]], dtype=torch.float64)
    return Molecules(torch.tensor([8, 1, 1, 8, 1, 1, 10]), pos.to(dtype), ptr, y)


def zoo_model(name, dtype):
    model = pooled(name).to(dtype)
    for buffer in ("mean", "std", "atomref"):
        setattr(model, buffer, getattr(model, buffer).double())
    one = torch.ones(1, dtype=torch.float64)
    model.set_statistics(-2038.0 * one, 0.3 * one)
    molecules = water()

    def run():
        energy, forces = model.energy_and_forces(molecules, create_graph=True)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(
            (energy.square().sum() + forces.square().sum()), parameters, allow_unused=True
        )
        selected = molecules.select([2, 0]).to(dtype=torch.float32)
        return [
            energy.detach(), forces.detach(), *(g for g in gradients if g is not None),
            model(molecules).detach(), selected.pos, selected.ptr, molecules.batch,
        ]  # fmt: skip

    return run


def other_poolings():
    names = ("sum", "mean", "max", "softmax", "attentional", "weighted", "orbital_weighted", "seed")
    models = [pooled("schnet", name) for name in (*names, "set_transformer")]
    models.append(pooled("schnet", "sum", head="atom"))
    molecules = water()
    molecules.coefficients = torch.linspace(0, 1, 7)

    def run():
        found = [model(molecules).detach() for model in models]
        found += [models[6].orbital_loss(molecules).detach(), *models[5].with_weights(molecules)]
        return [x.detach() for x in found]

    return run


def edges_of_many_atoms():
    from attnpool_kernels.zoo.graph import edges, lengths, triplets

    pos, ptr = 9 * randn(1200, 3, dtype=torch.float32), torch.tensor([0, 1190, 1200])

    def run():  # more pairs than are tried one by one: the cells
        index = edges(pos, ptr, 2.0)
        return [index, lengths(pos[index[0]] - pos[index[1]]), *triplets(index, 1200)]

    return run


def training():
    """A step and the errors of a task, with the data that ``MoleculeData`` makes of a set."""
    pytest.importorskip("lightning")
    pytest.importorskip("torch_geometric")
    from attnpool_kernels.zoo.data import MoleculeData
    from attnpool_kernels.zoo.datasets.splits import eighty_ten_ten, shuffled
    from attnpool_kernels.zoo.molecules import MoleculeSet, Split, Target

    molecules = water().select([0, 1, 2] * 4)
    parts = torch.arange(12).split((8, 2, 2))

    def run():
        made = MoleculeSet("few", molecules, (Target("e", "eV"),), {0: Split(*parts)})
        data = MoleculeData(made, batch_size=3, limit=7)
        data.setup()
        found = [*data.statistics, torch.full((1,), data.atoms, dtype=torch.float64, device="cpu")]
        for batch in itertools.chain(data.train_dataloader(), data.test_dataloader()):
            found += [batch.molecules.pos, batch.molecules.y, batch.molecules.ptr]
        found += made.statistics("e")
        for split in (shuffled((5, 2, 1), [3])[3], eighty_ten_ten(20, [1])[1]):
            found += [split.train, split.val, split.test]
        return [torch.tensor(x, dtype=torch.float64, device="cpu") if isinstance(x, float) else x
                for x in found]  # fmt: skip

    return run


def calculator():
    pytest.importorskip("ase")
    from ase.build import molecule

    from attnpool_kernels.zoo.calculator import PooledCalculator

    model = pooled("schnet").double()

    def run():
        found = []
        for dtype in (None, torch.float32, torch.float64):
            atoms = molecule("CH3OH")
            atoms.calc = PooledCalculator(model, dtype=dtype)
            found += [np.array(atoms.get_potential_energy()), atoms.get_forces()]
        return [torch.from_numpy(x.copy()) for x in found]

    return run


def checkpoints(tmp_path, dtype):
    """Predictions for a file by the model of a checkpoint, and the weights themselves."""
    pytest.importorskip("lightning")
    pytest.importorskip("torch_geometric")
    ase = pytest.importorskip("ase")
    import ase.io  # noqa: F811

    from attnpool_kernels.zoo import molecule_files, predict
    from attnpool_kernels.zoo.calculator import PooledCalculator
    from attnpool_kernels.zoo.task import PoolingTask

    options = {"hidden": C, "heads": 2, "seeds": 2}
    task = PoolingTask("dimenet++", BACKBONES["dimenet++"], "abp", options, targets=["energy"])
    task = task.to(dtype)
    wanted = [["energy", "eV"]]
    torch.save(
        {
            "hyper_parameters": dict(task.hparams), "state_dict": task.state_dict(),
            "zoo": {"targets": wanted, "elements": [1, 6, 8], "data": {}},
        },
        tmp_path / "m.ckpt",
    )  # fmt: skip
    water = ase.Atoms("OH2", [[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    ase.io.write(tmp_path / "m.xyz", [water, water[:2]])

    def run():
        loaded = predict.load_task(tmp_path / "m.ckpt")
        frames = molecule_files.read_molecules(tmp_path / "m.xyz")
        predict.check_elements(frames, loaded.elements)
        values = predict.predicted(loaded, frames, batch_size=1)
        frames[0].calc = PooledCalculator(tmp_path / "m.ckpt")
        forces = torch.from_numpy(frames[0].get_forces().copy())
        assert next(loaded.model.parameters()).dtype == dtype
        return [values, forces, *(p.detach() for p in loaded.model.parameters())]

    return run


def readers(tmp_path):
    """Data sets from their files, with their splits."""
    from tools import tiny

    from attnpool_kernels.zoo.datasets import load

    files = {
        "qm7b": tiny.write_qm7b(tmp_path / "qm7b.npz"), "md17": tiny.write_md17(tmp_path / "a.npz")
    }  # fmt: skip

    def run():
        found = []
        for name, path in files.items():
            options = {"train": 20, "val": 10} if name == "md17" else {}
            made = load(name, path, **options)
            found += [x for x in vars(made.molecules).values() if x is not None]
            for split in made.splits.values():
                found += [split.train, split.val, split.test]
        return found

    return run


def names(dtype):
    return str(dtype).removeprefix("torch.")


ENTRIES = {f"operators {names(d)}": lambda _, d=d: operators(d) for d in DTYPES}
ENTRIES |= {
    f"operators {names(d)} reference": lambda _, d=d: operators(d, "reference") for d in DTYPES
}
ENTRIES |= {f"adapter {name}": lambda _, name=name: adapter(name) for name in ("sdpa", "flex")}
ENTRIES |= {f"modules {names(d)}": lambda _, d=d: modules(d) for d in DTYPES}
ENTRIES |= {f"aggregations {names(d)}": lambda _, d=d: aggregations(d) for d in DTYPES}
ENTRIES |= {
    f"{name} {names(d)}": lambda _, name=name, d=d: zoo_model(name, d)
    for name in BACKBONES
    for d in DTYPES
}
ENTRIES |= {f"checkpoints {names(d)}": lambda path, d=d: checkpoints(path, d) for d in DTYPES}
ENTRIES |= {
    "flash_attn": lambda _: flash_attn(),
    "boundaries": lambda _: boundaries(),
    "dropout and explain": lambda _: dropout_and_explain(),
    "cases": lambda _: checks_of_a_backend(),
    "schnetpack": lambda _: schnetpack_output(),
    "poolings": lambda _: other_poolings(),
    "edges": lambda _: edges_of_many_atoms(),
    "training": lambda _: training(),
    "calculator": lambda _: calculator(),
    "readers": readers,
}


@pytest.mark.filterwarnings("ignore:.*varlen.*")
@pytest.mark.parametrize("entry", ENTRIES)
def test_same_bits_under_every_default(tmp_path, entry):
    run = ENTRIES[entry](tmp_path)
    wanted = run()
    assert sum(x.numel() for x in wanted) > 0
    for name, setting in SETTINGS.items():
        with setting():
            found = run()
        assert len(found) == len(wanted), name
        for i, (a, b) in enumerate(zip(found, wanted)):
            assert a.dtype == b.dtype and a.device == b.device, (name, i, a.dtype, a.device)
            assert a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()), (name, i)
