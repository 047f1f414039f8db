"""xyz and SDF files as users have them: everything is read, or the line that is not is named."""

import bz2
import gzip
import io
import re
import warnings

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from attnpool_kernels.zoo import sdf, xyz
from attnpool_kernels.zoo.datasets import structures
from attnpool_kernels.zoo.lines import lines
from attnpool_kernels.zoo.molecule_files import read_molecules
from attnpool_kernels.zoo.molecules import Molecules

NAMES = ("H2O", "CH4", "NH3", "CH3OH", "HCN")
FRAMES = [molecule(name) for name in NAMES]
BLANKS = ("\n", "\n\n", " \n", " \t \n", "\r\n", "\t\r\n")


def text_of(frames, format):
    file = io.StringIO()
    for one in frames:
        ase.io.write(file, one, format=format)
    return file.getvalue()


def same(found, wanted, digits=4):
    assert [a.get_chemical_formula() for a in found] == [a.get_chemical_formula() for a in wanted]
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a.positions, b.positions, atol=0.6 * 10**-digits)
    return True


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("format", ["xyz", "extxyz"])
def test_blank_lines_between_frames(tmp_path, format, blank):
    path, parts = tmp_path / "m.xyz", [text_of([one], format) for one in FRAMES]
    for text in (blank.join(parts), "".join(parts[:4]) + blank + parts[4], blank + parts[0]):
        path.write_bytes((text + blank).encode())
        assert same(read_molecules(path), FRAMES[: 1 if text.startswith(blank) else 5])


