"""Counts the bytes of tensors as an allocator would, while code runs on tensors that have no values."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorConverter, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hbat_lightning.memory.kernels import REPLAYED, workspace

aten = torch.ops.aten
_ENGINE = "_engine_run_backward"


class Category(StrEnum):
    """What memory is for."""

    BASE = "base weights"
    CONSTANTS = "quantisation constants"
    ADAPTERS = "adapters"
    REFERENCE = "reference and anchor"
    REWARD = "reward model"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer state"
    IMPORTANCE = "importance"
    CACHE = "KV cache"
    LOGITS = "logits"
    CASTS = "weights in compute type"
    ACTIVATIONS = "activations"
    WORK = "work of optimizer and EWC"


Bytes = dict[Category, int]


@dataclass(frozen=True)
class Peak:
    """A highest point.

    Attributes:
        total: Bytes.
        parts: The same by category.
    """

    total: int
    parts: Bytes


@dataclass(frozen=True)
class Moment:
    """What happens between two points in time.

    Attributes:
        name: What it is.
        stretches: The highest point of each part of it, in order.
        logits: The most bytes of logits at any time, which need not be the highest point.
    """

    name: str
    stretches: list[Peak]
    logits: int

    @property
    def peak(self) -> Peak:
        """The highest of all."""
        return max(self.stretches, key=lambda stretch: stretch.total)


@dataclass(slots=True)
class _Record:
    size: int
    category: Category
    origin: object  # what a copy was made of, to tell whether two tensors hold the same values
    holds: bool = True  # of a comparison: how it ends


class _ForgetfulConverter(FakeTensorConverter):
    """Keeps no weak references to what it makes: modules cannot be moved where their parameters have some."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Do nothing."""


