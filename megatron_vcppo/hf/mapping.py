"""Which rows of which Hugging Face tensors make up each Megatron parameter. Imports neither megatron nor groups.

One table, ``parameters(arch, tp)``, serves import, export and live weight sync. A Megatron parameter, before it is
split over tensor-parallel ranks, is a stack of row blocks of Hugging Face tensors:

- linear_qkv: per key-value group, the group's query heads, its key head, its value head;
- linear_fc1: gate, then up; each of the two is split over the ranks by itself;
- embedding and output layer: the vocabulary's rows, then rows of padding (zeros);
- an expert of a mixture: its gate, up and down projection, named by its index among all experts of the layer. No rank
  has a part of an expert: expert parallelism gives each some of them whole;
- everything else: one tensor as it is. Norms of what attention and feed-forward layer add ("post") are parts of the
  layers that they come after: ``linear_proj.post_layernorm``, ``linear_fc2.post_layernorm``.

Names are those of Megatron's distributed checkpoints, which are Transformer Engine's (norms are called
``linear_qkv.layer_norm_weight`` and ``linear_fc1.layer_norm_weight``) with the layer's index in the whole model;
``canonical_name`` brings the local spec's names and a pipeline stage's layer numbers to them.
"""

import bisect
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_vcppo.hf.architecture import Architecture
from megatron_vcppo.integers import round_up

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Parameters whose rows are tokens, and padding."""
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.experts\.(\d+)\.(.+)$")
_LOCAL_EXPERT = re.compile(r"^mlp\.experts\.(?:local_experts\.(\d+)\.(.+)|(.+\.weight)(\d+))$")
"""Of Megatron's experts one by one, and of those that Transformer Engine multiplies together."""
_LOCAL_SPEC_NAMES = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}
_LOCAL_SPEC_NAMES_DENSE = _LOCAL_SPEC_NAMES | {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}


@dataclass(frozen=True)
class Block:
    """Rows [hf_row, hf_row + num_rows) of one Hugging Face tensor are rows [row, row + num_rows) of Megatron's."""

    hf_name: str
    hf_row: int
    row: int
    num_rows: int


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter of the whole model, before the split over tensor-parallel ranks."""

    name: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    """In Megatron's row order; rows that no block covers are padding."""
    split_dim: int | None
    """The dimension that tensor parallelism splits; None: every rank has all of it."""
    num_parts: int = 1
    """Equal parts along split_dim that are split one by one and then concatenated (linear_fc1: gate and up)."""
    expert: int | None = None
    """Its index among the layer's experts if it belongs to one: one rank of an expert-parallel group has all of it."""

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face tensors it is made of."""
        return tuple(dict.fromkeys(block.hf_name for block in self.blocks))


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Rows of embedding and output layer in Megatron: the next multiple of 128 and of ``tp``.

    Every tp that divides 128 gives the same size, so checkpoints reshard without a change of shape. Logits of padding
    rows must be masked (``[vocab_size:]``): they belong to no token.
    """
    return round_up(vocab_size, math.lcm(128, tp))


