"""Data that was prepared elsewhere: its manifest, tokenizer and report are fetched now, its shards when they are read.

A folder on this machine is used where it is, after all its checksums.
"""

import json
from pathlib import Path
from typing import Any

from configs.packed import PackedDataConfig
from trainer.data.packed import NAME, SOURCE, DataManifest, load_manifest, parse_manifest
from trainer.data.shards import fetch, stored
from trainer.errors import DataError
from trainer.files import crc32c, write_atomic
from trainer.paths import cache_dir
from trainer.storage import file_system

from ..refs import DataRef
from .progress import Tell
from .report import NAME as REPORT
from .sources.base import File
from .survey import SurveyJob
from .units import Unit


class PackedPreparation:
    """Has the face of `Preparation`; there is nothing to be read or cut into units."""

    files: tuple[File, ...] = ()
    units: tuple[Unit, ...] = ()

    def __init__(self, config: PackedDataConfig, *, cache: Path | None = None, on_progress: Tell | None = None, **_: Any):
        self.config, self.path = config, config.path
        self._root = (cache or cache_dir()).absolute() / "packed"
        self._tell = on_progress or (lambda message: None)

    def surveys(self) -> list[SurveyJob]:
        """None."""
        return []

    def known(self) -> DataRef | None:
        """The data, if it is there."""
        return self.make()

    def make(self) -> DataRef:
        """Look at the data. Raises DataError if it is not whole or not what the config says, StorageError if a store failed."""
        is_here = "://" not in self.path and "::" not in self.path
        folder = Path(self.path).expanduser().absolute() if is_here else self._fetched()
        manifest = load_manifest(folder)
        self._check(manifest)
        if is_here:
            for file in (manifest.tokenizer, *(shard for split in manifest.splits.values() for shard in split.shards)):
                if crc32c(folder / file.file) != file.crc32c:
                    raise DataError(f"{file.file} of {folder} is not what its manifest says: other bytes (crc32c); copy that folder again")
        return DataRef(path=str(folder), digest=manifest.digest)

    def _fetched(self) -> Path:
        """The folder in the cache that stands for the address."""
        fs, root = file_system(self.path)
        with stored(f"{self.path}/{NAME}"):
            data = fs.cat_file(f"{root.rstrip('/')}/{NAME}")
        manifest = parse_manifest(data, where=f"{self.path}/{NAME}", way_out="copy that folder there again")
        folder = self._root / manifest.digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / manifest.tokenizer.file).exists():
            fetch(self.path, manifest.tokenizer, folder / Path(manifest.tokenizer.file).name)
        try:
            report = fs.cat_file(f"{root.rstrip('/')}/{REPORT}")
        except OSError:
            report = f"Data of {self.path}, which has no report.\n".encode()
        write_atomic(folder / REPORT, report)
        write_atomic(folder / SOURCE, json.dumps({"address": self.path, "cache_bytes": self.config.cache_bytes}).encode())
        write_atomic(folder / NAME, data)
        self._tell(f"found {self.path}; its shards are fetched as they are read, at most {self.config.cache_bytes:,} bytes at a time")
        return folder

    def _check(self, manifest: DataManifest) -> None:
        config = self.config
        if manifest.seq_len != config.seq_len:
            raise DataError(f"{self.path} has rows of {manifest.seq_len} tokens; set data.seq_len={manifest.seq_len}")
        if config.has_test and "test" not in manifest.splits:
            raise DataError(f"{self.path} has no test split; set data.has_test=false")
