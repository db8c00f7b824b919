"""``AttentionTap``: see the attention rows of selected heads while a stock kernel computes the forward.

How it works. For the call of an attention module of a *selected* layer, forward hooks put a stand-in for the attention
function of its name into the table in which the module looks it up; the stand-in runs the stock kernel on the same
arguments (so the logits are bitwise those of an untapped model) and hands q, k, v to the observers. The name in the
configuration stays, since some models (DeepSeek-V3.2) do other things under another. Eager kernels have no such door:
there the hook reads the weights that the module returns. Everything is undone on exit.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..heads import HeadSelection
from . import models as support
from .capture import AttentionCall, EagerCall, InterfaceCall, QuerySelection

Observer = Callable[[int, AttentionCall], Tensor]
"""Given a layer index and its call, returns what ``AttentionTap.values`` keeps for that layer."""

_LISTENERS: WeakKeyDictionary[nn.Module, list[AttentionTap]] = WeakKeyDictionary()


class AttentionTap:
    """Capture the attention rows of ``heads`` in every forward inside the ``with`` block.

    Args:
        model: A transformers model, or a PeftModel around one.
        heads: The selected query heads.
        queries: int64 (batch, n_queries), or (n_queries,) for every sample: positions in the padded batch; negative
            ones count from the right end as in Python. None takes every position.
        observe: What to compute in each selected layer; by default the rows themselves. It runs inside the layer, so
            that activation checkpointing recomputes what it needs.
        keep_graph: Refuse captured values without a gradient (a term of a loss), naming the likely cause.
        squares: Of which queries a backward sums the squares of dL/dA, into ``squares``: "selected" or "every" one.
            Each layer's as soon as its gradient arrives; nothing of q and k is kept until then.

    Inside the block ``rows[layer]`` is (batch, n_selected, n_queries, n_keys), float32 (float64 for float64 models),
    differentiable; rows sum to 1, rows whose query is padding (by the forward's 2D ``attention_mask``) are 0, and
    they are taken before attention dropout. They are those of the latest forward; a recomputation by activation
    checkpointing is not counted again. ``backward`` must run inside the block, and before the next forward.
    ``squares[layer]`` is (batch, n_selected), of a backward through that forward.

    Raises:
        CaptureError: A layer or head does not exist, the model has no attention, reentrant checkpointing is on while
            a gradient is wanted, an eager kernel applies dropout, or a selected layer ran without the interface.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: HeadSelection,
        queries: Tensor | None = None,
        *,
        observe: Observer | None = None,
        keep_graph: bool = False,
        squares: Literal["selected", "every"] | None = None,
    ) -> None:
        self.model = model
        self.heads = heads
        self.keep_graph = keep_graph
        self.values: dict[int, Tensor] = {}
        self.squares: dict[int, Tensor] = {}
        self._squares_of = squares
        # What every watched output depends on: a backward towards it goes down to the lowest of them and no further.
        self._anchor = torch.zeros((), requires_grad=True)
        self._watched_weights: dict[int, EagerCall] = {}
        self._observe = observe or _rows_of
        self._queries = None if queries is None else _checked_queries(queries)
        self._modules = _selected_modules(model, heads)
        self._layers = {id(module): layer for layer, module in self._modules.items()}
        self._n_heads = support.head_shape(model)[1] if heads else 0
        self._padding: Tensor | None = None
        self._selections: dict[tuple[int, int, torch.device], QuerySelection] = {}
        self._heads_on: dict[torch.device, dict[int, Tensor]] = {}
        self._in_forward = False
        self._seen: set[int] = set()
        self._stack = ExitStack()

    @property
    def rows(self) -> dict[int, Tensor]:
        """Captured values of the latest forward, by layer."""
        return self.values

    def __enter__(self) -> AttentionTap:
        if self._modules and torch.is_grad_enabled() and support.uses_reentrant_checkpointing(self.model):
            raise CaptureError(
                "reentrant activation checkpointing makes the captured attention a constant without a gradient; call "
                "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}) instead."
            )
        with ExitStack() as undo:
            root = support.base_transformer(self.model)
            # PEFT before 0.21 runs root.forward() itself, past the hooks of root: then the wrapper's hooks start it.
            for module in dict.fromkeys((self.model, root)):
                self._hook(undo, module.register_forward_pre_hook(self._start, with_kwargs=True))
                self._hook(undo, module.register_forward_hook(self._finish, always_call=True))
            for layer, module in self._modules.items():
                self._listen(undo, layer, module)
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        self._in_forward = False
        self._padding = None
        self._selections = {}
        self._watched_weights = {}

    def gradient_squares(self, loss: Tensor) -> dict[int, Tensor]:
        """``squares`` of ``loss``, by a backward that goes no further down than the lowest selected layer's attention;
        the parameters get no gradient. Once for each forward.

        Raises:
            CaptureError: No gradient arrived at some layer.
        """
        self.squares = {}
        targets = [] if len(self._watched_weights) == len(self.heads) else [self._anchor]
        if self._watched_weights:
            targets.append(self._watched_weights[min(self._watched_weights)].weights)
        if loss.requires_grad and targets:
            torch.autograd.grad(loss, targets, allow_unused=True)
        missing = [layer for layer in self.heads if layer not in self.squares]
        if missing:
            raise CaptureError(
                f"no gradient of the loss arrived at the attention of layers {missing}, so their heads' sensitivity is "
                f"unknown; leave those layers out of the selection, or let the loss depend on them."
            )
        return self.squares

    def watch(self, layer: int, call: InterfaceCall, output: Tensor) -> Tensor:
        """The kernel's ``output``, of whose gradient the squares are taken if they are wanted."""
        if self._squares_of is None or not torch.is_grad_enabled():
            return output
        return call.watched(output, self._squares_of == "every", self._anchor, partial(self._take_squares, layer))

    def _watch_weights(self, layer: int, call: EagerCall) -> None:
        """The same of an eager kernel's weights, which no other tensor can stand in for."""
        # A recomputation's weights get no gradient.
        if self._squares_of is None or not self._in_forward or not call.weights.requires_grad:
            return
        self._watched_weights[layer] = call

        def take(gradient: Tensor) -> None:
            watched = self._watched_weights.pop(layer, None)
            if watched is not None:
                self._take_squares(layer, watched.gradient_squares(gradient, self._squares_of == "every"))

        call.weights.register_hook(take)

    def _take_squares(self, layer: int, squares: Tensor) -> None:
        self.squares[layer] = squares

    def observe(self, layer: int, call: AttentionCall) -> None:
        """Take one layer's call. A recomputation runs the observer again (its saved tensors are needed), uncounted."""
        value = self._observe(layer, call)
        if not self._in_forward or layer in self._seen:
            return
        self._seen.add(layer)
        if self.keep_graph and not value.requires_grad:
            raise CaptureError(
                f"the attention captured in layer {layer} has no gradient, so distilling it would change nothing; use "
                f"non-reentrant checkpointing (use_reentrant=False) and an adapter on the attention or below it."
            )
        self.values[layer] = value

    def layer_of(self, module: nn.Module) -> int:
        """The selected layer whose attention ``module`` computes."""
        return self._layers[id(module)]

    def heads_of(self, layer: int, device: torch.device) -> Tensor:
        """The layer's selected heads, int64 (n_selected,). One copy to the device for all layers: each waits for it."""
        if device not in self._heads_on:
            flat = torch.tensor([head for heads in self.heads.values() for head in heads], device=device)
            parts = flat.split([len(heads) for heads in self.heads.values()])
            self._heads_on[device] = dict(zip(self.heads, parts, strict=True))
        return self._heads_on[device][layer]

    def query_selection(self, batch: int, length: int, device: torch.device) -> QuerySelection:
        """The positions asked for, in a forward of ``batch`` samples and ``length`` positions; made once for its
        layers."""
        place = (batch, length, device)
        if place not in self._selections:
            self._selections[place] = self._select_queries(batch, length, device)
        return self._selections[place]

    def _select_queries(self, batch: int, length: int, device: torch.device) -> QuerySelection:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if self._padding is not None and self._padding.shape[0] == batch:
            real = self._padding[:, -length:].to(device).bool()
        if self._queries is None:
            positions = torch.arange(length, device=device).expand(batch, length)
            return QuerySelection(positions, real, every=True)
        positions = _positions(self._queries, batch, length).to(device)
        return QuerySelection(positions, real.gather(1, positions), every=False)

    @staticmethod
    def _hook(undo: ExitStack, handle: Any) -> None:
        undo.callback(handle.remove)

    def _listen(self, undo: ExitStack, layer: int, module: nn.Module) -> None:
        _LISTENERS.setdefault(module, []).append(self)
        undo.callback(_LISTENERS[module].remove, self)
        if support.implementation(module) == support.EAGER:
            self._hook(undo, module.register_forward_pre_hook(_ask_for_weights, with_kwargs=True))
            self._hook(undo, module.register_forward_hook(self._read_weights(layer)))
            return
        # After a KeyboardInterrupt no hook runs.
        undo.callback(_switch_off, module)
        self._hook(undo, module.register_forward_pre_hook(_switch_on))
        self._hook(undo, module.register_forward_hook(self._check_seen(layer), always_call=True))

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            mask = inspect.signature(module.forward).bind_partial(*args).arguments.get("attention_mask")
        self._padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._selections = {}
        self._in_forward = True
        self._seen = set()
        self.values = {}
        self.squares = {}
        self._watched_weights = {}

    def _finish(self, module: nn.Module, args: Any, output: Any) -> None:
        self._in_forward = False

    def _check_seen(self, layer: int) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            _switch_off(module)
            if output is not None and self._in_forward and layer not in self._seen:
                raise CaptureError(support.untapped(layer, module))

        return check

    def _read_weights(self, layer: int) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple | list) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.dim() != 4:
                raise CaptureError(
                    f"layer {layer} ({type(module).__name__}) returned no attention weights; pass "
                    f"output_attentions=True to the forward, or load the model with attn_implementation='sdpa'."
                )
            if support.drops_attention(module):
                raise CaptureError(support.dropped(layer, module))
            batch, n_heads, length, _ = weights.shape
            if n_heads != self._n_heads:
                raise CaptureError(
                    f"layer {layer} ({type(module).__name__}) returned attention weights of shape "
                    f"{tuple(weights.shape)}, not (batch, {self._n_heads} heads, queries, keys), which "
                    f"cannot be read; leave the layer out of the selection."
                )
            queries = self.query_selection(batch, length, weights.device)
            call = EagerCall(weights, self.heads_of(layer, weights.device), queries)
            self.observe(layer, call)
            self._watch_weights(layer, call)

        return read


