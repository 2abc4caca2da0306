"""How many times faster than the plain way, from the JSON files of the other benchmarks. See README.md."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from xmic.files import read_json

BENCH = Path(__file__).resolve().parents[1] / "reports" / "bench"


def ratios() -> pd.DataFrame:  # what, part, faster
    train, text, extract, epic, vita = (read_json(BENCH / f"{name}.json") for name in ("train", "text_tower", "extract", "epic_scale", "vita"))
    found = [(f"X-MIC, a step: batch {r['batch_size']}, {r['classes']} classes", "training", r["step_ms"]) for r in train["times_faster"]]
    found += [(f"X-MIC, EPIC-100 from disk: batch {r['batch_size']}", "training", r["step"]) for r in epic["ratios"]]
    found += [(f"{r['case']}: a step", "training", r["times_faster"]) for r in text["ratios"]]
    found += [(f"Vita-CLIP, a clip of {vita['measured']['frames']} frames", "training", vita["measured"]["times_faster"]["literal"])]
    found += [(f"extraction from {name}, of the bare encoder", "extraction", r["fraction_of_bare"]["wall"]["extract"]) for name, r in extract.items()]
    return pd.DataFrame(found, columns=["what", "part", "faster"])


def main() -> None:
    table = ratios()
    fig, ax = plt.subplots(figsize=(7, 0.32 * len(table) + 0.7), layout="constrained")
    sns.barplot(table, x="faster", y="what", hue="part", dodge=False, palette="crest", ax=ax)
    ax.set(xscale="log", xlabel="times faster than the plain way in the same run", ylabel="")
    ax.axvline(1, color="0.3", lw=1)
    for i, r in enumerate(table.itertuples()): ax.text(1.04 * r.faster, i, f"{r.faster:.3g}", va="center", fontsize=8)
    ax.legend(title="", loc="lower right", frameon=False)
    sns.despine()
    fig.savefig(BENCH / "faster.png", dpi=110)


if __name__ == "__main__":
    main()