def parameters(arch: Architecture, tp: int = 1, kind: str = "actor") -> list[Parameter]:
    """Every parameter of the model, in the model's order; ``tp`` matters to the padded vocabulary only.

    kind: actor, or critic, which has a value head instead of the output layer: transformers' token classification
    with one label.
    """
    padded = (padded_vocab_size(arch.vocab_size, tp), arch.hidden_size)

    def vocabulary(name: str, hf_name: str) -> Parameter:
        return Parameter(name, padded, (Block(hf_name, 0, 0, arch.vocab_size),), split_dim=0)

    table = [vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    for layer in range(arch.num_layers):
        table += _layer_parameters(arch, layer)
    table.append(_plain("decoder.final_layernorm.weight", "model.norm.weight", (arch.hidden_size,)))
    if kind == "critic":
        table.append(_plain("value_head.weight", "score.weight", (1, arch.hidden_size)))
        table.append(_plain("value_head.bias", "score.bias", (1,)))
    elif not arch.tied:
        table.append(vocabulary("output_layer.weight", "lm_head.weight"))
    return table


def _plain(name: str, hf_name: str, shape: tuple[int, ...], split_dim: int | None = None) -> Parameter:
    return Parameter(name, shape, (Block(hf_name, 0, 0, shape[0]),), split_dim)


def _layer_parameters(arch: Architecture, layer: int) -> list[Parameter]:
    ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden = arch.hidden_size
    qkv_rows = arch.q_size + 2 * arch.kv_size
    attention = ours + "self_attention."
    norms = []
    if arch.norms != "post":
        norms.append((attention + "linear_qkv.layer_norm_weight", "input_layernorm"))
    if arch.norms != "pre":
        norms.append((attention + "linear_proj.post_layernorm.weight", "post_attention_layernorm"))
        norms.append((ours + "mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm"))
    table = [
        *(_plain(name, f"{theirs}{hf_name}.weight", (hidden,)) for name, hf_name in norms),
        Parameter(attention + "linear_qkv.weight", (qkv_rows, hidden), _qkv_blocks(arch, theirs, "weight"), 0),
        _plain(attention + "linear_proj.weight", theirs + "self_attn.o_proj.weight", (hidden, arch.q_size), 1),
        *_feed_forward(arch, layer, ours, theirs),
    ]
    if arch.qkv_bias:
        table.append(Parameter(attention + "linear_qkv.bias", (qkv_rows,), _qkv_blocks(arch, theirs, "bias"), 0))
    for norm, size in zip("qk", arch.qk_norm_sizes, strict=False):
        name, split_dim = f"self_attn.{norm}_norm.weight", 0 if arch.wide_qk_norm else None
        table.append(_plain(attention + f"{norm}_layernorm.weight", theirs + name, (size,), split_dim))
    return table


def _feed_forward(arch: Architecture, layer: int, ours: str, theirs: str) -> list[Parameter]:
    """The norm before it and its matrices: of one network, or of the router and every expert."""
    hidden, mixture = arch.hidden_size, arch.experts
    norm = theirs + ("pre_feedforward" if arch.norms == "both" else "post_attention") + "_layernorm.weight"
    if mixture is None or layer in mixture.dense_layers:
        table = [_plain(ours + "mlp.linear_fc1.layer_norm_weight", norm, (hidden,))]
        return (table if arch.norms != "post" else []) + _gated_mlp(arch, ours + "mlp.", theirs + "mlp.", arch.ffn_size)
    table = [
        _plain(ours + "pre_mlp_layernorm.weight", norm, (hidden,)),
        _plain(ours + "mlp.router.weight", theirs + "mlp.gate.weight", (mixture.count, hidden)),
    ]
    for expert in range(mixture.count):
        names = (f"{ours}mlp.experts.experts.{expert}.", f"{theirs}mlp.experts.{expert}.")
        table += _gated_mlp(arch, *names, mixture.ffn_size, expert)
    return table


def _gated_mlp(arch: Architecture, ours: str, theirs: str, ffn: int, expert: int | None = None) -> list[Parameter]:
    gate, up = Block(theirs + "gate_proj.weight", 0, 0, ffn), Block(theirs + "up_proj.weight", 0, ffn, ffn)
    down, hidden = Block(theirs + "down_proj.weight", 0, 0, arch.hidden_size), arch.hidden_size
    if expert is not None:
        return [
            Parameter(ours + "linear_fc1.weight", (2 * ffn, hidden), (gate, up), split_dim=None, expert=expert),
            Parameter(ours + "linear_fc2.weight", (hidden, ffn), (down,), split_dim=None, expert=expert),
        ]
    return [
        Parameter(ours + "linear_fc1.weight", (2 * ffn, hidden), (gate, up), split_dim=0, num_parts=2),
        Parameter(ours + "linear_fc2.weight", (hidden, ffn), (down,), split_dim=1),
    ]


def _qkv_blocks(arch: Architecture, prefix: str, kind: str) -> tuple[Block, ...]:
    query_rows = arch.q_size // arch.num_kv_heads
    blocks, row = [], 0
    for group in range(arch.num_kv_heads):
        for name, num_rows in (("q", query_rows), ("k", arch.head_dim), ("v", arch.head_dim)):
            blocks.append(Block(f"{prefix}self_attn.{name}_proj.{kind}", group * num_rows, row, num_rows))
            row += num_rows
    return tuple(blocks)


def hf_shapes(table: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the Hugging Face checkpoint, in the table's order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in table:
        for block in parameter.blocks:
            rows = shapes.get(block.hf_name, (0,))[0]
            shapes[block.hf_name] = (max(rows, block.hf_row + block.num_rows), *parameter.shape[1:])
    return shapes


def canonical_name(name: str, layer_offset: int = 0, expert_offset: int = 0, sparse: Container[int] = ()) -> str:
    """The table's name of a parameter as a rank's model calls it.

    ``layer_offset`` is the number of layers on earlier pipeline stages, ``expert_offset`` that of experts on earlier
    ranks of the expert-parallel group; ``sparse``: ``Architecture.sparse_layers``.
    """
    match = _LAYER.match(name)
    if not match:
        return name
    layer = int(match[1]) + layer_offset
    names = _LOCAL_SPEC_NAMES if layer in sparse else _LOCAL_SPEC_NAMES_DENSE
    inner = names.get(match[2], match[2])
    if expert := _LOCAL_EXPERT.match(inner):
        index, rest = (expert[1], expert[2]) if expert[1] else (expert[4], expert[3])
        inner = f"mlp.experts.experts.{int(index) + expert_offset}.{rest}"
    return f"decoder.layers.{layer}.{inner}"


@dataclass(frozen=True)
class Place:
    """Where a distributed checkpoint has a parameter: under a key, whose tensor may stack layers and experts."""

    key: str
    stack: tuple[int, ...]
    """Leading axes of the tensor: the number of layers, then of experts."""
    index: tuple[int, ...]
    """On these axes."""


def checkpoint_place(name: str, arch: Architecture) -> Place:
    """The place of the table's parameter ``name``. Layers are stacked unless some have experts and some have not;
    experts always are."""
    match = _LAYER.match(name)
    if not match:
        return Place(name, (), ())
    prefix = "decoder.layers."
    stack: tuple[int, ...] = (arch.num_layers,)
    index: tuple[int, ...] = (int(match[1]),)
    if arch.experts is not None and arch.experts.dense_layers:
        prefix, stack, index = f"{prefix}{match[1]}.", (), ()
    expert = _EXPERT.match(match[2])
    if not expert:
        return Place(prefix + match[2], stack, index)
    assert arch.experts is not None
    return Place(f"{prefix}mlp.experts.experts.{expert[2]}", (*stack, arch.experts.count), (*index, int(expert[1])))


def layer_of(name: str) -> int | None:
    """The layer that the table's parameter ``name`` belongs to, if any."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def pipeline_stage(name: str, layers: Sequence[int]) -> int:
    """The pipeline stage that holds a parameter (its first holder, where tied embeddings have two).

    layers: how many each stage has.
    """
    layer = layer_of(name)
    if layer is not None:
        return bisect.bisect(tuple(accumulate(layers)), layer)
    return 0 if name.startswith("embedding.") else len(layers) - 1


def merge(parameter: Parameter, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The full Megatron tensor, of ``parameter.shape``, from Hugging Face tensors by name; padding rows are zero.

    tensors: those of ``parameter.hf_names``, of one dtype, with the shapes of ``hf_shapes``.
    """
    pieces = [tensors[block.hf_name][block.hf_row : block.hf_row + block.num_rows] for block in parameter.blocks]
    padding = parameter.shape[0] - sum(block.num_rows for block in parameter.blocks)
    if padding:
        pieces.append(pieces[0].new_zeros(padding, *parameter.shape[1:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def split(parameter: Parameter, full: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inverse of ``merge``: Hugging Face tensors by name, contiguous; views of ``full`` where that is possible.

    full: contiguous, of ``parameter.shape``. The results have the shapes of ``hf_shapes``; padding rows are dropped.
    """
    pieces: dict[str, list[torch.Tensor]] = {}
    for block in parameter.blocks:
        pieces.setdefault(block.hf_name, []).append(full[block.row : block.row + block.num_rows])
    return {name: part[0] if len(part) == 1 else torch.cat(part) for name, part in pieces.items()}


def shard(parameter: Parameter, full: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """The part of the full tensor that one tensor-parallel rank holds, contiguous.

    full: ``parameter.shape``. Result: the same shape, with split_dim divided by tp_size where there is one.
    """
    if parameter.split_dim is None or tp_size == 1:
        return full
    parts = full.chunk(parameter.num_parts, dim=parameter.split_dim)
    mine = [part.chunk(tp_size, dim=parameter.split_dim)[tp_rank] for part in parts]
    return (mine[0] if len(mine) == 1 else torch.cat(mine, dim=parameter.split_dim)).contiguous()


def unshard(parameter: Parameter, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Inverse of ``shard``: the full tensor, of ``parameter.shape``, from all ranks' parts in rank order."""
    if parameter.split_dim is None or len(shards) == 1:
        return shards[0]
    parts = [part.chunk(parameter.num_parts, dim=parameter.split_dim) for part in shards]
    return torch.cat([part[index] for index in range(parameter.num_parts) for part in parts], dim=parameter.split_dim)