@pytest.mark.parametrize("blank", BLANKS)
def test_a_blank_line_anywhere(blank):
    """Between frames all of them are read; elsewhere the error names the line."""
    whole = text_of(FRAMES[:3], "extxyz").splitlines(keepends=True)
    assert len(whole) == 5 + 7 + 6
    for at in range(len(whole) + 1):
        given = [*whole[:at], *blank.splitlines(keepends=True), *whole[at:]]
        if at in (0, 5, 12, 18):
            assert same(xyz.read(given), FRAMES[:3])
        else:
            with pytest.raises(ValueError, match=r"line (\d+) must be an atom") as caught:
                xyz.read(given)
            line = int(re.search(r"line (\d+)", str(caught.value))[1])
            assert line in (at + 1, at + 2)  # a blank after the number of atoms is the comment


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
@pytest.mark.parametrize(("name", "format"), [("m.xyz", "xyz"), ("m.sdf", "sdf"), ("m.mol", "sdf")])
def test_line_ends_and_compression(tmp_path, name, format, suffix, end):
    data = text_of(FRAMES, format).replace("\n", end).encode()
    path = tmp_path / (name + suffix)
    path.write_bytes({"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix](data))
    assert same(read_molecules(path), FRAMES)


@pytest.mark.parametrize("title", ["Äthanol", "a\x85b", "a\u2028b", "a\x0cb", "a\x1cb"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-8-sig"])
def test_titles_in_any_encoding(tmp_path, title, encoding):
    """Not refused by one reader and read by the other; nor is a line split within a title."""
    if encoding == "latin-1" and "\u2028" in title:
        title = "Øl"
    path = tmp_path / "m.sdf"
    text = text_of(FRAMES, "sdf").replace("$$$$\n", f"$$$$\n{title}", 4)
    path.write_bytes((title + text).encode(encoding))
    assert same(read_molecules(path), FRAMES)
    found = structures.sdf(path)
    assert found["counts"].tolist() == [len(one) for one in FRAMES]
    np.testing.assert_allclose(
        found["pos"], np.concatenate([one.positions for one in FRAMES]), atol=1e-4
    )
    path = tmp_path / "m.xyz"
    path.write_bytes(text_of(FRAMES, "xyz").replace("\n\n", f"\n{title}\n").encode(encoding))
    assert same(read_molecules(path), FRAMES)


def test_names_of_files(tmp_path):
    """ASE takes what follows an @ as the number of a frame."""
    for name in ("a@1.xyz", "frames"):
        (tmp_path / name).write_text(text_of(FRAMES, "extxyz"))
        assert same(read_molecules(tmp_path / name), FRAMES)
    (tmp_path / "m.txt").write_text(text_of(FRAMES, "xyz"))
    with pytest.raises(ValueError, match="neither its name nor its beginning"):
        read_molecules(tmp_path / "m.txt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\n\nH 0 0 0\nH 0 0 1\nO 0 0 2\n", "line 5 must be the number of atoms .* got 'O 0 0 2'"),
        ("1\n\nH 0 0 0\n\n# the end\n", "line 5 must be the number of atoms"),
        ("1\n\nH 0 0 0\n-1\n", "line 4 must be the number of atoms of a molecule, got '-1'"),
        ("1\n\nH 0 0 0\n2.0\n\n", "line 4 must be the number of atoms"),
        ("2\nH 0 0 0\nH 0 0 1\n1\n\nH 0 0 0\n", "line 4 must be an atom .*line 1"),
        ("1\n\nH 0 0 0\n\n3\n\nH 0 0 0\nH 0 0 1\n", "3 atoms that begins in line 5 is cut off"),
        ("1\n\nH 0 0 0\n5\n", "5 atoms that begins in line 4 is cut off: .* after 0"),
        ("1\n\nH 0 0 0\n1\n\nH 0 0 1.0D0\n", r"line 6 must be an atom .* got 'H 0 0 1\.0D0'"),
        ("1\n\nH 0 0 0\n\n1\n\nXy 0 0 0\n", "molecule 1 in lines 5 to 7: unknown element 'Xy'"),
        (
            "1\nProperties=species:S:1:pos:R:3:q:R:1\nH 0 0 0\n",
            "line 2 must be a comment whose Properties",
        ),
        ("2\nProperties=species:S:1:f:R:3\nH 0 0 0\nH 1 1 1\n", "molecule 0 has no coordinates"),
    ],
)
def test_lines_that_are_no_xyz(tmp_path, text, message):
    path = tmp_path / "m.xyz"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_molecules(path)


def record(counts, atoms, bonds=(), properties=("M  END",), dimension="3D"):
    """A record of an SDF file; atoms as (element, x, y, z, code of the charge)."""
    rows = [f"{x:10.4f}{y:10.4f}{z:10.4f} {e:3} 0{c:3d}  0" for e, x, y, z, c in atoms]
    rows += [f"{i:3d}{j:3d}{order:3d}  0" for i, j, order in bonds]
    counts = f"{counts[0]:3d}{counts[1]:3d}  0  0  0  0  0  0  0  0999 V2000"
    return (
        "\n".join(
            ["title", f"{'  made here':20}{dimension}", "", counts, *rows, *properties, "$$$$"]
        )
        + "\n"
    )


OH = [("O", 0, 0, 0.1, 0), ("H", 0, 0, 1.0, 0)]
GOOD = record((3, 2), [*OH, ("H", 0, 1, -0.3, 0)], [(1, 2, 1), (1, 3, 1)])  # 11 lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (record((1, 0), OH), "line 17 must be M  END .* line 15 counts no more"),
        (record((2, 0), OH, [(1, 2, 1)]), "line 18 must be M  END"),
        (record((3, 0), OH), "line 18 must be an atom, .*got 'M  END'"),
        (record((3, 0), OH, (), ()), "lines 12 to 17 must have 3 atoms and 0 bonds"),
        (record((2, 2), OH, [(1, 2, 1)]), "line 19 must be a bond of two of the 2 atoms"),
        (record((2, 1), OH, [(1, 3, 1)]), "line 18 must be a bond"),
        (record((1, 0), [("R#", 0, 0, 0, 0)]), "line 16 .* unknown element R#"),
        (record((2, 0), OH, (), ["M  CHG  1   3   1", "M  END"]), "line 18 must be a number of"),
        (record((2, 0), OH, (), ["M  CHG  2   1   1", "M  END"]), "line 18 must be a number of"),
        ("\n" + GOOD, "line 15 must be the numbers of atoms and bonds"),
        ("$$$$\n" + GOOD, "line 12 must be one of three lines of header"),
        (
            "x\n\n\n  0  0  0     0  0            999 V3000\nM  V30 BEGIN CTAB\nM  END\n$$$$\n",
            "line 15 says that the format is V3000",
        ),
        (GOOD.replace("$$$$\n", "") + GOOD, r"line 22 must be \$\$\$\$"),
        (GOOD.replace("$$$$\n", "> <x>\n1\n\n") + GOOD, r"line 34 must be \$\$\$\$"),
    ],
)
def test_lines_that_are_no_sdf(tmp_path, text, message):
    path = tmp_path / "m.sdf"
    path.write_text(GOOD + text)
    for read, number in ((read_molecules, ""), (structures.sdf, "molecule 2: ")):
        with pytest.raises(ValueError, match=number + ".*" + message):
            read(path)


