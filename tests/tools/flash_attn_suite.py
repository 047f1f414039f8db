"""Runs flash-attn's own tests of packed sequences against ``compat``, on the CPU.

    python tests/tools/flash_attn_suite.py CHECKOUT [--sample N] [--first K] [--minutes M] [-x …]

CHECKOUT is a clone of https://github.com/Dao-AILab/flash-attention, 2.8 or so; needs einops. Their
tests/test_flash_attn.py runs unchanged: a stand-in package ``flash_attn`` gives it our function,
and device "cuda" means the CPU. Selected are the tests that call the function on packed sequences,
with the parameters that we serve: no causal or local mask, no ALiBi, no softcap. Their helpers
``pad_input`` and ``unpad_input`` come from the checkout. Two of their helpers are replaced:
``normalize_flash_attn_S`` rescales what their kernel stores; our S_dmask is normalised already. And
their bound of 0.01 on the dropped fraction is 1.3 standard deviations for the shortest sequences,
which holds for the draw of their generator: a fraction within 4 standard deviations passes too.

All 7,011 tests take hours on a CPU, so they come in a shuffled order that is the same everywhere:
any stretch of it is an even sample of their parameters. --sample N keeps N tests of that order from
the Kth on (--first, default 0), --minutes M starts none after M minutes; the summary says where to
go on. --longest, --widths keep the sequences and head widths up to N, of a list; other options go
to pytest. The summary counts what ran, the fewest tests that any value of a parameter got, what was
left out, and why.
"""

import argparse
import importlib.util
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
from torch.overrides import TorchFunctionMode

from attnpool_kernels.compat import flash_attn_varlen_func

TESTS = (
    "test_flash_attn_varlen_output",
    "test_flash_attn_varlen_qkvpacked",
    "test_flash_attn_varlen_deterministic",
    "test_flash_attn_bwd_varlen_overflow",
)
OFF = {"causal": False, "local": False, "alibi": False, "softcap": 0.0}
NOT_OURS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_with_kvcache",
)


