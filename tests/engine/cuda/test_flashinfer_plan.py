"""Our direct calls of FlashInfer's modules, compared with the calls of its wrappers and functions.

Nothing is computed, without a GPU.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from daemon.engine.cuda import kernels
from daemon.engine.cuda.arrays import Inputs, Size, SlotSampling, StepArrays, input_fields
from daemon.engine.cuda.attention import FlashInferAttention, Scoring, _Kind
from daemon.engine.cuda.ops import FlashInferOps
from daemon.engine.cuda.workspace import HeadShape
from daemon.engine.request import Request
from daemon.engine.runner import Row
from tests.engine.cuda.test_arrays import make_request

flashinfer = pytest.importorskip("flashinfer")
SHAPE = HeadShape(8, 2, 64, 16)
BF16 = torch.bfloat16
ALIBI = 18  # index in the arguments of a run


class Module:
    """Replaces a compiled module, and records the arguments of its calls."""

    def __init__(self):
        self.plans, self.runs = [], []

    def plan(self, *args):
        self.plans.append(args)
        return [7, 8, 9, 16]

    def paged_run(self, *args):
        self.runs.append(args)

    def ragged_run(self, *args):
        raise AssertionError("not used")


@pytest.fixture
def module(monkeypatch):
    """FlashInfer with one compiled module, and with pageable memory instead of pinned memory."""
    module = Module()
    make_module = flashinfer.prefill.get_batch_prefill_module.__wrapped__  # without its cache
    built = SimpleNamespace(build_and_load=lambda: module)
    monkeypatch.setattr(flashinfer.prefill, "gen_batch_prefill_module", lambda *args: built)
    monkeypatch.setattr(kernels, "load_attention", lambda *args: module)
    for room in (flashinfer.decode, flashinfer.prefill):
        monkeypatch.setattr(room, "get_batch_prefill_module", make_module)
        monkeypatch.setattr(room, "device_support_pdl", lambda device: True)
    monkeypatch.setattr(flashinfer.utils, "device_support_pdl", lambda device: True)
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, pin_memory=False, **k: make(*a, **k))
    return module


@pytest.fixture
def prefill_backend():
    return "fa2"


@pytest.fixture
def scoring():
    return None


@pytest.fixture
def attention(module, prefill_backend, scoring):
    made = FlashInferAttention(
        SHAPE,
        dtype=BF16,
        kv_dtype=BF16,
        device=torch.device("cpu"),
        num_staging_sets=2,
        max_rows=4,
        max_tokens=256,
        scoring=scoring,
        prefill_backend=prefill_backend,
    )
    made.use_pool(torch.zeros(50, 3, 2, 16, 2, 64, dtype=BF16))
    return made


def step(decode):
    """Return inputs of three requests. Decodes are padded to four rows."""
    arrays = StepArrays(8, 512, 16)
    room = Size(256, 4, 4, 4 * 32)
    host = Inputs(*(np.zeros(length, dtype) for _, dtype, length in input_fields(room)))
    rows = []
    for i, n in enumerate((40, 16, 17)):
        request: Request = make_request(list(range(n)), list(range(1 + 3 * i, 4 + 3 * i)), rid=i)
        arrays.assign_slot(i + 1, request, SlotSampling(0.0, -np.inf, 0, 1.0, 0))
        rows.append(Row(request, n - 1, 1, True) if decode else Row(request, n // 2, n - n // 2, True))
    slots = [1, 2, 3]
    size = arrays.decodes(rows, slots, 4, host) if decode else arrays.chunks(rows, slots, host)
    whole = Inputs(*(torch.from_numpy(array) for array in host))
    return whole, whole.cut(size), size


def same(ours, theirs):
    """Assert that the arguments are equal, except the first three: each side has its own workspaces."""
    assert len(ours) == len(theirs) == 19
    for mine, expected in zip(ours[3:], theirs[3:], strict=True):
        assert type(mine) is type(expected)
        assert torch.equal(mine, expected) if torch.is_tensor(mine) else mine == expected


def test_a_decode_plan_equals_the_wrappers_plan(module, attention):
    whole, cut, size = step(decode=True)
    attention.prepare(4, whole, whole)
    [theirs] = module.plans
    attention.plan(cut, cut, size, decode=True, staging_index=1)
    same(module.plans[1], theirs)
    assert module.plans[1][2] is attention._first.decode.pinned[1]


def test_a_decode_reads_the_static_arrays_and_the_shared_workspace(module, attention):
    whole, cut, _ = step(decode=True)
    attention.prepare(4, whole, whole)
    q = torch.zeros(4, 8, 64, dtype=BF16)
    out = torch.empty(q.shape, dtype=BF16)
    attention.attend(1, q, cut, out, decode=True)
    [run] = module.runs
    assert run[10] is out
    assert run[1] is attention._first.decode.workspace
    for given, array in zip(run[7:10], (whole.kv_indptr[:5], whole.kv_indices, whole.last_page_len[:4]), strict=True):
        assert given.data_ptr() == array.data_ptr() and given.shape == array.shape
    assert run[4].data_ptr() == attention.pages(1)[0].data_ptr()


def test_a_chunk_plan_equals_the_wrappers_plan(module, attention):
    _, cut, size = step(decode=False)
    attention.plan(cut, cut, size, decode=False, staging_index=0)  # the wrapper's own, then ours
    theirs, ours = module.plans
    same(ours, theirs)
    assert ours[14] is True  # causal


def test_each_chunk_pass_runs_with_its_own_arrays(module, attention):
    _, first, size = step(decode=False)
    attention.plan(first, first, size, decode=False, staging_index=0)
    _, second, size = step(decode=False)
    attention.plan(second, second, size, decode=False, staging_index=1)
    q, out = torch.zeros(2, size.tokens, 8, 64, dtype=BF16)
    attention.attend(2, q, second, out, decode=False)
    [run] = module.runs
    assert len(module.plans) == 3
    assert run[2] == [7, 8, 9, 16]
    for given, array in zip(
        run[6:10], (second.qo_indptr, second.kv_indptr, second.kv_indices, second.last_page_len), strict=True
    ):
        assert given.data_ptr() == array.data_ptr() and given.shape == array.shape


def same_run(ours, theirs):
    """Assert that two calls of the compiled attention have the same arguments, but for the slopes of ALiBi."""
    assert len(ours) == len(theirs)
    for i, (mine, expected) in enumerate(zip(ours, theirs, strict=True)):
        if mine is None and i == ALIBI:
            continue  # the kernel is compiled without it
        assert type(mine) is type(expected), i
        if torch.is_tensor(mine):
            assert (mine.data_ptr(), mine.shape, mine.stride()) == (
                expected.data_ptr(),
                expected.shape,
                expected.stride(),
            )
        else:
            assert mine == expected, i


def test_a_decode_is_called_as_the_wrapper_calls_it(module, attention):
    whole, cut, _ = step(decode=True)
    attention.prepare(4, whole, whole)
    q, out = torch.zeros(2, 4, 8, 64, dtype=BF16)
    attention.attend(1, q, cut, out, decode=True)
    attention._decode_wrappers[4].run(q, attention.pages(1), out=out)
    same_run(*module.runs)


@pytest.mark.parametrize("prefill_backend", ["fa2", "fa3"])
def test_a_chunk_is_called_as_the_wrapper_calls_it(module, attention, prefill_backend):
    _, cut, size = step(decode=False)
    attention.plan(cut, cut, size, decode=False, staging_index=0)
    q, out = torch.zeros(2, size.tokens, 8, 64, dtype=BF16)
    attention.attend(2, q, cut, out, decode=False)
    wrapper = attention._prefill_wrapper
    wrapper._qo_indptr_buf, wrapper._paged_kv_indptr_buf = cut.qo_indptr, cut.kv_indptr
    wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf = cut.kv_indices, cut.last_page_len
    wrapper.run(q, attention.pages(2), out=out)
    same_run(*module.runs)


WINDOWS = Scoring(0.125, 30.0, (0, 40, 40))
WINDOW_OF_PLAN, WINDOW_OF_RUN = 15, 14


@pytest.mark.parametrize("scoring", [WINDOWS])
@pytest.mark.parametrize("decode", [True, False])
def test_windows_and_caps_are_passed_as_the_wrapper_passes_them(module, attention, decode):
    whole, cut, size = step(decode=decode)
    if decode:
        attention.prepare(4, whole, whole)
    theirs = module.plans[0] if decode else None
    attention.plan(cut, cut, size, decode=decode, staging_index=1)
    theirs = theirs or module.plans[0]
    ours = module.plans[-2:]
    assert [plan[WINDOW_OF_PLAN] for plan in ours] == [39, -1]
    same(ours[0], theirs)
    q, out = torch.zeros(2, len(cut.tokens), 8, 64, dtype=BF16)
    for layer in range(3):
        attention.attend(layer, q, cut, out, decode=decode)
    assert [run[WINDOW_OF_RUN] for run in module.runs] == [-1, 39, 39]
    assert [run[1] is ours[0][1] for run in module.runs] == [False, True, True]  # the workspace of their plan
    assert module.runs[0][1] is ours[1][1]
    wrapper = attention._decode_wrappers[4] if decode else attention._prefill_wrapper
    if not decode:
        wrapper._qo_indptr_buf, wrapper._paged_kv_indptr_buf = cut.qo_indptr, cut.kv_indptr
        wrapper._paged_kv_indices_buf, wrapper._paged_kv_last_page_len_buf = cut.kv_indices, cut.last_page_len
    wrapper.run(q, attention.pages(2), out=out)
    same_run(module.runs[2], module.runs[3])


def test_only_the_pages_in_the_window_are_split():
    kind = _Kind(39, None, None)
    pages = np.array([1, 3, 4, 1000], np.int32)
    assert kind.pages_to_read(pages, 16, 16).tolist() == [1, 3, 4, 4]
    assert _Kind(-1, None, None).pages_to_read(pages, 16, 16) is pages


def test_a_plan_that_differs_from_the_graphs_plan_raises(module, attention):
    whole, cut, size = step(decode=True)
    attention.prepare(4, whole, whole)
    attention._decode_wrappers[4]._cached_module.plan = lambda *args: [7, 8, 10, 16]
    with pytest.raises(RuntimeError, match="captured"):
        attention.plan(cut, cut, size, decode=True, staging_index=0)


@pytest.mark.parametrize(("offset", "prefix"), [(0.0, ""), (1.0, "gemma_")])
def test_norms_are_called_as_flashinfer_calls_them(monkeypatch, offset, prefix):
    calls = []
    functions = {
        f"{prefix}rmsnorm": lambda out, *args: calls.append(("rmsnorm", out.shape, *args)),
        f"{prefix}fused_add_rmsnorm": lambda *args: calls.append(("fused_add_rmsnorm", *args)),
    }
    module = SimpleNamespace(**{"rmsnorm": None, "fused_add_rmsnorm": None} | functions)
    monkeypatch.setattr(flashinfer.norm, "_USE_CUDA_NORM", True)
    monkeypatch.setattr(flashinfer.norm, "get_norm_module", lambda: module, raising=False)
    monkeypatch.setattr(flashinfer.norm, "device_support_pdl", lambda device: True)
    monkeypatch.setattr(flashinfer.utils, "device_support_pdl", lambda device: True)
    for load in ("load_append", "load_silu"):
        monkeypatch.setattr(kernels, load, lambda: SimpleNamespace(append=None, silu_mul=None, gelu_tanh_mul=None))
    ops = FlashInferOps(torch.device("cpu"), offset)
    x, residual, weight = torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(8)
    ops.rms_norm(x, weight, 1e-5)
    getattr(flashinfer, f"{prefix}rmsnorm")(x, weight, eps=1e-5)
    ops.add_rms_norm(x, residual, weight, 1e-5)
    getattr(flashinfer, f"{prefix}fused_add_rmsnorm")(x, residual, weight, eps=1e-5)
    norm, theirs, added, theirs_added = calls
    for ours, expected in ((norm, theirs), (added, theirs_added)):
        assert len(ours) == len(expected)
        assert all(a is b if torch.is_tensor(a) else a == b for a, b in zip(ours, expected, strict=True))