@pytest.mark.parametrize("cut", range(1, len(GOOD.splitlines())))
def test_sdf_that_ends_early(tmp_path, cut):
    """Without its last lines a file is cut off; without $$$$ only, which MOL files lack, it is not
    for predictions, and is for a data set."""
    path = tmp_path / "m.sdf"
    path.write_text(GOOD + "".join(GOOD.splitlines(keepends=True)[:-cut]))
    if cut == 1:
        assert len(read_molecules(path)) == 2
    else:
        with pytest.raises(ValueError, match=r"line|cut off"):
            read_molecules(path)
    with pytest.raises(ValueError, match="cut off: molecule 2 has no end"):
        structures.sdf(path)


def parsed(text):
    [block] = sdf.blocks(io.StringIO(text))
    return sdf.parsed(block)


def test_charges_and_radicals_of_sdf():
    ion = [("N", 0, 0, 0.1, 3), ("C", 0, 0, 1.4, 0), ("C", 0, 1, 2.0, 0), ("O", 0, 2, 2, 5)]
    assert parsed(record((4, 0), ion)).charge == 0  # a zwitterion
    found = parsed(record((4, 0), [*ion[:3], ("C", 2, 2, 2, 4)]))
    assert (found.charge, found.unpaired) == (1, 1)
    # Lines of charges and radicals replace what the atoms have, all of it.
    lines_ = [
        "A    1",
        "M  CHG is free text here",
        "M  CHG  2   1   2   4  -1",
        "M  RAD  1   2   3",
    ]
    found = parsed(record((4, 0), ion, (), [*lines_, "M  END"]))
    assert (found.charge, found.unpaired) == (1, 2)
    assert parsed(record((4, 0), ion, (), ["M  RAD  1   2   1", "M  END"])).charge == 0
    code = {1: 3, 2: 2, 3: 1, 4: 0, 5: -1, 6: -2, 7: -3}
    assert {c: parsed(record((1, 0), [("N", 0, 0, 0, c)])).charge for c in code} == code


def test_implied_hydrogens():
    heavy = [("C", 0, 0, 0, 0), ("C", 1.5, 0, 0, 0), ("O", 2, 1, 0.3, 0)]
    assert parsed(record((3, 2), heavy, [(1, 2, 1), (2, 3, 1)])).implied == 3 + 2 + 1
    assert parsed(record((3, 2), heavy, [(1, 2, 3), (2, 3, 1)])).implied == 1 + 0 + 1
    assert parsed(record((3, 0), heavy)).implied is None  # no bonds, nothing to tell by
    assert parsed(record((1, 0), heavy[:1])).implied == 4
    dioxide = [("O", 0, 0, -1.2, 0), ("C", 0, 0, 0, 0), ("O", 0, 0, 1.2, 0)]
    assert parsed(record((3, 2), dioxide, [(1, 2, 2), (2, 3, 2)])).implied == 0
    monoxide = [("C", 0, 0, 0, 5), ("O", 0, 0, 1.1, 3)]
    assert parsed(record((2, 1), monoxide, [(1, 2, 3)])).implied == 0
    ring = [("C", np.cos(a), np.sin(a), 0, 0) for a in np.arange(6) * np.pi / 3]
    aromatic = [(i + 1, (i + 1) % 6 + 1, 4) for i in range(6)]
    assert parsed(record((6, 6), ring, aromatic)).implied == 6
    kekule = [(i, j, 1 + i % 2) for i, j, _ in aromatic]
    assert parsed(record((6, 6), ring, kekule)).implied == 6


