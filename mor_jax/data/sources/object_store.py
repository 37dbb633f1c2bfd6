"""Files of Google Cloud Storage, `gs://BUCKET/PATH`, through the client in pyarrow.

Credentials are Google's usual ones (GOOGLE_APPLICATION_CREDENTIALS, those of gcloud, those of the
machine). `gs://anonymous@BUCKET/PATH` uses none, for public buckets.
STORAGE_EMULATOR_HOST names an emulator, as for Google's own clients.
"""

import datetime
import functools
import os
import re
from typing import Any

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail

SCHEME = "gs://"
RETRY_SECONDS = 30
"""How long a request is retried."""

_ANONYMOUS = "anonymous@"


class Bucket:
    """Access to the bucket that the address `pattern` names; errors name `setting` and `spec`."""

    def __init__(self, pattern: str, setting: str, spec: str) -> None:
        address = pattern.removeprefix(SCHEME)
        self._setting, self._spec = setting, spec
        self._prefix = SCHEME + (_ANONYMOUS if address.startswith(_ANONYMOUS) else "")
        name, _, self.path = address.removeprefix(_ANONYMOUS).partition("/")
        rule = "must name a bucket and a file"
        fix = "Write it as gs://BUCKET/PATH; the path may be a pattern"
        ok = bool(name) and bool(self.path) and not set(name) & set("*?[")
        check(ok, setting, spec, rule, fix)
        self._name = name
        self._module = require_package("pyarrow.fs", setting, spec)
        try:
            _ = self._module.GcsFileSystem
        except ImportError as error:
            fix = "Install pyarrow with pip, or copy the files to this machine"
            fail(setting, spec, f"this build of pyarrow has no GCS client ({error})", fix)

    @property
    def _store(self) -> Any:
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        return _store(self._prefix != SCHEME, emulator)

    def address(self, path: str) -> str:
        """The name in errors of the file at `path`."""
        return f"{self._prefix}{self._name}/{path}"

    def sizes(self, folder: str, deep: bool) -> dict[str, int]:
        """Path -> bytes of every file in `folder`, or of the file of that name.

        deep: files in folders below it as well.
        Raises `ValueError` if the bucket cannot be read.
        """
        where = f"{self._name}/{folder}".rstrip("/")
        try:
            [at] = self._store.get_file_info([where])
            infos = [at]
            if at.type != self._module.FileType.File:
                selector = self._module.FileSelector(where, True, deep)
                infos = self._store.get_file_info(selector)
            if not infos:
                [bucket] = self._store.get_file_info([self._name])
                rule = f"bucket {self._name} does not exist"
                ok = bucket.type != self._module.FileType.NotFound
                check(ok, self._setting, self._spec, rule, "Check its name")
        except OSError as error:
            fix = "Check the bucket's name and the network, and run gcloud auth "
            fix += "application-default login; gs://anonymous@BUCKET/PATH reads a public bucket"
            fail(self._setting, self._spec, f"cannot be listed ({reason(error)})", fix)
        files = [info for info in infos if info.type == self._module.FileType.File]
        return {info.path.removeprefix(f"{self._name}/"): info.size for info in files}

    def stream(self, path: str) -> Any:
        """The file at `path`, opened for sequential reading. Raises `OSError`."""
        # By default pyarrow decompresses by file name.
        where = f"{self._name}/{path}"
        return self._store.open_input_stream(where, compression=None, buffer_size=2**22)

    def random(self, path: str) -> Any:
        """The file at `path`, opened for random access. Raises `OSError`."""
        return self._store.open_input_file(f"{self._name}/{path}")


@functools.cache
def _store(anonymous: bool, emulator: str) -> Any:
    from pyarrow import fs

    limit = datetime.timedelta(seconds=RETRY_SECONDS)
    if not emulator:
        return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit)
    scheme, _, host = emulator.rpartition("://")
    return fs.GcsFileSystem(
        anonymous=True, scheme=scheme or "http", endpoint_override=host, retry_time_limit=limit
    )


def reason(error: OSError) -> str:
    """What went wrong, in one line, without the client's history of retries."""
    text = re.sub(
        r"^.*with a last message of ", "", " ".join((error.strerror or str(error)).split())
    )
    return re.sub(r" ?error_info=.*$", "", text).rstrip(" )")
