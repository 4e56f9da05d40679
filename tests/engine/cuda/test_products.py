"""Products by cuBLASLt and the choice of their algorithms, on the CPU over the library of the simulated GPU."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from daemon.engine.cuda import cublaslt, product_choice
from daemon.engine.cuda.cublaslt import (
    ALIGNMENT,
    AlgorithmData,
    CublasError,
    CublasLt,
    HeuristicResult,
    Product,
    Shape,
)
from daemon.engine.cuda.ops import TorchOps
from daemon.engine.cuda.product_choice import LIMITS, Chooser, WeightGroup, fastest, weight_groups
from daemon.engine.cuda.products import ChosenProduct, ChosenProducts, Products
from daemon.engine.cuda.weights import DeviceWeights, Layer, Linear

SOURCE = Path(__file__).parents[3] / "tools" / "simgpu" / "cublaslt.c"
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-shared", "-fPIC")
BF16 = torch.bfloat16
WORKSPACE = 1 << 20
TORCH, ONE_PART, TWO_PARTS = -1, 0, 1
LIMITS_HERE = LIMITS._replace(min_bytes=0, read_bytes=0)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    file = tmp_path_factory.mktemp("cublaslt") / "libcublasLt.so"
    subprocess.run(["cc", *FLAGS, str(SOURCE), "-o", str(file)], check=True)
    return CublasLt(WORKSPACE, str(file))


def aligned(*shape, dtype=BF16):
    """Return an empty tensor whose address is aligned as those of a GPU are."""
    item = torch.empty(0, dtype=dtype).element_size()
    size = torch.Size(shape).numel() * item
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size].view(dtype).view(shape)


def noise(*shape):
    return aligned(*shape).copy_(torch.randn(shape))


def near(got, expected):
    torch.testing.assert_close(got.float(), expected.float(), rtol=2**-7, atol=float(expected.abs().max()) * 2**-8)


# -- the calls


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 64, 32), (7, 48, 264), (33, 128, 64)])
def test_every_algorithm_computes_the_product(library, rows, columns, width, wide):
    x, weight = noise(rows, width), noise(columns, width)
    product, workspace = Product(library, Shape(rows, columns, width, wide)), aligned(WORKSPACE, dtype=torch.uint8)
    algorithms = product.algorithms(8)
    assert [a.workspace_bytes for a in algorithms] == [0, 8 * rows * columns, 0]  # those marked invalid are left out
    for algorithm in algorithms[:2]:
        out = aligned(rows, columns, dtype=torch.float32 if wide else BF16).fill_(torch.nan)
        ChosenProduct(product, algorithm, workspace).compute(x, weight, out)
        near(out, x.float() @ weight.float().t())
    with pytest.raises(CublasError, match=r"cublasLtMatmul failed: cublasStatus_t 15"):
        ChosenProduct(product, algorithms[2], workspace).compute(x, weight, out)


def test_no_algorithm_needs_more_workspace_than_there_is(library):
    small = CublasLt(16, library._lib._name)
    shape = Shape(4, 64, 64)
    assert [len(Product(one, shape).algorithms(8)) for one in (library, small)] == [3, 2]
    assert len(Product(library, shape).algorithms(1)) == 1


@pytest.mark.integration
def test_constants_and_layouts_are_those_of_the_header(tmp_path):
    """The compiler also compares the declarations of the simulated library with those of the header."""
    folders = [f"-I{folder}" for folder in _header_folders()]
    if not folders or shutil.which("cc") is None:
        pytest.skip("no header of cuBLASLt, or no C compiler")
    subprocess.run(["cc", *FLAGS, *folders, str(SOURCE), "-o", str(tmp_path / "lib.so")], check=True)
    named = re.findall(r"(\w+) = (\d+)  # (CUBLAS\w+)", Path(cublaslt.__file__).read_text())
    assert len(named) == 5
    expected = {name: value for _, value, name in named} | {
        "CUDA_R_32F": cublaslt.FLOAT,
        "CUDA_R_16BF": cublaslt.BFLOAT16,
    }
    algorithm, result = "cublasLtMatmulAlgo_t", "cublasLtMatmulHeuristicResult_t"
    members = {"workspaceSize": "workspace_bytes", "state": "state", "wavesCount": "waves"}
    checks = [f"{name} == {value}" for name, value in expected.items()]
    checks += [f"sizeof({algorithm}) == {_size(AlgorithmData)}", f"sizeof({result}) == {_size(HeuristicResult)}"]
    checks += [f"offsetof({result}, {m}) == {getattr(HeuristicResult, ours).offset}" for m, ours in members.items()]
    text = "#include <cublasLt.h>\n#include <stddef.h>\n"
    text += "".join(f'_Static_assert({check}, "{check}");\n' for check in checks)
    (tmp_path / "check.c").write_text(text)
    subprocess.run(["cc", "-std=gnu11", *folders, "-c", "check.c"], cwd=tmp_path, check=True)


def _size(structure):
    return ctypes.sizeof(structure)


def _header_folders():
    """Return the folders with the header of cuBLASLt and with those that it includes."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in nvidia.submodule_search_locations] if nvidia else []
    folders = [*(f for root in roots for f in root.glob("*/include")), *Path("/usr/local").glob("cuda*/include")]
    needed = ("cublasLt.h", "crt/host_defines.h")
    found = [next((folder for folder in folders if (folder / name).exists()), None) for name in needed]
    return [] if None in found else dict.fromkeys(found)


