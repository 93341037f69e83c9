# SPDX-License-Identifier: MIT
"""Steps done tile by tile have the bits of torch's own class, and what is not proven to have them is left to it."""

import copy
import ctypes
import json

import numpy as np
import pytest
import torch

from flowcheck.step_record import Step
from tests.updater.test_optimizer import SHAPES, make_plan
from updater import blocks
from updater.blocks import Blocks
from updater.model_state import ModelState

# Where vector loops and tiles begin and end, and what lies between.
SIZES = [0, 1, 7, 8, 9, *range(31, 66), 127, 255, 256, 257, 511, 513, 1003]
CASES = {
    "SGD": [
        {},
        {"weight_decay": 0.01},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.8, "nesterov": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True},
        {"momentum": 1, "dampening": 1, "maximize": True},
    ],
    "Adam": [
        {},
        {"weight_decay": 0.1},
        {"betas": (0.5, 0.9), "eps": 1e-3, "maximize": True, "weight_decay": 0.1},
        {"betas": (1e-5, 0.99), "eps": 0},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
    ],
    "AdamW": [
        {},
        {"weight_decay": 0},
        {"betas": (0.4, 0.95), "weight_decay": 1, "maximize": True},
        {"betas": (0.8, 0.0)},
    ],
}
ALL = [(kind, form, options) for kind, cases in CASES.items() for form in (None, True) for options in cases]

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch itself steps here"
)


def words(tensor):
    return tensor.detach().contiguous().view(torch.int32)


def odd_values(count, generator):
    """Numbers of all sizes, with every kind that is no ordinary one among them."""
    exponents = torch.randint(0, 1 << 31, (count,), generator=generator, dtype=torch.int64)
    wild = (exponents * 2 + torch.randint(0, 2, (count,), generator=generator)).to(torch.int32).view(torch.float32)
    values = torch.randn(count, generator=generator)
    values[::3] *= 1e-7
    for begin, step, value in (
        (0, 11, 0.0),
        (1, 13, -0.0),
        (2, 17, 1e-42),
        (3, 53, float("inf")),
        (4, 59, -float("inf")),
    ):
        values[begin::step] = value
    values[5::61] = float("nan")
    values[6::23] = wild[6::23]
    return values


def ordinary(count, generator):
    return torch.randn(count, generator=generator) / 100


class Pair:
    """The same parameters, views at odd places, in two optimizers: torch's own, and ours to be stepped by `Blocks`."""

    def __init__(self, kind, form, options, sizes, seed=0, lr=0.01):
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes = sizes
        flat = torch.randn(sum(sizes) + 3, generator=self.generator)
        flat[7::101] = odd_values(len(flat), self.generator)[7::101]
        self.torch, self.ours = (
            getattr(torch.optim, kind)(
                [{"params": group, **options, "lr": lr / number} for number, group in enumerate(groups, 1)],
                foreach=form,
            )
            for groups in (self._groups(flat.clone()) for _ in range(2))
        )
        self.blocks = Blocks(self.ours)

    def _groups(self, flat):
        parameters = [torch.nn.Parameter(part) for part in flat[3:].split(self.sizes)]
        return parameters[::2], parameters[1::2]

    def parameters(self):
        return [[p for group in of.param_groups for p in group["params"]] for of in (self.torch, self.ours)]

    def set(self, **values):
        for optimizer in (self.torch, self.ours):
            for group in optimizer.param_groups:
                group.update({name: value for name, value in values.items() if name in group})

    def step(self, values=odd_values, scale=None, without=None):
        """Step both by one gradient, at another odd place; return whether ours was stepped by `Blocks`."""
        flat = values(sum(self.sizes) + 1, self.generator)
        before = words(flat).clone()
        scaled = flat.clone() if scale is None else flat * torch.tensor(scale)
        for parameters, gradient in zip(self.parameters(), (scaled, flat), strict=True):
            parts = gradient[1:].split([parameter.numel() for parameter in parameters])
            for number, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
                parameter.grad = None if number == without else part.view_as(parameter)
        self.torch.step()
        done = self.blocks.step(scale)
        assert torch.equal(words(flat), before)
        return done

    def same(self):
        for a, b in zip(*self.parameters(), strict=True):
            if not torch.equal(words(a), words(b)):
                return False
            ours, theirs = self.ours.state[b], self.torch.state[a]
            if ours.keys() != theirs.keys() or not all(torch.equal(words(ours[k]), words(theirs[k])) for k in theirs):
                return False
        return True


