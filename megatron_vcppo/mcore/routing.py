"""The router of a mixture of experts, its losses, and how evenly it loads the experts.

A router sees the tokens of a packed micro-batch that this rank holds. Its losses are sums over tokens divided by a
given denominator, as all losses here, so they do not depend on how a batch was packed or shared out: the balance is
that within each sequence. With f_i the share of a sequence's tokens for which expert i is chosen (the f_i add up to K,
the experts per token), and P_i the mean of their probabilities for it, over sequences s and layers l

    auxiliary loss = mean over l, token-weighted mean over s, of num_experts · Σ_i f_i P_i

which is K if the load is even; of one sequence and one layer it is the loss of Hugging Face's
``load_balancing_loss_func``, and the sequence-wise balance loss of DeepSeek-V3 (arXiv:2412.19437, eq. 17) times K.
The z-loss is the mean over l and tokens of (log Σ exp logits)² (arXiv:2202.08906). Padding counts nowhere.

With routing replay a token takes the experts that the engine chose for it. Their weights are the router's own
probabilities, so gradients reach the router as they do for its own choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import HAVE_TE
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vcppo.data.packing import PackedMicrobatch
from megatron_vcppo.hf.experts import Experts
from megatron_vcppo.mcore.context_parallel import ContextShard, PackedParams


@dataclass(frozen=True)
class RoutedTokens:
    """The sequence of each token that this rank's routers see."""

    sequence: Tensor
    """int64 [tokens of this rank]: its index among the micro-batch's S sequences, S of padding."""
    lengths: Tensor
    """float32 [S]: tokens of each sequence, on all ranks."""
    experts: Tensor | None = None
    """[tokens of this rank, layers, K]: those that the engine chose; None: routers choose."""
    is_replayed: Tensor | None = None
    """bool [tokens of this rank]: tokens with such experts. Padding and the last token of a sequence, which no engine
    runs, have none."""

    @property
    def is_real(self) -> Tensor:
        """bool [tokens of this rank]: no padding."""
        return self.sequence < len(self.lengths)


@dataclass
class RoutedParams(PackedParams):
    """What the layers of a mixture get about a packed micro-batch."""

    tokens: RoutedTokens | None = None


def routed_tokens(
    microbatch: PackedMicrobatch, shard: ContextShard, config: TransformerConfig, replays: bool
) -> RoutedTokens:
    """Those of this rank: its share over context parallelism, and of that its part over sequence parallelism.

    replays: whether routers take the experts that the micro-batch has, if it has any.
    """

    def mine(whole: Tensor) -> Tensor:
        part = shard.take(whole)
        if config.sequence_parallel:
            rank = parallel_state.get_tensor_model_parallel_rank()
            part = part.chunk(config.tensor_model_parallel_size)[rank]
        return part

    device = microbatch.token_ids.device
    spans = microbatch.cu_seqlens.diff().long()
    lengths = torch.tensor(microbatch.lengths, device=device)
    owner = torch.arange(len(spans), device=device).repeat_interleave(spans)
    # A segment is a sequence and padding at its end; the last one may be padding only.
    real = torch.cat((lengths, lengths.new_zeros(len(spans) - len(lengths))))[owner]
    tokens = RoutedTokens(mine(torch.where(microbatch.position_ids < real, owner, len(lengths))), lengths.float())
    if not replays or microbatch.routed_experts is None:
        return tokens
    is_replayed = mine(microbatch.position_ids < real - 1)
    return replace(tokens, experts=mine(microbatch.routed_experts), is_replayed=is_replayed)


