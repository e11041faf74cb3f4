"""Whether a robustness that was measured can be believed: checks for masked gradients.

An attack by gradients that fails may have met a robust network, or one whose gradients say nothing. The signs that tell
them apart are those of Athalye et al. 2018 (arXiv 1802.00420) and Carlini et al. 2019 (arXiv 1902.06705). That all
checks pass is no proof of robustness; that one fails is a reason to doubt the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from smart import text
from smart.curves import robustness_curves
from smart.data import ImageData
from smart.evaluate import Evaluation, evaluate
from smart_kernels.paths import PATHS

# Attacks are random: accuracies may differ by this share of the images, or by one image, without meaning anything.
NOISE = 0.01
# More steps and other losses reach somewhat further also on honest networks; masked gradients make tens of points.
GAP = 0.05
# In units of the radius that is checked; the last, all of [0, 1], is checked on its own.
FACTORS = (0, 0.25, 0.5, 1, 2)
# Of an attack without bounds, which has to cross all of [0, 1]: several times if it turns back.
UNBOUNDED_STEP, UNBOUNDED_STEPS = 0.1, 40


@dataclass(frozen=True)
class Check:
    """One check of one configuration.

    Attributes:
        name: what ought to hold, as a clause.
        path: a path or a lambda, by name.
        passed: does it.
        numbers: what that was decided by: accuracies in [0, 1], or mean losses.
    """

    name: str
    path: str
    passed: bool
    numbers: dict[str, float]


@dataclass(frozen=True)
class SanityReport:
    """What :func:`sanity_checks` found.

    Attributes:
        checks: one for each configuration and clause.
        settings: what they hold for: n_examples, eps, steps, queries, restarts, seed, noise.
    """

    checks: list[Check]
    settings: dict[str, Any]

    def failed(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    def table(self) -> str:
        """A line a check: configuration, verdict, clause, numbers."""
        lines = [["path", "", "what ought to hold", "what was found"]]
        for check in self.checks:
            found = ", ".join(f"{name} {_shown(check, value)}" for name, value in check.numbers.items())
            lines.append([text.path_name(check.path), "pass" if check.passed else "FAIL", check.name, found])
        return text.align(lines, left=4)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: settings and checks."""
        return {**self.settings, "passed": not self.failed(), "checks": [asdict(check) for check in self.checks]}


def _shown(check: Check, value: float) -> str:
    return f"{value:.3g}" if "loss grows" in check.name else f"{100 * value:.1f} %"


