"""PET of metatrain with our attention: equal to itself, in training, in evaluation, exported.

Real structures, real package, float64. A relative difference is that of norms.
"""

import copy
import io
import random
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("metatrain", reason="metatrain is not installed")
pytest.importorskip("ase")

import ase
import ase.build
import ase.io
import numpy as np
from metatomic.torch import ModelOutput, systems_to_torch
from metatrain.pet import PET
from metatrain.pet.modules import backend, transformer
from metatrain.utils.architectures import get_default_hypers
from metatrain.utils.data import DatasetInfo
from metatrain.utils.data.target_info import get_energy_target_info
from metatrain.utils.evaluate_model import evaluate_model
from metatrain.utils.neighbor_lists import (
    get_requested_neighbor_lists,
    get_system_with_neighbor_lists,
)

from attnpool_kernels.integrations import metatrain as integration
from attnpool_kernels.integrations import pet
from attnpool_kernels.integrations.metatrain import use_attnpool, use_own_attention

SAME = 1e-12
SMALL = {"d_pet": 16, "d_node": 24, "d_head": 8, "d_feedforward": 12, "num_heads": 2}
VARIANTS = {
    "default": {},
    "post-norm": {"transformer_type": "PostLN"},
    "post-norm, equal widths": {"transformer_type": "PostLN", "d_node": 16},
    "pre-norm, equal widths": {"d_node": 16, "activation": "SiLU"},
    "layer norm, SiLU": {"normalization": "LayerNorm", "activation": "SiLU"},
    "residual": {"featurizer_type": "residual", "num_gnn_layers": 3},
    "residual, post-norm": {"featurizer_type": "residual", "transformer_type": "PostLN"},
    "one layer, four attentions": {"num_gnn_layers": 1, "num_attention_layers": 4},
    "adaptive": {"num_neighbors_adaptive": 6},
    "adaptive by a grid": {"num_neighbors_adaptive": 6, "adaptive_cutoff_method": "grid"},
    "cosine, warm": {"cutoff_function": "Cosine", "attention_temperature": 0.6},
    "charge and spin": {"system_conditioning": True},
    "zbl": {"zbl": True},
}
ENERGY = get_energy_target_info(
    "energy", {"quantity": "energy", "unit": "eV"}, True, add_strain_gradients=True
)
TYPES = [1, 6, 8, 11, 14, 17, 29]