def _ask_for_weights(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Some eager modules (OpenAI's GPT) return their weights only if they are told to."""
    if "output_attentions" in kwargs:
        return args, {**kwargs, "output_attentions": True}
    return None


def _rows_of(layer: int, call: AttentionCall) -> Tensor:
    return call.rows()


def _selected_modules(model: nn.Module, heads: HeadSelection) -> dict[int, nn.Module]:
    if not heads:
        return {}
    modules = support.attention_modules(model)
    _, n_heads = support.head_shape(model)
    for layer, indices in heads.items():
        if layer not in modules:
            raise CaptureError(
                f"layer {layer} of the selection does not exist; the attention layers are {_spans(modules)}."
            )
        if indices[-1] >= n_heads:
            raise CaptureError(
                f"head {indices[-1]} of layer {layer} does not exist; the model has heads 0..{n_heads - 1}."
            )
    return {layer: modules[layer] for layer in heads}


def _spans(modules: dict[int, nn.Module]) -> str:
    layers = sorted(modules)
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}..{layers[-1]}"
    return ", ".join(map(str, layers))


def _checked_queries(queries: Tensor) -> Tensor:
    if queries.dim() not in (1, 2) or queries.is_floating_point() or queries.numel() == 0:
        raise CaptureError(
            f"queries must be whole numbers of shape (batch, n_queries), got {queries.dtype} of shape "
            f"{tuple(queries.shape)}; pass None for every position."
        )
    return queries.long()


def _positions(queries: Tensor, batch: int, length: int) -> Tensor:
    # One wait for a GPU in place of two.
    lowest, highest = torch.stack(torch.aminmax(queries)).tolist()
    if lowest < -length or highest >= length:
        bad = highest if highest >= length else lowest
        raise CaptureError(
            f"query position {bad} is outside the batch, which has positions 0..{length - 1} "
            f"(or {-length}..-1 from the right)."
        )
    if queries.dim() == 2 and queries.shape[0] != batch:
        raise CaptureError(
            f"queries are for {queries.shape[0]} samples but the forward has {batch}; pass shape (batch, n_queries)."
        )
    return torch.where(queries < 0, queries + length, queries).expand(batch, -1)


class _Tapped:
    """Stands in for the attention function ``stock`` while tapped modules run: ``callers`` are the (thread, module)
    whose next call is to be observed. Any other call passes through."""

    def __init__(self, stock: Callable[..., Any]) -> None:
        self.stock = stock
        self.callers: set[tuple[int, int]] = set()

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _switch_off(module):
            return self.stock(module, *args, **kwargs)
        return _tapped_forward(self.stock, module, *args, **kwargs)


_TABLE_LOCK = threading.Lock()
"""The table is shared by all models of the process."""


def _switch_on(module: nn.Module, args: Any) -> None:
    functions, name = support.attention_functions(module), support.implementation(module)
    if functions is None or name not in functions:
        # The module does not dispatch by name; the check after its forward says so.
        return
    with _TABLE_LOCK:
        function = functions[name]
        if not isinstance(function, _Tapped):
            function = functions[name] = _Tapped(function)
        function.callers.add((threading.get_ident(), id(module)))


def _switch_off(module: nn.Module) -> bool:
    """Whether it was on for ``module``; the last one puts the stock function back."""
    functions, name = support.attention_functions(module), support.implementation(module)
    with _TABLE_LOCK:
        function = None if functions is None else functions.get(name)
        caller = threading.get_ident(), id(module)
        if not isinstance(function, _Tapped) or caller not in function.callers:
            return False
        function.callers.remove(caller)
        if not function.callers:
            del functions[name]
            if functions.get(name) is not function.stock:
                # The modelling file's own, not the library's.
                functions[name] = function.stock
        return True


def _tapped_forward(
    stock: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the stock kernel on the same arguments, then show q, k, v to the taps that listen to this module."""
    refused = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
    if refused:
        raise CaptureError(
            f"{type(module).__name__} uses {refused[0]}, which changes the softmax; load the model with "
            f"attn_implementation='eager' to capture its attention."
        )
    output, weights = stock(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    for tap in tuple(_LISTENERS.get(module, ())):
        queries = tap.query_selection(query.shape[0], query.shape[2], query.device)
        layer = tap.layer_of(module)
        call = InterfaceCall(
            query=query,
            key=key,
            value=value,
            attention_mask=attention_mask,
            position_bias=kwargs.get("position_bias"),
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=query.shape[2] > 1 and support.is_causal(module, kwargs.get("is_causal")),
            sliding_window=_sliding_window(module, attention_mask, kwargs),
            heads=tap.heads_of(layer, query.device),
            queries=queries,
        )
        tap.observe(layer, call)
        output = tap.watch(layer, call, output)
    return output, weights


def _sliding_window(module: nn.Module, attention_mask: object, kwargs: dict[str, Any]) -> int | None:
    """The window that the kernel itself applies: only flash attention does; the others get it in their mask."""
    if "flash" in support.implementation(module):
        return kwargs.get("sliding_window")
    return None
