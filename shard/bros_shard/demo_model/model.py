"""The Llama architecture in plain PyTorch, shaped for training speed on a CPU; parameters bear Hugging Face names.

Weights are fp32 and are cast to bf16 where they are used. Two operations are written by hand because they
decide the speed on a CPU: the loss, which never holds all logits, and attention, which groups query heads by
their key head and is two plain matrix products (twice as fast as the fused CPU kernel at 256 positions).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Rows of logits held at once by the loss: 1024 x 4096 fp32 fit in the cache of a server CPU.
LOSS_CHUNK_ROWS: Final = 1024
#: Plain products won at 512 positions, the fused kernel at 2048, where the scores outgrow the cache.
FUSED_ATTENTION_FROM: Final = 1024
COMPUTE_DTYPE: Final = torch.bfloat16


@dataclass(frozen=True)
class ModelConfig:
    """The shape; field names are those of `transformers.LlamaConfig`."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048


class Linear(nn.Linear):
    """Without bias; computes in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_kv_heads = config.num_key_value_heads
        self.group_size = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (rows, length, hidden_size) -> the same shape."""
        q = rotate(self.split_heads(self.q_proj(x)), cos, sin)
        k = rotate(self.split_heads(self.k_proj(x)), cos, sin)
        v = self.split_heads(self.v_proj(x))
        fused = x.shape[1] >= FUSED_ATTENTION_FROM or x.is_cuda
        out = fused_attention(q, k, v) if fused else grouped_attention(q, k, v)
        joined: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return joined

    def split_heads(self, x: Tensor) -> Tensor:
        """(rows, length, heads * head_dim) -> (rows, heads, length, head_dim)"""
        rows, length, _ = x.shape
        return x.view(rows, length, -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Everything but the output matrix, which is the embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """Next-token model. `state_dict()` has the names and shapes of `LlamaForCausalLM` with tied embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Unit-variance projections; each layer starts as the identity, because what it adds starts at zero."""
        nn.init.normal_(self.model.embed_tokens.weight, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
            elif name.endswith("_proj.weight"):
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats. tokens, targets: (rows, length), int64; targets are tokens moved by one."""
        embedding = self.model.embed_tokens.weight.to(COMPUTE_DTYPE)
        x = F.embedding(tokens, embedding)
        cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        hidden = self.model.norm(x).flatten(0, 1)
        loss: Tensor = TiedCrossEntropy.apply(hidden, embedding, targets.flatten())  # type: ignore[no-untyped-call]
        return loss


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, head_dim / 2)."""
    exponents = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    angles = torch.outer(torch.arange(length, device=device), config.rope_theta**-exponents)
    return angles.cos().to(COMPUTE_DTYPE), angles.sin().to(COMPUTE_DTYPE)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in Llama's layout: component i turns with component i + head_dim / 2."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: (rows, heads, length, head_dim); k, v: (rows, kv_heads, length, head_dim) -> like q.

    The query heads that share a key head are laid below each other: one product instead of `group_size`.
    """
    rows, num_heads, length, head_dim = q.shape
    num_kv_heads = k.shape[1]
    q = (q / math.sqrt(head_dim)).reshape(rows * num_kv_heads, -1, head_dim)
    k = k.reshape(rows * num_kv_heads, length, head_dim)
    v = v.reshape(rows * num_kv_heads, length, head_dim)
    future = torch.full((length, length), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.bmm(q, k.transpose(1, 2)).view(-1, length, length) + future
    weights = scores.softmax(-1).view(rows * num_kv_heads, -1, length)
    return torch.bmm(weights, v).view(rows, num_heads, length, head_dim)


class TiedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ embedding.T, with both gradients taken while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
        """hidden: (tokens, hidden_size); embedding: (vocab_size, hidden_size); targets: (tokens,)"""
        num_tokens = len(hidden)
        needs_grad = any(ctx.needs_input_grad)
        hidden_grad = torch.empty_like(hidden)
        embedding_grad = torch.zeros_like(embedding, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, num_tokens, LOSS_CHUNK_ROWS):
            chunk = slice(start, start + LOSS_CHUNK_ROWS)
            rows, labels = hidden[chunk], targets[chunk, None]
            log_probs = (rows @ embedding.t()).float().log_softmax(-1)
            total -= log_probs.gather(1, labels).sum()
            if not needs_grad:
                continue
            error = log_probs.exp_()  # d loss / d logits = probabilities - one-hot
            error.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=error.dtype))
            error = (error / num_tokens).to(hidden.dtype)
            hidden_grad[chunk] = error @ embedding
            embedding_grad += error.t() @ rows
        ctx.save_for_backward(hidden_grad, embedding_grad.to(embedding.dtype))
        return total / num_tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, embedding_grad = ctx.saved_tensors
        return hidden_grad * grads[0], embedding_grad * grads[0], None