@pytest.fixture(autouse=True)
def _quiet():
    """metatrain tells training programs about gradients and neighbour lists."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This system's positions or cell")
        yield


def made(dtype=torch.float64, **hypers):
    torch.manual_seed(0)
    hypers = get_default_hypers("pet")["model"] | SMALL | hypers
    return PET(hypers, DatasetInfo("angstrom", TYPES, {"energy": ENERGY})).to(dtype)


def structures():
    """Molecules, an atom without neighbours, shaken crystals, a far pair: 0 to 42 neighbours."""
    found = [ase.build.molecule(name) for name in ("H2O", "CH4", "CH3CH2OH")]
    found.append(ase.Atoms("O", [[0.0, 0.0, 0.0]]))
    found.append(ase.build.bulk("Si", cubic=True))
    found.append(ase.build.bulk("NaCl", "rocksalt", 5.64, cubic=True))
    found.append(ase.build.bulk("Cu", cubic=True))
    for seed, atoms in enumerate(found):
        atoms.rattle(0.08, seed=seed)
    # A pair so near to the cutoff that its factor is 0, of which PET takes no logarithm.
    found.append(ase.Atoms("OHO", [[0.0, 0.0, 0.0], [0.9, 0.0, 0.0], [0.0, 4.499, 0.0]]))
    return found


def systems(model, atoms=None, dtype=torch.float64):
    lists = get_requested_neighbor_lists(model)
    made_of = systems_to_torch(atoms or structures(), dtype=dtype)
    return [get_system_with_neighbor_lists(x, lists) for x in made_of]


def predicted(model, batch):
    """Energies, their gradients in positions, and in strain."""
    block = evaluate_model(model, batch, {"energy": ENERGY}, is_training=True)["energy"].block()
    gradients = [block.gradient(name).values for name in ("positions", "strain")]
    return [block.values, *gradients]


def gradients(model, loss):
    parameters = list(model.parameters())
    return torch.autograd.grad(loss, parameters, materialize_grads=True, retain_graph=True)


def results(model, batch):
    """Of training: what is predicted, and the gradients of losses on energies and on forces."""
    model.train()
    energy, force, strain = predicted(model, batch)
    on_energy = gradients(model, energy.square().mean())
    on_forces = gradients(model, force.square().mean() + strain.square().mean())
    model.eval()
    evaluated = [x.detach() for x in predicted(model, batch)]
    return {
        "energy": [energy.detach()],
        "forces": [force.detach()],
        "stress": [strain.detach()],
        "energy loss": on_energy,
        "force loss": on_forces,
        "evaluation": evaluated,
    }


def relative(a, b):
    scale = b.norm().item()
    return (a - b).norm().item() / scale if scale else a.norm().item()


@pytest.mark.parametrize("name", VARIANTS)
def test_same_numbers(name):
    own = made(**VARIANTS[name])
    ours = use_attnpool(copy.deepcopy(own))
    assert list(ours.state_dict()) == list(own.state_dict())
    batch = systems(own)
    expected, found = results(own, batch), results(ours, batch)
    for what, tensors in expected.items():
        scale = max(float(x.norm()) for x in tensors)
        assert scale > 0
        for a, b in zip(found[what], tensors):
            assert a.shape == b.shape
            assert float((a - b).norm()) <= SAME * max(float(b.norm()), 1e-3 * scale), what


def test_long_range():
    pytest.importorskip("torchpme", reason="torch-pme is not installed")
    hypers = get_default_hypers("pet")["model"]["long_range"] | {"enable": True, "use_ewald": True}
    own = made(long_range=hypers)
    ours = use_attnpool(copy.deepcopy(own))
    batch = systems(own)
    for a, b in zip(predicted(ours, batch), predicted(own, batch)):
        assert relative(a, b) < SAME


def test_float32_is_as_close_as_pet_itself():
    own = made()
    batch, narrow = systems(own), systems(own, dtype=torch.float32)
    truth = predicted(own, batch)
    single = own.float()
    expected = predicted(single, narrow)
    found = predicted(use_attnpool(single), narrow)
    for a, b, c in zip(found, expected, truth):
        ours, own = relative(a.double(), c), relative(b.double(), c)
        assert ours < 1e-5 and ours < 2 * own + 1e-7


def test_the_bias_is_felt(monkeypatch):
    """A control: without log cutoff the numbers differ, and the check of four atoms sees it."""
    own = made()
    batch = systems(own)
    expected = predicted(own, batch)
    ours = use_attnpool(copy.deepcopy(own))
    real = pet.set_attention
    monkeypatch.setattr(pet, "set_attention", lambda *x, key_bias, **options: real(*x, **options))
    assert all(relative(a, b) > 1e-4 for a, b in zip(predicted(ours, batch), expected))
    with pytest.raises(NotImplementedError, match="features of four atoms differ by"):
        use_attnpool(own)
    assert type(own.backend) is backend.PETBackend


def test_second_derivatives_in_evaluation():
    """PET leaves them to what torch chooses for its attention."""
    own = made().eval()
    ours = use_attnpool(copy.deepcopy(own))
    batch = systems(own)
    losses = [predicted(model, batch)[1].square().sum() for model in (own, ours)]
    expected, found = (gradients(*pair) for pair in zip((own, ours), losses))
    scale = max(float(x.norm()) for x in expected)
    assert all(float((a - b).norm()) < SAME * scale for a, b in zip(found, expected))


def test_padding_reaches_nothing():
    """With large logits PET's 1e-15 for padding is felt: energies depend on the batch. Ours not."""
    own = made()
    with torch.no_grad():
        for layer in own.backend.gnn_layers:
            for each in layer.trans.layers:
                each.attention.input_linear.weight.mul_(12)
    ours = use_attnpool(copy.deepcopy(own))
    molecule, crystal = systems(own)[2:6:3]
    for model, least, most in ((own, 1e-9, 1.0), (ours, 0.0, SAME)):
        alone = predicted(model, [molecule])[0]
        beside = predicted(model, [molecule, crystal])[0][:1]
        assert least <= relative(beside, alone) <= most


