"""The three forms of transformers' gated delta layers: how each projects, and what it calls its parts."""

from __future__ import annotations

from torch import Tensor, nn

from titans_backends.integrations.transformers.forward import GatedDelta
from titans_backends.integrations.transformers.projected import Projected

__all__ = ["FusedProjection", "JointProjection", "SeparateProjections"]


class _Qwen(GatedDelta):
    """The names that the Qwen families share."""

    norm: nn.Module
    out_proj: nn.Module

    def _gate_norm(self) -> nn.Module:
        """`norm`."""
        return self.norm

    def _output_projection(self) -> nn.Module:
        """`out_proj`."""
        return self.out_proj


class JointProjection(_Qwen):
    """qwen3_5, qwen3_5_moe and qwen4_exp: q, k and v side by side from one projection, z, b and a from one each."""

    in_proj_qkv: nn.Module
    in_proj_z: nn.Module
    in_proj_b: nn.Module
    in_proj_a: nn.Module

    def _projected(self, x: Tensor) -> Projected:
        """Views of four products."""
        mixed: Tensor = self.in_proj_qkv(x)
        z: Tensor = self.in_proj_z(x)
        return Projected(*self._heads(mixed, -1), z.unflatten(-1, (-1, self.head_v_dim)), self.in_proj_b(x), self.in_proj_a(x), mixed)


class FusedProjection(_Qwen):
    """qwen3_next: q, k, v and z of one key head beside those of the next, and so b and a."""

    in_proj_qkvz: nn.Module
    in_proj_ba: nn.Module

    def _projected(self, x: Tensor) -> Projected:
        """q, k, b and a are views; v and z are copied where a key head has several value heads."""
        shared = self.num_v_heads // self.num_k_heads
        values, heads = shared * self.head_v_dim, (self.num_k_heads, -1)
        q, k, v, z = self.in_proj_qkvz(x).unflatten(-1, heads).split([self.head_k_dim, self.head_k_dim, values, values], -1)
        b, a = self.in_proj_ba(x).unflatten(-1, heads).split([shared, shared], -1)
        shape = (*v.shape[:2], self.num_v_heads, self.head_v_dim)
        return Projected(q, k, v.reshape(shape), z.reshape(shape), b, a)


class SeparateProjections(GatedDelta):
    """olmo_hybrid: one projection each; beta up to 2 where negative eigenvalues are allowed."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    a_proj: nn.Module
    b_proj: nn.Module
    g_proj: nn.Module
    o_norm: nn.Module
    o_proj: nn.Module
    allow_neg_eigval: bool

    def _projected(self, x: Tensor) -> Projected:
        """Views of six products."""
        keys, values = (self.num_k_heads, self.head_k_dim), (self.num_v_heads, self.head_v_dim)
        q, k = self.q_proj(x).unflatten(-1, keys), self.k_proj(x).unflatten(-1, keys)
        v, z = self.v_proj(x).unflatten(-1, values), self.g_proj(x).unflatten(-1, values)
        return Projected(q, k, v, z, self.b_proj(x), self.a_proj(x))

    def _beta(self, b: Tensor) -> Tensor:
        """In (0, 2) or (0, 1)."""
        return b.sigmoid() * 2.0 if self.allow_neg_eigval else b.sigmoid()

    def _gate_norm(self) -> nn.Module:
        """`o_norm`."""
        return self.o_norm

    def _output_projection(self) -> nn.Module:
        """`o_proj`."""
        return self.o_proj
