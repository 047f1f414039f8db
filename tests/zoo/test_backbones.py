"""Atom vectors: the numbers of the libraries' own models, where these can be run, and bad input."""

import importlib
import importlib.util

import pytest
import torch

from attnpool_kernels import Ragged
from attnpool_kernels.zoo import libraries
from attnpool_kernels.zoo.backbones import BACKBONES, backbone
from attnpool_kernels.zoo.basis import GaussianRBF, SphericalBasis, gaussians
from attnpool_kernels.zoo.graph import edges, triplets

LIBRARY = {name: "torch_geometric" for name in ("schnet", "dimenet", "dimenet++")}
LIBRARY |= {name: "schnetpack" for name in ("schnetpack_schnet", "painn")}
OF_ATOMS = [name for name in BACKBONES if name != "esa"]
SMALL = {
    "schnet": {
        "hidden_channels": 16,
        "num_filters": 12,
        "num_interactions": 2,
        "num_gaussians": 8,
        "cutoff": 5.0,
    },
    "schnetpack_schnet": {"n_atom_basis": 16, "n_interactions": 2, "n_rbf": 8, "n_filters": 12},
    "dimenet": {
        "hidden_channels": 12,
        "num_blocks": 1,
        "num_bilinear": 3,
        "latent": 16,
        "num_spherical": 3,
        "num_radial": 4,
    },
    "dimenet++": {
        "hidden_channels": 12,
        "num_blocks": 2,
        "int_emb_size": 6,
        "basis_emb_size": 4,
        "out_emb_channels": 10,
        "latent": 16,
        "num_spherical": 3,
        "num_radial": 4,
    },
    "painn": {"n_atom_basis": 16, "n_interactions": 2, "n_rbf": 8},
    "esa": {
        "hidden_channels": 16,
        "layers": "MS",
        "heads": 2,
        "num_gaussians": 8,
        "cutoff": 4.0,
    },
}


def small(name, **options):
    """A small backbone in float64; skips where its library is missing."""
    if name in LIBRARY and importlib.util.find_spec(LIBRARY[name]) is None:
        pytest.skip(f"{LIBRARY[name]} is not installed")
    return backbone(name, **(SMALL[name] | options)).double()


def atoms(counts, spread=1.5):
    """z, pos and boundaries; atoms at least 0.7 Å apart."""
    pos = []
    for count in counts:
        some = torch.empty(0, 3, dtype=torch.float64)
        while len(some) < count:
            new = spread * torch.randn(1, 3, dtype=torch.float64)
            if not len(some) or (some - new).norm(dim=1).min() > 0.7:
                some = torch.cat([some, new])
        pos.append(some)
    return torch.randint(1, 18, (sum(counts),)), torch.cat(pos), Ragged.from_counts(counts)


@pytest.mark.parametrize("name", OF_ATOMS)
def test_atom_vectors(name):
    net = small(name)
    z, pos, ragged = atoms([5, 1, 0, 9, 1])
    out = net(z, pos.requires_grad_(), ragged)
    assert out.shape == (16, 16) and net.channels == 16 and out.dtype == torch.float64
    alone = [net(z[a:b], pos[a:b], Ragged.from_counts([b - a])) for a, b in ((0, 5), (6, 15))]
    torch.testing.assert_close(
        torch.cat([out[:5], out[6:15]]), torch.cat(alone), rtol=0, atol=1e-13
    )
    assert bool(out.isfinite().all())
    # different atoms have different rows at once (a last layer that starts at 0 would give none)
    assert float(out[:5].detach().std(0).mean()) > 1e-3
    (gradient,) = torch.autograd.grad(out.square().sum(), pos)
    assert bool(gradient.isfinite().all()) and not gradient[5].any() and bool(gradient[:5].any())
    single = net.float()(z, pos.detach(), ragged)  # positions in float64 are no error
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), out.detach(), rtol=0, atol=1e-4)


