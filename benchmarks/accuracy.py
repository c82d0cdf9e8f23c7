"""Relative error of the loss and of the label's gradient at growing margins, in float32: where peers return 0.

The margin m is the label's logit; the other three logits are 0, −1 and −2.5. With R = Σ_{others} e^(z − m) the loss is log(1 + R) and its
derivative by the label's logit −R/(1 + R), computed in float64 by `log1p`, which cancels nowhere. One example with one feature of 1 makes
the row of logits the kernel itself, so that every contender of `linear` takes part; m is rounded to bfloat16 first (0.1 becomes
0.10009765625), which even a product in reduced precision keeps.
"""

import argparse
import math

import numpy as np
from tqdm import tqdm

from benchmarks import linear, peers, plots, problem, report

MARGINS = (0.10009765625, 1.0, 5.0, 10.0, 17.0, 20.0, 50.0, 80.0)
OTHERS = (0.0, -1.0, -2.5)
NAMES = tuple(name for name in peers.NAMES if name != "limit")


def truth(margin: float) -> tuple[float, float]:
    """Loss and derivative by the label's logit."""
    rest = math.fsum(math.exp(z - margin) for z in OTHERS)
    return math.log1p(rest), -rest / (1 + rest)


def rows_of(margin: float, names: list[str], absent: dict[str, str]) -> report.Rows:
    """A row for every contender that is not absent."""
    kernel = np.array([[margin, *OTHERS]], np.float32)
    numbers = problem.Problem(np.ones((1, 1), np.float32), kernel, np.zeros(1, np.int32))
    failed: dict[str, str] = {}
    programs = linear.prepare([name for name in names if name not in absent], numbers, failed, absent).programs
    exact = truth(float(kernel[0, 0]))
    rows = []
    for name in names:
        if name in absent:
            continue
        row = {"margin": margin, "contender": name, **dict.fromkeys(("loss", "error of loss", "gradient", "error of gradient", "note"))}
        row["note"] = failed.get(name)
        if name in programs:
            result = programs[name].result(programs[name].run())
            for key, found, true in zip(("loss", "gradient"), (float(result.value), float(result.kernel[0, 0])), exact, strict=True):
                row[key] = report.digits(found, 8)
                row[f"error of {key}"] = report.digits(abs(found - true) / abs(true), 2)
        rows.append(row)
    return rows


def by_margin(rows: report.Rows) -> report.Rows:
    """The errors of loss and gradient, a row for each margin and a column for each contender that ran."""
    wide: dict[float, dict] = {}
    for row in rows:
        if row["note"] is None:
            cells = [f"{row[f'error of {key}']:.1g}" + " (0)" * (row[key] == 0) for key in ("loss", "gradient")]
            wide.setdefault(row["margin"], {"margin": round(row["margin"], 2)})[row["contender"]] = " / ".join(cells)
    return list(wide.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    report.add_arguments(parser, rounds=0, names=NAMES)


def run(arguments: argparse.Namespace) -> None:
    if arguments.plot:
        plots.require()
    absent: dict[str, str] = {}
    rows: report.Rows = []
    for margin in tqdm(MARGINS, desc="accuracy", unit="margin"):
        rows += rows_of(margin, arguments.peers, absent)
    exact = [{"margin": margin, "loss": truth(margin)[0], "gradient": truth(margin)[1]} for margin in MARGINS]
    where = report.machine(arguments.peers)
    print(report.heading(where))
    print("relative error of loss / gradient; (0): where 0 was returned\n" + report.table(by_margin(rows)))
    failed = {row["contender"]: row["note"] for row in rows if row["note"]}
    print("".join(f"{name}: {why}\n" for name, why in failed.items()) + report.named_absent(absent))
    report.write(arguments.json, {"benchmark": "accuracy", **where, "truth": exact, "rows": rows, "absent": absent})
    if arguments.plot:
        panels = [
            plots.Panel(
                f"{name} (1: returned 0)",
                "margin of the label, nats",
                "relative error",
                plots.lines(rows, "contender", "margin", key),
                True,
            )
            for name, key in (("loss", "error of loss"), ("gradient of the label's logit", "error of gradient"))
        ]
        plots.save(arguments.plot, "Relative error of cross-entropy in float32", panels)