def test_training_takes_the_same_way():
    losses = []
    for patch in (lambda x: x, use_attnpool):
        model = patch(made()).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        batch, record = systems(model), []
        for _ in range(4):
            optimizer.zero_grad()
            energy, force, _ = predicted(model, batch)
            loss = (energy - 1).square().mean() + force.square().mean()
            loss.backward()
            optimizer.step()
            record.append(loss.item())
        losses.append(torch.tensor(record))
    assert relative(losses[1], losses[0]) < 1e-9 and losses[0][-1] < losses[0][0]


def test_metatrains_trainer(tmp_path):
    """An epoch of its own training program, on forces, leaves the same weights."""
    from metatrain.pet import Trainer
    from metatrain.utils.data import Dataset
    from metatrain.utils.data.readers import read_systems, read_targets
    from metatrain.utils.hypers import init_with_defaults
    from metatrain.utils.loss import LossSpecification

    path = str(tmp_path / "frames.xyz")
    frames = structures()[:3]
    for number, atoms in enumerate(frames):
        atoms.info["energy"] = float(number)
        atoms.arrays["forces"] = atoms.positions.copy()
    ase.io.write(path, frames)
    source = {"read_from": path, "reader": "ase", "key": "energy", "unit": "eV"}
    source |= {"quantity": "energy", "type": "scalar", "sample_kind": "system"}
    source |= {"num_subtargets": 1, "stress": False, "virial": False, "description": ""}
    source["forces"] = {"read_from": path, "reader": "ase", "key": "forces"}
    targets, info = read_targets({"energy": source})
    known = [x.to(torch.float64) for x in read_systems(path)]
    data = Dataset.from_dict({"system": known, "energy": targets["energy"]})
    hypers = get_default_hypers("pet")
    loss = init_with_defaults(LossSpecification)
    training = hypers["training"] | {"num_epochs": 1, "batch_size": 2, "num_workers": 0}
    training |= {"loss": {"energy": loss | {"gradients": {"positions": loss}}}}
    training |= {"learning_rate": 1e-3, "warmup_fraction": 0.0}
    results = []
    for patch in (lambda x: x, use_attnpool):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = patch(PET(hypers["model"] | SMALL, DatasetInfo("angstrom", TYPES, info)))
        before = torch.cat([x.detach().flatten().double() for x in model.parameters()])
        Trainer(training).train(
            model, torch.float64, [torch.device("cpu")], [data], [data], str(tmp_path)
        )
        after = torch.cat([x.detach().flatten() for x in model.parameters()])
        assert relative(after, before) > 1e-4
        results.append(after)
    assert type(model.backend) is pet.PackedBackend
    assert relative(*results) < SAME


def test_it_is_the_same_object_and_goes_back():
    model = made()
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert use_attnpool(model) is model and use_attnpool(model) is model
    assert type(model.backend) is pet.PackedBackend
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    other = made()
    assert type(other.backend) is backend.PETBackend  # no class was changed
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    assert list(model.state_dict()) == names
    assert use_own_attention(model) is model and use_own_attention(model) is model
    assert type(model.backend) is backend.PETBackend
    assert {type(x) for x in model.backend.gnn_layers} == {transformer.CartesianTransformer}


def test_copies_and_files_keep_it():
    model = use_attnpool(made())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    batch = systems(model)
    expected = predicted(model, batch)[0]
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.backend) is pet.PackedBackend
        assert torch.equal(predicted(other, batch)[0], expected)


def test_a_checkpoint_has_nothing_of_it():
    """metatrain makes a model from a checkpoint by itself: that one has its own attention."""
    model = use_attnpool(made())
    fresh = PET.load_checkpoint(model.get_checkpoint() | {"epoch": 1, "best_epoch": 1}, "export")
    assert type(fresh.backend) is backend.PETBackend
    batch = systems(model)
    assert relative(predicted(use_attnpool(fresh), batch)[0], predicted(model, batch)[0]) == 0


def test_lora():
    from metatrain.pet.modules.finetuning import LoRALinear, inject_lora_layers

    own = inject_lora_layers(made(), ("input_linear", "output_linear")).double()
    for module in own.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight)
    ours = use_attnpool(copy.deepcopy(own))
    batch = systems(own)
    expected, found = results(own, batch), results(ours, batch)
    for what in ("forces", "force loss"):
        assert all(relative(a, b) < 1e-11 for a, b in zip(found[what], expected[what]))


