"""`Store`: the output directory, and nothing outside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dlgbench import records, render, tradeoff
from dlgbench.case import Case
from dlgbench.errors import UsageError
from dlgbench.records import Manifest, Record


@dataclass(frozen=True)
class Store:
    """``records/ID.json``, ``pictures/ID.npz``, ``plans/``, ``tables/``, ``plots/``, ``tensorboard/ID``."""

    root: Path

    @property
    def records(self) -> Path:
        return self.root / "records"

    @property
    def pictures(self) -> Path:
        return self.root / "pictures"

    @property
    def plans(self) -> Path:
        return self.root / "plans"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def prepare(self) -> None:
        """Make the directory; raises UsageError where nothing can be written."""
        try:
            names = ("records", "pictures", "plans", "tables", "plots", "tensorboard")
            for folder in (self.root / name for name in names):
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK | os.X_OK):
                    raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UsageError(
                f"--out {self.root}: expected a directory to write to, got {error.strerror}"
            ) from None

    def put(self, record: Record, pictures: bytes) -> None:
        """Save a trial: the record comes last, so that where it is, all is."""
        if pictures:
            records.write(self.pictures / f"{record.case.id}.npz", pictures)
        records.save(record, self.records)

    def load(self, cases: Iterable[Case]) -> tuple[dict[str, Record], dict[Path, str]]:
        """The sound records of ``cases`` by id, and the damaged files with their faults."""
        return records.load_all(self.records, [case.id for case in cases])

    def stale(self, manifest: Manifest) -> bool:
        """Whether the plan's tables are not those of its records, or its plots are not there."""
        tables = self._tables(manifest, render.FORMATS)
        fresh = all(path.exists() and path.read_bytes() == text.encode() for path, text in tables)
        return not fresh or not self._plots(manifest).is_dir()

    def tabulate(self, manifest: Manifest) -> None:
        """Write the plan's table in every format."""
        for path, text in self._tables(manifest, render.FORMATS):
            records.write(path, text.encode())

    def _plots(self, manifest: Manifest) -> Path:
        return self.root / "plots" / manifest.name

    def _tables(self, manifest: Manifest, forms: Iterable[str]) -> list[tuple[Path, str]]:
        sheets = render.sheets(manifest, self.load(manifest.cases)[0])
        folder = self.root / "tables"
        return [
            (folder / f"{manifest.name}{suffix}.{form}", render.FORMATS[form](*sheet))
            for suffix, sheet in sheets.items()
            for form in forms
        ]

    def plot(self, manifest: Manifest) -> list[Path]:
        """Draw the plan's plots."""
        from dlgbench import pareto, plots  # matplotlib takes half a second

        found, _ = self.load(manifest.cases)
        ordered = [found[i] for i in manifest.ids if i in found]
        drawn = plots.draw(ordered, self.pictures, self._plots(manifest))
        return drawn + plots.write_all(pareto.figures(tradeoff.table(manifest, found)), self._plots(manifest))
