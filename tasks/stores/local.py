"""A folder, perhaps on a mounted disk, as a store: copied beside its place, verified, renamed into it."""

import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from trainer import manifest
from trainer.errors import DamagedError, StorageError
from trainer.files import fsync, fsync_tree, remove, size_of, write_atomic

from .base import IDENTITY, check_owner

PART = ".part-"
DELETED = "-deleted"  # at the end of what is being removed


class LocalStore:
    """Copies of one run's checkpoints under `root/checkpoints`, and of its other files beside them."""

    def __init__(self, root: Path, *, run_id: str):
        self.root, self.run_id = root, run_id
        self.address = str(root)
        self.checkpoints = root / "checkpoints"

    def published(self) -> dict[int, str]:
        """See Store.published. A copy has its name only once it was verified."""
        self._check_owner()
        found = {}
        for step in manifest.steps_in(self.checkpoints):
            try:
                found[step] = manifest.own_crc(self.checkpoints / manifest.name_of(step))
            except (OSError, ValueError, KeyError):
                continue  # damaged since: to be published again
        return found

    def check(self) -> dict[int, list[str]]:
        """See Store.check."""
        self._check_owner()
        return {step: manifest.problems(self.checkpoints / manifest.name_of(step), step) for step in manifest.steps_in(self.checkpoints)}

    def publish(self, step: int, checkpoint: Path, others: Mapping[str, bytes | Path]) -> str:
        """See Store.publish."""
        target = self.checkpoints / manifest.name_of(step)
        part = self.checkpoints / f"{PART}{target.name}"
        try:
            self._check_owner()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for left in self.checkpoints.glob(f"{PART}*"):  # by what was killed
                shutil.rmtree(left, ignore_errors=True)
            shutil.copytree(checkpoint, part)
            fsync_tree(part)
            if wrong := manifest.problems(part, step):
                if damage := manifest.problems(checkpoint, step):
                    raise DamagedError(f"checkpoint {step} is damaged and not published: {'; '.join(damage[:3])}")
                raise StorageError(f"the copy of checkpoint {step} in {self.root} is not whole: {'; '.join(wrong[:3])}; it is made again")
            for name, content in others.items():
                write_atomic(self.root / name, content if isinstance(content, bytes) else content.read_bytes())
            self.delete(step)
            os.rename(part, target)
            fsync(self.checkpoints)
        except OSError as e:
            raise StorageError(f"checkpoint {step} cannot be published to {self.root}: {e}; see to the folder, it is tried again") from e
        return str(target)

    def fetch(self, step: int, target: Path) -> None:
        """See Store.fetch."""
        source = self.checkpoints / manifest.name_of(step)
        if wrong := manifest.problems(source, step):
            raise StorageError(f"the published copy of checkpoint {step} is damaged too: {'; '.join(wrong[:3])}")
        part = target.with_name(f"{PART}{target.name}")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part)
        fsync_tree(part)
        os.rename(part, target)
        fsync(target.parent)

    def delete(self, step: int) -> None:
        """See Store.delete."""
        target = self.checkpoints / manifest.name_of(step)
        if target.exists():
            gone = self.checkpoints / f"{PART}{target.name}{DELETED}"
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(target, gone)  # at once: what is half deleted must not look like a copy
            shutil.rmtree(gone, ignore_errors=True)

    def clear(self, keep: Collection[int], *, dry: bool = False) -> dict[str, int]:
        """See Store.clear. No upload to a folder goes on where it was."""
        self._check_owner()
        found = {p: size_of(p) for p in (*sorted(self.checkpoints.glob(f"{PART}*")), *sorted(self.root.glob("*.part")))}
        for path in () if dry else found:
            remove(path)
        return {str(path): size for path, size in found.items()}

    def clear_deleted(self) -> None:
        """Remove what is left of copies whose deletion was cut off; no upload that is under way."""
        for left in self.checkpoints.glob(f"{PART}*{DELETED}"):
            shutil.rmtree(left, ignore_errors=True)

    def _check_owner(self) -> None:
        identity = self.root / IDENTITY
        check_owner(identity.read_bytes() if identity.exists() else None, self.run_id, self.address)