@pytest.mark.parametrize(("kind", "form", "options"), ALL)
def test_every_bit_is_that_of_torchs_class(kind, form, options):
    pair = Pair(kind, form, options, SIZES)
    for number in range(8):
        # As schedulers do; the third step passes over a parameter, whose count then stays behind.
        pair.set(lr=[0.01, 1, 3e-5, 0.0][number % 4], eps=10.0 ** -(number + 1))
        assert pair.step(scale=[None, 0.37, 1e-4][number % 3], without=20 if number == 2 else None)
        assert pair.same(), number


@pytest.mark.parametrize(("kind", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_what_varies_may_begin_and_end(kind, options):
    """Weight decay, momentum and betas that come, change and go between steps."""
    pair = Pair(kind, None, options, [300, 41, 5])
    for values in (
        {},
        {"weight_decay": 0.3, "betas": (0.3, 0.9)},
        {"momentum": 0.0, "weight_decay": 0, "maximize": True},
        {"momentum": 0.95, "betas": (0.99, 0.5), "dampening": 0.5},
    ):
        pair.set(**values)
        for _ in range(2):
            assert pair.step() and pair.same(), values


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
def test_threads_and_large_parameters_change_no_bit(kind, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        pair = Pair(kind, None, CASES[kind][-1], [70_003, 5, 200_001])
        for _ in range(3):
            assert pair.step() and pair.same()
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, True])
@pytest.mark.parametrize("kind", CASES)
def test_many_steps_of_many_elements(kind, form):
    for options in CASES[kind]:
        pair = Pair(kind, form, options, [1_000_003, 4097, 33])
        for number in range(40):
            pair.set(lr=0.01 / (1 + number))
            assert pair.step(ordinary)  # by odd ones nothing would soon be left but NaN
        assert pair.same()


@pytest.mark.parametrize("vectors", blocks._tiles.VECTORS if blocks._tiles else [])
@pytest.mark.parametrize("kind", CASES)
def test_every_width_of_vectors_gives_the_same_bits(monkeypatch, kind, vectors):
    pair, step = Pair(kind, None, CASES[kind][-1], SIZES), blocks._tiles.step
    assert pair.step(ordinary)
    monkeypatch.setattr(blocks, "_tiles", Tiles(lambda *args: step(*args, vectors)))
    for _ in range(3):
        assert pair.step(ordinary) and pair.same()


class Tiles:
    """What `blocks` takes for `_tiles`."""

    def __init__(self, step):
        self.step = step


@pytest.mark.parametrize("place", ["parameter", "first", "second"])
@pytest.mark.parametrize("number", [0, 77, 2000])
def test_one_other_bit_anywhere_is_noticed(monkeypatch, place, number):
    """Kernels of which one element has one other bit are not used."""
    real = blocks._tiles.step

    def step(rows, *args):
        real(rows, *args)
        row = [row for row in rows if row["count"] > number][-1]
        ctypes.c_uint32.from_address(row[place] + 4 * number).value ^= 1

    root = blocks._root.__wrapped__
    kind = blocks._kind(optimizer := torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]), optimizer.param_groups[0])
    assert root(kind) is not None
    monkeypatch.setattr(blocks, "_tiles", Tiles(step))
    assert root(kind) is None


def test_roots_of_another_kind_are_noticed():
    """IEEE's differ from MKL's in one element of a hundred, or more."""
    numbers = torch.rand(100_000)
    if torch.equal(numbers.sqrt(), torch.from_numpy(np.sqrt(numbers.numpy()))):
        pytest.skip("torch takes roots as IEEE does here")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])
    kind = blocks._kind(optimizer, optimizer.param_groups[0])
    assert not blocks._agrees(kind, 0) and blocks._agrees(kind, blocks._mkl("vmsSqrt"))


def _float64(pair):
    for parameters in pair.parameters():
        for parameter in parameters:
            parameter.data = parameter.data.double()
    return lambda n, g: torch.randn(n, generator=g, dtype=torch.float64)


def _turned(pair):
    for parameters in pair.parameters():
        parameters[1].data = parameters[1].data.reshape(16, 16).t()


def _full(pair):
    for optimizer in (pair.torch, pair.ours):
        next(iter(optimizer.state.values()))["step"].fill_(float(1 << 24))


LEFT = {
    "amsgrad": lambda pair: None,
    "fused": lambda pair: pair.set(fused=True, foreach=None),
    "no average": lambda pair: pair.set(betas=(0.0, 0.9)),
    "tensor": lambda pair: pair.set(lr=torch.tensor(0.01)),
    "double": _float64,
    "turned": _turned,
    "full": _full,
    "missing": None,
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_not_done_here_is_left_to_torch_untouched(monkeypatch, why):
    values, pair = ordinary, Pair("AdamW", None, {"amsgrad": why == "amsgrad"}, [41, 5, 256])
    if why == "full":
        assert pair.step(values)
    if why == "missing":
        monkeypatch.setattr(blocks, "_tiles", None)
    else:
        values = LEFT[why](pair) or values
    before = copy.deepcopy([p.detach() for p in pair.parameters()[1]])
    counts = [float(values["step"]) for values in pair.ours.state.values()]
    assert not pair.step(values)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.parameters()[1], strict=True))
    assert counts in ([], [float(values["step"]) for values in pair.ours.state.values()])
    if why != "double":  # `same` compares words of 32 bits
        pair.ours.step()
        assert pair.same()


