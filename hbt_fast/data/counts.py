"""What was drawn: the counters of a plan, before training and during it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbt_fast.data.plan import BatchPlan
from hbt_fast.data.store import Store


class DrawCounts:
    """Counts batches, language pairs and passed-over hard negatives of the plans it is given.

    Args:
        store: the data of the plans.

    Attributes:
        pairs: (L, L) int64 pairs drawn, by the store's number of the query's and the passage's language.
        batches: "kind source" -> batches.
        excluded: hard negatives passed over because the batch had their content already.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.pairs = np.zeros((len(store.languages),) * 2, np.int64)
        self.batches: dict[str, int] = {}
        self.excluded = 0

    def add(self, plan: BatchPlan) -> None:
        """Count one global batch."""
        np.add.at(self.pairs, (plan.query_languages, plan.passage_languages), 1)
        name = f"{plan.kind} {self.store.sources[plan.source].name}"
        self.batches[name] = self.batches.get(name, 0) + 1
        self.excluded += plan.excluded

    def by_pair(self) -> list[tuple[str, str, int]]:
        """(query language, passage language, pairs) of all that occurred, the most frequent first."""
        codes = self.store.languages
        found = [(codes[a], codes[b], int(self.pairs[a, b])) for a, b in np.argwhere(self.pairs)]
        return sorted(found, key=lambda entry: (-entry[2], entry[:2]))

    def record(self) -> dict:
        """For metrics.jsonl; `restore` takes it back."""
        pairs = {f"{a}>{b}": count for a, b, count in self.by_pair()}
        return {"pairs": pairs, "batches": self.batches, "excluded_negatives": self.excluded}

    def restore(self, record: dict) -> None:
        """Go on counting from a record."""
        number = {code: n for n, code in enumerate(self.store.languages)}
        for name, count in record["pairs"].items():
            a, b = name.split(">")
            self.pairs[number[a], number[b]] = count
        self.batches, self.excluded = dict(record["batches"]), record["excluded_negatives"]

    def draw(self, path: str | Path, title: str) -> Path:
        """The language pairs as a heat map: each cell the share of all pairs, in percent."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        used = np.flatnonzero(self.pairs.sum(0) + self.pairs.sum(1))
        codes = [self.store.languages[n] for n in used]
        share = 100 * self.pairs[np.ix_(used, used)] / max(self.pairs.sum(), 1)
        side = min(max(2.0 + 0.45 * len(used), 4.2), 24.0)
        figure = Figure(figsize=(side + 1.2, side + 0.8), layout="constrained")
        FigureCanvasAgg(figure)  # draws to a file whatever backend the program uses
        axis = figure.subplots()
        image = axis.imshow(np.where(share > 0, share, np.nan), cmap="YlGnBu", vmin=0)
        if len(used) <= 32:
            for (row, column), value in np.ndenumerate(share):
                if value:
                    dark = value > 0.55 * share.max()
                    text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
                    colour = "white" if dark else "#222"
                    axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(used)), codes, fontsize=8, rotation=90 if len(used) > 24 else 0)
        axis.set_yticks(range(len(used)), codes, fontsize=8)
        axis.set(xlabel="passage language", ylabel="query language")
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        figure.colorbar(image, ax=axis, shrink=0.8, pad=0.02, label="% of pairs").outline.set_visible(False)
        figure.savefig(path, dpi=150)
        return Path(path)
