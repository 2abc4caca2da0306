"""Learned prompts through ViT-B/16's text tower: the kit against the plain way, forward and backward. See README.md."""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from epic_scale import alone, made_with
from xmic.classes import ClassSet
from xmic.encoders import ClassEmbeddings, build_model
from xmic.files import DataError, write_json
from xmic.prompting import CoCoOp, CoOp
from xmic.streams import Batch
from xmic.text import TextTower
from xmic.devices import pick_device
from xmic.training import peak_memory

ROOT = Path(__file__).resolve().parents[1]
MODEL, FRAMES = "ViT-B-16-quickgelu", 16
CASES = {  # method, learned vectors, videos, classes
    "CoOp, 97 verbs": ("coop", 16, 32, "epic verbs"),
    "CoOp, 300 nouns": ("coop", 16, 32, "epic nouns"),
    "CoCoOp, 97 verbs, batch 4": ("cocoop", 4, 4, "epic verbs"),
    "CoCoOp, 521 nouns, batch 8": ("cocoop", 4, 8, "ego4d nouns"),
}
REFERENCE = [name for name in CASES if "521" not in name]  # there the plain way takes minutes


def class_names(which: str) -> tuple[str, ...]:
    "A real class list."
    data = Path(os.environ.get("XMIC_TEST_DATA", ROOT / "../shared/data")).resolve()
    if which == "ego4d nouns":
        return tuple(ClassSet.from_ego4d(data / "ego4d_lta_taxonomy/fho_lta_taxonomy.json", "noun").names)
    return tuple(ClassSet.from_epic(data / f"epic_kitchens_100_annotations/EPIC_100_{which.split()[1][:-1]}_classes.csv").names)


# The plain way

class Plain(nn.Module):
    "CoOp and CoCoOp as one writes them first: all 77 positions of all classes in every step, for CoCoOp for every video."

    def __init__(self, model: nn.Module, kit: nn.Module):
        super().__init__()
        self.clip, self.kit, self.context = [model], kit, kit.prompts.vectors

    def encode(self, context: Tensor, embedded: Tensor, ends: Tensor) -> Tensor:  # (C, D)
        clip, p = self.clip[0], len(context)
        x = torch.cat([embedded[:, :1], context.expand(len(embedded), -1, -1), embedded[:, 1 + p:]], 1)
        x = clip.transformer(x + clip.positional_embedding, attn_mask=clip.attn_mask)
        return clip.ln_final(x)[torch.arange(len(x)), ends] @ clip.text_projection

    def forward(self, batch: Batch, classes: ClassEmbeddings) -> Tensor:  # (B, C)
        tokens = open_clip.tokenize([f"{' '.join(['X'] * len(self.context))} {name}." for name in classes.names]).to(self.context.device)
        embedded, ends = self.clip[0].token_embedding(tokens), tokens.argmax(-1)
        video = F.normalize(batch.video.mean(1), dim=-1)
        if isinstance(self.kit, CoOp):
            return 100 * video @ F.normalize(self.encode(self.context, embedded, ends), dim=-1).T
        shifts = self.kit.meta_net(video)
        return torch.stack([100 * F.normalize(self.encode(self.context + shift, embedded, ends), dim=-1) @ v for v, shift in zip(video, shifts)])


# Measuring

