"""Exact costs of a sub-network that are sums over its units: MACs, parameters, bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from secateur.bits.modules import quantizers
from secateur.costs.inputs import dummy_inputs, run
from secateur.families import Site, UnitKind, in_features, out_features, sites, weight_of
from secateur.sparsity.linear import dense_products
from secateur.subnetwork import SubNetwork

__all__ = ["LinearCost", "dummy_inputs", "encoder_params", "file_bytes", "macs", "params", "size_bytes"]

NAME_ALLOWANCE = 24
"""Letters by which a tensor's name in a checkpoint may exceed its name in the model."""


@dataclass(frozen=True)
class LinearCost:
    """cost = fixed + Σ_b heads[b] × kept heads of block b + Σ_b neurons[b] × kept neurons of block b.

    Attributes:
        fixed: cost of everything that is never cut.
        heads: cost of one head of each attention block, in the order of `families.sites`.
        neurons: cost of one neuron of each feed-forward block.
        empty: what each block, heads before neurons, costs less once it has lost all units (`bypassed`); none if ().
    """

    fixed: float
    heads: tuple[float, ...]
    neurons: tuple[float, ...]
    empty: tuple[float, ...] = ()

    def of(self, sub: SubNetwork) -> float:
        """Cost of a sub-network."""
        widths = (*sub.head_widths, *sub.neuron_widths)
        units = sum(unit * width for unit, width in zip((*self.heads, *self.neurons), widths, strict=True))
        return self.fixed + units - sum(less for less, width in zip(self.empty, widths, strict=False) if not width)

    def block(self, kind: UnitKind, index: int, widths: Sequence[int]) -> list[float]:
        """Cost of one block at each of the given widths, without the fixed part."""
        unit = (self.heads if kind == "heads" else self.neurons)[index]
        return [unit * width for width in widths]


def macs(model: nn.Module, batch: int = 1, tokens: int = 128) -> LinearCost:
    """Multiply-adds of one forward pass of the whole model (1 MAC = one multiply and one add; FLOPs = 2 × MACs).

    One real forward pass is counted: linear maps, convolutions and attention's L² products, whatever the attention
    kernel; biases, norms, softmax and look-ups count nothing, as is usual. A unit costs its share of the maps that the
    family table cuts, each times the rows that the map reads, and its share of the other products in its attention
    module; both are exactly proportional to the number of units. Of BERT that is 4·L·d·d_h + 2·L²·d_h for a head and
    2·L·d for a neuron; DeBERTa's projections of relative positions and its position products are found the same way.

    Args:
        model: a model of a known family; it is left as it was.
        batch: examples per pass.
        tokens: tokens per example (ignored by image models).
    """
    found = sites(model)
    linear: dict[nn.Module, float] = {}
    products: dict[nn.Module, float] = {}
    blocks = {site.module for site in found.heads}
    maps = {m for b in blocks for m in b.modules() if _is_map(m)} | {m for s in found for m, _ in s.cuts}
    with evaluation(model), dense_products(model), _Counter() as counter, ExitStack() as stack:
        for module in maps:
            stack.callback(module.register_forward_pre_hook(_count_map(linear)).remove)
        for block in blocks:
            for handle in _count_products(block, counter, products):
                stack.callback(handle.remove)
        run(model, dummy_inputs(model, batch, tokens))
        total = counter.macs

    def per_unit(site: Site) -> float:
        if not site.units:
            return 0.0
        block = sum(linear.get(module, 0.0) for module, _ in site.cuts)
        if site.kind == "heads":
            inside = sum(linear.get(m, 0.0) for m in site.module.modules() if m in maps)
            block += products.get(site.module, 0.0) - inside
        return block / site.units

    return _with_fixed_part(total, found.heads, found.neurons, per_unit)


def params(model: nn.Module) -> LinearCost:
    """All parameters of the model; a tensor that two modules share counts once."""
    found = sites(model)
    return _with_fixed_part(sum(p.numel() for p in model.parameters()), found.heads, found.neurons, _unit_params)


def encoder_params(model: nn.Module) -> LinearCost:
    """Parameters inside the stacks of layers: no embeddings, pooler or task head."""
    found = sites(model)
    layers = {site.layer_module for site in found}
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    return _with_fixed_part(sum(p.numel() for p in inside), found.heads, found.neurons, _unit_params)


def map_params(model: nn.Module) -> LinearCost:
    """Weights of the linear maps inside the layers that the family table names, without biases."""
    found = sites(model)
    weights = {weight_of(module) for site in found for module, _ in site.cuts}

    def per_unit(site: Site) -> float:
        return sum(weight_of(module).numel() for module, _ in site.cuts) / max(site.units, 1)

    return _with_fixed_part(sum(w.numel() for w in weights), found.heads, found.neurons, per_unit)


def bits(model: nn.Module) -> LinearCost:
    """The most bits that an activation has in the products that are quantised; those of its dtype if none are."""
    found = [quantizer.levels.bits for quantizer in quantizers(model)]
    count = max(found, default=8 * next(model.parameters()).element_size())
    return LinearCost(float(count), (0.0,) * len(sites(model).heads), (0.0,) * len(sites(model).neurons))


