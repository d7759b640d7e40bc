"""Which places in memory a tensor's elements take: what can be written in place, and what must be read before."""

from torch import Tensor

MOST_STEPS = 10_000  # of the search in `meet`; layouts that someone uses take fewer than a hundred


def check_places(name: str, x: Tensor) -> None:
    """ValueError unless every element of `x` has a place of its own, as it must where an op writes.

    Sufficient, and true of every slice and permutation of contiguous memory: each stride steps over all that the
    smaller ones reach.
    """
    if x.is_contiguous():
        return
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1):
        if stride <= reach and x.numel():
            got = f"shape {list(x.shape)} with strides {list(x.stride())}"
            raise ValueError(f"{name}: expected memory in which no two elements share a place to write to, got {got}")
        reach += (size - 1) * stride


def span(x: Tensor) -> tuple[int, int]:
    """The addresses [begin, end) between which the elements lie."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    if x.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return begin, begin + (last + 1) * x.itemsize


def meet(a: Tensor, b: Tensor) -> bool:
    """Whether an element of `a` and one of `b` share a byte. True also where the search for such a pair is given up.

    Halves of one tensor, split along a dimension, lie between the same addresses and do not meet.
    """
    (begin_a, end_a), (begin_b, end_b) = span(a), span(b)
    if end_a <= begin_b or end_b <= begin_a or begin_a == end_a or begin_b == end_b:
        return False
    # The address of a's element less that of b's is `start` + a sum of multiples of strides, b's counted from its end.
    start = begin_a - begin_b
    counts: dict[int, int] = {}
    for x in (a, b):
        for size, stride in zip(x.shape, x.stride(), strict=True):
            step = stride * x.itemsize
            if step:
                counts[step] = counts.get(step, 0) + size - 1
            if x is b:
                start -= (size - 1) * step
    steps = sorted(counts.items(), reverse=True)
    reaches = [sum(step * count for step, count in steps[i:]) for i in range(len(steps) + 1)]
    left = MOST_STEPS

    def found(at: int, i: int) -> bool:
        """Whether some multiples of the steps from i on lead from `at` to less than an element's size around 0."""
        nonlocal left
        low, high = 1 - a.itemsize - at, b.itemsize - 1 - at
        if i == len(steps):
            return low <= 0 <= high
        left -= 1
        step, count = steps[i]
        least = max(0, -((reaches[i + 1] - low) // step))
        most = min(count, high // step)
        return left < 0 or any(found(at + n * step, i + 1) for n in range(least, most + 1))

    return found(start, 0)


def apart(names: list[str], written: list[int], arguments: tuple[object, ...]) -> tuple[object, ...]:
    """The arguments of an op that writes to those of these numbers, so that it may write and read in any order: what
    is read from the memory written to is copied first.

    Raises:
        ValueError: elements that are written share their place with each other.
    """
    result = list(arguments)
    targets: list[tuple[int, Tensor, int, int]] = []
    for i in written:
        target = result[i]
        assert isinstance(target, Tensor)
        check_places(names[i], target)
        low, high = span(target)
        for j, other, begin, end in targets:
            if begin < high and low < end and meet(target, other):
                both = f"{names[j]}, {names[i]}"
                raise ValueError(f"{both}: expected memory of its own for each, got tensors that overlap")
        targets.append((i, target, low, high))
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and i not in written:
            begin, end = span(x)
            for _, target, low, high in targets:
                if begin < high and low < end and meet(x, target):
                    result[i] = x.clone()
                    break
    return tuple(result)
