"""Vita-CLIP's image tower written out: every prompt is a token that asks, is transformed, and is dropped behind the block."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmic.vita import VitaVision


def attention(module: nn.Module, x: Tensor, fused: bool) -> Tensor:
    "Every token looks at every token; without `fused`, by a table of probabilities."
    split = lambda z: z.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    q, k, v = map(split, F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1))
    if fused:
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        out = torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k).softmax(-1), v)
    return module.out_proj(out.transpose(1, 2).flatten(2))


def literal_vision(
    vision: VitaVision,
    x: Tensor,  # (B, T, 3, S, S)
    fused: bool = True,
) -> Tensor:  # (B, D)
    "What `vision(x)` is to give."
    tower, (b, t) = vision.tower, x.shape[:2]
    x = tower.conv1(x.flatten(0, 1)).flatten(2).transpose(1, 2)
    x = torch.cat([tower.class_embedding.expand(b * t, 1, -1), x], 1) + tower.positional_embedding
    x = tower.ln_pre(x + vision.time_embedding.repeat(b, 1)[:, None])
    for block, p in zip(tower.transformer.resblocks, vision.prompts):
        general = 0 if p.global_prompts is None else len(p.global_prompts)
        if general:
            x = torch.cat([x[:, :1], p.global_prompts.expand(b * t, -1, -1), x[:, 1:]], 1)
        c = p.cls_proj(x[:, 0].view(b, t, -1)) if p.cls_proj else None
        tokens = x
        if p.local_prompts is not None:
            local = (p.local_prompts + c).repeat_interleave(t, 0)
            tokens = torch.cat([tokens[:, :1], local, tokens[:, 1:]], 1)
        if p.summary_attn:
            summary = c + attention(p.summary_attn, p.summary_ln(c), fused)
            tokens = torch.cat([tokens, summary.view(b * t, 1, -1)], 1)
        tokens = tokens + block.ls_1(attention(block.attn, block.ln_1(tokens), fused))
        first = 1 + (t if p.local_prompts is not None else 0)
        x = torch.cat([tokens[:, :1], tokens[:, first:tokens.shape[1] - bool(p.summary_attn)]], 1)
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
        x = torch.cat([x[:, :1], x[:, 1 + general:]], 1)
    return (tower.ln_post(x)[:, 0] @ tower.proj).view(b, t, -1).mean(1)