def test_edges_as_rows():
    net = small("esa", cutoff=2.5)
    z, pos, ragged = atoms([5, 1, 0, 9])
    pos.requires_grad_()
    rows, sets = net.located(z, pos, ragged)
    index = edges(pos, ragged, 2.5)
    assert rows.shape == (index.shape[1], 16) and len(sets) == 4 and net.rows == "edges"
    owner = ragged.batch()[index[1]]
    assert torch.equal(sets.counts(), owner.bincount(minlength=4)) and sets.counts()[1] == 0
    assert torch.equal(net(z, pos, ragged), rows)
    last, _ = net.located(z[6:], pos[6:], Ragged.from_counts([9]))
    torch.testing.assert_close(rows[sets.ptr[3] :], last, rtol=0, atol=1e-13)
    # what the rows are made of, by hand for one edge of a pair of atoms
    z, pos = torch.tensor([6, 8]), torch.tensor([[0.0, 0, 0], [1.2, 0, 0]], dtype=torch.float64)
    made = net._edges(z, *net.graph(z, pos, Ragged.from_counts([2])))
    expanded = net.distance_expansion(torch.tensor([1.2], dtype=torch.float64))[0]
    source, target = net.embedding(torch.tensor([8, 6]))
    wanted = net.edge(torch.cat([source, target, expanded]))
    torch.testing.assert_close(made[0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BACKBONES)
def test_atoms_in_a_line(name):
    """Angles of 180° have no gradient as angles; of HCN and acetylene all must be finite."""
    net = small(name)
    z = torch.tensor([1, 6, 7, 1, 6, 6, 1])
    pos = torch.tensor([-1.07, 0, 1.16, -1.66, -0.6, 0.6, 1.66], dtype=torch.float64)
    pos = torch.outer(pos, torch.tensor([0.6, 0, 0.8], dtype=torch.float64)).requires_grad_()
    out = net(z, pos, Ragged.from_counts([3, 4]))
    (first,) = torch.autograd.grad(out.square().sum(), pos, create_graph=True)
    wanted = [pos, *(p for p in net.parameters())]
    second = torch.autograd.grad(first.square().sum(), wanted, allow_unused=True)
    assert all(x is None or bool(x.isfinite().all()) for x in second)
    across = (
        first.detach() - (first.detach() @ pos[2].detach())[:, None] * pos[2].detach() / 1.16**2
    )
    assert float(across.abs().max()) < 1e-12 * float(first.detach().abs().max())


def test_schnet_is_that_of_pyg():
    models = pytest.importorskip("torch_geometric.nn")
    z, pos, ragged = atoms([5, 1, 9])
    options = SMALL["schnet"]

    def graph(pos, batch):
        index = edges(pos, ragged, options["cutoff"])
        return index, (pos[index[0]] - pos[index[1]]).norm(dim=1)

    theirs = models.SchNet(**options, interaction_graph=graph)
    theirs.lin1 = theirs.act = theirs.lin2 = torch.nn.Identity()
    net = small("schnet")
    net.load_state_dict(theirs.double().state_dict())
    sums = torch.zeros(3, 16, dtype=torch.float64).index_add(0, ragged.batch(), net(z, pos, ragged))
    torch.testing.assert_close(theirs(z, pos, ragged.batch()), sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "kind"), [("dimenet", "DimeNet"), ("dimenet++", "DimeNetPlusPlus")]
)
def test_dimenet_is_that_of_pyg(monkeypatch, name, kind):
    """The same weights, edges and triplets through PyG's class."""
    module = pytest.importorskip("torch_geometric.nn.models.dimenet")
    z, pos, ragged = atoms([5, 1, 9])
    options = dict(SMALL[name])
    theirs = getattr(module, kind)(
        **{"out_channels" if k == "latent" else k: x for k, x in options.items()},
        output_initializer="glorot_orthogonal",
    ).double()
    monkeypatch.setattr(module, "radius_graph", lambda pos, r, **_: edges(pos, ragged, r))
    monkeypatch.setattr(
        module, "triplets", lambda index, num_nodes: (*index.flip(0), *triplets(index, num_nodes))
    )
    net = small(name)
    net.load_state_dict(theirs.state_dict())
    sums = torch.zeros(3, 16, dtype=torch.float64).index_add(0, ragged.batch(), net(z, pos, ragged))
    wanted = theirs(z, pos, ragged.batch())
    # PyG's formulas hold constants rounded to float32, so the two agree in float64 as closely as
    # PyG's own model does with itself in float32. The weights are float32 numbers in both.
    rounding = (theirs.float()(z, pos.float(), ragged.batch()) - wanted).abs().max()
    assert rounding < 1e-3 * wanted.abs().max()
    assert (sums - wanted).abs().max() <= 8 * rounding


