"""What the demo saw: as a dictionary for JSON, as tables, and in words. Every number in the words is a measured one."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np

from fastbn.demo.digits import Curve
from fastbn.demo.identity import REACHED, STABLE, End, PartTwo
from fastbn.demo.network import Array

CHECKPOINTS = (20, 40, 100, 200, 400, 1000, 2000, 4000, 10_000, 20_000, 40_000, 100_000)


def results(settings: dict[str, Any], without: Curve, with_norm: Curve, two: PartTwo) -> dict[str, Any]:
    """All of it, in types that JSON has."""
    found = {
        "settings": settings,
        "table": accuracy_table(without, with_norm),
        "without": curve_results(without),
        "with": curve_results(with_norm),
        "identity": {
            "start": end_results(two.start),
            "raw_activations": end_results(two.itself),
            "raw_activations_in_minibatches": end_results(two.itself_minibatch),
            "labels": end_results(two.labels),
        },
        "cost": [vars(route) | {"reached": route.reached} for route in two.routes],
    }
    return found | {"findings": findings(found)}


def accuracy_table(without: Curve, with_norm: Curve) -> list[dict[str, Any]]:
    """Test accuracy of both networks after the same numbers of steps."""
    rows = zip(without.steps, without.accuracy, with_norm.accuracy, strict=True)
    wanted = {*CHECKPOINTS, without.steps[-1]}
    return [{"step": step, "without": a, "with": b} for step, a, b in rows if step in wanted]


def curve_results(curve: Curve) -> dict[str, Any]:
    # Medians: the first steps wait for caches and threads, and other programs take their share of some.
    step, norm = np.median(curve.step_seconds), np.median(curve.norm_seconds)
    return {
        "ms_per_step": 1e3 * float(step),
        "ms_per_step_in_batch_norm": 1e3 * float(norm),
        "steps_to_95_percent": curve.steps_to(0.95),
        "steps": curve.steps,
        "accuracy": curve.accuracy,
        "sigmoid_input_percentiles_15_50_85": curve.percentiles,
        "gamma": curve.gamma,
        "beta": curve.beta,
    }


def end_results(end: End) -> dict[str, Any]:
    return {
        "batch": end.batch,
        "steps": end.steps,
        "gamma_ratio": spread(end.gamma_ratio),
        "gamma_error_max": float(np.abs(end.gamma_ratio - 1).max()),
        "beta_error_max": float(np.abs(end.beta_shift).max()),
        "beta_error_median": float(np.median(np.abs(end.beta_shift))),
        "output_error": end.output_error,
    }


def spread(values: Array) -> dict[str, float]:
    return {"min": float(values.min()), "median": float(np.median(values)), "max": float(values.max())}


def findings(found: dict[str, Any]) -> list[str]:
    """What was seen, in plain words."""
    last, ends, routes = found["table"][-1], found["identity"], found["cost"]
    full, part, labels = ends["raw_activations"], ends["raw_activations_in_minibatches"], ends["labels"]
    ratio = labels["gamma_ratio"]
    undone = "undid" if full["output_error"] < 1e-3 else "did not quite undo"
    left = "did not undo it" if labels["output_error"] > 0.1 else "undid it there, too"
    return [
        f"Accuracy: after {last['step']} steps {last['with']:.1%} with batch normalization and {last['without']:.1%} "
        f"without. 95% was reached {_when(found['with'])} with it and {_when(found['without'])} without.",
        f"Target = the raw activations: SGD {undone} the normalization. After {full['steps']} steps "
        f"gamma = sqrt(var + eps) within {full['gamma_error_max']:.0e} of it, beta = mean within "
        f"{full['beta_error_max']:.0e} standard deviations, and the output is the input within "
        f"{full['output_error']:.0e} (rms).",
        f"In batches of {part['batch']}, each with statistics of its own, it does so on average only: gamma within "
        f"{part['gamma_error_max']:.1%}, beta within {part['beta_error_max']:.1%} of a standard deviation.",
        f"Target = the labels: SGD {left}. After {labels['steps']} steps gamma / sqrt(var + eps) is "
        f"{ratio['min']:.2f} to {ratio['max']:.2f} (median {ratio['median']:.2f}), beta is "
        f"{labels['beta_error_median']:.2f} standard deviations from the mean (median; "
        f"{ends['start']['beta_error_median']:.2f} at the start), and the output differs from the input by "
        f"{labels['output_error']:.0%} (rms; {ends['start']['output_error']:.0%} at the start).",
        f"Cost of the raw activations, from the normalized ones: by {routes[0]['numbers']} numbers, gamma and beta, "
        f"{_route(routes[0])}; by the {routes[1]['numbers']} weights and biases of the linear layer, without batch "
        f"normalization, {_route(routes[1])}.",
        f"With gamma = 1 and beta = 0 held fixed, the {routes[2]['numbers']} weights below cannot do it at all: batch "
        f"normalization takes every mean and scale out again. After {routes[2]['steps']} steps the loss is "
        f"{routes[2]['loss']:.4f} of what it was.",
    ]


def _when(curve: dict[str, Any]) -> str:
    steps = curve["steps_to_95_percent"]
    return "never" if steps is None else f"after {steps} steps"


def _route(route: dict[str, Any]) -> str:
    if route["reached"]:
        return f"{route['steps']} steps ({route['seconds']:.2g} s)"
    return f"not in {route['steps']} steps ({route['seconds']:.2g} s; the loss is {route['loss']:.1e} of what it was)"


def as_text(found: dict[str, Any]) -> str:
    settings, plain, norm = found["settings"], found["without"], found["with"]
    share = norm["ms_per_step_in_batch_norm"] / norm["ms_per_step"]
    lines = [
        f"1. {settings['train']} digits to train on, {settings['test']} to test on; three hidden layers of 100 sigmoid "
        "units",
        f"   batch {settings['batch']}, learning rate {settings['learning_rate']:g}, seed {settings['seed']}, "
        f"backend {settings['backend']}",
        "",
        f"   {'test accuracy':<24}{'without':>11}{'with batch norm':>18}",
        *(f"   {row['step']:>8} steps{row['without']:>21.1%}{row['with']:>18.1%}" for row in found["table"]),
        f"   {'ms a step (median)':<24}{plain['ms_per_step']:>11.2f}{norm['ms_per_step']:>18.2f}",
        f"   {'of it in batch norm':<24}{'-':>11}{norm['ms_per_step_in_batch_norm']:>18.2f}",
        f"   {'share':<24}{'-':>11}{share:>18.0%}",
        "",
        "2. Does SGD undo the normalization? 100 units' raw activations of the first hidden layer, normalized",
        "",
        f"   {'target':<34}{'gamma / sqrt(var + eps)':>24}{'|beta - mean| / std':>21}{'output error':>14}",
        *_end_lines(found["identity"]),
        "",
        f"   {'the raw activations by ...':<36}{'numbers':>9}{'steps':>8}{'seconds':>9}{'loss left':>11}",
        *(f"   {route['name']:<36}{route['numbers']:>9}{route['steps']:>8}{route['seconds']:>9.2g}"
          f"{route['loss']:>11.4f}" for route in found["cost"]),
        f"   (until {REACHED:g} of the loss is left, at {STABLE:g} of the largest learning rate that does not diverge)",
        "",
        *(textwrap.fill(f"- {line}", 112, subsequent_indent="  ") for line in found["findings"]),
    ]
    return "\n".join(lines)


def _end_lines(ends: dict[str, Any]) -> list[str]:
    lines = []
    for name, end in ends.items():
        target = name.split("_in_")[0].replace("_", " ")
        label = f"{target}, batches of {end['batch']}" if end["batch"] else "none yet: gamma = 1, beta = 0"
        ratio = "{min:.3f} to {max:.3f}".format(**end["gamma_ratio"])
        lines.append(f"   {label:<34}{ratio:>24}{end['beta_error_max']:>21.1e}{end['output_error']:>14.1e}")
    return lines


def sweep_text(rows: list[dict[str, Any]], steps: int) -> str:
    """Final accuracy, and the steps to 95%, at each learning rate."""
    lines = [
        f"test accuracy after {steps} steps (steps to the first 95%)",
        "",
        f"{'initial std':>11}{'learning rate':>15}{'without':>20}{'with batch norm':>20}",
    ]
    for row in rows:
        seen = (row["without"], row["with"])
        cells = [f"{one['accuracy']:.1%} ({one['steps_to_95_percent'] or '-'})" for one in seen]
        lines.append(f"{row['std']:>11g}{row['learning_rate']:>15g}{cells[0]:>20}{cells[1]:>20}")
    return "\n".join(lines)
