"""Vita-CLIP's image tower, forward and backward, against the literal one in which every prompt is a token.

    python benchmarks/vita.py                               # ViT-B/16, one clip of 8 frames, two rounds: about a minute of one core
    python benchmarks/vita.py --device cuda --clips 8       # bf16, and the share of the measured rate of bf16 products

Three towers with the same weights: `ours`; `literal`, with prompts as tokens and the same fused attention; `einsum`, the same with a
table of attention probabilities, as released. Outputs and gradients are compared before anything is reported. The rounds are
interleaved. On the CPU the time is that of the process, so that what else runs on the machine weighs little; wall times are there too.
FLOPs are counted on the meta device, for 8 and for 16 frames; the bytes kept for the backward pass in the first round."""

import argparse
import sys
import time
from pathlib import Path

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from epic_scale import made_with  # noqa: E402
from vita_literal import literal_vision  # noqa: E402
from xmic.adapter import trained_parameters  # noqa: E402
from xmic.files import write_json  # noqa: E402
from xmic.vita import VitaVision  # noqa: E402

WAYS = {"ours": lambda vision: vision, "literal": lambda vision: lambda x: literal_vision(vision, x),
        "einsum": lambda vision: lambda x: literal_vision(vision, x, fused=False)}


def rounded(x: float) -> float:
    return float(f"{x:.4g}")


def vit_b_16(frames: int) -> VitaVision:
    torch.manual_seed(0)
    return VitaVision(VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512, act_layer=QuickGELU), frames)


def count(frames: int) -> dict:
    "GFLOP of a step with one clip, without computing anything."
    with torch.device("meta"):
        vision, x = vit_b_16(frames), torch.empty(1, frames, 3, 224, 224)
    counts = dict(trained_parameters=trained_parameters(vision))
    for name in ("ours", "literal"):
        with FlopCounterMode(display=False) as forward:
            y = WAYS[name](vision)(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts[name] = dict(forward_gflop=rounded(forward.get_total_flops() / 1e9), backward_gflop=rounded(backward.get_total_flops() / 1e9))
    return counts


def step(way, vision: VitaVision, x: torch.Tensor, mixed: bool) -> tuple[torch.Tensor, float]:
    "The output of one step, and how many MiB were kept for its backward pass."
    vision.zero_grad(set_to_none=True)
    own = {p.untyped_storage()._cdata for p in [*vision.parameters(), *vision.tower.parameters()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = way(x)
    mib = sum(s.nbytes() for c, s in kept.items() if c not in own) / 2**20
    kept.clear()
    y.float().square().sum().backward()
    return y.detach().float(), mib


def matmul_rate(n: int = 8192, repeats: int = 20) -> float:
    "Measured TFLOP/s of one large bf16 product."
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3): a @ b
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats): a @ b
    torch.cuda.synchronize()
    return 2 * n**3 * repeats / (time.perf_counter() - begin) / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=["ours", "literal"], choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "vita.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    result = dict(counted={frames: count(frames) for frames in (8, 16)})

    vision = vit_b_16(args.frames).to(device)
    x = torch.randn(args.clips, args.frames, 3, 224, 224, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in args.ways}
    ends, peaks, kept = {}, {}, {}
    for round in range(-3 if cuda else 0, args.rounds):
        for name in args.ways:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            wall, cpu = time.perf_counter(), time.process_time()
            y, kept[name] = step(WAYS[name](vision), vision, x, mixed=cuda)
            if cuda: torch.cuda.synchronize()
            if round >= 0: times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            if round <= 0: ends[name] = [y, *(p.grad.float().clone() for p in vision.parameters() if p.grad is not None)]
            if cuda: peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    tolerance = 0.1 if cuda else 1e-3
    differences = {name: max(float((a - b).norm() / b.norm()) for a, b in zip(ends["ours"], ends[name]) if b.norm() > 1e-6) for name in args.ways}
    assert all(d < tolerance for d in differences.values()), differences

    best = {name: min(t[0 if cuda else 1] for t in pairs) for name, pairs in times.items()}
    result["measured"] = dict(
        model="ViT-B/16", frames=args.frames, clips=args.clips, rounds=args.rounds, precision="bf16 autocast" if cuda else "float32",
        seconds={n: rounded(b) for n, b in best.items()}, clock="wall" if cuda else "process",
        wall_seconds={n: [rounded(t[0]) for t in pairs] for n, pairs in times.items()},
        times_faster={n: rounded(best[n] / best["ours"]) for n in args.ways if n != "ours"},
        kept_mib={n: rounded(k) for n, k in kept.items()},
        times_less_kept={n: rounded(kept[n] / kept["ours"]) for n in args.ways if n != "ours"},
        largest_relative_difference={n: float(f"{d:.2g}") for n, d in differences.items() if n != "ours"})
    if cuda:
        rate = matmul_rate()
        flop = sum(result["counted"].get(args.frames, count(args.frames))["ours"][k] for k in ("forward_gflop", "backward_gflop")) * args.clips
        result["measured"] |= dict(peak_mib={n: rounded(p) for n, p in peaks.items()}, bf16_tflops_measured=rounded(rate),
                                   share_of_it=rounded(flop / best["ours"] / 1e3 / rate))
    result |= dict(made_with(device), threads=args.threads)
    write_json(args.out, result)
    print(args.out.read_text())


if __name__ == "__main__":
    main()