def sanity_checks(
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    eps: float = 8 / 255,
    paths: Sequence[str] = PATHS,
    lambdas: Sequence[float] = (),
    steps: int = 20,
    queries: int = 200,
    restarts: int = 1,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> SanityReport:
    """Checks each configuration for masked gradients, attacked as it is deployed; leaves the model as it was.

    On each path or lambda: accuracy falls and loss grows with the radius; an attack without bounds leaves nothing; five
    times the steps and another loss reach little further than PGD; one step, and images made against another
    configuration, are not stronger than PGD; a black box is not stronger than all of these together.

    Args:
        eps: the radius that the network is said to withstand.
        steps: of PGD. queries: of the black box, the Square Attack.
        progress: wraps the list of what is to be run, as tqdm does.
        data, paths, lambdas, restarts, batch_size, seed: as for :func:`smart.evaluate`.

    Raises:
        ValueError: eps outside (0, 1]; as for :func:`smart.evaluate`.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps is {eps}: give a radius above 0, such as 8/255, to check an attack at")
    common = {"paths": paths, "lambdas": lambdas, "restarts": restarts, "batch_size": batch_size, "seed": seed}
    pgd, strong, other = f"pgd{steps}", f"pgd{5 * steps}", f"pgd{steps}-cw"
    free = f"pgd{max(steps, UNBOUNDED_STEPS)}"
    black_box = f"square{queries}"
    radii = [min(1.0, factor * eps) for factor in FACTORS]
    parts: dict[str, Callable[[], Any]] = {
        "white boxes": lambda: evaluate(model, data, [pgd, strong, other], eps=eps, transfer=True, **common),
        "others": lambda: evaluate(model, data, ["fgsm", black_box], eps=eps, **common),
        "curve": lambda: robustness_curves(model, data, radii, pgd, **common),
        "unbounded": lambda: evaluate(model, data, [free, f"{free}-cw"], eps=1.0, step=UNBOUNDED_STEP, **common),
    }
    found = {name: parts[name]() for name in (progress(list(parts)) if progress else parts)}
    white, others = found["white boxes"], found["others"]
    count = white.settings["n_examples"]
    noise = max(NOISE, 1 / count)
    checks: list[Check] = []
    labels = {each: text.attack_name(each) for each in (pgd, strong, other, black_box)}
    for name, row in white.items():
        add = _Adder(checks, name, noise)
        curve = found["curve"][name]
        add.falling("accuracy falls with the radius", {_at(e): point["accuracy"] for e, point in curve.items()})
        add.growing("loss grows with the radius", {_at(e): point["loss"] for e, point in curve.items()})
        add.nothing_left("an attack without bounds leaves nothing", found["unbounded"].worst[name])
        reached = (row[pgd], labels[pgd])
        add.no_stronger("more steps help little", (row[strong], labels[strong]), reached, GAP)
        add.no_stronger("another loss helps little", (row[other], labels[other]), reached, GAP)
        add.no_stronger("one step is not stronger than many", (others[name]["fgsm"], "FGSM"), reached)
        together = (white.worst[name], "white boxes together")
        add.no_stronger("a black box is not stronger", (others[name][black_box], labels[black_box]), together)
        _add_transfer(add, white, pgd, name)
    settings = {"n_examples": count, "eps": eps, "steps": steps, "queries": queries, "restarts": restarts}
    return SanityReport(checks, {**settings, "seed": seed, "noise": noise})


def _add_transfer(add: _Adder, table: Evaluation, attack: str, name: str) -> None:
    shown = {other: row[name] for other, row in table.transfer[attack].items() if other != name}
    if shown:
        other = min(shown, key=lambda each: shown[each])
        transferred = (shown[other], f"made against {text.path_name(other)}")
        add.no_stronger("images of another path are not stronger", transferred, (table[name][attack], "its own"))


class _Adder:
    """Judges the numbers of one configuration."""

    def __init__(self, checks: list[Check], path: str, noise: float) -> None:
        self.checks, self.path, self.noise = checks, path, noise

    def add(self, name: str, passed: bool, numbers: dict[str, float]) -> None:
        self.checks.append(Check(name, self.path, passed, numbers))

    def falling(self, name: str, series: dict[str, float]) -> None:
        values = list(series.values())
        self.add(name, all(b <= a + self.noise for a, b in pairwise(values)), series)

    def growing(self, name: str, series: dict[str, float]) -> None:
        values = list(series.values())
        slack = NOISE * max(abs(value) for value in values)
        steady = all(b >= a - slack for a, b in pairwise(values))
        # A loss that no attack moves does not fall either, but says that there is no gradient.
        self.add(name, steady and values[-1] > values[0], series)

    def nothing_left(self, name: str, accuracy: float) -> None:
        self.add(name, accuracy <= self.noise, {"all pixels free": accuracy})

    def no_stronger(self, name: str, weak: tuple[float, str], strong: tuple[float, str], slack: float = 0.0) -> None:
        """``weak`` is the accuracy that the attack leaves which ought not to be stronger, and its name."""
        passed = weak[0] >= strong[0] - max(slack, self.noise)
        self.add(name, passed, {label: accuracy for accuracy, label in (weak, strong)})


def _at(eps: float) -> str:
    return f"at {text.show(float(eps))}"
