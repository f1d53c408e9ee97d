"""The trained model's folder, copied to this machine if the store is remote."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.fs as pafs

from stages.store.filesystems import Folder

LocalModel = str
"""Local path of a Hugging Face folder."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Hugging Face folder written by train."""

    folder: Folder

    @contextlib.contextmanager
    def fetch(self) -> Iterator[LocalModel]:
        """Yield its local path; the copy of a remote folder is deleted at the end."""
        if self.folder.is_local:
            yield self.folder.path
            return
        with tempfile.TemporaryDirectory(prefix="trained-") as copy:
            pafs.copy_files(self.folder.path, copy, source_filesystem=self.folder.filesystem)
            yield copy