def size_bytes(model: nn.Module) -> LinearCost:
    """Bytes of the tensors in `model.safetensors`: parameters and persistent buffers, shared ones once."""
    found = sites(model)
    total = sum(t.numel() * t.element_size() for _, t in _stored(model))
    return _with_fixed_part(total, found.heads, found.neurons, _unit_bytes)


def file_bytes(model: nn.Module) -> LinearCost:
    """`size_bytes` and an upper bound on the file's header, so that a limit on the size holds for the file itself."""
    cost = size_bytes(model)
    return LinearCost(cost.fixed + _header_bytes(model), cost.heads, cost.neurons)


def bypassed(kind: str, cost: LinearCost, model: nn.Module) -> LinearCost:
    """A cost of sub-networks whose empty blocks lose bias and norm too (`edits.Bypass`).

    Args:
        kind: of budget; what counts neither parameters nor bytes stays as it is.
        cost: of the model's sub-networks.
        model: the model.
    """
    if kind not in ("params", "encoder_params", "size"):
        return cost

    def spared(site: Site) -> float:
        tensors = [site.output.bias, *(site.norm.parameters() if site.norm is not None else ())]
        return sum(t.numel() * (t.element_size() if kind == "size" else 1) for t in tensors if isinstance(t, Tensor))

    return replace(cost, empty=tuple(map(spared, sites(model))))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own train/eval mode is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _with_fixed_part(
    total: float, heads: Iterable[Site], neurons: Iterable[Site], per_unit: Callable[[Site], float]
) -> LinearCost:
    """Everything that is not a unit's is fixed, so that the full network costs exactly `total`."""
    heads, neurons = tuple(heads), tuple(neurons)
    unit_heads, unit_neurons = tuple(map(per_unit, heads)), tuple(map(per_unit, neurons))
    units = sum(c * s.units for c, s in zip((*unit_heads, *unit_neurons), (*heads, *neurons), strict=True))
    return LinearCost(total - units, unit_heads, unit_neurons)


def _unit_tensors(site: Site) -> list[Tensor]:
    """The tensors that lose a part when one of the site's units goes."""
    found = [module.weight for module, _ in site.cuts]
    found += [module.bias for module, cut in site.cuts if cut.side == "out" and module.bias is not None]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _unit_params(site: Site) -> float:
    return sum(t.numel() for t in _unit_tensors(site)) / max(site.units, 1)


def _unit_bytes(site: Site) -> float:
    return sum(t.numel() * t.element_size() for t in _unit_tensors(site)) / max(site.units, 1)


def _stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and tensor of everything that a saved model holds, shared tensors under their first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            first.setdefault(id(tensor), (name, tensor))
    return list(first.values())


def _header_bytes(model: nn.Module) -> int:
    """Upper bound on the safetensors header: 8 bytes, then JSON with name, type, shape and place of each tensor.

    Checkpoints may use other names than the modules do, hence the allowance for each.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    tensors = _stored(model)
    end = sum(t.numel() * t.element_size() for _, t in tensors)
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")  # as long as, or longer than, the name that safetensors uses
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [end, end]}
    return 8 + len(json.dumps(header, separators=(",", ":")).encode()) + NAME_ALLOWANCE * len(tensors)


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


class _Counter(TorchDispatchMode):
    """Adds up the MACs of every operation that torch's FLOP table knows, in `macs`.

    `FlopCounterMode` itself also follows the nesting of modules, which fails on outputs that are views of parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry and packet is not _CPU_ATTENTION:
            with self:
                parts = func.decompose(*args, **kwargs)  # composite operations arrive whole in inference mode
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if packet is _CPU_ATTENTION:
            self.macs += _attention_macs(*args[:3])
        elif packet in flop_registry:
            self.macs += flop_registry[packet](*args, **kwargs, out_val=out) / 2
        return out


# the kernel behind `scaled_dot_product_attention` on a CPU; torch's FLOP table lacks it
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_macs(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Two products: queries × keys and probabilities × values; shapes (batch, heads, tokens, head width)."""
    batch, heads, length, width = query.shape
    return float(batch * heads * length * key.shape[-2] * (width + value.shape[-1]))


def _count_map(linear: dict[nn.Module, float]) -> Callable[..., None]:
    """Hook that adds rows × inputs × outputs of a linear map; a map may be called more than once per pass."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].numel() // max(in_features(module), 1)
        linear[module] = linear.get(module, 0.0) + rows * in_features(module) * out_features(module)

    return hook


def _count_products(block: nn.Module, counter: _Counter, products: dict[nn.Module, float]) -> tuple[Any, Any]:
    """Hooks that add the MACs counted between entering and leaving a block."""
    entered: list[float] = []

    def enter(module: nn.Module, args: Any) -> None:
        entered.append(counter.macs)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        products[block] = products.get(block, 0.0) + counter.macs - entered.pop()

    return block.register_forward_pre_hook(enter), block.register_forward_hook(leave)
