"""The compiled engines. Private: signatures may change between releases.

A tensor crosses the boundary as ``(address, dtype, shape, strides)`` with strides counted in
elements and dtype one of 0 float32, 1 float64, 2 bfloat16, 3 float16, 4 int64, 5 uint8. The caller
keeps the array alive for the duration of the call and guarantees that shape and strides stay
inside it. ``acc`` below is the accumulation dtype: float64 for float64 inputs, else float32.
Every call releases the GIL.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias, final

__all__ = [
    "CudaPlan",
    "Plan",
    "Spec",
    "__version__",
    "backward",
    "cpu_level",
    "cpu_levels",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cuda_available",
    "cuda_backward",
    "cuda_cross_entropy_backward",
    "cuda_cross_entropy_forward",
    "cuda_describable",
    "cuda_forward",
    "cuda_info",
    "cuda_plan",
    "cuda_policy_backward",
    "cuda_policy_forward",
    "cuda_warm_up",
    "forward",
    "get_num_threads",
    "last_workspace_bytes",
    "logsumexp_pairs",
    "plan",
    "set_num_threads",
]

_Tensor: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]

__version__: str

@final
class Spec:
    """The set of statistics of a call: immutable, hashable, picklable.

    Parameters
    ----------
    statistics
        Registry names, in any order: ``rest``, ``target``, ``entropy``, ``sum``, ``sum_sq``,
        ``variance``, ``max``, ``rest_power``, ``weighted_sum``, ``weighted_rest``, ``dot``,
        ``topk``.
    powers
        Exponents of ``rest_power``.
    vectors
        Number of class vectors of ``weighted_sum`` and ``weighted_rest``.
    topk
        How many largest logits ``topk`` keeps.
    targets
        Target ids per row; 0 where no target is given.

    Raises
    ------
    ValueError
        An unknown statistic, or a parameter that does not fit the statistics.
    """

    def __new__(
        cls,
        statistics: Sequence[str],
        *,
        powers: Sequence[float] = ...,
        vectors: int = 0,
        topk: int = 0,
        targets: int = 0,
    ) -> Spec: ...
    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics, in registry order."""
    @property
    def powers(self) -> tuple[float, ...]:
        """Exponents of ``rest_power``."""
    @property
    def vectors(self) -> int:
        """Number of class vectors."""
    @property
    def topk(self) -> int:
        """How many largest logits ``topk`` keeps."""
    @property
    def targets(self) -> int:
        """Target ids per row."""
    @property
    def fields(self) -> tuple[tuple[str, int, bool], ...]:
        """``(name, columns, is_integer)`` of every output, in registry order.

        ``columns`` is 0 for an output of shape (N,) and c for one of shape (N, c).
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __getnewargs_ex__(self) -> tuple[tuple[tuple[str, ...]], dict[str, object]]: ...

@final
class Plan:
    """Bytes and tile sizes of one forward and backward: made by `plan`, picklable."""

    @property
    def forward_bytes(self) -> int:
        """Scratch of a forward, allocated by the engine and freed before it returns."""
    @property
    def backward_bytes(self) -> int:
        """Scratch of a backward, allocated by the engine and freed before it returns."""
    @property
    def store_bytes(self) -> int:
        """Logit tiles kept from the forward to the backward, in the caller's memory."""
    @property
    def threads_bytes(self) -> int:
        """Share of the scratch that each thread adds."""
    @property
    def workspace_bytes(self) -> int:
        """Everything held at once at the worst moment."""
    @property
    def parts(self) -> dict[str, int]:
        """Named shares of the bytes above."""
    def __eq__(self, other: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

def plan(
    spec: Spec,
    rows: int,
    features: int,
    classes: int,
    dtype: int,
    memory: int,
    gradients: int,
    contiguous: bool = True,
) -> Plan:
    """Size the scratch and the store of a call. A pure function of its arguments.

    Parameters
    ----------
    spec
        The statistics.
    rows, features, classes
        N, D and V.
    dtype
        Code of the inputs' dtype.
    memory
        -1 lean, -2 fast, or the number of bytes that may be kept for the backward.
    gradients
        Bit mask: 1 input, 2 weight, 4 bias, 8 logit_scale, 16 dense; 0 for a forward only.
    contiguous
        False if the features of input or weight are not adjacent in memory.
    """

def forward(
    spec: Spec,
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor | None,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    vectors: _Tensor | None,
    dense: _Tensor | None,
    outputs: tuple[_Tensor, ...],
    store: _Tensor | None,
    plan: Plan,
    threads: int,
) -> None:
    """Compute the statistics of `spec` for every row and write them to `outputs`.

    Parameters
    ----------
    spec
        The statistics.
    input
        (outer, inner, D), any strides; row i is (i // inner, i % inner).
    weight
        (V, D), any strides, dtype of `input`.
    bias
        (V,), any stride, dtype of `input`; or None.
    ids
        (N, K) int64, contiguous; or None.
    ignore_index
        An id equal to it is padding. A row of padding only is skipped: its outputs are 0, integer
        ones -1.
    logit_scale, softcap
        The logit maps; a softcap of 0 means none.
    vectors
        (C, V) class vectors, acc dtype; or None.
    dense
        (N, V) weights of ``dot``, any float dtype and strides; or None.
    outputs
        One contiguous tensor for each of ``spec.fields``: acc dtype, or int64.
    store
        ``plan.store_bytes`` bytes (uint8), to be handed to `backward`; or None.
    plan
        The plan of this call.
    threads
        0 for the default.

    Raises
    ------
    IndexError
        A target id outside [0, V) that is not `ignore_index`; names the first such row.
    MemoryError
        The scratch could not be allocated.
    ValueError, TypeError
        Shapes or dtypes that do not fit together.
    """

def backward(
    spec: Spec,
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor | None,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    vectors: _Tensor | None,
    dense: _Tensor | None,
    saved: tuple[_Tensor, ...],
    cotangents: tuple[_Tensor | None, ...],
    store: _Tensor | None,
    d_input: _Tensor | None,
    d_weight: _Tensor | None,
    d_bias: _Tensor | None,
    d_scale: _Tensor | None,
    d_dense: _Tensor | None,
    accumulate_input: bool,
    plan: Plan,
    threads: int,
) -> None:
    """Turn cotangents of the statistics into gradients of the wanted arguments.

    The first ten arguments are those of `forward`.

    Parameters
    ----------
    saved
        The outputs of the forward.
    cotangents
        One tensor for each output, contiguous, acc dtype; None stands for zero.
    store
        What the forward stored, or None. It is read only, so a graph can be run twice.
    d_input
        (outer, inner, D), any strides, dtype of `input` or acc. Skipped rows are written 0.
    d_weight
        (V, D), any strides, dtype of `weight` or acc.
    d_bias
        (V,), dtype of `bias` or acc.
    d_scale
        (1,), acc dtype.
    d_dense
        (N, V), dtype of `dense`.
    accumulate_input
        Add to `d_input` instead of overwriting it; needs the acc dtype.
    plan, threads
        As for `forward`. A gradient that is None is not wanted and costs nothing.
    """

def cross_entropy_forward(
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    reduction: int,
    z_loss_weight: float,
    loss: _Tensor,
    rest: _Tensor,
    target: _Tensor,
    store: _Tensor | None,
    plan: Plan,
    threads: int,
) -> int:
    """Plain cross entropy in one call: statistics, row losses, reduction.

    With d = rest - target a row's loss is ``log(1 + exp(d)) + z_loss_weight * lse**2``, computed in
    float64; rows are summed in row order.

    Parameters
    ----------
    input, weight, bias, ids, ignore_index, logit_scale, softcap
        As for `forward`, with ids (N, 1).
    reduction
        0 none, 1 mean over the kept rows, 2 sum.
    z_loss_weight
        Weight of the squared log-sum-exp; reduced with the loss.
    loss
        Output, contiguous, acc dtype: (N,) without reduction (ignored rows 0), else one element.
    rest, target
        Outputs (N,) and (N, 1), contiguous, acc dtype: keep them for the backward.
    store, plan, threads
        As for `forward`; the plan is made for ``Spec(("rest", "target"), targets=1)``.

    Returns
    -------
    int
        Number of kept rows.
    """

def cross_entropy_backward(
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    reduction: int,
    z_loss_weight: float,
    rest: _Tensor,
    target: _Tensor,
    grad_loss: _Tensor,
    store: _Tensor | None,
    d_input: _Tensor | None,
    d_weight: _Tensor | None,
    d_bias: _Tensor | None,
    d_scale: _Tensor | None,
    plan: Plan,
    threads: int,
) -> None:
    """Gradients of `cross_entropy_forward`.

    Parameters
    ----------
    input, weight, bias, ids, ignore_index, logit_scale, softcap, reduction, z_loss_weight
        Those of the forward.
    rest, target
        What the forward wrote.
    grad_loss
        Cotangent of the loss, acc dtype, of its shape; any stride, 0 included.
    store, d_input, d_weight, d_bias, d_scale, plan, threads
        As for `backward`.
    """

def logsumexp_pairs(
    array: _Tensor,
    weights: _Tensor | None,
    axes: Sequence[int],
    maximum: _Tensor,
    total: _Tensor,
    merge: bool,
    threads: int,
) -> None:
    """Log-sum-exp over `axes` as pairs: ``sum(w * exp(a)) == total * exp(maximum)``.

    Nothing of the array's size is allocated, and the bits do not depend on `threads`.

    Parameters
    ----------
    array
        Any rank, strides, alignment and float dtype. float64 exponentiates in float64, the others
        in float32; sums are float64.
    weights
        Shape of `array`, any strides, float32 or float64, any sign; or None. An element of weight 0
        is left out, whatever its value.
    axes
        The reduced axes, not negative; none or all of them are fine.
    maximum, total
        Outputs, float64, contiguous, one element for each element of the other axes. An empty sum
        is (-inf, 0); nan is (nan, nan); at a maximum of +inf, total sums the weights of the
        elements at +inf.
    merge
        Continue the pairs that the outputs hold, instead of overwriting them.
    threads
        0 for the default.
    """

def last_workspace_bytes() -> int:
    """Scratch that the last engine call really allocated, in bytes."""

def cpu_levels() -> list[str]:
    """Instruction levels that this machine can run, slowest first."""

def cpu_level() -> str:
    """Name the level in use: the fastest, or the one that ``LOGITLESS_CPU`` forces."""

def set_num_threads(threads: int) -> None:
    """Set how many threads an engine call uses by default: 1 or more."""

def get_num_threads() -> int:
    """Tell how many threads an engine call uses by default."""

@final
class CudaPlan:
    """Bytes and chunks of one forward and backward on a device: made by `cuda_plan`, picklable."""

    @property
    def forward_bytes(self) -> int:
        """Workspace of a forward, to be allocated by the caller."""
    @property
    def backward_bytes(self) -> int:
        """Workspace of a backward, to be allocated by the caller."""
    @property
    def cross_entropy_bytes(self) -> tuple[int, int]:
        """Workspaces of a `cuda_cross_entropy_forward` that keeps nothing, and of its backward.

        Two values a row more than those of the statistics.
        """
    @property
    def store_bytes(self) -> int:
        """What is kept from the forward to the backward, in the caller's memory."""
    @property
    def lent_bytes(self) -> int:
        """What the memory of d_weight holds from the forward on; 0: it need not exist yet."""
    @property
    def on_loan(self) -> bool:
        """Whether the store counts on what ``lends`` said: it is good for one backward."""
    @property
    def threads_bytes(self) -> int:
        """Zero: a GPU has no scratch of threads."""
    @property
    def workspace_bytes(self) -> int:
        """Everything held at once at the worst moment."""
    @property
    def parts(self) -> dict[str, int]:
        """Named shares of the larger workspace."""
    @property
    def mode(self) -> str:
        """How statistics and gradients are made.

        ``fused``; with exponentials kept for the backward ``stored``, or ``partly stored`` for
        those of the first classes; ``tiled``; ``frozen``.
        """
    @property
    def chunks(self) -> tuple[int, int]:
        """Classes of a chunk of the forward and of the backward."""
    def __eq__(self, other: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

def cuda_plan(
    spec: Spec,
    rows: int,
    features: int,
    classes: int,
    dtype: int,
    memory: int,
    gradients: int,
    contiguous: bool = True,
    device: int = 0,
    lends: int | None = None,
    compact: bool = True,
) -> CudaPlan:
    """Size the workspaces of a call on a device; a pure function of its arguments and the device.

    The arguments are those of `plan`, with ``contiguous = cuda_describable(weight)``.

    Parameters
    ----------
    lends
        What the forward may use that its backward will own: None for nothing; 0 the store, which
        that backward overwrites; 2 or 4 also d_weight, contiguous, elements of so many bytes.
    compact
        The rows of d_input will follow one another, so that it can hold the packed input.
    """

def cuda_forward(
    spec: Spec,
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor | None,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    vectors: _Tensor | None,
    dense: _Tensor | None,
    outputs: tuple[_Tensor, ...],
    store: _Tensor | None,
    plan: CudaPlan,
    threads: int,
    device: int,
    stream: int,
    workspace: _Tensor,
    scale: _Tensor | None = None,
    lent: _Tensor | None = None,
) -> None:
    """Enqueue a forward; the arguments up to `threads` are those of `forward`, on the device.

    An id out of range makes its row nan.

    Parameters
    ----------
    device
        Ordinal of the CUDA device.
    stream
        Handle of the stream; 0 is the legacy default stream.
    workspace
        ``plan.forward_bytes`` bytes (uint8) of the device, aligned to 256.
    scale
        The logit scale where the device holds it, in place of `logit_scale`: one element, acc
        dtype, never read back.
    lent
        The memory of d_weight, where ``plan.lent_bytes`` is not 0.

    Raises
    ------
    RuntimeError
        No driver, no device, or a failed launch.
    """

def cuda_backward(
    spec: Spec,
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor | None,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    vectors: _Tensor | None,
    dense: _Tensor | None,
    saved: tuple[_Tensor, ...],
    cotangents: tuple[_Tensor | None, ...],
    store: _Tensor | None,
    d_input: _Tensor | None,
    d_weight: _Tensor | None,
    d_bias: _Tensor | None,
    d_scale: _Tensor | None,
    d_dense: _Tensor | None,
    accumulate_input: bool,
    plan: CudaPlan,
    threads: int,
    device: int,
    stream: int,
    workspace: _Tensor,
    accumulate_weight: bool = False,
    scale: _Tensor | None = None,
    lent: _Tensor | None = None,
) -> None:
    """Enqueue a backward; the arguments up to `threads` are those of `backward`, on the device.

    Parameters
    ----------
    device, stream
        As for `cuda_forward`.
    workspace
        ``plan.backward_bytes`` bytes (uint8) of the device, aligned to 256.
    accumulate_weight
        Add to `d_weight` instead of overwriting it; needs the acc dtype.
    scale
        As for `cuda_forward`.
    lent
        What the forward was lent, also where d_weight is not wanted. It is consumed.
    """

def cuda_cross_entropy_forward(
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    reduction: int,
    z_loss_weight: float,
    loss: _Tensor,
    rest: _Tensor | None,
    target: _Tensor | None,
    store: _Tensor | None,
    plan: CudaPlan,
    threads: int,
    device: int,
    stream: int,
    workspace: _Tensor,
    share: _Tensor | None,
    scale: _Tensor | None = None,
    lent: _Tensor | None = None,
) -> None:
    """Enqueue a cross entropy: `cuda_forward` and one launch more.

    The arguments up to `threads` are those of `cross_entropy_forward`, on the device, with an
    `ignore_index`; the others those of `cuda_forward`.

    Parameters
    ----------
    rest, target
        As there; None, as `share` is then, where no backward will ask for them.
    workspace
        ``plan.forward_bytes`` bytes; without `share`, ``plan.cross_entropy_bytes[0]``.
    share
        Output, one element, acc dtype: what a reduction multiplies a row by.
    """

def cuda_cross_entropy_backward(
    input: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    ids: _Tensor,
    ignore_index: int | None,
    logit_scale: float,
    softcap: float,
    reduction: int,
    z_loss_weight: float,
    rest: _Tensor,
    target: _Tensor,
    grad_loss: _Tensor,
    store: _Tensor | None,
    d_input: _Tensor | None,
    d_weight: _Tensor | None,
    d_bias: _Tensor | None,
    d_scale: _Tensor | None,
    plan: CudaPlan,
    threads: int,
    device: int,
    stream: int,
    workspace: _Tensor,
    share: _Tensor,
    accumulate_weight: bool = False,
    scale: _Tensor | None = None,
    lent: _Tensor | None = None,
) -> None:
    """Enqueue the gradients of `cuda_cross_entropy_forward`: one launch, then `cuda_backward`.

    The arguments up to `threads` are those of `cross_entropy_backward`, on the device, with a
    contiguous `grad_loss`; the others those of `cuda_backward`.

    Parameters
    ----------
    workspace
        ``plan.cross_entropy_bytes[1]`` bytes (uint8) of the device, aligned to 256.
    share
        What the forward wrote.
    """

def cuda_policy_forward(
    rest: _Tensor,
    target: _Tensor,
    rest_entropy: _Tensor,
    ids: _Tensor,
    ignore_index: int,
    log_prob: _Tensor,
    entropy: _Tensor,
    device: int,
    stream: int,
) -> None:
    """Enqueue log-probability and entropy of rows with one class id: one launch.

    Parameters
    ----------
    rest, target, rest_entropy
        Statistics of the rows, (N,), contiguous, float32 or float64.
    ids
        (N,), int64.
    ignore_index
        Both results are 0 in rows with this id.
    log_prob, entropy
        Outputs, like the statistics.
    device, stream
        As for `cuda_forward`.
    """

def cuda_policy_backward(
    rest: _Tensor,
    target: _Tensor,
    rest_entropy: _Tensor,
    ids: _Tensor,
    ignore_index: int,
    grad_log_prob: _Tensor | None,
    grad_entropy: _Tensor | None,
    d_rest: _Tensor,
    d_target: _Tensor,
    d_rest_entropy: _Tensor | None,
    device: int,
    stream: int,
) -> None:
    """Enqueue the cotangents of `cuda_policy_forward`'s statistics: one launch.

    The other arguments are those of the forward.

    Parameters
    ----------
    grad_log_prob, grad_entropy
        Cotangents of its results, like the statistics; None counts as 0.
    d_rest, d_target, d_rest_entropy
        Outputs, like the statistics; the last may be None.
    """

def cuda_describable(weight: _Tensor) -> bool:
    """Tell whether tensor cores read a weight in place: what `cuda_plan` calls contiguous."""

def cuda_available() -> bool:
    """Tell whether CUDA tensors can be used: kernels, a driver and a device."""

def cuda_info() -> dict[str, Any]:
    """Driver, devices and images, and the reason when CUDA tensors cannot be used.

    Returns
    -------
    dict
        ``reason`` (empty when they can), ``driver``, ``devices`` (a list of dicts with name,
        capability, multiprocessors, images) and ``images`` (target, kernels, bytes).
    """

def cuda_warm_up(device: int) -> None:
    """Load every kernel of a device, so that a graph capture finds nothing left to load."""
