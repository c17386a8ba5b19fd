"""What was measured of a model on calibration data: sums in float64 that add up over halves of the data."""

from __future__ import annotations

import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from snpc.criteria import Criterion, make_criterion
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.plan import Method
from snpc.runtime.calibration import Calibration
from snpc.runtime.feeds import Feeds
from snpc.runtime.measure import Wanted, measure, wanted_statistics
from snpc.runtime.model_io import replacing
from snpc.runtime.moments import NEEDS, forms_of
from snpc.types import FloatArray, Group

FORMAT = 1
Progress = Callable[[Iterable[Feeds]], Iterable[Feeds]]
Sums = Mapping[str, Mapping[str, FloatArray]]


@dataclass(frozen=True)
class Statistics:
    """``sums``: group id -> name of a statistic -> what it came to over ``samples`` calibration samples.

    Of groups with a closed form, "moment:query" and the like as ``moments.NEEDS`` names them, [blocks, d, d]; of the
    others, what ``criterion`` observes. ``digest`` and ``model`` say of which model, ``sources`` on which data. Two of
    them add up, if the same was measured of the same model.
    """

    model: str
    digest: str
    criterion: str
    samples: int
    sources: tuple[str, ...]
    sums: Sums = field(repr=False)

    def __add__(self, other: Statistics) -> Statistics:
        if self.digest != other.digest:
            raise UserError(
                f"statistics of {self.model} (digest {self.digest[:12]}) and of {other.model} ({other.digest[:12]}) do "
                "not add up: give those of one model"
            )
        if layout(self) != layout(other) or self.criterion != other.criterion:
            raise UserError(
                f"statistics on {self.described()} and on {other.described()} are not of the same groups and "
                "criterion: measure both with the same --roles, --include, --exclude, --method and --criterion"
            )
        sums = {
            group: {name: array + other.sums[group][name] for name, array in mine.items()}
            for group, mine in self.sums.items()
        }
        return replace(self, samples=self.samples + other.samples, sources=self.sources + other.sources, sums=sums)

    def described(self) -> str:
        return " and ".join(self.sources)


def layout(statistics: Statistics) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(group, name): a.shape for group, mine in statistics.sums.items() for name, a in mine.items()}


def measure_statistics(
    analysis: Analysis,
    calibration: Calibration,
    groups: Sequence[Group],
    *,
    method: Method = "auto",
    criterion: str | Criterion = "mixed",
    memory_limit: int | None = None,
    provider: str = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
) -> Statistics:
    """Measure what compressing these groups needs: the closed forms' sums of those that have one, and of the others
    (with method "select": of all) what ``criterion`` asks for.

    As many groups are measured in one pass over the data as fit in ``memory_limit`` bytes (None: half of what is free);
    the sums are the same, to rounding. Raises UserError where the limit is too small for a single group.
    """
    judge = make_criterion(criterion) if isinstance(criterion, str) else criterion
    forms = {} if method == "select" else forms_of(analysis, groups)[0]
    names = {g.id: NEEDS[forms[g.id]] if g.id in forms else judge.probes(g.role) for g in groups}
    wanted = wanted_statistics(analysis, names)
    sums: dict[str, dict[str, FloatArray]] = defaultdict(dict)
    for part in [wanted] if wanted else []:
        batches: Iterable[Feeds] = calibration.batches()
        for result in measure(
            analysis, part, progress(batches) if progress else batches, provider=provider, threads=threads
        ):
            add_batch(sums, part, result, forms, judge)
    spelled = criterion if isinstance(criterion, str) else judge.name
    samples = calibration.samples if wanted else 0
    model = analysis.model
    return Statistics(model.path.name, model.digest, spelled, samples, (calibration.described(),), dict(sums))


def add_batch(
    sums: dict[str, dict[str, FloatArray]],
    wanted: Sequence[Wanted],
    result: Mapping[str, FloatArray],
    forms: Mapping[str, str],
    judge: Criterion,
) -> None:
    """Add one batch's statistics to ``sums``, those for the criterion as it reduces them."""
    batch: dict[str, dict[str, FloatArray]] = defaultdict(dict)
    groups = {item.group.id: item.group for item in wanted}
    for item in wanted:
        array, mine = result[item.output], batch[item.group.id]
        mine[item.name] = mine[item.name] + array if same_shape(mine.get(item.name), array) else array
    for name, arrays in batch.items():
        total = sums[name]
        observed = arrays if name in forms else judge.observe(groups[name].role, arrays)
        for key, array in observed.items():
            total[key] = total[key] + array if key in total else np.asarray(array, np.float64)


def same_shape(first: FloatArray | None, second: FloatArray) -> bool:
    return first is not None and first.shape == second.shape


# -- the file --------------------------------------------------------------------------------------------------------


def save_statistics(statistics: Statistics, path: Path) -> None:
    """One .npz: ``header`` is JSON, the other entries are named by group and statistic. Written whole or not at all."""
    header = {
        "snpc_statistics": FORMAT,
        "model": statistics.model,
        "digest": statistics.digest,
        "criterion": statistics.criterion,
        "samples": statistics.samples,
        "sources": list(statistics.sources),
    }
    arrays = {f"{group} {name}": a for group, mine in statistics.sums.items() for name, a in mine.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]


def load_statistics(path: Path, *more: Path) -> Statistics:
    """The statistics in a file that ``save_statistics`` wrote; of several files, their sum.

    Raises UserError where a file does not hold statistics, or they do not add up.
    """
    found = read_statistics(path)
    for other in more:
        found = found + read_statistics(other)
    return found


def read_statistics(path: Path) -> Statistics:
    try:
        with np.load(path, allow_pickle=False) as archive:
            header = json.loads(str(archive["header"]))
            arrays = {key: archive[key] for key in archive.files if key != "header"}
        if header["snpc_statistics"] != FORMAT:
            raise ValueError("the format is that of another version of snpc")
        sums: dict[str, dict[str, FloatArray]] = defaultdict(dict)
        for key, array in arrays.items():
            group, _, name = key.rpartition(" ")
            sums[group][name] = np.asarray(array, np.float64)
        return Statistics(
            str(header["model"]),
            str(header["digest"]),
            str(header["criterion"]),
            int(header["samples"]),
            tuple(map(str, header["sources"])),
            dict(sums),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: holds no statistics ({said}): give a file that --save-stats wrote") from None