@dataclass
class RouterStep:
    """What all routers of a model on this rank share: the losses of a training step, and what they saw in it."""

    experts: Experts
    num_layers: int
    """With experts, on all pipeline stages."""
    aux_loss_coef: float
    z_loss_coef: float
    num_tokens: int = 1
    """Of all sequences of the step, on all replicas: the denominator."""
    gradient_scale: float = 1.0
    """Undoes the mean that the gradient reduction takes over ranks."""
    layers: dict[int, Tensor] = field(default_factory=dict)
    """By layer number, of this rank's tokens in this step: float64 [count + 4]: how often each expert was chosen; the
    layer's auxiliary and z-loss; replayed tokens, and those of them for which the router would choose others."""

    def begin(self, num_tokens: int, gradient_scale: float) -> None:
        """A training step of so many tokens begins."""
        self.layers.clear()
        self.num_tokens, self.gradient_scale = num_tokens, gradient_scale

    def add(
        self, layer: int, logits: Tensor, chosen: Tensor, weights: Tensor, tokens: RoutedTokens, own: Tensor
    ) -> Tensor:
        """Count one micro-batch in one layer; returns ``weights`` with the losses attached to their gradient.

        Args:
            layer: its number.
            logits: float32 [tokens, count].
            chosen: bool [tokens, count].
            weights: [tokens, count].
            tokens: which these are.
            own: [tokens, K], the experts that the router itself would choose.
        """
        num_sequences, real = len(tokens.lengths), tokens.is_real[:, None]
        picks = (chosen & real).float()
        counts = picks.new_zeros(num_sequences + 1, picks.shape[1]).index_add_(0, tokens.sequence, picks)
        here = picks.sum(0)
        group = parallel_state.get_tensor_and_context_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(counts, group=group)
        share = counts[:num_sequences] / tokens.lengths[:, None]
        share = torch.cat((share, share.new_zeros(1, share.shape[1])))[tokens.sequence]
        per_token = self.num_tokens * self.num_layers
        aux_loss = (logits.softmax(-1) * share).sum() * self.experts.count / per_token
        z_loss = (logits.logsumexp(-1, keepdim=True).square() * real).sum() / per_token
        replayed = differs = aux_loss.new_zeros(())
        if tokens.is_replayed is not None:
            others = ~chosen.gather(1, own).all(1) & tokens.is_replayed
            replayed, differs = tokens.is_replayed.sum().float(), others.sum().float()
        found = torch.cat((here, torch.stack((aux_loss, z_loss, replayed, differs)).detach())).double()
        self.layers[layer] = self.layers[layer] + found if layer in self.layers else found
        loss = self.aux_loss_coef * aux_loss + self.z_loss_coef * z_loss
        return _AttachLoss.apply(weights, loss, self.gradient_scale) if loss.requires_grad else weights

    def metrics(self) -> dict[str, float]:
        """Of the step, over all ranks; collective over all of them.

        router_aux_loss and router_z_loss: without their coefficients. router_max_load and router_min_load: tokens of
        the fullest and the emptiest expert of all layers, relative to the mean over the experts of its layer.
        router_balance: entropy of the load relative to that of an even one, the mean over layers. With routing replay
        router_mismatch: of the replayed tokens and layers, the share for which the router would have chosen others.
        """
        count = self.experts.count
        device = torch.cuda.current_device()
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        extremes = torch.zeros(2, dtype=torch.float64, device=device)
        if self.layers:
            layers = torch.stack([self.layers[number] for number in sorted(self.layers)])
            dist.all_reduce(layers, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
            load = layers[:, :count] / layers[:, :count].sum(1, keepdim=True).clamp(min=1)
            entropy = -torch.special.xlogy(load, load).sum(1) / max(math.log(count), 1e-9)
            sums = torch.stack((*layers[:, count:].sum(0), entropy.sum() / self.num_layers))
            extremes = torch.stack((load.max() * count, -load.min() * count))
        else:
            extremes -= math.inf
        group = parallel_state.get_pipeline_model_parallel_group()
        if dist.get_world_size(group) > 1:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        aux_loss, z_loss, replayed, differs, balance, largest, smallest = (*sums.tolist(), *extremes.tolist())
        found = {
            "aux_loss": aux_loss,
            "z_loss": z_loss,
            "balance": balance,
            "max_load": largest,
            "min_load": -smallest,
            **({"mismatch": differs / replayed} if replayed else {}),
        }
        return {f"router_{name}": value for name, value in found.items()}


class Router(TopKRouter):
    """Softmax over all experts, the best K of them, their probabilities as weights: as Qwen3-MoE defines it.

    With ``RoutedTokens.experts`` these are taken instead of the best.
    """

    step: RouterStep
    tokens: RoutedTokens
    """Of the micro-batch that comes next."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight.data = self.weight.data.to(torch.cuda.current_device())  # Megatron makes it on the CPU

    def gating(self, input: Tensor) -> Tensor:
        """Logits in float32: [tokens, 1, hidden] -> [tokens, 1, experts]."""
        if HAVE_TE:
            return super().gating(input)
        # Megatron 0.16's own product looks for Transformer Engine's where there is none.
        return F.linear(input.float(), self.weight.float())

    def routing(self, logits: Tensor, padding_mask: None = None) -> tuple[Tensor, Tensor]:
        """logits [tokens, 1, experts] -> the weight of each expert for each token, 0 where it is not chosen, and
        whether it is: [tokens, experts]."""
        logits = logits.view(-1, self.config.num_moe_experts).float()
        probabilities = logits.softmax(-1)
        own = index = probabilities.topk(self.topk, dim=-1).indices
        if self.tokens.experts is not None:
            assert self.tokens.is_replayed is not None
            engines = self.tokens.experts[:, self.layer_number - 1].long()
            index = torch.where(self.tokens.is_replayed[:, None], engines, own)
        best = probabilities.gather(1, index)
        if self.step.experts.norm_topk_prob:
            best = best / best.sum(-1, keepdim=True)
        weights = torch.zeros_like(logits).scatter(1, index, best)
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        if self.training and torch.is_grad_enabled():  # not in the first pass of recomputed layers
            weights = self.step.add(self.layer_number, logits, chosen, weights, self.tokens, own)
        return weights, chosen


class SparseLayer(TransformerLayer):
    """A layer with experts. They are reduced over the ranks that have the same ones, whatever parallel.ep is."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.mlp.experts.parameters():
            # Megatron does so where ep > 1. But experts are whole, so that tensor-parallel ranks have them alike, too.
            parameter.allreduce = False

    def forward(self, *args: Any, packed_seq_params: RoutedParams, **kwargs: Any) -> Any:
        """As TransformerLayer's; also when the layer is recomputed, the router gets the right micro-batch's tokens."""
        self.mlp.router.tokens = packed_seq_params.tokens
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


def routers(model: torch.nn.Module) -> Sequence[Router]:
    """Those of this rank's layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


class _AttachLoss(torch.autograd.Function):
    """Its output is its first argument; the gradient of the loss is ``scale``, whatever becomes of the output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.device = scale, loss.device
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_output, torch.tensor(ctx.scale, device=ctx.device), None