def test_a_number_that_is_no_float32_is_torchs_to_refuse():
    pair = Pair("SGD", None, {"weight_decay": 0.1}, [100], lr=1e39)
    before = pair.parameters()[1][0].detach().clone()
    pair.torch.step = lambda: None
    assert not pair.step()
    assert torch.equal(words(pair.parameters()[1][0]), words(before))
    with pytest.raises(RuntimeError, match="overflow"):
        pair.ours.step()


@pytest.mark.parametrize("form", ["default", "foreach", "fused"])
@pytest.mark.parametrize(("kind", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("Adagrad", {})])
def test_the_gradient_is_read_where_it_lies(monkeypatch, kind, form, options):
    plan = make_plan(kind, form, {"lr": 0.1, **options}, "float32")
    state, slot = ModelState(plan), np.zeros(plan.slot_bytes, np.uint8)
    state.load_model({name: torch.ones(value.shape) for name, value in state.model.items()}, "the test")
    found = []

    def spied(of, name, addresses):
        real = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args: (found.extend(addresses(*args)), real(*args))[1])

    spied(
        state.optimizer, "step", lambda: [p.grad.data_ptr() for p in state._parameters.values() if p.grad is not None]
    )
    real = blocks._tiles.step
    rooted = state._blocks.root  # proven before the spy listens
    monkeypatch.setattr(
        blocks, "_tiles", Tiles(lambda rows, *args: (found.extend(r["gradient"] for r in rows), real(rows, *args)))
    )
    said = [None, Step(2, clip_coefficient=0.5)] if rooted is not None else [None]
    for step in said:
        found.clear()
        state.step(slot, plan.revision(1), step)
        assert len(found) == len(SHAPES) - 1  # one is in no bucket
        assert all(slot.ctypes.data <= address < slot.ctypes.data + slot.nbytes for address in found)


@pytest.mark.parametrize("form", ["default", "foreach", "fused"])
@pytest.mark.parametrize(
    "said",
    [
        {"clip_coefficient": 0.3},
        {"clip_value": 0.4},
        {"clip_coefficient": 0.3, "clip_value": 0.2},
        {"scale": 1234.5},
        {"scale": 1024.0, "clip_coefficient": 0.7, "clip_value": 0.5},
        {"scale": 1024.0, "skipped": True},
        {"skipped": True},
    ],
    ids=json.dumps,
)
def test_what_came_before_the_step_has_torchs_bits(form, said):
    """A trainer that unscales, clips and skips, by hand; the slot is left as it was."""
    plan = make_plan("SGD", form, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, "float32")
    generator = torch.Generator().manual_seed(5)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    truth = {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}
    flag = {} if form == "default" else {form: True}
    optimizer = torch.optim.SGD(
        [{"params": [truth["a"], truth["b"]], "lr": 0.1}, {"params": [truth["d"], truth["c"]], "lr": 0.05}],
        momentum=0.9, nesterov=True, **flag,
    )  # fmt: skip
    state = ModelState(plan)
    state.load_model({**values, "tied": values["a"]}, "the test")
    for number in range(4):
        slot = torch.randn(plan.slot_bytes // 4, generator=generator).numpy().view(np.uint8)
        before = slot.copy()
        step = Step(number + 1, **(said if number % 2 else {}))
        for name, gradient in state._gradients(slot.copy(), plan.revision(1)):
            truth[name].grad = gradient
        gradients = [p.grad for p in truth.values() if p.grad is not None]
        if step.scale is not None:
            inverse = torch.tensor(step.scale).double().reciprocal().float()
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, torch.zeros(()), inverse)
        if step.clip_coefficient is not None:
            torch._foreach_mul_(gradients, torch.tensor(step.clip_coefficient))
        if step.clip_value is not None:
            torch.nn.utils.clip_grad_value_(truth.values(), step.clip_value)
        if not step.skipped:
            optimizer.step()
        if not (
            step.skipped and step.scale is not None and form == "fused"
        ):  # a skipped step of that form still has a say
            state.step(slot, plan.revision(1), step)
        assert np.array_equal(slot, before)
        assert all(torch.equal(words(state.model[name]), words(value)) for name, value in truth.items()), number
