"""RecTools' SASRec on the same events: run by ``benchmarks.speed`` with the Python of an environment that has
``rectools[torch]``; imports nothing of the project.

Arguments: folder with train.csv, history.csv and target.csv (user, item, order), a JSON of sizes, an output file.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

warnings.simplefilter("ignore")

from rectools import Columns  # noqa: E402
from rectools.dataset import Dataset  # noqa: E402
from rectools.models import SASRecModel  # noqa: E402


def frame(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path)
    return pd.DataFrame(
        {
            Columns.User: rows["user"],
            Columns.Item: rows["item"],
            Columns.Weight: 1.0,
            Columns.Datetime: pd.Timestamp("2000-01-01") + pd.to_timedelta(rows["order"], unit="s"),
        }
    )


def main(folder: Path, sizes: dict, out: Path) -> None:
    train = frame(folder / "train.csv")
    model = SASRecModel(
        n_blocks=sizes["layers"],
        n_heads=sizes["heads"],
        n_factors=sizes["width"],
        session_max_len=sizes["history"],
        dropout_rate=sizes["dropout"],
        batch_size=sizes["batch_size"],
        epochs=sizes["epochs"],
        lr=sizes["learning_rate"],
        loss="softmax",
        deterministic=False,
    )
    positions = train.groupby(Columns.User).size().sub(1).clip(lower=0, upper=sizes["history"]).sum()
    wall, cpu = time.perf_counter(), time.process_time()
    model.fit(Dataset.construct(train))
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    history, target = frame(folder / "history.csv"), pd.read_csv(folder / "target.csv").set_index("user")["item"]
    users = target.index.to_numpy()
    known = history[history[Columns.Item].isin(train[Columns.Item].unique())]
    answers = model.recommend(users=users, dataset=Dataset.construct(known), k=10, filter_viewed=True)
    answers["hit"] = answers[Columns.Item].to_numpy() == target.loc[answers[Columns.User]].to_numpy()
    hits = answers[answers["hit"]]
    record = {
        "positions_per_second": float(positions * sizes["epochs"] / seconds),
        "seconds": seconds,
        "cpu_minutes": cpu_seconds / 60,
        "ndcg@10": float((1 / np.log2(hits[Columns.Rank] + 1)).sum() / len(users)),
        "hr@10": len(hits) / len(users),
        "epochs": sizes["epochs"],
    }
    out.write_text(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