# -- the model's products


@pytest.fixture
def products(library):
    """Return products of three rows, of which those by a weight [64, 32] have an algorithm, and how often it ran."""
    made, calls, by_shape = Products(TorchOps()), [], {}

    class Counted(ChosenProduct):
        def compute(self, x, weight, out):
            calls.append(len(x))
            super().compute(x, weight, out)

    for wide in (False, True):
        product = Product(library, shape := Shape(3, 64, 32, wide))
        by_shape[shape] = Counted(product, product.algorithms(1)[0], torch.empty(0))
    made.chosen = ChosenProducts(by_shape)
    return made, calls


def test_a_shape_with_an_algorithm_is_computed_by_it(products):
    made, calls = products
    x, weight = noise(3, 32), noise(64, 32)
    made.apply(Linear.of(weight, None), x, out := aligned(3, 64, dtype=x.dtype))
    near(out, F.linear(x, weight))
    made.project(x, weight, out := aligned(3, 64, dtype=torch.float32))
    torch.testing.assert_close(out, x.float() @ weight.float().t())
    assert calls == [3, 3]


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        (noise(4, 32), noise(64, 32), None),
        (noise(3, 32), noise(96, 32), None),
        (noise(3, 32), noise(64, 32), noise(64)),
        (noise(6, 32)[::2], noise(64, 32), None),
        (noise(5, 32)[1:4], noise(64, 32), None),
    ],
    ids=["other rows", "other weight", "bias", "gaps between rows", "not aligned"],
)
def test_torch_computes_every_other_product(products, x, weight, bias):
    made, calls = products
    made.apply(Linear.of(weight, bias), x, out := aligned(len(x), len(weight), dtype=x.dtype))
    assert torch.equal(out, F.linear(x, weight, bias))
    made.project(x, weight, out := aligned(len(x), len(weight), dtype=torch.float32))
    torch.testing.assert_close(out, x.float() @ weight.float().t())
    assert set(calls) <= ({3} if bias is not None else set())  # the output layer has no bias


# -- the choice


class Script:
    """A timer that runs the work and returns scripted seconds: of torch, then of each valid algorithm."""

    def __init__(self, *seconds):
        self.seconds = seconds
        self.runs = [0] * len(seconds)
        self._next = count()

    def prepare(self, work):
        at = next(self._next) % len(self.seconds)

        def run():
            work()
            self.runs[at] += 1
            return self.seconds[at]

        return run


def groups(count=3, wide=False):
    return [WeightGroup(("out", "down"), tuple(noise(64, 32) for _ in range(count)), wide)]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({TORCH: 1.0}, TORCH),
        ({TORCH: 1.0, 0: 0.99, 1: 0.985}, TORCH),
        ({TORCH: 1.0, 0: 0.99, 1: 0.97}, 1),
        ({TORCH: 1.0, 0: 0.9, 3: 0.95}, 0),
    ],
)
def test_another_algorithm_must_be_clearly_faster(seconds, best):
    assert fastest(seconds) == best


def test_the_fastest_algorithm_is_chosen_for_each_bucket(library):
    found = Chooser(library, Script(1.0, 1.02, 0.9), LIMITS_HERE).choose(groups(), [8, 16])
    assert set(found.by_shape) == {Shape(8, 64, 32), Shape(16, 64, 32)}
    assert [(c.rows, c.names, c.times) for c in found.choices] == [(16, ("out", "down"), 3), (8, ("out", "down"), 3)]
    assert all(c.by_choice == pytest.approx(0.9 * c.by_torch) for c in found.choices)
    x, weight = noise(8, 32), noise(64, 32)
    found.by_shape[Shape(8, 64, 32)].compute(x, weight, out := aligned(8, 64))
    near(out, F.linear(x, weight))


def test_without_a_faster_algorithm_torch_stays(library):
    found = Chooser(library, Script(1.0, 0.99, 1.2), LIMITS_HERE).choose(groups(), [8])
    assert found.by_shape == {}
    assert found.choices[0].by_choice == found.choices[0].by_torch