class CudaIsCpu(TorchFunctionMode):
    """device="cuda" in a call of torch means the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        args = tuple("cpu" if isinstance(x, str) and x.startswith("cuda") else x for x in args)
        return function(*args, **kwargs)


def kvpacked(q, kv, *arguments, **options):
    return flash_attn_varlen_func(q, *kv.unbind(1), *arguments, **options)


def qkvpacked(qkv, cu_seqlens, max_seqlen, *arguments, **options):
    boundaries = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return flash_attn_varlen_func(*qkv.unbind(1), *boundaries, *arguments, **options)


def not_ours(*_, **__):
    raise NotImplementedError("not a function of packed sequences")


def stand_in(checkout: Path) -> dict[str, ModuleType]:
    """The package ``flash_attn`` as far as their test file imports it."""
    package = ModuleType("flash_attn")
    package.__path__ = []
    package.flash_attn_varlen_func = flash_attn_varlen_func
    package.flash_attn_varlen_kvpacked_func = kvpacked
    package.flash_attn_varlen_qkvpacked_func = qkvpacked
    for name in NOT_OURS:
        setattr(package, name, not_ours)
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._get_block_size_n, interface.USE_TRITON_ROCM = not_ours, False
    layers, rotary = ModuleType("flash_attn.layers"), ModuleType("flash_attn.layers.rotary")
    layers.__path__, rotary.apply_rotary_emb = [], not_ours
    spec = importlib.util.spec_from_file_location(
        "flash_attn.bert_padding", checkout / "flash_attn" / "bert_padding.py"
    )
    padding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(padding)
    return {x.__name__: x for x in (package, interface, layers, rotary, padding)}


class Selection:
    """Narrows the parameters before pytest multiplies them: the whole file has 10^6 tests."""

    def __init__(self, longest, widths, sample, first, minutes):
        self.longest, self.widths, self.minutes = longest, widths, minutes
        self.sample, self.first = sample, first
        self.left_out, self.outcomes, self.values = Counter(), Counter(), Counter()
        self.begin, self.late = time.monotonic(), 0

    def pytest_pycollect_makeitem(self, collector, name, obj):
        return None if name in TESTS else []

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc):
        marks = metafunc.definition.own_markers
        for i, mark in enumerate(marks):
            if mark.name == "parametrize":
                names, values = mark.args
                kept = [value for value in values if self.keeps(names, value)]
                marks[i] = pytest.mark.parametrize(names, kept).mark

    def keeps(self, names, value):
        why = None
        if names in OFF and value != OFF[names]:
            why = f"{names}: refused by name"
        elif names.startswith("seqlen"):
            lengths = value if isinstance(value, tuple) else (value,)
            why = f"longer than {self.longest}" if max(lengths) > self.longest else None
        elif names == "d" and self.widths:
            why = "other widths" if value not in self.widths else None
        self.left_out[why] += why is not None
        return why is None

    def pytest_collection_modifyitems(self, config, items):
        self.collected = len(items)
        items.sort(key=lambda item: item.nodeid)
        random.Random(0).shuffle(items)
        last = len(items) if self.sample is None else self.first + self.sample
        kept = items[self.first : last]
        config.hook.pytest_deselected(items=items[: self.first] + items[last:])
        items[:] = kept
        for item in items:
            self.values.update(dict.fromkeys(parameters(item), 0))
        if items:
            items[0].module.normalize_flash_attn_S = lambda weights, *_, **__: weights
            self.fraction = getattr(items[0].module, "get_dropout_fraction", None)

    def pytest_runtest_protocol(self, item, nextitem):
        late = time.monotonic() - self.begin > 60 * self.minutes
        self.late += late
        return True if late else None  # True: done with it

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.values.update(parameters(item))
        p = item.callspec.params.get("dropout_p", 0.0)
        item.module.get_dropout_fraction = lambda *args, **kw: self.likely(p, *args, **kw)
        with CudaIsCpu():
            return (yield)

    def likely(self, p, mask, query_padding_mask, key_padding_mask, **options):
        fraction = self.fraction(mask, query_padding_mask, key_padding_mask, **options)
        pairs = query_padding_mask.sum(1) * key_padding_mask.sum(1)
        deviation = (p * (1 - p) / (mask.shape[1] * pairs.sum())) ** 0.5
        return fraction.new_tensor(p) if abs(fraction - p) <= 4 * deviation else fraction

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.skipped:
            self.outcomes[report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter):
        write = terminalreporter.write_line
        write(f"collected {self.collected} tests of {', '.join(TESTS)}")
        ran = sum(self.outcomes.values())
        outcomes = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        write(f"ran {ran} in a shuffled order from {self.first} on: {outcomes or 'none'}")
        if ran and self.values:
            name, value, test = min(self.values, key=self.values.get)
            fewest = min(self.values.values())
            write(f"each value of a parameter in {fewest} tests or more ({test}, {name}={value})")
        if self.late:
            write(
                f"{self.late} more after {self.minutes:g} minutes; next: --first {self.first + ran}"
            )
        for why, values in self.left_out.items():
            if why is not None:
                write(f"left out before multiplication: {values} parameter values ({why})")


def parameters(item):
    """(parameter, value, test) of every parameter of a test."""
    name = item.name.partition("[")[0]
    return [(key, value, name) for key, value in item.callspec.params.items()]


def run(checkout: Path, selection: Selection, options: tuple[str, ...]) -> int:
    """pytest's exit status; what happened is in ``selection``."""
    file = checkout / "tests" / "test_flash_attn.py"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(total_memory=memory)
    with (
        mock.patch.dict(sys.modules, stand_in(checkout)),
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        mock.patch("torch.cuda.get_device_properties", return_value=properties),
    ):
        status = pytest.main(
            [
                str(file),
                "-c",
                os.devnull,
                "--rootdir",
                str(file.parent),
                "-p",
                "no:cacheprovider",
                "-q",
                *options,
            ],
            plugins=[selection],
        )
    return int(status)


def why_not(checkout: Path) -> str:
    """Why their tests cannot run here; "" if they can."""
    for file in ("tests/test_flash_attn.py", "flash_attn/bert_padding.py"):
        if not (checkout / file).is_file():
            return f"no checkout of flash-attention: {checkout / file} is missing"
    return "" if importlib.util.find_spec("einops") else "einops is not installed"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--widths", type=lambda x: tuple(map(int, x.split(","))), default=())
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="K")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M")
    arguments, options = parser.parse_known_args()
    chosen = vars(arguments)
    checkout = chosen.pop("checkout")
    if reason := why_not(checkout):
        parser.error(reason)
    return run(checkout, Selection(**chosen), tuple(options))


if __name__ == "__main__":
    sys.exit(main())