def test_spherical_basis():
    """All 42 functions of the published size against SciPy's."""
    special = pytest.importorskip("scipy.special")
    parts = pytest.importorskip("torch_geometric.nn.models.dimenet")
    distance = torch.linspace(0.3, 0.99, 9, dtype=torch.float64)
    cosine = torch.linspace(-1, 1, 9, dtype=torch.float64)
    basis = SphericalBasis(7, 6, parts.Envelope(5)).double()
    found = basis(distance, cosine, torch.arange(9)).view(9, 7, 6)
    for l in range(7):
        zeros = basis.zeros[l].numpy()
        norm = (special.spherical_jn(l + 1, zeros) ** 2 / 2) ** -0.5
        radial = norm * special.spherical_jn(l, distance[:, None].numpy() * zeros)
        angular = special.eval_legendre(l, cosine.numpy()) * ((2 * l + 1) / (4 * torch.pi)) ** 0.5
        wanted = (
            torch.from_numpy(radial)
            * (torch.from_numpy(angular) * basis.envelope(distance))[:, None]
        )
        torch.testing.assert_close(found[:, l], wanted, rtol=1e-6, atol=1e-6)


def test_defaults_are_the_published_ones():
    pytest.importorskip("torch_geometric")
    net = backbone("dimenet++")
    assert net.options["num_spherical"] == 7 and net.channels == 50
    assert backbone("schnet", cutoff=4).options == {
        "hidden_channels": 128,
        "num_filters": 128,
        "num_interactions": 6,
        "num_gaussians": 50,
        "cutoff": 4,
    }


@pytest.mark.parametrize("name", BACKBONES)
def test_bad_input(name):
    net = small(name)
    z, pos, ragged = atoms([3, 2])
    last = net.elements
    net(z.clone().fill_(last), pos, ragged)
    for wrong in (0, last + 1, -1):
        z[3] = wrong
        with pytest.raises(ValueError, match=rf"got {wrong} for atom 3"):
            net(z, pos, ragged)
    z[3] = 6
    with pytest.raises(ValueError, match="atoms 3 and 4"):
        net(z, pos.index_copy(0, torch.tensor([4]), pos[3:4]), ragged)
    pos[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"pos must be finite.*atom 1"):
        net(z, pos, ragged)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("egnn", {}, "backbone must be one of schnet, .*'egnn'"),
        ("schnet", {"n_atom_basis": 3}, "options of backbone 'schnet' are .*'n_atom_basis'"),
        ("schnet", {"hidden_channels": 0}, "schnet.*channels"),
        ("schnet", {"hidden_channels": "128"}, "schnet.*channels"),
        ("schnet", {"cutoff": -1.0}, "cutoff"),
        ("schnet", {"num_gaussians": 1}, "num_gaussians"),
        ("dimenet++", {"num_spherical": 1}, "num_spherical"),
        ("dimenet++", {"num_radial": 0}, "num_radial"),
        ("dimenet", {"num_blocks": 0}, "num_blocks"),
        ("painn", {"n_rbf": 1}, "n_rbf"),
        ("painn", {"epsilon": 0.0}, "epsilon"),
    ],
)
def test_bad_options(name, options, match):
    with pytest.raises(ValueError, match=match):
        small(name, **options) if name in SMALL else backbone(name, **options)


@pytest.mark.parametrize(("name", "library"), LIBRARY.items())
def test_missing_library(monkeypatch, name, library):
    def absent(module):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=rf"needs {library}: pip install"):
        backbone(name)


def test_torch_is_left_as_it_was():
    if importlib.util.find_spec("schnetpack") is None:
        pytest.skip("schnetpack is not installed")
    before = hasattr(torch.utils.data.dataloader, "T_co")
    libraries.schnetpack("nn")
    assert hasattr(torch.utils.data.dataloader, "T_co") == before


def test_gaussians_are_never_denormal():
    """Products with denormal numbers take ten times as long on a CPU."""
    distance, centres = torch.linspace(0.5, 10.0, 500), torch.linspace(0.0, 10.0, 50)
    coefficient = -0.5 / 0.2041**2
    found = gaussians(distance, centres, coefficient)
    plain = (coefficient * (distance[:, None] - centres) ** 2).exp()
    smallest = torch.finfo(torch.float32).tiny
    assert ((plain < smallest) & (plain > 0)).any()
    assert (found >= smallest).all()
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-25)


def test_gaussians_of_schnetpack():
    if importlib.util.find_spec("schnetpack") is None:
        pytest.skip("schnetpack is not installed")
    theirs, ours = libraries.schnetpack("nn").GaussianRBF(8, 5.0), GaussianRBF(8, 5.0)
    assert ours.n_rbf == theirs.n_rbf
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for distance in (torch.rand(9) * 5, torch.rand(9, 1) * 5):
        torch.testing.assert_close(ours(distance), theirs(distance), rtol=1e-5, atol=1e-25)
