"""Runs a Gluon kernel without a GPU: its own source, with a model in the place of the language.

Nothing interprets Gluon, but what it compiles is Python. So the functions of a kernel's module are run as they stand,
one program after another, on torch tensors; layouts are ignored. What is modelled is what a kernel for Hopper can get
wrong beside its arithmetic, by the PTX ISA's chapters on mbarrier, cp.async.bulk.tensor and wgmma:

* Shared memory holds NaN where nothing was written. A TMA copy writes NaN at once, and its box when its barrier's phase
  completes; what lies outside the tensor is zero. Refused are copies into what a product may still read, or a copy is
  still to write.
* A barrier's phase completes when it has had its arrivals, and as many bytes as it was told to expect. That happens as
  late as it may, when it is waited for, or with ``eager`` as soon as it may. A wait for a phase that never completes is
  an error, and so are more bytes than expected.
* A product is read from shared memory when it is issued. Sums cannot be read before a wait for all products.
* Integers divide as the GPU does: towards zero. Loads and stores outside a tensor are errors.
"""

import ast
import itertools
import types
from pathlib import Path

import torch

MAX_INT = 2**31


class ModelError(Exception):
    """What on a GPU would be a race, a deadlock, or a result of something not there yet."""


class Int(int):
    """A 32-bit integer in a register."""

    def __floordiv__(self, other):
        return NotImplemented if isinstance(other, torch.Tensor) else Int(abs(self) // other * (1 if self >= 0 else -1))

    def __mod__(self, other):
        return NotImplemented if isinstance(other, torch.Tensor) else Int(self - self // other * other)


def _exact(name):
    """An operator of Int whose result is one again."""
    plain = getattr(int, name)

    def operator(self, other):
        result = NotImplemented if isinstance(other, torch.Tensor) else plain(self, other)
        if result is not NotImplemented and not -MAX_INT <= result < MAX_INT:
            raise ModelError(f"{result} does not fit 32 bits")
        return result if result is NotImplemented else Int(result)

    return operator


for _name in ("add", "sub", "mul", "and"):
    setattr(Int, f"__{_name}__", _exact(f"__{_name}__"))
    setattr(Int, f"__r{_name}__", _exact(f"__r{_name}__"))


class Pointer:
    """Into the memory of a tensor, at one place or several."""

    def __init__(self, tensor, at=0):
        self.memory = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        self.memory = self.memory[tensor.storage_offset() :][: tensor.numel()]
        self.tensor, self.at = tensor, at
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        return Pointer(self.tensor, self.at + offset)

    def places(self, mask):
        """Where it points [any shape], and where that is to be read or written."""
        at = torch.as_tensor(self.at)
        on = torch.as_tensor(True if mask is None else mask).broadcast_to(at.shape)
        if bool((on & ((at < 0) | (at >= len(self.memory)))).any()):
            raise ModelError("a load or store outside its tensor")
        return torch.where(on, at, 0), on


class Slot:
    """A part of shared memory, or another view of it."""

    def __init__(self, data, state):
        self.data, self.state = data, state
        self.dtype = data.dtype

    def index(self, i):
        if not 0 <= i < len(self.data):
            raise ModelError(f"buffer {i} of {len(self.data)}")
        return Slot(self.data[i], self.state[i])

    def slice(self, start, length):
        return Slot(self.data[start : start + length], self.state)

    def reshape(self, shape):
        return Slot(self.data.view(shape), self.state)

    def permute(self, order):
        return Slot(self.data.permute(order), self.state)


class Barrier:
    """An mbarrier: ``phase`` is the first that is not complete."""

    def __init__(self):
        self.count = None

    def check(self):
        if self.count is None:
            raise ModelError("a barrier before it was initialized, or after it was invalidated")

    def complete(self):
        """Completes the phase if it may be."""
        if self.arrivals < self.count or sum(size for size, _ in self.copies) != self.bytes:
            return False
        for _, land in self.copies:
            land()
        self.phase, self.arrivals, self.bytes, self.copies = self.phase + 1, 0, 0, []
        return True


class Program:
    """What the kernel's module finds instead of the language, for one program of a grid."""

    def __init__(self, place, grid, eager):
        self.place, self.grid, self.eager = place, grid, eager
        self.barriers, self.products = [], []
        self.mbarrier = types.SimpleNamespace(
            MBarrierLayout=lambda: None, init=self.init, expect=self.expect, wait=self.wait, invalidate=self.invalidate
        )
        self.language = types.SimpleNamespace(
            int64=torch.int64, float32=torch.float32, constexpr=None,
            program_id=lambda axis: Int(place[axis]), num_programs=lambda axis: Int(grid[axis]),
            arange=lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            cdiv=lambda a, b: (a + b - 1) // b, cast=lambda number, dtype: int(number), static_range=range,
            where=self.where, load=self.load, store=self.store, allocate_shared_memory=self.allocate,
            permute=self.permute, convert_layout=lambda value, layout: value, SliceLayout=lambda dim, parent: None,
            NVMMADistributedLayout=lambda *_: None, BlockedLayout=lambda *_: None,
        )  # fmt: skip

    # ---- registers and global memory ----

    def where(self, condition, yes, no):
        return torch.where(condition, yes, no) if isinstance(condition, torch.Tensor) else yes if condition else no

    def load(self, pointer, mask=None, other=None):
        at, on = pointer.places(mask)
        loaded = pointer.memory[at.long()]
        loaded = loaded if mask is None else torch.where(on, loaded, other).to(loaded.dtype)
        return loaded if loaded.dim() else Int(loaded)

    def store(self, pointer, value, mask=None):
        at, on = pointer.places(mask)
        if len(at[on].unique()) != int(on.sum()):
            raise ModelError("two stores to one place")
        pointer.memory[at[on].long()] = value[on]

    def permute(self, value, order):
        if not isinstance(value, torch.Tensor):
            raise ModelError("sums are read before all products were waited for")
        return value.permute(order)

    # ---- shared memory ----

    def allocate(self, dtype, shape, layout):
        if dtype == torch.int64:
            self.barriers += [Barrier() for _ in range(shape[0])]
            return types.SimpleNamespace(index=self.barriers[-shape[0] :].__getitem__)
        states = [types.SimpleNamespace(readers=0, writers=0) for _ in range(shape[0])]
        return Slot(torch.full(shape, float("nan"), dtype=dtype), states)

    def init(self, barrier, count):
        if barrier.count is not None:
            raise ModelError("a barrier is initialized twice")
        barrier.count, barrier.phase, barrier.arrivals, barrier.bytes, barrier.copies = count, 0, 0, 0, []

    def invalidate(self, barrier):
        barrier.check()
        if barrier.arrivals or barrier.copies:
            raise ModelError("a barrier is invalidated that something is still to arrive at")
        barrier.count = None

    def expect(self, barrier, size, pred=True):
        barrier.check()
        if pred:
            barrier.arrivals, barrier.bytes = barrier.arrivals + 1, barrier.bytes + size
            if barrier.arrivals > barrier.count:
                raise ModelError("more arrivals than the phase has")

    def wait(self, barrier, parity):
        barrier.check()
        if barrier.phase & 1 == parity and not barrier.complete():
            raise ModelError("a wait for a phase that never completes")

    def load_box(self, descriptor, corner, barrier, slot, pred=True):
        barrier.check()
        if not pred:
            return
        if slot.state.readers or slot.state.writers:
            raise ModelError("a copy into a buffer that is still read or written")
        if list(slot.data.shape) != list(descriptor.block_shape) or slot.dtype != descriptor.dtype:
            raise ModelError(f"a box of {descriptor.block_shape} into a buffer of {list(slot.data.shape)}")
        box = read_box(descriptor, corner)
        slot.data.fill_(float("nan"))
        slot.state.writers += 1

        def land():
            slot.data.copy_(box)
            slot.state.writers -= 1

        barrier.copies.append((box.numel() * box.element_size(), land))
        if sum(size for size, _ in barrier.copies) > barrier.bytes:
            raise ModelError("more bytes than the barrier expects")
        if self.eager:
            barrier.complete()

    # ---- products ----

    def warpgroup_mma(self, a, b, sums, is_async):
        assert is_async
        for slot in (a, b):
            slot.state.readers += 1
        self.products.append((a.state, b.state))
        value = sums.value if isinstance(sums, types.SimpleNamespace) else sums
        return types.SimpleNamespace(value=value + a.data.float() @ b.data.float())

    def warpgroup_mma_wait(self, num_outstanding, deps):
        while len(self.products) > num_outstanding:
            for state in self.products.pop(0):
                state.readers -= 1
        (sums,) = deps
        if self.products or not isinstance(sums, types.SimpleNamespace):
            return sums
        return sums.value

    def end(self):
        if self.products or any(barrier.count is not None for barrier in self.barriers):
            raise ModelError("the program ends with products under way or barriers in use")


class Descriptor:
    """A TensorDescriptor as the kernel sees it."""

    def __init__(self, host):
        self.memory, self.shape, self.strides = Pointer(host.base).memory, host.shape, host.strides
        self.block_shape, self.dtype, self.layout = host.block_shape, host.base.dtype, host.layout
        inner = self.block_shape[-1] * host.base.element_size()
        if inner != host.layout.swizzle_byte_width or host.layout.rank != len(self.shape):
            raise ModelError(f"boxes of {self.block_shape} with {host.layout}")


def read_box(descriptor, corner):
    """The numbers of a box, zeros where it reaches beyond the tensor."""
    at, inside = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    sizes = zip(corner, descriptor.shape, descriptor.strides, descriptor.block_shape, strict=True)
    for first, size, stride, length in sizes:
        index = first + torch.arange(length)
        at = at[..., None] + index * stride
        inside = inside[..., None] & (index >= 0) & (index < size)
    at, inside = at[0], inside[0]
    return torch.where(inside, descriptor.memory[torch.where(inside, at, 0)], 0)


class Model:
    """A kernel of a module, to be called as the compiled one is: ``kernel[grid](...)``.

    Args:
        module: whose functions run.
        edits: (old, new) pieces of its source, to break it.
        others: functions it takes from elsewhere, by name.
    """

    def __init__(self, module, name, others, eager=False, edits=()):
        source = Path(module.__file__).read_text()
        for old, new in edits:
            assert source.count(old) >= 1, old
            source = source.replace(old, new)
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        for function in tree.body:
            function.decorator_list, function.returns = [], None
            for argument in function.args.args:
                argument.annotation = None
        self.code = compile(tree, module.__file__, "exec")
        self.name, self.others, self.eager = name, others, eager

    def __getitem__(self, grid):
        def run(*arguments, num_warps, **named):
            arguments = [self._argument(value) for value in arguments]
            for place in itertools.product(*map(range, grid)):
                program = Program(place, grid, self.eager)
                space = {
                    "gl": program.language, "mbarrier": program.mbarrier, "load_box": program.load_box,
                    "warpgroup_mma": program.warpgroup_mma, "warpgroup_mma_wait": program.warpgroup_mma_wait,
                }  # fmt: skip
                for name, function in self.others.items():
                    space[name] = types.FunctionType(function.__code__, {"tl": program.language})
                exec(self.code, space)
                space[self.name](*arguments, **named)
                program.end()

        return run

    def _argument(self, value):
        if isinstance(value, torch.Tensor):
            return Pointer(value)
        return Descriptor(value) if hasattr(value, "block_shape") else Int(value) if type(value) is int else value