OUTPUTS = (
    "feature",
    "mtt::aux::energy_last_layer_features",
    "mtt::aux::cutoff_stats",
    "mtt::feature::edge_vectors",
    "mtt::feature::gnn_layers.0.trans.layers.1.attention.input_linear",
    "mtt::feature::edge_backbone.0",
)


@pytest.mark.parametrize("output", OUTPUTS)
def test_other_outputs(output):
    own = made()
    request = {output: ModelOutput(sample_kind="atom")}
    batch = systems(own)
    expected = own(batch, request)[output].block()
    found = use_attnpool(own)(batch, request)[output].block()
    assert found.samples == expected.samples
    assert relative(found.values, expected.values) < SAME


LOADED = """
import sys, json, torch
sys.modules["attnpool_kernels"] = None  # as where it is not installed
from metatomic.torch import load_atomistic_model
from metatomic_ase import MetatomicCalculator
import ase.io
atoms = ase.io.read(sys.argv[2])
atoms.calc = MetatomicCalculator(load_atomistic_model(sys.argv[1]), device="cpu")
print(json.dumps([atoms.get_potential_energy(), atoms.get_forces().tolist(),
                  atoms.get_stress().tolist()]))
"""


def test_exported_model_runs_elsewhere(tmp_path):
    """Saved, it has PET's own attention and says so; unsaved, ASE runs ours."""
    import json

    from metatomic_ase import MetatomicCalculator

    model = use_attnpool(made())
    atoms = structures()[5]
    ase.io.write(tmp_path / "atoms.traj", atoms)
    exported = model.export()
    atoms.calc = MetatomicCalculator(exported, device="cpu")
    expected = [atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()]
    with pytest.warns(UserWarning, match="PET's own code"):
        exported.save(tmp_path / "model.pt")
    assert type(model.backend) is pet.PackedBackend  # and this one goes on with ours
    command = [sys.executable, "-c", LOADED, tmp_path / "model.pt", tmp_path / "atoms.traj"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for a, b in zip(json.loads(run.stdout), expected):
        assert relative(torch.tensor(a, dtype=torch.float64), torch.as_tensor(b)) < 1e-10


# What another version may bring


def test_a_class_that_is_gone(monkeypatch):
    model = made()
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: "2027.1.0")
    monkeypatch.delattr(transformer, "AttentionBlock")
    message = r"PET of metatrain 2027.1.0 is not the one tried here \(2026.4.1\): .* AttentionBlock"
    with pytest.raises(ImportError, match=message):
        use_attnpool(model)


def test_another_argument(monkeypatch):
    model = made()
    monkeypatch.setattr(
        transformer.CartesianTransformer, "forward", lambda self, nodes, edges, graph: None
    )
    with pytest.raises(
        NotImplementedError, match=r"CartesianTransformer.forward must take .*graph"
    ):
        use_attnpool(model)


def test_another_part():
    model = made()
    del model.backend.gnn_layers[1].trans.layers[0].norm_mlp
    message = r"a transformer layer \(TransformerLayer\) has no attribute norm_mlp"
    with pytest.raises(NotImplementedError, match=message):
        use_attnpool(model)


def test_another_class():
    class Gated(transformer.AttentionBlock):
        pass

    model = made()
    model.backend.gnn_layers[0].trans.layers[1].attention.__class__ = Gated
    with pytest.raises(NotImplementedError, match="attention must be a AttentionBlock, got Gated"):
        use_attnpool(model)


def test_other_numbers(monkeypatch):
    """The same names with another meaning."""
    model = made()
    real = transformer.AttentionBlock.forward
    monkeypatch.setattr(
        transformer.AttentionBlock, "forward", lambda self, *x: 1.01 * real(self, *x)
    )
    with pytest.raises(NotImplementedError, match="features of four atoms differ"):
        use_attnpool(model)
    assert type(model.backend) is backend.PETBackend
    assert {type(x) for x in model.backend.gnn_layers} == {transformer.CartesianTransformer}


@pytest.mark.parametrize("call", [use_attnpool, use_own_attention])
def test_no_pet(call):
    with pytest.raises(TypeError, match=r"model must be a metatrain.pet.PET, got .*Linear"):
        call(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"got .*AtomisticModel \(call this before export\)"):
        call(made().export())