def test_a_slow_algorithm_is_measured_once(library):
    timer = Script(1.0, 1.2, 0.9)
    Chooser(library, timer, LIMITS_HERE).choose(groups(), [8])
    assert timer.runs == [5, 1, 5]
    timer = Script(1.0, 1.2, 1.3)
    Chooser(library, timer, LIMITS_HERE).choose(groups(), [8])
    assert timer.runs == [1, 1, 1]


@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "fp32"])
def test_a_wrong_algorithm_is_not_used(library, monkeypatch, caplog, wide):
    compute = Product.compute

    def by_torch(x, out, weight):  # torch has the product with float32 results on GPUs only
        out.copy_(x.float() @ weight.float().t())

    def wrong(self, algorithm, weight, x, out, workspace, stream):
        rows = weight if algorithm.workspace_bytes else x  # the second algorithm reads other rows
        compute(self, algorithm, weight, rows, out, workspace, stream)

    monkeypatch.setattr(Product, "compute", wrong)
    monkeypatch.setattr(product_choice, "_by_torch", by_torch)
    found = Chooser(library, Script(1.0, 0.9), LIMITS_HERE).choose(groups(wide=wide), [8])
    assert found.by_shape[Shape(8, 64, 32, wide)]._algorithm.workspace_bytes == 0
    assert "algorithm 1 of cuBLASLt gives a wrong product" in caplog.text


def test_without_any_algorithm_torch_stays(library, monkeypatch):
    def refuse(self, most):
        raise CublasError("cublasLtMatmulAlgoGetHeuristic", 15)

    monkeypatch.setattr(Product, "algorithms", refuse)
    assert Chooser(library, Script(1.0), LIMITS_HERE).choose(groups(), [8]).by_shape == {}


def test_buckets_after_the_time_limit_stay_with_torch(library, monkeypatch, caplog):
    now = count()
    monkeypatch.setattr("daemon.engine.cuda.product_choice.time.perf_counter", lambda: next(now))
    found = Chooser(library, Script(1.0, 0.9, 0.9), LIMITS_HERE._replace(seconds=2)).choose(groups(), [8, 16, 24, 32])
    assert sorted(shape.rows for shape in found.by_shape) == [24, 32]
    assert "products of up to 16 rows are not measured" in caplog.text


def test_one_measurement_reads_all_weights_until_it_has_read_enough(library):
    weights = groups(3)[0].weights
    size = weights[0].nbytes
    for limits, expected in (
        (LIMITS_HERE, [0]),
        (LIMITS_HERE._replace(read_bytes=5 * size - 1), [0, 1, 2, 0, 1]),
        (LIMITS_HERE._replace(read_bytes=5 * size, products=2), [0, 1]),
    ):
        chosen = product_choice._weights_of_one_run(weights, limits)
        assert [next(i for i, w in enumerate(weights) if w is one) for one in chosen] == expected


def test_weights_are_grouped_by_shape():
    def linear(rows, columns, *, bias=False):
        return Linear.of(noise(rows, columns), noise(rows) if bias else None)

    def layer():
        return Layer(noise(32), linear(64, 32, bias=True), linear(32, 32), noise(32), linear(128, 32), linear(32, 64))

    weights = DeviceWeights(noise(96, 32), [layer(), layer()], noise(32), noise(128, 32))
    found = weight_groups(weights, 0)
    assert [(g.names, len(g.weights), g.wide) for g in found] == [
        (("out",), 2, False),
        (("gate_up",), 2, False),
        (("down",), 2, False),
        (("head",), 1, True),
    ]
    assert [g.names for g in weight_groups(weights, 2 * 128 * 32)] == [("gate_up",), ("head",)]
    square = weights._replace(layers=[layer()._replace(down=linear(32, 32))])
    assert weight_groups(square, 0)[0].names == ("out", "down")


WEIGHTS = DeviceWeights(noise(64, 32), [], noise(32), noise(64, 32))


def test_nothing_is_measured_if_the_operator_turned_it_off(monkeypatch):
    monkeypatch.setattr(product_choice, "CublasLt", None)  # it is not even loaded
    monkeypatch.setenv("LLUMD_PRODUCTS", "torch")
    assert product_choice.choose_products(WEIGHTS, [8], None, LIMITS_HERE).by_shape == {}
    monkeypatch.delenv("LLUMD_PRODUCTS")
    assert product_choice.choose_products(WEIGHTS, [8], None, LIMITS).by_shape == {}  # a small weight


def test_without_the_library_torch_computes_all(monkeypatch, caplog):
    def missing(*_):
        raise OSError("cannot find libcublasLt")

    monkeypatch.delenv("LLUMD_PRODUCTS", raising=False)
    monkeypatch.setattr(product_choice, "CublasLt", missing)
    assert product_choice.choose_products(WEIGHTS, [8], None, LIMITS_HERE).by_shape == {}
    assert "cannot find libcublasLt" in caplog.text