def warned(call, *arguments):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call(*arguments)
    return [str(w.message) for w in found if w.category is UserWarning], result


def test_charges_are_said_once(tmp_path):
    path = tmp_path / "m.sdf"
    ion = record((1, 0), [("N", 0, 0, 0, 3)])
    path.write_text(GOOD + ion + ion)
    said, frames = warned(read_molecules, path)
    assert said == [] and frames[1].info == {"charge": 1}
    [said], _ = warned(Molecules.from_ase, frames)
    assert said.startswith("2 of 3 molecules state a charge or a spin (molecule 1: charge=1)")
    assert "elements and positions only" in said
    [said], _ = warned(structures.sdf, path)
    assert "2 of 3 molecules" in said and "molecule 2: charge 1, 0 unpaired" in said
    path.write_text(record((1, 0), [("O", 0, 0, 0, 0)], (), ["M  RAD  1   1   3", "M  END"]))
    [said], _ = warned(lambda: Molecules.from_ase(read_molecules(path)))
    assert "multiplicity=3" in said


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        ("charge=1", "charge=1"),
        ("charge=-2 spin=1", "charge=-2, spin=1"),
        ("multiplicity=2", "multiplicity=2"),
        ("Charge=1.0", "Charge=1.0"),
        ("total_charge=1 name=a", "total_charge=1"),
        ("charge 1", "charge=1.0"),
        ("charge: +1", "charge=1.0"),
        ("total charge:-1", "charge=-1.0"),
        ("charge=0,mult=3", "multiplicity=3.0"),
        ("Charge: 0, Multiplicity: 1", None),
        ("charge 0 multiplicity 2 of an ion", "multiplicity=2.0"),
        ("no charge", None),
        ("charge: neutral", None),
        ("charge=None", None),
        ("magmom=2.0", "magmom=2.0"),
        ("charge=positive", "charge=positive"),
        ("charge=0 spin=0 multiplicity=1", None),
        ("charge=0.0 spin_multiplicity=1", None),
        ("a plain comment", None),
        ("magmom=0.0 energy=-3.0", None),
        ("", None),
    ],
)
def test_comments_of_xyz(tmp_path, comment, text):
    path = tmp_path / "m.xyz"
    path.write_text(f"2\n{comment}\nO 0 0 0\nH 0 0 1\n" * 2)
    said, _ = warned(lambda: Molecules.from_ase(read_molecules(path)))
    assert len(said) == (text is not None)
    assert (
        text is None or f"2 of 2 molecules state a charge or a spin (molecule 0: {text})" in said[0]
    )


def test_charges_of_atoms_and_calculators():
    def one(**options):
        return warned(Molecules.from_ase, [Atoms("OH", [[0, 0, 0], [0, 0, 1]], **options)])[0]

    assert "initial charges of -1 in all" in one(charges=[-1.2, 0.2])[0]
    assert "initial magnetic moments of 1 in all" in one(magmoms=[1, 0])[0]
    assert one(charges=[-0.4, 0.4], magmoms=[1, -1], info={"name": "a", "charge": None}) == []
    from ase.calculators.emt import EMT

    calculator = EMT()
    assert one(calculator=calculator) == []
    calculator.parameters["charge"] = -1
    assert "charge=-1" in one(calculator=calculator)[0]


def test_periodic_atoms_are_no_molecules():
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=[5, 5, 5], pbc=[False, False, True])
    with pytest.raises(ValueError, match=r"molecule 1 has pbc=\[False, False, True\]"):
        Molecules.from_ase([molecule("H2O"), atoms])


