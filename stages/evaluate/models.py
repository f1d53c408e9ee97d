"""Where does a worker find the trained model, whatever holds the store?"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow.fs as pafs

from stages.store.filesystems import Folder

LocalModel = str
"""Path of a Hugging Face folder on this machine."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The Hugging Face folder that train wrote."""

    folder: Folder

    @contextlib.contextmanager
    def fetch(self) -> Iterator[LocalModel]:
        """Give its path on this machine; a copy from another store is deleted at the end."""
        if self.folder.is_local:
            yield self.folder.path
            return
        with tempfile.TemporaryDirectory(prefix="trained-") as copy:
            pafs.copy_files(self.folder.path, copy, source_filesystem=self.folder.filesystem)
            yield copy
