"""How many times faster than the plain way, from the JSON files of the other benchmarks. See README.md."""

import hashlib
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from xmic.files import read_json

BENCH = Path(__file__).resolve().parents[1] / "reports" / "bench"


def ratios() -> pd.DataFrame:  # what, faster
    train, text, extract, epic, vita = (read_json(BENCH / f"{name}.json") for name in ("train", "text_tower", "extract", "epic_scale", "vita"))
    found = [(f"X-MIC step, batch {r['batch_size']}, {r['classes']} classes", r["step_ms"]) for r in train["times_faster"]]
    found += [(f"X-MIC step from disk, batch {r['batch_size']}", r["step"]) for r in epic["ratios"]]
    found += [(f"{r['case'].replace(',', ' step,', 1)}", r["times_faster"]) for r in text["ratios"]]
    found += [(f"Vita-CLIP tower, {vita['measured']['frames']} frames", vita["measured"]["times_faster"]["literal"])]
    found += [(f"extraction, {r['settings']['encoder']}, {r['settings']['device']}", r["fraction_of_bare"]["wall"]["extract"]) for r in extract.values()]
    return pd.DataFrame(found, columns=["what", "faster"])


def digest() -> str:
    "Of the numbers; it is in the picture, which is stale where it differs."
    return hashlib.sha256(ratios().to_csv(index=False).encode()).hexdigest()[:16]


def main() -> None:
    table = ratios()
    fig, ax = plt.subplots(figsize=(7, 0.3 * len(table) + 0.8), layout="constrained")
    sns.barplot(table, x="faster", y="what", color="#1b6f5a", ax=ax)
    ax.set(xscale="log", xlim=(0.8, 1.6 * table.faster.max()), xlabel="times as fast (extraction: as the bare encoder)", ylabel="")
    ax.set_xticks(ticks := [1, 2, 5, 10, 20, 50], map(str, ticks))
    ax.minorticks_off()
    ax.axvline(1, color="0.3", lw=1)
    for i, faster in enumerate(table.faster): ax.text(1.05 * faster, i, f"{faster:.3g}", va="center", fontsize=8)
    sns.despine()
    fig.savefig(BENCH / "faster.png", dpi=110, metadata={"ratios": digest()})


if __name__ == "__main__":
    main()