def test_drawings_and_missing_hydrogens(tmp_path):
    path = tmp_path / "m.sdf"
    flat = [("O", 0, 0, 0, 0), ("H", 0.7, 0.6, 0, 0), ("H", -0.7, 0.6, 0, 0)]
    bonds = [(1, 2, 1), (1, 3, 1)]
    path.write_text(GOOD + record((3, 2), flat, bonds, dimension="2D"))
    with pytest.raises(ValueError, match="molecule 1 is a drawing"):
        read_molecules(path)
    [said], _ = warned(structures.sdf, path)
    assert "1 of 2 molecules have 0 for every z" in said and "(molecule 2)" in said
    path.write_text(record((3, 2), flat, bonds, dimension="") * 2 + GOOD)
    [said], _ = warned(read_molecules, path)
    assert "2 of 3 molecules may be drawings (molecule 0: every z is 0" in said
    path.write_text(record((3, 2), flat, bonds) + record((1, 0), flat[:1], (), dimension="2D"))
    [said], _ = warned(read_molecules, path)  # an atom alone is no drawing; its hydrogens lack
    assert "1 of 2 molecules seem to lack hydrogens (molecule 1, O: its bonds leave room" in said
    path.write_text(record((3, 2), [(e, 0, 0, 0, 0) for e, *_ in flat], bonds))
    with pytest.raises(ValueError, match="no coordinates, its 3 atoms are at one place"):
        read_molecules(path)
    heavy = [("C", 0, 0, 0, 0), ("C", 1.5, 0, 0.2, 0)]
    path.write_text(GOOD + record((2, 1), heavy, [(1, 2, 1)]) * 2)
    [said], _ = warned(read_molecules, path)
    assert (
        "2 of 3 molecules seem to lack hydrogens (molecule 1, C2: its bonds leave room for 6"
        in said
    )
    [said], _ = warned(structures.sdf, path)
    assert "2 of 3 molecules seem to lack hydrogens, by their bonds (molecule 2)" in said
    path = tmp_path / "m.xyz"
    path.write_text("2\n\nC 0 0 0\nC 0 0 1.5\n2\n\nN 0 0 0\nN 0 0 1.1\n")
    [said], _ = warned(read_molecules, path)
    assert "1 of 2 molecules seem to lack hydrogens (molecule 0, C2: it has carbon" in said


def test_formats_of_one_molecule(tmp_path):
    """Where ASE reads one molecule, that there may be more is said."""
    path = tmp_path / "m.gen"
    ase.io.write(path, FRAMES[0], format="gen")
    [said], found = warned(read_molecules, path)
    assert len(found) == 1 and "ASE reads one molecule; if the file has more" in said
    path = tmp_path / "m.traj"
    ase.io.write(path, FRAMES)
    said, found = warned(read_molecules, path)
    assert said == [] and same(found, FRAMES)


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\xe4\x0cb\rc")
    assert list(lines(path)) == ["a\n", "\ufffd\x0cb\n", "c"]


@pytest.mark.parametrize(
    ("comment", "stated"),
    [
        ("units=bohr", "units=bohr"),
        ('pos_unit="Bohr" energy=1', "Bohr"),
        ("coordinates in bohr", "bohr"),
        ("length_unit: a0", "a0"),
        ("cell_units=[nm]", "nm"),
        ("coord_unit=au", "au"),
        ("units=angstrom", None),
        ("energy_units=hartree units=kcal/mol", None),
        ("molecule of a bohr radius", None),
        ("polarizability unit: bohr^3", None),
        ("gradient units=bohr-1", None),
        ("wavelength 500 unit=nm", None),
        ("Unit: PM 6", None),
        ("units=bohr converted to angstrom", None),
    ],
)
def test_another_unit_of_length_is_refused(tmp_path, comment, stated):
    path = tmp_path / "m.xyz"
    path.write_text(f"1\nfirst\nH 0 0 0\n2\n{comment}\nO 0 0 0\nH 0 0 1\n")
    if stated is None:
        assert len(read_molecules(path)) == 2
        return
    with pytest.raises(ValueError, match="line 5 must be a comment of positions in angstrom") as e:
        read_molecules(path)
    assert stated in str(e.value)