def measure(case: str, plain: bool, untimed: int, steps: int, device: str | None, precision: str, threads: int) -> dict:
    "One case in this process: seconds of a step, memory, FLOPs, and the gradient of the learned vectors for comparison."
    torch.set_num_threads(threads)
    method, length, videos, which = CASES[case]
    device, names = pick_device(device), class_names(which)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(MODEL).to(device).requires_grad_(False)
    torch.manual_seed(0)
    tower = TextTower(model, open_clip.get_tokenizer(MODEL))
    kit = (CoOp(tower, length) if method == "coop" else CoCoOp(tower, 512, length, "random")).to(device)
    run = Plain(model, kit) if plain else kit
    batch = Batch(torch.randn(videos, FRAMES, 512, device=device))
    classes = ClassEmbeddings(names, torch.zeros(len(names), 512, device=device))
    labels = torch.arange(videos, device=device) % len(names)
    before = peak_memory(device)

    def step() -> float:
        kit.zero_grad()
        total, size = 0.0, 1 if plain and method == "cocoop" else videos  # the plain way would hold every video's graph
        for i in range(0, videos, size):
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                logits = run(Batch(batch.video[i:i + size]), classes)
            loss = F.cross_entropy(logits, labels[i:i + size]) * size / videos
            loss.backward()
            total = total + loss.detach()
        return float(total)  # waits for the device

    wall, cpu = [], []
    for _ in range(untimed + steps):  # the kit's first step packs the class list
        begin, used = time.perf_counter(), time.process_time()
        loss = step()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - used)
    after = peak_memory(device)
    with FlopCounterMode(display=False) as counter: step()  # takes memory of its own
    return dict(case=case, way="plain" if plain else "kit", classes=len(names), videos=videos, learned_vectors=length, untimed=untimed, steps=steps,
                step_ms=1000 * float(np.median(wall[untimed:])), cpu_ms=1000 * float(np.median(cpu[untimed:])), tflop=counter.get_total_flops() / 1e12,
                memory_before_mib=before, memory_peak_mib=after, loss=loss, gradient=kit.prompts.vectors.grad.flatten().tolist())


def matmul_rate(device: str | None, precision: str, threads: int) -> float:
    "TFLOP/s of one large matrix product in the same precision, the best of five."
    torch.set_num_threads(threads)
    device = pick_device(device)
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12


def compare(results: list[dict]) -> list[dict]:
    "How many times longer the plain way takes, and how far its gradient of the learned vectors is from the kit's."
    kit = {r["case"]: r for r in results if r["way"] == "kit"}
    rows = []
    for plain in [r for r in results if r["way"] == "plain"]:
        ours = kit[plain["case"]]
        a, b = (np.array(r["gradient"]) for r in (ours, plain))
        rows.append(dict(case=plain["case"], times_faster=plain["step_ms"] / ours["step_ms"], times_less_cpu=plain["cpu_ms"] / ours["cpu_ms"],
                         times_fewer_flop=plain["tflop"] / ours["tflop"], gradient_difference=float(np.linalg.norm(a - b) / np.linalg.norm(b))))
        if not rows[-1]["gradient_difference"] < 0.05:
            raise DataError(f"{plain['case']}: the gradients of the two ways differ by {rows[-1]['gradient_difference']:.1%}; the times mean nothing")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=3, help="timed steps of the kit (default: 3)")
    parser.add_argument("--plain-steps", type=int, default=1, help="timed steps of the plain way; 0: leave it out (default: 1)")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on a GPU, else fp32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "bench" / "text_tower.json")
    options = parser.parse_args()
    device = pick_device(options.device)
    precision = options.precision or ("bf16" if device.type == "cuda" else "fp32")
    report = dict(made_with(device), threads=options.threads, model=MODEL, precision=precision,
                  matmul_tflops=alone(matmul_rate, options.device, precision, options.threads))
    try:
        results = []
        for case in options.cases:
            for plain in [False, True] if options.plain_steps and case in REFERENCE else [False]:
                single = plain or case not in REFERENCE  # takes long: no step is thrown away
                steps = options.plain_steps if plain else 1 if single else options.steps
                results.append(alone(measure, case, plain, int(not single or device.type == "cuda"), steps, options.device, precision, options.threads))
                print(f"{case}, {results[-1]['way']}: {results[-1]['step_ms']:.0f} ms", flush=True)
        report["ratios"] = compare(results)
        for r in results:
            del r["gradient"]
            r["part_of_matmul_rate"] = r["tflop"] / r["step_ms"] * 1000 / report["matmul_tflops"]
        report["results"] = results
        write_json(options.out, report)
        shown = [{k: r[k] for k in ("case", "way", "step_ms", "cpu_ms", "tflop", "part_of_matmul_rate")} | r["memory_peak_mib"] for r in results]
        print(f"{pd.DataFrame(shown).round(2).to_string(index=False)}\n\n{pd.DataFrame(report['ratios']).round(4).to_string(index=False)}\n\n{options.out}")
    except DataError as e:
        sys.exit(f"text_tower: {e}")


if __name__ == "__main__":
    main()
