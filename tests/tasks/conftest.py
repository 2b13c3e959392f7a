"""Run directories of fake but whole checkpoints, for what handles their files."""

import pytest

from tasks.summary import store_of
from tasks.writer import writing
from trainer import manifest


@pytest.fixture
def place(micro, tmp_path):
    """`place(steps, published)`: a run directory with fake but whole checkpoints, some of them published."""

    def make(steps, published=(), *overrides):
        config = micro("num_steps=100", "chunk_steps=10", "checkpoint.keep_latest=2", *overrides)
        with writing(config, tmp_path / "run") as writer:
            run_dir = writer.run_dir
        for step in steps:
            folder = run_dir.checkpoints / manifest.name_of(step)
            (folder / "params").mkdir(parents=True)
            (folder / "params" / "data").write_bytes(bytes([step % 256]) * 1000)
            (folder / "meta").mkdir()
            (folder / "meta" / "metadata").write_text('{"data_digest": "none"}')
            manifest.write(folder, step)
        store = store_of(config, run_dir)
        for step in published:
            store.publish(step, run_dir.checkpoints / manifest.name_of(step), {"config.json": run_dir.config})
        return config, run_dir, store

    return make