def valueless() -> FakeTensorMode:
    """A mode in which new tensors have shape, dtype and device, and no values; real ones may be mixed in."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.fake_tensor_converter = _ForgetfulConverter()
    return mode


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage from the operation that makes it to its release.

    Runs on top of a ``FakeTensorMode``. Operations on real tensors alone (labels, masks) run for real, so that what
    depends on their values is decided by values. Of fake values only this is taken for granted: they are positive and
    finite, copies are equal to what they were made of, and a mask among them lets everything through.

    Args:
        granularity: Bytes that an allocation is rounded up to.
        vocabulary: A new tensor with this last dimension counts as logits.
    """

    def __init__(self, granularity: int = 1, vocabulary: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.granularity, self.vocabulary = granularity, vocabulary
        self.live: Counter[Category] = Counter()
        self.total = 0
        self.weight_shapes: set[tuple[int, ...]] = set()
        self._category = Category.ACTIVATIONS
        self._peak, self._at_peak = 0, Counter[Category]()
        self._stretches: list[Peak] = []
        self._most_logits = 0
        self._records: dict[int, _Record] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}

    # ---- what callers ask -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def category(self, category: Category) -> Iterator[None]:
        """What new storages are for, unless they are logits."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    @contextlib.contextmanager
    def moment(self, name: str, into: list[Moment]) -> Iterator[None]:
        """Append what runs inside."""
        self._peak, self._at_peak = self.total, self.live.copy()
        self._stretches, self._most_logits = [], self.live[Category.LOGITS]
        yield
        self.cut()
        into.append(Moment(name, self._stretches, self._most_logits))

    def cut(self) -> None:
        """End a stretch of the moment, and begin another."""
        self._stretches.append(Peak(self._peak, {key: size for key, size in self._at_peak.items() if size}))
        self._peak, self._at_peak = self.total, self.live.copy()

    def assign(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Say of storages that are there what they are for."""
        for tensor in tensors:
            record = self._records.get(tensor.untyped_storage()._cdata)
            if record is not None:
                self.live[record.category] -= record.size
                self.live[category] += record.size
                record.category = category

    def adopt(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Count storages that were made before."""
        for tensor in tensors:
            self._add(tensor, category)

    # ---- dispatch -------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if tensors and not fakes:
            with unset_fake_temporarily():
                return self._count(func, func(*args, **kwargs), tensors)
        if func in _ANSWERS:
            return _ANSWERS[func](self, *args)
        if func in REPLAYED:
            with self:  # a kernel written in Python: what it allocates is seen as it runs
                return REPLAYED[func](*args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index_put.default):
            args = (args[0], _as_numbers(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if func is aten.add.Tensor and len(fakes) == 2 and _called_by_engine():
            self._accumulate(out, *fakes)
        return self._count(func, out, tensors)

    def _count(self, func: Any, out: Any, inputs: list[Tensor]) -> Any:
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._add(tensor, self._kind(func, tensor))
        self._note(workspace(func, inputs, made))
        if func in (aten.clone.default, aten._to_copy.default):
            self._records[_key(made[0])].origin = self._origin(inputs[0])
        if func in _UPPER_BOUNDS:
            self._records[_key(made[0])].holds = False
        return out

    def _kind(self, func: Any, tensor: Tensor) -> Category:
        if self._category != Category.ACTIVATIONS:
            return self._category
        if tensor.dim() and tensor.shape[-1] == self.vocabulary:
            return Category.LOGITS
        weight = tensor.is_floating_point() and tuple(tensor.shape) in self.weight_shapes
        return Category.CASTS if weight else Category.ACTIVATIONS

    # ---- accounts -------------------------------------------------------------------------------------------------

    def _add(self, tensor: Tensor, category: Category) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._records:
            return
        size = -(-storage.nbytes() // self.granularity) * self.granularity
        self._records[key] = _Record(size, category, key)
        self._watches[key] = weakref.ref(storage, partial(self._release, key))
        self.live[category] += size
        self.total += size
        self._most_logits = max(self._most_logits, self.live[Category.LOGITS])
        self._note(0)

    def _release(self, key: int, _: object) -> None:
        record = self._records.pop(key)
        del self._watches[key]
        self.live[record.category] -= record.size
        self.total -= record.size

    def _note(self, extra: int) -> None:
        """Compare with the peak; ``extra`` bytes are there for this operation alone."""
        if self.total + extra > self._peak:
            self._peak, self._at_peak = self.total + extra, self.live.copy()
            self._at_peak[self._category] += extra

    def _accumulate(self, out: Tensor, *parts: Tensor) -> None:
        """Let a sum of gradients take the place of one of them.

        The engine adds in place where nothing else holds the tensor, as the base of a view does; but never under a
        dispatch mode.
        """
        for part in parts:
            if part._is_view():
                continue
            record = self._records.get(_key(part))
            if record is not None and record.size == out.untyped_storage().nbytes() and part.shape == out.shape:
                key = _key(out)
                self._records[key] = _Record(record.size, record.category, key)
                self._watches[key] = weakref.ref(out.untyped_storage(), partial(self._release, key))
                record.size = 0
                return

    def _origin(self, tensor: Tensor) -> object:
        record = self._records.get(_key(tensor))
        return _key(tensor) if record is None else record.origin

    # ---- values that are asked for --------------------------------------------------------------------------------

    def _scalar(self, tensor: Tensor) -> bool | int | float:
        if tensor.dtype == torch.bool:
            return self._records[_key(tensor)].holds
        return 1.0 if tensor.is_floating_point() else 1

    def _equal(self, one: Tensor, other: Tensor) -> bool:
        return self._origin(one) == self._origin(other)


_UPPER_BOUNDS = (aten.le.Scalar, aten.lt.Scalar, aten.eq.Scalar)  # by 0, where anybody asks how they end

_ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense.default: AllocationTracker._scalar,
    aten.equal.default: AllocationTracker._equal,
}


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _called_by_engine() -> bool:
    """Whether C++ code of the backward pass called, and no Python function inside it."""
    frame: FrameType | None = sys._getframe(2)  # the caller of __torch_dispatch__, behind at most a wrapper
    for _ in range(3):
        if frame is not None and frame.f_code.co_name == _ENGINE:
            return True
        frame = None if frame is None else frame.f_back
    return False


def _as_numbers(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as row numbers: how many there are is known then, and fake tensors want to know."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            with unset_fake_temporarily():
                mask = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
                numbers += mask.nonzero(as_tuple=True)
        else:
            numbers.append(index)
    return numbers
